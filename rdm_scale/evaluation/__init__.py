"""Judging what a model makes: pictures of samples and of a run, and measures of samples.

Plotting and scikit-learn are imported where they are used, so that importing this package stays cheap.
"""

from rdm_scale.evaluation.labels import label_accuracy
from rdm_scale.sampling.image_grid import animated_grid, image_grid, plot_loss, write_grid

__all__ = ["animated_grid", "image_grid", "label_accuracy", "plot_loss", "write_grid"]
