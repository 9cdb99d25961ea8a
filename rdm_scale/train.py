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

from rdm_scale.config import RunConfig, describe_keys, load_config
from rdm_scale.config.doubts import doubts
from rdm_scale.parallel.failures import FailureReporter, end_with_launcher, run_main


def main(arguments: list[str] | None = None) -> None:
    """Run one rank and exit the process with code 0 or 1."""
    parsed = _parser().parse_intermixed_args(arguments)
    if parsed.dry_run:
        run_main(lambda _: dry_run(load_config(parsed.config, parsed.overrides), parsed.world_size))
    end_with_launcher()
    run_main(lambda reporter: train(load_config(parsed.config, parsed.overrides), reporter))


def dry_run(config: RunConfig, world_size: int) -> None:
    """Print the layout of a run on `world_size` ranks; builds nothing and opens nothing."""
    from rdm_scale.parallel.plan import plan_parallelism
    from rdm_scale.training.throughput import best_case, stated_peak

    memory = config.parallel.memory_gib
    plan = plan_parallelism(config, world_size, None if memory is None else memory * 2**30)
    print(plan.table(config))
    peak = stated_peak(config)
    if peak is not None:
        print(best_case(config, plan, peak, config.train.steps))
    print_warnings(doubts(config))


def train(config: RunConfig, reporter: FailureReporter | None = None) -> None:
    """Train as `config` says, on the ranks that the launcher started.

    Args:
        reporter: is given the store that the ranks share, by which one of them is chosen to report a failure.
    """
    config.data_parallel_size(int(os.environ.get("WORLD_SIZE", 1)))

    from rdm_scale.data.compatibility import check_data
    from rdm_scale.storage.location import Retry, set_retry
    from rdm_scale.training.run_directory import plan_start, prepare

    set_retry(Retry.within(config.data.read_timeout_s))

    checked = None
    if os.environ.get("RANK", "0") == "0":  # the data may be remote: the other ranks get the result by broadcast
        facts = check_data(config)
        checked = facts, plan_start(config, facts)

    from rdm_scale.parallel.hang_reports import record_collectives
    from rdm_scale.parallel.mesh import build_mesh, check_agreement

    record_collectives(Path(config.run.dir))
    mesh = build_mesh(config.parallel, reporter)
    check_agreement(mesh, config)
    facts, start = mesh.broadcast(checked)
    held = prepare(config, start) if mesh.is_first else None

    from rdm_scale.parallel.plan import memory_of_rank, plan_parallelism

    plan = plan_parallelism(config, mesh.world_size, mesh.broadcast(memory_of_rank(config)))
    if mesh.is_first:
        print(plan.table(config), flush=True)
        if start.changes:
            lines = [f"resuming from {start.checkpoint} with other values than there:", *start.changes]
            print("\n  ".join(lines), flush=True)
        print_warnings([*doubts(config), *facts.warnings, *(held.warnings if held else ())])

    from rdm_scale.training.trainer import Trainer

    with held or nullcontext():
        Trainer(config, mesh, plan, facts, start, held.owner if held else None).run()
    mesh.shutdown()


def print_warnings(lines: list[str]) -> None:
    """Print one line for each warning."""
    for line in lines:
        print(f"warning: {line}", flush=True)


def _parser() -> argparse.ArgumentParser:
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
