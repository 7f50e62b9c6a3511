"""What one or several priors that sample one after another are given and draw together. Does not import torch.

A prior of all grids of a tokenizer is a chain of one. With two priors, the second is given a grid that the first has drawn:

    top_prior       given class         draws top
    bottom_prior    given class, top    draws bottom
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stage2_prior.segments import CLASS_NAME, Condition, GivenGrid
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid, describe_grids
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.wording import is_or_are


@dataclass(frozen=True)
class ChainVocabulary:
    """The vocabularies of the priors in the order of sampling. Raises InputError if the priors do not belong together."""

    vocabularies: Sequence[Vocabulary]
    names: Sequence[str] = ()
    """What errors call the priors, such as their folders. By default "the prior", or "prior 2 of 2"."""

    def __post_init__(self):
        count = len(self.vocabularies)
        if not count:
            raise InputError("there is no prior; give at least one.")
        if not self.names:
            object.__setattr__(self, "names", ["the prior"] if count == 1 else [f"prior {number + 1} of {count}" for number in range(count)])
        first, drawn = self.vocabularies[0], dict[str, tuple[Grid, str]]()
        for name, vocabulary in zip(self.names, self.vocabularies, strict=True):
            for what in ("token_fingerprint", "class_names"):
                if getattr(vocabulary, what) != getattr(first, what):
                    raise InputError(f"{self.names[0]} and {name} do not belong together: their {what} differ. Both must be trained on the tokens of "
                                     "the same run.")
            for condition in vocabulary.conditions:
                if condition.name in drawn and condition.grid != drawn[condition.name][0]:
                    raise InputError(f"{name} is given the grid {describe_grids([condition.grid])}, but {drawn[condition.name][1]} draws "
                                     f"{describe_grids([drawn[condition.name][0]])} under this name ({condition.name}).")
            for grid in vocabulary.grids:
                if grid.name in drawn:
                    raise InputError(f"{drawn[grid.name][1]} and {name} both draw the grid {grid.name!r}. Each grid must be drawn by one prior.")
                drawn[grid.name] = grid, name
        for name, vocabulary in zip(self.names, self.vocabularies, strict=True):
            own = {condition.name for condition in vocabulary.conditions}
            if late := [grid.name for grid in self.grids if grid.name in own and grid.name in (external.name for external in self.conditions)]:
                raise InputError(f"{name} is given the grid {late[0]!r}, which {drawn[late[0]][1]} draws later. Give the priors in the order of "
                                 f"sampling: {drawn[late[0]][1]} first.")

    @cached_property
    def grids(self) -> list[Grid]:
        """The drawn grids of all priors, in the order of sampling."""
        return [grid for vocabulary in self.vocabularies for grid in vocabulary.grids]

    @cached_property
    def conditions(self) -> list[Condition]:
        """The grids and texts that must come from outside: no earlier prior draws them. If several priors are given one, with the smallest drop rate.

        Raises InputError if two priors have different conditions of the same name.
        """
        found: dict[str, Condition] = {}
        drawn: set[str] = set()
        for name, vocabulary in zip(self.names, self.vocabularies, strict=True):
            for condition in vocabulary.conditions:
                if condition.name in drawn:
                    continue
                earlier = found.setdefault(condition.name, condition)
                if dataclasses.replace(earlier, drop_rate=0.0) != dataclasses.replace(condition, drop_rate=0.0):
                    raise InputError(f"{name} and an earlier prior have different conditions named {condition.name!r}. Train both on the same "
                                     "tokens.")
                if condition.drop_rate < earlier.drop_rate:
                    found[condition.name] = condition
            drawn |= {grid.name for grid in vocabulary.grids}
        return [*found.values()]

    @property
    def token_fingerprint(self) -> str:
        """Fingerprint of the tokenizer that produces the ids of the drawn grids."""
        return self.vocabularies[0].token_fingerprint

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class, or None without classes."""
        return self.vocabularies[0].class_names

    @property
    def learned_class_names(self) -> list[str] | None:
        """Name of each class, or None if no prior has seen a class in training, so that a class would have no effect."""
        return None if all(vocabulary.class_drop == 1 for vocabulary in self.vocabularies) else self.class_names

    @property
    def learned_conditions(self) -> list[Condition]:
        """The conditions that a prior has seen in training: without those of drop rate 1, which would have no effect."""
        return [condition for condition in self.conditions if condition.drop_rate < 1]

    @property
    def num_tokens(self) -> int:
        """Drawn tokens per image over all priors."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def most_codes(self) -> int:
        """Number of codes of the largest grid."""
        return max(grid.codebook_size for grid in self.grids)

    @property
    def most_steps(self) -> int:
        """The largest number of passes of one prior: the number of tokens of the one that draws most."""
        return max(vocabulary.num_tokens for vocabulary in self.vocabularies)

    @property
    def given_names(self) -> list[str]:
        """Names of all given segments for which there can be a guidance scale, without repetitions."""
        return list(dict.fromkeys(segment.name for vocabulary in self.vocabularies for segment in vocabulary.learned_segments))

    @property
    def token_fingerprints(self) -> dict[str, str]:
        """Name of a condition -> fingerprint of the tokenizer that makes its ids; texts of an unknown tokenizer are left out."""
        known = {name: fingerprint for vocabulary in self.vocabularies for name, fingerprint in vocabulary.token_fingerprints.items()}
        return {condition.name: known[condition.name] for condition in self.conditions if condition.name in known}

    def why_unguided(self) -> str | None:
        """Why no prior supports guidance, to follow "the prior". None if one does."""
        reasons = [vocabulary.why_unguided() for vocabulary in self.vocabularies]
        return None if None in reasons else reasons[0]

    def check_guided_are_given(self, guidance: Iterable[str], has_class: bool, given: Iterable[str]) -> None:
        """Raise InputError if a request sets the guidance scale of a segment that it does not give. Grids that an earlier prior draws are given."""
        known = {*given, *(grid.name for grid in self.grids), *([CLASS_NAME] if has_class else [])}
        if unused := [name for name in guidance if name in self.given_names and name not in known]:
            raise InputError(f"guidance has {', '.join(unused)}, which {is_or_are(len(unused))} not given, so guidance has no effect there. Give "
                             f"{', '.join(unused)}, or leave it out of guidance.")

    def why_not_sampled(self, has_class: bool, given: Collection[str]) -> str | None:
        """Why the priors cannot sample with these conditions, with or without a class, as a sentence. None if they can.

        A prior can do without a segment if it was dropped in some training samples, independently or together with all others.
        """
        drawn: set[str] = set()
        for vocabulary in self.vocabularies:
            has_any = has_class or any(condition.name in given or condition.name in drawn for condition in vocabulary.conditions)
            if has_any or not vocabulary.is_trained(0):
                for condition in vocabulary.conditions:
                    if condition.name not in given and condition.name not in drawn and condition.drop_rate == 0:
                        return (f"{condition.name} is not given, but the prior was trained with drop rate 0 of this segment, so it cannot sample "
                                "without it.")
                if vocabulary.class_names and not has_class and vocabulary.class_drop == 0:
                    without = "label drop" if not vocabulary.conditions else "a drop rate of the class"
                    return f"No class is given, but the prior was trained without {without}, so it cannot sample without one."
            drawn |= {grid.name for grid in vocabulary.grids}
        return None

    def settings_of(self, number: int, sampling: SamplingConfig) -> SamplingConfig:
        """The sampling settings of one of the priors: guidance only of its own segments and if it supports it, and at most one pass per token."""
        vocabulary, changes = self.vocabularies[number], dict[str, Any]()
        own = [segment.name for segment in vocabulary.learned_segments]
        if len(self.vocabularies) > 1:
            changes["guidance"] = {name: scale for name, scale in sampling.guidance.items() if name in own}
            if vocabulary.why_unguided():
                changes["guidance_scale"] = 1.0
            if sampling.steps is not None:
                changes["steps"] = min(sampling.steps, vocabulary.num_tokens)
        return dataclasses.replace(sampling, **changes) if changes else sampling


def describe_conditions(conditions: Sequence[Condition]) -> str:
    """The conditions as text for messages, such as "low (a grid of 4 x 4 of 64 codes), text (48 places)"."""
    return ", ".join(f"{condition.name} ({describe_grids([condition.grid])})" if isinstance(condition, GivenGrid)
                     else f"{condition.name} (a text of {condition.num_tokens} places)" for condition in conditions)


def takes(vocabulary: ChainVocabulary) -> list[str]:
    """Names of what can be given: the class, if there are classes, and the conditions."""
    return [*([CLASS_NAME] if vocabulary.class_names else []), *(condition.name for condition in vocabulary.conditions)]
