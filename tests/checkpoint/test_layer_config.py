"""What config.json may say of a linear."""

import pytest

from tests.nn.test_vquant_linear import packed
from vptq.config import LinearConfig
from vptq.errors import CheckpointError
from vptq.geometry import plan_geometry
from vptq.layer_config import LayerConfig


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"added_bias": True}, "added_bias is set, bias is not"),
        ({"num_scales": 7}, "fits neither rows nor groups"),
        ({"rotation": "other"}, "does not know"),
        ({"ring_len": 256}, "trellis_bits=0 and ring_len=256"),
        ({"row_groups": 7}, "does not divide"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, what, generator):
    _, layer, _ = packed("out", generator)
    with pytest.raises(CheckpointError, match=f"`a.b`(.|\\n)*{what}"):
        LayerConfig.from_dict("a.b", layer.to_dict() | changes)


def test_added_biases_are_said_beside_the_bias(generator):
    _, layer, _ = packed("out", generator, bias=True)
    entry = layer.to_dict() | {"added_bias": True}
    again = LayerConfig.from_dict("a.b", entry)
    assert (
        again.added_bias and not again.is_plain and again.to_dict() == LayerConfig.from_dict("a.b", again.to_dict()).to_dict()
    )


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (200, 130)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_norm": False, "enable_perm": False},
        {"absorb_perm": True, "num_res_centroids": (-1, 4)},
        {"npercent": 3.3, "vector_lens": (4, 8), "num_centroids": (8, 16), "group_num": 3},
        {"group_size": 2},
        {"vector_quant_dim": "in", "bitwidth": 4, "bsize": 4},
        {"rotation": "hadamard", "codebook_scope": "linear", "rotation_sides": "in", "rotation_seed": 3},
        {"rotation": "hadamard", "codebook_scope": "shared", "trellis_bits": 2, "vector_lens": (-1, 1)},
        {"rotation": "hadamard", "codebook_scope": "shared", "scale_scope": "row", "row_groups": 2},
        {"rotation": "hadamard", "codebook_scope": "shared", "vector_quant_dim": "in", "enable_perm": False},
    ],
)
def test_a_stored_form_tells_settings_that_give_it(shape, settings):
    config = LinearConfig(**{"vector_lens": (-1, 4), "num_centroids": (-1, 16)} | settings)
    assert not config.faults()
    geometry, _ = plan_geometry(*shape, config)
    assert geometry is not None
    layer = LayerConfig.of(config, geometry, bias=False)
    found = layer.linear_config(config.is_shared)
    assert not found.faults()
    assert plan_geometry(*shape, found)[0] == layer.geometry == geometry
    assert LayerConfig.of(found, geometry, bias=False) == layer
