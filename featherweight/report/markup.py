"""HTML and SVG by construction: every tag is closed, and every text that is not a tag is escaped."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element: ``tag("td", "a < b", class_="number")`` is ``<td class="number">a &lt; b</td>``.

    Args:
        name: the element's name.
        children: markup is kept, all else is escaped, None is left out.
        attributes: underscores become hyphens, and one at the end is dropped; True has no value, None is left out.
    """
    return Markup(f"<{name}{_attributes(attributes)}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    """One element that HTML never closes, such as ``meta``."""
    return Markup(f"<{name}{_attributes(attributes)}>")


def join(*children: object) -> Markup:
    """Elements and texts one after the other."""
    return Markup("".join(c if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None))


def _attributes(attributes: dict[str, object]) -> str:
    shown = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    return "".join(f" {key}" if value is True else f' {key}="{escape(str(value))}"' for key, value in shown.items())
