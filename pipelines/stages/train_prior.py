"""Stage 2 training with pictures: the prior's samples, decoded by the run's tokenizer after each validation.

    vqmosaic train-prior digits

Without a tokenizer (tokens made elsewhere), the training makes no pictures.
"""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch

from pipelines.bundle import evenly_spread
from pipelines.generate import decoded_in_parts
from pipelines.stages.count_images import count_images
from pipelines.stages.stage_inputs import tokenizer_folder
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import image_grid, save_picture, viewing_scale
from stage1_tokenizer.tokenizer import ImageTokenizer
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


def sample_pictures(recipe: Recipe) -> OnValidation | None:
    """A callback that saves a picture of decoded samples, or None where there is no tokenizer and in all but the main process."""
    folder = tokenizer_folder(recipe)
    if not (folder / "config.json").is_file() or os.environ.get("RANK", "0") != "0":
        return None
    tokenizer = ImageTokenizer.from_pretrained(folder, default_device())
    training, world_size = recipe.prior_training, int(os.environ.get("WORLD_SIZE", "1"))
    together = max(1, training.batch_size // training.accumulation_steps // world_size // 2)  # with guidance an image is two rows of a batch

    def save(prior: TokenPrior, step: int, log_folder: Path, stop: StopFlag) -> None:
        if prior.vocabulary.token_fingerprint != tokenizer.token_fingerprint:
            return  # tokens of another tokenizer: there is nothing to decode them with
        num_classes = prior.vocabulary.num_classes
        sampling = recipe.sampling
        if not num_classes or prior.vocabulary.label_drop == 0:  # no null class was learnt that guidance could compare with
            sampling = dataclasses.replace(sampling, guidance_scale=1.0)
        labels = evenly_spread(num_classes, ROWS) or [NO_CLASS] * 4
        classes, seeds, pixels = [label for label in labels for _ in range(COLUMNS)], image_seeds(recipe.seed, len(labels) * COLUMNS), []
        for start in range(0, len(seeds), together):
            part = slice(start, start + together)
            try:
                ids_BT = prior.sample(classes[part] if num_classes else None, sampling, seeds[part], lambda done, total: not stop.signal)
            except SamplingStopped:
                return
            pixels += [to_uint8(images.cpu()) for images in decoded_in_parts(tokenizer, ids_BT.view(-1, *tokenizer.grid_shape))]
        pixels = np.concatenate(pixels)
        picture = image_grid([pixels[start:start + COLUMNS] for start in range(0, len(pixels), COLUMNS)], viewing_scale(pixels.shape[1]))
        save_picture(picture, log_folder / "samples" / f"step-{step:08d}.png")

    return torch.no_grad()(save)


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    recipe = load_recipe(arguments[0], arguments[1:], count_images=count_images)
    train(recipe, sample_pictures(recipe))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
