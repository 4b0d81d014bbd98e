"""Reports: pure functions of a ledger. No model, no torch, no second run."""

from __future__ import annotations

import os
from pathlib import Path

from featherweight.errors import FeatherweightError, did_you_mean
from featherweight.ledger import Ledger


def write(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    """Write the report of `ledger` to a file: ``.html`` a page, ``.md`` Markdown, ``.json`` the ledger itself.

    Raises:
        FeatherweightError: the suffix is none of these.
    """
    from featherweight.report.html import html
    from featherweight.report.markdown import markdown

    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        ledger.save(path)
    elif suffix == ".html":
        Path(path).write_text(html(ledger), encoding="utf-8")
    elif suffix == ".md":
        Path(path).write_text(markdown(ledger), encoding="utf-8")
    else:
        hint = did_you_mean(suffix, (".html", ".md", ".json"))
        raise FeatherweightError(
            f"{os.fspath(path)} ends in {suffix or 'no suffix'}{hint}: a report is written to .html, .md or .json"
        )
