"""Settings of the wrong type, said in words: of steps, and of the selectors that steps are given."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from featherweight.errors import RecipeError, did_you_mean

Made = TypeVar("Made")


def mistyped(settings: Any) -> list[str]:
    """What is wrong with a dataclass's values, a sentence for each that its annotation does not allow or that is NaN.

    Args:
        settings: an object of a dataclass whose fields are the settings.
    """
    hints = typing.get_type_hints(type(settings))
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    found = []
    for name, value in given.items():
        if not fits(value, hints[name]):
            found.append(f"{name} is {value!r}, a {type(value).__name__}: it takes {in_words(hints[name])}")
        elif any(isinstance(v, float) and math.isnan(v) for v in _single(value)):
            found.append(f"{name} is {value!r}: NaN is no number to work with")
    return found


def _single(value: Any) -> Iterable[Any]:
    """What a setting gives to one layer or to all."""
    return value.values() if isinstance(value, Mapping) else [value]


def made(kind: type[Made], settings: Mapping[str, Any]) -> Made:
    """An object of nested settings.

    Raises:
        RecipeError: it has no such setting.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := [f"{kind.__name__} has no {k!r}{did_you_mean(str(k), known)}" for k in settings if k not in known]:
        raise RecipeError(unknown)
    return kind(**settings)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a setting's value is of the annotated type; whole numbers serve where real ones are asked for."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if annotation is None or annotation is type(None):
        return value is None
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, annotation)


def in_words(annotation: Any) -> str:
    """A type as users say it, such as ``float or None or {layer pattern: float}``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(argument) for argument in arguments))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{{layer pattern: {in_words(arguments[1])}}}"
    if origin is tuple:
        return f"a list of {in_words(arguments[0])}"
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    return "None" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))
