"""Products with packed matrices as operators that torch.compile and torch.export take as they are, with their gradients.

Gradients go to x and to the codebooks (fine-tuning trains these); indices have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from vptq.backend import use_kernels
from vptq.nn.kernels.nvrtc import kernels_run
from vptq.nn.kernels.turns import Turn, cut_turn, turns
from vptq.nn.rings import RingMatrix, ring_product, ring_weight
from vptq.nn.vectors import VectorMatrix, split_vectors_of, vector_product, vector_weight
from vptq.quantize.rotation import Rotation
from vptq.quantize.trellis import Trellis

SHORT_FLOATS = (torch.float16, torch.bfloat16)
# Spelled out: older versions of torch don't read annotations that are strings.
VECTOR_SIZES = "SymInt out_features, SymInt group_size, bool along_out, SymInt main_bits, SymInt residual_bits) -> Tensor"
RING_SIZES = "SymInt out_features, SymInt ring_len, SymInt state_bits, SymInt step_bits) -> Tensor"


def product(x: Tensor, matrix: VectorMatrix | RingMatrix) -> Tensor:
    """x Wᵀ: (n, columns) float -> (n, out_features), in x's type."""
    if isinstance(matrix, RingMatrix):
        return _ring_product(x, matrix.words, matrix.table, matrix.run_table, *_ring_sizes(matrix))
    return _vector_product(x, matrix.words, matrix.main, matrix.residual, *_vector_sizes(matrix))


def weight(matrix: VectorMatrix | RingMatrix) -> Tensor:
    """The matrix, (out_features, columns), in the type of its codebooks."""
    if isinstance(matrix, RingMatrix):
        return _ring_weight(matrix.words, matrix.table, *_ring_sizes(matrix))
    return _vector_weight(matrix.words, matrix.main, matrix.residual, *_vector_sizes(matrix))


def rotate(x: Tensor, rotation: Rotation | None, back: bool = False) -> Tensor:
    """R x for every row, or Rᵀ x with `back`: (..., size) -> the same; x itself without a rotation."""
    return x if rotation is None else _rotate(x, rotation.seed, rotation.side, rotation.blocks, back)


class Operator:
    """A function as an operator of torch's, and, where nothing is compiled or traced, as it is: the operator's gradients cost
    several times as much of Python's time, which for a linear of middling size is more than a GPU takes.

    Args:
        run: the function; its tensors come first. schema: of its arguments and its answer.
    """

    def __init__(self, name: str, run: Callable[..., Tensor], schema: str) -> None:
        self.run = run
        self.operator = library.custom_op(f"vptq::{name}", run, mutates_args=(), schema=schema)
        self._back: Callable[..., tuple] | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        plain = type(inputs[0]) in (Tensor, torch.nn.Parameter)  # not one of those that stand for tensors while torch traces
        if not plain or inputs[0].is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.operator(*inputs)
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            return _Eager.apply(*inputs, self)
        return self.run(*inputs)

    def register(self, fake: Callable[..., Tensor], back: Callable[..., tuple]) -> None:
        """What has its shape, and its gradients: from a context that `_keep` has filled, and the answer's gradient."""
        self.operator.register_fake(fake)
        self.operator.register_autograd(back, setup_context=_keep)
        self._back = back

    def back(self, ctx: Any, gradient: Tensor) -> tuple:
        """The gradients of the inputs."""
        assert self._back is not None
        return self._back(ctx, gradient)


class _Eager(torch.autograd.Function):
    """An `Operator`, its last argument, as autograd takes functions."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *own, operator = inputs
        _keep(ctx, tuple(own), None)
        ctx.operator = operator
        return operator.run(*own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return (*ctx.operator.back(ctx, gradient), None)


def _keep(ctx: Any, inputs: tuple, output: Any) -> None:
    """Tensors, which come first, and sizes."""
    count = sum(value is None or isinstance(value, Tensor) for value in inputs)
    ctx.save_for_backward(*inputs[:count])
    ctx.sizes = inputs[count:]


def _vector_sizes(matrix: VectorMatrix) -> tuple[int, int, bool, int, int]:
    return matrix.out_features, matrix.group_size, matrix.along_out, matrix.main_bits, matrix.residual_bits


def _ring_sizes(matrix: RingMatrix) -> tuple[int, int, int, int]:
    return matrix.out_features, matrix.ring_len, matrix.trellis.state_bits, matrix.trellis.step_bits


def _rings_of(
    words: Tensor, table: Tensor, run_table: Tensor | None, out_features: int, ring_len: int, state_bits: int, step_bits: int
) -> RingMatrix:
    return RingMatrix(words, table, Trellis(state_bits, step_bits), out_features, ring_len, run_table)


def _takes(matrix: VectorMatrix | RingMatrix, x: Tensor | None = None) -> bool:
    """Whether a Triton kernel does the work: not in double precision."""
    wide = matrix.dtype == torch.float64 or (x is not None and x.dtype == torch.float64)
    return not wide and use_kernels(matrix.words.device) and matrix.words.device.type != "meta"


def _by_kernel(matrix: VectorMatrix | RingMatrix, x: Tensor | None = None) -> Tensor:
    from vptq.nn.kernels.tiles import MOST_ROWS, product_by_kernel, weight_by_kernel

    if x is None:
        return weight_by_kernel(matrix)
    if len(x) <= MOST_ROWS:
        return product_by_kernel(x, matrix)
    return (x.to(matrix.dtype) @ weight_by_kernel(matrix).T).to(x.dtype)


def _run_vector_product(
    x: Tensor, words: Tensor, main: Tensor, residual: Tensor | None,
    out_features: int, group_size: int, along_out: bool, main_bits: int, residual_bits: int,
) -> Tensor:  # fmt: skip
    matrix = VectorMatrix(words, main, residual, out_features, group_size, along_out, main_bits, residual_bits)
    return _by_kernel(matrix, x) if _takes(matrix, x) else vector_product(x, matrix)


def _run_vector_weight(
    words: Tensor, main: Tensor, residual: Tensor | None,
    out_features: int, group_size: int, along_out: bool, main_bits: int, residual_bits: int,
) -> Tensor:  # fmt: skip
    matrix = VectorMatrix(words, main, residual, out_features, group_size, along_out, main_bits, residual_bits)
    return _by_kernel(matrix) if _takes(matrix) else vector_weight(matrix)


def _run_ring_product(
    x: Tensor, words: Tensor, table: Tensor, run_table: Tensor | None,
    out_features: int, ring_len: int, state_bits: int, step_bits: int,
) -> Tensor:  # fmt: skip
    matrix = _rings_of(words, table, run_table, out_features, ring_len, state_bits, step_bits)
    return _by_kernel(matrix, x) if _takes(matrix, x) else ring_product(x, matrix)


def _run_ring_weight(words: Tensor, table: Tensor, out_features: int, ring_len: int, state_bits: int, step_bits: int) -> Tensor:
    matrix = _rings_of(words, table, None, out_features, ring_len, state_bits, step_bits)
    return _by_kernel(matrix) if _takes(matrix) else ring_weight(matrix)


def _run_rotate(x: Tensor, seed: int, side: str, blocks: int, back: bool) -> Tensor:
    rotation = Rotation(x.shape[-1], seed, "in" if side == "in" else "out", blocks)
    if x.dtype in SHORT_FLOATS and x.is_cuda and use_kernels(x.device) and cut_turn(rotation) and kernels_run(x.device):
        rows = Turn(x.reshape(-1, x.shape[-1]).contiguous(), rotation)
        return turns([rows], x.dtype, back)[0].view(x.shape)
    return (rotation.undo(x) if back else rotation.apply(x)).contiguous()


_vector_product = Operator(
    "vector_product", _run_vector_product, "(Tensor x, Tensor words, Tensor main, Tensor? residual, " + VECTOR_SIZES
)
_vector_weight = Operator("vector_weight", _run_vector_weight, "(Tensor words, Tensor main, Tensor? residual, " + VECTOR_SIZES)
_ring_product = Operator(
    "ring_product", _run_ring_product, "(Tensor x, Tensor words, Tensor table, Tensor? run_table, " + RING_SIZES
)
_ring_weight = Operator("ring_weight", _run_ring_weight, "(Tensor words, Tensor table, " + RING_SIZES)
_rotate = Operator("rotate", _run_rotate, "(Tensor x, SymInt seed, str side, SymInt blocks, bool back) -> Tensor")


def _book_gradients(matrix: VectorMatrix | RingMatrix, gradient: Tensor) -> list[Tensor]:
    """From the gradient of the matrix, (out_features, columns), to those of its codebooks, in their shapes and type."""
    if _takes(matrix, gradient):
        from vptq.nn.kernels.tiles import gradients_by_kernel

        sums = gradients_by_kernel(matrix, gradient)
    else:
        sums = _plain_gradients(matrix, gradient)
    return [own.to(matrix.dtype) for own in sums]


def _plain_gradients(matrix: VectorMatrix | RingMatrix, gradient: Tensor) -> list[Tensor]:
    """As `_book_gradients`, float32."""
    if isinstance(matrix, RingMatrix):
        return [_table_gradient(matrix, gradient)]
    vectors = split_vectors_of(gradient.to(matrix.main.dtype), matrix)
    found = [torch.zeros_like(book, dtype=torch.float32) for book in matrix.books]
    for group in range(len(matrix.words)):
        indices = matrix.indices(group, slice(None))
        for sums, index in zip(found, indices, strict=False):
            assert index is not None
            sums[group].index_add_(0, index.flatten(), vectors[group].flatten(0, 1).float())
    return found


def _table_gradient(matrix: RingMatrix, gradient: Tensor) -> Tensor:
    rings, columns = len(matrix.words), gradient.shape[1]
    padded = torch.nn.functional.pad(gradient, (0, 0, 0, rings * matrix.height - len(gradient)))
    vectors = padded.reshape(rings, matrix.ring_len, -1, columns).transpose(2, 3)
    sums = torch.zeros_like(matrix.table, dtype=torch.float32)
    sums.index_add_(0, matrix.windows(slice(None), 1).flatten(), vectors.flatten(0, 2).float())
    return sums


def _of_matrix(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of W in x Wᵀ: (n, out_features) and (n, columns) -> (out_features, columns), summed in float32."""
    return gradient.T @ x if gradient.dtype == x.dtype else gradient.float().T @ x.float()


def _vector_product_back(ctx: Any, gradient: Tensor) -> tuple:
    x, words, main, residual = ctx.saved_tensors
    matrix = VectorMatrix(words, main, residual, *ctx.sizes)
    books: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        books = _pair(_book_gradients(matrix, _of_matrix(gradient, x)))
    back = gradient @ weight(matrix).to(gradient.dtype) if ctx.needs_input_grad[0] else None
    return (back, None, *books, None, None, None, None, None)


def _vector_weight_back(ctx: Any, gradient: Tensor) -> tuple:
    books = _pair(_book_gradients(VectorMatrix(*ctx.saved_tensors, *ctx.sizes), gradient))
    return (None, *books, None, None, None, None, None)


def _pair(books: list[Tensor]) -> list[Tensor | None]:
    """Gradients of main and residual codebook; None for one that is not there."""
    return [*books, *[None] * (2 - len(books))]


def _ring_product_back(ctx: Any, gradient: Tensor) -> tuple:
    x, words, table, _ = ctx.saved_tensors
    matrix = _rings_of(words, table, None, *ctx.sizes)
    own = _book_gradients(matrix, _of_matrix(gradient, x))[0] if ctx.needs_input_grad[2] else None
    back = gradient @ weight(matrix).to(gradient.dtype) if ctx.needs_input_grad[0] else None
    return back, None, own, None, None, None, None, None


def _ring_weight_back(ctx: Any, gradient: Tensor) -> tuple:
    words, table = ctx.saved_tensors
    return None, _book_gradients(_rings_of(words, table, None, *ctx.sizes), gradient)[0], None, None, None, None


def _rotate_back(ctx: Any, gradient: Tensor) -> tuple:
    *settings, back = ctx.sizes
    return _rotate(gradient, *settings, not back), None, None, None, None  # the inverse of a rotation is its transpose


_vector_product.register(
    lambda x, words, main, residual, out_features, *_: x.new_empty(x.shape[0], out_features), _vector_product_back
)
_vector_weight.register(
    lambda words, main, residual, out_features, group_size, *_: main.new_empty(out_features, words.shape[0] * group_size),
    _vector_weight_back,
)
_ring_product.register(
    lambda x, words, table, runs, out_features, *_: x.new_empty(x.shape[0], out_features), _ring_product_back
)
_ring_weight.register(lambda words, table, out_features, *_: table.new_empty(out_features, words.shape[2]), _ring_weight_back)
_rotate.register(lambda x, *_: x.new_empty(x.shape), _rotate_back)
