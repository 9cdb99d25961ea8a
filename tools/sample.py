"""Draw samples from a trained model into one image grid with a column for each class or prompt."""

import argparse
import sys
from typing import TYPE_CHECKING

from rdm_scale.config.paths import any_option, local_option
from rdm_scale.errors import ConfigError, RdmError
from rdm_scale.progress import ProgressReporter

if TYPE_CHECKING:
    from rdm_scale.checkpoint.trained_model import TrainedModel
    from rdm_scale.sampling.requests import SamplingRequest

DEFAULT_COLUMNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=any_option, help="a checkpoint's folder, or a run's directory (its newest checkpoint)"
    )
    parser.add_argument(
        "output", type=local_option, help="PNG to write; for clips their middle frames, and a GIF beside it"
    )
    parser.add_argument("--labels", help="classes to draw, for instance 0-9 or 3,207,360 (default: the first ten)")
    parser.add_argument("--prompt", action="append", help="what to draw, for a model with text; may be repeated")
    parser.add_argument(
        "--text-encoder", type=any_option, metavar="DIR", help="its folder, if moved since the data were encoded"
    )
    parser.add_argument("--rows", type=int, default=8, help="samples of each class (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: as in the run)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: as in the run)")
    parser.add_argument("--sampler", help="ddpm, ddim, euler or heun (default: as in the run)")
    parser.add_argument(
        "--weights",
        metavar="{ema,raw}",
        help="EMA weights, or those without averaging (default: EMA where there are any)",
    )
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
    from rdm_scale.checkpoint import load_trained
    from rdm_scale.device import local_device
    from rdm_scale.sampling.image_grid import write_grid
    from rdm_scale.sampling.requests import draw_request, override_sampling
    from rdm_scale.storage.location import Location
    from rdm_scale.storage.own_files import refuse_to_replace

    refuse_to_replace(Location(options.output))
    trained = load_trained(options.checkpoint, options.weights, local_device())
    sampling = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    config = override_sampling(trained.config, "with the options given", **sampling)
    request = request_of(options, trained)
    with ProgressReporter("drawing", request.samples) as progress:
        pixels = draw_request(
            trained,
            request,
            options.seed,
            config=config,
            batch_size=options.batch_size,
            progress=progress.advance_to,
        )
    files = write_grid(pixels, Location(options.output), request.columns, request.names, fps=options.fps)
    print(f"{request.samples} samples of step {trained.step} are in {' and '.join(map(str, files))}")


def request_of(options: argparse.Namespace, trained: "TrainedModel") -> "SamplingRequest":
    """Conditions as the options give them: `--rows` samples of each label or prompt."""
    from rdm_scale.sampling.requests import (
        refuse_unused_options,
        request_labels,
        request_prompts,
        request_unconditional,
    )

    model = trained.config.model
    refuse_unused_options(
        trained.config, labels=options.labels, prompt=options.prompt, text_encoder=options.text_encoder
    )
    if model.condition == "class":
        return request_labels(trained, chosen_labels(options.labels, model.num_classes), options.rows)
    if model.condition == "none":
        return request_unconditional(DEFAULT_COLUMNS, options.rows)
    if not options.prompt:
        raise ConfigError("the model takes captions: give --prompt, once or more")
    return request_prompts(trained, options.prompt, options.rows, options.text_encoder)


def chosen_labels(text: str | None, num_classes: int) -> list[int]:
    """Parse the labels of `--labels`: "0-2,7" is [0, 1, 2, 7], None the first ten."""
    if text is None:
        return list(range(min(DEFAULT_COLUMNS, num_classes)))
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
