"""Whether named weights fit a network: what every strict loading says when they do not."""

from collections.abc import Collection, Mapping
from typing import Any

LISTED = 8


def misfits(found: Mapping[str, Any], expected: Mapping[str, Any], optional: Collection[str] = ()) -> str:
    """Missing, unexpected and wrongly shaped tensors in words, the first few of them; empty where all fit. `optional` names may be on either side."""
    spared = set(optional)
    problems = [f"missing {name}" for name in expected.keys() - found.keys() - spared]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys() - spared]
    problems += [f"{name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
                 for name in expected.keys() & found.keys() if found[name].shape != expected[name].shape]
    more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(sorted(problems)[:LISTED]) + more
