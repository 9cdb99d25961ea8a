"""Run every step once on small data: encode digits, train a Neural-RDM on two ranks, sample it, evaluate the samples.

Reads and writes data/ and runs/ in the current folder. A second call lists what exists; nothing is repeated or
overwritten unless asked for.
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

import rdm_scale

PACKAGE = Path(rdm_scale.__file__).parent
SERVER = Path("data/quickstart-s3")
BUCKET = "quickstart"
COMMAND = "rdm-quickstart"  # its name where the package is installed without the checkout
STRIDE = ("--stride", "3")  # 8 of a clip's 24 frames
CLIPS = ("--frames", "8", *STRIDE)


@dataclass(frozen=True)
class Places:
    """Locations of one variant of the quickstart. The run is on this machine; the data may be on an S3 server."""

    make: str  # command with which the user starts it in a checkout
    data: str
    run: Path
    config: str = "quickstart.yaml"
    overrides: tuple[str, ...] = ()
    option: str = ""  # of this tool
    video: bool = False  # clips of moving digits instead of images

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
    "quickstart_video.yaml",
    option=" --video",
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
    option=" --s3",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-data", action="store_true", help="stop after encoding the latents")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--s3", action="store_true", help="keep data and checkpoints on a local S3 server")
    kind.add_argument("--video", action="store_true", help="use clips of moving digits instead of images")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="resume the run")
    parser.add_argument("--steps", type=int, help="last step to train (default: the configuration's)")
    options = parser.parse_args()
    places = ON_S3 if options.s3 else VIDEO if options.video else LOCAL
    if places.run.exists() and not (options.go_on or options.only_data):
        print(f"{places.run} exists already, {trained_so_far(places.run)}.")
        for name in ("samples.png", "samples.gif", "loss.png"):
            if (places.run / name).exists():
                print(f"  {places.run / name}")
        print(again(places))
        return
    with local_s3_server() if options.s3 else nullcontext():
        make_data(places)
        if not options.only_data:
            train(places, options.steps)
            evaluate(places)


@contextmanager
def local_s3_server() -> Iterator[None]:
    """Run an S3 server on this machine, with the AWS_* variables that lead clients to it in the environment."""
    from rdm_scale.tools.s3_server import S3Server

    with S3Server(SERVER.resolve(), buckets=(BUCKET,)) as server:
        print(f"an S3 server with its data in {SERVER} runs at {server.endpoint} until this command ends")
        os.environ |= server.environment()
        yield


def make_data(places: Places) -> None:
    """Write the digits and encode them, unless both sets of latents exist."""
    from rdm_scale.storage.location import Location

    complete = [(Location(folder) / "manifest.json").exists() for folder in (places.latents, places.validation)]
    if all(complete):
        print(f"[1-2/5] {places.latents} and {places.validation} exist: using them")
        return
    if not Location(places.digits).exists():
        if places.video:
            title = "[1/5] writing 1,797 clips of moving digits to a webdataset tar"
            run_step(title, *tool("make_digit_clips"), places.digits)
        else:
            title = "[1/5] writing 1,797 scans of digits as images to a webdataset tar"
            run_step(title, *tool("make_digits"), places.digits)
    run_step(
        "[2/5] encoding them with the packaged VAE, a tenth held out",
        *(*tool("encode_latents"), places.digits, places.latents, "--codec", "digits", "--size", "32"),
        *("--holdout", places.validation, *(CLIPS if places.video else ("--preview", places.preview))),
    )


def train(places: Places, steps: int | None) -> None:
    """Train on two ranks, as far as `steps` or the configuration says."""
    overrides = [*places.overrides, *([] if steps is None else [f"train.steps={steps}"])]
    run_step(
        "[3/5] training on 2 ranks under DeepSpeed ZeRO-3 (the libraries take some seconds to load)",
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "rdm_scale.train", config_file(places.config), *overrides),
        CUDA_VISIBLE_DEVICES="",  # two ranks need two devices, and every machine has two CPU cores
        OMP_NUM_THREADS="1",
    )


def evaluate(places: Places) -> None:
    """Draw samples, measure label accuracy and Frechet distance, and plot the loss."""
    from rdm_scale.evaluation.plots import plot_loss

    samples, loss = places.run / "samples.png", places.run / "loss.png"
    run_step(
        f"[4/5] drawing {'50 clips' if places.video else '250 digits'} with the EMA weights and [5/5] classifying "
        f"them by their nearest real {'clips' if places.video else 'scans'}, and their distance from these",
        *(*tool("evaluate"), places.checkpoints, places.digits, "--features", "digits", "--picture", str(samples)),
        *("--per-class", "5", "--rows", "5", *STRIDE) if places.video else ("--per-class", "25"),
    )
    plot_loss(places.run / "metrics.jsonl", loss)
    print(f"loss: {loss}\n{again(places)}")


def again(places: Places) -> str:
    """The commands that resume the run and that start a new one."""
    data = SERVER if places is ON_S3 else places.data
    installed = Path(sys.argv[0]).name == COMMAND
    start = f"{COMMAND}{places.option}" if installed else places.make
    resume = f"{start} --continue [--steps 3000]" if installed else f"{start} CONTINUE=1 [STEPS=3000]"
    return f"""\
  to go on with the training:    {resume}
  to start afresh:               rm -r {places.run}   (and {data}, to encode again), then {start}"""


def trained_so_far(run: Path) -> str:
    """Words for the last step of a run."""
    try:
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return "with no step trained yet"
    return f"trained for {last} steps"


def tool(name: str) -> tuple[str, ...]:
    """Arguments of python that run a tool: its file where the current folder is the checkout, else its module."""
    file = Path("tools", f"{name}.py")
    return (str(file),) if file.exists() and file.samefile(PACKAGE / file) else ("-m", f"rdm_scale.tools.{name}")


def config_file(name: str) -> str:
    """Path of a configuration that comes with the package, relative to the current folder if it is below that."""
    file = (PACKAGE / "configs" / name).resolve()
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def run_step(title: str, *command: str, **environment: str) -> None:
    """Run a step in a process of its own, as a user would, and exit with its status if it fails."""
    print(f"\n{title}\n$ python {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], env=os.environ | environment, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
