"""Second moments, streamed, shared, stored."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from vptq.calibration.hessian import BlockHessians, Hessian, HessianAccumulator
from vptq.calibration.hessian_store import HessianStore, label_of
from vptq.calibration.runs import mean_of, sum_subtrees
from vptq.errors import CheckpointError, NumericalError, UsageError


def accumulate(batches):
    """The sums of all batches."""
    accumulator = HessianAccumulator(batches[0].shape[-1], batches[0].device)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.take()


def mean(sums):
    return mean_of(sums)[0]


def collected(watcher):
    """What one run gave: (Hessian, drift, tokens) by the linears that share it."""
    watcher.end_run()
    sums = watcher.collect()
    found = {}
    for leader, subtrees in sums.subtrees.items():
        whole = sum_subtrees(subtrees)
        found[tuple(s for s, first in sums.leaders.items() if first == leader)] = (*mean_of(whole), whole.num_tokens)
    return found


def test_streamed_equals_the_batch_in_float64(generator, device):
    x = torch.randn(6, 50, 8, generator=generator).to(device)
    found = accumulate(list(x))
    rows = x.reshape(-1, 8).double()
    assert found.num_tokens == 300
    assert torch.allclose(mean(found).double(), rows.T @ rows / 300, atol=1e-5)
    assert torch.equal(mean(found), mean(found).T)


def test_order_and_split_move_it_by_rounding_only(generator):
    x = torch.randn(6, 50, 8, generator=generator)
    whole = accumulate([x])
    other = accumulate([x[4:], x[:1], x[1:4]])
    parts = accumulate([x[:2]]).plus(accumulate([x[2:]]))
    assert torch.allclose(mean(other), mean(whole), atol=1e-6)
    assert torch.allclose(mean(parts), mean(whole), atol=1e-6) and parts.num_tokens == whole.num_tokens


def test_what_was_taken_is_not_taken_again(generator):
    accumulator = HessianAccumulator(4, torch.device("cpu"), drifts=True)
    x, y = torch.randn(2, 9, 4, generator=generator)
    for rows in (x, y):
        accumulator.add(rows, originals=rows + 1)
        found = accumulator.take()
        assert found.num_tokens == 9
        torch.testing.assert_close(found.total, rows.T @ rows)
        torch.testing.assert_close(found.drift, torch.ones(4, 9) @ rows)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 2)
        self.o = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.o(self.q(x) + self.k(x).sum())


def test_linears_fed_by_one_tensor_share_one_hessian(generator):
    block, watcher = Block(), BlockHessians("blocks.0")
    x = torch.randn(3, 5, 4, generator=generator)
    with watcher.watching(block), torch.no_grad():
        for batch in x:
            block(batch[None])
    found = collected(watcher)
    assert set(found) == {("q", "k"), ("o",)}
    rows = x.reshape(-1, 4)
    assert torch.allclose(found["q", "k"][0], rows.T @ rows / 15, atol=1e-5)
    assert found["q", "k"][2] == found[("o",)][2] == 15


def test_hooks_are_gone_afterwards():
    block, watcher = Block(), BlockHessians("b")
    with watcher.watching(block):
        pass
    block(torch.zeros(1, 4))
    assert not collected(watcher)


def test_non_finite_activations_name_the_linears():
    block, watcher = Block(), BlockHessians("blocks.7")
    with watcher.watching(block), torch.no_grad():
        block(torch.full((1, 4), float("inf")))
    with pytest.raises(NumericalError, match=r"blocks\.7\.q"):
        collected(watcher)


@pytest.fixture
def store(tmp_path):
    found = HessianStore(tmp_path / "hessians", "model-a")
    found.prepare()
    return found


def test_store_gives_back_what_it_kept(store, generator):
    matrix = torch.randn(4, 4, generator=generator)
    store.save(3, Hessian(matrix, 99, ("self_attn.q_proj", "self_attn.k_proj")), {"dataset": "x.txt"})
    found = store.find(3, ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
    assert set(found) == {"self_attn.q_proj", "self_attn.k_proj"}
    assert found["self_attn.q_proj"].name == "3_qkv.safetensors"
    assert torch.equal(store.load(found["self_attn.k_proj"], 4), matrix)
    assert "x.txt" in store.provenance(found["self_attn.q_proj"])
    assert store.find(4, ["self_attn.q_proj"]) == {}


def test_two_inputs_of_one_label_do_not_overwrite_each_other(store):
    """q and k fed by different tensors, as with a norm before each."""
    for suffix, value in (("attn.q_proj", 1.0), ("attn.k_proj", 2.0)):
        store.save(0, Hessian(torch.eye(2) * value, 1, (suffix,)), {})
    found = store.find(0, ["attn.q_proj", "attn.k_proj"])
    assert store.load(found["attn.q_proj"], 2)[0, 0] == 1 and store.load(found["attn.k_proj"], 2)[0, 0] == 2


def test_hessians_of_another_model_are_refused(store):
    store.save(0, Hessian(torch.eye(4), 1, ("q_proj",)), {})
    other = HessianStore(store.folder, "model-b")
    with pytest.raises(UsageError, match="of another model"):
        other.find(0, ["q_proj"])
    path = store.find(0, ["q_proj"])["q_proj"]
    for call in (store.load, store.check_size):
        with pytest.raises(UsageError, match=r"4 inputs, the model's linear has in_features=8"):
            call(path, 8)


def published(folder, name, matrix, mean):
    """A file of the published kind: lower triangle of the centred moment, mean, size, count."""
    folder.mkdir(exist_ok=True)
    centred = matrix - torch.outer(mean, mean)
    rows, columns = torch.tril_indices(len(mean), len(mean))
    torch.save({"flatH": centred[rows, columns], "mu": mean, "n": len(mean), "ct": 1000}, folder / name)


def test_published_files_give_the_second_moment(store, generator):
    x = torch.randn(50, 4, generator=generator) + 1
    moment = x.T @ x / 50
    published(store.folder, "2_down.pt", moment, x.mean(0))
    path = store.find(2, ["mlp.down_proj"])["mlp.down_proj"]
    assert torch.allclose(store.load(path, 4), moment, atol=1e-5)
    store.check_size(path, 4)
    with pytest.raises(UsageError, match="of another model"):
        store.check_size(path, 5)


def test_published_labels_cover_the_usual_names():
    names = {"self_attn.q_proj": "qkv", "self_attn.v_proj": "qkv", "self_attn.o_proj": "o", "self_attn.out_proj": "o",
             "mlp.gate_proj": "up", "mlp.up_proj": "up", "fc1": "up", "mlp.down_proj": "down", "fc2": "down"}  # fmt: skip
    assert {name: label_of(name) for name in names} == names
    assert label_of("mlp.experts.3.up_proj") == "mlp-experts-3-up_proj", "every expert has an input of its own"


def test_pickles_that_are_no_hessians_are_refused_unexecuted(store, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"flatH": Evil()}, store.folder / "0_o.pt")
    path = store.find(0, ["o_proj"])["o_proj"]
    with pytest.raises(CheckpointError, match="no Hessian of the published kind"):
        store.load(path, 4)
    assert not (tmp_path / "executed").exists()


def test_damaged_own_file_is_named(store):
    (store.folder / "0_o.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"0_o\.safetensors` is damaged"):
        store.find(0, ["o_proj"])


def test_metadata_lists_linears(store):
    from safetensors import safe_open

    store.save(0, Hessian(torch.eye(2), 5, ("a.q_proj",)), {})
    with safe_open(store.folder / "0_qkv.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["linears"]) == ["a.q_proj"]


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        HessianStore(tmp_path / "x", "m").prepare()


def test_collect_leaves_the_watcher_empty():
    block, watcher = Block(), BlockHessians("b")
    with watcher.watching(block), torch.no_grad():
        block(torch.ones(1, 4))
    assert len(collected(watcher)) == 2
    assert not collected(watcher)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_lose_nothing_that_float32_keeps(dtype, generator):
    x = (torch.randn(20000, 256, generator=generator) * torch.logspace(1, -2, 256)).cuda().to(dtype)
    exact = x.double().T @ x.double() / len(x)
    size = exact.diagonal().sqrt()
    mixed, plain = accumulate(list(x.split(4096))), accumulate(list(x.float().split(4096)))
    errors = [((mean(found).double() - exact).abs() / (size[:, None] * size)).max().item() for found in (mixed, plain)]
    assert errors[0] < 1e-5 and errors[1] < 1e-5
