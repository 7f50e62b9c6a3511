"""Writes the pages that are generated: the reference of all recipe fields, and the benchmark results."""

import argparse
import dataclasses
import inspect
import json
import re
from pathlib import Path

import jsonargparse

from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import add_recipe_options, shipped_names

INTRODUCTION = f"""# Recipe reference

A recipe is a YAML file with these fields, in these sections. Set a field on the command line by its dotted name, such as
`--tokenizer.codebook_size 1024`, or in the file:

```yaml
tokenizer:
  codebook_size: 1024
```

The defaults below are those of an empty recipe. Each shipped recipe ({', '.join(f'`{name}`' for name in shipped_names())}) sets its own:
`vqmosaic run NAME --help` shows them.
"""


def write_pages(docs: Path) -> None:
    """Write the pages. A page that has not changed is not written, so Sphinx does not rebuild it."""
    for name, text in (("recipe_reference.md", recipe_reference()), ("benchmarks.md", benchmark_results(docs.parent / "benchmarks" / "RESULTS.md"))):
        if not (docs / name).is_file() or (docs / name).read_text() != text:
            (docs / name).write_text(text)


def benchmark_results(path: Path) -> str:
    """The text of RESULTS.md, with links to its pictures that are relative to docs/."""
    return re.sub(r"\]\((\w+\.png)\)", r"](../benchmarks/\1)", path.read_text())


def recipe_reference() -> str:
    """Every field of a recipe with its type, its default and the sentence under it in the dataclass, in Markdown."""
    parser = jsonargparse.ArgumentParser(add_help=False)
    add_recipe_options(parser)
    actions = {action.dest: action for action in parser._actions}
    parts = [INTRODUCTION]
    top = [field.name for field in dataclasses.fields(Recipe) if not dataclasses.is_dataclass(field.type)]
    parts.append("## Top level\n\n" + "\n".join(entry(actions[name], name) for name in top))
    for section in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(section.type):
            fields = [name for name in actions if name.startswith(f"{section.name}.")]
            about = inspect.cleandoc(section.type.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            parts.append(f"## {section.name}\n\n{about}\n\n" + "\n".join(entry(actions[name], name.partition(".")[2]) for name in fields))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def entry(action: argparse.Action, name: str) -> str:
    """One field as a Markdown list item."""
    kind = getattr(action, "_typehint", None) or action.type
    shown = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "").replace("NoneType", "None")
    default = repr(action.default) if isinstance(action.default, str) else json.dumps(action.default)
    return f"- **`{name}`** ({shown}, default `{default}`): {' '.join((action.help or '').split())}"
