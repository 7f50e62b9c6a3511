"""Errors that tell a user what was given, what is allowed and which field to change."""

import difflib
import math
import unicodedata
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints its words without a traceback and exits with 2."""


def printable(name: str) -> str:
    r"""A file or class name on one line, for a message: control characters, and bytes that are not UTF-8, as escapes such as \n or \xe9."""
    if name.isprintable():
        return name
    return "".join(_escaped(character) if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character for character in name)


def listed_names(names: Sequence[str], most: int = 12) -> str:
    """The first `most` names, separated by commas, for a message. If there are more, "..." follows."""
    return printable(", ".join(names[:most])) + (" ..." if len(names) > most else "")


def _escaped(character: str) -> str:
    code = ord(character)
    # the system's file names have each byte that is not UTF-8 as one of these surrogates
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def nearest_name(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like the given one, or None when nothing is close."""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def check_name(field: str, given: str, allowed: Iterable[str]) -> None:
    """Raise InputError unless `given` is one of `allowed`; the message lists them and offers the nearest."""
    allowed = list(allowed)
    if given in allowed:
        return
    nearest = nearest_name(str(given), allowed)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    raise InputError(f"{field} is {given!r}; allowed: {', '.join(allowed)}.{hint}")


def check_range(field: str, given: float, *, at_least: float | None = None, above: float | None = None,
                at_most: float | None = None, below: float | None = None) -> None:
    """Raise InputError unless the given value is a finite number within the bounds. Booleans and text are not numbers."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None) or "a finite number"
    if isinstance(given, bool) or not hasattr(given, "__abs__"):
        raise InputError(f"{field} is {given!r}; it must be a number{f', {words}' if words != 'a finite number' else ''}.")
    fits = (abs(given) < math.inf and (at_least is None or given >= at_least) and (above is None or given > above)
            and (at_most is None or given <= at_most) and (below is None or given < below))
    if not fits:
        raise InputError(f"{field} is {given}; it must be {words}.")
