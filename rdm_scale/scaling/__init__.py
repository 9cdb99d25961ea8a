"""Scaling laws: sweeps of training runs, the fit of a law with its uncertainty, and predictions; and the run planner.

scipy is imported by the modules that use it, so that importing this package stays cheap.
"""

from rdm_scale.lazy import lazy_names

__all__ = [
    "Fit",
    "Law",
    "Observations",
    "Sweep",
    "bootstrap_laws",
    "fit_law",
    "optimal_allocation",
    "plan_sweep",
    "read_observations",
    "search_layouts",
]

__getattr__ = lazy_names(
    __name__,
    {
        "allocation": ["optimal_allocation"],
        "intervals": ["bootstrap_laws"],
        "layout_search": ["search_layouts"],
        "law": ["Fit", "Law", "fit_law"],
        "observations": ["Observations", "read_observations"],
        "sweep": ["Sweep", "plan_sweep"],
    },
)
