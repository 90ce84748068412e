"""Errors raised for user mistakes.

Every message is one line: what is wrong, where, and what to do instead. The command line prints it and exits with
status 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PrunescopeError(Exception):
    """Base class of all errors that prunescope raises on purpose."""


class LanguageError(PrunescopeError, ValueError):
    """A language tag that is not valid BCP-47."""


class TextError(PrunescopeError):
    """Text that is missing, unreadable, too short, or used twice."""


class RecipeError(PrunescopeError, ValueError):
    """An invalid recipe, or one that cannot be applied."""


class MethodError(PrunescopeError, ValueError):
    """A pruning method that is registered wrongly, or reads statistics that it did not declare."""


class ModelError(PrunescopeError):
    """A model that cannot be loaded, or whose architecture is unknown."""


class VariantError(PrunescopeError):
    """A variant or a mask file that does not fit the model, or is damaged."""


class StudyError(PrunescopeError):
    """An invalid study file, or an unusable study folder."""


class DiskError(PrunescopeError):
    """A failed write; no partial file is left behind."""


def shortened(text: object, length: int = 60) -> str:
    r"""Return user input shortened to fit into a one-line message; long text is elided in the middle.

    >>> shortened("wanda"), shortened("a" * 5000 + ".safetensors", 24), shortened("two\nlines")
    ('wanda', 'aaaaaaaaaaaa…safetensors', 'two lines')
    """
    line = "".join(letter if letter.isprintable() else " " for letter in str(text))
    if len(line) <= length:
        return line
    end = length // 2 - 1
    return f"{line[: length - end - 1]}…{line[-end:]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0], 300) if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"known: a, b"``, preceded by a suggestion if a known word is close.

    >>> did_you_mean("wandas", ["magnitude", "wanda"])
    'did you mean "wanda"? known: magnitude, wanda'
    """
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}known: {', '.join(names)}"


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the known ones.

    >>> unknown("method", "wandas", ["magnitude", "wanda"])
    'unknown method "wandas"; did you mean "wanda"? known: magnitude, wanda'
    """
    return f'unknown {kind} "{shortened(word)}"; {did_you_mean(word, known)}'
