"""How a benchmark says what it found: a Markdown table with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from featherweight.ledger import machine

FOLDER = Path(__file__).resolve().parent / "results"


def publish(name: str, what: str, lines: Sequence[str], write: bool, *, parts: Sequence[str] | None = None) -> None:
    """Print a benchmark's lines under a heading, and keep them in ``results/NAME.md`` where asked.

    Args:
        name: the script's name.
        what: the script's docstring; its first line is the heading.
        lines: Markdown.
        write: whether to keep them.
        parts: how the titles of the sections begin that were measured now; others stay as they are. None for all.
    """
    file = FOLDER / f"{name}.md"
    when = datetime.date.today().isoformat()
    where = f"{processor()}, {machine()}; torch {version('torch')}, featherweight {version('featherweight')}; {when}."
    made = f"`python benchmarks/{name}.py` on {where}"
    if parts is None:
        lines = [made, "", *lines]
    else:  # each section says where it was measured
        lines = [part for line in lines for part in ([line, "", made] if line.startswith("## ") else [line])]
        if write and file.exists():
            lines += _others(file.read_text(encoding="utf-8"), parts)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join([f"# {what.strip().splitlines()[0]}", "", *lines, ""]))
    print(text)
    if write:
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _others(text: str, parts: Sequence[str]) -> list[str]:
    """Of a results file the lines of sections whose titles begin otherwise."""
    kept: list[str] = []
    keep = False
    for line in text.rstrip().splitlines():
        if line.startswith("## "):
            keep = not any(line.startswith(f"## {part}") for part in parts)
            kept += [""] if keep else []
        if keep and (line or kept[-1:] != [""]):
            kept.append(line)
    return kept


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown")
