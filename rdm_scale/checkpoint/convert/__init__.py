"""Conversions of checkpoints: merging, other libraries' names and files, and growth in depth."""
