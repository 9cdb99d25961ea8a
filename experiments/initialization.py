"""Gains of hidden states and gradients through freshly initialized blocks, for every residual structure and depth.

For each: the variance of the hidden states after the last block over that before the first, and the squared norm of a
random cotangent pulled back through all blocks over its own; means over seeds of a model of width 64 with 16 tokens.
`--run` reports the same of a trained model from the last profile in its depth.jsonl, between the outputs of the first
and the last block and with the gradient of the loss instead of a random cotangent.

Draws docs/images/initialization.png, prints Markdown and writes experiments/results/initialization.json.

    python experiments/initialization.py --run runs/quickstart
"""

import argparse
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.report import IMAGES, print_table, write_results
from rdm_scale.config import GateConfig
from rdm_scale.training.depth_profiles import DEPTH, read_profiles
from tests.support.stack_gains import small_stack, stack_gains

PICTURE = IMAGES / "initialization.png"
DEPTHS = (12, 48, 192, 768)
STRUCTURES = {
    "plain": {"residual": "plain"},
    "rezero": {"residual": "rezero"},
    "layerscale": {"residual": "layerscale"},
    "adaln_zero": {"residual": "adaln_zero"},
    "neural_rdm": {},
    "neural_rdm, unconditional": {"gate": GateConfig(conditional=False)},
    "neural_rdm, p = 1": {"gate": GateConfig(exponent=1.0)},
    "neural_rdm, p = 1/4": {"gate": GateConfig(exponent=0.25)},
    "neural_rdm, m0 = 2": {"gate": GateConfig(multiplier=2.0)},
}
Ratios = list[float]  # gain of the variance, gain of the cotangent's squared norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", type=Path, action="append", default=[], help="directory of a run (repeatable)")
    options = parser.parse_args()
    trained = {run.name: after_training(run) for run in options.run}
    initial: dict[str, list[Ratios]] = {}
    for name, changes in tqdm(STRUCTURES.items(), unit="structure"):
        initial[name] = [mean_gains(depth, changes, options.seeds) for depth in DEPTHS]
    result = {"seeds": options.seeds, "depths": DEPTHS, "initial": initial, "trained": trained}
    write_results(__file__, result)
    plot(initial)
    report(initial, trained)


def mean_gains(depth: int, changes: dict[str, object], seeds: int) -> Ratios:
    found = [stack_gains(small_stack(depth, **changes), seed) for seed in range(seeds)]
    return [statistics.fmean(ratios) for ratios in zip(*found, strict=True)]


def after_training(run: Path) -> Ratios:
    """Gains in the last profile of a run."""
    _, profiles = read_profiles(run / DEPTH)
    stream, sensitivity = ([v for v in profiles[-1][key] if v is not None] for key in ("stream", "sensitivity"))
    return [(stream[-1] / stream[0]) ** 2, (sensitivity[0] / sensitivity[-1]) ** 2]


def plot(initial: dict[str, list[Ratios]]) -> None:
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    titles = ("variance of hidden states, last over first", "squared norm of a cotangent, pulled back over own")
    for number, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        axes.axhspan(0.5, 2, color="grey", alpha=0.2, label="factor 2")
        for name, by_depth in initial.items():
            axes.loglog(DEPTHS, [ratios[number] for ratios in by_depth], marker="o", label=name)
        axes.set(xlabel="blocks", title=title, xticks=DEPTHS, xticklabels=DEPTHS)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURE)


def report(initial: dict[str, list[Ratios]], trained: dict[str, Ratios]) -> None:
    rows = [
        (name, *(f"{variance:.4g}, {pulled:.4g}" for variance, pulled in by_depth))
        for name, by_depth in initial.items()
    ]
    print_table(("variance, cotangent", *(f"{depth} blocks" for depth in DEPTHS)), rows)
    for name, (variance, pulled) in trained.items():
        print(f"after training, {name}: {variance:.4g}, {pulled:.4g}")


if __name__ == "__main__":
    main()
