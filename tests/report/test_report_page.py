"""The page: well-formed, self-contained, complete, and its charts drawn to scale."""

from __future__ import annotations

import fnmatch
import math
import tomllib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st
from report_facts import LEDGERS, facts

import featherweight.report
from featherweight.ledger import Choice, Ledger, Point
from featherweight.report import plots
from featherweight.report.html import html


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str = "", **wanted: str) -> list[Element]:
        """The elements inside with this tag and these attributes (``class_`` is ``class``)."""
        named = {key.rstrip("_").replace("_", "-"): value for key, value in wanted.items()}
        inside = [e for child in self.children for e in (child, *child.all())]
        return [e for e in inside if tag in ("", e.tag) and all(e.attributes.get(k) == v for k, v in named.items())]


class Page(HTMLParser):
    """A page as a tree; fails where a tag is not closed in the order it was opened."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag != "meta":
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


@pytest.mark.parametrize("name", LEDGERS)
def test_everything_is_told(name: str) -> None:
    ledger = getattr(samples, name)()
    told = Page(html(ledger)).root.text
    assert [fact for fact in facts(ledger) if fact not in told] == []
    for timing in ledger.timings:
        assert f"{timing.repeats} repeats" in told


@pytest.mark.parametrize("name", LEDGERS)
def test_nothing_is_fetched(name: str) -> None:
    source = html(getattr(samples, name)())
    page = Page(source).root
    assert not any({"src", "href", "srcset", "action"} & set(element.attributes) for element in page.all())
    assert not any(sign in source for sign in ("http:", "https:", "url(", "@import", "import("))
    assert not page.all("link")


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=30), st.text(max_size=20))
def test_no_name_breaks_the_page(name: str, setting: str) -> None:
    entry = samples.factorized(last=f"head {name}")
    first, *others = entry.choices.items()
    chosen = replace(first[1].chosen, setting=setting)
    entry = replace(entry, choices={first[0]: Choice(chosen), **dict(others)}, notes=(name,), settings={name: setting})
    plain, strange = Page(html(samples.one_step())).root, Page(html(samples.ledger(entry), title=name)).root
    assert len(strange.all("script")) == len(plain.all("script")) == 1
    assert len(strange.all("tr")) == len(plain.all("tr"))


def test_a_strange_name_is_shown_as_it_is() -> None:
    page = Page(html(samples.strange())).root
    assert samples.STRANGE in [code.text for code in page.all("code")]


def test_titles_say_the_outcome() -> None:
    page = Page(html(samples.one_step(), title="Nightly")).root
    assert page.all("title")[0].text == "Nightly: 0.54 of the MACs, accuracy 92.4 % → 92.3 %"
    assert page.all("h1")[0].text == "0.54 of the MACs, accuracy 92.4 % → 92.3 %"


def test_columns_are_sorted_by_the_numbers_themselves() -> None:
    entry = samples.factorized()
    page = Page(html(samples.ledger(entry))).root
    rows = [row.all("td") for row in page.all("tr") if (row.attributes.get("data-pick") or "").startswith("step1")]
    titles = [button.text for button in page.all("table", class_="sortable")[0].all("button")]
    losses = [float(cells[titles.index("predicted loss")].attributes["data-value"] or "") for cells in rows]
    assert losses == [choice.chosen.predicted_loss for choice in entry.choices.values()]


def test_every_option_is_a_dot_and_a_row_picks_its_curve() -> None:
    ledger = samples.two_steps()
    page = Page(html(ledger)).root
    for number, entry in enumerate(ledger.steps, start=1):
        options = Counter({f"step{number}:{n}": len(c.curve) for n, c in enumerate(entry.choices.values())})
        for curve in page.all("g", class_="curve") + page.all("g", class_="curve on"):
            pick = curve.attributes["data-pick"] or ""
            if pick.startswith(f"step{number}:"):
                assert len(curve.all("circle", class_="dot")) == options[pick]
                assert page.all("tr", data_pick=pick)
                assert page.all("option", value=pick)


def test_hovering_over_a_bar_names_setting_and_cost() -> None:
    tips = [group.all("title")[0].text for group in Page(html(samples.one_step())).root.all("g", class_="bar")]
    assert any(tip.startswith("stages.0.0.conv1\nrank 20\n0.59 of its MACs\n9.44 M → 5.60 M MACs") for tip in tips)


def number(element: Element, name: str) -> float:
    return float(element.attributes[name] or "")


def test_bars_are_drawn_to_scale() -> None:
    shown = [plots.Bar("a", 1.0, 0.25, "a"), plots.Bar("b", 0.5, 0.75, "b")]
    drawing = Page(plots.bars(shown, str)).root
    before = [number(bar, "height") for bar in drawing.all("rect", class_="before")]
    after = [number(bar, "height") for bar in drawing.all("rect", class_="after")]
    assert before[1] / before[0] == pytest.approx(0.5, abs=0.01)
    assert after[0] / before[0] == pytest.approx(0.25, abs=0.01)
    assert after[1] / before[0] == pytest.approx(0.75, abs=0.01)


def test_a_logarithmic_axis_gives_equal_ratios_equal_distances() -> None:
    dots = tuple(plots.Dot(k / 4, loss, "") for k, loss in enumerate((1e-1, 1e-2, 1e-3, 0.0), start=1))
    drawing = Page(plots.curves([plots.Curve("a", "g:0", dots, dots[1])], "share", plots.logarithmic, True)).root
    circles = drawing.all("circle", class_="dot")
    x, y = [number(c, "cx") for c in circles], [number(c, "cy") for c in circles]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2)
    assert x[1] - x[0] == pytest.approx(x[3] - x[2], abs=0.2)
    assert y[3] == max(y)
    assert len((drawing.all("polyline", class_="line")[0].attributes["points"] or "").split()) == 3
    (chosen,) = drawing.all("circle", class_="chosen")
    assert (number(chosen, "cx"), number(chosen, "cy")) == (x[1], y[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1.5), st.floats(-1e9, 1e9)), min_size=1, max_size=6), st.booleans())
def test_curves_stay_inside_their_drawing(points: list[tuple[float, float]], log: bool) -> None:
    dots = tuple(plots.Dot(x, y, "") for x, y in points)
    scale = plots.logarithmic if log else partial(plots.linear, say=str)
    drawing = Page(plots.curves([plots.Curve("a", "g:0", dots, None)], "share", scale, False)).root
    (_, _, width, height) = map(float, (drawing.all("svg")[0].attributes["viewbox"] or "").split())
    for circle in drawing.all("circle"):
        assert 0 <= number(circle, "cx") <= width
        assert 0 <= number(circle, "cy") <= height


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5, 0.003], ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]),
        ([0.05, 0.02, 0.0], ["0", "10⁻²", "10⁻¹"]),
        ([0.0], ["0", "10⁻¹", "10⁰", "10¹"]),
    ],
)
def test_a_logarithmic_axis_is_labelled_by_powers_of_ten(values: list[float], said: list[str]) -> None:
    assert [label for _, label in plots.logarithmic(values).marks] == said


@pytest.mark.parametrize("value", [None, math.inf, 0.0])
def test_a_curve_without_numbers_is_left_out_or_flat(value: float | None) -> None:
    entry = samples.factorized()
    choices = {name: Choice(Point("rank 1", 0.5, value), (Point("rank 1", 0.5, value),)) for name in entry.choices}
    page = Page(html(samples.ledger(replace(entry, choices=choices)))).root
    assert bool(page.all("polyline")) == (value == 0.0)


def test_the_page_is_a_function_of_the_record(tmp_path: Path) -> None:
    ledger = samples.two_steps()
    ledger.save(tmp_path / "ledger.json")
    assert html(Ledger.load(tmp_path / "ledger.json")) == html(ledger)


def test_the_page_stays_small() -> None:
    assert len(html(samples.one_step()).encode()) < 200_000


def test_style_and_script_are_installed_with_the_package() -> None:
    package = Path(featherweight.report.__file__).parent
    project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"].get("featherweight.report", [])
    parts = [file.name for file in package.iterdir() if file.is_file() and file.suffix != ".py"]
    assert [part for part in parts if not any(fnmatch.fnmatch(part, pattern) for pattern in patterns)] == []
