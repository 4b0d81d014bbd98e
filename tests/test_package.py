"""What a user gets with the package: its version, its types, its licence, its command, its documentation."""

import ast
import fnmatch
import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "featherweight"
MODULES = sorted(PACKAGE.rglob("*.py"))


def project() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_the_one_installed():
    assert importlib.metadata.version("featherweight") == project()["project"]["version"]


def test_the_changelog_has_this_version():
    version = project()["project"]["version"]
    assert re.search(rf"^## \[?{re.escape(version)}\b", (PROJECT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


def test_the_licence_is_there_and_named():
    assert importlib.metadata.metadata("featherweight")["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (PROJECT / "LICENSE").read_text(encoding="utf-8")


def test_every_file_that_is_not_code_is_shipped():
    """A wheel holds modules by itself, but the mark of a typed package, style sheets and scripts only where listed."""
    patterns = [
        (PROJECT.joinpath(*package.split(".")), pattern)
        for package, listed in project()["tool"]["setuptools"]["package-data"].items()
        for pattern in listed
    ]
    others = [
        file
        for file in PACKAGE.rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
        if not any(part.startswith(".") for part in file.relative_to(PACKAGE).parts)  # caches of tools
    ]
    assert PACKAGE / "py.typed" in others
    unlisted = [
        str(file.relative_to(PROJECT))
        for file in others
        if not any(fnmatch.fnmatch(str(file), str(folder / pattern)) for folder, pattern in patterns)
    ]
    assert unlisted == [], "list these in pyproject.toml under [tool.setuptools.package-data]"


@pytest.mark.skipif(not (PACKAGE / "cli.py").exists(), reason="there is no command line yet")
def test_the_command_leads_to_a_function():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="featherweight")
    assert callable(command.load())


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_everything_public_is_documented(file):
    module = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(module), "a module says what it is for"
    undocumented = [
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert undocumented == []


def test_no_file_names_a_place_on_somebodys_machine():
    listed = ["git", "-C", str(PROJECT), "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("not a git checkout")
    place = re.compile(rb"(?<![\w.:/])/(?:work|root|home|Users)/\w")
    named = [
        f"{name}: {match.group().decode()}…"
        for name in found.stdout.splitlines()
        if (PROJECT / name).is_file()
        for match in place.finditer((PROJECT / name).read_bytes())
    ]
    assert named == []
