"""Parallelism: mesh, tensor and sequence parallelism, pipeline, ZeRO, and `parallelize`, which combines them."""
