"""Scaling laws: plan and run a sweep, fit its law, predict larger runs, and say whether the prediction held.

    python tools/scaling.py plan CONFIG --budget 2e12 --sizes 5 --lengths 150,300,600 --seeds 3 -o sweep.yaml
    python tools/scaling.py run sweep.yaml --workers 2
    python tools/scaling.py status sweep.yaml
    python tools/scaling.py fit sweep.yaml --hold-out largest -o law.json
    python tools/scaling.py predict law.json CONFIG model.depth=56 train.steps=400000

`fit` takes anybody's runs as well: a CSV table with the columns parameters, samples, loss and, optionally, flops, seed
and depth. The law is L(N, D) = E + A / N^alpha + B / D^beta; docs/scaling.md says how it is fitted.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_scale.config.paths import any_option, local_option
from rdm_scale.errors import DataError, RdmError

if TYPE_CHECKING:
    from rdm_scale.scaling.law_file import FittedLaw
    from rdm_scale.scaling.law_plots import HeldOutSize
    from rdm_scale.scaling.observations import Observations
    from rdm_scale.scaling.sweep_runner import RunState

_COMMAND = "rdm-scaling"  # its name where the package is installed without the checkout


def main() -> None:
    options = _parsed()
    try:
        options.action(options)
    except RdmError as error:
        sys.exit(f"scaling: error: {error}")
    except OSError as error:
        sys.exit(f"scaling: error: {error.filename or 'output'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("scaling: stopped; the same command goes on where it was")


def _parsed() -> argparse.Namespace:
    """Options of the command line; overrides may also stand after options."""
    parser = _parser()
    options, rest = parser.parse_known_args()
    if rest and (not hasattr(options, "overrides") or any(part.startswith("-") or "=" not in part for part in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="plan the runs of a sweep")
    plan.add_argument(
        "config", type=any_option, help="configuration from which the runs differ in size, length and seed"
    )
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="changes of all runs")
    plan.add_argument("--axis", choices=("depth", "width", "both"), default="depth", help="what grows (default: depth)")
    plan.add_argument("--budget", type=float, required=True, help="training FLOPs of the largest run")
    plan.add_argument("--sizes", type=int, default=5, help="model sizes (default: 5)")
    plan.add_argument("--lengths", type=_integers, required=True, help="steps of the runs, for instance 150,300,600")
    plan.add_argument("--seeds", type=int, default=1, help="runs of each size and length (default: 1)")
    plan.add_argument("--held-out", type=float, default=0.0, metavar="FACTOR", help="add a run a seed of so many times "
                      "the largest run's FLOPs, to be predicted before it is trained")  # fmt: skip
    plan.add_argument("--slurm", type=local_option, help="also write a Slurm job array that trains the runs")
    plan.add_argument(
        "-o", "--output", type=local_option, required=True, help="file of the sweep; runs/ goes beside it"
    )
    plan.set_defaults(action=_plan)

    run = commands.add_parser("run", help="train the runs that are not finished")
    run.add_argument("sweep", type=local_option)
    run.add_argument("--workers", type=int, default=1, help="runs at the same time (default: 1)")
    run.add_argument("--held-out", action="store_true", help="train the held-out runs, after their prediction")
    run.add_argument("--only", type=int, metavar="NUMBER", help="train one run, by its number in the sweep from 0")
    run.set_defaults(action=_run)

    status = commands.add_parser("status", help="print the state of every run")
    status.add_argument("sweep", type=local_option)
    status.set_defaults(action=_status)

    fit = commands.add_parser("fit", help="fit the law, with 90 %% intervals, plots and a page")
    fit.add_argument("runs", type=local_option, help="a sweep, or a CSV table of runs")
    fit.add_argument("--hold-out", choices=("largest",), help="leave out the runs of most FLOPs, and compare with them")
    fit.add_argument("--leave-out-highest", type=int, default=0, metavar="N", help="leave out the N highest losses")
    fit.add_argument("--over", choices=("parameters", "depth"), default="parameters", help="meaning of N in the law")
    fit.add_argument("--replicates", type=int, default=300, help="bootstrap fits (default: 300)")
    fit.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of the bootstrap")
    fit.add_argument("-o", "--output", type=local_option, required=True, help="law.json; a PNG and a page go beside it")
    fit.set_defaults(action=_fit)

    predict = commands.add_parser("predict", help="predict the loss of a run, and write the prediction beside the law")
    predict.add_argument("law", type=local_option)
    predict.add_argument("config", type=any_option, help="configuration of the run")
    predict.add_argument("overrides", nargs="*", metavar="key=value")
    predict.add_argument("--runs", type=int, default=1, help="seeds of which the mean is predicted (default: 1)")
    predict.set_defaults(action=_predict)
    return parser


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 150,300,600") from None


def _plan(options: argparse.Namespace) -> None:
    from rdm_scale.scaling.guards import check_sweep
    from rdm_scale.scaling.sweep import plan_sweep, read_sweep, slurm_array, write_sweep

    sweep = plan_sweep(
        options.config,
        options.overrides,
        axis=options.axis,
        budget=options.budget,
        sizes=options.sizes,
        lengths=options.lengths,
        seeds=options.seeds,
        held_out_factor=options.held_out,
    )
    if options.output.exists() and read_sweep(options.output) != sweep:
        raise DataError(f"{options.output} holds another sweep: choose another -o, or remove that file and its runs/")
    for warning in check_sweep(options.output.parent, sweep):
        print(f"warning: {warning}")
    write_sweep(options.output, sweep)
    fitted = [run for run in sweep.runs if not run.held_out]
    sizes = sorted({(run.depth, run.width, run.parameters) for run in fitted})
    print(f"{len(fitted)} runs: {len(sizes)} sizes, steps {options.lengths}, {options.seeds} seeds")
    for depth, width, parameters in sizes:
        print(f"  {depth} blocks of width {width}: {parameters:,} parameters")
    print(
        f"FLOPs: {sum(run.flops for run in fitted):.3g} in all, {max(run.flops for run in fitted):.3g} the largest run"
    )
    for run in sweep.runs:
        if run.held_out:
            print(f"held out: {run.name}, {run.parameters:,} parameters, {run.flops:.3g} FLOPs")
    if options.slurm:
        options.slurm.write_text(slurm_array(options.output, sweep), encoding="utf-8")
        print(f"as a Slurm job array: sbatch {options.slurm}")
    command = _COMMAND if Path(sys.argv[0]).name == _COMMAND else "python tools/scaling.py"
    print(f"next: {command} run {shlex.quote(str(options.output))} --workers 2")


def _run(options: argparse.Namespace) -> None:
    from rdm_scale.scaling.guards import check_sweep
    from rdm_scale.scaling.sweep import read_sweep
    from rdm_scale.scaling.sweep_runner import execute

    sweep, folder = read_sweep(options.sweep), options.sweep.parent
    runs = [run for run in sweep.runs if run.held_out == options.held_out]
    if options.only is not None:
        if not 0 <= options.only < len(sweep.runs):
            raise DataError(f"--only {options.only}: the sweep's runs have the numbers 0 to {len(sweep.runs) - 1}")
        runs = [sweep.runs[options.only]]
    if not runs:
        raise DataError(f"{options.sweep} has no held-out runs: plan it with --held-out FACTOR")
    for warning in check_sweep(folder, sweep):
        print(f"warning: {warning}")
    _print_states(execute(folder, sweep, runs, options.workers))


def _status(options: argparse.Namespace) -> None:
    from rdm_scale.scaling.sweep import read_sweep
    from rdm_scale.scaling.sweep_runner import sweep_states

    states = sweep_states(options.sweep.parent, read_sweep(options.sweep))
    _print_states(states)
    timed = [state for state in states if state.step_s == state.step_s]
    rate = sum(state.run.flops * state.step / state.run.steps for state in timed)
    seconds = sum(state.step_s * state.step for state in timed)
    left = sum(state.run.flops * (1 - state.step / state.run.steps) for state in states if not state.run.held_out)
    if seconds and left:
        print(
            f"left: {left:.3g} FLOPs, about {left / rate * seconds / 60:.0f} minutes of one worker at the rate so far"
        )


def _print_states(states: "Sequence[RunState]") -> None:
    for state in states:
        loss = f"  loss {state.loss:.5f}" if state.state in ("finished", "diverged") else ""
        gap = f"  (training {state.training_loss:.5f})" if loss else ""
        print(f"{state.run.name:32} {state.state:10} step {state.step}/{state.run.steps}{loss}{gap}")


def _fit(options: argparse.Namespace) -> None:
    from rdm_scale.evaluation.plots import png
    from rdm_scale.scaling.law_file import fit_with_intervals, write_law
    from rdm_scale.scaling.law_plots import law_figure, law_page
    from rdm_scale.storage.location import Location

    observations, left_out, warnings, held_out = _runs_to_fit(options)
    began = time.monotonic()
    law = fit_with_intervals(
        observations,
        size=options.over,
        replicates=options.replicates,
        workers=options.workers,
        left_out=left_out,
        warnings=warnings,
    )
    compared = [] if held_out is None else [_compare(law, held_out)]
    write_law(Location(options.output), law)
    picture, page = options.output.with_suffix(".png"), options.output.with_suffix(".html")
    figure = png(law_figure(law, compared))
    picture.write_bytes(figure)
    page.write_text(law_page(law, figure, compared), encoding="utf-8")
    _print_law(law, time.monotonic() - began)
    _print_held_out(compared, options.output)
    print(f"wrote {options.output}, {picture} and {page}")


def _runs_to_fit(
    options: argparse.Namespace,
) -> "tuple[Observations, list[str], list[str], Observations | None]":
    """Runs to fit, what was left out, warnings, and the held-out runs."""
    from rdm_scale.scaling.guards import check_sweep, unused_runs
    from rdm_scale.scaling.observations import read_observations
    from rdm_scale.scaling.sweep import read_sweep
    from rdm_scale.scaling.sweep_runner import observed, sweep_states
    from rdm_scale.storage.location import Location

    left_out: list[str] = []
    warnings: list[str] = []
    if options.runs.suffix.lower() in (".yaml", ".yml"):
        sweep, folder = read_sweep(options.runs), options.runs.parent
        warnings = check_sweep(folder, sweep)
        states = sweep_states(folder, sweep)
        left_out = unused_runs([state for state in states if not state.run.held_out])
        observations = observed(states)
    else:
        observations = read_observations(Location(options.runs))
    if options.leave_out_highest:
        kept = observations.without_highest(options.leave_out_highest)
        left_out.append(f"the {len(observations) - len(kept)} highest losses, as --leave-out-highest says")
        observations = kept
    if options.hold_out is None:
        return observations, left_out, warnings, None
    flops = observations.flops
    flops = observations.parameters * observations.samples if flops is None else flops
    largest = flops >= flops.max() * (1 - 1e-9)
    left_out.append(f"{int(largest.sum())} runs of most FLOPs, held out")
    return observations.select(~largest), left_out, warnings, observations.select(largest)


def _compare(law: "FittedLaw", held_out: "Observations") -> "HeldOutSize":
    from rdm_scale.scaling.allocation import flops_power_law
    from rdm_scale.scaling.intervals import prediction_interval
    from rdm_scale.scaling.law_file import run_flops
    from rdm_scale.scaling.law_plots import HeldOutSize

    runs = held_out.by_depth() if law.size == "depth" else held_out
    size, samples = float(runs.parameters[0]), float(runs.samples[0])
    interval = prediction_interval(law.replicates, law.law, law.observations, size, samples, len(runs))
    flops = float(run_flops(runs, law.flops)[0])
    by_flops = flops_power_law(law.observations, run_flops(law.observations, law.flops), flops)
    return HeldOutSize(flops, float(runs.loss.mean()), float(law.law.loss(size, samples)), interval, by_flops)


def _print_law(law: "FittedLaw", seconds: float) -> None:
    intervals = law.intervals()
    print(
        f"L = E + A / N^alpha + B / D^beta, N in {law.size}, fitted to {len(law.observations)} runs in {seconds:.0f} s"
    )
    for name, interval in intervals.items():
        print(f"  {name:6} {getattr(law.law, name):12.6g}   90 %: {interval.low:.6g} to {interval.high:.6g}")
    print(f"  objective {law.fit.objective:.6g}, found by {law.fit.agreeing} of {law.fit.searches} searches")
    for entry in law.left_out:
        print(f"left out: {entry}")
    for warning in law.warnings:
        print(f"warning: {warning}")


def _print_held_out(compared: "Sequence[HeldOutSize]", law_file: Path) -> None:
    for each in compared:
        error, by_flops = each.predicted / each.loss - 1, each.flops_only / each.loss - 1
        inside = each.interval.low <= each.loss <= each.interval.high
        print(
            f"held out: {each.loss:.5f} measured, {each.predicted:.5f} predicted ({error:+.1%}), "
            f"90 %: {each.interval.low:.5f} to {each.interval.high:.5f}: {'inside' if inside else 'OUTSIDE'}; "
            f"a power law in FLOPs alone says {each.flops_only:.5f} ({by_flops:+.1%})"
        )
        written = _predictions_file(law_file)
        if written.exists():
            for line in written.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if abs(record["flops"] / each.flops - 1) < 1e-6:
                    held = record["low"] <= each.loss <= record["high"]
                    print(
                        f"predicted {record['written']}: {record['loss']:.5f}, {record['low']:.5f} to "
                        f"{record['high']:.5f}: the prediction {'held' if held else 'did NOT hold'}"
                    )


def _predictions_file(law_file: Path) -> Path:
    return law_file.with_suffix(".predictions.jsonl")


def _predict(options: argparse.Namespace) -> None:
    from rdm_scale import cost
    from rdm_scale.config import load_config
    from rdm_scale.scaling.guards import prediction_warnings
    from rdm_scale.scaling.intervals import prediction_interval
    from rdm_scale.scaling.law_file import read_law
    from rdm_scale.storage.location import Location

    law, digest = read_law(Location(options.law))
    config = load_config(options.config, options.overrides)
    parameters = float(cost.model_parameters(config.model).total)
    samples = float(config.train.steps * config.train.global_batch_size)
    flops = 3 * cost.model_flops(config.model) * samples
    size = float(config.model.depth) if law.size == "depth" else parameters
    loss = float(law.law.loss(size, samples))
    interval = prediction_interval(law.replicates, law.law, law.observations, size, samples, options.runs)
    warnings = prediction_warnings(law, size, samples, flops)
    record = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "law": digest,
        "config": options.config,
        "overrides": options.overrides,
        "parameters": parameters,
        "depth": config.model.depth,
        "samples": samples,
        "flops": flops,
        "runs": options.runs,
        "loss": loss,
        "low": interval.low,
        "high": interval.high,
        "warnings": warnings,
    }
    with _predictions_file(options.law).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{parameters:,.0f} parameters, {samples:,.0f} samples, {flops:.3g} FLOPs")
    print(f"predicted loss {loss:.5f}, 90 %: {interval.low:.5f} to {interval.high:.5f}")
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"written to {_predictions_file(options.law)}, with the SHA-256 of the law")


if __name__ == "__main__":
    main()
