"""Setup of tokenizer training before the first step: codebook initialization, lines of the printed plan, and the time of one step."""

import time
from itertools import islice
from typing import cast

import torch
from accelerate.utils import broadcast

from stage1_tokenizer.adversarial.discriminator_training import Adversary
from stage1_tokenizer.data.image_batches import ImageBatch, TrainingImages
from stage1_tokenizer.perceptual import LPIPS, resolve_perceptual_weights
from stage1_tokenizer.quantizers import Quantizer
from stage1_tokenizer.tokenizer_protocol import Tokenizer, ids_shape
from stage1_tokenizer.trainable.trainable_tokenizer import TrainableTokenizer
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.training.tracking import progress_lines
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted

KMEANS_VECTORS_PER_CODE = 16
KMEANS_MAX_BATCHES = 256


@torch.no_grad()
def initialize_codebooks(tokenizer: TrainableTokenizer, images: TrainingImages, run: TrainingRun) -> None:
    """Initialize the codebook of each level in turn, because its latents depend on the codes of the levels before it."""
    tokenizer.eval()
    for name, quantizer in tokenizer.quantizers.items():
        if type(quantizer).initialize is Quantizer.initialize:  # this quantizer is not initialized from latents
            continue
        quantizer.initialize(first_latents(tokenizer, name, images, run))
        for tensor in quantizer.state_dict().values():  # on GPUs, the sums of k-means may round differently on each rank
            tensor.copy_(broadcast(tensor.clone(), from_process=0))
        if run.average is not None:  # the average starts from these codes too
            cast(TrainableTokenizer, run.average.module).quantizers[name].load_state_dict(quantizer.state_dict())


def first_latents(tokenizer: TrainableTokenizer, name: str, images: TrainingImages, run: TrainingRun) -> torch.Tensor:
    """Latents (N, D) of the first batches before the quantizer `name`, enough for k-means, from all ranks, in stream order."""
    quantizer = tokenizer.quantizers[name]
    needed = KMEANS_VECTORS_PER_CODE * quantizer.codebook_size
    collected: list[torch.Tensor] = []
    words = f"k-means {name}" if len(tokenizer.quantizers) > 1 else "k-means"
    lines = progress_lines(needed, words, "vector", run.is_main)
    for batch in islice(images.batches(0, run.training.batch_size, run.rank, run.world_size), KMEANS_MAX_BATCHES):
        images_BCHW = batch.images_BCHW.to(run.accelerator.device)
        latents_BDhw = torch.cat([tokenizer.latents(part, name) for part in images_BCHW.split(run.micro_batch)])
        vectors_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, quantizer.code_dim)
        collected.append(run.accelerator.gather(vectors_ND))
        lines.update(len(collected[-1]))
        if sum(map(len, collected)) >= needed:
            break
    return torch.cat(collected)


def load_perceptual_loss(recipe: Recipe, device: torch.device) -> LPIPS | None:
    """LPIPS with its weights loaded and checked. None if the recipe has no perceptual loss or uses discriminator features."""
    training = recipe.tokenizer_training
    if not training.perceptual_weight or training.perceptual_loss != "lpips":
        return None
    return LPIPS(resolve_perceptual_weights(training.perceptual_weights)).to(device)


def describe_start(training: TokenizerTrainingConfig) -> dict[str, str]:
    """Lines of the plan about fine-tuning. Empty when training from scratch."""
    if training.init_from is None:
        return {}
    trained = "the decoder only; encoder, codebook and tokens do not change" if training.train_parts == "decoder" else "all"
    return {"starts from": training.init_from, "trained": trained}


def describe_loss(training: TokenizerTrainingConfig) -> str:
    """The reconstruction and perceptual losses, for the plan."""
    perceptual = f", {training.perceptual_loss} with weight {training.perceptual_weight:g}" if training.perceptual_weight else ", no perceptual loss"
    return f"{training.reconstruction_loss} reconstruction{perceptual}"


def describe_tokens(tokenizer: TrainableTokenizer, validation_images: int) -> dict[str, str]:
    """Lines of the plan about the tokens of one image."""
    levels, sides = tokenizer.config.levels, tokenizer.level_sides
    if not tokenizer.grids:
        sizes = [f"{f'{name} ' if len(levels) > 1 else ''}{sides[name][0]} x {sides[name][1]} x {level.code_dim}"
                 f"{'' if level.has_ids else ', continuous'} ({level.quantizer})" for name, level in levels.items()]
        return {"latents": f"{'; '.join(sizes)}, so there are no tokens"}
    sizes = [f"{f'{grid.name} ' if len(levels) > 1 else ''}{' x '.join(map(str, ids_shape(grid)))} per image, {grid.codebook_size:,} codes "
             f"({levels[grid.name].quantizer})" for grid in tokenizer.grids]
    tokens = validation_images * sum(grid.num_tokens for grid in tokenizer.grids)
    return {"tokens": "; ".join(sizes), "codebook use is measured on": f"{counted(validation_images, 'image')}, {counted(tokens, 'token')}"}


def warn_if_codebook_is_large(tokenizer: TrainableTokenizer, images: int, run: TrainingRun) -> None:
    """Warn of each codebook with more codes than the training images have latent vectors, so that not all codes can be used."""
    for name, level in tokenizer.config.levels.items():
        (height, width), field = tokenizer.level_sides[name], f"{level.SECTION}.codebook_size"
        codes, vectors = level.codebook_size, images * height * width
        if level.has_ids and codes > vectors:
            run.report(f"warning: {field} is {codes:,}, but the {images:,} training images have only {vectors:,} latent vectors "
                       f"({height} x {width} each), so not all codes can be used. Lower {field}, or train on more images.")


def measure_step_seconds(model: torch.nn.Module, adversary: Adversary | None, perceptual: LPIPS | None, batch: ImageBatch, run: TrainingRun) -> float:
    """Seconds of one step's forward and backward passes, with perceptual loss and discriminator. Discards gradients and statistics."""
    training, tokenizer = cast(TokenizerTrainingConfig, run.training), cast(TrainableTokenizer, run.unwrapped)
    images_BCHW = batch.images_BCHW.to(run.accelerator.device)
    images_BCHW = images_BCHW[: max(1, len(images_BCHW) // training.accumulation_steps)]
    if training.channels_last:
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    set_training_mode(model, tokenizer, training.train_parts)
    for _ in range(2):  # the first pass warms up
        started = time.perf_counter()
        output = model(images_BCHW)
        loss = output.reconstructions.float().square().mean() + output.quantizer_loss
        if perceptual is not None:
            loss = loss + perceptual(output.reconstructions, images_BCHW)
        if adversary is not None:
            loss = loss + adversary.generator_terms(images_BCHW, output.reconstructions, loss, 1.0, 0.0)[0]
        run.accelerator.backward(loss)
        if adversary is not None:
            run.accelerator.backward(adversary.discriminator_terms(images_BCHW, output.reconstructions)[0])
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    tokenizer.discard()
    return seconds * training.accumulation_steps


def set_training_mode(model: torch.nn.Module, tokenizer: Tokenizer, parts: str) -> None:
    """Set training mode. Frozen modules, such as encoder and quantizer, stay in eval mode: no dropout, no codebook statistics."""
    model.train()
    for part in tokenizer.frozen_modules(parts):
        part.eval()
