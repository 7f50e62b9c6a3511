"""Finds the tokens of a vocabulary's segments among the grids that a reader of token shards returns."""

import dataclasses

import numpy as np

from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import grid_columns
from token_shards.reader import TokenShardReader
from vqmosaic.errors import InputError


class TokenColumns:
    """The columns of a reader's ids that hold the conditions and the drawn grids of a vocabulary, each in its order.

    Shards store a text as a grid of one row.
    """

    def __init__(self, reader: TokenShardReader, vocabulary: Vocabulary):
        """Raises InputError unless the shards have the same tokenizers, grids and classes. They may have further grids, which are not used."""
        check_same_tokens(reader, vocabulary)
        columns = {name: np.arange(part.start, part.stop) for name, part in grid_columns(reader.manifest.grids).items()}
        self.conditions_G = np.concatenate([np.zeros(0, dtype=np.int64), *(columns[condition.name] for condition in vocabulary.conditions)])
        self.drawn_T = np.concatenate([columns[grid.name] for grid in vocabulary.grids])
        self._is_plain = not vocabulary.conditions and list(columns) == [grid.name for grid in vocabulary.grids]

    def split(self, ids_BN):
        """The drawn ids (B, T) and the ids of the conditions (B, G), from all ids of the reader. Accepts numpy arrays and torch tensors."""
        return (ids_BN if self._is_plain else ids_BN[:, self.drawn_T]), ids_BN[:, self.conditions_G]


def check_same_tokens(reader: TokenShardReader, vocabulary: Vocabulary) -> None:
    """Raise InputError unless shards and vocabulary have the same classes, and the vocabulary's grids are among those of the shards."""
    manifest = reader.manifest
    stored, needed = ({grid.name: dataclasses.replace(grid, token_fingerprint=None) for grid in grids}
                      for grids in (manifest.grids, [*(condition.grid for condition in vocabulary.conditions), *vocabulary.grids]))
    pairs: list[tuple[str, object, object]] = []
    for name, fingerprint in vocabulary.token_fingerprints.items():
        what = "token fingerprint" if len(needed) == 1 else f"token fingerprint of grid {name!r}"
        pairs.append((what, manifest.token_fingerprints.get(name, fingerprint), fingerprint))
    if not needed.items() <= stored.items():
        pairs.append(("grids", [*stored.values()], [*needed.values()]))
    pairs.append(("class_names", manifest.class_names, vocabulary.class_names))
    for what, found, expected in pairs:
        if found != expected:
            raise InputError(f"The {what} of the tokens in {reader.folder} is {found}, but the prior's vocabulary has {expected}.")
