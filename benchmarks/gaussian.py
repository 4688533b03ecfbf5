"""Mean squared error of a unit Gaussian for each quantizer, beside the bound 2^(-2R): `python -m benchmarks.gaussian`.

Codebooks are those of the package where it has them, else made now; what a machine without a GPU would take minutes for is
left out there. `--plot FILE` draws them (needs matplotlib).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open

from vptq.config import LinearConfig
from vptq.pipeline.codebooks import SHIPPED, codebook_name, make_codebooks, shipped_error
from vptq.quantize.gaussian import mean_squared_error

RATES = (1.0, 1.5, 2.0, 3.0, 4.0)
SLOW, SLOW_STATES = 1 << 14, 1 << 10  # centroids, or states of a trellis, that a CPU does not train in a minute


def setting(vector_len: int, num_centroids: int, trellis_bits: int = -1) -> LinearConfig:
    return LinearConfig(
        vector_lens=(-1, vector_len),
        num_centroids=(-1, num_centroids),
        trellis_bits=trellis_bits,
        codebook_scope="shared",
        rotation="hadamard",
    )


def quantizers() -> dict[str, dict[float, LinearConfig]]:
    """By name, by rate in bits a number, every setting that there is of whole bits and at most 65536 centroids."""
    found: dict[str, dict[float, LinearConfig]] = {}
    for vector_len in (1, 2, 4, 8):
        name = "scalar (Lloyd-Max)" if vector_len == 1 else f"vectors of {vector_len}"
        found[name] = {}
        for rate in RATES:
            bits = rate * vector_len
            if bits == int(bits) and bits <= 16:
                found[name][rate] = setting(vector_len, 1 << int(bits))
    for states in (256, 4096, 16384):
        found[f"trellis, {states} states"] = {
            rate: setting(1, states, int(rate)) if rate == int(rate) else setting(2, states, int(2 * rate)) for rate in RATES
        }
    return found


def measure(config: LinearConfig, device: torch.device) -> float | None:
    """The error of one setting; None where making its codebook would take too long here."""
    name = codebook_name(config)
    if device.type == "cpu" and shipped_error(config) is not None:
        return shipped_error(config)  # measured when the codebook was made, on a GPU
    with safe_open(SHIPPED, framework="pt") as file:
        shipped = f"{name}.main" in file.keys()  # noqa: SIM118 (not a dict)
        tables = {"main": file.get_tensor(f"{name}.main").float()} if shipped else None
    if tables is None:
        if device.type == "cpu" and config.num_centroids[1] >= (SLOW_STATES if config.has_trellis else SLOW):
            return None
        tables = make_codebooks(config, device)
    return mean_squared_error(config, tables["main"].to(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", metavar="FILE", help="PNG of the ratio to the bound")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{'bits a number':22s}" + "".join(f"{rate:>10g}" for rate in RATES))
    print(f"{'bound 2^(-2R)':22s}" + "".join(f"{4**-rate:10.5f}" for rate in RATES))
    results: dict[str, dict[float, float]] = {}
    for name, settings in quantizers().items():
        errors = {rate: measure(config, device) for rate, config in settings.items()}
        results[name] = {rate: error for rate, error in errors.items() if error is not None}
        cells = (f"{results[name][rate]:10.5f}" if rate in results[name] else f"{'-':>10s}" for rate in RATES)
        print(f"{name:22s}" + "".join(cells), flush=True)
    if args.plot:
        plot(results, Path(args.plot))


def plot(results: dict[str, dict[float, float]], path: Path) -> None:
    """How far above the bound each quantizer is, in decibels."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, errors in results.items():
        if not errors:
            continue
        excess = [10 * torch.log10(torch.tensor(error * 4**rate)).item() for rate, error in errors.items()]
        axes.plot(list(errors), excess, marker="o", linestyle="--" if name.startswith("trellis") else "-", label=name)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xlabel="bits a number", ylabel="error above the bound 2^(-2R), dB", ylim=(-0.1, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
