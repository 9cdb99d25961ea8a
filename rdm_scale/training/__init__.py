"""The training loop and what belongs to it: optimizer, averaged weights, monitoring, the run's directory."""
