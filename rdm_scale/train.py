"""Main of a training run: `torchrun --nproc_per_node N -m rdm_scale.train CONFIG [key=value ...]`.

With --dry-run --world-size N one process prints the layout of the model on N ranks and the memory that it needs.

The configuration, the data's manifest and the run's directory are checked before torch.distributed, DeepSpeed or
Megatron are imported, so that a mistake costs a second.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_scale.launch_environment import adopt_slurm_task
from rdm_scale.stop_request import StopRequest

if TYPE_CHECKING:  # imported after the signals are received
    from rdm_scale.config import RunConfig
    from rdm_scale.data.compatibility import DataFacts
    from rdm_scale.parallel.failures import FailureReporter
    from rdm_scale.parallel.mesh import Mesh
    from rdm_scale.run_status import JobState
    from rdm_scale.training.run_directory import Start


def main(arguments: list[str] | None = None) -> None:
    """Run one rank and exit the process with the code that `run_status` defines."""
    stop = StopRequest()
    stop.listen()
    adopt_slurm_task()

    from rdm_scale.config import load_config
    from rdm_scale.parallel.failures import end_with_launcher, run_main

    parsed = _parser().parse_intermixed_args(arguments)
    if parsed.dry_run:
        stop.release()
        run_main(lambda _: dry_run(load_config(parsed.config, parsed.overrides), parsed.world_size))
    end_with_launcher()
    run_main(lambda reporter: train(load_config(parsed.config, parsed.overrides), reporter), stop)


def dry_run(config: "RunConfig", world_size: int) -> None:
    """Print the layout of a run on `world_size` ranks; builds nothing and opens nothing."""
    from rdm_scale.config.doubts import doubts
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.training.throughput import best_case, stated_peak

    memory = config.parallel.memory_gib
    plan = plan_parallelism(config, world_size, None if memory is None else memory * 2**30)
    print(plan.table(config))
    peak = stated_peak(config)
    if peak is not None:
        print(best_case(config, plan, peak, config.train.steps))
    print_warnings(doubts(config))


def train(config: "RunConfig", reporter: "FailureReporter | None" = None) -> "JobState":
    """Train as `config` says, on the ranks that the launcher started.

    Args:
        reporter: reports failures to the other ranks, and holds the request to stop.

    Returns:
        FINISHED; STOPPED after a request to stop, when the run is saved; or the state of a run that has ended for good
        under the same launcher.

    Raises:
        StopRequested: there was a request to stop before the first step.
    """
    from rdm_scale.config.doubts import doubts
    from rdm_scale.parallel.failures import FailureReporter
    from rdm_scale.run_status import ended_under_this_launcher

    reporter, run_dir = reporter or FailureReporter(), Path(config.run.dir)
    ended = ended_under_this_launcher(run_dir)
    if ended is not None:
        return ended
    config.data_parallel_size(int(os.environ.get("WORLD_SIZE", 1)))

    from rdm_scale.training.run_directory import checkpoints_of, prepare

    mesh, facts, start = meet_ranks(config, reporter)
    held = prepare(config, start) if mesh.is_first else None

    from rdm_scale.parallel.plan import memory_of_rank, plan_parallelism
    from rdm_scale.training.start_checks import check_start

    plan = plan_parallelism(config, mesh.world_size, mesh.broadcast(memory_of_rank(config)))
    reporter.run_dir = run_dir  # it is this run's, now that rank 0 has locked it
    if mesh.is_first:
        print(plan.table(config), flush=True)
        print_changes(start)
    warnings = check_start(mesh, checkpoints_of(config).root)
    if mesh.is_first:
        print_warnings([*doubts(config), *facts.warnings, *(held.warnings if held else ()), *warnings])
    mesh.stop_if_any(reporter.stop.requested)

    from rdm_scale.training.trainer import Trainer

    with held or nullcontext():
        trainer = Trainer(config, mesh, plan, facts, start, reporter, held.owner if held else None)
        mesh.stop_if_any(reporter.stop.requested)
        state = trainer.run()
        if mesh.is_first:  # before the other ranks exit: a launcher may end this one then
            reporter.record(state, reporter.stop.signal_name or "")
    mesh.shutdown()
    return state


def meet_ranks(config: "RunConfig", reporter: "FailureReporter") -> "tuple[Mesh, DataFacts, Start]":
    """Check the data and the run's directory, meet the other ranks, and agree with them on the start of the run."""
    from rdm_scale.data.compatibility import check_data
    from rdm_scale.run_status import replace_older_end
    from rdm_scale.storage.location import Retry, set_retry
    from rdm_scale.training.run_directory import plan_start

    set_retry(Retry.within(config.data.read_timeout_s))

    checked = None
    if os.environ.get("RANK", "0") == "0":  # the data may be remote: the other ranks get the result by broadcast
        facts = check_data(config)
        checked = facts, plan_start(config, facts)
        replace_older_end(Path(config.run.dir))

    from rdm_scale.parallel.hang_reports import record_collectives
    from rdm_scale.parallel.mesh import build_mesh, check_agreement

    record_collectives(Path(config.run.dir))
    mesh = build_mesh(config.parallel, reporter)
    check_agreement(mesh, config)
    return mesh, *mesh.broadcast(checked)


def print_changes(start: "Start") -> None:
    """Print the keys whose values are not those of the checkpoint that the run goes on from."""
    if start.changes:
        lines = [f"resuming from {start.checkpoint} with other values than there:", *start.changes]
        print("\n  ".join(lines), flush=True)


def print_warnings(lines: list[str]) -> None:
    """Print one line for each warning."""
    for line in lines:
        print(f"warning: {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
    from rdm_scale.config import describe_keys

    parser = argparse.ArgumentParser(
        prog="rdm-train" if Path(sys.argv[0]).name == "rdm-train" else "python -m rdm_scale.train",
        description="Trains a model. Start it under torchrun or deepspeed for more than one rank.",
        epilog="keys of the configuration, with their defaults:\n\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help=f"YAML file; examples are in {Path(__file__).with_name('configs')}")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for instance train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print the layout and its memory, and exit")
    parser.add_argument(
        "--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 1)), help="number of ranks, for --dry-run"
    )
    # deepspeed's launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
