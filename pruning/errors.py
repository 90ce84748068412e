"""What can go wrong at the door, in the user's terms.

Every message is one line that says what is wrong, where, and what to do instead; the command line prints it
and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PrunescopeError(Exception):
    """Base of everything that prunescope raises on purpose."""


class LanguageError(PrunescopeError, ValueError):
    """A language tag that is not BCP-47."""


class TextError(PrunescopeError):
    """Text that is missing, unreadable, too short, or used twice."""


class RecipeError(PrunescopeError, ValueError):
    """A recipe that cannot be carried out."""


class MethodError(PrunescopeError, ValueError):
    """A pruning method that is registered wrongly, or reads what it did not ask for."""


class ModelError(PrunescopeError):
    """A model that cannot be loaded, or whose architecture is unknown."""


class VariantError(PrunescopeError):
    """A variant or a mask file that does not fit the model, or is damaged."""


class StudyError(PrunescopeError):
    """A study file or a study folder that cannot be used as it is."""


class DiskError(PrunescopeError):
    """The disk refused a write; nothing half-written stays behind."""


def shortened(text: object, length: int = 60) -> str:
    r"""Return what a user gave, fit for one line of a message: its middle left out if it is long.

    >>> shortened("wanda"), shortened("a" * 5000 + ".safetensors", 24), shortened("two\nlines")
    ('wanda', 'aaaaaaaaaaaa…safetensors', 'two lines')
    """
    line = "".join(letter if letter.isprintable() else " " for letter in str(text))
    if len(line) <= length:
        return line
    end = length // 2 - 1
    return f"{line[: length - end - 1]}…{line[-end:]}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0], 300) if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"known: a, b"``, led by the closest known word when one is close.

    >>> did_you_mean("wandas", ["magnitude", "wanda"])
    'did you mean "wanda"? known: magnitude, wanda'
    """
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f"{hint}known: {', '.join(names)}"


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Return that there is no `kind` called `word`, and what there is.

    >>> unknown("method", "wandas", ["magnitude", "wanda"])
    'unknown method "wandas"; did you mean "wanda"? known: magnitude, wanda'
    """
    return f'unknown {kind} "{shortened(word)}"; {did_you_mean(word, known)}'
