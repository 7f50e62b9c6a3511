"""Trains the prior (stage 2) and saves a picture of decoded samples after each validation.

    vqmosaic train-prior digits

Without a tokenizer (tokens of another program), or with one that did not make the tokens, training saves no pictures.
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch

from pipelines.decoded_images import decode_in_batches
from pipelines.labels import evenly_spaced_classes
from pipelines.stages.count_images import count_images
from pipelines.stages.stage_inputs import tokenizer_folder
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images, viewing_scale
from stage1_tokenizer.tokenizer_protocol import load_tokenizer
from stage2_prior.generation.sampling import SamplingStopped
from stage2_prior.prior import TokenPrior
from stage2_prior.train import OnValidation, train
from stage2_prior.vocabulary import NO_CLASS
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.runs.accelerator import default_device
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.launch import run_worker
from vqmosaic.seeding import image_seeds

ROWS, COLUMNS = 10, 8
"""Largest number of rows of a picture, one for each class, and the number of images per row."""
UNCONDITIONAL_ROWS = 4
"""Number of rows if the prior has no classes."""


def make_picture_saver(recipe: Recipe) -> OnValidation | None:
    """A callback that saves a picture of decoded samples. None without a tokenizer, and in all processes but the main one.

    The callback saves nothing if the prior's grids are not those of the tokenizer, if the prior has conditions, or if a signal stops it.
    """
    folder = tokenizer_folder(recipe)
    if not (folder / "config.json").is_file() or os.environ.get("RANK", "0") != "0":
        return None
    tokenizer = load_tokenizer(folder, default_device())
    training, world_size = recipe.prior_training, int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = max(1, training.batch_size // training.accumulation_steps // world_size // 2)  # with guidance, an image takes two rows

    @torch.no_grad()
    def save(prior: TokenPrior, step: int, log_folder: Path, stop: StopFlag) -> None:
        if prior.vocabulary.token_fingerprint != tokenizer.token_fingerprint or prior.vocabulary.grids != tokenizer.grids:
            return  # the tokens come from another tokenizer, or are not all of its tokens, so this one cannot decode them
        if prior.vocabulary.conditions:
            return  # there are no given ids here
        num_classes = prior.vocabulary.num_classes
        sampling = recipe.sampling
        if prior.vocabulary.why_unguided():  # guidance needs a null class, which this prior does not learn
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)
        labels = evenly_spaced_classes(num_classes, ROWS) or [NO_CLASS] * UNCONDITIONAL_ROWS
        classes = [label for label in labels for _ in range(COLUMNS)]
        seeds = image_seeds(recipe.seed, len(classes))
        pixels = []

        def should_continue(done: int, total: int) -> bool:
            return not stop.signal

        for start in range(0, len(seeds), batch_size):
            batch = slice(start, start + batch_size)
            try:
                ids_BT = prior.sample(classes[batch] if num_classes else None, sampling, seeds[batch], should_continue)
            except SamplingStopped:
                return
            pixels += [to_uint8(images.cpu()) for images in decode_in_batches(tokenizer, tokenizer.split_tokens(ids_BT))]
        pixels_NHWC = np.concatenate(pixels)
        rows = [pixels_NHWC[start:start + COLUMNS] for start in range(0, len(pixels_NHWC), COLUMNS)]
        picture = tile_images(rows, viewing_scale(pixels_NHWC.shape[1:3]))
        save_picture(picture, log_folder / "samples" / f"step-{step:08d}.png")

    return save


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    recipe = load_recipe(arguments[0], arguments[1:], count_images=count_images)
    train(recipe, make_picture_saver(recipe))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
