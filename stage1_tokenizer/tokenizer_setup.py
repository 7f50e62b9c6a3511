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
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.tokenizer_protocol import Tokenizer
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.recipes.tokenizer_sections import TokenizerTrainingConfig
from vqmosaic.training.tracking import progress_lines
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted

KMEANS_VECTORS_PER_CODE = 16
KMEANS_MAX_BATCHES = 256


@torch.no_grad()
def initialize_codebook(tokenizer: ImageTokenizer, images: TrainingImages, run: TrainingRun) -> None:
    """Initialize the codebook by k-means on latents of the first batches. Collects enough latents, from all ranks, in stream order."""
    if type(tokenizer.quantizer).initialize is Quantizer.initialize:  # this quantizer is not initialized from latents
        return
    needed = KMEANS_VECTORS_PER_CODE * tokenizer.config.codebook_size
    collected: list[torch.Tensor] = []
    lines = progress_lines(needed, "k-means", "vector", run.is_main)
    tokenizer.eval()
    for batch in islice(images.batches(0, run.training.batch_size, run.rank, run.world_size), KMEANS_MAX_BATCHES):
        images_BCHW = batch.images_BCHW.to(run.accelerator.device)
        latents_BDhw = torch.cat([tokenizer.latents(part) for part in images_BCHW.split(run.micro_batch)])
        vectors_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, tokenizer.config.code_dim)
        collected.append(run.accelerator.gather(vectors_ND))
        lines.update(len(collected[-1]))
        if sum(map(len, collected)) >= needed:
            break
    tokenizer.quantizer.initialize(torch.cat(collected))
    for tensor in tokenizer.quantizer.state_dict().values():  # on GPUs, the sums of k-means may round differently on each rank
        tensor.copy_(broadcast(tensor.clone(), from_process=0))
    if run.average is not None:  # the average starts from these codes too
        run.average.module.get_submodule("quantizer").load_state_dict(tokenizer.quantizer.state_dict())


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


def describe_tokens(tokenizer: ImageTokenizer, validation_images: int) -> dict[str, str]:
    """Lines of the plan about the tokens of one image."""
    config, (height, width) = tokenizer.config, tokenizer.grid_sides
    if not tokenizer.quantizer.has_ids:
        return {"latents": f"{height} x {width} x {config.code_dim}, continuous ({config.quantizer}), so there are no tokens"}
    depth = f" x {config.depth}" if config.depth > 1 else ""
    return {"tokens": f"{height} x {width}{depth} per image, {config.codebook_size:,} codes ({config.quantizer})",
            "codebook use is measured on":
                f"{counted(validation_images, 'image')}, {counted(validation_images * height * width * config.depth, 'token')}"}


def warn_if_codebook_is_large(tokenizer: ImageTokenizer, images: int, run: TrainingRun) -> None:
    """Warn if the codebook has more codes than the training images have latent vectors, so that not all codes can be used."""
    codes, (height, width) = tokenizer.config.codebook_size, tokenizer.grid_sides
    vectors = images * height * width
    if tokenizer.quantizer.has_ids and codes > vectors:
        run.report(f"warning: tokenizer.codebook_size is {codes:,}, but the {images:,} training images have only {vectors:,} latent "
                   f"vectors ({height} x {width} each), so not all codes can be used. Lower tokenizer.codebook_size, or "
                   "train on more images.")


def measure_step_seconds(model: torch.nn.Module, adversary: Adversary | None, perceptual: LPIPS | None, batch: ImageBatch, run: TrainingRun) -> float:
    """Seconds of one step's forward and backward passes, with perceptual loss and discriminator. Discards gradients and statistics."""
    training, tokenizer = cast(TokenizerTrainingConfig, run.training), cast(ImageTokenizer, run.unwrapped)
    images_BCHW = batch.images_BCHW.to(run.accelerator.device)
    images_BCHW = images_BCHW[: max(1, len(images_BCHW) // training.accumulation_steps)]
    if training.channels_last:
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    set_training_mode(model, tokenizer, training.train_parts)
    for _ in range(2):  # the first pass warms up
        started = time.perf_counter()
        output = model(images_BCHW)
        loss = output.reconstructions.float().square().mean() + output.quantizer.loss
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
    tokenizer.quantizer.discard()
    return seconds * training.accumulation_steps


def set_training_mode(model: torch.nn.Module, tokenizer: Tokenizer, parts: str) -> None:
    """Set training mode. Frozen modules, such as encoder and quantizer, stay in eval mode: no dropout, no codebook statistics."""
    model.train()
    for part in tokenizer.frozen_modules(parts):
        part.eval()
