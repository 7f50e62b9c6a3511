"""Named sizes of priors, in one table."""

from typing import NamedTuple


class PriorSizes(NamedTuple):
    """The sizes of a prior network."""

    layers: int
    width: int
    heads: int


PRESETS = {  # all except tiny are LlamaGen's (Sun et al. 2024)
    "tiny": PriorSizes(6, 256, 4),
    "B": PriorSizes(12, 768, 12),
    "L": PriorSizes(24, 1024, 16),
    "XL": PriorSizes(36, 1280, 20),
    "XXL": PriorSizes(48, 1536, 24),
}


DEFAULT_PRESET = "tiny"


def resolve_sizes(preset: str | None, layers: int | None, width: int | None, heads: int | None) -> PriorSizes:
    """The sizes of a preset, or of the default preset. Sizes that are not None replace those of the preset."""
    given = {"layers": layers, "width": width, "heads": heads}
    return PRESETS[preset or DEFAULT_PRESET]._replace(**{name: value for name, value in given.items() if value is not None})
