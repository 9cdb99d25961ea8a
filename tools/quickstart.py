"""The whole way, small: digits to latents, a Neural-RDM trained on two ranks, samples, and a judgement of them.

A second call says what exists; nothing is repeated or overwritten unless asked for.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

DATA, RUN = Path("data/quickstart"), Path("runs/quickstart")
DIGITS, LATENTS, VALIDATION = DATA / "digits.tar", DATA / "latents", DATA / "validation"
CONFIG = "configs/quickstart.yaml"
AGAIN = f"""\
  to go on with the training:    make quickstart CONTINUE=1 [STEPS=3000]
  to start afresh:               rm -r {RUN}   (and {DATA}, to encode again), then make quickstart"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-data", action="store_true", help=f"stop after {LATENTS} is made")
    parser.add_argument("--continue", dest="go_on", action="store_true", help=f"go on with the run in {RUN}")
    parser.add_argument("--steps", type=int, help="train to this step instead of the configuration's last")
    options = parser.parse_args()
    if RUN.exists() and not (options.go_on or options.only_data):
        print(f"{RUN} exists already, {trained_so_far()}.")
        for name in ("samples.png", "loss.png"):
            if (RUN / name).exists():
                print(f"  {RUN / name}")
        print(AGAIN)
        return
    make_data()
    if not options.only_data:
        train(options.steps)
        judge()


def make_data() -> None:
    if (LATENTS / "manifest.json").exists() and (VALIDATION / "manifest.json").exists():
        print(f"[1-2/5] {LATENTS} and {VALIDATION} exist: using them")
        return
    for unfinished in (LATENTS, VALIDATION):
        if unfinished.exists():
            print(f"removing {unfinished}, which an interrupted call left unfinished")
            shutil.rmtree(unfinished)
    DATA.mkdir(parents=True, exist_ok=True)
    if not DIGITS.exists():
        step("[1/5] 1,797 scans of digits, as images in a webdataset tar", "tools/make_digits.py", str(DIGITS))
    step(
        "[2/5] encoding them with the packaged VAE, a tenth held out",
        *("tools/encode_latents.py", str(DIGITS), str(LATENTS), "--codec", "digits", "--size", "32"),
        *("--holdout", str(VALIDATION), "--preview", str(DATA / "reconstructions.png")),
    )


def train(steps: int | None) -> None:
    overrides = [] if steps is None else [f"train.steps={steps}"]
    step(
        "[3/5] training on 2 ranks under DeepSpeed ZeRO-3 (the libraries take some seconds to load)",
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "rdm_scale.train", CONFIG, *overrides),
        CUDA_VISIBLE_DEVICES="",  # two ranks need two devices, and every machine has two CPU cores
        OMP_NUM_THREADS="1",
    )


def judge() -> None:
    from rdm_scale.evaluation.pictures import plot_loss

    step(
        "[4/5] drawing 250 digits from the averaged weights and [5/5] judging them by the real scans",
        *("tools/evaluate.py", str(RUN), str(DIGITS), "--per-class", "25", "--picture", str(RUN / "samples.png")),
    )
    plot_loss(RUN / "metrics.jsonl", RUN / "loss.png")
    print(f"loss: {RUN / 'loss.png'}\n{AGAIN}")


def trained_so_far() -> str:
    try:
        last = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return "with no step trained yet"
    return f"trained for {last} steps"


def step(title: str, *command: str, **environment: str) -> None:
    """Runs a stage as its own process, as a user would; its failure is ours."""
    print(f"\n{title}\n$ python {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], env=os.environ | environment, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
