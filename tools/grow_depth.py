"""Make a trained model deeper without changing its function: write a checkpoint from which training continues.

New blocks start with zero-initialized gates and learn from the first step on. Old blocks keep their weights, EMA
weights and optimizer state. Step, position in the data and seed are kept, so that the run continues with only
model.depth changed; with --restart it starts again at step 0. Every residual structure but plain can grow.
"""

import argparse
import sys

from rdm_scale.config.paths import any_option
from rdm_scale.errors import RdmError
from rdm_scale.progress import ProgressReporter

PLACEMENTS = ("interleaved", "appended", "stacked")  # those of depth_growth.BlockPlacement, whose import loads torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=any_option, help="a checkpoint's folder, or a run's directory (its newest checkpoint)"
    )
    parser.add_argument("output", type=any_option, help="folder of checkpoints to write step_... to; any fsspec URL")
    parser.add_argument("--depth", type=int, required=True, help="number of blocks to grow to")
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="interleaved",
        help="fresh blocks between the old ones or after them (appended), or copies of all old blocks with zero gates "
        "after them (stacked; multiples of the old depth) (default: %(default)s)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="start again at step 0 with an empty optimizer state and a new warm-up"
    )
    try:
        grow(parser.parse_args())
    except RdmError as error:
        sys.exit(f"grow_depth: error: {error}")


def grow(options: argparse.Namespace) -> None:
    from rdm_scale.checkpoint.convert.grow import grow_checkpoint
    from rdm_scale.cost import model_flops, model_parameters

    with ProgressReporter("writing", unit="parameter", scaled=True) as progress:
        grown = grow_checkpoint(
            options.checkpoint,
            options.depth,
            options.output,
            options.placement,
            options.restart,
            progress.advance_to,
        )
    before, after = grown.before.model, grown.after.model
    print(
        f"{grown.folder}: step {grown.step}, {before.depth} blocks grown to {after.depth} ({options.placement}), "
        f"{model_parameters(before).total:,} parameters to {model_parameters(after).total:,}, "
        f"{model_flops(after) / model_flops(before):.2f} times the operations\n"
        "continue with the run's configuration and\n"
        f"  model.depth={after.depth} checkpoint.resume={grown.folder} run.dir=A_NEW_DIRECTORY"
    )


if __name__ == "__main__":
    main()
