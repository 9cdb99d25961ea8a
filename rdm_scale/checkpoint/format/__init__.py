"""Files of a checkpoint: slices of logical tensors in safetensors format, with an index and checksums."""
