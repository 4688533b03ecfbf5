"""Second moments of the inputs of linears, one for each distinct input."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vptq.errors import NumericalError

CHUNK_TOKENS = 1024  # tensor cores add up to here; longer sums lose what float32 would keep
CHUNKS = 16  # added up in float32, then in float64


class HessianAccumulator:
    """H = mean over tokens of x xᵀ, taken in one batch at a time.

    Float32 inputs: the product of each batch is float32, the sum over batches float64, so that the order and number of
    batches move the result by rounding only. Float16 and bfloat16 inputs on a GPU: tensor cores take the products of 1024
    tokens at a time, exact and summed in float32; docs/performance.md has the error of both.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (..., in_features) float."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.num_tokens += len(rows)
        if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16) and has_mixed_products():
            for run in rows.split(CHUNK_TOKENS * CHUNKS):
                self.total += mixed_product(run)
        else:
            rows = rows.float()
            self.total += rows.T @ rows

    def merge(self, other: HessianAccumulator) -> None:
        """Take in what another one has seen."""
        self.total += other.total
        self.num_tokens += other.num_tokens

    def mean(self) -> Tensor:
        """(in_features, in_features) float32, symmetric to the bit."""
        mean = (self.total / max(self.num_tokens, 1)).float()
        return (mean + mean.T) / 2


def mixed_product(rows: Tensor) -> Tensor:
    """rowsᵀ rows of (tokens, in_features) float16 or bfloat16 on a GPU: (in_features, in_features) float32."""
    chunks = rows.split(CHUNK_TOKENS)
    product = torch.mm(chunks[0].T, chunks[0], out_dtype=torch.float32)
    for chunk in chunks[1:]:
        product = torch.addmm(product, chunk.T, chunk, out_dtype=torch.float32)
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
    """One Hessian and the linears (names inside the block) whose input it describes."""

    matrix: Tensor
    num_tokens: int
    linears: tuple[str, ...]


class BlockHessians:
    """Watches the linears of one block; those fed by the same tensor share one accumulator."""

    def __init__(self, block_name: str) -> None:
        self.block_name = block_name
        self._accumulators: dict[str, HessianAccumulator] = {}
        self._leader: dict[str, str] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}

    @contextlib.contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Accumulate while the block runs."""
        handles = [block.register_forward_pre_hook(lambda *_: self._seen.clear())]
        for suffix, module in block.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(self._hook(suffix)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _hook(self, suffix: str):  # type: ignore[no-untyped-def]
        def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            seen = self._seen.get(id(inputs))
            if seen is not None and self._leader.get(suffix, seen[0]) == seen[0]:
                self._leader[suffix] = seen[0]
                return
            self._leader.setdefault(suffix, suffix)
            self._seen[id(inputs)] = (suffix, inputs)  # the tensor is kept, so that its id stays its own
            if suffix not in self._accumulators:
                self._accumulators[suffix] = HessianAccumulator(inputs.shape[-1], inputs.device)
            self._accumulators[suffix].add(inputs)

        return watch

    def collect(self) -> list[Hessian]:
        """One Hessian for each distinct input. Empties the watcher.

        Raises:
            NumericalError: non-finite activations; names the linears.
        """
        hessians, bad = [], []
        for leader in list(self._accumulators):
            accumulator = self._accumulators.pop(leader)  # freed before the next one is averaged
            linears = tuple(s for s, first in self._leader.items() if first == leader)
            matrix = accumulator.mean()
            if not bool(torch.isfinite(matrix).all()):
                bad += [f"{self.block_name}.{s}" for s in linears]
            hessians.append(Hessian(matrix, accumulator.num_tokens, linears))
        if bad:
            raise NumericalError(
                "non-finite activations go into these linears",
                where=bad,
                hint="check the model's weights, calibrate other text, or use a bfloat16 copy of the model",
            )
        return hessians
