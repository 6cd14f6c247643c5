"""What every release must have: the version, the type marker, documented names, a current page of the commands."""

import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import adapterbank

ROOT = Path(__file__).parents[1]
PUBLIC = sorted(getattr(adapterbank, "__all__", ()))


def test_the_installed_version_is_that_of_pyproject():
    # tomllib came with Python 3.11
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert importlib.metadata.version("adapterbank") == version
    assert getattr(adapterbank, "__version__", version) == version


def test_the_changelog_has_a_place_for_the_next_release():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_type_checkers_see_the_package():
    assert files("adapterbank").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_and_its_methods_are_documented(name):
    public = getattr(adapterbank, name)
    if not (inspect.isclass(public) or inspect.isroutine(public)):
        return
    bare = [name] if not public.__doc__ else []
    for attribute, value in vars(public).items() if inspect.isclass(public) else ():
        value = getattr(value, "__func__", value)  # classmethod and staticmethod
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            bare += [] if inspect.getdoc(value) else [f"{name}.{attribute}"]
    assert bare == []


@pytest.mark.skipif(importlib.util.find_spec("adapterbank.cli") is None, reason="no command line yet")
def test_the_page_of_the_commands_is_what_help_prints():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_cli.py", "--check"], capture_output=True, text=True
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_shapes_are_checked_in_this_run():
    # the import hook of pyproject's pytest options: without it every shape in a signature would be decoration
    hooks = [type(finder).__module__ for finder in sys.meta_path]
    assert any(module.startswith("jaxtyping") for module in hooks)
