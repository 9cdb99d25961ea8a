"""Draws samples from a trained model and shows them in one picture, a column a class or prompt."""

import argparse
import sys
from pathlib import Path

from rdm_scale.errors import ConfigError, RdmError
from rdm_scale.progress import ProgressReporter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's directory (its newest checkpoint)")
    parser.add_argument("output", type=Path, help="PNG to write; for clips their middle frames, and a GIF beside it")
    parser.add_argument("--labels", help="classes to draw, for instance 0-9 or 3,207,360 (default: the first ten)")
    parser.add_argument("--prompt", action="append", help="what to draw, of a model with text; may be given many times")
    parser.add_argument(
        "--text-encoder", metavar="DIR", help="its folder, where it was moved since the data were encoded"
    )
    parser.add_argument("--rows", type=int, default=8, help="samples of each class (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: as in the run)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: as in the run)")
    parser.add_argument("--sampler", help="ddpm, ddim, euler or heun (default: as in the run)")
    parser.add_argument("--weights", choices=["ema", "weights"], default="ema", help="averaged or last weights")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second of clips (default: %(default)s)")
    try:
        draw(parser.parse_args())
    except RdmError as error:
        sys.exit(f"sample: error: {error}")


def draw(options: argparse.Namespace) -> None:
    if min(options.rows, options.batch_size) < 1:
        raise ConfigError("--rows and --batch-size must be at least 1")
    if not 0 < options.fps <= 1000:
        raise ConfigError("--fps must be above 0, and 1000 at most")
    if options.output.suffix != ".png":
        raise ConfigError(f"the output {options.output} must end with .png")
    if not options.output.parent.is_dir():
        raise ConfigError(f"there is no folder {options.output.parent} to write {options.output.name} to")
    import torch
    from torch import Tensor

    from rdm_scale.checkpoint import load_trained
    from rdm_scale.codecs import codec_of
    from rdm_scale.conditions import TextCondition, select_conditions
    from rdm_scale.config import parse_config
    from rdm_scale.data.captions import empty_caption
    from rdm_scale.device import local_device
    from rdm_scale.encoding.text import encode_prompts
    from rdm_scale.sampling.generate import draw_pixels
    from rdm_scale.sampling.image_grid import write_grid
    from rdm_scale.storage.location import Location

    device = local_device()
    trained = load_trained(options.checkpoint, options.weights, device)
    given = {k: v for k in ("steps", "guidance", "sampler") if (v := getattr(options, k)) is not None}
    tree = trained.config.model_dump(mode="json")
    config = parse_config(tree | {"sampling": tree["sampling"] | given}, "with the options given")
    names: list[str] = []
    columns, empty = 10, None
    condition: Tensor | TextCondition = torch.zeros(10, dtype=torch.int64).repeat(options.rows)
    if config.model.condition == "class":
        classes = chosen_labels(options.labels, config.model.num_classes)
        names = [trained.class_names[label] for label in classes]
        columns, condition = len(classes), torch.tensor(classes).repeat(options.rows)
    elif config.model.condition == "text":
        if trained.text is None or not options.prompt:
            raise ConfigError("the model takes captions: give --prompt, once or more")
        names, columns, empty = options.prompt, len(options.prompt), empty_caption(trained.text)
        prompts = encode_prompts(trained.text, options.prompt, options.text_encoder)
        condition = select_conditions(prompts, torch.arange(columns).repeat(options.rows))
    samples = columns * options.rows
    with ProgressReporter("drawing", samples) as progress:
        pixels = draw_pixels(
            trained.model,
            config,
            codec_of(trained.codec, device),
            condition.to(device),
            options.seed,
            batch_size=options.batch_size,
            empty_caption=empty,
            progress=progress.advance_to,
        )
    files = write_grid(pixels, Location(options.output), columns, names, fps=options.fps)
    print(f"{samples} samples of step {trained.step} are in {' and '.join(map(str, files))}")


def chosen_labels(text: str | None, num_classes: int) -> list[int]:
    """ "0-2,7" to [0, 1, 2, 7]."""
    if text is None:
        return list(range(min(10, num_classes)))
    try:
        ranges = [part.partition("-") for part in text.split(",")]
        labels = [
            label for first, dash, last in ranges for label in range(int(first), int(last if dash else first) + 1)
        ]
    except ValueError:
        raise ConfigError(f"--labels {text}: write it as 0-9 or 3,207,360") from None
    if not labels or not all(0 <= label < num_classes for label in labels):
        raise ConfigError(f"--labels {text}: labels lie between 0 and {num_classes - 1}")
    return labels


if __name__ == "__main__":
    main()
