"""CUDA sources on a CPU: compiled by g++ with cuda_on_cpu.h in the place of ptx.cuh, called as on a GPU."""

import ctypes
import functools
import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from vptq.nn.kernels.nvrtc import read_source

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
ARGUMENT = {
    "product": "Products", "prepare": "Products", "weight": "Weight", "turn": "Turns", "turn_rows": "Turns",
    "attend": "Attention",
}  # fmt: skip


def can_emulate() -> bool:
    return shutil.which("g++") is not None and platform.machine() == "x86_64"


@functools.cache
def build_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="cuda-on-cpu-"))


class Emulated:
    """Stands for `nvrtc.Kernel`."""

    def __init__(self, code):
        self.code = code

    def launch(self, grid, threads, shared, arguments):
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        self.code.emulate(*grid, threads, shared, pointers)


@functools.cache
def get_emulated(sources, name, defines, device):
    """As `nvrtc.get_kernel`."""
    lines = [f"#define {key} {value}" for key, value in (*defines, ("PROGRAMMATIC", 0))]
    own = [source for source in sources if source != "ptx.cuh"]
    text = "\n".join([
        *lines, HEADER.read_text(), read_source(*own),
        f"static void body(void* a) {{ void** p = (void**)a; {name}(*(const {ARGUMENT[name]}*)p[0]); }}",
        'extern "C" void emulate(int x, int y, int z, int threads, int shared, void** p) {',
        "  run_grid(x, y, z, threads, shared, body, p);",
        "}",
    ])  # fmt: skip
    path = build_folder() / hashlib.sha256(text.encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text(text)
    command = ["g++", "-std=c++17", "-O0", "-w", "-fpermissive", "-shared", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"]
    subprocess.run([*command, "-o", path.with_suffix(".so"), path.with_suffix(".cpp")], check=True)
    return Emulated(ctypes.CDLL(str(path.with_suffix(".so"))))
