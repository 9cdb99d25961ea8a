"""Comparison of a model with its export to diffusers: outputs, samples from the same noise, and weights imported back.

RUN is a run (or checkpoint) with model.residual=adaln_zero and model.timestep_spacing=diffusers, such as

    python -m rdm_scale.train configs/quickstart.yaml model.residual=adaln_zero model.timestep_spacing=diffusers \
        run.dir=runs/adaln
    python experiments/two_ways.py runs/adaln
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from benchmarks.report import IMAGES, results_file, write_results
from rdm_scale.checkpoint import load_model, load_trained
from rdm_scale.checkpoint.convert.import_weights import import_weights, open_published
from rdm_scale.checkpoint.convert.merge import export_diffusers
from rdm_scale.checkpoint.model_source import open_model
from rdm_scale.codecs import codec_of
from rdm_scale.sampling.generate import draw_latents
from rdm_scale.sampling.image_grid import image_grid
from rdm_scale.storage.location import Location

COLUMNS, ROWS = 10, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--picture", type=Path, default=IMAGES / "two_ways.png")
    parser.add_argument("--out", type=Path, default=results_file(__file__))
    args = parser.parse_args()
    trained = load_trained(args.run)
    with tempfile.TemporaryDirectory() as scratch:
        folder, again = f"{scratch}/diffusers", f"{scratch}/imported"
        export_diffusers(open_model(args.run), Location(folder))
        theirs = DiTTransformer2DModel.from_pretrained(folder).eval()
        import_weights(open_published(folder, trained.config.model), Location(again), trained.config, trained.codec)
        back = load_model(again)
    same = {name: torch.equal(p, back.get_parameter(name)) for name, p in trained.model.named_parameters()}

    def in_diffusers(latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        return theirs(latents[:, :, 0], timesteps, labels).sample[:, :, None]

    labels = torch.arange(COLUMNS * ROWS) % COLUMNS
    here, there = (draw_latents(model, trained.config, labels, seed=0) for model in (trained.model, in_diffusers))
    noise = torch.randn_like(here)
    t = torch.linspace(0, 999, len(labels))
    with torch.no_grad():
        outputs = [model(noise, t, labels) for model in (trained.model, in_diffusers)]
    pixels = [codec_of(trained.codec).decode(latents)[:, :, 0] for latents in (here, there)]
    names = list(trained.class_names[:COLUMNS]) * 2
    side_by_side = torch.cat([p.unflatten(0, (ROWS, COLUMNS)) for p in pixels], dim=1).flatten(0, 1)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    image_grid(side_by_side, 2 * COLUMNS, names).save(args.picture)
    result = {
        "step": trained.step,
        "samples": len(labels),
        "sampler": trained.config.sampling.model_dump(),
        "output_max_difference": (outputs[0] - outputs[1]).abs().max().item(),
        "output_max": outputs[0].abs().max().item(),
        "latents_max_difference": (here - there).abs().max().item(),
        "pixels_max_difference": (pixels[0] - pixels[1]).abs().max().item(),
        "imported_back_bitwise_equal": all(same.values()),
    }
    write_results(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
