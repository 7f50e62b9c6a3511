"""The transformers causal language model inside a prior, stock or our own: made from a recipe, or loaded strictly from a folder."""

import copy
import dataclasses
import difflib
import functools
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stage2_prior.digests import version_of
from stage2_prior.model.grid_transformer import MODEL_TYPE as GRID_TRANSFORMER
from stage2_prior.model.grid_transformer import GridTransformer, embeddings_and_feed_forward
from stage2_prior.vocabulary import Vocabulary
from vqmosaic.errors import InputError, check_name
from vqmosaic.files.exported_weights import exportable_weights, unwrapped
from vqmosaic.files.json_files import check_fields, is_later, read_object
from vqmosaic.files.permissions import check_readable
from vqmosaic.recipes.recipe_sections import PriorConfig
from vqmosaic.seeding import derive_seed

# transformers has no common name for these; each configuration has some of them
FEED_FORWARD_WIDTHS = ("intermediate_size", "ffn_dim")
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
RESIDUAL_DROPOUTS = ("resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout")
EMBEDDING_DROPOUTS = ("embd_pdrop", "embed_dropout", "embedding_dropout", "emb_pdrop")
BLOCK_NAMES = ("self_attn", "attn", "attention", "self_attention", "mlp", "feed_forward", "block_sparse_moe")
VOCABULARY_OPTIONS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "num_codes", "grids")
LARGEST_FIRST_LOGITS = 0.25
"""Standard deviation of the logits of a fresh model; the first loss is half its square above ln K."""
OTHERS = "use grid_transformer, llama, gpt2 or qwen3"


def make_causal_lm(prior: PriorConfig, vocabulary: Vocabulary, seed: int) -> PreTrainedModel:
    """A fresh float32 model for the vocabulary, the same for the same seed; the global random state is left alone.

    Raises InputError for an unknown architecture or option, and for an architecture that does not fit this use.
    """
    config, has_own_dropout = make_config(prior, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed("prior weights", seed))
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise InputError(f"transformers cannot make prior.architecture {prior.architecture!r} of these sizes and options: "
                             f"{error}") from error
    head = model.get_output_embeddings()
    if head is not None and not config.tie_word_embeddings:
        with torch.no_grad():  # the wider the model, the further above ln K the usual head starts; much smaller ones learn more slowly
            head.weight.mul_(min(1.0, LARGEST_FIRST_LOGITS / (head.weight.std().item() * prior.sizes.width**0.5)))
    check_causal(model, prior.architecture)
    if prior.dropout and not has_own_dropout:
        add_dropout(model, prior.dropout)
    return model.train()


def make_config(prior: PriorConfig, vocabulary: Vocabulary) -> tuple[PreTrainedConfig, bool]:
    """The configuration of the architecture, and whether it has dropout of its own on what its blocks add."""
    architectures = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    if prior.architecture not in architectures:
        nearest = difflib.get_close_matches(prior.architecture, architectures, n=5, cutoff=0.4)
        raise InputError(f"prior.architecture is {prior.architecture!r}; allowed: grid_transformer, llama, gpt2, qwen3 or another of the "
                         f"{len(architectures) - 1} causal language models of transformers {transformers.__version__}. "
                         f"Nearest: {', '.join(nearest) or 'none'}.")
    config_class = CONFIG_MAPPING[prior.architecture]
    fields = {field.name for field in dataclasses.fields(config_class)}
    renamed = config_class.attribute_map

    sizes = prior.sizes
    settings: dict[str, Any] = {"hidden_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
                                "vocab_size": vocabulary.size}
    settings = {renamed.get(name, name): value for name, value in settings.items()}
    missing = [name for name in settings if name not in fields]
    if missing:
        raise InputError(f"prior.architecture {prior.architecture!r} cannot be sized: its configuration has no "
                         f"{', '.join(missing)}; {OTHERS}.")
    # a gated feed-forward block has three matrices, and 8/3 of the width makes it as large as 4 times the width makes two
    gated = getattr(config_class, "hidden_act", None) in ("silu", "swish")
    optional: dict[str, Any] = {"num_key_value_heads": sizes.heads, "head_dim": sizes.width // sizes.heads, "tie_word_embeddings": False,
                                "max_position_embeddings": 1 + vocabulary.num_tokens, "use_cache": True, "is_decoder": True,
                                "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "num_codes": vocabulary.num_codes,
                                "grids": [[grid.height, grid.width, grid.depth] for grid in vocabulary.grids]}
    optional |= dict.fromkeys(FEED_FORWARD_WIDTHS, -(-sizes.width * 8 // 96) * 32 if gated else 4 * sizes.width)
    optional |= dict.fromkeys(ATTENTION_DROPOUTS + RESIDUAL_DROPOUTS + EMBEDDING_DROPOUTS, prior.dropout)
    if prior.architecture == GRID_TRANSFORMER:
        optional |= grid_options(prior, vocabulary)
    settings |= {renamed.get(name, name): value for name, value in optional.items() if renamed.get(name, name) in fields}

    for name, value in prior.options.items():
        if name in VOCABULARY_OPTIONS:
            raise InputError(f"prior.options has {name}, which follows from the tokens and classes; leave it out.")
        check_name("A name in prior.options", name, sorted(fields | renamed.keys()))
        if (name, value) != ("embedding_blocks", None):  # null: as many as grid_options found
            settings[renamed.get(name, name)] = value
    positions = settings.get(renamed.get("max_position_embeddings", "max_position_embeddings"), 1 + vocabulary.num_tokens)
    if positions < 1 + vocabulary.num_tokens:
        raise InputError(f"prior.options allows {positions} positions; the class and {vocabulary.num_tokens} tokens need "
                         f"{1 + vocabulary.num_tokens}.")
    if "rope_parameters" in fields and settings.get("head_dim", 2) % 2:
        raise InputError(f"prior.width {sizes.width} over prior.heads {sizes.heads} gives heads of {settings['head_dim']} dimensions; "
                         f"{prior.architecture} rotates pairs of them, so it must be an even number.")
    try:
        config = AutoConfig.for_model(prior.architecture, **settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"prior.architecture {prior.architecture!r} refuses these sizes or prior.options: {error}") from error
    return config, any(name in fields for name in RESIDUAL_DROPOUTS)


def grid_options(prior: PriorConfig, vocabulary: Vocabulary) -> dict[str, int]:
    """How a GridTransformer divides its size between embeddings and feed-forward blocks, from the sizes that the options leave it with."""
    options = prior.options
    layers, width = options.get("num_hidden_layers", prior.sizes.layers), options.get("hidden_size", prior.sizes.width)
    blocks = options.get("embedding_blocks")
    if "intermediate_size" in options or not all(isinstance(size, int) and size > 0 for size in (layers, width)):
        return {"embedding_blocks": 0}
    if blocks is not None and blocks not in range(layers + 1):
        return {}  # the configuration refuses that
    try:
        blocks, feed_forward = embeddings_and_feed_forward(layers, width, vocabulary.size, blocks)
    except ValueError as error:
        raise InputError(f"prior.options: {error}.") from error
    return {"embedding_blocks": blocks, "intermediate_size": feed_forward}


def add_dropout(model: PreTrainedModel, share: float) -> None:
    """Give a model without dropout of its own some on its embedded tokens and on what each block adds: by hooks, without new weights."""
    blocks = [module for name, module in model.named_modules() if name.rpartition(".")[2] in BLOCK_NAMES]
    expected = 2 * model.config.num_hidden_layers
    if len(blocks) != expected:
        raise InputError(f"prior.dropout is {share:g}, and in {model.config.model_type} {len(blocks)} attention and feed-forward blocks "
                         f"were found instead of {expected}; set prior.dropout 0 and what dropout it has in prior.options, or {OTHERS}.")
    for module in [model.get_input_embeddings(), *blocks]:
        module.register_forward_hook(functools.partial(_drop_output, share=share))


def _drop_output(module: nn.Module, inputs: tuple, output: Any, *, share: float) -> Any:
    if not module.training:
        return None  # the output stays as it is
    if isinstance(output, tuple):  # attention returns its weights as well
        return nn.functional.dropout(output[0], share), *output[1:]
    return nn.functional.dropout(output, share)


@torch.no_grad()  # not inference mode: what a model keeps from its first pass must not be unfit for training
def check_causal(model: PreTrainedModel, architecture: str) -> None:
    """Raise InputError unless each output depends on the past alone, and the model has the cache that sampling needs."""
    was_training = model.training
    model.eval()
    ids_2S = torch.tensor([[0, 1], [0, 0]], device=model.device)
    try:
        logits_2SV = model(input_ids=ids_2S, use_cache=False).logits
        cache = getattr(model(input_ids=ids_2S, use_cache=True), "past_key_values", None)
    except Exception as error:  # any of transformers' 200 model files may fail in its own way
        raise InputError(f"prior.architecture {architecture!r} does not run on plain token ids with these options: {error}") from error
    finally:
        model.train(was_training)
    if not torch.allclose(logits_2SV[0, 0], logits_2SV[1, 0], rtol=0, atol=1e-6):
        raise InputError(f"prior.architecture {architecture!r} looks at tokens that come later, so it cannot be a prior; {OTHERS}.")
    if cache is None:
        raise InputError(f"prior.architecture {architecture!r} has no key-value cache, which sampling needs; {OTHERS}.")


def generation_config(vocabulary: Vocabulary) -> GenerationConfig:
    """What makes transformers' own `generate` draw exactly T codes after a class token (of one grid; it knows no ranges by position)."""
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=vocabulary.num_tokens, min_new_tokens=vocabulary.num_tokens,
                            suppress_tokens=vocabulary.suppressed_ids, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def exportable_causal_lm(model: nn.Module, vocabulary: Vocabulary) -> PreTrainedModel:
    """The model to save: created from the configuration, as loading will do, with the weights of `model` in float32 on the CPU.

    Raises InputError if the model could not be loaded from its configuration; see `exportable_weights`.
    """
    model, what = unwrapped(model), "this prior"
    config = copy.deepcopy(getattr(model, "config", None))
    if not isinstance(config, PreTrainedConfig) or getattr(config, "quantization_config", None) is not None:
        reason = "it is quantized" if isinstance(config, PreTrainedConfig) else f"a {type(model).__name__} has no transformers configuration"
        raise InputError(f"{what} cannot be saved, because the file could not be loaded again: {reason}. Save the original float32 model instead.")
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = exportable_weights(model, fresh, what)
    if not isinstance(model, type(fresh)):
        raise InputError(f"{what} cannot be saved: its model is a {type(model).__name__}, and its configuration would be loaded as a "
                         f"{type(fresh).__name__}.")
    weights = {name: tensor.float().cpu().contiguous() if tensor.is_floating_point() else tensor.cpu() for name, tensor in weights.items()}
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    fresh.generation_config = generation_config(vocabulary)
    return fresh


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder in evaluation mode. Raises InputError unless its weights are exactly those of its configuration."""
    check_readable(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load it silently if peft is installed
        raise InputError(f"{folder} holds an adapter (adapter_config.json), which is not part of a prior. Merge it (peft: merge_and_unload) and save "
                         "the prior again, or remove the file.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder / 'config.json'} is missing; {folder} is not the complete folder of a prior.")
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise InputError(f"{folder / 'model.safetensors'} is missing; weights are read from safetensors only.")
    check_no_later_options(folder)
    with quiet_transformers():
        try:  # sizes that do not fit are let through here to be listed with the rest below
            model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True,
                                                                trust_remote_code=False, ignore_mismatched_sizes=True,
                                                                output_loading_info=True)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            raise InputError(f"{folder} cannot be read as a transformers checkpoint: {error}") from error
    faults = {"missing": sorted(found["missing_keys"]), "unexpected": sorted(found["unexpected_keys"]),
              "of another shape": [f"{name} {tuple(own)} instead of {tuple(wanted)}"
                                   for name, own, wanted in sorted(found["mismatched_keys"])],
              "unreadable": list(found["error_msgs"])}
    if any(faults.values()):
        if any(name.endswith(".query_key_value.weight") for name in faults["unexpected"]) and isinstance(model, GridTransformer):
            raise InputError(f"{folder} is of a grid_transformer as it was before its blocks had embeddings, which is no longer read; "
                             "train it again, in its run with --redo prior.")
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise InputError(f"The weights in {folder} do not fit its config.json: {listed}.")
    return model


def check_no_later_options(folder: Path) -> None:
    """Raise InputError if a later version wrote the config.json of a grid_transformer with options that this version would ignore."""
    path, version = folder / "config.json", version_of(folder)
    content = read_object(path, f"{folder} cannot be read as a transformers checkpoint")
    if content.get("model_type") == GRID_TRANSFORMER and is_later(version):  # otherwise an unknown field can come from transformers
        known = GridTransformer.config_class().to_dict()
        check_fields(content, [*known, *(field.name for field in dataclasses.fields(GridTransformer.config_class))], str(path), version)


@contextmanager
def quiet_transformers():
    """Keep transformers from drawing progress bars, and from warning of what is refused here with an error."""
    logging = transformers.utils.logging
    verbosity, showed_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if showed_progress:
            logging.enable_progress_bar()
