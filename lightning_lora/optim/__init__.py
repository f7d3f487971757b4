"""AdamW of many small tensors in few kernels: parameters sorted into buckets, each stepped in one call."""
