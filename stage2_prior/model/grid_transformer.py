"""GridTransformer: this project's causal language model for image tokens, registered with transformers' auto classes.

Differences from a language model for text:

- Rotary embedding in two axes (after RoFormer, Su et al. 2021): rows in one half of each head, columns in the other. Keys are rotated by the
  coordinates of their token, queries by the coordinates of the token they predict, so "the token above" has the same offset everywhere, even at the
  start of a row. A learned embedding of the predicted position is added at the input.
- Each block adds its own class embedding to the class token, which all later positions attend to. The class enters at every depth, and the
  key-value cache holds all of it.
- If the codebook is not too large, the last blocks, or all, have two embeddings of every id: one is added to the residual stream, the other to the
  attention values (per-layer embeddings as in Gemma 3n, Google 2025; value embeddings as in modded-nanogpt, Jordan et al. 2024). So the residual
  stream need not carry the identity of the token. The parameters are taken from the feed-forward blocks, which are expensive, while lookups cost
  almost nothing: steps are faster, and the model learns more per step.
- Queries and keys are normalized in each head (Dehghani et al. 2023), which bounds attention logits at high learning rates.
- Texts that are given as bytes have embeddings of n-grams (text_embedding.py), so that the model need not learn words from single bytes.
- With `query_blocks`, the model predicts tokens in any order, several at once: the last blocks are queries for tokens, and attend to what the first
  blocks computed from the known tokens (query_block.py).
- Squared ReLU in the feed-forward block (So et al. 2021). Norms are LayerNorm without bias: one pass on a CPU, where RMSNorm needs five.

In comments: B batch, S sequence (class token and tokens), D width, A heads, d head dimension, p pairs of a head, K codes of all grids together.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from stage2_prior.model.cached_positions import causal_mask, choose_cache, count_keys, mask_of_all, new_positions, select_rotations
from stage2_prior.model.forward_arguments import check_call, check_targets, check_texts
from stage2_prior.model.grid_attention import attend, queries_keys_values
from stage2_prior.model.grid_ranges import GridRanges
from stage2_prior.model.grid_transformer_config import MODEL_TYPE, GridTransformerConfig, rotation_tables
from stage2_prior.model.query_block import KeysAndValues, QueryBlock
from stage2_prior.model.text_embedding import NGramEmbedding, text_slices
from vqmosaic.errors import InputError
from vqmosaic.kernels.dropout import dropout


class GridBlock(GradientCheckpointingLayer):
    """Embeddings, attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: GridTransformerConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.layer, self.heads, self.epsilon, self.dropout = layer, config.num_attention_heads, config.layer_norm_epsilon, config.resid_pdrop
        self.embeds_all_ids = layer >= config.num_token_blocks - config.embedding_blocks
        self.stream_embedding = nn.Embedding(config.vocab_size - (0 if self.embeds_all_ids else config.num_codes), width)
        self.value_embedding = nn.Embedding(config.vocab_size, width) if self.embeds_all_ids else None
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_epsilon, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_epsilon, bias=False)
        self.feed_forward_in = nn.Linear(width, config.intermediate_size, bias=False)
        self.feed_forward_out = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, x_BSD: torch.Tensor, ids_BS: torch.Tensor, classes_B: torch.Tensor | None, rotations: torch.Tensor,
                mask_SS: torch.Tensor | None = None, is_start: torch.Tensor | None = None, past_key_values: Cache | None = None) -> torch.Tensor:
        """The residual stream (B, S, D) after the block. `classes_B` is None if the class token is already in the cache.

        `is_start`, for static caches only: a bool scalar on the device, True if `ids_BS` starts with the class token. If False, `classes_B` has no
        effect.
        The cache has transformers' name and is passed by keyword, so that activation checkpointing finds it and leaves it out.
        """
        batch, length, width = x_BSD.shape
        x_BSD = self.add_stream_embedding(x_BSD, ids_BS, classes_B, is_start)
        hidden = self.attention_in(self.attention_norm(x_BSD))                                        # B, S, 3 D
        value_embeddings_BSD = None if self.value_embedding is None else self.value_embedding(ids_BS).to(hidden.dtype)
        query, key, value = queries_keys_values(hidden, value_embeddings_BSD, rotations, self.heads, self.epsilon)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)                               # of all positions
        mixed_BSD = attend(query, key, value, mask_SS).transpose(1, 2).reshape(batch, length, width)
        x_BSD = x_BSD + dropout(self.attention_out(mixed_BSD), self.dropout, self.training)
        hidden = torch.relu(self.feed_forward_in(self.feed_forward_norm(x_BSD))).square()             # B, S, intermediate
        return x_BSD + dropout(self.feed_forward_out(hidden), self.dropout, self.training)

    def add_stream_embedding(self, x_BSD: torch.Tensor, ids_BS: torch.Tensor, classes_B: torch.Tensor | None,
                             is_start: torch.Tensor | None) -> torch.Tensor:
        """The residual stream (B, S, D) with the block's own embedding of all ids, or of the class alone."""
        if self.embeds_all_ids:
            return x_BSD + self.stream_embedding(ids_BS).to(x_BSD.dtype)
        if classes_B is None:
            return x_BSD
        classes_BD = self.stream_embedding(classes_B) if is_start is None else self.stream_embedding(classes_B) * is_start
        return x_BSD + F.pad(classes_BD[:, None], (0, 0, 0, x_BSD.shape[1] - 1)).to(x_BSD.dtype)


class PadToVocabulary(LogitsProcessor):
    """Pads scores with -inf for the class ids, which have no logits."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (N, V) from scores (N, K)."""
        return F.pad(scores, (0, self.vocabulary - scores.shape[-1]), value=-torch.inf)


class GridTransformer(PreTrainedModel, GenerationMixin):
    """The causal language model: ids (B, S), a class id first, to logits (B, S, K) of codes. Classes are never predicted.

    Use it through TokenPrior, or like any transformers model.
    """

    config: GridTransformerConfig
    config_class = GridTransformerConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["GridBlock", "QueryBlock"]  # noqa: RUF012 (name and type from transformers)
    _supports_sdpa = True

    def __init__(self, config: GridTransformerConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers infers it from class names like LlamaForCausalLM; the Trainer needs it to count shifted labels
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.text_embedding = NGramEmbedding(config.text_ngram_rows, config.hidden_size) if config.text_ngram_rows else None
        self.place_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.query_blocks else None
        layers, first_query = range(config.num_hidden_layers), config.num_token_blocks
        self.blocks = nn.ModuleList([GridBlock(config, layer) if layer < first_query else QueryBlock(config, layer) for layer in layers])
        self.keys_and_values = KeysAndValues(config) if config.query_blocks else None
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=False)
        self.head = nn.Linear(config.hidden_size, config.num_codes, bias=False)
        self._rotations: dict[torch.device, torch.Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings are normal. Matrices are normal with variance 1 / inputs; those that write into the residual stream are zero."""
        if isinstance(module, GridBlock | QueryBlock):
            for matrix in (module.attention_out, module.feed_forward_out):
                nn.init.zeros_(matrix.weight)
        elif isinstance(module, nn.Linear) and not any(module is block.attention_out or module is block.feed_forward_out for block in self.blocks):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of all ids."""
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Linear:
        """The output head, which computes the logits."""
        return self.head

    @property
    def predicts_in_any_order(self) -> bool:
        """Whether the model has query blocks, so that it can predict any tokens from any others."""
        return self.config.query_blocks > 0

    def rotations(self, device: torch.device) -> torch.Tensor:
        """The rotation tables on a device, computed once. (transformers loses non-persistent buffers when it loads a model.)"""
        if device not in self._rotations:
            with torch.inference_mode(False):  # tables that are first computed in sampling must support autograd
                self._rotations[device] = rotation_tables(self.config).to(device)
        return self._rotations[device]

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """transformers' `generate`. Scores cover the whole vocabulary, as beam search and `compute_transition_scores` expect.

        Raises InputError for a model with several drawn grids without GridRanges, because ids of all grids would be mixed.
        """
        if len(self.config.grids) > 1 and not any(isinstance(processor, GridRanges) for processor in logits_processor or []):
            raise InputError(f"This prior draws {len(self.config.grids)} grids, so generate needs the argument logits_processor: pass "
                             "**stage2_prior.model.grid_ranges.generate_arguments(vocabulary), or use TokenPrior.sample.")
        chunk = kwargs.get("prefill_chunk_size") or getattr(generation_config, "prefill_chunk_size", None)
        if chunk and self.config.text_ngram_rows and chunk < text_slices(self.config.given)[-1].stop:
            raise InputError(f"prefill_chunk_size is {chunk}, which ends before or inside of a text. Leave it out.")
        self.rotations(self.device)  # before any compiled call: a CUDA graph that computes the tables would overwrite them in its next run
        processors = [*(logits_processor or []), PadToVocabulary(self.config.vocab_size)]
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **unused) -> torch.Tensor | None:
        """The attention mask, unchanged. `forward` masks by position, so `generate` does not have to build a mask for static caches."""
        return attention_mask

    def init_continuous_batching(self, *args, **kwargs):
        """Raises InputError. `generate` with cache_implementation "paged" calls this; otherwise it would log an error and return nothing."""
        raise InputError("A grid_transformer does not support continuous batching (cache_implementation 'paged'): all sequences have the same length "
                         "and start together. Use 'static' or 'dynamic'.")

    @can_return_tuple
    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, past_key_values: Cache | None = None,
                labels: torch.Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | torch.Tensor = 0,
                output_hidden_states: bool | None = None, num_items_in_batch: torch.Tensor | int | None = None,
                places: torch.Tensor | None = None, targets: torch.Tensor | None = None, **others) -> CausalLMOutputWithPast:
        """Logits (B, S, K) for ids (B, S), or for the last `logits_to_keep` positions (if it is a tensor, for the positions in it).

        `labels` (B, S), usually the ids themselves, add the loss: the mean cross-entropy, in float32, of predicting labels[:, s + 1] at position s.
        Labels of -100 are ignored. The first label, which is the class, is not predicted. With `num_items_in_batch`, the loss is the sum divided by
        that number. With labels, no cache is returned by default.

        `past_key_values` may be any cache of transformers without a sliding window. `output_hidden_states` returns the embedded ids and the output
        of each block, the last one after the final norm. `return_dict=False` returns a tuple. `attention_mask` must be all ones, because all
        sequences have the same length.

        A model with `query_blocks` takes tokens in any order: `places` (B, S) are the places of the ids, -1 for the class, and `targets` (B, Q)
        the places to predict. Without a cache, Q is S, and target s is predicted from the first s + 1 ids. With a cache, each target is predicted
        from all ids in the cache and all new ones.

        Raises ValueError for zeros in the attention mask, for labels that are not codes, and for arguments that are not supported.
        """
        output_hidden_states = check_call(self.config, input_ids, attention_mask, labels, logits_to_keep, output_hidden_states, others)
        assert input_ids is not None
        length, device = input_ids.shape[1], input_ids.device
        is_checkpointing = self.training and any(block.gradient_checkpointing for block in self.blocks)
        past_key_values = choose_cache(self.config, past_key_values, length, use_cache, labels, is_checkpointing)
        check_targets(self.config, input_ids, places, targets, labels, past_key_values)
        past_length, num_keys = count_keys(past_key_values, length)
        check_texts(self.config, past_length)
        positions_S = new_positions(past_length, length, device)
        classes_B, is_start = self.starting_classes(input_ids, past_length)
        mask_SS = causal_mask(positions_S, past_length, length, num_keys)                             # S, keys
        mask_1S = mask_of_all(past_length, length, num_keys, device)                                  # before a block changes past_length
        if self.keys_and_values is None:
            x_BSD = self.embed_ids(input_ids, positions_S)
            rotations = select_rotations(self.rotations(device), positions_S, past_length, length)
        else:
            places = positions_S - 1 if places is None else places
            x_BSD, rotations = self.embed_placed_ids(input_ids, places), self.token_rotations(places)
        if classes_B is not None:
            x_BSD = self.add_text_embeddings(x_BSD, input_ids, is_start)
        hidden_states: list[torch.Tensor] | None = [] if output_hidden_states else None
        for block in self.blocks[:self.config.num_token_blocks]:
            if hidden_states is not None:
                hidden_states.append(x_BSD)
            x_BSD = block(x_BSD, input_ids, classes_B, rotations, mask_SS, is_start, past_key_values=past_key_values)
        if self.keys_and_values is not None:
            is_causal = targets is None or past_key_values is None
            mask_QS = mask_SS if is_causal else mask_1S
            x_BSD = self.predict(x_BSD, input_ids, positions_S if targets is None else targets, rotations, mask_QS, is_causal, past_key_values,
                                 hidden_states)
        x_BSD = self.final_norm(x_BSD)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep    # -0 keeps all
        logits_BSK = self.head(x_BSD[:, kept])                                                        # B, S, K
        loss = None if labels is None else self.loss_function(logits_BSK, labels, vocab_size=self.config.num_codes,
                                                              num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSK, past_key_values=past_key_values,
                                      hidden_states=None if hidden_states is None else (*hidden_states, x_BSD))

    def token_rotations(self, places: torch.Tensor) -> torch.Tensor:
        """The rotations (..., 2, p, 2) of tokens at these places (...) in the token blocks: those of their own place, for queries too."""
        return self.rotations(places.device)[places + 1][..., 1:, :, :].expand(*places.shape, 2, -1, -1)

    def predict(self, x_BSD: torch.Tensor, ids_BS: torch.Tensor, targets: torch.Tensor, rotations: torch.Tensor, mask_QS: torch.Tensor | None,
                is_causal: bool, past_key_values: Cache | None, hidden_states: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The stream (B, Q, D) of the queries for target places (B, Q), or (Q,), after the query blocks.

        `x_BSD` is the stream of tokens `ids_BS` after the token blocks, and `rotations` are those of their places. Appends the input of each block
        to `hidden_states`, if given.
        """
        assert self.keys_and_values is not None
        keys, values = self.keys_and_values(x_BSD, rotations[..., 1, :, :])
        if past_key_values is not None and not self.config.query_embeddings:  # all query blocks share a layer of the cache
            keys, values = past_key_values.update(keys, values, self.config.num_token_blocks)
        x_BQD = self.to_stream(self.position_embedding(targets).expand(len(x_BSD), -1, -1))
        query_rotations = self.rotations(targets.device)[targets][..., 0, :, :]
        for block in self.blocks[self.config.num_token_blocks:]:
            if hidden_states is not None:
                hidden_states.append(x_BQD)
            x_BQD = block(x_BQD, ids_BS, keys, values, query_rotations, mask_QS, is_causal, past_key_values=past_key_values)
        return x_BQD

    def embed_ids(self, ids_BS: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
        """The sum of the embeddings of the ids and of the places to predict (B, S, D): the start of the residual stream in raster order."""
        return self.to_stream(self.token_embedding(ids_BS) + self.position_embedding(targets_S))

    def embed_placed_ids(self, ids_BS: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The sum of the embeddings of the ids and of their places (B, S, D): the start of the residual stream in any order."""
        assert self.place_embedding is not None
        return self.to_stream(self.token_embedding(ids_BS) + self.place_embedding(places + 1))

    def add_text_embeddings(self, x_BSD: torch.Tensor, ids_BS: torch.Tensor, is_start: torch.Tensor | None = None) -> torch.Tensor:
        """The start of the residual stream (B, S, D) with the embeddings of n-grams at the places of texts. `ids_BS` start with the class.

        If `is_start`, a bool scalar on the device, is False, the ids do not start with the class, and nothing is added.
        """
        if self.text_embedding is None:
            return x_BSD
        for part in text_slices(self.config.given):
            text_BLD = self.text_embedding(ids_BS[:, part])
            text_BLD = text_BLD if is_start is None else text_BLD * is_start
            before, after = part.start, x_BSD.shape[1] - part.start - text_BLD.shape[1]
            if text_BLD.shape[1]:
                x_BSD = x_BSD + F.pad(text_BLD, (0, 0, before, after)).to(x_BSD.dtype)
        return x_BSD

    def to_stream(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Embeddings with dropout, in the dtype of the residual stream."""
        x_BSD = dropout(x_BSD, self.config.embd_pdrop, self.training)
        if x_BSD.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            x_BSD = x_BSD.bfloat16()  # halves the memory traffic of each block; not measured on GPUs
        return x_BSD

    def starting_classes(self, ids_BS: torch.Tensor, past_length: int | torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The arguments `classes_B` and `is_start` of GridBlock.forward."""
        is_start = past_length == 0 if isinstance(past_length, torch.Tensor) else None
        classes_B = (ids_BS[:, 0] - self.config.num_codes).clamp_min(0) if is_start is not None or past_length == 0 else None
        return classes_B, is_start


AutoConfig.register(MODEL_TYPE, GridTransformerConfig)
AutoModelForCausalLM.register(GridTransformerConfig, GridTransformer)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = GridTransformer.__name__  # otherwise the Trainer's label smoothing does not shift labels
