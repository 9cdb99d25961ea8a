"""Judges a trained model by its own samples: how many look like the class that was asked for.

A nearest-neighbour classifier fitted on real images labels the generated ones; the share it labels as asked is the
label accuracy. It suits small images of clear classes, such as digits.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from rdm_scale.errors import ConfigError, RdmError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's directory (its newest checkpoint)")
    parser.add_argument("images", help="real, labelled images: a folder or webdataset tar, as for encode_latents.py")
    parser.add_argument("--per-class", type=int, default=25, help="images drawn of each class (default: %(default)s)")
    parser.add_argument("--neighbours", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--weights", choices=["ema", "weights"], default="ema", help="averaged or last weights")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=125, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="show the first images judged in this PNG, a column a class")
    parser.add_argument(
        "--rows", type=int, default=10, help="images of each class in the picture (default: %(default)s)"
    )
    try:
        judge(parser.parse_args())
    except RdmError as error:
        sys.exit(f"evaluate: error: {error}")


def judge(options: argparse.Namespace) -> None:
    if min(options.per_class, options.neighbours, options.batch_size, options.rows) < 1:
        raise ConfigError("--per-class, --neighbours, --batch-size and --rows must be at least 1")
    import torch

    from rdm_scale.checkpoint import load_trained
    from rdm_scale.data.codecs import codec_of
    from rdm_scale.data.images import load_images
    from rdm_scale.evaluation.labels import label_accuracy
    from rdm_scale.evaluation.pictures import image_grid
    from rdm_scale.evaluation.sampling import draw_images

    trained = load_trained(options.checkpoint, options.weights)
    if trained.config.model.condition != "class":
        raise ConfigError("label accuracy needs a model with model.condition=class")
    classes = trained.config.model.num_classes
    labels = torch.arange(classes).repeat(options.per_class)
    with tqdm(total=len(labels), unit="sample", desc="drawing") as bar:
        images = draw_images(
            trained.model,
            trained.config,
            codec_of(trained.codec),
            labels,
            options.seed,
            batch_size=options.batch_size,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    if options.picture:
        image_grid(images[: options.rows * classes], classes, trained.class_names).save(options.picture)
        print(f"samples: {options.picture}")
    real, real_labels = load_images(options.images, images.shape[-1])
    accuracy = label_accuracy(real, real_labels, images, labels, options.neighbours)
    print(f"label accuracy: {100 * accuracy:.1f} % of {len(labels)} samples of step {trained.step}")


if __name__ == "__main__":
    main()
