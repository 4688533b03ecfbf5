"""Tasks of lm-eval on any model this package reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vptq.checkpoint.reader import load_whole
from vptq.data import load_tokenizer
from vptq.errors import UsageError
from vptq.models.architecture import resolve_folder


def evaluate_tasks(
    model_name: str | None,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """The figures of each task: {task: {metric: value, metric_stderr: error}}.

    Args:
        model_name: folder or hub name; None for the demo model. tasks: names that lm-eval knows, or that `include_path` holds.
        limit: most questions a task.
    Raises:
        UsageError: lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate  # noqa: PLC0415 (an extra, and slow to import)
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise UsageError("eval-tasks needs lm-eval", where=[str(error)], hint="pip install 'vptq[eval]'") from error
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError("lm-eval knows no such tasks", where=unknown, hint="`lm_eval ls tasks` lists those it knows")
    model = load_whole(model_name, device, cache_weights=True, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(resolve_folder(model_name), trust_remote_code)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, bootstrap_iters=1000
    )
    return {task: _figures(values) for task, values in (found or {})["results"].items()}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` and `acc_stderr,none` as acc and acc_stderr."""
    numbers = {name.split(",")[0]: value for name, value in values.items() if "," in name}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
