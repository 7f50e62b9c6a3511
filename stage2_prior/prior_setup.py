"""Prepares a prior for training: activation checkpointing, compilation, a trial step, the check of the first loss."""

import math
import time
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stage2_prior.losses import next_token_loss, z_loss
from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import TrainingBatch
from stage2_prior.vocabulary import Vocabulary
from vqmosaic.errors import InputError
from vqmosaic.kernels.matmul_attention import MAX_MATMUL_LENGTH
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.runs.accelerator import check_compiler
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers of a causal language model. Raises InputError if they are not found."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"prior_training.compile is true, but {model.config.model_type} has no list of {count} layers to compile one by one. Set "
                     "prior_training.compile false, or use llama, gpt2 or qwen3 as prior.architecture.")


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass (activation checkpointing). Raises InputError if the architecture does not support it."""
    # transformers 5.23 has the first name and deprecates the second
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"prior_training.activation_checkpointing is true, but {model.config.model_type} does not support it: {error} Set it to "
                         "false, or use llama, gpt2 or qwen3 as prior.architecture.") from error


def compile_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Compile each layer separately: much faster than compiling the whole model, and names in checkpoints do not change."""
    layers = transformer_layers(model)
    check_compiler("prior_training.compile", device)
    for layer in layers:
        layer.compile()


def prepare_prior(prior: TokenPrior, training: PriorTrainingConfig, run: TrainingRun) -> nn.Module:
    """Apply the options of the recipe, create optimizer, weight average and wrapper, and resume. Returns the model to call in training."""
    if training.activation_checkpointing:
        recompute_activations(prior.model)
    if run.is_sharded:
        prior._no_split_modules = prior.model._no_split_modules  # accelerate shards modules of these classes one by one
    model = run.prepare(prior)
    if training.compile:  # after the weight average was copied: the copy runs only in validation
        run.wait_before_training(lambda: compile_layers(prior.model, run.accelerator.device))
    return model


def describe_blocks(config: PreTrainedConfig) -> str:
    """Describe the kinds of blocks and the feed-forward width of a GridTransformer for the plan; "" for other models."""
    blocks, query_blocks = getattr(config, "embedding_blocks", 0), getattr(config, "query_blocks", 0)
    return ((f", embeddings of all ids in {counted(blocks, 'block')}, feed-forward {config.intermediate_size} wide" if blocks else "")
            + (f", {counted(query_blocks, 'query block')}{' with embeddings of all ids' if config.query_embeddings else ''}, feed-forward "
               f"{config.query_feed_forward} wide" if query_blocks else ""))


def describe_attention(model: PreTrainedModel, device: torch.device, precision: str) -> str:
    """The attention implementation used in training. For SDPA on a GPU, with the kernels that torch may choose from."""
    is_short = model.config.max_position_embeddings - 1 <= MAX_MATMUL_LENGTH  # the last id of a sequence is not an input
    if isinstance(model, GridTransformer) and device.type == "cpu" and precision == "bf16" and is_short:
        return "matrix products, for short sequences in bf16 on a CPU"
    name = model.config._attn_implementation
    if name != "sdpa" or device.type != "cuda":
        return name
    backends = torch.backends.cuda
    enabled = {"flash": backends.flash_sdp_enabled(), "cudnn": backends.cudnn_sdp_enabled(),
               "memory-efficient": backends.mem_efficient_sdp_enabled(), "math": backends.math_sdp_enabled()}
    return f"sdpa ({', '.join(kernel for kernel, is_enabled in enabled.items() if is_enabled)} enabled)"


def time_and_loss_of_one_step(model: nn.Module, batch: TrainingBatch, run: TrainingRun) -> tuple[float, float]:
    """Seconds of the forward and backward passes of one step, and the mean NLL over all processes in nats per token.

    Runs one micro-batch and multiplies its seconds by the accumulation steps. Discards the gradients.
    """
    training = cast(PriorTrainingConfig, run.training)  # the run of a tokenizer has another class
    count = max(1, len(batch.ids_BT) // training.accumulation_steps)
    ids_BT, classes_B, inputs_BT, given_BG, orders_BT = (part[:count].to(run.accelerator.device) for part in batch)
    model.train()
    for _ in range(2):  # the first one is a warm-up
        started = time.perf_counter()
        logits_BTK = model(inputs_BT, classes_B, given_BG, None if training.order == "raster" else orders_BT)
        nll = next_token_loss(logits_BTK, ids_BT)
        run.accelerator.backward(nll + training.z_loss * z_loss(logits_BTK) if training.z_loss else nll)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    run.optimizers[0].zero_grad(set_to_none=True)
    return seconds * training.accumulation_steps, float(run.accelerator.reduce(nll.detach(), "mean"))


def uniform_loss(vocabulary: Vocabulary) -> float:
    """Loss of a uniform distribution over the codes, ln K in nats per token. With several grids, the mean over the tokens."""
    return sum(grid.num_tokens * math.log(grid.codebook_size) for grid in vocabulary.grids) / vocabulary.num_tokens


def check_first_loss(first_loss: float, vocabulary: Vocabulary, tolerance: float) -> str:
    """Describe the first loss and ln K for the plan. Raises InputError if they differ by more than the tolerance or the loss is not finite."""
    expected = uniform_loss(vocabulary)
    sizes = " and ".join(dict.fromkeys(f"{grid.codebook_size:,}" for grid in vocabulary.grids))
    if not abs(first_loss - expected) <= tolerance:
        raise InputError(f"the loss of the untrained prior on its first batch is {first_loss:.3f} nats per token, but a uniform distribution over "
                         f"{sizes} codes has {expected:.3f} (ln K). The difference exceeds prior_training.first_loss_tolerance = {tolerance:g}. The "
                         "initial logits are too large, for example because of an entry of prior.options. Remove it, use another "
                         "prior.architecture, or raise prior_training.first_loss_tolerance.")
    return f"{first_loss:.3f} nats per token; ln K is {expected:.3f}"
