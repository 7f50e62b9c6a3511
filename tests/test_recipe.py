"""Recipes: defaults, YAML files, overrides, error messages, and that every field is documented and used."""

import ast
import dataclasses
import math
import re

import pytest

from tests.tiny import ROOT, fields_of
from vqmosaic.errors import InputError, check_name, check_range, nearest_name
from vqmosaic.recipes.recipe import Recipe, check_batch_split, recipe_fields
from vqmosaic.recipes.recipe_files import PATH_FIELDS, load_recipe, may_be_same_path, recipe_help, save_recipe, section_names, shipped_names
from vqmosaic.recipes.recipe_sections import DataConfig, PriorConfig, PriorTrainingConfig, SamplingConfig
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig, TokenizerTrainingConfig

PACKAGES = ("vqmosaic", "token_shards", "stage1_tokenizer", "stage2_prior", "pipelines")
RECIPE_FILES = {"recipe.py", "data_section.py", "recipe_sections.py", "sampling_section.py", "tokenizer_sections.py", "recipe_files.py"}
SECTION_VARIABLES = {
    "": {"recipe"}, "data": {"data", "DataConfig"}, "tokenizer": {"tokenizer", "config"},
    "tokenizer_training": {"tokenizer_training", "training"}, "adversarial": {"adversarial", "config"},
    "tokens": {"tokens"}, "prior": {"prior"}, "prior_training": {"prior_training", "training"}, "sampling": {"sampling"},
}
"""Section -> names of the variables that hold it; `recipe.data.path` and `data.path` both count as reading data.path."""


FIXED_FIELDS = [  # values that the cases below assume, whatever the shipped recipe digits sets
    "--data.image_size=16", "--tokenizer.channel_multipliers=[1,2,2]", "--tokenizer.codebook_size=128", "--tokenizer_training.batch_size=64",
    "--prior.width=128", "--prior.heads=4", "--prior_training.batch_size=64", "--tokens.views=shifts", "--sampling.guidance_scale=1.5"]


def error_message(*overrides: str, recipe: str = "digits") -> str:
    """The message of the InputError that a recipe with these overrides raises."""
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, [*(FIXED_FIELDS if recipe == "digits" else []), *overrides])
    return str(caught.value)


# --- files and overrides -----------------------------------------------------------------------------------------------------


def test_default_recipe_is_valid():
    recipe = Recipe()
    assert recipe.data == DataConfig() and recipe.tokenizer == TokenizerConfig() and recipe.sampling == SamplingConfig()
    assert recipe.num_tokens == 64 and recipe.tokenizer.downsampling == 4
    assert Recipe() == recipe and Recipe().tokenizer.channel_multipliers is not recipe.tokenizer.channel_multipliers


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name).run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", shipped_names())
def test_learning_rates_of_shipped_recipes_scale_with_batch_size(name):
    for section in ("tokenizer_training", "prior_training"):
        shipped = getattr(load_recipe(name), section)
        assert shipped.learning_rate_factor == 1
        smaller = getattr(load_recipe(name, [f"--{section}.batch_size={shipped.batch_size // 4}"]), section)
        assert smaller.learning_rate_factor == 0.5


def test_names_of_shipped_recipes():
    assert shipped_names() == ["cifar10", "cifar10_any_order", "cifar10_captions", "cifar10_edges", "cifar10_superres", "cifar10_vqgan",
                               "cifar10_vqvae2", "digits", "digits_captions", "digits_edges", "digits_superres", "digits_vqvae2", "image_folder",
                               "imagenet256", "imagenet256_convnext", "mnist"]


@pytest.mark.parametrize("overrides", [
    ["--tokenizer.codebook_size", "64", "--seed", "5"],
    ["--seed=5", "--tokenizer.codebook_size=64"],
])
def test_overrides_change_only_the_given_fields(overrides, tmp_path):
    recipe = load_recipe("digits", overrides)
    before = load_recipe("digits")
    assert (before.tokenizer.codebook_size, before.seed) != (64, 5)
    assert (recipe.tokenizer.codebook_size, recipe.seed) == (64, 5)
    changed = {name for name, value in fields_of(recipe).items() if fields_of(before)[name] != value}
    assert changed == {"tokenizer.codebook_size", "seed"}


def test_last_override_of_a_field_wins():
    assert load_recipe("digits", ["--seed=1", "--seed", "2"]).seed == 2


def test_recipes_loaded_one_after_another_share_nothing():
    """All recipes are parsed by one parser. Neither the overrides nor changed lists and mappings of one may reach the next."""
    def values(recipe: Recipe) -> list[object]:
        return [field.value for field in recipe_fields(recipe) if isinstance(field.value, list | dict)]

    before = load_recipe("digits")
    changed = load_recipe("digits", ["--prior.options.rms_norm_eps=0.1", "--tokenizer.channel_multipliers=[1,1,2]", "--seed=5"])
    assert changed.prior.options == {"rms_norm_eps": 0.1} and changed.seed == 5
    for value in values(changed):
        value.clear()
    assert load_recipe("digits") == before and values(before)


def test_overrides_of_every_type(tmp_path):
    recipe = load_recipe("digits", [
        "--data.use_labels", "false", "--tokenizer.channel_multipliers", "[1, 2]", "--tokenizer_training.max_steps", "null",
        "--tokenizer_training.max_minutes=1.5", "--tokenizer_training.learning_rate", "1e-4", "--prior.options.rope_theta", "100",
        "--tokenizer_training.mixed_precision", "no", "--run_dir", "runs/a b", "--sampling.guidance_scale=1"])
    assert recipe.data.use_labels is False and recipe.tokenizer.channel_multipliers == [1, 2]
    assert recipe.tokenizer_training.max_steps is None and recipe.tokenizer_training.max_minutes == 1.5
    assert recipe.tokenizer_training.learning_rate == 1e-4 and recipe.prior.options == {"rope_theta": 100}
    assert recipe.tokenizer_training.mixed_precision == "no" and recipe.run_dir == "runs/a b"


@pytest.mark.parametrize("name", shipped_names())
def test_yaml_round_trip(name, tmp_path):
    overrides = ["--run_dir", str(tmp_path), "--tokenizer_training.mixed_precision", "no", "--prior.options.rope_theta", "100"]
    recipe = load_recipe(name, overrides)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    assert load_recipe(str(tmp_path)) == recipe, "a run folder can be given in place of its recipe"
    assert load_recipe(str(tmp_path), ["--seed=9"]) == dataclasses.replace(recipe, seed=9)


# --- invalid recipes ---------------------------------------------------------------------------------------------------------


def test_unknown_recipe_error_suggests_the_nearest_name():
    message = error_message(recipe="digts")
    assert "'digts'" in message and "'digits'" in message and "imagenet256" in message


def test_unknown_field_error_suggests_the_nearest_field():
    message = error_message("--tokenizer.codebok_size", "64")
    assert "tokenizer.codebok_size" in message and "Did you mean tokenizer.codebook_size?" in message and "code_dim" in message
    assert "Did you mean data.path?" in error_message("--data.pth=x")
    assert "Sections: run_dir, seed, minutes, fit_to_data, data" in error_message("--frobnicate", "1")


@pytest.mark.parametrize(("text", "expected"), [
    ("data: {sorce: digits}", "Did you mean data.source?"),
    ("dta: {source: digits}", "Did you mean data.source?"),
    ("sed: 3", "Did you mean seed?"),
    ("tokenizer_training: {max_step: 3}", "Did you mean tokenizer_training.max_steps?"),
    ("data: 3", "data to 3; it is a section"),
    ("data:", "data to None; it is a section"),
    ("[data]", "does not contain a recipe"),
    ("", "does not contain a recipe"),
    ("data: {source: digits", "not valid YAML"),
    ("data: {source: digits}\ndata: {image_size: 16}", "sets data more than once"),
    ("data: {image_size: 8, source: digits, image_size: 16}", "sets data.image_size more than once"),
    ("data: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ("tokenizer_training: {mixed_precision: no}", 'Write them in quotes: "no"'),
])
def test_invalid_recipe_file_is_rejected(text, expected, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = error_message(recipe=str(path))
    assert str(path) in message and expected in message


def test_binary_recipe_file_is_rejected(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\x00\x81")
    assert "not valid YAML" in error_message(recipe=str(path))


@pytest.mark.parametrize(("field", "given", "allowed"), [
    ("tokenizer.codebook_size", "many", "an integer"),
    ("tokenizer.codebook_size", "3.5", "an integer"),
    ("tokenizer.codebook_size", "null", "an integer"),
    ("data.flip", "maybe", "true or false"),
    ("tokenizer_training.learning_rate", "fast", "a number"),
    ("tokenizer_training.max_minutes", "soon", "a number or null"),
    ("tokenizer.channel_multipliers", "3", "a list in brackets"),
    ("tokenizer.channel_multipliers", "[1,two]", "an integer"),
    ("prior.options", "3", "a mapping"),
    ("data.derived", "5", "a mapping in braces or null"),
])
def test_wrong_type_error_names_field_value_and_allowed_type(field, given, allowed):
    message = error_message(f"--{field}", given)
    assert field in message and given.strip("[]").split(",")[-1] in message and allowed in message and "class" not in message


def test_invalid_command_line_arguments_are_rejected():
    assert "'extra' was not expected" in error_message("extra")
    assert "needs a value" in error_message("--seed")
    assert "--data is a section" in error_message("--data", "other.yaml")


@pytest.mark.parametrize(("overrides", "expected"), [
    # two fields that do not fit: the message names both values and a fix
    (["--data.image_size=18"], ["data.image_size is 18", "3 levels", "multiple of 4", "set data.image_size to 16"]),
    (["--tokenizer.channel_multipliers=[1,1,1,1,1]"], ["data.image_size is 16", "5 levels", "multiple of 16", "set data.image_size to 32"]),
    (["--data.flip=true"], ["data.flip", "'digits'"]),
    (["--tokens.views=flip"], ["tokens.views", "'digits'"]),
    (["--tokens.views=flip+shifts"], ["tokens.views", "'digits'"]),
    (["--prior_training.label_drop=0"], ["sampling.guidance_scale is 1.5", "prior_training.label_drop is 0", "sampling.guidance_scale to 1"]),
    (["--data.use_labels=false"], ["sampling.guidance_scale is 1.5", "data.use_labels is false"]),
    (["--sampling.top_k=129"], ["sampling.top_k is 129", "tokenizer.codebook_size is 128"]),
    (["--tokenizer_training.accumulation_steps=3"], ["tokenizer_training.batch_size is 64", "tokenizer_training.accumulation_steps is 3"]),
    (["--prior_training.accumulation_steps=3"], ["prior_training.batch_size is 64", "prior_training.accumulation_steps is 3"]),
    (["--prior.heads=3"], ["prior.width is 128", "prior.heads is 3"]),
    (["--tokens.view_shift=8"], ["tokens.view_shift is 8", "below 8"]),
    (["--data.shift=8"], ["data.shift is 8", "below 8"]),
    (["--data.path=photos"], ["data.path is 'photos'", "data.source is 'digits'"]),
    (["--data.source=folder"], ["data.path is not given", "data.source is 'folder'"]),
    (["--tokenizer.attention_levels=[3]"], ["tokenizer.attention_levels", "3 levels"]),
    # single fields
    (["--tokenizer.channels=48"], ["tokenizer.channels is 48", "multiple of 32", "nearest: 64"]),
    (["--tokenizer.channel_multipliers=[1,0]"], ["tokenizer.channel_multipliers is [1, 0]"]),
    (["--tokenizer.residual_blocks=0", "--tokenizer.channel_multipliers=[1,2]"], ["tokenizer.residual_blocks is 0", "Set all multipliers to 1"]),
    (["--tokenizer.quantizer=vq"], ["tokenizer.quantizer is 'vq'", "ema"]),
    (["--tokenizer.quantizer=fsq", "--tokenizer.codebook_size=509"], ["tokenizer.codebook_size is 509", "nearest: 504 or 512"]),
    (["--tokenizer.quantizer=lfq", "--tokenizer.codebook_size=500"], ["tokenizer.codebook_size is 500", "nearest: 256 or 512"]),
    (["--tokenizer.quantizer=fsq", "--tokenizer.l2_normalize=true"], ["tokenizer.l2_normalize is true", "'fsq'", "ema, gradient, simvq"]),
    (["--tokenizer.quantizer=lfq", "--tokenizer.rotation_trick=true"], ["tokenizer.rotation_trick is true", "'lfq'"]),
    (["--tokenizer.quantizer=lfq", "--tokenizer.diveq=true"], ["tokenizer.diveq is true", "'lfq'"]),
    (["--tokenizer.rotation_trick=true", "--tokenizer.diveq=true"], ["tokenizer.rotation_trick", "tokenizer.diveq", "turn one off"]),
    (["--tokenizer.residual_kind=fsq"], ["tokenizer.residual_kind is 'fsq'"]),
    (["--tokenizer.patch_size=3"], ["tokenizer.patch_size is 3", "1, 2, 4, 8"]),
    (["--tokenizer.patch_size=8"], ["data.image_size is 16", "tokenizer.patch_size 8", "multiple of 32"]),
    (["--adversarial.weight=1", "--adversarial.layers=3"], ["adversarial.layers", "16"]),
    (["--adversarial.channels=20"], ["adversarial.channels is 20", "multiple of 8"]),
    (["--tokenizer_training.reconstruction_loss=l3"], ["tokenizer_training.reconstruction_loss is 'l3'", "l1, l2, huber", "Did you mean"]),
    (["--tokenizer_training.max_steps=0"], ["tokenizer_training.max_steps is 0", "at least 1"]),
    (["--prior_training.max_steps=null"], ["prior_training.max_steps", "prior_training.max_minutes"]),
    (["--prior_training.max_minutes=0"], ["prior_training.max_minutes is 0", "above 0"]),
    (["--prior_training.adam_betas=[0.9]"], ["prior_training.adam_betas is [0.9]", "two numbers"]),
    (["--prior_training.adam_betas=[0.9,1.0]"], ["prior_training.adam_betas is [0.9, 1.0]"]),
    (["--prior_training.export=newest"], ["prior_training.export is 'newest'", "best, last"]),
    (["--tokenizer_training.mixed_precision=half"], ["tokenizer_training.mixed_precision is 'half'", "auto, no, bf16, fp16"]),
    (["--sampling.top_p=0"], ["sampling.top_p is 0", "above 0"]),
    (["--sampling.temperature=-1"], ["sampling.temperature is -1", "at least 0"]),
    (["--data.channels=5"], ["data.channels is 5", "1 (grey), 2 (grey and alpha), 3 (RGB), 4 (RGB and alpha)"]),
    (["--data.value_range=[5,5]"], ["data.value_range is [5.0, 5.0]", "[low, high] with low < high"]),
    (["--data.value_range=[0,1,2]"], ["data.value_range is [0.0, 1.0, 2.0]", "two numbers"]),
    (["--data.source=digit"], ["data.source is 'digit'", "Did you mean 'digits'?"]),
    (["--seed=-1"], ["seed is -1", "at least 0"]),
    (["--run_dir="], ["run_dir", "empty"]),
])
def test_invalid_values_are_rejected_with_field_and_value(overrides, expected):
    message = error_message(*overrides)
    assert all(part in message for part in expected), message


def test_values_are_checked_at_construction():
    for make, field in ((lambda: PriorConfig(width=10, heads=3), "prior.width"), (lambda: TokenizerConfig(channels=33), "tokenizer.channels"),
                        (lambda: Recipe(data=DataConfig(image_size=30)), "data.image_size"), (lambda: SamplingConfig(top_p=2), "sampling.top_p"),
                        (lambda: TokenizerTrainingConfig(batch_size=0), "tokenizer_training.batch_size"),
                        (lambda: PriorTrainingConfig(label_drop=2), "prior_training.label_drop")):
        with pytest.raises(ValueError, match=re.escape(field)):
            make()


def test_batch_size_must_be_divisible_by_processes():
    recipe = load_recipe("digits", ["--tokenizer_training.accumulation_steps=2", "--tokenizer_training.batch_size=64"])
    check_batch_split(recipe, "tokenizer_training", 4)
    with pytest.raises(InputError, match=r"tokenizer_training.batch_size is 64.*3 processes.*accumulation_steps 2; set it to 66"):
        check_batch_split(recipe, "tokenizer_training", 3)


def test_sections_are_keyword_only():
    for section in section_names():
        config = type(getattr(Recipe(), section))
        with pytest.raises(TypeError):
            config(1)


def test_check_range_rejects_values_out_of_range():
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="the field is"):
            check_range("the field", number, at_least=0)
    check_range("the field", 10**400, at_least=0)
    with pytest.raises(InputError, match="at least 1 and at most 3"):
        check_range("the field", 4, at_least=1, at_most=3)


def test_nearest_names():
    assert nearest_name("prio", ["tokenizer", "prior"]) == "prior" and nearest_name("xyz", ["tokenizer", "prior"]) is None
    with pytest.raises(InputError, match=r"it is 'prio'; allowed: tokenizer, prior. Did you mean 'prior'\?"):
        check_name("it", "prio", ["tokenizer", "prior"])


# --- every field is documented, has a change policy and is used --------------------------------------------------------------


def documented_fields(source: str) -> dict[str, dict[str, str | None]]:
    """Class -> field -> the docstring under it, for the dataclasses in a source file."""
    found: dict[str, dict[str, str | None]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for entry, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(entry, ast.AnnAssign):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
                found.setdefault(node.name, {})[entry.target.id] = after.value.value if is_text else None
    return found


def is_sentence(text: str | None) -> bool:
    return text is not None and text.strip().endswith(".") and len(text.split()) >= 3


def test_every_field_is_documented():
    documented = {owner: fields for name in ("data_section", "recipe_sections", "sampling_section", "tokenizer_sections", "recipe")
                  for owner, fields in documented_fields((ROOT / f"vqmosaic/recipes/{name}.py").read_text()).items()}
    documented.pop("RecipeField")
    known = {name.rpartition(".")[2] for name in fields_of(Recipe())} | set(section_names())
    assert known <= {name for fields in documented.values() for name in fields}
    without = [f"{owner}.{name}" for owner, fields in documented.items() for name, text in fields.items() if not is_sentence(text)]
    assert not without
    example = documented_fields('class A:\n    x: int = 1\n    """What x is."""\n    y: int = 2\n')
    assert is_sentence(example["A"]["x"]) and not is_sentence(example["A"]["y"]), "check that this test can fail"


def test_help_lists_every_field():
    shown = " ".join(recipe_help().split())
    assert all(f"--{name} " in shown for name in fields_of(Recipe()))
    assert "Weight beta of the commitment loss" in shown and "default: 512" in shown


def test_help_of_a_recipe_shows_its_values(tmp_path):
    (tmp_path / "mine.yaml").write_text("fit_to_data: true\ntokenizer: {codebook_size: 77}\n")
    described = dict(text.strip().split(" ", 1) for text in " ".join(recipe_help(str(tmp_path / "mine.yaml")).split()).split(" --") if " " in text)
    assert "default: 77" in described["tokenizer.codebook_size"] and "Chosen by a rule" not in described["tokenizer.codebook_size"]
    assert "Chosen by a rule" in described["tokenizer.patch_size"] and "Chosen by a rule" not in described["data.image_size"]


def test_change_policy_of_every_field():
    policies: dict[str, set[str]] = {}
    for field in recipe_fields(Recipe()):
        policies.setdefault(field.change_policy, set()).add(field.name)
    training = ("tokenizer_training", "prior_training")
    assert policies["budget"] == {f"{section}.{name}" for section in training for name in ("max_steps", "max_minutes")}
    assert policies["unrecorded"] == {
        "run_dir", "minutes", "fit_to_data",
        "data.workers", "data.cache_megabytes", "data.max_unreadable", "tokens.tokenizer", "prior_training.tokens",
        "prior_training.activation_checkpointing", "prior_training.first_loss_tolerance",
        "tokenizer_training.usage_alarm", "tokenizer_training.perceptual_weights",
        *(f"{section}.{name}" for section in training
          for name in ("max_refused_steps", "checkpoint_every", "keep_checkpoints", "resume", "log_every", "trackers"))}
    assert set(policies) == {"budget", "unrecorded", "place", "same"} and policies["place"] == {"data.path"}
    assert {"seed", "data.source", "tokenizer.codebook_size", "prior.width", "sampling.top_p", "prior_training.batch_size"} <= policies["same"]


def unread_fields(sources: list[str]) -> set[str]:
    """Recipe fields that no source reads as an attribute of a variable that may hold their section."""
    read: set[tuple[str, str]] = set()  # (variable, attribute)
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                read.add((owner, node.attr))
    unread = set()
    for name in fields_of(Recipe()).keys() - {"minutes", "fit_to_data"}:  # fields_from_data.py reads them before the Recipe is constructed
        section, _, field = name.rpartition(".")
        if not any((owner, field) in read for owner in SECTION_VARIABLES[section]):
            unread.add(name)
    return unread


def test_every_field_is_used():
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if path.name not in RECIPE_FILES]
    sources = [path.read_text() for path in paths]
    assert unread_fields(sources) == set()

    # check that this test can fail: without the only file that reads it, a field counts as unread
    without_train = [text for path, text in zip(paths, sources, strict=True) if (path.parent.name, path.name) != ("stage1_tokenizer", "train.py")]
    assert "tokenizer_training.usage_alarm" in unread_fields(without_train)
    assert "sampling.top_k" in unread_fields(["sampling.temperature", "other.top_k"])
    assert "sampling.top_k" not in unread_fields(["print(self.sampling.top_k)"])


def test_run_dir_follows_a_moved_run_folder(tmp_path):
    """The former folder must not be written to or taken for the finished run."""
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    save_recipe(load_recipe("digits", [f"--run_dir={before}", "--seed=5"]), before / "recipe.yaml")
    before.rename(now)
    recipe = load_recipe(str(now))
    assert recipe.run_dir == str(now) and recipe.seed == 5
    assert load_recipe(str(now), ["--run_dir", "elsewhere"]).run_dir == "elsewhere"
    assert load_recipe(str(now / "recipe.yaml")).run_dir == str(before), "a recipe file keeps its run_dir"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data, a tokenizer and a run with relative paths in its recipe. The working directory is another folder, with its own data."""
    root = tmp_path / "project"
    for name in ("project/photos", "project/tokenizer", "project/runs/x", "elsewhere/photos"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(root)
    recipe = load_recipe("image_folder", ["--data.path=photos", "--tokens.tokenizer=./tokenizer", "--run_dir=runs/x",
                                          "--tokenizer_training.perceptual_weights=not/there"])
    save_recipe(recipe, root / "runs/x/recipe.yaml")
    assert load_recipe("runs/x") == recipe, "paths stay as they are in the folder where they were recorded"
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def paths_of(run) -> tuple[str | None, ...]:
    recipe = load_recipe(str(run))
    return recipe.data.path, recipe.tokens.tokenizer, recipe.tokenizer_training.perceptual_weights, recipe.tokenizer_training.resume


def test_relative_paths_of_a_run_start_where_it_was_recorded(project, tmp_path):
    expected = (str(project / "photos"), str(project / "tokenizer"), "not/there", "auto")
    assert paths_of(project / "runs/x") == paths_of("../project/runs/x") == expected
    (tmp_path / "link").symlink_to(project / "runs/x")
    assert paths_of(tmp_path / "link") == expected
    assert load_recipe(str(project / "runs/x"), ["--data.path", "photos"]).data.path == "photos", "an override is relative to the working directory"
    assert load_recipe(str(project / "runs/x/recipe.yaml")).data.path == "photos", "paths of a recipe file are not resolved"


def test_relative_paths_follow_a_moved_project(project, tmp_path):
    now = project.rename(tmp_path / "moved")
    assert paths_of(now / "runs/x")[:2] == (str(now / "photos"), str(now / "tokenizer"))


def test_relative_paths_stay_if_only_the_run_folder_is_moved(project, tmp_path):
    now = (project / "runs/x").rename(tmp_path / "scratch")
    assert paths_of(now)[:2] == (str(project / "photos"), str(project / "tokenizer"))


def test_relative_paths_of_a_version_0_1_0_recipe(project):
    path = project / "runs/x/recipe.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#")))
    assert paths_of(project / "runs/x")[:2] == (str(project / "photos"), str(project / "tokenizer"))


def test_data_set_name_is_not_resolved_as_a_path(project, monkeypatch):
    monkeypatch.chdir(project)
    save_recipe(load_recipe("image_folder", ["--data.path=owner/name", "--run_dir=runs/x"]), project / "runs/x/recipe.yaml")
    monkeypatch.chdir("/")
    assert paths_of(project / "runs/x")[0] == "owner/name"


def test_path_fields_hold_strings():
    strings = {field.name for field in recipe_fields(Recipe()) if field.value is None or isinstance(field.value, str)}
    assert set(PATH_FIELDS) <= strings


@pytest.mark.parametrize(("before", "now", "same"), [
    ("photos", "/a/photos", True), ("/a/photos", "photos", True), ("./x/../photos", "/a/photos", True), ("../photos", "/a/photos/", True),
    (".", "/a", True), ("photos", "/a/others", False), ("a/photos", "/b/photos", False), ("photos", "pictures", False), ("/a", "/b", False),
    ("photos", None, False), (None, "/a", False),
])
def test_may_be_same_path(before, now, same):
    assert may_be_same_path(before, now) is same


def test_folder_named_like_a_recipe_is_not_its_run_dir(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits").run_dir != "digits"


# --- types of values given in Python -----------------------------------------------------------------------------------------


SECTIONS = [entry for entry in dataclasses.fields(Recipe) if dataclasses.is_dataclass(entry.type)]
TYPED = [(section.name, section.type, field) for section in SECTIONS for field in dataclasses.fields(section.type)
         if any(kind in (int, float, bool) for kind in (field.type, *getattr(field.type, "__args__", ())))]


@pytest.mark.parametrize(("section", "type_", "field"), TYPED, ids=lambda value: getattr(value, "name", None) or str(value))
def test_wrong_types_are_rejected_with_field_name(section, type_, field):
    is_list = getattr(field.type, "__origin__", None) is list
    wrong = ["3", "false"] if is_list or bool not in (field.type, *getattr(field.type, "__args__", ())) else ["false", 1]
    for value in ([wrong[:1], "1,2"] if is_list else wrong):
        with pytest.raises(InputError, match=rf"{section}\.{field.name}.* (is|are) "):
            type_(**{field.name: value})


def test_numpy_numbers_become_python_numbers():
    import numpy as np

    prior, training = PriorConfig(width=np.int64(64), dropout=np.float32(0.25)), PriorTrainingConfig(adam_betas=(np.float64(0.9), 0.95))
    assert type(prior.width) is int and type(prior.dropout) is float and training.adam_betas == [0.9, 0.95]
    with pytest.raises(InputError, match=r"prior\.layers is 2\.5; it must be an integer"):
        PriorConfig(layers=2.5)
    with pytest.raises(InputError, match="seed is '1'; it must be an integer"):
        Recipe(seed="1")


@pytest.mark.parametrize("given", ["4", None, True, [4]])
def test_check_range_rejects_values_that_are_not_numbers(given):
    with pytest.raises(InputError, match=r"count is .*; it must be a number, at least 1"):
        check_range("count", given, at_least=1)


@pytest.mark.parametrize("marker", [".lock", "stages"])
def test_recipe_yaml_in_a_run_folder_loads_like_the_folder(tmp_path, monkeypatch, marker):
    project = tmp_path / "project"
    (project / "photos").mkdir(parents=True)
    (project / "runs/x" / marker).mkdir(parents=True)
    monkeypatch.chdir(project)
    save_recipe(load_recipe("image_folder", ["--data.path=photos", "--run_dir=runs/x"]), project / "runs/x/recipe.yaml")
    assert load_recipe("runs/x/recipe.yaml") == load_recipe("runs/x")
    monkeypatch.chdir(tmp_path)
    for place in ("project/runs/x", str(project / "runs/x")):
        loaded = load_recipe(f"{place}/recipe.yaml")
        assert loaded == load_recipe(place) and (loaded.run_dir, loaded.data.path) == (place, str(project / "photos"))
    assert load_recipe("project/runs/x/recipe.yaml", ["--data.path=other"]).data.path == "other"
    monkeypatch.chdir(project / "runs/x")
    assert load_recipe("recipe.yaml").data.path == str(project / "photos")
