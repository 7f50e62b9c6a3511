"""Named sizes of priors, in one table."""

from typing import NamedTuple, Protocol


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


class SizeFields(Protocol):
    """The fields of PriorConfig that decide its size."""

    preset: str | None
    layers: int | None
    width: int | None
    heads: int | None


def resolve_sizes(prior: SizeFields) -> PriorSizes:
    """The sizes of the preset, or of the default preset. Sizes that are not None replace those of the preset."""
    given = {"layers": prior.layers, "width": prior.width, "heads": prior.heads}
    return PRESETS[prior.preset or DEFAULT_PRESET]._replace(**{name: value for name, value in given.items() if value is not None})
