"""The Markdown report, as an independent reader (markdown-it, GitHub's tables) understands it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import report_samples as samples
from markdown_it import MarkdownIt
from report_facts import LEDGERS, facts

from featherweight.report.markdown import markdown


class Reader(HTMLParser):
    """Text, tags and the number of cells in every row of every table."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.tables: list[list[int]] = []
        self.feed(MarkdownIt("commonmark").enable("table").render(source))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("th", "td"):
            self.tables[-1][-1] += 1

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("name", LEDGERS)
def test_everything_is_told(name: str) -> None:
    ledger = getattr(samples, name)()
    told = "".join(Reader(markdown(ledger)).words)
    assert [fact for fact in facts(ledger) if fact not in told] == []


@pytest.mark.parametrize("name", LEDGERS)
def test_every_row_of_a_table_has_the_same_columns(name: str) -> None:
    source = markdown(getattr(samples, name)())
    for rows in Reader(source).tables:
        assert len(set(rows)) == 1
    for block in re.findall(r"(?:^\|.*\n?)+", source, re.MULTILINE):  # a reader pads short rows: count them as written
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_table_for_the_whole_and_one_for_the_layers() -> None:
    assert [len(rows) for rows in Reader(markdown(samples.one_step())).tables] == [10, 13, 3]


def test_a_strange_name_stays_text() -> None:
    tags = Reader(markdown(samples.strange())).tags
    assert "script" not in tags
    assert "em" not in tags
    assert "a" not in tags
