"""The page's charts, drawn as SVG by hand: a few kilobytes each, where a charting library would be megabytes.

Colours, fonts and what is hidden are the style sheet's business. A ``title`` is what hovering shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from featherweight.report.markup import Markup, join, tag

LEFT, RIGHT, TOP = 52.0, 12.0, 14.0
MOST_NAMES, LONGEST_NAME = 40, 16  # more bars than this go unnamed until one points at them
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Bar:
    """One bar: how high it was, how high it is now, what hovering says, and what a click picks."""

    name: str
    before: float
    after: float
    tip: str
    pick: str | None = None


@dataclass(frozen=True)
class Dot:
    """One point of a curve, and what hovering says."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Curve:
    """The options of one layer, the chosen one (None where it has no value on this axis), and what picks it."""

    name: str
    pick: str
    dots: tuple[Dot, ...]
    chosen: Dot | None


def bars(shown: Sequence[Bar], say: Callable[[float], str]) -> Markup:
    """Bars in the order given, what is left of each filled in; `say` writes the values of the upright axis."""
    width, height = 1040.0, 190.0
    names = [_shortened(bar.name) if len(shown) <= MOST_NAMES else "" for bar in shown]
    foot = 18 + 3.6 * max(map(len, names), default=0)  # names stand at a slant
    top = max((max(bar.before, bar.after) for bar in shown), default=0.0) or 1.0
    slot = (width - LEFT - RIGHT) / max(len(shown), 1)
    thick = min(slot * 0.72, 44.0)

    def y(value: float) -> float:
        return TOP + height * (1 - value / top)

    def drawn(number: int, bar: Bar) -> Markup:
        x = LEFT + slot * (number + 0.5)
        rectangles = (
            _rectangle("before", x - thick / 2, y(bar.before), thick, height + TOP - y(bar.before)),
            _rectangle("after", x - thick / 2, y(bar.after), thick, height + TOP - y(bar.after)),
        )
        at = f"translate({x + 4:.1f} {TOP + height + 14:.1f}) rotate(-38)"
        label = tag("text", names[number], class_="name", text_anchor="end", transform=at)
        hit = _rectangle("hit", x - slot / 2, TOP, slot, height)
        return tag(
            "g",
            tag("title", bar.tip),
            hit,
            *rectangles,
            label if names[number] else None,
            class_="bar",
            data_pick=bar.pick,
        )

    axis = _upright([(y(value), say(value)) for value in _round_values(0, top)], width)
    return _drawing(width, TOP + height + foot, axis, *(drawn(*numbered) for numbered in enumerate(shown)))


@dataclass(frozen=True)
class Scale:
    """An upright axis.

    Attributes:
        place: how high a value lies, from 0 at the foot to 1 at the top.
        marks: the places that are labelled, and their labels.
    """

    place: Callable[[float], float]
    marks: tuple[tuple[float, str], ...]


def linear(values: Sequence[float], say: Callable[[float], str]) -> Scale:
    """A scale that just holds `values`, its marks written by `say`."""
    low, high = min(values), max(values)
    margin = 0.5 if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12) else 0.06 * (high - low)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return (value - low) / (high - low)

    return Scale(place, tuple((place(value), say(value)) for value in _round_values(low, high)))


def logarithmic(values: Sequence[float]) -> Scale:
    """A scale of powers of ten; what is 0, below it, or 10¹² times smaller than the largest lies on the foot as 0."""
    largest = max(values)
    seen = [value for value in values if value > 1e-12 * largest > 0]
    nothing = len(seen) < len(values)
    seen = seen or [1.0]
    low, high = math.floor(math.log10(min(seen)) - 0.01) - nothing, math.ceil(math.log10(max(seen)) + 0.01)

    def place(value: float) -> float:
        return (math.log10(value) - low) / (high - low) if value >= min(seen) else 0.0

    powers = range(low + nothing, high + 1, math.ceil((high - low) / 6))
    marks = [((power - low) / (high - low), f"10{str(power).translate(SUPERSCRIPTS)}") for power in powers]
    return Scale(place, tuple([(0.0, "0"), *marks] if nothing else marks))


def curves(shown: Sequence[Curve], across: str, scale: Callable[[Sequence[float]], Scale], wide: bool) -> Markup:
    """A curve a layer: the first is picked, the others stay in the background to compare it with.

    Args:
        shown: the curves.
        across: what the level axis is.
        scale: makes the upright axis for the values there are.
        wide: as wide as the page rather than half of it.
    """
    width, height = (1040.0 if wide else 510.0), 240.0
    foot = TOP + height
    dots = [dot for curve in shown for dot in (*curve.dots, *([curve.chosen] if curve.chosen else []))]
    furthest = max((dot.x for dot in dots), default=0.0)
    furthest = furthest if furthest > 1e-9 else 1.0  # of what is nearly nothing there are no round numbers
    upright = scale([dot.y for dot in dots] or [1.0])

    def x(value: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * value / furthest

    def y(place: float) -> float:
        return foot - height * place

    def circle(dot: Dot, kind: str, radius: float) -> Markup:
        at = {"cx": f"{x(dot.x):.1f}", "cy": f"{y(upright.place(dot.y)):.1f}"}
        return tag("circle", tag("title", dot.tip), class_=kind, **at, r=radius)

    def drawn(number: int, curve: Curve) -> Markup:
        places = [(dot.x, upright.place(dot.y)) for dot in curve.dots]
        path = " ".join(f"{x(level):.1f},{y(place):.1f}" for level, place in places if place > 0)
        return tag(
            "g",
            tag("polyline", tag("title", curve.name), points=path, class_="near"),
            tag("polyline", points=path, class_="line"),
            *(circle(dot, "dot", 3) for dot in curve.dots),
            circle(curve.chosen, "chosen", 5.5) if curve.chosen else None,
            class_="curve" if number else "curve on",
            data_shown=curve.pick,
            data_pick=curve.pick,
        )

    def level(value: float) -> Markup:
        return tag("text", f"{value:g}", class_="tick", x=f"{x(value):.1f}", y=foot + 16, text_anchor="middle")

    return _drawing(
        width,
        foot + 42,
        _upright([(y(place), said) for place, said in upright.marks], width),
        *map(level, _round_values(0, furthest)),
        tag("text", across, class_="name", x=(LEFT + width) / 2, y=foot + 36, text_anchor="middle"),
        *(drawn(*numbered) for numbered in enumerate(shown)),
    )


def spread(lower: float, middle: float, upper: float, longest: float) -> Markup:
    """A median with its quartiles on a scale from 0 to `longest`, as one line of a table."""
    width = 320.0
    scale = (width - 10) / longest if longest else 0.0
    box = _rectangle("box", 5 + scale * lower, 4, max(scale * (upper - lower), 2), 8)
    return _drawing(
        width,
        16,
        tag("line", class_="grid", x1=5, x2=width - 5, y1=8, y2=8),
        tag("rect", class_="stem", x=5, y=7, width=f"{scale * lower:.1f}", height=2),
        box,
        tag("circle", class_="chosen", cx=f"{5 + scale * middle:.1f}", cy=8, r=4),
    )


def _drawing(width: float, height: float, *parts: Markup) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:.0f}")


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> Markup:
    numbers = {"x": x, "y": y, "width": width, "height": max(height, 0.0)}
    return tag("rect", class_=kind, rx=2, **{key: f"{number:.1f}" for key, number in numbers.items()})


def _upright(marks: Sequence[tuple[float, str]], width: float) -> Markup:
    """The upright axis: a line across and a label for every mark."""
    return join(
        *(
            join(
                tag("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"),
                tag("text", said, class_="tick", x=LEFT - 8, y=f"{y + 3.5:.1f}", text_anchor="end"),
            )
            for y, said in marks
        )
    )


def _round_values(low: float, high: float) -> list[float]:
    """Three to six round numbers between `low` and `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]
