"""Chooses the validation part of a data set by a hash of each name, so that adding rows moves no other row to the other part."""

from collections.abc import Hashable, Sequence

import numpy as np

from vqmosaic.seeding import derive_seed

MILLION = 1_000_000


def choose_held_out(names: Sequence[int | str], fraction: float, labels: Sequence[Hashable] | None = None) -> np.ndarray:
    """Which of at least two rows are held out (N,), about `fraction` of them. Neither part is empty.

    Every class keeps at least one training row, unless every class has only one row. If the hash chooses no row, one row is chosen.
    """
    hashes_N = np.array([derive_seed("validation", name) % MILLION for name in names])
    held_out_N = hashes_N < fraction * MILLION
    classes: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels if labels is not None else [None] * len(names)):
        classes.setdefault(label, []).append(index)
    for members in classes.values():
        if held_out_N[members].all():
            held_out_N[members[int(np.argmax(hashes_N[members]))]] = False
    if not held_out_N.any():
        # Do not take the last row of a class, unless every class has only one.
        candidates = [index for members in classes.values() if len(members) > 1 for index in members] or list(range(len(names)))
        held_out_N[min(candidates, key=hashes_N.__getitem__)] = True
    return held_out_N
