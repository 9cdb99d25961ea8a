"""Merge a checkpoint into one folder of safetensors, for this project or for diffusers; or inspect or verify it.

%(prog)s RUN_OR_STEP OUT                  merged weights and configuration
%(prog)s RUN_OR_STEP OUT --to diffusers   a folder for diffusers.DiTTransformer2DModel.from_pretrained
%(prog)s --average A B C OUT              the mean of several checkpoints
%(prog)s --inspect RUN_OR_STEP            its tensors, norms, gates and the layout that wrote it
%(prog)s --verify RUN_OR_STEP             read everything and compare all checksums
"""

import argparse
import json
import math
import sys

from rdm_scale.config.paths import any_option
from rdm_scale.errors import CheckpointError, ConfigError, RdmError
from rdm_scale.progress import ProgressReporter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths",
        nargs="+",
        type=any_option,
        metavar="PATH",
        help="a checkpoint's folder, a run's directory (its newest checkpoint) or a merged folder, and the folder to "
        "write; any fsspec URL",
    )
    parser.add_argument(
        "--weights",
        metavar="{ema,raw}",
        help="EMA weights, or those without averaging (default: EMA where there are any)",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--to", choices=["diffusers"], help="write a folder for diffusers' DiT")
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="size of one file (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--average", action="store_true", help="write the mean of several checkpoints")
    what.add_argument("--inspect", action="store_true", help="print what is in a checkpoint; writes nothing")
    what.add_argument("--verify", action="store_true", help="find damaged bytes; writes nothing")
    options = parser.parse_args()
    try:
        if options.inspect or options.verify:
            (verify if options.verify else inspect)(_one(options.paths), options)
        else:
            merge(options)
    except RdmError as error:
        sys.exit(f"merge_checkpoint: error: {error}")


def merge(options: argparse.Namespace) -> None:
    *inputs, output = options.paths
    if not inputs or (len(inputs) > 1) != options.average:
        raise ConfigError("give a checkpoint and the folder to write, or several checkpoints with --average")
    if options.average and options.to:
        raise ConfigError(
            "--average writes a merged folder: average first, then export that folder with --to diffusers"
        )
    if not 0 < options.max_file_gb < math.inf:
        raise ConfigError("--max-file-gb must be above 0")
    from rdm_scale.checkpoint.convert.diffusers_config import pipeline_warning
    from rdm_scale.checkpoint.convert.merge import export_diffusers, merge, refuse_occupied
    from rdm_scale.checkpoint.model_source import open_model
    from rdm_scale.dtypes import PRECISIONS
    from rdm_scale.storage.location import Location

    out = Location(output)
    refuse_occupied(out)
    sources = [open_model(path, options.weights) for path in inputs]
    dtype = PRECISIONS[options.dtype].torch
    limit = int(options.max_file_gb * 1e9)
    with ProgressReporter("writing", sources[0].elements, "parameter", scaled=True) as progress:
        if options.to:
            export_diffusers(sources[0], out, dtype, limit, progress.update)
        else:
            merge(sources, out, dtype, limit, progress.update)
    warning = pipeline_warning(sources[0].config.model) if options.to else None
    if warning:
        print(f"warning: {warning}")
    kind = {"ema": "EMA", "raw": "raw"}[sources[0].weights]
    origin = f"the mean of {len(sources)} checkpoints" if options.average else f"step {sources[0].step}"
    print(f"the {kind} weights of {origin} are in {out}")


def inspect(path: str, options: argparse.Namespace) -> None:
    from rdm_scale.checkpoint.model_source import find_checkpoint, open_model
    from rdm_scale.checkpoint.summary import gates, summarize

    folder = find_checkpoint(path)
    state, count, tensors = summarize(folder)
    total = 0
    print(f"{folder}: step {state['step']}, {count} tensors, written by the layout {json.dumps(state.get('layout'))}")
    print("norms of each state entry:")
    for tensor in tensors:
        norms = "  ".join(f"{entry} {norm:.6g}" for entry, norm in tensor.norms.items())
        print(f"  {tensor.name}  {list(tensor.shape)}  {norms}")
        total += math.prod(tensor.shape)
    print(f"{total:,} parameters")
    source = open_model(str(folder), options.weights)
    found = list(gates(source))
    if found:
        print(f"gates ({source.weights} weights, times their fixed multiplier): mean, smallest, largest")
    for gate in found:
        print(f"  {gate.name}  {gate.mean:.6g}  {gate.smallest:.6g}  {gate.largest:.6g}")


def verify(path: str, options: argparse.Namespace) -> None:
    from rdm_scale.checkpoint.directory import COMMIT, STATE
    from rdm_scale.checkpoint.model_source import find_checkpoint
    from rdm_scale.checkpoint.verify import verify
    from rdm_scale.storage.location import Location

    folder = Location(path)
    # A damaged checkpoint is opened as it is, so that the error names the damage.
    if not (folder / STATE).exists() and not (folder / COMMIT).exists():
        folder = find_checkpoint(path)
    with ProgressReporter("verifying", unit="B", scaled=True) as progress:
        problems = verify(folder, progress.update)
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{folder} has {len(problems)} blocks that are damaged or not finite:", *problems])
        )
    print(f"{folder} is intact: every checksum matches and every value is finite")


def _one(paths: list[str]) -> str:
    if len(paths) != 1:
        raise ConfigError("--inspect and --verify take one checkpoint")
    return paths[0]


if __name__ == "__main__":
    main()
