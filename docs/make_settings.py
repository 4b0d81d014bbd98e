"""Writes settings.md: every setting there is, from the code itself, so that each is described in one place.

python docs/make_settings.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import featherweight as fw
from featherweight.recipe import every_step
from featherweight.settings import in_words

PAGE = Path(__file__).with_name("settings.md")
INTRODUCTION = """\
# Settings

Every setting of every step, selector and call, written by `docs/make_settings.py` from the code: change it there.
In a recipe's YAML, steps and selectors take the same names and values. What takes a `{layer pattern: ...}` can differ
from layer to layer: see [per-layer settings](budgets-and-selectors.md#per-layer-settings).
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Steps\n"]
    for name, step in every_step().items():
        parts += [f"### {name}\n", f"{first_paragraph(step)}\n", table(settings_of(step))]
    parts.append("## Selectors\n")
    for name, selector in (("optimal", fw.Optimal), ("greedy", fw.Greedy)):
        parts += [
            f"### {selector.__name__}\n",
            f"`{name}` in a recipe. {first_paragraph(selector)}\n",
            table(settings_of(selector)),
        ]
    for heading, kind in (("Budget", fw.Budget), ("Task", fw.Task)):
        parts += [f"## {heading}\n", f"{first_paragraph(kind)}\n", table(settings_of(kind))]
    parts += ["## fit\n", f"`fw.fit(model, loader, ...)`. {first_paragraph(fw.fit)}\n", table(parameters_of(fw.fit))]
    return "\n".join(parts)


def settings_of(kind: type[Any]) -> Iterator[tuple[str, str, str, str]]:
    """Name, values, default and description of every field of a dataclass."""
    hints = typing.get_type_hints(kind)
    described: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        described |= descriptions(parent, "Attributes")
    for field in dataclasses.fields(kind):
        default = "" if field.default is dataclasses.MISSING else code(field.default)
        yield field.name, in_words(hints[field.name]), default, described[field.name]


def parameters_of(function: Any) -> Iterator[tuple[str, str, str, str]]:
    """Name, values, default and description of every parameter of a function but the first two."""
    hints, described = typing.get_type_hints(function), descriptions(function, "Args")
    for name, parameter in list(inspect.signature(function).parameters.items())[2:]:
        yield name, in_words(hints[name]), code(parameter.default), described[name]


def descriptions(thing: Any, section: str) -> dict[str, str]:
    """What the section of a docstring says of every name in it."""
    lines = inspect.cleandoc(thing.__doc__ or "").splitlines()
    if f"{section}:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index(f"{section}:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if started := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = started[1].split(", ")
            found |= dict.fromkeys(names, started[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def first_paragraph(thing: Any) -> str:
    """What a docstring says first."""
    return inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")


def table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| setting | takes | default | |", "|---|---|---|---|"]
    for name, takes, default, description in rows:
        cells = [f"`{name}`", takes, default, description.replace("``", "`")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def code(value: Any) -> str:
    """A default as it would be written."""
    return f"`{value.__name__ if callable(value) else repr(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
