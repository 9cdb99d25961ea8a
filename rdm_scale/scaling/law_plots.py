"""Figures of a scaling law: loss over FLOPs, isoFLOP curves, fit against runs, held-out runs, and a page of them.

matplotlib is imported by the functions: importing this module stays cheap.
"""

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rdm_scale.scaling.allocation import optimal_allocation
from rdm_scale.scaling.intervals import Interval
from rdm_scale.scaling.law_file import FittedLaw, run_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class HeldOutSize(NamedTuple):
    """A held-out size: mean loss of its runs beside the law's prediction."""

    flops: float
    loss: float
    predicted: float
    interval: Interval
    flops_only: float  # prediction by a power law in FLOPs alone


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def law_figure(law: FittedLaw, held_out: Sequence[HeldOutSize] = ()) -> "Figure":
    """Four plots: loss over FLOPs with its frontier, isoFLOP curves, residuals, and compute-optimal sizes."""
    figure = _figure(12, 9)
    axes = figure.subplots(2, 2)
    _plot_losses(axes[0, 0], law, held_out)
    _plot_isoflops(axes[0, 1], law)
    _plot_residuals(axes[1, 0], law, held_out)
    _plot_allocation(axes[1, 1], law)
    for each in axes.flat:
        each.grid(alpha=0.3)
    return figure


def _unit(law: FittedLaw) -> str:
    return "blocks" if law.size == "depth" else "parameters"


def _plot_losses(axes: "Axes", law: FittedLaw, held_out: Sequence[HeldOutSize]) -> None:
    runs, flops = law.observations, run_flops(law.observations, law.flops)
    sizes = np.unique(runs.parameters)
    if len(sizes) > 12:
        marks = axes.scatter(flops, runs.loss, c=np.log10(runs.parameters), s=14)
        axes.figure.colorbar(marks, ax=axes, label=f"log10 {_unit(law)}")
    else:
        for size in sizes:
            chosen = np.flatnonzero(runs.parameters == size)
            order = chosen[np.argsort(flops[chosen])]
            axes.plot(flops[order], runs.loss[order], "o-", ms=4, lw=1, label=f"{size:,.0f} {_unit(law)}")
    reach = max([flops.max(), *(each.flops for each in held_out)])
    budgets = np.geomspace(flops.min(), 10 * reach, 60)
    frontier = [optimal_allocation(law.law, budget, law.flops).loss for budget in budgets]
    axes.plot(budgets, frontier, "k--", lw=1.2, label="compute-optimal, by the law")
    axes.axhline(law.law.E, color="0.6", lw=1, ls=":", label=f"E = {law.law.E:.4g}")
    for each in held_out:
        bars = [[each.predicted - each.interval.low], [each.interval.high - each.predicted]]
        axes.errorbar([each.flops], [each.predicted], np.abs(bars), fmt="s", color="C3", capsize=4, label="predicted")
        axes.plot([each.flops], [each.loss], "*", color="C2", ms=12, label="held out, measured")
        axes.plot([each.flops], [each.flops_only], "x", color="0.4", label="by FLOPs alone")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="loss")
    axes.legend(fontsize=7)


def _plot_isoflops(axes: "Axes", law: FittedLaw) -> None:
    """Loss over size at fixed FLOPs, with the parabola that approach 2 would fit, whose minimum is biased."""
    for number, budget in enumerate(law.budgets()):
        best = optimal_allocation(law.law, budget, law.flops)
        sizes = best.parameters * np.geomspace(1 / 16, 16, 65)
        losses = law.law.loss(sizes, budget / law.flops(sizes))
        axes.plot(sizes, losses, color=f"C{number}", label=f"{budget:.0e} FLOPs")
        near = slice(16, 49)
        parabola = np.polyfit(np.log(sizes[near]), losses[near], 2)
        axes.plot(sizes[near], np.polyval(parabola, np.log(sizes[near])), ":", color=f"C{number}", lw=1)
        axes.plot([best.parameters], [best.loss], "o", color=f"C{number}", ms=5)
    axes.set(xscale="log", xlabel=_unit(law), ylabel="loss by the law (dotted: parabola in ln N)")
    axes.legend(fontsize=7)


def _plot_residuals(axes: "Axes", law: FittedLaw, held_out: Sequence[HeldOutSize]) -> None:
    runs = law.observations
    predicted = law.law.loss(runs.parameters, runs.samples)
    marks = axes.scatter(predicted, 100 * (runs.loss / predicted - 1), c=np.log10(runs.samples), s=16)
    axes.figure.colorbar(marks, ax=axes, label="log10 samples seen")
    for each in held_out:
        axes.plot([each.predicted], [100 * (each.loss / each.predicted - 1)], "*", color="C2", ms=12)
    axes.axhline(0, color="k", lw=0.8)
    axes.set(xlabel="loss by the law", ylabel="measured beyond predicted (%)")


def _plot_allocation(axes: "Axes", law: FittedLaw) -> None:
    budgets = np.geomspace(law.budgets()[0], law.budgets()[-1], 25)
    best = [optimal_allocation(law.law, budget, law.flops) for budget in budgets]
    replicates = law.replicates[:60]
    bands = np.array([[optimal_allocation(each, c, law.flops).parameters for c in budgets] for each in replicates])
    if len(bands):
        low, high = np.quantile(bands, [0.05, 0.95], axis=0)
        axes.fill_between(budgets, low, high, color="C0", alpha=0.2, label="90 % interval")
    axes.plot(budgets, [each.parameters for each in best], color="C0", label=f"N_opt ({_unit(law)})")
    axes.plot(budgets, [each.samples for each in best], color="C1", label="D_opt (samples)")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="compute-optimal")
    axes.legend(fontsize=7)


def law_page(law: FittedLaw, figure: bytes, held_out: Sequence[HeldOutSize] = ()) -> str:
    """Self-contained interactive page: runs, figure (PNG), and the compute-optimal size of any budget."""
    runs, flops = law.observations, run_flops(law.observations, law.flops)
    content = {
        "law": {name: getattr(law.law, name) for name in ("E", "A", "B", "alpha", "beta")},
        "intervals": {name: [each.low, each.high] for name, each in law.intervals().items()},
        "unit": _unit(law),
        "flops": {"sizes": law.flops.log_sizes, "flops": law.flops.log_flops},
        "runs": [
            {"n": n, "d": d, "c": c, "loss": loss}
            for n, d, c, loss in zip(
                runs.parameters.tolist(), runs.samples.tolist(), flops.tolist(), runs.loss.tolist(), strict=True
            )
        ],
        "heldOut": [
            {"c": each.flops, "loss": each.loss, "low": each.interval.low, "high": each.interval.high}
            for each in held_out
        ],
    }
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in [*law.warnings, *law.left_out]) or "<li>none</li>"
    picture = base64.b64encode(figure).decode()
    page = files("rdm_scale.scaling").joinpath("law_page.html").read_text(encoding="utf-8")
    data = json.dumps(content).replace("<", "\\u003c")  # the data cannot end the script
    return page.replace("__DATA__", data).replace("__NOTES__", notes).replace("__PICTURE__", picture)
