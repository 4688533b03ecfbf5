"""Checkpoints that are damaged or made to do harm: an error, never a crash, a hang, or gigabytes on a header's word."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vptq.bits import checkpoint_bits
from vptq.checkpoint.reader import load_quantized
from vptq.checkpoint.verify import verify
from vptq.config import QuantConfig
from vptq.errors import VptqError
from vptq.models.headers import read_headers
from vptq.nn.packing import unpack_bits
from vptq.pipeline.run import quantize_model

EXAMPLES = int(os.environ.get("VPTQ_FUZZ", "8"))
MOST_BYTES = 2 << 30  # beyond what is there before
MOST_SECONDS = 20
KINDS = {
    "plain": {
        "num_res_centroids": [-1, 16], "vector_lens": [4, 4], "num_centroids": [16, 16], "npercent": 10, "enable_perm": True,
    },
    "rotated": {
        "rotation": "hadamard", "codebook_scope": "shared", "vector_lens": [-1, 1], "num_centroids": [-1, 16],
        "trellis_bits": 2,
    },
    "rows": {"vector_quant_dim": "in", "vector_lens": [-1, 2], "num_centroids": [-1, 24], "bitwidth": 6},
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(KINDS))
def packed(request, tiny_llama, text_file, tmp_path_factory):
    usual = {
        "model_name": str(tiny_llama), "output_dir": str(tmp_path_factory.mktemp("out")), "kiter": 5, "dataset": str(text_file),
        "nsamples": 4, "seq_len": 32, "device": "cpu",
    }  # fmt: skip
    return quantize_model(QuantConfig.from_flat(usual | KINDS[request.param])).folder / "packed_model"


@contextlib.contextmanager
def confined():
    """Little memory more, little time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))

    def late(*_args):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def try_all(folder):
    """Every way in: each works, or tells."""
    ways = (load_quantized, checkpoint_bits, lambda path: list(verify(path)), read_headers)
    for way in ways:
        with confined(), contextlib.suppress(VptqError):
            way(folder)


@contextlib.contextmanager
def copied(packed):
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(packed, Path(scratch) / "packed"))


def fuzzed(function):
    return settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )(function)


SIZES = [-1, 0, 1, 2, 31, 33, 65537, 2**31, 2**32, 2**63, 2**64, 10**30]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from(SIZES), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-2, 2**40), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


def paths_in(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def put(value, path, new, drop):
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if drop and isinstance(inner, dict):
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return found


@fuzzed
@given(data=st.data())
@pytest.mark.ci
def test_files_cut_or_with_other_bytes(packed, data):
    with copied(packed) as folder:
        path = folder / "model.safetensors"
        raw = bytearray(path.read_bytes())
        head = 8 + int.from_bytes(raw[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, head if data.draw(st.booleans()) else len(raw) - 1))
            raw[min(place, len(raw) - 1)] = data.draw(st.integers(0, 255))
        length = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
        path.write_bytes(raw[:length])
        try_all(folder)


@fuzzed
@given(data=st.data())
def test_headers_that_say_other_things(packed, data):
    with copied(packed) as folder:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        for _ in range(data.draw(st.integers(1, 3))):
            places = [place for place in paths_in(header) if place]
            header = put(header, data.draw(st.sampled_from(places)), data.draw(VALUES), data.draw(st.booleans()))
        words = json.dumps(header).encode()
        claimed = data.draw(st.one_of(st.just(len(words)), st.integers(0, 2**64 - 1)))
        path.write_bytes(claimed.to_bytes(8, "little") + words + raw[8 + length :])
        try_all(folder)


@fuzzed
@given(data=st.data())
def test_configurations_that_say_other_things(packed, data):
    with copied(packed) as folder:
        config = json.loads((folder / "config.json").read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            inner = config.get("quantization_config")
            places = [place for place in paths_in(inner) if place] if isinstance(inner, dict) else []
            if places:
                place = ("quantization_config", *data.draw(st.sampled_from(places)))
                config = put(config, place, data.draw(VALUES), data.draw(st.booleans()))
        (folder / "config.json").write_text(json.dumps(config))
        try_all(folder)


@fuzzed
@given(
    words=st.text(max_size=40)
    | st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "[]", "3", "null", '{"quantization_config": 3}'])
)
def test_any_text_for_a_configuration(packed, words):
    for name in ("config.json", "vptq.json", "model.safetensors.index.json"):
        with copied(packed) as folder:
            (folder / name).write_text(words, encoding="utf-8")
            try_all(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "ABSOLUTE", "sub/inner.safetensors", "..", 3, None])
def test_an_index_names_files_of_its_folder_only(packed, name):
    """Though the files that it names are there, and hold what it says."""
    with copied(packed) as folder:
        (folder / "sub").mkdir()
        for path in (folder.parent / "other.safetensors", folder / "sub/inner.safetensors"):
            save_file({"a": torch.zeros(2)}, path)
        name = str(folder.parent / "other.safetensors") if name == "ABSOLUTE" else name
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(VptqError, match="is damaged"):
            read_headers(folder)


@fuzzed
@given(
    bits=st.integers(-2, 40), count=st.integers(0, 200),
    words=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), rows=st.integers(1, 3),
)  # fmt: skip
def test_any_words_for_indices(bits, count, words, rows):
    packed = torch.tensor([words] * rows, dtype=torch.int32)
    with confined():
        try:
            found = unpack_bits(packed, bits, count)
        except VptqError:
            return
    assert found.shape == (rows, count) and bool(((found >= 0) & (found < 1 << bits)).all())


def test_nothing_is_unpickled(packed):
    """A pickle under a name of ours is no safetensors file; the package loads none by name."""
    package = Path(__file__).parents[2] / "vptq"
    loads = [
        line for path in package.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines() if ".load(" in line
    ]
    unsafe = [line for line in loads if ("torch.load" in line or "pickle" in line) and "weights_only=True" not in line]
    assert not unsafe
    with copied(packed) as folder:
        torch.save({"a": torch.zeros(2)}, folder / "model.safetensors")
        with pytest.raises(VptqError, match="no readable safetensors"):
            load_quantized(folder)
