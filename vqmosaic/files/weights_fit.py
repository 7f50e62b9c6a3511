"""Compares named weights with those that a network needs, for the error messages of strict loading."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

MAX_LISTED = 8


def describe_mismatches(found: Mapping[str, Any], expected: Mapping[str, Any], optional: Collection[str] = ()) -> str:
    """List the first missing, unexpected and wrongly shaped tensors as text; empty if all fit. `optional` names may be missing on either side."""
    ignored = set(optional)
    problems = [f"missing {name}" for name in expected.keys() - found.keys() - ignored]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys() - ignored]
    problems += [f"{name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
                 for name in expected.keys() & found.keys() if found[name].shape != expected[name].shape]
    return list_problems(sorted(problems))


def list_problems(problems: Sequence[str]) -> str:
    """The first problems as text, and the number of the others; empty if there are none."""
    more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    return "; ".join(problems[:MAX_LISTED]) + more
