"""The documentation is true: every block of it runs, what it says is printed is printed, and its links lead somewhere.

In the README and in docs/, by the language of a fenced block:

    python   runs, all blocks of a page in one namespace, in an empty folder
    yaml     is read as a recipe where it has steps
    json     is read as a plan
    bash     runs, and holds nothing but `featherweight` commands
    output   is what the block above it prints; ... stands for whatever differs from run to run
    text     is for the reader only, as is a block without a language

A python or yaml block whose first line is a comment with a file's name is written to that file too.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import featherweight as fw
from featherweight import cli

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))
LANGUAGES = ("python", "yaml", "json", "bash", "output", "text")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int  # of its first line in the page, from 1

    @property
    def file(self) -> str | None:
        """The file that its first line names."""
        named = re.match(r"# (\w+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def blocks(page: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", page, re.MULTILINE):
        yield Block(found[1], found[2], page.count("\n", 0, found.start(2)) + 1)


class Reader:
    """Somebody who follows a page from its first block to its last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""

    def follow(self, block: Block) -> None:
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        printed = io.StringIO()
        match block.language:
            case "python":
                with contextlib.redirect_stdout(printed):
                    # Empty lines before it, so that an error is reported in the page's own lines.
                    exec(compile("\n" * (block.line - 1) + block.text, self.name, "exec"), self.names)
                self.printed = printed.getvalue()
            case "bash":
                with contextlib.redirect_stdout(printed):
                    for line in block.text.splitlines():
                        program, *arguments = shlex.split(line)
                        assert program == "featherweight", f"{self.name}:{block.line}: {line!r} is not run by this test"
                        assert cli.main(arguments) == 0, f"{self.name}:{block.line}: {line}"
                self.printed = printed.getvalue()
            case "yaml":
                fw.Recipe.from_yaml(block.text)
            case "json":
                fw.Plan.from_json(json.loads(block.text))
            case "output":
                flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                alike = doctest.OutputChecker().check_output(block.text, self.printed, flags)
                assert alike, f"{self.name}:{block.line}: the page says\n{block.text}\nand printed is\n{self.printed}"
            case language:
                assert language in ("", "text"), (
                    f"{self.name}:{block.line}: a block is one of {LANGUAGES}, not {language!r}"
                )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page: Path, folder: Path) -> None:
    reader = Reader(page.name)
    for block in blocks(page.read_text(encoding="utf-8")):
        reader.follow(block)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_can_be_read_and_written(recipe: Path) -> None:
    read = fw.Recipe.load(recipe)
    assert read.steps
    assert fw.Recipe.from_yaml(read.to_yaml()) == read


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_names_no_layers_of_one_network(recipe: Path) -> None:
    for step in fw.Recipe.load(recipe).steps:
        for name, value in step.settings().items():
            assert name != "ignore", recipe
            assert not isinstance(value, dict) or name in ("budget", "select") or set(value) == {"*"}, (recipe, name)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    plain = re.sub(r"^```.*\n(?:.*\n)*?```$", "", page, flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_the_make_targets_named_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [*PAGES, PROJECT / "CONTRIBUTING.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"^make ([a-z][\w-]*)", text, re.MULTILINE))
    assert named
    assert named <= targets


def test_the_page_of_settings_is_what_the_code_says() -> None:
    script = PROJECT / "docs" / "make_settings.py"
    specification = importlib.util.spec_from_file_location("make_settings", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    written = (PROJECT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == module.page(), "run `python docs/make_settings.py`"
