"""Data parallelism under DeepSpeed ZeRO: parameters, gradients and optimizer state sharded over the data ranks."""
