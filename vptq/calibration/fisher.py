"""How much the loss depends on each output of a linear, token by token: what `--hessian fisher` weighs its Hessians with.

The loss changes, to second order, by half of Σ_t (g_tᵀ E x_t)², g_t its gradient at the linear's output for token t, x_t the
input, E the error of the weight. With the gradient's square averaged over runs of output rows this is tr(E_r H_r E_rᵀ) for
each run, H_r = mean over tokens of s_r(t) x xᵀ (GuidedQuant, arXiv:2505.07004). Only the s_r(t) are kept: a few numbers a
token, where the Hessians of all linears at once would not fit.

Backward goes block by block, as forward does: what went into each block is kept for some sequences at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vptq.errors import NumericalError
from vptq.models.device import free_memory
from vptq.models.runner import BlockRunner

KEPT_FRACTION = 0.3  # of free GPU memory, for what went into each block
KEPT_BYTES = 4 << 30  # of main memory, where that is used


def token_weights(
    runner: BlockRunner,
    batches: list[Tensor],
    row_groups: Mapping[str, int],
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """The mean squared gradient of the loss over each run of output rows of each linear, for every token.

    Args:
        batches: of tokens, (sequences, seq_len) int64 each.
        row_groups: number of runs for every linear, by full name.
        progress: called with the part that is done anew.
    Returns:
        By name, (row_groups, num_tokens) float32 on the CPU, in the order in which the tokens reach the linear; zero for a
        sequence's last token, which predicts nothing.
    Raises:
        NumericalError: gradients that are not finite; names the linears.
    """
    total = sum(tokens.numel() for tokens in batches)
    found = {name: torch.zeros(groups, total) for name, groups in row_groups.items()}
    each = batches_at_once(runner, batches)
    places = dict.fromkeys(found, 0)
    for start in range(0, len(batches), each):
        group = batches[start : start + each]
        _add_group(runner, group, found, places)
        if progress:
            progress(sum(tokens.numel() for tokens in group) / total)
    bad = [name for name, weights in found.items() if not bool(torch.isfinite(weights).all())]
    if bad:
        raise NumericalError(
            "gradients of the loss are not finite at these linears",
            where=bad,
            hint="use a bfloat16 copy of the model, or --hessian input",
        )
    return found


def weights_of(gradient: Tensor, groups: int) -> Tensor:
    """The mean square of a linear's output gradients, (..., out_features), over runs of rows: (groups, tokens) float32."""
    return gradient.detach().reshape(-1, groups, gradient.shape[-1] // groups).float().square().mean(2).T


def batches_at_once(runner: BlockRunner, batches: list[Tensor]) -> int:
    """How many batches, (sequences, seq_len) each, have the inputs of all their blocks kept together."""
    size = runner.skeleton.hidden_size * runner.dtype.itemsize
    each = max(tokens.numel() for tokens in batches) * size * (len(runner.skeleton.blocks) + 2)
    room = KEPT_BYTES
    if runner.device.type == "cuda":
        room = int(free_memory(runner.device) * KEPT_FRACTION)
    return max(1, room // each)


def _add_group(runner: BlockRunner, group: list[Tensor], found: dict[str, Tensor], places: dict[str, int]) -> None:
    """Forward and backward for some batches; fills `found` from `places` on and moves these, in place."""
    states = runner.embed(group)
    kept: list[list[Tensor]] = []
    hidden = [batch.to(runner.device) for batch in states.batches]
    blocks = range(len(runner.skeleton.blocks))
    with torch.no_grad():
        for block in blocks:
            kept.append(hidden)
            runner.load_block(block)
            runner.prefetch_block(block + 1)
            hidden = [runner.forward_block(block, state, tokens) for state, tokens in zip(hidden, group, strict=True)]
            runner.unload_block(block)
    slopes = [runner.loss_gradient(state, tokens) for state, tokens in zip(hidden, group, strict=True)]
    for block in reversed(blocks):
        runner.load_block(block)
        runner.prefetch_block(block - 1)
        watcher = _GradientWatcher(runner.skeleton.block_name(block), found, places)
        for number, tokens in enumerate(group):
            with watcher.watching(runner.skeleton.blocks[block]), torch.enable_grad():
                state = kept[block][number].detach().requires_grad_()
                output = runner.forward_block(block, state, tokens)
                slopes[number] = torch.autograd.grad(output, state, slopes[number])[0]
        watcher.flush()
        runner.unload_block(block)
        kept.pop()


class _GradientWatcher:
    """Takes down squared gradients at the outputs of a block's linears while a batch goes backward."""

    def __init__(self, block_name: str, found: dict[str, Tensor], places: dict[str, int]) -> None:
        self.block_name, self.found, self.places = block_name, found, places
        self._noted: list[tuple[Tensor, Tensor]] = []  # where it goes, what: left on the device while batches are under way

    @contextlib.contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Take down while the block runs."""
        with contextlib.ExitStack() as hooks:
            for suffix, module in block.named_modules():
                name = f"{self.block_name}.{suffix}"
                if isinstance(module, nn.Linear) and name in self.found:
                    hooks.enter_context(module.register_forward_hook(self._hook(name)))
            yield

    def flush(self) -> None:
        """Fill in what was taken down."""
        for place, weights in self._noted:
            place.copy_(weights)
        self._noted.clear()

    def _hook(self, name: str) -> Callable:
        target = self.found[name]
        groups = len(target)

        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            first = self.places[name]
            self.places[name] += output[..., 0].numel()  # of the tokens that come here: an expert does not see all

            def note(gradient: Tensor) -> None:
                weights = weights_of(gradient, groups)
                self._noted.append((target[:, first : first + weights.shape[1]], weights))

            if output.requires_grad:
                output.register_hook(note)

        return hook
