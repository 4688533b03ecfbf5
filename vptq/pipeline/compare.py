"""How far a quantized model's predictions are from its original's; what the original computes is kept for the next time."""

from __future__ import annotations

from collections.abc import Sequence

from vptq.checkpoint.reader import open_source
from vptq.data import check_dataset
from vptq.errors import UsageError
from vptq.evaluation.divergence import Divergence, compare, last_states
from vptq.evaluation.perplexity import token_batches
from vptq.models.architecture import DEMO, Skeleton, load_skeleton, resolve_folder
from vptq.models.device import forced_dtype, resolve_device
from vptq.models.runner import BlockRunner
from vptq.pipeline.evaluate import load_windows, resolve_seq_len
from vptq.pipeline.progress import Progress, Silent
from vptq.pipeline.states import read_states, states_file, states_folder


def compare_models(
    original: str | None,
    quantized: str,
    datasets: Sequence[str] | None = None,
    *,
    seq_len: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Divergence]:
    """KL divergence of a quantized model, packed or dequantized, from its original on each dataset.

    Args:
        original: folder or hub name; None for the demo model. quantized: folder or hub name.
        datasets: names or paths; None for the model's usual one. seq_len: context; None for 2048, or the model's if shorter.
        limit: most windows. cache_dir: keeps what the original's blocks put out (None: in the user's cache folder).
    Raises:
        UsageError: bad input, models of two vocabularies among it, before any work.
    """
    progress = progress or Silent()
    target = resolve_device(device)
    names = list(datasets or [str(DEMO / "evaluation.txt") if original is None else "wikitext2"])
    for name in names:
        check_dataset(name)
    skeletons = [load_skeleton(resolve_folder(m), trust_remote_code, forced_dtype(target)) for m in (original, quantized)]
    check_alike(*skeletons)
    length = resolve_seq_len(seq_len, skeletons[0].max_seq_len)
    sources = [open_source(skeleton, target) for skeleton in skeletons]
    windows = load_windows(skeletons[0], names, seq_len=length, stride=None, limit=limit, trust_remote_code=trust_remote_code)
    dtypes = [forced_dtype(target) or skeleton.dtype for skeleton in skeletons]
    runners = [
        BlockRunner(skeleton, source, target, dtype) for skeleton, source, dtype in zip(skeletons, sources, dtypes, strict=True)
    ]
    folder = states_folder(cache_dir)
    blocks = sum(len(skeleton.blocks) for skeleton in skeletons)
    progress.start(sum(len(token_batches(cut)) for cut in windows.values()) * blocks, 0)
    results = []
    for name, cut in windows.items():
        progress.phase(f"the original on {name}")
        first = read_states(states_file(runners[0], cut, folder, lambda: progress.advance(1)))
        progress.phase(f"the quantized model on {name}")
        second = last_states(runners[1], cut, lambda: progress.advance(1))
        results.append(compare((runners[0], first), (runners[1], second), cut, name))
    progress.finish()
    return results


def check_alike(original: Skeleton, quantized: Skeleton) -> None:
    """Raise UsageError for models of two vocabularies."""
    sizes = [getattr(skeleton.model.config, "vocab_size", None) for skeleton in (original, quantized)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            "the models have different vocabularies",
            where=[f"`{s.folder}`: {size} tokens" for s, size in zip((original, quantized), sizes, strict=True)],
            hint="--original must be the model that was quantized",
        )
