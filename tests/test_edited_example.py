"""edited.png of a finished run: the lower half of validation images, drawn again by priors that predict in any order."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from pipelines.stages.edited_example import RESULTS, images_to_edit, save_edited_example
from pipelines.stages.summary import summary_table
from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import GAP_PIXELS
from stage2_prior.generation.prior_chain import PriorChain
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.tiny import ANY_ORDER, tiny_overrides
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig

SIZE, SCALE, COLUMNS = 16, 4, 2 + RESULTS


def tiles_of(path: Path) -> np.ndarray:
    """The images of a picture as uint8 (rows, columns, H, W), at their own size."""
    pixels = np.asarray(Image.open(path))[SCALE // 2::SCALE, SCALE // 2::SCALE]
    side = SIZE + GAP_PIXELS
    assert pixels.shape[1] == COLUMNS * side + GAP_PIXELS
    rows = pixels.shape[0] // side
    starts = [pixels.shape[0] - (rows - row) * (side + GAP_PIXELS) + GAP_PIXELS for row in range(rows)]  # each row has its own frame
    return np.stack([[pixels[top:top + SIZE, left:left + SIZE] for left in range(GAP_PIXELS, COLUMNS * side, side)] for top in starts])


def validation_images(run: Path) -> tuple[ValidationImages, torch.Tensor]:
    """The first validation images of a run."""
    splits = open_splits(load_recipe(str(run)).data)
    validation = ValidationImages(splits.validation, ImageGenerationPipeline.from_pretrained(run, "cpu").tokenizer.transform, limit=6)
    return validation, torch.cat([images_BCHW for images_BCHW, _ in validation.batches(6)])


def test_the_picture_keeps_the_upper_half_of_held_out_images(any_order_run):
    tiles = tiles_of(any_order_run / "edited.png")
    images, kept, results = tiles[:, 0], tiles[:, 1], tiles[:, 2:]
    _, images_BCHW = validation_images(any_order_run)
    assert (images == to_uint8(images_BCHW[:4])[..., 0]).all()
    assert (kept[:, :8] == images[:, :8]).all() and (kept[:, 8:] == kept[0, 8, 0]).all()
    assert (results[:, :, :8] == images[:, None, :8]).all(), "kept pixels are unchanged"
    assert all((result[8:] != image[8:]).any() for image, row in zip(images, results, strict=True) for result in row)
    assert (results[:, 0] != results[:, 1]).any(), "each result has its own seed"


def test_the_closing_table_names_the_picture(any_order_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(any_order_run, run)
    (run / "summary.json").unlink()
    (run / "edited.png").unlink()
    assert dispatch(["run", "digits", *tiny_overrides(run, **ANY_ORDER)]) == 0
    output = capsys.readouterr().out
    assert "edited example" in output and "lower half of 4 validation images drawn again (8 of 16 tokens): edited.png" in output
    [pictures] = [line for line in output.splitlines() if line.startswith("pictures: ")]
    assert pictures.endswith(f"{run}/edited.png") and (run / "edited.png").is_file()
    assert f"vqmosaic edit {run} IMAGE --mask MASK --classes 3,7 --out {run}/edited/" in output
    assert json.loads((run / "summary.json").read_text())["edited"] == {"picture": "edited.png", "images": 4, "results": 16, "tokens_drawn": 8,
                                                                        "tokens": 16}


def test_raster_order_has_no_example(tiny_run):
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert not (tiny_run / "edited.png").exists() and "edited" not in summary and "edited example" not in summary_table(summary)


def test_images_without_a_known_class_are_not_edited(any_order_run):
    pipe, names = ImageGenerationPipeline.from_pretrained(any_order_run, "cpu"), ["7", "unknown", "3"]
    labels = [0, None, 1, 2, 2, 0, 0, 0]
    source = SimpleNamespace(class_names=names, source_name=str, label=lambda index: labels[index])
    validation = SimpleNamespace(source=source, indices=[7, 0, 1, 2, 3, 4, 5], unreadable={"7": "empty", "3": "empty"})
    assert images_to_edit(pipe, validation, 5) == ([0, 3, 4], ["7", "3", "7"]), "positions among the images that can be read"
    source.class_names = None
    assert images_to_edit(pipe, validation, 5) == ([], [])


def test_no_picture_without_images_of_known_classes(any_order_run, tmp_path):
    validation, images_BCHW = validation_images(any_order_run)
    validation.source.class_names = ["a"] * 10
    pipe = ImageGenerationPipeline.from_pretrained(any_order_run, "cpu")
    assert save_edited_example(pipe, validation, images_BCHW, None, 0, tmp_path / "edited.png") is None and not list(tmp_path.iterdir())


def test_a_prior_without_classes_edits_the_first_images(any_order_run, tmp_path):
    """The prior has random weights: only its inputs are tested."""
    pipe = ImageGenerationPipeline.from_pretrained(any_order_run, "cpu")
    vocabulary = dataclasses.replace(pipe.prior.vocabulary, class_names=None, label_drop=0.0)
    pipe.chain, pipe.sampling = PriorChain([random_prior(vocabulary)]), SamplingConfig()
    validation, images_BCHW = validation_images(any_order_run)
    assert save_edited_example(pipe, validation, images_BCHW, None, 0, tmp_path / "edited.png") is not None
    assert (tiles_of(tmp_path / "edited.png")[:, 0] == to_uint8(images_BCHW[:4])[..., 0]).all()


def random_prior(vocabulary: Vocabulary) -> TokenPrior:
    """A prior with random weights that predicts in any order."""
    config = PriorConfig(architecture="grid_transformer", width=32, layers=2, heads=2, dropout=0.0)
    return TokenPrior.from_config(config, vocabulary, 0, any_order=True)
