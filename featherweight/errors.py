"""What can go wrong, one class per kind. Every message says what is wrong, with which values, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FeatherweightError(Exception):
    """The base of every error the package raises on purpose."""


class TaskError(FeatherweightError):
    """The task and the model do not fit each other, or one of the task's functions failed."""


class RecipeError(FeatherweightError):
    """A recipe cannot run; carries all its problems at once.

    Args:
        problems: one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        many = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"The recipe cannot run ({many}):\n" + "\n".join(f"  - {p}" for p in self.problems))


class BudgetError(FeatherweightError):
    """No choice of options stays within the budget; the message names the nearest budget that can be met."""


class EditError(FeatherweightError):
    """An edit does not fit the model it is applied to."""


class ArtifactError(FeatherweightError):
    """A file is not ours, is newer than this version, is damaged, or does not fit the model it is loaded into."""


class ExportError(FeatherweightError):
    """A model could not be exported, or the exported file does not answer as the model does."""


class NoEffect(UserWarning):
    """A step changed nothing; the message says why."""


class DropExceeded(UserWarning):
    """A step did what it could, and the score falls further than its budget allows; the message says how far."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'ratio'?"``, or an empty string when nothing known is close to `word`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_few(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
