"""Where shared codebooks come from: with the package, from this user's cache, or made now; each run keeps what it used."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vptq.config import LinearConfig
from vptq.errors import CheckpointError
from vptq.models.files import save_tensors
from vptq.models.remote import fetch
from vptq.models.stream import TensorSource
from vptq.quantize.codebook import store_codebook
from vptq.quantize.gaussian import gaussian_codebook, gaussian_trellis, residual_codebook, train_codebook
from vptq.quantize.problem import rotation_of
from vptq.quantize.result import Codebook
from vptq.quantize.trellis import Trellis

SHIPPED = Path(__file__).parent / "gaussian.safetensors"
VERSION = 1  # of the definition: other numbers, other version
SAMPLES_A_LINEAR = 1 << 16
STAGES = ("main", "residual")


def codebook_name(config: LinearConfig) -> str:
    """What tells shared codebooks apart: source, vector length, centroids, bits of a trellis."""
    name = f"{config.codebook_source}{VERSION}-v{config.vector_len}-k{config.num_centroids[1]}"
    if config.has_residual:
        name += f"-r{config.num_res_centroids[1]}"
    return name + (f"-b{config.trellis_bits}" if config.has_trellis else "")


def codebook_file(folder: Path, config: LinearConfig) -> Path:
    """Where a run keeps the shared codebook of these settings."""
    return folder / f"{codebook_name(config)}.safetensors"


def prepare_codebooks(
    folder: Path, configs: Iterable[LinearConfig], device: torch.device, source: TensorSource | None, linears: list[str]
) -> None:
    """Put every shared codebook that `configs` need in `folder`, where it is not there yet.

    Args:
        source, linears: the model's weights, for codebooks trained on them; None where there are none such.
    """
    for config in {codebook_name(c): c for c in configs if c.is_shared}.values():
        path = codebook_file(folder, config)
        if not path.exists():
            folder.mkdir(exist_ok=True)
            save_tensors(path, _find(config, device, source, linears))


@functools.lru_cache(maxsize=64)
def load_codebooks(path: Path, bitwidth: int, bsize: int, dtype: torch.dtype, device: torch.device) -> tuple[Codebook, ...]:
    """Main and perhaps residual codebook of a file, as they will be stored. dtype: float type of the checkpoint."""
    try:
        found = load_file(fetch(path))
    except Exception as error:
        raise CheckpointError(f"shared codebook `{path}` can't be read", where=[str(error)], hint="delete it") from error
    return tuple(
        store_codebook(found[stage].float().to(device)[None], bitwidth, bsize, dtype) for stage in STAGES if stage in found
    )


def shipped_error(config: LinearConfig) -> float | None:
    """Mean squared error of a unit Gaussian with a codebook of the package, as measured when it was made; None if not there."""
    with safe_open(SHIPPED, framework="pt") as file:
        value = (file.metadata() or {}).get(codebook_name(config))
    return None if value is None else float(value)


def make_codebooks(config: LinearConfig, device: torch.device) -> dict[str, Tensor]:
    """The Gaussian codebooks of a setting from their definition, on `device`: name of the stage -> (k, v) float32."""
    k, v = config.num_centroids[1], config.vector_len
    if config.has_trellis:
        return {"main": gaussian_trellis(v, Trellis.over(k, config.trellis_bits), device)}
    found = {"main": gaussian_codebook(v, k, device)}
    if config.has_residual:
        found["residual"] = residual_codebook(found["main"], config.num_res_centroids[1])
    return found


def _find(config: LinearConfig, device: torch.device, source: TensorSource | None, linears: list[str]) -> dict[str, Tensor]:
    if config.codebook_source == "model":
        assert source is not None
        return {key: tensor.cpu() for key, tensor in _train_on_model(config, device, source, linears).items()}
    name = codebook_name(config)
    with safe_open(SHIPPED, framework="pt") as file:
        shipped = [stage for stage in STAGES if f"{name}.{stage}" in file.keys()]  # noqa: SIM118 (not a dict)
        if shipped:
            return {stage: file.get_tensor(f"{name}.{stage}") for stage in shipped}
    cached = cache_folder() / f"{name}.safetensors"
    if cached.exists():
        try:
            return load_file(cached)
        except Exception:  # damaged: made anew
            cached.unlink(missing_ok=True)
    made = {key: tensor.cpu() for key, tensor in make_codebooks(config, device).items()}
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(cached, made)
    except Exception:
        pass
    return made


def cache_folder() -> Path:
    """VPTQ_CACHE, or vptq in the user's cache folder."""
    own = os.environ.get("VPTQ_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vptq"


def _train_on_model(config: LinearConfig, device: torch.device, source: TensorSource, linears: list[str]) -> dict[str, Tensor]:
    """k-means of vectors drawn from the rotated weights of all linears, each brought to unit variance."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for name in linears:
        weight = source.get(f"{name}.weight").to(device).float()
        weight = rotation_of(config, (weight.shape[0], weight.shape[1]), 1).turn(weight)
        rows = len(weight) // config.vector_len * config.vector_len
        vectors = (weight[:rows] / weight.square().mean().sqrt()).T.reshape(-1, config.vector_len)
        chosen = torch.randperm(len(vectors), generator=generator)[:SAMPLES_A_LINEAR]
        drawn.append(vectors[chosen.to(device)])
    samples = torch.cat(drawn)
    most = max(config.num_centroids[1] * 64, 1 << 18)
    samples = samples[torch.randperm(len(samples), generator=generator)[:most].to(device)].contiguous()
    found = {"main": train_codebook(samples, config.num_centroids[1], generator)}
    if config.has_residual:
        found["residual"] = residual_codebook(found["main"], config.num_res_centroids[1], samples)
    return found
