"""Reading configurations from YAML and dotted `key=value` overrides, with error messages for every mistake."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rdm_scale.config.paths import expand_keys, local
from rdm_scale.config.schema import RunConfig
from rdm_scale.config.section import Section
from rdm_scale.errors import ConfigError


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-4 as a number (in YAML 1.1 it is a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"override {override!r}: write it as key=value, for instance train.steps=100")
    node = tree
    for name in path[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
    node[path[-1]] = _parse_yaml(text, f"the value of override {override!r}")


def _section(path: tuple[Any, ...]) -> type[Section]:
    section: Any = RunConfig
    for name in path:
        # An index leads from a list of sections to one of them.
        section = get_args(section)[0] if isinstance(name, int) else section.model_fields[name].annotation
    return cast(type[Section], section)


def _describe(error: ErrorDetails) -> str:
    """One line for one error of pydantic: the key, what is wrong with it, and what would be valid."""
    location = error["loc"]
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        names = list(_section(location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else f"known: {', '.join(names)}"
        )
        return f"unknown key {key}: {hint}"
    if error["type"] == "missing":
        return f"{key} is missing: {key}=... must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key}={json.dumps(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a configuration file, apply `key=value` overrides in order, and check the result.

    Raises:
        ConfigError: the file is missing or not YAML, or has unknown keys, wrong types or impossible combinations; one
            message lists all mistakes.
    """
    path = Path(local(str(path), "the configuration"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as model: and train:, found a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    expand_keys(tree)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Check a configuration given as a tree, for instance from a checkpoint; error messages contain `where`."""
    try:
        # Through JSON, where strict typing (no "3" for 3, no true for 1) still accepts a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        lines = sorted({_describe(e) for e in error.errors()})
        raise ConfigError("\n  ".join([f"the configuration {where} is not valid:", *lines])) from None


def recorded_checkpoint_dir(content: bytes) -> str | None:
    """`checkpoint.dir` in the `config.yaml` of a run; None where it is not set, or the file is not a configuration.

    The rest of the file is not checked: a run's checkpoints can be found although another version wrote it.
    """
    try:
        tree = yaml.safe_load(content)
    except yaml.YAMLError:
        return None
    section = tree.get("checkpoint") if isinstance(tree, dict) else None
    found = section.get("dir") if isinstance(section, dict) else None
    return found if isinstance(found, str) and found else None


def describe_keys() -> str:
    """List every key with its default, description and choices, for `--help`."""

    def lines(section: type[Section], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from lines(inner, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else json.dumps(field.default)
                choices = re.findall(r"Literal\[(.*?)\]", str(inner))
                values = f" [{choices[0].replace(chr(39), '')}]" if choices else ""
                yield f"  {prefix}{name} = {default}\n      {field.description}{values}"

    return "\n".join(lines(RunConfig, ""))


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
