"""Training: the loop and its step, optimizer, EMA, metric logging, depth profiles, and the run's directory."""
