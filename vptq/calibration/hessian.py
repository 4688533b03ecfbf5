"""Second moments of the inputs of linears, one for each distinct input."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vptq.calibration.runs import InputSums, Subtree, TreeSum, subtrees_of
from vptq.errors import NumericalError

CHUNK_TOKENS = 1024  # tensor cores add up to here; longer sums lose what float32 would keep
CHUNKS = 16  # added up in float32, then in float64
LARGEST_EXPONENT = 14  # weighted rows are brought to under 2^14 before they become float16
SMALLEST = 1e-14  # that they are brought up from: the square of the power must be a float32


class HessianAccumulator:
    """Sums over tokens of x xᵀ, taken in one batch at a time; with weights, of s x xᵀ for each of several s.

    Float32 inputs: the product of each batch is float32, the sum over batches float64, so that the order and number of
    batches move the result by rounding only. Float16 and bfloat16 inputs on a GPU: tensor cores take the products of 1024
    tokens at a time, exact and summed in float32; docs/performance.md has the error of both.

    Args:
        groups: numbers of weights a token; 0 for none.
        drifts: also the sum of s (x₀ - x) xᵀ, x₀ the original model's input.
    """

    def __init__(self, size: int, device: torch.device, groups: int = 0, drifts: bool = False) -> None:
        self.groups = groups
        self.total = torch.zeros(max(groups, 1), size, size, dtype=torch.float64, device=device)
        self.drift = torch.zeros_like(self.total) if drifts else None
        self.num_tokens = 0

    def add(self, inputs: Tensor, weights: Tensor | None = None, originals: Tensor | None = None) -> None:
        """inputs: (..., in_features) float. weights: None or (groups, tokens) >= 0. originals: like inputs, where it drifts."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return
        self.num_tokens += len(rows)
        away = None if originals is None else originals.reshape(rows.shape).float() - rows.float()
        for group in range(len(self.total)):
            factor = None if weights is None else weights[group].to(rows.device, torch.float32).sqrt()[:, None]
            if factor is None:
                add_products(self.total[group], rows, rows)
            if factor is None and away is None:
                continue
            right, power = _scaled(rows, factor)
            if factor is not None:
                add_products(self.total[group], right, right, power.square())
            if self.drift is not None and away is not None:
                left, other = _scaled(away, factor, rows.dtype)
                add_products(self.drift[group], left, right, other * power)

    def take(self) -> InputSums:
        """The sums as float32; what comes next is summed from nothing."""
        total, drift = (None if sums is None else sums.float() for sums in (self.total, self.drift))
        assert total is not None
        if not self.groups:
            total, drift = total[0], None if drift is None else drift[0]
        found = InputSums(total, drift, self.num_tokens)
        self.num_tokens = 0
        self.total.zero_()
        if self.drift is not None:
            self.drift.zero_()
        return found


def add_products(total: Tensor, left: Tensor, right: Tensor, divisor: Tensor | None = None) -> None:
    """total += leftᵀ right / divisor, in place. total: (m, n) float64; rows: (tokens, m) and (tokens, n), of one float type."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16) and has_mixed_products():
        length = CHUNK_TOKENS * CHUNKS
        products = [mixed_product(a, b) for a, b in zip(left.split(length), right.split(length), strict=True)]
    else:
        products = [left.float().T @ right.float()]
    for product in products:
        total += product if divisor is None else product / divisor


def _scaled(rows: Tensor, factor: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Rows times a factor each, for products of 16-bit numbers times a power of two that brings them well inside float16.

    Args:
        rows: (n, m) float. factor: None or (n, 1) float32. dtype: the activations'; None for that of the rows.
    Returns:
        Rows, (n, m), float16 for both 16-bit types, float32 for wider ones; the power, (), one for these.
    """
    factor = torch.ones((), device=rows.device) if factor is None else factor
    if (dtype or rows.dtype) not in (torch.float16, torch.bfloat16):
        return rows.float() * factor, factor.new_ones(())
    largest = (torch.linalg.vector_norm(rows, float("inf")).float() * factor.amax()).clamp_min(SMALLEST)
    power = torch.exp2(LARGEST_EXPONENT - torch.frexp(largest)[1].float())
    found = torch.empty(rows.shape, dtype=torch.float16, device=rows.device)
    return torch.mul(rows, factor * power, out=found), power


def mixed_product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of (tokens, m) and (tokens, n) float16 or bfloat16 on a GPU: (m, n) float32."""
    chunks = list(zip(left.split(CHUNK_TOKENS), right.split(CHUNK_TOKENS), strict=True))
    product = torch.mm(chunks[0][0].T, chunks[0][1], out_dtype=torch.float32)
    for first, second in chunks[1:]:
        torch.addmm(product, first.T, second, out_dtype=torch.float32, out=product)
    return product


@functools.cache
def has_mixed_products() -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 one (from 2.8 on)."""
    ones = torch.ones(16, 16, dtype=torch.float16, device="cuda")
    try:
        return bool(torch.addmm(ones.float(), ones, ones, out_dtype=torch.float32).eq(17).all())
    except (TypeError, RuntimeError):
        return False


@dataclass(frozen=True)
class Hessian:
    """One Hessian, (in, in) float32, and the linears (names inside the block) whose input it describes."""

    matrix: Tensor
    num_tokens: int
    linears: tuple[str, ...]


@dataclass(frozen=True)
class BlockSums:
    """What was seen of a block over some runs of sequences.

    Attributes:
        subtrees: for each distinct input, named by the first linear that takes it in, what was summed.
        leaders: linear (name inside the block) -> the name of its input.
    """

    subtrees: dict[str, list[Subtree]]
    leaders: dict[str, str]


class BlockHessians:
    """Watches the linears of one block; those fed by the same tensor share one accumulator, unless tokens are weighted.

    Args:
        weights: None, or for each linear (name inside the block) (groups, tokens), weights of all tokens in the order they
            come.
        paired: the block runs twice on every batch, first on what the original model gives it, then on what it is calibrated
            on; the drift between the two is taken down.
        first_run: number of the run of sequences that comes first.
    """

    def __init__(
        self, block_name: str, weights: Mapping[str, Tensor] | None = None, paired: bool = False, first_run: int = 0
    ) -> None:
        self.block_name, self.weights, self.paired = block_name, weights, paired
        self._runs = range(first_run, first_run)  # that have ended
        self._accumulators: dict[str, HessianAccumulator] = {}
        self._trees: dict[str, TreeSum] = {}
        self._leader: dict[str, str] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._originals: dict[str, Tensor] = {}
        self._recording = False
        self._next_token: dict[str, int] = {}
        self._batch_tokens = 0

    @contextlib.contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Accumulate while the block runs."""
        with contextlib.ExitStack() as hooks:
            hooks.callback(self._originals.clear)
            hooks.callback(self._seen.clear)
            hooks.enter_context(block.register_forward_pre_hook(self._begin, with_kwargs=True))
            for suffix, module in block.named_modules():
                if isinstance(module, nn.Linear) and (self.weights is None or suffix in self.weights):
                    hooks.enter_context(module.register_forward_pre_hook(self._hook(suffix)))
            yield

    def _begin(self, _block: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._batch_tokens = hidden[..., 0].numel()
        self._seen.clear()
        self._recording = self.paired and not self._recording
        if self._recording:
            self._originals.clear()

    def _hook(self, suffix: str):  # type: ignore[no-untyped-def]
        def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            if self._recording:
                self._originals[suffix] = inputs
            elif self.weights is not None:
                self._leader.setdefault(suffix, suffix)
                self._add(suffix, inputs)
            elif not self._follows(suffix, inputs):
                self._leader.setdefault(suffix, suffix)
                self._seen[id(inputs)] = (suffix, inputs)  # the tensor is kept, so that its id stays its own
                self._add(suffix, inputs)

        return watch

    def _follows(self, suffix: str, inputs: Tensor) -> bool:
        """Whether another linear has taken this very tensor in."""
        seen = self._seen.get(id(inputs))
        if seen is None or self._leader.get(suffix, seen[0]) != seen[0]:
            return False
        self._leader[suffix] = seen[0]
        return True

    def _add(self, suffix: str, inputs: Tensor) -> None:
        own = None if self.weights is None else self.weights[suffix]
        originals = self._originals.get(suffix)
        count = inputs[..., 0].numel()
        if suffix not in self._accumulators:
            groups = 0 if own is None else len(own)
            self._accumulators[suffix] = HessianAccumulator(inputs.shape[-1], inputs.device, groups, self.paired)
        if count != self._batch_tokens:  # an expert: another run may have given it other tokens, so none can be told apart
            own, originals = None if own is None else torch.ones(len(own), count), None
        elif own is not None:
            first = self._next_token.get(suffix, 0)
            self._next_token[suffix] = first + count
            own = own[:, first : self._next_token[suffix]]
        self._accumulators[suffix].add(inputs, own, originals)

    def end_run(self) -> None:
        """The next batches are of another run."""
        run = self._runs.stop
        for leader, accumulator in self._accumulators.items():
            if leader not in self._trees:
                self._trees[leader] = TreeSum(subtrees_of(self._runs))
            self._trees[leader].add(Subtree(0, run, accumulator.take() if accumulator.num_tokens else None))
            self._trees[leader].make_room()
        self._runs = range(self._runs.start, run + 1)

    def collect(self) -> BlockSums:
        """What the runs that have ended sum up to. Empties the watcher.

        Raises:
            NumericalError: non-finite activations; names the linears.
        """
        found = {leader: tree.subtrees for leader, tree in self._trees.items()}
        self._accumulators.clear()
        self._trees = {}
        bad = [
            f"{self.block_name}.{suffix}"
            for suffix, leader in self._leader.items()
            if not all(subtree.sums is None or _is_finite(subtree.sums) for subtree in found.get(leader, ()))
        ]
        if bad:
            raise NumericalError(
                "non-finite activations go into these linears",
                where=bad,
                hint="check the model's weights, calibrate other text, or use a bfloat16 copy of the model",
            )
        return BlockSums(found, {suffix: leader for suffix, leader in self._leader.items() if leader in found})


def _is_finite(sums: InputSums) -> bool:
    """By the diagonals, which any number that is not finite reaches."""
    return bool(torch.isfinite(sums.total.diagonal(dim1=-2, dim2=-1)).all())
