"""Triton kernels, each with a plain twin in torch elsewhere in `quantize`. Imported only where `backend` chooses them."""
