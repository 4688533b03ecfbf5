"""Kernels for packed linears: CUDA sources compiled at run time, and Triton."""
