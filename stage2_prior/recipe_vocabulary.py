"""The vocabulary of a new prior: which grids and texts of the token shards it is given, and which grids it draws. Does not import torch."""

from collections.abc import Mapping, Sequence

from stage2_prior.segments import CLASS_NAME, Condition, GivenGrid, GivenText
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import TokenShardManifest
from vqmosaic.errors import InputError, did_you_mean
from vqmosaic.recipes.recipe import Recipe

TEXT_KIND = "caption"
"""The kind of a condition in the manifest whose ids are those of a text. All other kinds are grids."""


def vocabulary_of_recipe(recipe: Recipe, manifest: TokenShardManifest) -> Vocabulary:
    """The vocabulary of the prior that a recipe trains on the token shards of a manifest. It checks the recipe's names of segments.

    By default, the conditions of the shards are given, and all other grids are drawn, each in the order of the shards. prior_training.given and
    prior_training.drawn select others.
    """
    training, texts = recipe.prior_training, text_names(manifest)
    names, conditions = [grid.name for grid in manifest.grids], [record["name"] for record in manifest.conditions]
    given, drawn = training.given, training.drawn
    check_names("prior_training.given", given or (), names)
    check_names("prior_training.drawn", drawn or (), [name for name in names if name not in texts])
    if given is None:
        given = [name for name in conditions if name not in (drawn or ())]
    if drawn is None:
        drawn = [name for name in names if name not in given and name not in conditions]
    if both := [name for name in drawn if name in given]:
        raise InputError(f"prior_training.drawn has {', '.join(both)}, which prior_training.given has too; a grid is either given or drawn.")
    if not drawn:
        raise InputError(f"prior_training.given has all grids of the tokens ({', '.join(names)}), so the prior has nothing to draw. Remove one.")
    rates = drop_rates(recipe, [CLASS_NAME, *given])
    check_names("prior_training.drop_rates", training.drop_rates, [CLASS_NAME, *(name for name in names if name in given)])
    parts: list[Condition] = [GivenText.from_grid(grid, rates.get(grid.name, 0.0)) if grid.name in texts
                              else GivenGrid(grid=grid, drop_rate=rates.get(grid.name, 0.0)) for grid in manifest.grids if grid.name in given]
    can_drop = bool(manifest.class_names or parts)
    return Vocabulary(grids=[grid for grid in manifest.grids if grid.name in drawn], class_names=manifest.class_names,
                      token_fingerprint=manifest.token_fingerprint, label_drop=training.label_drop if can_drop else 0.0,
                      class_drop=rates.get(CLASS_NAME, 0.0) if manifest.class_names else 0.0, conditions=parts)


def text_names(manifest: TokenShardManifest) -> list[str]:
    """Names of the texts in the shards of a manifest."""
    return [record["name"] for record in manifest.conditions if record["kind"] == TEXT_KIND]


def drop_rates(recipe: Recipe, names: Sequence[str]) -> dict[str, float]:
    """Segment name -> drop rate, of data.conditions and prior_training.drop_rates, which takes precedence. Rates of 0 are left out.

    If prior_training.label_drop is 1, training drops all given segments, whose `names` are given, from every sample: each has the rate 1.
    """
    if recipe.prior_training.label_drop == 1:
        return dict.fromkeys(names, 1.0)
    rates = {condition.name: condition.drop_rate for condition in recipe.data.given_conditions} | recipe.prior_training.drop_rates
    return {name: rate for name, rate in rates.items() if rate}


def describe_given(vocabulary: Vocabulary) -> str:
    """The given segments and the drawn grids as text for the plan, such as "low (4 x 4 of 64 codes, dropped in 10 %)"."""
    def described(condition: Condition) -> str:
        size = (f"{condition.num_tokens} places of {condition.num_ids} ids" if isinstance(condition, GivenText)
                else f"{condition.grid.height} x {condition.grid.width}{f' x {condition.grid.depth}' if condition.grid.depth > 1 else ''} of "
                     f"{condition.num_ids} codes")
        return f"{condition.name} ({size}{f', dropped in {condition.drop_rate:.0%}' if condition.drop_rate else ''})"

    return ", ".join(map(described, vocabulary.conditions))


def check_names(field: str, given: Sequence[str] | Mapping[str, float], allowed: Sequence[str]) -> None:
    """Raise InputError for names that are not among the allowed ones."""
    if unknown := [name for name in given if name not in allowed]:
        raise InputError(f"{field} has {', '.join(unknown)}; allowed for these tokens: {', '.join(allowed) or 'none'}."
                         f"{did_you_mean(unknown[0], allowed)}")
