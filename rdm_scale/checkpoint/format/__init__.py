"""The files of a checkpoint: slices of logical tensors in safetensors, with an index and checksums."""
