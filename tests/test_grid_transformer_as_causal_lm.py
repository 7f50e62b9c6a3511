"""GridTransformer follows the conventions of transformers for caches, labels, outputs and the Trainer, and refuses unsupported arguments."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from stage2_prior.model.grid_transformer import GridTransformer
from tests.test_grid_transformer import ANY_ORDER, CODES, config_of, prior_of, sequences, with_perturbed_weights
from token_shards.manifest import Grid
from vqmosaic.errors import InputError

LENGTH = 13  # ids in a sequence of config_of's grid


KINDS: dict[str, dict] = {"no_block_embeds_ids": {"embedding_blocks": 0}, "one_block_embeds_ids": {"embedding_blocks": 1},
                          "all_blocks_embed_ids": {"embedding_blocks": 2}, "query_block": {"embedding_blocks": 0, "query_blocks": 1},
                          "query_block_and_ids": {"embedding_blocks": 1, "query_blocks": 1}, "query_blocks_with_ids": ANY_ORDER}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request) -> GridTransformer:
    torch.manual_seed(0)
    return with_perturbed_weights(GridTransformer(config_of(**request.param)))


@pytest.fixture(params=[{}, ANY_ORDER], ids=["raster", "any_order"])
def plain_model(request) -> GridTransformer:
    torch.manual_seed(0)
    return with_perturbed_weights(GridTransformer(config_of(**request.param)))


@pytest.fixture(params=[False, True], ids=["raster", "any_order"])
def generating_model(request) -> GridTransformer:
    prior = prior_of([Grid("image", CODES, 3, 4)], any_order=request.param)
    return with_perturbed_weights(prior.model)


# --- caches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [LENGTH, LENGTH + 20])
@pytest.mark.parametrize("cuts", [[*range(1, LENGTH)], [5], [1, 9], [LENGTH - 1]], ids=str)
def test_static_cache_matches_the_full_sequence(model, cuts, room):
    ids_BS = sequences(model)
    full_logits = model(ids_BS, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=room)
    for _ in range(2):  # the second pass overwrites values of the first one
        parts = [model(part, past_key_values=cache).logits for part in torch.tensor_split(ids_BS, cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), full_logits, rtol=0, atol=1e-5)
        cache.reset()


@pytest.mark.parametrize("cuts", [[2, 2], [1, 3], [3]], ids=str)
def test_targets_with_a_static_cache(cuts):
    torch.manual_seed(0)
    any_order = with_perturbed_weights(GridTransformer(config_of(**ANY_ORDER)))
    ids_BS, places_BS = sequences(any_order)[:, :sum(cuts)], torch.arange(-1, sum(cuts) - 1).expand(3, -1)
    static, dynamic = StaticCache(config=any_order.config, max_cache_len=LENGTH + 4), DynamicCache()
    start = 0
    for length in cuts:
        part, targets_BQ = slice(start, start + length), torch.tensor([[7, 5]] * 3)
        found, expected = (any_order(ids_BS[:, part], past_key_values=cache, places=places_BS[:, part], targets=targets_BQ).logits
                           for cache in (static, dynamic))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        start += length


@pytest.mark.slow
def test_step_with_a_static_cache_compiles_without_graph_breaks(model):
    ids_BS = sequences(model)
    full_logits, cache = model(ids_BS, use_cache=False).logits, StaticCache(config=model.config, max_cache_len=LENGTH)
    step = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        parts = [model(ids_BS[:, :1], past_key_values=cache).logits]
        parts += [step(ids_BS[:, position:position + 1], past_key_values=cache).logits for position in range(1, LENGTH)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_logits, rtol=0, atol=1e-5)


GENERATE = {
    "greedy": {}, "drawn": {"do_sample": True}, "beams": {"num_beams": 3}, "returned": {"do_sample": True, "num_return_sequences": 3},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2}, "from_five": {"max_new_tokens": 8, "min_new_tokens": 8},
}


@pytest.mark.parametrize("how", GENERATE)
def test_generate_gives_the_same_ids_with_every_cache(generating_model, how):
    ids_BS = sequences(generating_model)[:, :5 if how == "from_five" else 1]

    def generate(**settings) -> torch.Tensor:
        torch.manual_seed(1)
        return generating_model.generate(ids_BS, **({"do_sample": False} | GENERATE[how] | settings))

    expected = generate(use_cache=False)
    assert expected.shape[1] == LENGTH and expected[:, 1:].max() < CODES
    rows = len(expected)
    caches = {"default": {}, "static": {"cache_implementation": "static"}, "dynamic": {"cache_implementation": "dynamic"},
              "roomy": {"cache_implementation": "static", "max_cache_len": 40},
              "object": {"past_key_values": StaticCache(config=generating_model.config, max_cache_len=LENGTH)},
              "growing": {"past_key_values": DynamicCache()}, "mask": {"attention_mask": torch.ones_like(ids_BS)}}
    if how == "from_five":
        caches |= {"chunks": {"prefill_chunk_size": 2}, "static chunks": {"prefill_chunk_size": 2, "cache_implementation": "static"}}
    found = {name: generate(**settings) for name, settings in caches.items()}
    assert {name: torch.equal(ids, expected) for name, ids in found.items()} == dict.fromkeys(caches, True) and rows == len(found["static"])


@pytest.mark.parametrize("how", ["greedy", "beams", "beams_returned"])
def test_scores_of_generate_match_the_logits(generating_model, how):
    generated = generating_model.generate(sequences(generating_model)[:, :1], do_sample=False, output_scores=True, return_dict_in_generate=True,
                                          **GENERATE[how])
    beams = {} if how == "greedy" else {"beam_indices": generated.beam_indices}
    found = generating_model.compute_transition_scores(generated.sequences, generated.scores, normalize_logits=how == "greedy", **beams)
    expected = generating_model(generated.sequences[:, :-1]).logits.log_softmax(-1).gather(-1, generated.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_generate_with_a_compiled_static_cache(generating_model):
    """On a GPU, generate does this by default."""
    config = CompileConfig(mode="default", fullgraph=True)
    config._compile_all_devices = True
    ids_B1 = sequences(generating_model)[:, :1]
    generated = generating_model.generate(ids_B1, do_sample=False, cache_implementation="static", compile_config=config)
    assert torch.equal(generated, generating_model.generate(ids_B1, do_sample=False, use_cache=False))


@pytest.mark.gpu
@pytest.mark.parametrize("how", GENERATE)
def test_generate_on_a_gpu_gives_the_same_ids_with_every_cache(generating_model, how):
    """On a GPU, steps with a static cache are compiled, and caches can be offloaded."""
    model = generating_model.to("cuda")
    ids_BS = sequences(model)[:, :5 if how == "from_five" else 1].to("cuda")
    caches = {"static": {}, "offloaded_static": {}, "dynamic": {}, "offloaded": {}}
    if how == "from_five":
        caches["static"] = {"prefill_chunk_size": 2}
    for name, settings in caches.items():
        generated = []
        for cache in ({"use_cache": False}, {"cache_implementation": name} | settings):
            torch.manual_seed(1)
            generated.append(model.generate(ids_BS, **({"do_sample": False} | GENERATE[how] | cache)))
        assert torch.equal(*generated), name


def test_continuous_batching_is_refused(generating_model):
    with pytest.raises(InputError, match=r"does not support continuous batching.*same length"):
        generating_model.generate(sequences(generating_model)[:, :1], cache_implementation="paged")


def test_caches_that_cannot_hold_the_sequence_are_refused(plain_model):
    ids_BS = sequences(plain_model)
    filled = plain_model(ids_BS, use_cache=True).past_key_values
    for cache, ids, words in [
        (Cache(layers=[DynamicSlidingWindowLayer(sliding_window=8) for _ in range(2)]), ids_BS, "sliding window.*without a window"),
        (StaticCache(config=plain_model.config, max_cache_len=5), ids_BS, "room for 5 ids, but needs room for 13; use max_cache_len 13"),
        (filled, ids_BS[:, :1], "14 ids, including those in the cache; allowed: 13"),
        (None, ids_BS.repeat(1, 2), "26 ids.*allowed: 13"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), ids_BS, "is a EncoderDecoderCache; allowed"),
        (((ids_BS, ids_BS),), ids_BS, "is a tuple; allowed"),
    ]:
        with pytest.raises(InputError, match=words):
            plain_model(ids, past_key_values=cache)


def test_cache_is_returned_only_when_useful(plain_model):
    ids_BS = sequences(plain_model)
    assert isinstance(plain_model(ids_BS).past_key_values, DynamicCache)
    assert plain_model(ids_BS, labels=ids_BS).past_key_values is None
    assert plain_model(ids_BS, labels=ids_BS, use_cache=True).past_key_values.get_seq_length() == LENGTH
    plain_model.config.use_cache = False
    assert plain_model(ids_BS).past_key_values is None
    cache = plain_model(ids_BS[:, :4], use_cache=True).past_key_values
    continued = plain_model(ids_BS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(continued, plain_model(ids_BS).logits[:, 4:], rtol=0, atol=1e-5)


def test_gradient_checkpointing_refuses_a_cache(plain_model):
    ids_BS, cache = sequences(plain_model), plain_model(sequences(plain_model)[:, :3], use_cache=True).past_key_values
    plain_model.gradient_checkpointing_enable()
    plain_model.train()
    assert plain_model(ids_BS).past_key_values is None
    for settings in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(InputError, match="gradient checkpointing cannot use a cache"):
            plain_model(ids_BS[:, 3:], **settings)
    assert plain_model.eval()(ids_BS[:, 3:], past_key_values=cache).logits.shape[1] == LENGTH - 3


# --- the loss ----------------------------------------------------------------------------------------------------------------


def test_labels_give_the_next_token_loss(plain_model):
    ids_BS = sequences(plain_model)
    output = plain_model(ids_BS, labels=ids_BS)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, plain_model(ids_BS).logits)
    torch.testing.assert_close(plain_model(ids_BS, labels=ids_BS, num_items_in_batch=7).loss, expected * 3 * (LENGTH - 1) / 7)


def test_loss_equals_the_loss_of_the_prior():
    prior = prior_of([Grid("image", CODES, 3, 4)])
    with_perturbed_weights(prior.model)
    ids_BS = sequences(prior.model)
    own = prior.loss(ids_BS[:, 1:], ids_BS[:, 0] - CODES)
    torch.testing.assert_close(prior.model(ids_BS, labels=ids_BS).loss, own)


def test_ignored_labels_and_the_first_label_do_not_count(plain_model):
    ids_BS = sequences(plain_model)
    labels_BS = ids_BS.clone()
    labels_BS[0, 5:] = -100
    output = plain_model(ids_BS, labels=labels_BS)
    losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids_BS[:, 1:], reduction="none")
    torch.testing.assert_close(output.loss, losses[labels_BS[:, 1:] != -100].mean())
    for first in (-100, 0, 12345):
        labels_BS[:, 0] = first
        assert torch.equal(plain_model(ids_BS, labels=labels_BS).loss, output.loss)


@pytest.mark.parametrize(("value", "words"), [(CODES, "labels hold 11 after the first.*codes from 0 to 10, and -100"), (-1, "labels hold -1 ")])
def test_labels_that_are_not_codes_are_refused(plain_model, value, words):
    ids_BS = sequences(plain_model)
    labels_BS = ids_BS.clone()
    labels_BS[1, 3] = value
    with pytest.raises(InputError, match=words):
        plain_model(ids_BS, labels=labels_BS)


def test_labels_of_another_shape_or_with_logits_to_keep_are_refused(plain_model):
    ids_BS = sequences(plain_model)
    with pytest.raises(InputError, match=r"labels have the shape \(3, 12\) and input_ids \(3, 13\)"):
        plain_model(ids_BS, labels=ids_BS[:, 1:])
    with pytest.raises(InputError, match="Both labels and logits_to_keep"):
        plain_model(ids_BS, labels=ids_BS, logits_to_keep=1)


def test_gradient_checkpointing_does_not_change_gradients(plain_model):
    ids_BS, gradients = sequences(plain_model), []
    for checkpointing in (False, True):
        plain_model.zero_grad()
        plain_model.train()
        if checkpointing:
            plain_model.gradient_checkpointing_enable()
        plain_model(ids_BS, labels=ids_BS).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in plain_model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# --- other arguments and outputs ---------------------------------------------------------------------------------------------


def test_attention_mask_of_ones_is_ignored_and_zeros_are_refused(plain_model):
    ids_BS = sequences(plain_model)
    for ones in (torch.ones_like(ids_BS), torch.ones(ids_BS.shape, dtype=torch.bool)):
        assert torch.equal(plain_model(ids_BS, attention_mask=ones).logits, plain_model(ids_BS).logits)
    zeros = torch.ones_like(ids_BS)
    zeros[0, 0] = 0
    for settings in ({}, {"use_cache": False}, {"past_key_values": StaticCache(config=plain_model.config, max_cache_len=LENGTH)}):
        with pytest.raises(InputError, match=r"attention_mask has zeros.*same length"):
            plain_model(ids_BS, attention_mask=zeros, **settings)
    with pytest.raises(InputError, match="attention_mask has 4 dimensions"):
        plain_model(ids_BS, attention_mask=torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool))
    for settings in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        with pytest.raises(InputError, match="attention_mask has zeros"):
            plain_model.generate(ids_BS[:, :4], attention_mask=zeros[:, :4], max_new_tokens=4, **settings)


def test_hidden_states(plain_model):
    ids_BS = sequences(plain_model)
    output = plain_model(ids_BS, output_hidden_states=True)
    states = plain_model.config.num_hidden_layers + 1
    assert [state.shape for state in output.hidden_states] == [(3, LENGTH, 32)] * states
    assert torch.equal(plain_model.head(output.hidden_states[-1]), output.logits)
    places = plain_model.place_embedding if plain_model.predicts_in_any_order else plain_model.position_embedding
    expected = plain_model.token_embedding(ids_BS) + places.weight
    torch.testing.assert_close(output.hidden_states[0], expected)
    assert torch.equal(output.logits, plain_model(ids_BS).logits) and plain_model(ids_BS).hidden_states is None
    kept = plain_model(ids_BS, output_hidden_states=True, logits_to_keep=1)
    assert kept.hidden_states[-1].shape[1] == LENGTH and kept.logits.shape[1] == 1
    plain_model.config.output_hidden_states = True
    assert len(plain_model(ids_BS).hidden_states) == states
    generated = plain_model.generate(ids_BS[:, :1], max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    assert [len(each) for each in generated.hidden_states] == [states, states]


def test_return_dict_and_logits_to_keep(plain_model):
    ids_BS = sequences(plain_model)
    loss, logits = plain_model(ids_BS, labels=ids_BS, return_dict=False)
    expected = plain_model(ids_BS, labels=ids_BS)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    torch.testing.assert_close(plain_model(ids_BS, logits_to_keep=torch.tensor([2, 5])).logits, logits[:, [2, 5]])


@pytest.mark.parametrize(("arguments", "words"), [
    ({"inputs_embeds": torch.zeros(3, 13, 32)}, "inputs_embeds: .*needs input_ids"),
    ({"position_ids": torch.arange(13)[None]}, "position_ids: positions follow"),
    ({"output_attentions": True}, "output_attentions: .*never materialized"),
    ({"temperature": 2}, "temperature: it is unknown"),
    ({"is_causal": False, "cache_position": torch.arange(13)}, "cache_position: it is unknown"),
])
def test_unsupported_arguments_are_refused_by_name(plain_model, arguments, words):
    ids_BS = sequences(plain_model)
    with pytest.raises(InputError, match=f"does not support the argument {words}"):
        plain_model(ids_BS, **arguments)
    assert plain_model(ids_BS, **dict.fromkeys(arguments)).logits.shape == (3, LENGTH, CODES), "None means not given"


def test_output_attentions_in_the_configuration_is_refused():
    model = GridTransformer(config_of(output_attentions=True))
    with pytest.raises(InputError, match="does not support the argument output_attentions"):
        model(sequences(model))
    assert model(sequences(model), output_attentions=False).attentions is None


def test_list_of_hidden_states_is_refused(plain_model):
    with pytest.raises(InputError, match=r"output_hidden_states is \[1\]; allowed: True, .* and False"):
        plain_model(sequences(plain_model), output_hidden_states=[1])


def test_input_ids_are_required(plain_model):
    with pytest.raises(InputError, match="input_ids is missing"):
        plain_model(labels=sequences(plain_model))
    with pytest.raises(InputError, match=r"input_ids is of shape \(13,\)"):
        plain_model(sequences(plain_model)[0])


# --- the Trainer -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "gradient_checkpointing": True}],
                         ids=["plain", "accumulated_and_checkpointed"])
def test_trainer(tmp_path, settings):
    torch.manual_seed(0)
    model = GridTransformer(config_of())
    rows = sequences(model, 8)
    data = [{"input_ids": ids_S, "labels": ids_S, "attention_mask": torch.ones_like(ids_S)} for ids_S in rows]
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), max_steps=30, learning_rate=1e-2, logging_steps=1, save_strategy="no",
                                  report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
                                  **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4} | settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=default_data_collator)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # the loss of a step is the mean over its tokens, for any number of micro-batches
    assert losses[0] == pytest.approx(before, abs=0.02) and losses[-1] < before / 2
    model.eval()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(rows, labels=rows).loss.item(), abs=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert isinstance(loaded, GridTransformer) and torch.equal(loaded(rows).logits, model(rows).logits)


def test_trainer_label_smoothing(tmp_path):
    model = GridTransformer(config_of())
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    rows = sequences(model, 4)
    loss = Trainer(model=model, args=arguments).compute_loss(with_perturbed_weights(model), {"input_ids": rows, "labels": rows})
    logits = model(rows).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, rows[:, 1:].flatten(), label_smoothing=0.1))
