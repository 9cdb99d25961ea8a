"""Paths as people write them, in configurations and on command lines: one parser for all.

`~` and `$VAR` mean what they mean in a shell, also where no shell has seen them: in a YAML file, in `--option=~/x`, or
between quotes. Where only a local path can be used, a URL is refused, which as a path would be a folder named `s3:`.
"""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdm_scale.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand(text: str, what: str) -> str:
    """Replace `~` at the beginning, and environment variables, in a path or URL.

    Args:
        what: key or option of the path, for error messages.

    Raises:
        ConfigError: a variable is not set, or there is no such user.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ConfigError(f"{what}={text}: the environment variable {name} is not set")
        return os.environ[name]

    path = _VARIABLE.sub(value, text)
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111
    if expanded.startswith("~"):
        raise ConfigError(
            f"{what}={text}: there is no home directory of {path.split('/')[0]}; write ./{path} for a name"
        )
    return expanded


def local(text: str, what: str) -> str:
    """Expand a path on this machine.

    Raises:
        ConfigError: as `expand`, or it is a URL.
    """
    path = expand(text, what)
    if _URL.match(path):
        raise ConfigError(f"{what}={text} is a URL, and only a path on this machine can be used here")
    return path


# Keys that hold paths; those of other keys are not expanded.
KEYS: dict[str, Callable[[str, str], str]] = {
    "checkpoint.dir": expand,
    "checkpoint.resume": expand,
    "checkpoint.start_from": expand,
    "data.cache_dir": local,
    "data.train": expand,
    "data.validation": expand,
    "monitor.reference": expand,
    "run.dir": local,
}


def expand_keys(tree: dict[str, Any]) -> None:
    """Expand the paths in a configuration, in place; what is not a path is left to the checks of the schema.

    Raises:
        ConfigError: as `expand` and `local`.
    """
    for key, parse in KEYS.items():
        section, _, name = key.partition(".")
        values = tree.get(section)
        if isinstance(values, dict) and name in values:
            values[name] = _expanded(values[name], parse, key)


def _expanded(value: Any, parse: Callable[[str, str], str], key: str) -> Any:
    """A path, a list of them, or a source with a path."""
    if isinstance(value, str):
        return parse(value, key)
    if isinstance(value, list):
        return [_expanded(each, parse, key) for each in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return value | {"path": parse(value["path"], key)}
    return value


def local_option(text: str) -> Path:
    """Parse an option or argument that is a local path; a `type` of argparse."""
    return Path(_option(local, text))


def any_option(text: str) -> str:
    """Parse an option or argument that is a path or URL; a `type` of argparse."""
    return _option(expand, text)


def _option(parse: Callable[[str, str], str], text: str) -> str:
    try:
        return parse(text, "the path")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
