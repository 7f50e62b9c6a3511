"""The argument parser of the commands, and the options that several commands have. Does not load torch."""

import argparse
import dataclasses
import re
from typing import Any, NoReturn

from vqmosaic.errors import InputError, nearest_name
from vqmosaic.files.given_paths import given_path
from vqmosaic.recipes.field_types import required_type
from vqmosaic.recipes.recipe_files import field_help
from vqmosaic.recipes.recipe_sections import SamplingConfig


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of exiting, and suggests the nearest option for an unknown one."""

    def __init__(self, command: str, description: str | None = None, **settings):
        super().__init__(prog=f"vqmosaic {command}", description=description, allow_abbrev=False, **settings)

    @property
    def option_names(self) -> list[str]:
        """The long options, such as --redo."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        unknown = re.match(r"unrecognized arguments: (-\S+)", message)
        nearest = nearest_name(unknown[1].partition("=")[0], self.option_names) if unknown else None
        hint = f" Did you mean {nearest}?" if nearest else ""
        raise InputError(f"{message}.{hint} Options of {self.prog}: {', '.join(self.option_names)}.")


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument of the commands that use a pipeline."""
    parser.add_argument("pipeline", type=given_path, help="a run folder or a pipeline folder")


def add_out_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add the option --out of a command that needs it. `more` is added to its help."""
    parser.add_argument("--out", required=True, type=given_path, help=f"output folder{more}")


def prompt_text(text: str) -> str:
    """The argument --prompt. For use as an argparse type."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a text, or leave --prompt out to generate without one")
    return text


def add_prompt_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --prompt."""
    parser.add_argument("--prompt", type=prompt_text, metavar="TEXT", help="the text, for a prior that is given captions")


def add_seed_option(parser: argparse.ArgumentParser, results: str = "images") -> None:
    """Add the option --seed. `results` is what the command writes."""
    parser.add_argument("--seed", type=int, default=0, help=f"the same seed gives the same {results}; default: 0")


def add_sampling_options(parser: argparse.ArgumentParser, note: str) -> None:
    """Add an option for each field of SamplingConfig to a parser. The help of each one ends with `note` in parentheses."""
    helps = field_help(SamplingConfig)
    for field in dataclasses.fields(SamplingConfig):
        if field.type == list[float]:
            kind: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("START", "STOP")}
        elif field.type == dict[str, float]:
            kind = {"type": scales_from_text, "metavar": "NAME=SCALE,..."}
        else:
            kind = {"type": required_type(field.type)}
        parser.add_argument(f"--{field.name}", help=f"{helps[field.name]} ({note})", **kind)


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings given on the command line."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingConfig)}
    return {name: value for name, value in values.items() if value is not None}


def scales_from_text(text: str) -> dict[str, float]:
    """The guidance scales in a text such as low=2,class=1.5. Raises argparse's error for any other text."""
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {name.strip(): float(scale) for name, _, scale in pairs if name.strip() or scale}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given; give a scale for each segment, such as low=2,class=1.5") from None


def size_from_text(text: str) -> tuple[int, int]:
    """Height and width in a text such as 64x96, or 64 for a square. Raises argparse's error for any other text."""
    match = re.fullmatch(r"(\d+)(?:[x,](\d+))?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} was given; give height and width in pixels, such as 64x96, or one number for squares")
    return int(match[1]), int(match[2] or match[1])


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --device and --dtype to a parser."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the best available")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of prior and decoder")
