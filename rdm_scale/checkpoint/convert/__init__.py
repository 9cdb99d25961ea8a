"""Conversions of checkpoints: merge, export to diffusers, import and growth."""
