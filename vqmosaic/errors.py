"""InputError, and checks whose messages say what was given, what is allowed and which field to change."""

import difflib
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


class InputError(ValueError):
    """The user's input cannot be used. The command line prints the message without a traceback and exits with code 2."""


def printable(name: str) -> str:
    r"""A file or class name on one line, for a message. Control characters and bytes that are not UTF-8 become escapes such as \n or \xe9."""
    if name.isprintable():
        return name
    return "".join(_escaped(character) if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character for character in name)


def listed_names(names: Sequence[str], limit: int = 12) -> str:
    """The first `limit` names, separated by commas, for a message. If there are more, "..." follows."""
    return printable(", ".join(names[:limit])) + (" ..." if len(names) > limit else "")


def _escaped(character: str) -> str:
    code = ord(character)
    # in file names, Python represents each byte that is not UTF-8 by one of these surrogates
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def nearest_name(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is most similar to the given one; None if none is similar."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence with the allowed name that is most similar to the given one, to append to a message; empty if none is similar."""
    nearest = nearest_name(given, allowed)
    return f" Did you mean {nearest!r}?" if nearest else ""


def check_name(field: str, given: Any, allowed: Iterable[str]) -> None:
    """Raise InputError unless `given` is one of `allowed`. The message lists the allowed names and suggests the nearest."""
    allowed = list(allowed)
    if given in allowed:
        return
    raise InputError(f"{field} is {given!r}; allowed: {printable(', '.join(allowed))}.{did_you_mean(str(given), allowed)}")


def check_range(field: str, given: float, *, at_least: float | None = None, above: float | None = None,
                at_most: float | None = None, below: float | None = None) -> None:
    """Raise InputError unless `given` is a finite number within the bounds. Booleans and text are not numbers."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    allowed = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None) or "a finite number"
    if isinstance(given, bool) or not hasattr(given, "__abs__"):
        raise InputError(f"{field} is {given!r}; it must be a number{f', {allowed}' if allowed != 'a finite number' else ''}.")
    fits = (abs(given) < math.inf and (at_least is None or given >= at_least) and (above is None or given > above)
            and (at_most is None or given <= at_most) and (below is None or given < below))
    if not fits:
        raise InputError(f"{field} is {given}; it must be {allowed}.")
