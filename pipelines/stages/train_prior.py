"""Trains the prior (stage 2) and saves a picture of decoded samples after each validation.

    vqmosaic train-prior digits

Without a tokenizer (tokens of another program), or with one that did not make the tokens, training saves no pictures.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from pipelines.decoded_images import decode_in_batches
from pipelines.labels import evenly_spaced_classes
from pipelines.pipeline_parts import is_bytes
from pipelines.prompts import TextEncoder
from pipelines.stages.count_images import count_images
from pipelines.stages.stage_inputs import condition_folders, token_fingerprint_of_tokenizer, tokenizer_folder
from pipelines.stages.stored_conditions import SAMPLES_OF_CONDITIONS, StoredImages, comparison_picture, row_titles, stored_images
from stage1_tokenizer.conditions.text_tokenizer import BYTES_FINGERPRINT, text_fingerprint
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, tile_images, viewing_scale
from stage1_tokenizer.tokenizer_config import is_tokenizer
from stage1_tokenizer.tokenizer_protocol import load_tokenizer
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.prior_chain import split_grids
from stage2_prior.generation.sampling import SamplingStopped
from stage2_prior.prior import TokenPrior
from stage2_prior.segments import GivenText
from stage2_prior.train import OnValidation, train
from stage2_prior.vocabulary import Vocabulary
from token_shards import TokenShardReader
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

    The callback saves nothing if the tokenizer cannot decode what the prior draws and is given, or if a signal stops it. Samples of a prior with
    conditions have those of validation images. Each row shows the conditions that are images, samples, and the image itself, and has its class and
    captions as a title.
    """
    folder = tokenizer_folder(recipe)
    if not (folder / "config.json").is_file() or os.environ.get("RANK", "0") != "0":
        return None
    tokenizer = load_tokenizer(folder, default_device())
    training, world_size = recipe.prior_training, int(os.environ.get("WORLD_SIZE", "1"))
    batch_size = max(1, training.batch_size // training.accumulation_steps // world_size // 2)  # with guidance, an image takes two rows

    @torch.no_grad()
    def save(prior: TokenPrior, step: int, log_folder: Path, stop: StopFlag) -> None:
        vocabulary = prior.vocabulary
        known = {grid.name: grid for grid in [*(part.grid for part in vocabulary.conditions if part.kind == "grid"), *vocabulary.grids]}
        if vocabulary.token_fingerprint != tokenizer.token_fingerprint or any(known.get(grid.name) != grid for grid in tokenizer.grids):
            return  # the tokens come from another tokenizer, or are not all of its tokens, so this one cannot decode them
        sampling = recipe.sampling if vocabulary.class_names is not None else recipe.sampling.without_class()
        if vocabulary.why_unguided():  # guidance needs null ids, which this prior does not learn
            sampling = sampling.unguided()
        stored = stored_images(TokenShardReader(recipe.tokens_folder / "validation"), [vocabulary], ROWS) if vocabulary.conditions else None
        if stored is not None:
            if ChainVocabulary([vocabulary]).why_not_sampled(stored.classes is not None, stored.ids):
                return  # no validation image has a class, and the prior has not learned to sample without one
            labels, columns = stored.classes, SAMPLES_OF_CONDITIONS
        else:
            labels, columns = evenly_spaced_classes(vocabulary.num_classes, ROWS) or None, COLUMNS
        rows = ROWS if stored is not None else len(labels or range(UNCONDITIONAL_ROWS))
        classes = None if labels is None else [label for label in labels for _ in range(columns)]
        given = {} if stored is None else {part.name: stored.ids[part.name].repeat_interleave(columns, dim=0) for part in vocabulary.conditions}
        seeds, pixels = image_seeds(recipe.seed, rows * columns), []

        def should_continue(done: int, total: int) -> bool:
            return not stop.signal

        for start in range(0, len(seeds), batch_size):
            batch = slice(start, start + batch_size)
            of_batch = {name: ids_Nn[batch] for name, ids_Nn in given.items()}
            try:
                ids_BT = prior.sample(classes and classes[batch], sampling, seeds[batch], should_continue, given=of_batch)
            except SamplingStopped:
                return
            tokens = of_batch | split_grids(prior, ids_BT.cpu())
            pixels += [to_uint8(images.cpu()) for images in decode(tokens)]
        path, pixels_NHWC = log_folder / "samples" / f"step-{step:08d}.png", np.concatenate(pixels)
        if stored is None:
            tiles = [pixels_NHWC[start:start + columns] for start in range(0, len(pixels_NHWC), columns)]
            save_picture(tile_images(tiles, viewing_scale(pixels_NHWC.shape[1:3])), path)
        else:
            originals_BCHW = torch.cat([images.cpu() for images in decode(stored.ids)])
            names = vocabulary.class_names if vocabulary.class_drop < 1 else None
            class_names = None if names is None or stored.classes is None else [names[index] for index in stored.classes]
            titles = row_titles(class_names, decoded_texts(vocabulary, stored), rows)
            save_picture(comparison_picture(decoded_conditions(vocabulary, stored), titles, pixels_NHWC, originals_BCHW), path)

    def decode(tokens: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        ids_BT = torch.cat([tokens[grid.name] for grid in tokenizer.grids], dim=1)
        return decode_in_batches(tokenizer, tokenizer.split_tokens(ids_BT))

    def decoded_conditions(vocabulary: Vocabulary, stored: StoredImages) -> dict[str, torch.Tensor]:
        """Name -> images (N, C, h, w) of the conditions whose tokenizers are in this run or in the recipe."""
        folders, expected, images = condition_folders(recipe), vocabulary.token_fingerprints, {}
        for name in [part.name for part in vocabulary.conditions if part.kind == "grid" and part.drop_rate < 1]:
            folder = folders.get(name)
            if folder is not None and is_tokenizer(folder) and token_fingerprint_of_tokenizer(folder) == expected[name]:
                own = load_tokenizer(folder)
                images[name] = own.decode(own.split_tokens(stored.ids[name]))
        return images

    def decoded_texts(vocabulary: Vocabulary, stored: StoredImages) -> dict[str, list[str]]:
        """Name -> the captions of the N images, if they are bytes or their tokenizer is in the recipe."""
        folders, texts = condition_folders(recipe), {}
        for part in vocabulary.conditions:
            if not isinstance(part, GivenText) or part.drop_rate == 1:
                continue
            folder = None if is_bytes(part) else folders.get(part.name)
            if text_fingerprint(folder) == (part.token_fingerprint or BYTES_FINGERPRINT):
                texts[part.name] = TextEncoder.load(part, folder).texts(stored.ids[part.name])
        return texts

    return save


def main(arguments: list[str]) -> None:
    """Entry point: a recipe and its overrides."""
    recipe = load_recipe(arguments[0], arguments[1:], count_images=count_images)
    train(recipe, make_picture_saver(recipe))


if __name__ == "__main__":
    run_worker(main, sys.argv[1:])
