"""Convergence of the samplers to the probability flow, and of backpropagation to the adjoint equation.

Prints tables, writes experiments/results/theory.json, draws docs/images/probability_flow.png and adjoint.png.

    python experiments/theory.py
"""

import argparse

from matplotlib.figure import Figure

from benchmarks.report import IMAGES, print_table, write_results
from experiments.adjoint import adjoint_distances
from tests.support.mixture import DDPM, FLOW, draw, path_error, wasserstein
from tests.support.smooth_chain import SmoothChain

STEPS = (10, 20, 40, 80, 160)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def sampling() -> dict[str, dict[str, list[float]]]:
    """Errors of each sampler by number of steps: of the marginal and, for deterministic samplers, of the path."""
    found: dict[str, dict[str, list[float]]] = {}
    for diffusion, names in ((FLOW, ("euler", "heun")), (DDPM, ("ddim", "ddpm"))):
        for name in names:
            found[name] = {"marginal": [wasserstein(draw(diffusion, name, n)) for n in STEPS]}
            if name != "ddpm":
                found[name]["path"] = [path_error(diffusion, name, n) for n in STEPS]
    return found


def plot(errors: dict[str, dict[str, list[float]]], distances: list[float]) -> None:
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    for axes, kind, title in zip(
        figure.subplots(1, 2),
        ("path", "marginal"),
        ("distance from the probability flow's path", "Wasserstein-1 distance of the marginal"),
        strict=True,
    ):
        for name, by_kind in errors.items():
            if kind in by_kind:
                axes.loglog(STEPS, by_kind[kind], marker="o", label=name)
        axes.loglog(STEPS, [1 / n for n in STEPS], "k:", label="1 / steps")
        axes.loglog(STEPS, [1 / n**2 for n in STEPS], "k--", label="1 / steps²")
        axes.set(xlabel="steps", title=title)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(IMAGES / "probability_flow.png")
    figure = Figure(figsize=(6, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="residual branches L", title="discrete adjoint against the adjoint equation")
    axes.loglog(LENGTHS, distances, marker="o", label="largest relative distance")
    axes.loglog(LENGTHS, [distances[0] * LENGTHS[0] / n for n in LENGTHS], "k:", label="1 / L")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(IMAGES / "adjoint.png")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    errors, distances = sampling(), adjoint_distances(SmoothChain(), LENGTHS)
    rows = [
        (f"{name}, {kind}", *(f"{value:.5f}" for value in values))
        for name, by_kind in errors.items()
        for kind, values in by_kind.items()
    ]
    print_table(("error after steps", *STEPS), rows)
    print_table(("branches", *LENGTHS), [("distance of the adjoints", *(f"{value:.5f}" for value in distances))])
    plot(errors, distances)
    result = {"steps": STEPS, "errors": errors, "lengths": LENGTHS, "distances": distances}
    write_results(__file__, result)


if __name__ == "__main__":
    main()
