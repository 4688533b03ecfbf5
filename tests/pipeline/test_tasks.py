"""`eval-tasks`: what reaches lm-eval, and what is said without it."""

import sys
import types

import pytest

from vptq.errors import UsageError
from vptq.pipeline.tasks import evaluate_tasks


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in that answers as lm-eval 0.4 does and keeps what it was given."""
    seen = {}

    class TaskManager:
        def __init__(self, include_path=None):
            seen["include_path"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "known"]

    def evaluate(model, tasks, **others):
        seen.update(model=model, tasks=tasks, **others)
        return {"results": {"known": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "known", "sample_len": 3}}}

    package, models, tasks = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    package.simple_evaluate = evaluate
    models.HFLM = lambda **given: given
    tasks.TaskManager = TaskManager
    for module in (package, types.ModuleType("lm_eval.models"), models, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


@pytest.mark.parametrize("packed", [False, True])
def test_figures_come_back_by_their_plain_names(lm_eval, packed, tiny_llama, text_file, tmp_path):
    folder = tiny_llama
    if packed:
        from tests.pipeline.test_run import config_of
        from vptq.pipeline.run import quantize_model

        folder = quantize_model(config_of(tiny_llama, text_file, tmp_path)).folder / "packed_model"
    found = evaluate_tasks(str(folder), ["known"], limit=5, device="cpu")
    assert found == {"known": {"acc": 0.5, "acc_stderr": 0.1}}
    assert lm_eval["tasks"] == ["known"] and lm_eval["limit"] == 5
    model = lm_eval["model"]["pretrained"]
    assert type(model.model.layers[0].mlp.up_proj).__name__ == ("VQuantLinear" if packed else "Linear")
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_unknown_tasks_are_named_before_a_model_is_read(lm_eval):
    with pytest.raises(UsageError, match=r"knows no such tasks(.|\n)*nonsense"):
        evaluate_tasks("no-such-folder", ["known", "nonsense"])


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"vptq\[eval\]"):
        evaluate_tasks(None, ["known"])
