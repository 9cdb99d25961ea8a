"""Lazy names: packages export what `__all__` says, and importing them loads nothing heavy."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("codecs", "data", "encoding", "sampling")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_found(package: str) -> None:
    module = importlib.import_module(f"rdm_scale.{package}")
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match=r"module 'rdm_scale\.codecs' has no attribute 'nothing'"):
        _ = importlib.import_module("rdm_scale.codecs").nothing


def test_importing_the_packages_loads_no_torch() -> None:
    imports = ", ".join(f"rdm_scale.{package}" for package in PACKAGES)
    code = f"import sys, {imports}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
