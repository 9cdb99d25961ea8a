"""Options of `encode_latents`, and the checks of them that need nothing but the options themselves."""

import argparse

from rdm_scale.config.paths import any_option

HOLDOUT_SHARE = 0.1
MAX_REJECTED = 0.01
MAX_LEFT_OUT = 0.01
_LOOKS = ("verify", "stats", "decode")


def parse_options(description: str | None) -> argparse.Namespace:
    """Parse the command line; wrong usage ends the process with one line that says what is wrong."""
    parser = _parser(description)
    options = parser.parse_intermixed_args()
    looks = [name for name in _LOOKS if getattr(options, name)]
    wanted = ["OUTPUT"] if looks else ["INPUT", "OUTPUT"]
    if len(options.paths) != len(wanted):
        parser.error(f"give {' and '.join(wanted)}, not {len(options.paths)} paths")
    if len(looks) > 1:
        parser.error(f"--{looks[0]} and --{looks[1]} are two commands")
    if not looks:
        _check_encoding(parser, options)
    return options


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="*", type=any_option, metavar="PATH", help="INPUT and OUTPUT, or OUTPUT alone to look at it"
    )

    _add_inputs(parser)
    how = parser.add_argument_group("how it is written")
    how.add_argument(
        "--latents",
        choices=["mode", "moments"],
        default="mode",
        help="keep the posterior's mode, or its mean and variance, to be sampled in training (default: %(default)s)",
    )
    how.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16")
    how.add_argument(
        "--holdout", type=any_option, metavar="DIR", help="folder of a second set of shards, for validation"
    )
    how.add_argument(
        "--holdout-share", type=_held_share, help=f"share of the inputs held out (default: {HOLDOUT_SHARE})"
    )
    how.add_argument("--seed", type=int, default=0, help="of the order and of the holdout (default: %(default)s)")
    how.add_argument("--batch-size", type=_positive, help="samples encoded at a time (default: 64 images or 8 clips)")
    how.add_argument("--samples-per-member", type=_positive, help="default: 64 images or 8 clips")
    how.add_argument("--members-per-shard", type=_positive, default=64, help="default: %(default)s")
    how.add_argument(
        "--preview", type=any_option, metavar="FILE.png", help="picture of some originals above their reconstructions"
    )

    _add_tolerances(parser)
    look = parser.add_argument_group("looking at what is encoded")
    look.add_argument("--verify", action="store_true", help="check every byte of OUTPUT")
    look.add_argument("--stats", action="store_true", help="measure OUTPUT, and keep the figures in its manifest")
    look.add_argument("--decode", type=_positive, metavar="N", help="decode N samples of OUTPUT")
    look.add_argument(
        "--picture", type=any_option, help="file that --stats or --decode draw (default: beside the manifest)"
    )
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is encoded")
    what.add_argument("--codec", type=any_option, help="identity (pixels), digits, or the folder of a VAE of diffusers")
    what.add_argument("--size", type=_positive, help="height and width in pixels to encode at")
    what.add_argument(
        "--buckets",
        nargs="+",
        metavar="HxW",
        help="instead of --size: several sizes, HxW or TxHxW; each input goes to the one nearest to it",
    )
    what.add_argument("--frames", type=_positive, help="frames of a clip (videos)")
    what.add_argument("--fps", type=_number, help="frame rate that clips are taken at (default: the video's own)")
    what.add_argument("--stride", type=_positive, default=1, help="frames from one of a clip to the next")
    what.add_argument("--clip-step", type=_positive, help="frames between the starts of clips (default: their length)")
    what.add_argument("--flips", action="store_true", help="encode a mirrored second view of every sample too")
    what.add_argument(
        "--class-order",
        choices=["text", "numeric"],
        help="number classes in the order of their names as text (default), or with the numbers in them by value: 2 "
        "before 10. Numbers in tars and lists are the labels themselves",
    )
    what.add_argument(
        "--text-encoder", type=any_option, metavar="DIR", help="folder of a text encoder: captions are encoded with it"
    )
    for name in ("path", "label", "caption", "key"):
        what.add_argument(f"--{name}-column", default=name, help=f"of lists and key.json (default: {name})")
    what.add_argument(
        "--group-column",
        help="of lists and key.json: entries of one group are held out together (default: of one file)",
    )
    what.add_argument("--prefix-keys", action="store_true", help="begin each key with the name of its tar")


def _add_tolerances(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("which inputs may be missing from the set")
    inputs.add_argument(
        "--max-rejected",
        type=_share,
        default=MAX_REJECTED,
        help="share of the inputs that may prove undecodable; they are listed in rejected.jsonl (default: %(default)s)",
    )
    inputs.add_argument(
        "--max-unreadable",
        type=_share,
        default=0.0,
        help="share of the inputs that may be missing or unreadable where they are stored; the next run looks for them "
        "again (default: %(default)s: the first one ends the job, which the same command resumes)",
    )
    inputs.add_argument(
        "--max-left-out",
        type=_share,
        default=MAX_LEFT_OUT,
        help="share of what INPUT holds that may be left out although it may be an image or video, because of its "
        "format or name, or because it is a broken link (default: %(default)s)",
    )
    inputs.add_argument("--min-size", type=_positive, help="leave out inputs whose shorter side has fewer pixels")
    inputs.add_argument(
        "--trust-inputs",
        action="store_true",
        help="take inputs as unchanged whose sizes or times differ from when they were encoded, as after a copy",
    )


def _check_encoding(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not options.codec:
        parser.error("--codec is needed to encode")
    if bool(options.size) == bool(options.buckets):
        parser.error("give either --size or --buckets")
    if options.buckets and options.frames:
        parser.error("with --buckets the frames are part of a size: --buckets 16x256x256")
    if options.holdout_share is not None and options.holdout is None:
        parser.error("--holdout-share needs --holdout DIR")
    if options.preview and not options.preview.endswith(".png"):
        parser.error("--preview must end with .png")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _number(text: str) -> float:
    if not 0 < (number := float(text)) < 1000:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1000")
    return number


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return number


def _held_share(text: str) -> float:
    if not (number := _share(text)):
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return number
