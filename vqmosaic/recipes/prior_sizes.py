"""Named sizes of priors, in one table."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vqmosaic.recipes.recipe_sections import PriorConfig


class PriorSizes(NamedTuple):
    """What decides how large a prior is."""

    layers: int
    width: int
    heads: int


PRESETS = {  # those above tiny are LlamaGen's (Sun et al. 2024)
    "tiny": PriorSizes(6, 256, 4),
    "B": PriorSizes(12, 768, 12),
    "L": PriorSizes(24, 1024, 16),
    "XL": PriorSizes(36, 1280, 20),
    "XXL": PriorSizes(48, 1536, 24),
}


DEFAULT_PRESET = "tiny"


def sizes_of(prior: "PriorConfig") -> PriorSizes:
    """The sizes that a recipe gives, and for the others those of its preset, or of the default one."""
    given = {"layers": prior.layers, "width": prior.width, "heads": prior.heads}
    return PRESETS[prior.preset or DEFAULT_PRESET]._replace(**{name: value for name, value in given.items() if value is not None})
