"""The inputs of the page for what a prior is given besides the class: prompts and images. Checks their values."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.demo.request_checks import shown_value
from pipelines.generate import ImageGenerationPipeline
from vqmosaic.errors import InputError

MAX_PROMPT_LENGTH = 1000
"""Characters in a prompt. The guard refuses longer texts."""


@dataclass(frozen=True)
class GivenField:
    """An input for one condition."""

    name: str
    """Name of the condition."""
    is_text: bool
    """Whether it is a prompt. Other conditions are images."""
    label: str
    """The label on the page."""
    info: str = ""
    """A note below the label."""


@dataclass(frozen=True)
class GivenValues:
    """The checked values of the inputs that are filled in."""

    prompts: dict[str, str]
    """Name of the condition -> text."""
    images: dict[str, str]
    """Name of the condition -> path of an upload."""

    @property
    def names(self) -> list[str]:
        """Names of the conditions that are given."""
        return [*self.prompts, *self.images]


def given_fields(pipe: ImageGenerationPipeline) -> list[GivenField]:
    """The inputs for the conditions that can be given to a pipeline, in their order."""
    conditions, fields = pipe.vocabulary.learned_conditions, []
    texts = sum(condition.name in pipe.inputs.texts for condition in conditions)
    for condition in conditions:
        is_text = condition.name in pipe.inputs.texts
        label = "Prompt" if is_text and texts == 1 else condition.name.replace("_", " ").capitalize()
        fields.append(GivenField(condition.name, is_text, label if is_text else f"Given image: {label.lower()}",
                                 "May be empty." if condition.drop_rate else ""))
    return fields


def checked_given(pipe: ImageGenerationPipeline, values: Sequence[object]) -> GivenValues:
    """The prompts and uploads among the values of given_fields. Empty ones are left out.

    The guard has already checked that files are uploads of this page. Raises InputError for values of another kind.
    """
    prompts: dict[str, str] = {}
    images: dict[str, str] = {}
    for field, value in zip(given_fields(pipe), values, strict=True):
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if field.is_text:
            if not isinstance(value, str) or len(value) > MAX_PROMPT_LENGTH:
                raise InputError(f"{field.label} is {shown_value(value)}; it must be a text of at most {MAX_PROMPT_LENGTH} characters.")
            prompts[field.name] = value
        else:
            path = value.get("path") if isinstance(value, dict) else None
            if not isinstance(path, str):
                raise InputError(f"{field.label} is {shown_value(value)}; upload an image.")
            images[field.name] = path
    return GivenValues(prompts, images)
