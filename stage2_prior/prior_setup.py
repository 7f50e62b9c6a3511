"""What happens to the prior between its making and step 0: options that cost or save memory and time, the trial step, the first loss."""

import math
import time

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stage2_prior.losses import next_token_loss, z_loss
from stage2_prior.model.grid_attention import LONGEST
from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import TrainingBatch
from stage2_prior.vocabulary import Vocabulary
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorTrainingConfig
from vqmosaic.runs.accelerator import check_compiler
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.wording import counted


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal language model, each of which takes and gives the residual stream. InputError where they are not found."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"prior_training.compile is true, and in {model.config.model_type} no list of {count} layers was found that could be compiled "
                     "one by one; set prior_training.compile false, or use llama, gpt2 or qwen3 as prior.architecture.")


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of the layers for the backward pass. InputError for an architecture that cannot do that."""
    # transformers 5.23 has the first name, and says of the second one that it will go
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"prior_training.activation_checkpointing is true, which {model.config.model_type} does not do: {error} Set it to false, "
                         "or use llama, gpt2 or qwen3 as prior.architecture.") from error


def compile_layers(model: PreTrainedModel, device: torch.device, precision: str) -> None:
    """Compile each layer by itself: far less time than the whole takes, and no name in a checkpoint changes. In bf16 on a CPU a GridTransformer
    knows better."""
    layers = transformer_layers(model)
    check_compiler("prior_training.compile", device)
    if trains_by_own_passes(model, device, precision):
        model.compile_passes()
        return
    for layer in layers:
        layer.compile()


def prepare_prior(prior: TokenPrior, training: PriorTrainingConfig, run: TrainingRun) -> nn.Module:
    """The model to call in training: with what the recipe asks for, under optimizer, weight average and wrapper, gone on from a checkpoint."""
    if training.activation_checkpointing:
        recompute_activations(prior.model)
    if run.is_sharded:
        prior._no_split_modules = prior.model._no_split_modules  # by whose names accelerate finds the parts to divide one by one
    model = run.prepare(prior)
    if training.compile:  # after the weight average was copied, which is validated a few times only
        run.wait_before_training(lambda: compile_layers(prior.model, run.accelerator.device, run.accelerator.mixed_precision))
    return model


def describe_embeddings(config: PreTrainedConfig) -> str:
    """How a GridTransformer is divided between embeddings and feed-forward blocks, in words; nothing for other models."""
    blocks = getattr(config, "embedding_blocks", 0)
    return f", embeddings of all ids in {counted(blocks, 'block')}, feed-forward {config.intermediate_size} wide" if blocks else ""


def trains_by_own_passes(model: PreTrainedModel, device: torch.device, precision: str) -> bool:
    """Whether a model's attention is trained by AttentionByProducts of grid_attention.py; of such a one the passes are compiled alone."""
    return (isinstance(model, GridTransformer) and device.type == "cpu" and precision == "bf16"
            and model.config.max_position_embeddings - 1 <= LONGEST)  # nothing comes after the last id of a sequence


def describe_attention(model: PreTrainedModel, device: torch.device, precision: str) -> str:
    """Which implementation of attention the model is trained with and, for torch's own on a GPU, the kernels that it may choose from."""
    if trains_by_own_passes(model, device, precision):
        return "own passes for short sequences in bf16 on a CPU"
    name = model.config._attn_implementation
    if name != "sdpa" or device.type != "cuda":
        return name
    backends = torch.backends.cuda
    enabled = {"flash": backends.flash_sdp_enabled(), "cudnn": backends.cudnn_sdp_enabled(),
               "memory-efficient": backends.mem_efficient_sdp_enabled(), "math": backends.math_sdp_enabled()}
    return f"sdpa ({', '.join(kernel for kernel, is_enabled in enabled.items() if is_enabled)} enabled)"


def time_and_loss_of_one_step(model: nn.Module, batch: TrainingBatch, run: TrainingRun) -> tuple[float, float]:
    """Seconds of one forward and backward, and the NLL before it in nats per token over all processes; the step is thrown away."""
    training: PriorTrainingConfig = run.training
    count = max(1, len(batch.ids_BT) // training.accumulation_steps)
    ids_BT, classes_B, inputs_BT = (part[:count].to(run.accelerator.device) for part in batch)
    model.train()
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        logits_BTK = model(inputs_BT, classes_B)
        nll = next_token_loss(logits_BTK, ids_BT)
        run.accelerator.backward(nll + training.z_loss * z_loss(logits_BTK) if training.z_loss else nll)
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    run.optimizers[0].zero_grad(set_to_none=True)
    return seconds * training.accumulation_steps, float(run.accelerator.reduce(nll.detach(), "mean"))


def loss_of_ignorance(vocabulary: Vocabulary) -> float:
    """ln K in nats per token, the loss of a prior that finds all codes equally likely; the mean over the tokens where grids differ."""
    return sum(grid.num_tokens * math.log(grid.codebook_size) for grid in vocabulary.grids) / vocabulary.num_tokens


def check_first_loss(first_loss: float, vocabulary: Vocabulary, tolerance: float) -> str:
    """The first loss and ln K in words for the plan; InputError where they are further apart than the tolerance, or the loss is not finite."""
    expected = loss_of_ignorance(vocabulary)
    sizes = " and ".join(dict.fromkeys(f"{grid.codebook_size:,}" for grid in vocabulary.grids))
    if not abs(first_loss - expected) <= tolerance:
        raise InputError(f"the loss of the fresh prior on its first batch is {first_loss:.3f} nats per token, but one that has learnt nothing finds "
                         f"all of {sizes} codes equally likely, which is {expected:.3f} (ln K): they are further apart than "
                         f"prior_training.first_loss_tolerance = {tolerance:g}. Something makes its first logits too large, such as an entry of "
                         f"prior.options; take that out, use another prior.architecture, or raise prior_training.first_loss_tolerance.")
    return f"{first_loss:.3f} nats per token; ln K is {expected:.3f}"
