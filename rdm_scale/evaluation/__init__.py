"""Judging what a model makes: measures of samples, and plots of a run.

Plotting and scikit-learn are imported where they are used, so that importing this package stays cheap.
"""

from rdm_scale.evaluation.labels import label_accuracy
from rdm_scale.evaluation.plots import plot_loss
from rdm_scale.moved import moved_names

__all__ = ["label_accuracy", "plot_loss"]

__getattr__ = moved_names(__name__)
