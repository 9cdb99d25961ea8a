"""Evaluation: metrics of samples and plots of a run.

matplotlib and scikit-learn are imported by the functions that use them, so that importing this package stays cheap.
"""

from rdm_scale.evaluation.labels import label_accuracy
from rdm_scale.evaluation.plots import plot_loss
from rdm_scale.moved import moved_names

__all__ = ["label_accuracy", "plot_loss"]

__getattr__ = moved_names(__name__)
