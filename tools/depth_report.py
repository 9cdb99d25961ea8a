"""Report a run's profiles along depth in one self-contained HTML page.

The page shows the losses and, for each quantity that the run has logged in depth.jsonl, a heat map (depth x step) and
the profiles of a few steps.
"""

import argparse
import base64
import html
import sys
from pathlib import Path

from rdm_scale.config.paths import local_option
from rdm_scale.errors import DataError, RdmError
from rdm_scale.progress import track
from rdm_scale.storage.location import Location
from rdm_scale.storage.own_files import refuse_to_replace

# By the last part of a quantity's name.
EXPLANATIONS = {
    "stream": "Root mean square of the residual stream after a block.",
    "sensitivity": "Norm of the gradient of the batch's mean loss with respect to the hidden states after a block.",
    "gradient": "Norm of the gradient of a block's parameters, before clipping.",
    "gain": "Relative update of the hidden states z by a residual branch: ||alpha F + beta|| / ||z||.",
    "alpha": "Mean of the gate alpha over channels and samples.",
    "alpha_std": "Standard deviation of the gate alpha over channels and samples.",
    "beta": "Root mean square of the additive gate beta.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_option, help="a run's directory")
    parser.add_argument(
        "--output", type=local_option, help="the page (default: depth_report.html in the run's directory)"
    )
    options = parser.parse_args()
    try:
        page = report(options.run)
        output = options.output or options.run / "depth_report.html"
        if options.output:
            refuse_to_replace(Location(output))
        output.write_text(page, encoding="utf-8")
    except RdmError as error:
        sys.exit(f"depth_report: error: {error}")
    except OSError as error:
        sys.exit(f"depth_report: error: cannot write {error.filename}: {error.strerror}")
    print(output)


def report(run: Path) -> str:
    """Make the HTML page of a run.

    Raises:
        DataError: the run has no profiles, or the file cannot be read.
    """
    from rdm_scale.evaluation.plots import as_array, depth_figure, loss_figure, png
    from rdm_scale.training.depth_profiles import DEPTH, read_profiles

    try:
        steps, profiles = read_profiles(run / DEPTH)
    except OSError as error:
        raise DataError(f"{error}: give the directory of a run") from None
    if not steps:
        raise DataError(
            f"{run / DEPTH} holds no profiles: give a run's directory, trained with monitor.depth_every > 0"
        )
    parts = []
    for name in track(profiles[-1], "drawing", "figure"):
        present = [(step, profile[name]) for step, profile in zip(steps, profiles, strict=True) if name in profile]
        explanation = EXPLANATIONS.get(name.rpartition(".")[2], "")
        image = png(depth_figure(name, [step for step, _ in present], as_array([values for _, values in present])))
        parts.append(section(name, explanation, image))
    if (run / "metrics.jsonl").exists():
        parts.insert(0, section("loss", "Training and validation loss.", png(loss_figure(run / "metrics.jsonl"))))
    title = html.escape(f"{run.resolve().name} along depth, steps {steps[0]} to {steps[-1]}")
    return PAGE.format(title=title, body="\n".join(parts))


def section(name: str, explanation: str, image: bytes) -> str:
    """HTML of a heading, a paragraph and an embedded PNG image."""
    source = base64.b64encode(image).decode()
    return (
        f"<h2>{html.escape(name)}</h2>\n<p>{html.escape(explanation)}</p>\n"
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{source}">'
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="rdm_scale"><title>{title}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }} h2 {{ margin-bottom: 0 }} p {{ margin: 0 }}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


if __name__ == "__main__":
    main()
