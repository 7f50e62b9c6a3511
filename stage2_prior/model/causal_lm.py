"""Creates the transformers causal language model of a prior from a recipe, or loads it from a folder and checks that every weight matches."""

import copy
import dataclasses
import difflib
import functools
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stage2_prior.digests import version_of
from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.model.grid_transformer_config import MODEL_TYPE as GRID_TRANSFORMER
from stage2_prior.model.grid_transformer_config import query_block_sizes, split_parameter_budget
from stage2_prior.segments import GivenGrid, GivenText
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import BYTES_FINGERPRINT
from vqmosaic.errors import InputError, check_name
from vqmosaic.files.exported_weights import exportable_weights, unwrapped
from vqmosaic.files.json_files import check_fields, is_later, read_object
from vqmosaic.files.permissions import check_readable
from vqmosaic.kernels.dropout import dropout
from vqmosaic.recipes.recipe_sections import PriorConfig
from vqmosaic.seeding import derive_seed

# transformers has no common name for these; each configuration has some of them
FEED_FORWARD_WIDTHS = ("intermediate_size", "ffn_dim")
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
RESIDUAL_DROPOUTS = ("resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout")
EMBEDDING_DROPOUTS = ("embd_pdrop", "embed_dropout", "embedding_dropout", "emb_pdrop")
BLOCK_NAMES = ("self_attn", "attn", "attention", "self_attention", "mlp", "feed_forward", "block_sparse_moe")
VOCABULARY_OPTIONS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "num_codes", "grids", "given")
AUTOMATIC_OPTIONS = ("embedding_blocks", "query_embeddings", "query_intermediate_size", "text_ngram_rows")
"""Options of a GridTransformer for which null means the value that `grid_options` chooses."""
TEXT_NGRAM_ROWS = 2048
"""Embeddings for the n-grams of each length, if all texts are bytes. Ids of other tokenizers stand for words, or parts of them."""
MAX_INITIAL_LOGIT_STD = 0.25
"""Maximum standard deviation of the initial logits. The first loss is above ln K by half its square."""
ALTERNATIVES = "use grid_transformer, llama, gpt2 or qwen3"


def make_causal_lm(prior: PriorConfig, vocabulary: Vocabulary, seed: int, any_order: bool = False) -> PreTrainedModel:
    """A new float32 model for the vocabulary. Equal seeds give equal weights. Does not change the global random state.

    Raises InputError for an unknown architecture or option, and for an architecture that cannot be a prior.
    """
    config, has_own_dropout = make_config(prior, vocabulary, any_order)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed("prior weights", seed))
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise InputError(f"transformers cannot create prior.architecture {prior.architecture!r} with these sizes and options: "
                             f"{error}") from error
    head = model.get_output_embeddings()
    if head is not None and not config.tie_word_embeddings:
        with torch.no_grad():  # with the usual head, wider models start further above ln K; a much smaller head learns more slowly
            head.weight.mul_(min(1.0, MAX_INITIAL_LOGIT_STD / (head.weight.std().item() * prior.sizes.width**0.5)))
    check_causal(model, prior.architecture)
    if prior.dropout and not has_own_dropout:
        add_dropout(model, prior.dropout)
    return model.train()


def make_config(prior: PriorConfig, vocabulary: Vocabulary, any_order: bool = False) -> tuple[PreTrainedConfig, bool]:
    """The configuration of the architecture, and whether the architecture itself has dropout on the output of its blocks."""
    architectures = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    if prior.architecture not in architectures:
        nearest = difflib.get_close_matches(prior.architecture, architectures, n=5, cutoff=0.4)
        raise InputError(f"prior.architecture is {prior.architecture!r}; allowed: grid_transformer, llama, gpt2, qwen3 or another of the "
                         f"{len(architectures) - 1} causal language models of transformers {transformers.__version__}. "
                         f"Nearest: {', '.join(nearest) or 'none'}.")
    config_class = CONFIG_MAPPING[prior.architecture]
    fields = {field.name for field in dataclasses.fields(config_class)}
    attribute_map = config_class.attribute_map

    sizes, num_positions = prior.sizes, vocabulary.num_given_tokens + vocabulary.num_tokens
    settings: dict[str, Any] = {"hidden_size": sizes.width, "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads,
                                "vocab_size": vocabulary.size}
    settings = {attribute_map.get(name, name): value for name, value in settings.items()}
    missing = [name for name in settings if name not in fields]
    if missing:
        raise InputError(f"The size of prior.architecture {prior.architecture!r} cannot be set: its configuration has no "
                         f"{', '.join(missing)}; {ALTERNATIVES}.")
    # a gated feed-forward block has three matrices instead of two: a width of 8/3 D gives as many parameters as 4 D without a gate
    gated = getattr(config_class, "hidden_act", None) in ("silu", "swish")
    optional: dict[str, Any] = {"num_key_value_heads": sizes.heads, "head_dim": sizes.width // sizes.heads, "tie_word_embeddings": False,
                                "max_position_embeddings": num_positions, "use_cache": True, "is_decoder": True,
                                "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "num_codes": vocabulary.num_codes,
                                "grids": [[grid.height, grid.width, grid.depth] for grid in vocabulary.grids],
                                "given": [[condition.grid.height, condition.grid.width, condition.grid.depth] if isinstance(condition, GivenGrid)
                                          else [condition.num_tokens] for condition in vocabulary.conditions]}
    optional |= dict.fromkeys(FEED_FORWARD_WIDTHS, -(-sizes.width * 8 // 96) * 32 if gated else 4 * sizes.width)
    optional |= dict.fromkeys(ATTENTION_DROPOUTS + RESIDUAL_DROPOUTS + EMBEDDING_DROPOUTS, prior.dropout)
    if prior.architecture == GRID_TRANSFORMER:
        optional |= grid_options(prior, vocabulary, any_order)
    elif any_order:
        raise InputError(f"prior.architecture is {prior.architecture!r}, which predicts tokens only in raster order: nothing tells it which token "
                         "comes next. Set prior_training.order to raster, or prior.architecture to grid_transformer.")
    settings |= {attribute_map.get(name, name): value for name, value in optional.items() if attribute_map.get(name, name) in fields}

    for name, value in prior.options.items():
        if name in VOCABULARY_OPTIONS:
            raise InputError(f"prior.options has {name}, which is set from the tokens and classes; leave it out.")
        check_name("A name in prior.options", name, sorted(fields | attribute_map.keys()))
        if value is not None or name not in AUTOMATIC_OPTIONS:
            settings[attribute_map.get(name, name)] = value
    positions = settings.get(attribute_map.get("max_position_embeddings", "max_position_embeddings"), num_positions)
    if positions < num_positions:
        raise InputError(f"prior.options allows {positions} positions; the class and {num_positions - 1} tokens need {num_positions}.")
    if "rope_parameters" in fields and settings.get("head_dim", 2) % 2:
        raise InputError(f"prior.width {sizes.width} / prior.heads {sizes.heads} gives a head dimension of {settings['head_dim']}; "
                         f"{prior.architecture} rotates pairs of dimensions, so it must be an even number.")
    try:
        config = AutoConfig.for_model(prior.architecture, **settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"prior.architecture {prior.architecture!r} does not accept these sizes or prior.options: {error}") from error
    return config, any(name in fields for name in RESIDUAL_DROPOUTS)


def grid_options(prior: PriorConfig, vocabulary: Vocabulary, any_order: bool) -> dict[str, Any]:
    """The kinds of blocks of a GridTransformer and their feed-forward widths, for the sizes after prior.options."""
    options = prior.options
    layers, width = options.get("num_hidden_layers", prior.sizes.layers), options.get("hidden_size", prior.sizes.width)
    if not all(isinstance(size, int) and size > 0 for size in (layers, width)):
        return {}  # the configuration raises an error for these
    if any_order and layers == 1:
        raise InputError("The prior has 1 layer; prior_training.order other than raster needs at least 2: one for the known tokens, one for queries.")
    query_blocks = options.get("query_blocks", max(1, layers * 2 // 3) if any_order else 0)
    if bool(query_blocks) != any_order or query_blocks not in range(layers):
        allowed = f"1 to {layers - 1}, because prior_training.order is not raster" if any_order else "0, because prior_training.order is raster"
        raise InputError(f"The prior has {layers} layers and {query_blocks} query_blocks (prior.options); allowed: {allowed}.")
    texts = [condition for condition in vocabulary.conditions if isinstance(condition, GivenText)]
    are_bytes = bool(texts) and all(text.token_fingerprint == BYTES_FINGERPRINT for text in texts)
    chosen: dict[str, Any] = {"query_blocks": query_blocks, "text_ngram_rows": TEXT_NGRAM_ROWS if are_bytes else 0}
    if any_order:
        chosen |= query_block_sizes(width, vocabulary.size, options.get("query_embeddings"))
    blocks, token_blocks = options.get("embedding_blocks"), layers - query_blocks
    if "intermediate_size" in options:
        return chosen | {"embedding_blocks": 0}
    if blocks is not None and blocks not in range(token_blocks + 1):
        return chosen  # the configuration raises an error for this
    try:
        blocks, feed_forward = split_parameter_budget(token_blocks, width, vocabulary.size, blocks)
    except ValueError as error:
        raise InputError(f"prior.options: {error}.") from error
    return chosen | {"embedding_blocks": blocks, "intermediate_size": feed_forward}


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Add dropout to the embedded tokens and to the output of each block of a model that has none. Uses forward hooks, adds no weights."""
    blocks = [module for name, module in model.named_modules() if name.rpartition(".")[2] in BLOCK_NAMES]
    expected = 2 * model.config.num_hidden_layers
    if len(blocks) != expected:
        raise InputError(f"prior.dropout is {probability:g}, but in {model.config.model_type}, {len(blocks)} attention and feed-forward blocks "
                         f"were found instead of {expected}. Set prior.dropout 0 and the model's own dropout in prior.options, or {ALTERNATIVES}.")
    for module in [model.get_input_embeddings(), *blocks]:
        module.register_forward_hook(functools.partial(_drop_output, probability=probability))


def _drop_output(module: nn.Module, inputs: tuple, output: Any, *, probability: float) -> Any:
    if not module.training:
        return None  # keep the output
    if isinstance(output, tuple):  # attention modules also return the attention weights
        return dropout(output[0], probability), *output[1:]
    return dropout(output, probability)


@torch.no_grad()  # not inference_mode: tensors that a model caches in its first pass must support autograd
def check_causal(model: PreTrainedModel, architecture: str) -> None:
    """Raise InputError unless the model is causal and has the key-value cache that sampling needs."""
    was_training = model.training
    model.eval()
    ids_2S = torch.tensor([[0, 1], [0, 0]], device=model.device)
    try:
        logits_2SV = model(input_ids=ids_2S, use_cache=False).logits
        cache = getattr(model(input_ids=ids_2S, use_cache=True), "past_key_values", None)
    except Exception as error:  # any of transformers' 200 model files may raise any error
        raise InputError(f"prior.architecture {architecture!r} does not run on plain token ids with these options: {error}") from error
    finally:
        model.train(was_training)
    if not torch.allclose(logits_2SV[0, 0], logits_2SV[1, 0], rtol=0, atol=1e-6):
        raise InputError(f"prior.architecture {architecture!r} attends to later tokens, so it cannot be a prior; {ALTERNATIVES}.")
    if cache is None:
        raise InputError(f"prior.architecture {architecture!r} has no key-value cache, which sampling needs; {ALTERNATIVES}.")


def generation_config(vocabulary: Vocabulary) -> GenerationConfig:
    """Settings for transformers' `generate` to sample exactly T codes after the given tokens.

    With several drawn grids, ids must be restricted by position, which settings cannot express. So `generate` raises a ValueError, because the given
    tokens already have the maximum length, unless it is called with `grid_ranges.generate_arguments`.
    """
    length = ({"max_new_tokens": vocabulary.num_tokens, "min_new_tokens": vocabulary.num_tokens} if len(vocabulary.grids) == 1
              else {"max_length": vocabulary.num_given_tokens})
    return GenerationConfig(do_sample=True, top_k=0, suppress_tokens=vocabulary.suppressed_ids, bos_token_id=None, eos_token_id=None,
                            pad_token_id=None, **length)


def exportable_causal_lm(model: nn.Module, vocabulary: Vocabulary) -> PreTrainedModel:
    """The model to save: created from the configuration, as in loading, with the weights of `model` in float32 on the CPU.

    Raises InputError if the saved model could not be loaded from its configuration; see `exportable_weights`.
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
        raise InputError(f"{what} cannot be saved: its model is a {type(model).__name__}, but its configuration would be loaded as a "
                         f"{type(fresh).__name__}.")
    weights = {name: tensor.float().cpu().contiguous() if tensor.is_floating_point() else tensor.cpu() for name, tensor in weights.items()}
    fresh.load_state_dict(weights, assign=True)
    fresh.tie_weights()
    fresh.generation_config = generation_config(vocabulary)
    return fresh


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model of a checkpoint folder in evaluation mode. Raises InputError unless its weights match its configuration exactly."""
    check_readable(folder)
    if (folder / "adapter_config.json").is_file():  # transformers would load it silently if peft is installed
        raise InputError(f"{folder} holds an adapter (adapter_config.json), which is not part of a prior. Merge it (peft: merge_and_unload) and save "
                         "the prior again, or remove the file.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder / 'config.json'} is missing; the prior in {folder} is incomplete.")
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise InputError(f"{folder / 'model.safetensors'} is missing; weights are read from safetensors only.")
    check_no_later_options(folder)
    with quiet_transformers():
        try:  # wrong shapes are accepted here and listed below with the other faults
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False,
                                                          ignore_mismatched_sizes=True, output_loading_info=True)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            raise InputError(f"{folder} cannot be read as a transformers checkpoint: {error}") from error
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)  # output_loading_info returns a pair
    faults = {"missing": sorted(found["missing_keys"]), "unexpected": sorted(found["unexpected_keys"]),
              "of the wrong shape": [f"{name} {tuple(own)} instead of {tuple(expected)}"
                                     for name, own, expected in sorted(found["mismatched_keys"])],
              "unreadable": list(found["error_msgs"])}
    if any(faults.values()):
        if any(name.endswith(".query_key_value.weight") for name in faults["unexpected"]) and isinstance(model, GridTransformer):
            raise InputError(f"{folder} holds a grid_transformer from before its blocks had embeddings, which can no longer be loaded. "
                             "Train it again: run its recipe with --redo prior.")
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise InputError(f"The weights in {folder} do not match its config.json: {listed}.")
    return model


def check_no_later_options(folder: Path) -> None:
    """Raise InputError if a later version wrote the config.json of a grid_transformer with options that this version would ignore."""
    path, version = folder / "config.json", version_of(folder)
    content = read_object(path, f"{folder} cannot be read as a transformers checkpoint")
    if content.get("model_type") == GRID_TRANSFORMER and is_later(version):  # in other cases, unknown fields may come from transformers
        known = GridTransformer.config_class().to_dict()
        check_fields(content, [*known, *(field.name for field in dataclasses.fields(GridTransformer.config_class))], str(path), version)


@contextmanager
def quiet_transformers():
    """Disable transformers' progress bars, and its warnings about faults that are errors here."""
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
