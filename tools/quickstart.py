"""The whole way, small: digits to latents, a Neural-RDM trained on two ranks, samples, and a judgement of them.

A second call says what exists; nothing is repeated or overwritten unless asked for.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

SERVER = Path("data/quickstart-s3")
BUCKET = "quickstart"


STRIDE = ("--stride", "3")  # 8 of a clip's 24 frames
CLIPS = ("--frames", "8", *STRIDE)


@dataclass(frozen=True)
class Places:
    """Where everything is: the run always on this machine, the data there too or on an S3 server."""

    make: str  # what the user calls
    data: str
    run: Path
    config: str = "configs/quickstart.yaml"
    overrides: tuple[str, ...] = ()
    video: bool = False  # clips of moving digits, not scans

    @property
    def digits(self) -> str:
        return f"{self.data}/digits.tar"

    @property
    def latents(self) -> str:
        return f"{self.data}/latents"

    @property
    def validation(self) -> str:
        return f"{self.data}/validation"

    @property
    def preview(self) -> str:
        return f"{self.data}/reconstructions.png"

    @property
    def checkpoints(self) -> str:
        return f"{self.data}/checkpoints" if self.overrides else f"{self.run}/checkpoints"


LOCAL = Places("make quickstart", "data/quickstart", Path("runs/quickstart"))
VIDEO = Places(
    "make quickstart-video",
    "data/quickstart-video",
    Path("runs/quickstart-video"),
    "configs/quickstart_video.yaml",
    video=True,
)
ON_S3 = Places(
    "make quickstart-s3",
    f"s3://{BUCKET}",
    Path("runs/quickstart-s3"),
    overrides=(
        f"data.train=s3://{BUCKET}/latents/manifest.json",
        f"data.validation=s3://{BUCKET}/validation/manifest.json",
        f"checkpoint.dir=s3://{BUCKET}/checkpoints",
        "run.dir=runs/quickstart-s3",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-data", action="store_true", help="stop after the latents are made")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--s3", action="store_true", help="data and checkpoints on an S3 server that is started here")
    kind.add_argument("--video", action="store_true", help="clips of moving digits instead of images")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on with the run")
    parser.add_argument("--steps", type=int, help="train to this step instead of the configuration's last")
    options = parser.parse_args()
    places = ON_S3 if options.s3 else VIDEO if options.video else LOCAL
    if places.run.exists() and not (options.go_on or options.only_data):
        print(f"{places.run} exists already, {trained_so_far(places.run)}.")
        for name in ("samples.png", "samples.gif", "loss.png"):
            if (places.run / name).exists():
                print(f"  {places.run / name}")
        print(again(places))
        return
    with served() if options.s3 else nullcontext():
        make_data(places)
        if not options.only_data:
            train(places, options.steps)
            judge(places)


@contextmanager
def served() -> Iterator[None]:
    """An S3 server on this machine, and the AWS_* variables with which all that runs within finds it."""
    from rdm_scale.tools.s3_server import S3Server

    with S3Server(SERVER.resolve(), buckets=(BUCKET,)) as server:
        print(f"an S3 server keeps its data in {SERVER}; it is at {server.endpoint} until this ends")
        os.environ |= server.environment()
        yield


def make_data(places: Places) -> None:
    from rdm_scale.storage.location import Location

    complete = [(Location(folder) / "manifest.json").exists() for folder in (places.latents, places.validation)]
    if all(complete):
        print(f"[1-2/5] {places.latents} and {places.validation} exist: using them")
        return
    if not Location(places.digits).exists():
        if places.video:
            step("[1/5] 1,797 clips of moving digits in a webdataset tar", "tools/make_digit_clips.py", places.digits)
        else:
            step("[1/5] 1,797 scans of digits, as images in a webdataset tar", "tools/make_digits.py", places.digits)
    step(
        "[2/5] encoding them with the packaged VAE, a tenth held out",
        *("tools/encode_latents.py", places.digits, places.latents, "--codec", "digits", "--size", "32"),
        *("--holdout", places.validation, *(CLIPS if places.video else ("--preview", places.preview))),
    )


def train(places: Places, steps: int | None) -> None:
    overrides = [*places.overrides, *([] if steps is None else [f"train.steps={steps}"])]
    step(
        "[3/5] training on 2 ranks under DeepSpeed ZeRO-3 (the libraries take some seconds to load)",
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "rdm_scale.train", places.config, *overrides),
        CUDA_VISIBLE_DEVICES="",  # two ranks need two devices, and every machine has two CPU cores
        OMP_NUM_THREADS="1",
    )


def judge(places: Places) -> None:
    from rdm_scale.evaluation.plots import plot_loss

    samples, loss = places.run / "samples.png", places.run / "loss.png"
    step(
        f"[4/5] drawing {'50 clips' if places.video else '250 digits'} from the averaged weights and [5/5] judging "
        f"them by the real {'clips' if places.video else 'scans'}",
        *("tools/evaluate.py", places.checkpoints, places.digits, "--picture", str(samples)),
        *("--per-class", "5", "--rows", "5", *STRIDE) if places.video else ("--per-class", "25"),
    )
    plot_loss(places.run / "metrics.jsonl", loss)
    print(f"loss: {loss}\n{again(places)}")


def again(places: Places) -> str:
    data = SERVER if places is ON_S3 else places.data
    return f"""\
  to go on with the training:    {places.make} CONTINUE=1 [STEPS=3000]
  to start afresh:               rm -r {places.run}   (and {data}, to encode again), then {places.make}"""


def trained_so_far(run: Path) -> str:
    try:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
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
