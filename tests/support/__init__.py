"""Helpers that tests of several folders share: real ranks, real servers, small runs, media and latent sets."""
