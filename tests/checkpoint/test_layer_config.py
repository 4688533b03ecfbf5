"""What config.json may say of a linear."""

import pytest

from tests.nn.test_vquant_linear import packed
from vptq.errors import CheckpointError
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
