"""Shows a run along its depth: one HTML page, complete in itself, with a heat map (depth x step) and profiles of each
quantity that the run has logged in depth.jsonl, and its losses."""

import argparse
import base64
import html
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_scale.errors import DataError, RdmError
from rdm_scale.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

EXPLAINED = {
    "stream": "Root mean square of the residual stream after a block.",
    "sensitivity": "Norm of the gradient of the batch's mean loss with respect to the stream after a block.",
    "gradient": "Norm of the gradient of a block's parameters, before clipping.",
    "gain": "How much a residual unit changes the stream it reads: ||alpha F + beta|| / ||z||.",
    "alpha": "Mean of the gate alpha over channels and samples.",
    "alpha_std": "Standard deviation of the gate alpha over channels and samples.",
    "beta": "Root mean square of the additive gate beta.",
}
PROFILES = 6  # steps whose profiles are drawn as lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--output", type=Path, help="the page (default: depth_report.html in the run's directory)")
    options = parser.parse_args()
    try:
        page = report(options.run)
        output = options.output or options.run / "depth_report.html"
        output.write_text(page, encoding="utf-8")
    except RdmError as error:
        sys.exit(f"depth_report: error: {error}")
    except OSError as error:
        sys.exit(f"depth_report: error: cannot write {error.filename}: {error.strerror}")
    print(output)


def report(run: Path) -> str:
    """The page. Raises DataError where there are no profiles, or they are not what a run writes."""
    from rdm_scale.evaluation.plots import as_array, loss_figure
    from rdm_scale.training.depth_profiles import DEPTH, read_profiles

    try:
        steps, profiles = read_profiles(run / DEPTH)
    except (ValueError, OSError) as error:
        raise DataError(f"{error}: give the directory of a run") from None
    if not steps:
        raise DataError(
            f"{run / DEPTH} holds no profiles: give a run's directory, trained with monitor.depth_every > 0"
        )
    parts = []
    for name in track(profiles[-1], "drawing", "figure"):
        there = [(step, profile[name]) for step, profile in zip(steps, profiles, strict=True) if name in profile]
        explanation = EXPLAINED.get(name.rpartition(".")[2], "")
        picture = draw(name, [step for step, _ in there], as_array([values for _, values in there]))
        parts.append(section(name, explanation, picture))
    if (run / "metrics.jsonl").exists():
        parts.insert(0, section("loss", "Training and validation loss.", png(loss_figure(run / "metrics.jsonl"))))
    title = html.escape(f"{run.resolve().name} along depth, steps {steps[0]} to {steps[-1]}")
    return PAGE.format(title=title, body="\n".join(parts))


def draw(name: str, steps: list[int], values: "ndarray") -> bytes:
    """Heat map and profiles of values [depth, steps]."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from rdm_scale.evaluation.plots import is_logarithmic

    logarithmic = is_logarithmic(values)
    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    columns = np.arange(len(steps))
    image = left.imshow(values, aspect="auto", interpolation="nearest", norm=LogNorm() if logarithmic else None)
    ticks = columns[:: max(1, len(steps) // 6)]
    left.set(xlabel="step", ylabel="block", title=name)
    left.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
    figure.colorbar(image, ax=left)
    for column in np.unique(np.linspace(0, len(steps) - 1, PROFILES).astype(int)):
        right.plot(values[:, column], marker="." if len(values) < 60 else "", label=f"step {steps[column]:,}")
    right.set(xlabel="block", title=name)
    if logarithmic:
        right.set_yscale("log")
    right.grid(alpha=0.3, which="both")
    right.legend(fontsize="small")
    return png(figure)


def png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def section(name: str, explanation: str, picture: bytes) -> str:
    source = base64.b64encode(picture).decode()
    return (
        f"<h2>{html.escape(name)}</h2>\n<p>{html.escape(explanation)}</p>\n"
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{source}">'
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} h2 {{ margin-bottom: 0 }} p {{ margin: 0 }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


if __name__ == "__main__":
    main()
