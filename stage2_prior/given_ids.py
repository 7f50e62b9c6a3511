"""The ids at the start of a prior's sequence: the class, then the conditions."""

from collections.abc import Mapping

import torch

from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from vqmosaic.errors import InputError

GivenIds = Mapping[str, torch.Tensor] | torch.Tensor
"""The ids of conditions: by name, each (B, n), or joined in the order of the vocabulary (B, G). -1 is the null id of its condition."""


def start_ids(vocabulary: Vocabulary, class_indices_B: torch.Tensor | None, given: GivenIds | None, like_BT: torch.Tensor) -> torch.Tensor:
    """The ids (B, 1 + G) of the vocabulary before the first drawn token. `like_BT` has the number of rows, the dtype and the device.

    Without class indices, the class is the null class. Raises InputError for unknown conditions and wrong shapes.
    """
    if class_indices_B is None:
        class_indices_B = like_BT.new_full((len(like_BT),), NO_CLASS)
    class_ids_B1 = vocabulary.condition_ids(class_indices_B)[:, None]
    given_BG = join_conditions(vocabulary, given, like_BT)
    return torch.cat([class_ids_B1, vocabulary.condition_token_ids(given_BG)], dim=1) if vocabulary.conditions else class_ids_B1


def join_conditions(vocabulary: Vocabulary, given: GivenIds | None, like_BT: torch.Tensor) -> torch.Tensor:
    """The conditions' ids (B, G), with -1 for those that are not given. Raises InputError for unknown names and wrong shapes."""
    if isinstance(given, torch.Tensor):
        if given.shape[1:] != (vocabulary.num_condition_tokens,):
            raise InputError(f"given has the shape {tuple(given.shape)}; the prior has conditions of {vocabulary.num_condition_tokens} tokens per "
                             "image.")
        return given
    given = given or {}
    vocabulary.check_conditions(given)
    parts = [given[condition.name].to(like_BT).flatten(1) if condition.name in given
             else like_BT.new_full((len(like_BT), condition.num_tokens), -1) for condition in vocabulary.conditions]
    return torch.cat(parts, dim=1) if parts else like_BT[:, :0]
