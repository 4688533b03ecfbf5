"""weight + Hessian -> QuantizedWeight. Knows torch only: no files, no transformers, no processes."""
