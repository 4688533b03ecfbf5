"""Kernels compile for real GPUs, here without one: the interpreter takes much that the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vptq.quantize.kernels import clusters, features, hadamard, nearest, sweep_block, trellis

INT64 = {"sums_ptr", "totals_ptr", "products_ptr", "element_totals_ptr"}
INT32 = {"one_ptr", "history_ptr", "seam_ptr", "state_ptr", "index_ptr", "index2_ptr", "active_ptr", "groups_ptr"}
INT32 |= {"assignments_ptr"}

def kind(name, fn):
    if not name.endswith("_ptr") and name not in ("scratch",):
        return "i32"
    if name in INT32:
        return "*i32"
    if name in INT64 and fn is not clusters._block_sums:
        return "*i64"
    if name in ("rows_ptr", "rows2_ptr") or fn is nearest._best_groups:
        return "*fp16"
    if name in ("steps_ptr", "partial_ptr", "found_ptr") or fn is clusters._block_sums and name == "sums_ptr":
        return "*fp64"
    return "*i1" if name == "far_ptr" else "*fp32"

def compile_for(capability, fn, warps, **constants):
    signature = {n: "constexpr" if n in constants else kind(n, fn) for n in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    print("compiled", fn.__name__)

for v, weighted in ((6, False), (4, True)):
    l = features.choose_layout(v, 4096, weighted)
    shape = dict(VECTOR_LEN=v, WIDTH=l.width, ELEMENTS=l.elements, WEIGHTED=weighted, SPLIT=l.split)
    scores = dict(LANES=128, PACKED=True, NOTHING=nearest.MINUS_INFINITY_TWICE)
    far = dict(FAR=features.FAR_VECTOR)
    capability = 90 if weighted else 80
    go = lambda fn, warps=4, **constants: compile_for(capability, fn, warps, **constants)
    go(features._vector_rows, **shape, **far, BLOCK=256, **({} if weighted else {"w_ptr": None}))
    go(features._centroid_rows, **shape, **far, TILES=l.tiles, PADDED=l.padded, HALF_LANES=64, NEVER=-6e4, BLOCK=128)
    go(nearest._best_groups, TILES=l.tiles, WIDTH=l.width, ROWS=128, STAGES=3, **scores)
    go(nearest._nearest_in_group, VECTOR_LEN=v, GROUP=l.group, PADDED=l.padded, WEIGHTED=weighted, SUMS=True, ROWS=32)
    go(clusters._measure, VECTOR_LEN=v, RAGGED=weighted, BLOCK=1024)
    go(clusters._means, VECTOR_LEN=v, RAGGED=weighted, BLOCK=256)
    go(clusters._block_sums, BLOCK=4096)
    l = features.choose_layout(v, 4096, False)
    block = dict(VECTOR_LEN=v, WIDTH=8 if v == 6 else 4, COLUMNS=128, ROWS=16, FEATURES=l.width, ELEMENTS=l.elements)
    block |= dict(SPLIT=l.split, TILES=l.tiles, RESIDUAL_TILES=2, RESIDUAL=weighted, **scores, **far)
    go(sweep_block._sweep_out, 8, **block)
    go(sweep_block._sweep_in, 8, **block)
    go(hadamard._hadamard, POWER=1024, WIDTH=32, WIDE=32, HIGH=32, RUNS=2)
    states = dict(VECTOR_LEN=2, STATE_BITS=10, STEP_BITS=3)
    go(trellis._viterbi, 4, **states, WEIGHTED=weighted, OWN_WEIGHTS=False, HELD=weighted)
    go(trellis._sweep_rings, 4, **states, PADDED=weighted, SPAN=512, TILE=4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux only")
@pytest.mark.ci
def test_all_kernels_compile(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    found = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("compiled") == 24
