"""The source distribution, the wheel built from it, and its commands in an environment without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import rdm_scale
from tests.support.limits import HANG_S

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "constraints.txt",
    "CHANGELOG.md",
    "CITATION.cff",
)
FOLDERS = ("rdm_scale", "tools", "configs")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


class Distributions(NamedTuple):
    """Paths of the source distribution and of the wheel built from it."""

    source: Path
    wheel: Path


class Installation(NamedTuple):
    """A virtual environment with the wheel installed, and an empty folder to work in."""

    environment: Path
    folder: Path

    @property
    def package(self) -> Path:
        return next(self.environment.glob("lib/python*/site-packages/rdm_scale"))

    def run(self, command: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a console command of the package."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(self.environment / "bin" / command), *map(str, arguments)],
            env=kept | {"DS_ACCELERATOR": "cpu"} | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )


def python(*arguments: object, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built from a copy of the sources, without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    python("-c", BUILD, "build_sdist", out, cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(out, filter="data")
    python("-c", BUILD, "build_wheel", out, cwd=out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="module")
def installation(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The dependencies come from the environment of the tests; the checkout is not on the path."""
    environment = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", environment, cwd=environment)
    pip = ("-m", "pip", "--python", environment / "bin" / "python", "--disable-pip-version-check")
    python(*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", distributions.wheel, cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # the .pth files there do not count
    return Installation(environment, tmp_path_factory.mktemp("work"))


def test_the_distributions_hold_files_in_place_of_links(distributions: Distributions) -> None:
    with tarfile.open(distributions.source) as tar:
        members = [member for member in tar.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)
    sources = {member.name.partition("/")[2] for member in members}
    with zipfile.ZipFile(distributions.wheel) as archive:
        installed = {info.filename: info.file_size for info in archive.infolist()}
    data = {"rdm_scale/py.typed", "rdm_scale/codecs/digits_vae/config.json", "rdm_scale/tools/emoji_licenses.txt"}
    assert data <= sources & installed.keys()
    for folder, suffix in (("tools", "*.py"), ("configs", "*.yaml"), ("rdm_scale", "**/*.py")):
        for file in (ROOT / folder).glob(suffix):
            name = f"{'' if folder == 'rdm_scale' else 'rdm_scale/'}{file.relative_to(ROOT)}"
            assert name in sources
            assert installed[name] == file.stat().st_size
    assert {name.partition("/")[0] for name in installed} == {
        "rdm_scale",
        f"rdm_scale-{rdm_scale.__version__}.dist-info",
    }


def test_every_tool_has_a_command() -> None:
    modules = {target.removesuffix(":main") for target in PROJECT["scripts"].values()}
    tools = {f"rdm_scale.tools.{file.stem}" for file in (ROOT / "tools").glob("[!_]*.py")}
    assert modules == tools | {"rdm_scale.train"}


def test_every_command_explains_itself_without_importing_torch(installation: Installation) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda name: installation.run(name, "--help", PYTHONPROFILEIMPORTTIME="1"), PROJECT["scripts"])
        for name, done in zip(PROJECT["scripts"], runs, strict=True):
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"usage: {name} ")
            assert not re.search(r"\| +(torch|diffusers|transformers)$", done.stderr, re.MULTILINE), name


def test_a_dry_run_of_the_packaged_quickstart(installation: Installation) -> None:
    config = installation.package / "configs" / "quickstart.yaml"
    done = installation.run("rdm-train", config, "--dry-run", "--world-size", 4)
    assert done.returncode == 0, done.stderr
    assert "4 ranks" in done.stdout


def test_making_and_encoding_digits(installation: Installation) -> None:
    assert installation.run("rdm-make-digits", "digits.tar").returncode == 0
    done = installation.run("rdm-encode", "digits.tar", "latents", "--codec", "digits", "--size", 32)
    assert done.returncode == 0, done.stderr
    assert "latents/manifest.json: 1797 samples, latents [4, 1, 8, 8]" in done.stdout


def test_the_quickstart_names_its_own_command(installation: Installation) -> None:
    run = installation.folder / "runs" / "quickstart-video"
    run.mkdir(parents=True)
    done = installation.run("rdm-quickstart", "--video")
    assert done.returncode == 0, done.stderr
    assert "rdm-quickstart --video --continue [--steps 3000]" in done.stdout
    assert "make" not in done.stdout


def test_the_version_is_the_same_everywhere(installation: Installation) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rdm_scale.__version__
    assert f"## [{rdm_scale.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert list(installation.package.parent.glob(f"rdm_scale-{rdm_scale.__version__}.dist-info"))
