"""Makes a trained model deeper without changing what it computes: a checkpoint from which training goes on.

New blocks begin with closed gates and learn from the first step on. Old blocks keep their weights, averages and Adam
moments. Step, position in the data and seed go along, so that the run goes on where it was, with model.depth alone
changed; with --restart it begins at step 0. Any residual structure but plain can grow.
"""

import argparse
import sys

from rdm_scale.errors import RdmError

PLACEMENTS = ("interleaved", "appended", "stacked")  # those of depth_growth.Placement, without importing torch for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's directory (its newest checkpoint)")
    parser.add_argument("output", help="folder in which the grown checkpoint step_... is made; any fsspec URL")
    parser.add_argument("--depth", type=int, required=True, help="number of blocks to grow to")
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="interleaved",
        help="fresh blocks between the old ones or behind them (appended), or closed copies of the whole stack "
        "behind it (stacked; multiples of the old depth) (default: %(default)s)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="count steps and data from 0, with Adam's moments zero, to warm up anew"
    )
    try:
        grow(parser.parse_args())
    except RdmError as error:
        sys.exit(f"grow_depth: error: {error}")


def grow(options: argparse.Namespace) -> None:
    from rdm_scale.checkpoint.convert.grow import grow_checkpoint
    from rdm_scale.cost import model_flops, model_parameters

    grown = grow_checkpoint(options.checkpoint, options.depth, options.output, options.placement, options.restart)
    before, after = grown.before.model, grown.after.model
    print(
        f"{grown.folder}: step {grown.step}, {before.depth} blocks grown to {after.depth} ({options.placement}), "
        f"{model_parameters(before).total:,} parameters to {model_parameters(after).total:,}, "
        f"{model_flops(after) / model_flops(before):.2f} times the operations\n"
        "go on with the run's configuration and\n"
        f"  model.depth={after.depth} checkpoint.resume={grown.folder} run.dir=A_NEW_DIRECTORY"
    )


if __name__ == "__main__":
    main()
