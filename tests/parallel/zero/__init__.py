"""Tests of rdm_scale.parallel.zero."""
