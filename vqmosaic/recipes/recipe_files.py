"""Reads recipes from a shipped name, a YAML file or a run folder, with overrides from the command line, and writes them. Loads no torch."""

import argparse
import dataclasses
import functools
import json
import os
import re
import shlex
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

import jsonargparse
import yaml

from vqmosaic import __version__
from vqmosaic.errors import InputError, did_you_mean, nearest_name
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.files.given_paths import check_path
from vqmosaic.files.json_files import is_later, version_hint
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.recipes.conditions import PATH_FIELDS_OF_CONDITIONS
from vqmosaic.recipes.fields_from_data import ASSUMED_IMAGES, BUDGETS, CountImages, Facts, fill_unset_fields, recorded_fields, rules_of
from vqmosaic.recipes.recipe import Recipe, recipe_fields

TYPE_DESCRIPTIONS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "list": "a list in brackets",
                     "dict": "a mapping in braces", "NoneType": "null"}
VERSION_COMMENT = "# written by vqmosaic "
WORKING_DIRECTORY_COMMENT = "# relative paths start from "
PATH_FIELDS = ("data.path", "tokens.tokenizer", "tokenizer_training.init_from", "tokenizer_training.perceptual_weights",
               "tokenizer_training.resume", "prior_training.tokens", "prior_training.resume")
"""Fields that may hold a path. data.path may also be the name of a data set, and resume may be auto or never."""
MAPPING_FIELDS = ("tokenizer.top", "prior.options", "prior_training.drop_rates", "sampling.guidance")
"""Fields that are mappings. Their entries can be set by dotted names too, such as prior.options.hidden_act."""
SHIPPED_RECIPES = Path(__file__).resolve().parents[2] / "configs"

MAX_LISTED_RUNS = 12
"""Largest number of run folders in an error message."""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def shipped_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe, given by its path, a shipped name or a run folder. If there is none, InputError lists the recipes and run folders."""
    check_path("the recipe", name)
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if name in shipped_names():
        return SHIPPED_RECIPES / f"{name}.yaml"
    runs = run_folders_near(path)
    problem = "is a folder without recipe.yaml, so it is not a run folder" if path.is_dir() else "is neither a recipe nor a run folder"
    run_list = f" Run folders: {', '.join(runs[:MAX_LISTED_RUNS])}{' ...' if len(runs) > MAX_LISTED_RUNS else ''}." if runs else ""
    hint = did_you_mean(name, runs if os.sep in name else [*shipped_names(), *runs])
    if path.is_dir():
        hint = f" To train on the images in it: image_folder --data.path {shlex.quote(name)}"
    raise InputError(f"{name!r} {problem}. Shipped recipes: {', '.join(shipped_names())}; or give a YAML file.{run_list}{hint}")


def run_folders_near(path: Path) -> list[str]:
    """The run folders in `path` if it is a folder, else those beside it and in runs/, as a user would type them."""
    folders = {path} if path.is_dir() else {path.parent, Path("runs")}
    return sorted(str(recipe.parent) for folder in folders for recipe in folder.glob("*/recipe.yaml"))


def section_names() -> list[str]:
    """Names of the sections of a recipe."""
    return [entry.name for entry in dataclasses.fields(Recipe) if dataclasses.is_dataclass(entry.type)]


def field_names() -> dict[str, bool]:
    """Dotted names of all fields and sections of a recipe. The value is True for sections and MAPPING_FIELDS."""
    names = {field.name: isinstance(field.value, dict) for field in recipe_fields(Recipe())}
    names.update({entry.name: True for entry in dataclasses.fields(Recipe) if entry.name not in names})
    return names


def add_recipe_options(parser: jsonargparse.ArgumentParser) -> None:
    """Add one option to the parser for each field of a recipe. The docstring under the field is the help text."""
    parser.add_class_arguments(Recipe, as_group=False)


@functools.cache
def recipe_parser() -> jsonargparse.ArgumentParser:
    """The parser of recipe files and overrides. It is made once, because reading the fields' types and docstrings takes longer than parsing."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--recipe_file", action="config")
    add_recipe_options(parser)
    return parser


@explain_permission_errors()
def load_recipe(name: str, overrides: list[str] | None = None, other_options: Sequence[str] = (),
                count_images: CountImages | None = None, redo_stage: str | None = None) -> Recipe:
    """A checked recipe from a shipped name, a YAML file or a run folder, with overrides such as ["--data.path", "photos"].

    A run folder and the recipe.yaml in it give the same recipe. Its run_dir is the current location of the folder.
    Relative paths start from the working directory. Those in the recipe of a run folder start from the same folder as when it was recorded.
    Fields that are not set may be chosen from the data (fields_from_data.py).
    Fields of stages that have started keep their recorded values, except those of `redo_stage` and of the stages after it.

    Args:
        other_options: options of the caller that are not recipe fields, such as --processes. Errors suggest them for misspelled names.
        count_images: returns the size of the data set, given the fields by dotted name.

    Raises InputError for unknown keys (with the nearest valid one), wrong types and invalid combinations.
    """
    path, overrides = find_recipe(name), list(overrides or [])
    check_file_keys(path)
    check_option_names(overrides, other_options)
    parser = recipe_parser()
    try:
        # a run folder may have been moved since its recipe was written; the user's overrides come last and take precedence
        location = [f"--run_dir={path.parent}", *recorded_path_overrides(path)] if is_run_folder_recipe(name, path) else []
        values = parser.parse_args([f"--recipe_file={path}", *location, *overrides])
        values.pop("recipe_file", None)
        check_paths(values)
        fit_to_data(values, path, overrides, count_images, redo_stage)
        sections = parser.instantiate(values)
    except InputError as error:
        raise type(error)(f"{error} (recipe {path})") from None
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise InputError(describe_parse_error(error, path)) from None
    return Recipe(**{entry.name: sections[entry.name] for entry in dataclasses.fields(Recipe)})


def check_paths(values: jsonargparse.Namespace) -> None:
    """Raise InputError for fields whose value cannot be a path."""
    for name in ("run_dir", *PATH_FIELDS):
        if values[name] is not None:
            check_path(name, values[name])


def is_run_folder_recipe(name: str, path: Path) -> bool:
    """Whether the recipe at `path` belongs to a run folder: `name` is the folder, or the recipe.yaml in a folder that contains a run."""
    is_folder = path == Path(name) / "recipe.yaml"
    return is_folder or (path.name == "recipe.yaml" and any((path.parent / marker).exists() for marker in (".lock", "stages")))


def recipe_help(name: str | None = None) -> str:
    """The help for recipe fields: description, type and default. The defaults are the values in the recipe `name`, if it is given."""
    parser = jsonargparse.ArgumentParser(prog="vqmosaic", add_help=False, usage=argparse.SUPPRESS)
    add_recipe_options(parser)
    for action in parser._actions:
        if action.dest in section_names():  # only their fields can be set
            action.help = argparse.SUPPRESS
    if name is not None:
        values = {field.name: field.value for field in recipe_fields(load_recipe(name))}
        given = leaf_names(yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")), field_names())
        chosen = {field for rule in rules_of(values) for field in rule.fields} - set(given)
        parser.set_defaults(values)
        for action in parser._actions:
            if action.dest in chosen:
                action.help = f"{action.help or ''} Chosen by a rule; the default shown is for {ASSUMED_IMAGES:,} images on a CPU."
    return parser.format_help().strip()


def field_help(section: type) -> dict[str, str]:
    """The sentence under each field of a section's dataclass, escaped for argparse."""
    parser = jsonargparse.ArgumentParser(add_help=False)
    parser.add_class_arguments(section)
    return {action.dest: " ".join((action.help or "").split()).replace("%", "%%") for action in parser._actions}


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML. load_recipe reads an equal recipe from it. Comments at the top give the version and the working directory."""
    comments = f"{VERSION_COMMENT}{__version__}\n{WORKING_DIRECTORY_COMMENT}{json.dumps(os.getcwd())}\n"
    content = dataclasses.asdict(recipe)
    for field in recipe_fields(recipe):
        if field.is_omitted:
            section, _, name = field.name.partition(".")
            del content[section][name]
    write_bytes(path, f"{comments}{yaml.safe_dump(content, sort_keys=False)}".encode())


def recorded_path_overrides(path: Path) -> list[str]:
    """Overrides that make relative paths in a run folder's recipe absolute where they do not start from the working directory.

    A path starts from the folder that the recorded run_dir started from. This folder is derived from the run folder's current location, so it is
    correct for a project that was moved or copied. If the path does not exist there, it starts from the recorded working directory. Paths that
    exist in neither folder stay unchanged, because they may be names.
    """
    text = path.read_text(encoding="utf-8")
    content, folders = yaml.safe_load(text), []
    run_dir = Path(os.path.normpath(str(content.get("run_dir") or ".")))
    if run_dir.parts and not run_dir.is_absolute() and ".." not in run_dir.parts:
        count = len(run_dir.parts)
        folders += [Path(*run.parts[:-count]) for run in (path.parent.absolute(), path.parent.resolve()) if run.parts[-count:] == run_dir.parts]
    recorded = next((line.removeprefix(WORKING_DIRECTORY_COMMENT) for line in text.splitlines()[:2]
                     if line.startswith(WORKING_DIRECTORY_COMMENT)), None)
    if recorded is not None:
        folders.append(Path(json.loads(recorded)))
    overrides = []
    for field in PATH_FIELDS:
        section, _, name = field.partition(".")
        value = content.get(section, {}).get(name)
        if not isinstance(value, str) or not value or value in ("auto", "never") or value.startswith("~") or os.path.isabs(value):
            continue
        if found := moved_path(value, folders):
            overrides.append(f"--{field}={found}")
    for name in ("conditions", "derived"):
        value = content.get("data", {}).get(name)
        moved = with_moved_paths(value, folders)
        if moved != value:
            overrides.append(f"--data.{name}={json.dumps(moved)}")
    return overrides


def moved_path(path: str, folders: Sequence[Path]) -> str | None:
    """The absolute path of a relative one in the first of the folders where it exists; None if there is none, or if it is the same path."""
    found = next((full for folder in folders if os.path.exists(full := os.path.normpath(folder / path))), None)
    return found if found != os.path.abspath(path) else None


def with_moved_paths(value: Any, folders: Sequence[Path]) -> Any:
    """The value of data.conditions or data.derived with the paths in its records made absolute, see `recorded_path_overrides`."""
    if isinstance(value, list):
        return [with_moved_paths(record, folders) for record in value]
    if not isinstance(value, dict):
        return value
    paths = {name: value[name] for name in PATH_FIELDS_OF_CONDITIONS if isinstance(value.get(name), str) and not value[name].startswith("~")}
    return value | {name: moved for name, path in paths.items() if not os.path.isabs(path) and (moved := moved_path(path, folders))}


def may_be_same_path(before: Any, now: Any) -> bool:
    """Whether one path is absolute and ends with the other, relative one, as when a run folder is used from another directory.

    This does not compare the contents of the two paths. Stage inputs are compared by their fingerprints elsewhere.
    """
    if not isinstance(before, str) or not isinstance(now, str) or os.path.isabs(before) == os.path.isabs(now):
        return False
    relative, absolute = sorted((before, now), key=os.path.isabs)
    parts = [part for part in Path(os.path.normpath(relative)).parts if part != ".."]
    return not parts or list(Path(os.path.normpath(absolute)).parts[-len(parts):]) == parts


def check_file_keys(path: Path) -> None:
    """Raise InputError for a file that is not valid YAML, or that sets an unknown field or a field twice."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        repeated = repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a recipe: a recipe is a mapping of sections such as data, tokenizer, prior.")
    if repeated:
        raise InputError(f"{path} sets {repeated[0]} more than once, and YAML would keep only the last value. Set each field and section once.")
    known = field_names()
    for section in section_names():
        if section in content and not isinstance(content[section], dict):
            raise InputError(f"{path} sets {section} to {content[section]!r}; it is a section. Give a mapping of its fields, or remove it.")
    version = text.partition("\n")[0].removeprefix(VERSION_COMMENT) if text.startswith(VERSION_COMMENT) else None
    for key in leaf_names(content, known):
        try:
            check_field_name(key, known, f"{path} sets {key}")
        except InputError as error:
            raise InputError(f"{error}{version_hint(version) if is_later(version) else ''}") from None


def repeated_keys(node: yaml.Node | None, prefix: str = "") -> list[str]:
    """Dotted names of the keys that occur more than once in a YAML mapping or in a mapping inside it."""
    if not isinstance(node, yaml.MappingNode):
        return []
    names = [f"{prefix}{key.value}" for key, _ in node.value]
    repeated = [name for name in names if names.count(name) > 1]
    for name, (_, value) in zip(names, node.value, strict=True):
        repeated += repeated_keys(value, f"{name}.")
    return repeated


def check_option_names(options: list[str], other_options: Sequence[str]) -> None:
    """Raise InputError for an override of a field that does not exist."""
    known = field_names()
    expect_value = False
    for option in options:
        if option.startswith("--"):
            name = option[2:].partition("=")[0]
            check_field_name(name, known, option.partition("=")[0], other_options)
            if name in section_names():
                first = next(field for field in known if field.startswith(f"{name}."))
                raise InputError(f"--{name} is a section of a recipe; set its fields, such as --{first}.")
            expect_value = "=" not in option
        elif not expect_value:
            raise InputError(f"{option!r} was not expected here. Set a field with --section.field value, such as --data.path photos.")
        else:
            expect_value = False
    if expect_value:
        raise InputError(f"{options[-1]} needs a value.")


def fit_to_data(values: jsonargparse.Namespace, path: Path, overrides: list[str], count_images: CountImages | None, redo_stage: str | None) -> None:
    """Set the fields that neither the recipe file nor an override sets, with the rules of fields_from_data.py."""
    if not values["fit_to_data"] and values["minutes"] is None:
        return
    options = [option[2:].partition("=")[0] for option in overrides if option.startswith("--")]
    overridden = {mapping_field(name) or name for name in options}
    given = overridden | set(leaf_names(yaml.safe_load(path.read_text(encoding="utf-8")), field_names()))
    recorded = recorded_fields(values["run_dir"], redo_stage)
    if "minutes" in overridden:  # a new budget: divide it again
        given -= BUDGETS.keys() - overridden
        recorded = {name: value for name, value in recorded.items() if name not in BUDGETS}
    fields = cast(MutableMapping[str, Any], values)  # a namespace is indexed by dotted names like a mapping
    facts = Facts(lambda: count_images(fields), has_gpu, given) if count_images else Facts(lambda: None, lambda: False, given)
    fill_unset_fields(fields, facts, recorded)


def has_gpu() -> bool:
    """Whether stages run on a GPU of this machine. Loads torch."""
    from vqmosaic.runs.devices import default_device

    return default_device().type != "cpu"


def check_field_name(name: str, known: dict[str, bool], given_as: str, other_options: Sequence[str] = ()) -> None:
    """Raise InputError, with the nearest valid name, unless `name` is a field, a section or an entry of a mapping."""
    if name in known or mapping_field(name) is not None:
        return
    nearest = nearest_name(name, [*known, *(option.removeprefix("--") for option in other_options)])
    hint = f" Did you mean {nearest}?" if nearest else ""
    section = name.partition(".")[0]
    siblings = [field.partition(".")[2] for field in known if field.startswith(f"{section}.")]
    listing = f" Fields of {section}: {', '.join(siblings)}." if siblings else f" Sections: {', '.join(n for n in known if '.' not in n)}."
    if other_options and not siblings:
        listing += f" Other options: {', '.join(other_options)}."
    raise InputError(f"{given_as}: there is no field {name!r} in a recipe.{hint}{listing}")


def mapping_field(name: str) -> str | None:
    """The field whose entry a dotted name is, such as prior.options for prior.options.hidden_act; None for other names."""
    return next((field for field in MAPPING_FIELDS if name.startswith(f"{field}.")), None)


def leaf_names(content: dict[str, Any], known: dict[str, bool], prefix: str = "") -> list[str]:
    """Dotted names of the leaves of nested mappings. Each of MAPPING_FIELDS is one leaf."""
    names = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        is_section = name not in known or (known[name] and name not in MAPPING_FIELDS)
        names += leaf_names(value, known, f"{name}.") if isinstance(value, dict) and value and is_section else [name]
    return names


def describe_parse_error(error: Exception, path: Path) -> str:
    """Rewrite a parsing library's error as one sentence that names the field, the given value and the allowed types."""
    text = " ".join(str(error).split())
    match = re.search(r'Parser key "([^"]+)"[:.]?\s*(.*)', text)
    if not match:
        return f"{text} (recipe {path})"
    field, reason = match.groups()
    union = re.search(r"Subtypes: \[(.*?)\] Errors.*Given value: (.*)$", reason)
    single = re.search(r"Expected a <class '(\w+)'>\. Got value: (.*)$", reason)
    if found := union or single:
        types, given = re.findall(r"(?<=')\w+(?=')|\b(?:list|dict)(?=\[)", found[1]) if union else [found[1]], found[2]
        is_yaml_word = given in ("False", "True") and "str" in types
        hint = ' YAML reads no, off, yes and on as false and true. Write them in quotes: "no".' if is_yaml_word else ""
        given = {"None": "null", "False": "false", "True": "true"}.get(given, repr(given))
        reason = f"{given} was given; it must be {' or '.join(TYPE_DESCRIPTIONS.get(name, name) for name in types)}.{hint}"
    return f"{field}: {reason} (recipe {path})"
