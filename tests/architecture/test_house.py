"""What keeps the house clean: who imports whom, how long functions are, what public docstrings promise."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vptq"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
# From the street up: a room may import from its own floor's file or from a room further down in this list, never up.
FLOORS = [
    "errors", "recipe", "fields", "checks", "config", "finetune_config", "geometry", "layouts", "layer_config", "backend",
    "data", "models", "bits", "calibration", "quantize", "nn", "evaluation", "checkpoint", "finetune", "pipeline", "cli",
]  # fmt: skip
INSIDE = {  # order of files within a room, from the street up
    "models": [
        "device",
        "headers",
        "remote",
        "lock",
        "files",
        "shapes",
        "origins",
        "stream",
        "staging",
        "prefetch",
        "experts",
        "form",
        "architecture",
        "runner",
        "kv_cache",
    ],
    "calibration": ["runs", "hessian", "hessian_store", "fisher", "whole"],
    "quantize": [
        "kernels",
        "kernels.launch",
        "kernels.hadamard",
        "rotation",
        "result",
        "layout",
        "metric",
        "fixed_point",
        "assign",
        "kernels.trellis",
        "trellis",
        "columns",
        "column_sweep",
        "kernels.features",
        "kernels.nearest",
        "kernels.clusters",
        "plain_clusters",
        "clusters",
        "kmeans",
        "codebook",
        "segments",
        "kernels.sweep_block",
        "kernels.sweep",
        "sweep",
        "gaussian",
        "problem",
        "sensitivity",
        "refine",
        "own_codebooks",
        "shared_codebook",
        "linear",
        "trial",
    ],
    "evaluation": ["perplexity", "divergence"],
    "nn": [
        "kernels",
        "kernels.given",
        "kernels.nvrtc",
        "packing",
        "vectors",
        "rings",
        "kernels.tiles",
        "kernels.turns",
        "ops",
        "operands",
        "reference",
        "kernels.packed",
        "kernels.products",
        "kernels.attention",
        "kernels.fused",
        "kernels.operator",
        "kept",
        "column_order",
        "companions",
        "vquant_linear",
        "decoder_block",
        "vquant_embedding",
        "ranges",
        "replace",
    ],
    "checkpoint": ["on_import", "names", "record", "writer", "reader", "verify", "transformers_bridge"],
    "finetune": [
        "trainable",
        "recorded",
        "unpacked",
        "fit",
        "distill",
        "noise",
        "incremental",
        "blockwise",
        "local_model",
        "additions",
        "sample",
        "curves",
        "peft_bridge",
    ],
    "pipeline": [
        "progress",
        "codebooks",
        "fold",
        "ends",
        "evaluate",
        "states",
        "compare",
        "tasks",
        "decode",
        "generate",
        "allocation",
        "selection",
        "plan",
        "cost",
        "run_folder",
        "job",
        "outcome",
        "selftest",
        "facts",
        "plots",
        "report",
        "card",
        "first_plan",
        "hessians",
        "task",
        "works",
        "calibrate",
        "measure",
        "results",
        "schedule",
        "stages",
        "worker",
        "pool",
        "processes",
        "workers",
        "ray",
        "executors",
        "settle",
        "run",
        "tune_job",
        "tune_result",
        "tune_text",
        "tune_models",
        "tune_check",
        "block_pass",
        "output_pass",
        "prediction_pass",
        "tune_blocks",
        "team",
        "teacher",
        "tune_whole",
        "tune_indices",
        "tune_adapters",
        "finetune",
        "quantize_tuned",
        "rates",
        "estimate",
        "forecast",
    ],
    "cli": [
        "commands",
        "options",
        "show",
        "plan",
        "finetune",
        "quantize",
        "eval_ppl",
        "eval_kl",
        "eval_tasks",
        "generate",
        "bits",
        "inspect",
        "report",
        "push",
        "doctor",
        "completion",
        "main",
    ],
}
TORCH_FREE = [
    "errors",
    "recipe",
    "checks",
    "config",
    "finetune_config",
    "geometry",
    "layouts",
    "layer_config",
    "bits",
    "models.headers",
    "models.shapes",
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full, so that this test sees them"
            assert node.module != "vptq" or here_is_entry(path), f"{path}: import from the module that holds the name"
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def here_is_entry(path: Path) -> bool:
    """`from vptq import __version__` and the like, at the top of the house or in the command line's entry."""
    return path.name in ("__init__.py", "main.py")


def rank(module: str) -> tuple[int, int]:
    room, _, rest = module.partition(".")
    order = INSIDE.get(room, [])
    return FLOORS.index(room), order.index(rest) if rest in order else -1


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downwards_only(path):
    here = module_name(path)
    if here in ("__init__", "__main__"):
        return
    for target in imports(path):
        if target.startswith("vptq."):
            other = target.removeprefix("vptq.")
            assert rank(other) < rank(here), f"{here} imports {other}, which is not below it"


def test_every_file_has_its_place():
    for path in FILES:
        room, _, rest = module_name(path).partition(".")
        if room in INSIDE and rest and "demo" not in rest:
            assert rest in INSIDE[room], f"{room}/{rest}.py is not in the order of its room"


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p).startswith("quantize")], ids=module_name)
def test_quantizer_knows_no_files_transformers_or_threads(path):
    forbidden = {"transformers", "safetensors", "pathlib", "threading", "multiprocessing", "datasets", "json", "os"}
    assert not forbidden & {name.split(".")[0] for name in imports(path)}


def test_torch_free_modules_import_no_torch():
    modules = "; ".join(f"import vptq.{name}" for name in TORCH_FREE)
    code = f"import sys; {modules}; import vptq.cli.main, vptq.cli.options, vptq.cli.bits; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_import_prints_nothing_and_starts_no_cuda():
    code = "import vptq, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module_name(path), node, node.end_lineno - node.lineno + 1


def test_functions_and_files_are_short():
    lengths = {f"{module}.{node.name}": length for module, node, length in functions()}
    assert max(lengths.values()) <= 80, max(lengths, key=lengths.get)
    assert statistics.median(lengths.values()) <= 15
    assert statistics.quantiles(lengths.values(), n=20)[-1] <= 60
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_print_only_in_the_command_line():
    for path in FILES:
        if not module_name(path).startswith("cli"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path


def public_functions():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield pytest.param(node, id=f"{module_name(path)}.{node.name}")


@pytest.mark.parametrize("node", public_functions())
def test_public_functions_say_what_they_do(node):
    doc = ast.get_docstring(node)
    assert doc, "a public function without a docstring"
    arguments = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
    annotations = " ".join(ast.unparse(a.annotation) for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation)
    if re.search(r"\bTensor\b", re.sub(r"(dict|Mapping)\[str, Tensor\]", "", annotations)):
        assert "(" in doc, f"{node.name} takes tensors but its docstring gives no shape"
    if doc and "Args:" in doc:
        described = doc.split("Args:")[1].split("Returns:")[0].split("Raises:")[0]
        for line in described.splitlines():
            names = line.strip().split(":")[0].split(", ")
            if line.startswith("    ") and not line.startswith("     ") and all(n.isidentifier() for n in names):
                assert set(names) <= arguments, f"{node.name} documents {set(names) - arguments}, which it does not take"
