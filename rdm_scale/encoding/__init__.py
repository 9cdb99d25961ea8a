"""Encoding: from found images or videos to latent shards, and looking at what was encoded."""
