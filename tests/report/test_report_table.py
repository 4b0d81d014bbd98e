"""The terminal's report: complete, plain, and no wider than asked."""

import io

import pytest
import report_samples as samples
from report_facts import LEDGERS, facts
from rich.cells import cell_len
from rich.console import Console

from featherweight.report.table import table, text


@pytest.mark.parametrize("name", LEDGERS)
def test_everything_is_told(name: str) -> None:
    ledger = getattr(samples, name)()
    told = text(ledger, width=400)
    assert [fact for fact in facts(ledger) if fact not in told] == []


@pytest.mark.parametrize("name", LEDGERS)
@pytest.mark.parametrize("width", [40, 80, 100, 133])
def test_no_line_is_wider_than_asked(name: str, width: int) -> None:
    assert max(cell_len(line) for line in text(getattr(samples, name)(), width).splitlines()) <= width


def test_a_hundred_columns_hold_a_row_a_layer() -> None:
    rows = [line.split() for line in text(samples.one_step()).splitlines()]
    assert ["stages.0.0.conv1", "Conv2d", "rank", "20", "0.59"] in [row[:5] for row in rows]


def test_names_are_not_read_as_markup() -> None:
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(table(samples.strange()))
    assert samples.STRANGE in capture.get()
