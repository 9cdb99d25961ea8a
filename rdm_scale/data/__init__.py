"""Latent shards: their format, how they are made, and the stream that reads them exactly once."""
