"""Compiled kernels are kept on disk, whatever state that is in; what can't be compiled is told."""

import ctypes

import pytest
import torch

from vptq.nn.kernels import nvrtc


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Stands for NVRTC: counts what it is asked for."""
    asked = []

    class Library:
        @staticmethod
        def nvrtcVersion(major, minor):
            return 0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_nvrtc", Library)
    monkeypatch.setattr(nvrtc, "compile_source", lambda *given: asked.append(given) or f"binary {len(asked)}".encode())
    return asked


def test_a_binary_is_compiled_once_for_what_it_is_made_of(compiler, tmp_path):
    first = nvrtc.kept_binary("source", {"A": 1}, 90)
    assert nvrtc.kept_binary("source", {"A": 1}, 90) == first and len(compiler) == 1
    for other in (("other", {"A": 1}, 90), ("source", {"A": 2}, 90), ("source", {"A": 1}, 80)):
        assert nvrtc.kept_binary(*other) != first
    assert len(compiler) == 4 and len(list(tmp_path.rglob("*.cubin"))) == 4
    assert nvrtc.kept_binary("source", {"A": 1}, 90, anew=True) == b"binary 5"
    assert nvrtc.kept_binary("source", {"A": 1}, 90) == b"binary 5"
    assert all(path.suffix == ".cubin" for path in (tmp_path / "vptq" / "kernels").iterdir()), "nothing half-written is left"


def test_a_cache_that_can_not_be_written_is_done_without(compiler, tmp_path, monkeypatch):
    (tmp_path / "vptq").write_text("not a folder")
    assert [nvrtc.kept_binary("source", {}, 90) for _ in range(2)] == [b"binary 1", b"binary 2"]
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(nvrtc.Path, "home", nobody)
    assert nvrtc.kept_binary("source", {}, 90) == b"binary 3"


def test_a_damaged_file_is_compiled_anew(compiler, monkeypatch):
    loaded = []

    def load(binary, *rest):
        loaded.append(binary)
        if binary == b"damaged":
            raise nvrtc.KernelError("the CUDA driver failed")
        return "kernel"

    monkeypatch.setattr(nvrtc, "Kernel", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    nvrtc.kept_binary(nvrtc.read_source("ptx.cuh"), {"PROGRAMMATIC": 1}, 90)
    (path,) = nvrtc.cache_folder().iterdir()
    path.write_bytes(b"damaged")
    nvrtc.get_kernel.cache_clear()
    assert nvrtc.get_kernel(("ptx.cuh",), "name", (), torch.device("cuda", 0)) == "kernel"
    assert loaded == [b"damaged", b"binary 2"] and path.read_bytes() == b"binary 2"
    nvrtc.get_kernel.cache_clear()


def test_structures_are_laid_out_as_the_driver_takes_them():
    assert ctypes.sizeof(nvrtc._Attribute) == 72 and ctypes.sizeof(nvrtc._Launch) == 56


@pytest.mark.gpu
def test_what_does_not_compile_is_told():
    with pytest.raises(nvrtc.KernelError, match=r"(?s)does not compile.*nonsense"):
        nvrtc.compile_source("nonsense", {}, 90)
    assert nvrtc.kernels_run(torch.device("cuda", 0))
