"""Import published DiT weights as a checkpoint that training can start from.

SOURCE is a folder of diffusers' DiTTransformer2DModel (or of a pipeline with one), or a file with the names of the
original DiT: .safetensors, or .pt, from which only tensors are read (also what a training loop saved). CONFIG is the
configuration of the run that will start from it. It is required for a file, and always useful, because the weights are
then checked against the run and its data.

Training can also start from SOURCE itself, without a checkpoint in between: checkpoint.start_from=SOURCE.
"""

import argparse
import shlex
import sys

from rdm_scale.config import parse_weights
from rdm_scale.config.paths import any_option
from rdm_scale.errors import RdmError
from rdm_scale.progress import ProgressReporter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=any_option, metavar="SOURCE", help="a folder or file; any fsspec URL")
    parser.add_argument(
        "out", type=any_option, metavar="OUT", help="folder of checkpoints to write step_00000000 to; any fsspec URL"
    )
    parser.add_argument(
        "config", type=any_option, metavar="CONFIG", nargs="?", help="YAML of the run, with data that can be read"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for training")
    parser.add_argument(
        "--weights", default="ema", metavar="{ema,raw}", help="of a training loop's file, those to read (default: ema)"
    )
    try:
        import_checkpoint(parser.parse_intermixed_args())
    except RdmError as error:
        sys.exit(f"import_checkpoint: error: {error}")


def import_checkpoint(options: argparse.Namespace) -> None:
    from rdm_scale.config import load_config

    config = load_config(options.config, options.overrides) if options.config else None
    from rdm_scale.checkpoint.convert.import_weights import import_weights, open_published
    from rdm_scale.data.compatibility import check_data
    from rdm_scale.storage.location import Location

    facts = check_data(config) if config else None
    published = open_published(options.source, config.model if config else None, parse_weights(options.weights))
    with ProgressReporter("importing", published.elements, "parameter", scaled=True) as progress:
        folder = import_weights(
            published,
            Location(options.out),
            config,
            facts.codec if facts else None,
            facts.class_names if facts else (),
            progress.update,
        )
    print(f"{published.elements:,} parameters are in {folder}; train from them with")
    command = [options.config or "CONFIG", *options.overrides, f"checkpoint.start_from={folder}"]
    print(f"  python -m rdm_scale.train {shlex.join(command)}")
    if config is None:
        print("where CONFIG describes this model:")
        for name, value in published.model.model_dump(mode="json", exclude={"gate"}).items():
            print(f"  model.{name}: {value}")


if __name__ == "__main__":
    main()
