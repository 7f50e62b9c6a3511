"""The recipe section `sampling`. Loads no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.field_types import check_types, checked_numbers

DRAWING_ORDERS = ("raster", "random", "spread", "confidence")
STEP_SCHEDULES = ("cosine", "arccos", "linear")
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine", "power-cosine")


def slider(default: float, minimum: float, maximum: float | None, step: float) -> Any:
    """A sampling setting that the web demo shows as a slider. Without a maximum, it goes up to the codebook size."""
    return field(default=default, metadata={"slider": (minimum, maximum, step)})


@dataclass(kw_only=True)
class SamplingConfig:
    """Settings for sampling tokens from the prior. A pipeline folder stores them as its recommended settings."""

    guidance_scale: float = slider(1.0, 0, 10, 0.1)
    """Classifier-free guidance: logits = null + scale * (conditional - null); 1 turns it off."""
    guidance: dict[str, float] = field(default_factory=dict, metadata={"omit_if_default": True})
    """Guidance scales of given segments by name, such as {low: 2.0}, in place of guidance_scale. The names are class and those of the conditions."""
    guidance_schedule: str = "constant"
    """Scale at token t: 1 + (guidance_scale - 1) * f(p) with p = t / (T - 1). The functions f are constant (1), linear (p), cosine
    ((1 - cos(pi p)) / 2) and power-cosine ((1 - cos(pi p^guidance_power)) / 2; MDTv2, Gao et al. 2023). t counts the tokens in the order of drawing,
    known ones first. If a pass draws several tokens (steps), all of them have the mean of their scales."""
    guidance_power: float = 2.75
    """power-cosine only: exponent of the schedule. Larger values start guidance later."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """[start, stop] as fractions of the T tokens, counted as in guidance_schedule. Guidance is off outside of it (Kynkaanniemi et al. 2024). Tokens
    after stop cost half as much. A pass that draws tokens on both sides of an end has the mean of their scales."""
    temperature: float = slider(1.0, 0, 2, 0.01)
    """Divisor of the logits; 0, or any value below 1e-6, selects the most likely token."""
    top_k: int = slider(0, 0, None, 1)
    """Sample only from the k most likely tokens; 0 turns it off."""
    top_p: float = slider(1.0, 0.01, 1, 0.01)
    """Sample only from the most likely tokens that together reach this probability; 1 turns it off."""
    min_p: float = 0.0
    """Sample only from tokens with at least this fraction of the highest probability (Nguyen et al. 2024); 0 turns it off."""
    order: str = "raster"
    """Order in which the tokens of an image are drawn: raster (row by row), random (another order for each image), spread (each token far from
    those before it) or confidence (first those that the prior is most certain of). All but raster need a prior that was trained with
    prior_training.order random or annealed."""
    steps: int | None = None
    """Number of passes in which the tokens are drawn; null in a recipe, or the number of tokens, draws one token in each. Fewer passes are faster,
    but tokens of the same pass are drawn independently of each other. They need a prior that was trained with prior_training.order random or
    annealed."""
    step_schedule: str = "cosine"
    """With steps: how many tokens each pass draws. cosine (few at first, then more), arccos (about equally many, more at the end) or linear (equally
    many)."""

    def __post_init__(self):
        check_types(self, "sampling")
        check_range("sampling.guidance_scale", self.guidance_scale, at_least=0)
        self.guidance = checked_numbers("sampling.guidance", self.guidance, at_least=0)
        check_name("sampling.guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        check_range("sampling.guidance_power", self.guidance_power, above=0)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise InputError(f"sampling.guidance_interval is {self.guidance_interval}; it must be two numbers [start, stop] with "
                             "0 <= start <= stop <= 1, such as [0.1, 0.8].")
        check_range("sampling.temperature", self.temperature, at_least=0)
        check_range("sampling.top_k", self.top_k, at_least=0)
        check_range("sampling.top_p", self.top_p, above=0, at_most=1)
        check_range("sampling.min_p", self.min_p, at_least=0, at_most=1)
        check_name("sampling.order", self.order, DRAWING_ORDERS)
        if self.steps is not None:
            check_range("sampling.steps", self.steps, at_least=1)
        check_name("sampling.step_schedule", self.step_schedule, STEP_SCHEDULES)

    @property
    def is_guided(self) -> bool:
        """Whether a segment has another guidance scale than 1."""
        return self.guidance_scale != 1 or any(scale != 1 for scale in self.guidance.values())

    def unguided(self) -> "SamplingConfig":
        """The same settings without guidance."""
        return dataclasses.replace(self, guidance_scale=1.0, guidance={})

    def without_class(self) -> "SamplingConfig":
        """The same settings without a guidance scale of the class, for a prior without classes."""
        return dataclasses.replace(self, guidance={name: scale for name, scale in self.guidance.items() if name != "class"})

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON content. It omits `guidance` if it is empty, because earlier versions do not know it."""
        content = dataclasses.asdict(self)
        if not self.guidance:
            del content["guidance"]
        return content
