"""What a linear is quantized from, what is told of it, and how it is prepared: rotated, normalised, permuted, factored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LinearConfig
from vptq.errors import NumericalError, VptqError
from vptq.quantize.kmeans import KMeansResult
from vptq.quantize.layout import Normalisation, importance_order, normalise
from vptq.quantize.metric import InverseFactor, ProxyError, factor_inverse, scale_metric
from vptq.quantize.rotation import LinearRotation


@dataclass(frozen=True)
class LinearReport:
    """The figures of one quantized linear. Errors are `proxy_error`, in original column order and scale.

    Attributes:
        error_kmeans: nearest centroid, no feedback; None with a shared codebook. error_sweep: main codebook with feedback.
        error_residual: with the residual stage too; None if off. error_refined: after refinement; None if off.
        error: what the stored weight has in the end.
        damping_frac, damping_retries: the damping used, and how often it had to be raised tenfold.
        kmeans_iterations: updates of each k-means, outliers first, then groups, then residual groups.
        kmeans_objectives: weighted squared error each ended with, in the same order.
        weight: tr(W H Wᵀ), what the errors are relative to.
        seconds: wall time; of linears quantized together, an equal share.
    """

    error_kmeans: float | None
    error_sweep: float
    error_residual: float | None
    error_refined: float | None
    error: float
    damping_frac: float
    damping_retries: int
    kmeans_iterations: tuple[int, ...]
    kmeans_objectives: tuple[float, ...]
    weight: float
    seconds: float


@dataclass(frozen=True)
class LinearInput:
    """One linear to quantize.

    Attributes:
        name: seeds its k-means, with `kseed`; stands in messages.
        weight: (out_features, in_features) float, finite.
        hessian: (in_features, in_features) float, symmetric: mean over tokens of x xᵀ; or (row_groups, in, in), one for
            each run of output rows.
        drift: None, or of the same shape: mean of (x₀ - x) xᵀ where x₀ is what the original model feeds the linear and x
            what it will really be fed. The weight is then quantized for the least change of W x₀.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    drift: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """One linear, rotated, normalised and permuted, ready for codebooks and sweep."""

    weight: Tensor  # (out, in) float32, permuted, normalised
    metric_diagonal: Tensor  # (in,) float32, diag(H') permuted
    factor: InverseFactor
    perm: Tensor  # (in,) int64
    normalisation: Normalisation | None
    measure: ProxyError
    generator: torch.Generator
    fits: list[KMeansResult]  # every k-means so far

    def error(self, quantized: Tensor) -> float:
        """Proxy error of a quantized `weight`, back in original column order and scale."""
        unpermuted = quantized[:, torch.argsort(self.perm)]
        return self.measure.of(self.normalisation.undo(unpermuted) if self.normalisation else unpermuted)

    def metric(self) -> Tensor:
        """H' permuted and not damped: (in, in) float32."""
        return _permuted_metric(self.measure.hessian, self.normalisation, self.perm).contiguous()


def prepare(linear: LinearInput, config: LinearConfig, storage_dtype: torch.dtype) -> Problem:
    """The problem of a linear with codebooks of its own. Raises NumericalError where the Hessian can't be factored."""
    weight, hessian = rotated(linear, config)
    normalisation = normalise(weight, storage_dtype) if config.normalises else None
    scaled = normalisation.apply(weight) if normalisation else weight
    diagonal = hessian.diagonal().clamp_min(0)
    if normalisation:
        diagonal = diagonal * normalisation.scale * normalisation.scale
    perm = column_order(diagonal, config)
    factor = factor_named(_permuted_metric(hessian, normalisation, perm), config, linear.name)
    generator = torch.Generator().manual_seed(_seed_of(linear.name, config.kseed))
    measure = ProxyError(weight, hessian)
    return Problem(
        scaled[:, perm].contiguous(), diagonal[perm].contiguous(), factor, perm, normalisation, measure, generator, []
    )


def column_order(diagonal: Tensor, config: LinearConfig) -> Tensor:
    """The order in which columns are quantized, by diag(H'): (in,) float -> (in,) int64."""
    return importance_order(diagonal) if config.enable_perm else torch.arange(len(diagonal), device=diagonal.device)


def _permuted_metric(hessian: Tensor, normalisation: Normalisation | None, perm: Tensor) -> Tensor:
    scaled = scale_metric(hessian, normalisation.scale) if normalisation else hessian
    return scaled[perm][:, perm]


def factor_named(metric: Tensor, config: LinearConfig, name: str) -> InverseFactor:
    """`factor_inverse` of a linear: (in, in), permuted, since a triangular factor can't be un-permuted afterwards."""
    try:
        return factor_inverse(metric, config.percdamp)
    except NumericalError as error:
        raise NumericalError(error.what, where=[name], hint=error.hint) from error


def rotated(linear: LinearInput, config: LinearConfig, row_groups: int = 1) -> tuple[Tensor, Tensor]:
    """R_out W R_inᵀ, (out, in) float32, W aiming at W x₀ where inputs drift, and R_in H R_inᵀ, (in, in) or (groups, in, in)."""
    weight, hessian = linear.weight.float(), linear.hessian.float()
    if linear.drift is not None:
        weight = undrifted(weight, hessian, linear.drift.float(), config.percdamp)
    if hessian.ndim == 3 and row_groups == 1:
        hessian = hessian[0]
    rotation = rotation_of(config, (weight.shape[0], weight.shape[1]), row_groups)
    return rotation.turn(weight).contiguous(), rotation.turn_metric(hessian).contiguous()


def rotation_of(config: LinearConfig, shape: tuple[int, int], row_groups: int) -> LinearRotation:
    """The rotation of a linear of shape (out_features, in_features) under its settings."""
    return LinearRotation.of(config.rotation, config.rotation_sides, shape, config.rotation_seed, row_groups)


def undrifted(weight: Tensor, hessian: Tensor, drift: Tensor, damping_frac: float) -> Tensor:
    """The weight W* with E‖W x₀ - Ŵ x‖² = tr((W* - Ŵ) H (W* - Ŵ)ᵀ) + what no Ŵ can change: W + W D H⁻¹ (GPTAQ's aim).

    Args:
        weight: (out_features, in_features) float32. hessian, drift: (in, in), or (groups, in, in) for runs of rows.
        damping_frac: of the mean diagonal, added to H: where little is known, W stays.
    """
    groups = hessian if hessian.ndim == 3 else hessian[None]
    shifts = drift if drift.ndim == 3 else drift[None]
    parts = []
    for rows, own, shift in zip(weight.chunk(len(groups)), groups, shifts, strict=True):
        damped = own.double()
        mean = damped.diagonal().mean()
        damped.diagonal().add_(damping_frac * mean + 1e-12)
        parts.append(rows + torch.linalg.solve(damped, (rows.double() @ shift.double()).T).T.float())
    return torch.cat(parts)


def check_input(linear: LinearInput, row_groups: int) -> None:
    """Raise for sizes that don't fit, and for numbers that are not finite; names the linear."""
    name, weight, hessian = linear.name, linear.weight, linear.hessian
    size = weight.shape[1]
    if hessian.shape not in ((size, size), (row_groups, size, size)):
        raise VptqError(f"`{name}`: Hessian {tuple(hessian.shape)} does not fit weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("non-finite weights", where=[name], hint="the checkpoint is damaged or overflowed; get it anew")
    if not bool(torch.isfinite(hessian).all()):
        raise NumericalError(
            "non-finite Hessian",
            where=[name],
            hint="activations overflowed; calibrate other text, or load the model as bfloat16",
        )


def _seed_of(name: str, kseed: int) -> int:
    """A seed of its own for every linear, whoever quantizes it and in whatever order."""
    return int.from_bytes(hashlib.sha256(f"{kseed}/{name}".encode()).digest()[:7], "little")
