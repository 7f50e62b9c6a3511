"""Lists of views in a recipe: parsing from files and the command line, saving, and validation."""

import pytest

from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_files import load_recipe, save_recipe
from vqmosaic.recipes.recipe_sections import TokensConfig

DEFAULT_VIEW = {"crop_scale": 1.0, "position": "center", "flip": False, "shift": [0, 0]}


def test_lists_are_parsed_and_saved(tmp_path):
    (tmp_path / "mine.yaml").write_text("tokens:\n  views:\n  - {}\n  - flip: true\n    crop_scale: 0.5\n    position: top-right\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.tokens.views == [DEFAULT_VIEW, {"crop_scale": 0.5, "position": "top-right", "flip": True, "shift": [0, 0]}]
    assert recipe.tokens.mirrors
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe
    given = load_recipe("digits", ["--tokens.views=[{shift: [1, 0]}, {shift: [0, -1], crop_scale: 1}]"]).tokens
    assert given.views == [DEFAULT_VIEW | {"shift": [1, 0]}, DEFAULT_VIEW | {"shift": [0, -1]}] and not given.mirrors
    assert load_recipe(str(tmp_path / "saved.yaml"), ["--tokens.views", "ten-crop"]).tokens.views == "ten-crop"


@pytest.mark.parametrize(("views", "message"), [
    ([], "tokens.views is an empty list"), (["flip"], r"tokens.views\[0\] is 'flip'; it must be a record"),
    ([{}, {"flp": True}], r"tokens.views\[1\]: a field is 'flp'; allowed: crop_scale, position, flip, shift. Did you mean 'flip'"),
    ([{}, {"flip": "yes"}], r"tokens.views\[1\].flip is 'yes'; it must be true or false"),
    ([{"crop_scale": 0}], r"tokens.views\[0\].crop_scale is 0; it must be above 0"), ([{"crop_scale": True}], r"\[0\].crop_scale is True"),
    ([{"position": "middle"}], r"tokens.views\[0\].position is 'middle'; allowed: center"),
    ([{"shift": 1}], r"tokens.views\[0\].shift is 1; it must be two integers"), ([{"shift": [0.5, 0]}], r"shift is \[0.5, 0\]"),
    ([{"flip": True}, {}, {"flip": True, "shift": [0, 0]}], r"tokens.views\[2\] is the same view as tokens.views\[0\]"),
    ("ten-crops", "a list of records.*'ten-crops'.*Did you mean 'ten-crop'"),
])
def test_invalid_lists_are_rejected(views, message):
    with pytest.raises(InputError, match=message):
        TokensConfig(views=views)


@pytest.mark.parametrize(("override", "message"), [
    ("--tokens.views=[{}, {shift: [16, 0]}]", r"tokens.views\[1\].shift: an entry is 16; it must be above -16"),
    ("--tokens.views=[{flip: true}]", "tokens.views mirrors images"), ("--tokens.views=ten-crop", "tokens.views mirrors images"),
    ("--tokens.view_crop_scale=1.5", "tokens.view_crop_scale is 1.5")])
def test_views_that_conflict_with_the_recipe_are_rejected(override, message):
    with pytest.raises(InputError, match=message):
        load_recipe("digits", ["--data.image_size=32", override])
