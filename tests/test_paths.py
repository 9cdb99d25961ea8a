"""Paths in configurations and options mean what they mean in a shell, or are refused."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.config import flatten, load_config
from rdm_scale.config.paths import KEYS, any_option, expand, local, local_option
from rdm_scale.config.schema import RunConfig
from rdm_scale.errors import ConfigError
from rdm_scale.tools._encoding_options import parse_options


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "s3://bucket")
    monkeypatch.setenv("RUN", "mine")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~", "HOME"),
        ("~/runs/$RUN", "HOME/runs/mine"),
        ("runs/${RUN}_2", "runs/mine_2"),
        ("$DATA/$RUN/x", "s3://bucket/mine/x"),
        ("a/~/b", "a/~/b"),
        ("costs 5$", "costs 5$"),
        ("s3://bucket/~x", "s3://bucket/~x"),
    ],
)
def test_tilde_and_variables_are_those_of_a_shell(home: Path, text: str, expected: str) -> None:
    assert expand(text, "key") == expected.replace("HOME", str(home))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOT_SET/x", r"key=\$NOT_SET/x: the environment variable NOT_SET is not set"),
        ("~nobody_of_this_name/x", "there is no home directory of ~nobody_of_this_name"),
        ("s3://bucket/x", "key=s3://bucket/x is a URL, and only a path on this machine can be used here"),
        ("file:///x", "is a URL"),
        ("$DATA/x", r"key=\$DATA/x is a URL"),
    ],
)
def test_what_is_no_local_path_is_refused(home: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        local(text, "key")


def loaded(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(
        'run: {dir: "~/runs/$RUN"}\n'
        "data: {train: [$DATA/a/manifest.json, {path: ~/b/manifest.json, weight: 2.0}], validation: $DATA/v}\n"
        "checkpoint: {dir: $DATA/$RUN, start_from: ~/other}\n"
    )
    return load_config(path, overrides)


def test_every_path_of_a_configuration_is_expanded(home: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path, "data.cache_dir=~/cache")
    assert config.run.dir == f"{home}/runs/mine" and config.data.cache_dir == f"{home}/cache"
    assert [source.path for source in config.data.train] == ["s3://bucket/a/manifest.json", f"{home}/b/manifest.json"]
    assert [source.path for source in config.data.validation] == ["s3://bucket/v"]
    assert config.checkpoint.dir == "s3://bucket/mine" and config.checkpoint.start_from == f"{home}/other"


@pytest.mark.parametrize("override", ["run.dir=s3://bucket/runs/a", "data.cache_dir=s3://bucket/cache"])
def test_urls_are_refused_where_only_local_paths_can_be(home: Path, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"{override} is a URL"):
        loaded(tmp_path, override)
    with pytest.raises(ConfigError, match=r"the configuration=s3://bucket/a.yaml is a URL"):
        load_config("s3://bucket/a.yaml")


def test_keys_that_are_described_as_places_are_parsed_as_such() -> None:
    def described(section: Any, prefix: str) -> dict[str, str]:
        found = {}
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                found |= described(inner, f"{prefix}{name}.")
            elif field.description:
                found[prefix + name] = field.description
        return found

    keys = described(RunConfig, "")
    places = {key for key, text in keys.items() if any(word in text for word in ("URL", "local directory", "path of"))}
    assert places - {"data.options"} <= KEYS.keys()
    leaves = {
        key for key, _ in flatten(RunConfig.model_validate({"data": {"train": "x"}, "run": {"dir": "x"}}).model_dump())
    }
    assert KEYS.keys() <= leaves


def test_options_of_tools(home: Path) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--local", type=local_option)
    parser.add_argument("--any", type=any_option)
    parsed = parser.parse_args(["--local=~/x.png", "--any=$DATA/y"])
    assert parsed.local == home / "x.png" and parsed.any == "s3://bucket/y"
    with pytest.raises(argparse.ArgumentError, match="is a URL, and only a path on this machine"):
        parser.parse_args(["--local=s3://bucket/x.png"])


def test_options_of_the_encoder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["~/in", "$DATA/out", "--codec=~/vae", "--size=8", "--holdout", "$DATA/held", "--preview=~/p.png"]
    monkeypatch.setattr("sys.argv", ["encode_latents.py", *words])
    options = parse_options(None)
    assert options.paths == [f"{home}/in", "s3://bucket/out"]
    assert (options.codec, options.holdout, options.preview) == (f"{home}/vae", "s3://bucket/held", f"{home}/p.png")
