"""Reading ahead, and batches that come and go while a device computes."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file

from vptq.errors import CheckpointError
from vptq.models.prefetch import PrefetchingFolder
from vptq.models.staging import Stage, to_main_memory
from vptq.models.stream import FolderSource


@pytest.fixture
def folder(tmp_path, generator):
    save_file({f"w{i}": torch.randn(3, 4, generator=generator) for i in range(4)}, tmp_path / "model.safetensors")
    return tmp_path


def test_what_was_prefetched_is_what_the_file_holds(folder):
    source, plain = PrefetchingFolder(folder), FolderSource(folder)
    source.prefetch(["w1", "w2", "w2", "not there"])
    for name in ("w0", "w1", "w2", "w1"):
        assert torch.equal(source.get(name), plain.get(name))
    source.close()


def test_reading_happens_in_another_thread_and_once(folder, monkeypatch):
    readers = []
    real = FolderSource.get_stored

    def noted(self, name):
        readers.append((name, threading.current_thread().name))
        return real(self, name)

    monkeypatch.setattr(FolderSource, "get_stored", noted)
    source = PrefetchingFolder(folder)
    source.prefetch(["w1"])
    source.get("w1")
    assert len(readers) == 1 and readers[0][1].startswith("prefetch")
    source.get("w0")
    assert readers[1] == ("w0", threading.main_thread().name)
    source.close()


def test_an_error_in_reading_comes_out_where_the_tensor_is_wanted(folder):
    source = PrefetchingFolder(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    source.prefetch(["w1"])
    with pytest.raises(CheckpointError, match="can't be read"):
        source.get("w1")
    source.close()


@pytest.mark.parametrize("away", [False, True])
def test_batches_are_replaced_by_results(away, device, generator):
    batches = [torch.randn(5, 3, generator=generator).to(device) for _ in range(4)]
    expected = [batch.cpu() * 2 + 1 for batch in batches]
    if away:
        batches = [to_main_memory(batch) for batch in batches]
    homes = [batch.device for batch in batches]
    stage = Stage(batches, device)
    for number, tensor in enumerate(stage):
        assert tensor.device.type == device.type
        stage.put(number, tensor * 2 + 1)
    stage.finish()
    assert [batch.device for batch in batches] == homes
    for found, wanted in zip(batches, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
def test_many_large_batches_pass_through_a_gpu_unharmed(generator):
    """Copies on side streams must not be overtaken by the work, nor memory be used twice."""
    batches = [to_main_memory(torch.randn(1024, 512, generator=generator).cuda()) for _ in range(40)]
    kept = [batch.clone() for batch in batches]
    for _ in range(3):
        stage = Stage(batches, torch.device("cuda"))
        for number, tensor in enumerate(stage):
            garbage = torch.full_like(tensor, 7.0)
            stage.put(number, (tensor + garbage) - 7.0 + 1.0)
        stage.finish()
    for found, before in zip(batches, kept, strict=True):
        assert torch.allclose(found, before + 3, atol=1e-4)
