"""The time limit of what a test waits for."""

# Seconds after which what a test waits for counts as hanging: many times what the slowest step takes on a machine with
# four times more busy processes than cores. The limit of a whole test, in pyproject.toml, is longer.
HANG_S = 600
