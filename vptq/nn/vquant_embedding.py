"""An embedding that lives in its packed form: only the rows of the tokens at hand are unpacked."""

from __future__ import annotations

from torch import Tensor

from vptq.nn.reference import dequantize_rows
from vptq.nn.vquant_linear import VQuantLinear


class VQuantEmbedding(VQuantLinear):
    """`nn.Embedding` on packed indices and a codebook; its weight has a row a token, as a head's has."""

    unpacks_whole = False

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) integer token numbers -> (..., in_features), in the type that the scales are kept in."""
        stored = self._tensors()
        rows = dequantize_rows(stored, self.layer_config, tokens.reshape(-1))
        return rows.to(stored["row_scale"].dtype).view(*tokens.shape, self.in_features)
