"""CUDA sources compiled at run time by the NVRTC library that comes with torch, kept on disk, and launched by the driver.

Nothing is compiled when the package is installed, and no compiler or header is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from vptq.errors import VptqError

PROGRAMMATIC_SERIALIZATION = 6  # CUlaunchAttributeID
MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
NO_CONTEXT = 201  # CUresult
SHARED_OF_BLOCK = 97  # CUdevice_attribute
STATIC_SHARED = 48 << 10  # more must be asked for
FIRST_TENSOR_CORES = 8  # major compute capability whose tensor cores the kernels are written for
FIRST_PROGRAMMATIC = 90  # compute capability from which a kernel may begin before the one ahead of it has ended


class KernelError(VptqError):
    """A kernel could not be compiled or launched."""


def find_nvrtc() -> ctypes.CDLL | None:
    """The NVRTC library of this torch's CUDA version; None where there is none."""
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _candidates() -> Iterator[str]:
    major = (torch.version.cuda or "").split(".")[0]
    if not major:
        return
    name = f"libnvrtc.so.{major}"
    for folder in [Path(torch.__file__).parents[1], *map(Path, sys.path)]:
        for found in (f"nvidia/cu{major}/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"):
            if (folder / found / name).exists():
                yield str(folder / found / name)
    yield name
    yield f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/lib64/{name}"


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    found = find_nvrtc()
    if found is None:
        raise KernelError(
            "NVRTC, which compiles kernels, was not found", hint="install torch with CUDA, by its own instructions"
        )
    return found


def compile_source(source: str, defines: Mapping[str, int], capability: int) -> bytes:
    """A cubin for one compute capability (90 for 9.0). Raises KernelError with the compiler's words."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"vptq.cu", 0, None, None))
    options = [f"--gpu-architecture=sm_{capability}", "-std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
    if failed:
        log = _output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        raise KernelError(f"a kernel does not compile: {log.decode(errors='replace').strip()[:2000]}", where=str(dict(defines)))
    binary = _output(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary


def _output(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _checked(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _checked(get(program, buffer))
    return buffer.raw


def _checked(code: int) -> None:
    if code:
        raise KernelError(f"NVRTC failed with code {code}")


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/vptq/kernels`, else under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vptq" / "kernels"


def kept_binary(source: str, defines: Mapping[str, int], capability: int, anew: bool = False) -> bytes:
    """As `compile_source`, from the cache where it is there; anew: compiled whatever is there, and kept in its place.

    A cache that can't be read or written is done without.
    """
    path = _place(source, defines, capability)
    if path is not None and not anew:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    binary = compile_source(source, defines, capability)
    if path is not None:
        with contextlib.suppress(OSError):
            _write_whole(path, binary)
    return binary


def _place(source: str, defines: Mapping[str, int], capability: int) -> Path | None:
    """Where a binary is kept; None where there is no such place."""
    version = (ctypes.c_int(), ctypes.c_int())
    _checked(_nvrtc().nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1])))
    text = f"{source}\n{sorted(defines.items())} {capability} {version[0].value}.{version[1].value}"
    try:
        return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.cubin"
    except RuntimeError:  # nobody's home
        return None


def _write_whole(path: Path, binary: bytes) -> None:
    """Under another name first, so that no other process ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(binary)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def read_source(*names: str) -> str:
    """Source files of this folder, one after the other."""
    folder = resources.files("vptq.nn.kernels")
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver_checked(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise KernelError(f"the CUDA driver failed: {(text.value or b'').decode()} ({code})")


class Kernel:
    """A compiled function on one device."""

    def __init__(self, binary: bytes, name: str, device: torch.device, programmatic: bool) -> None:
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._largest = STATIC_SHARED
        self._attribute = _Attribute(PROGRAMMATIC_SERIALIZATION, 0, 1)
        self._programmatic = programmatic
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # so that the device's context is there and current
            _driver_checked(_driver().cuModuleLoadData(ctypes.byref(self._module), binary))
            _driver_checked(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))

    def launch(self, grid: tuple[int, int, int], threads: int, shared: int, arguments: Sequence[Any]) -> None:
        """On torch's current stream of the current device. arguments: ctypes values, as the function takes them."""
        if shared > self._largest:
            _driver_checked(_driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared))
            self._largest = shared
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        settings = _Launch(
            grid, (threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(self._attribute), int(self._programmatic),
        )  # fmt: skip
        code = _driver().cuLaunchKernelEx(ctypes.byref(settings), self._function, pointers, None)
        if code == NO_CONTEXT:  # a thread that has asked nothing of the GPU yet
            torch.cuda.current_stream().query()
            code = _driver().cuLaunchKernelEx(ctypes.byref(settings), self._function, pointers, None)
        _driver_checked(code)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where the first number of a tensor (of any shape) is, for a kernel's argument; null for none."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether CUDA sources can be compiled for a GPU and run there; tried once, and said once where not."""
    try:
        if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < FIRST_TENSOR_CORES:
            return False
        get_kernel(("ptx.cuh", "trial.cu"), "trial", (), device).launch((1, 1, 1), 32, 0, [])
        torch.cuda.current_stream(device).synchronize()
    except (VptqError, OSError, RuntimeError, AttributeError) as error:
        warnings.warn(f"packed linears run without their fast kernels: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def get_kernel(sources: tuple[str, ...], name: str, defines: tuple[tuple[str, int], ...], device: torch.device) -> Kernel:
    """A function of some source files, compiled with `defines` for a device; made once a process."""
    major, minor = torch.cuda.get_device_capability(device)
    programmatic = 10 * major + minor >= FIRST_PROGRAMMATIC
    settings = dict(defines) | {"PROGRAMMATIC": int(programmatic)}
    source, capability = read_source(*sources), 10 * major + minor
    try:
        return Kernel(kept_binary(source, settings, capability), name, device, programmatic)
    except KernelError:  # a damaged file in the cache?
        return Kernel(kept_binary(source, settings, capability, anew=True), name, device, programmatic)


@dataclass(frozen=True)
class Limits:
    """Of a GPU: multiprocessors, and bytes of shared memory that a block can have."""

    processors: int
    shared: int


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """What launches on a GPU have to keep to."""
    shared, own = ctypes.c_int(), ctypes.c_int()
    _driver_checked(
        _driver().cuDeviceGet(ctypes.byref(own), torch.cuda.current_device() if device.index is None else device.index)
    )
    _driver_checked(_driver().cuDeviceGetAttribute(ctypes.byref(shared), SHARED_OF_BLOCK, own))
    return Limits(torch.cuda.get_device_properties(device).multi_processor_count, shared.value)
