"""The prior with tiny models: initialization, configuration, dropout, saving and loading, training batches."""

import dataclasses
import functools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from stage2_prior.digests import write_digests
from stage2_prior.prior import TokenPrior
from stage2_prior.token_batches import TokenBatches, rank_slice, validation_batches, validation_samples
from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from tests.run_files import change_weights
from tests.tiny_priors import TWO_GRIDS, VOCABULARY, random_batch, tiny_prior
from token_shards import Grid, ShardSetHeader, TokenShardReader, TokenShardWriter, default_key
from vqmosaic.errors import InputError

TRANSFORMERS_MODELS = ["llama", "gpt2", "qwen3"]
ARCHITECTURES = [*TRANSFORMERS_MODELS, "grid_transformer"]


# --- initialization and loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [32, 512])
def test_initial_loss_is_near_ln_k(architecture, width):
    prior = tiny_prior(architecture, width=width).eval()
    with torch.no_grad():
        assert prior.loss(*random_batch()).item() == pytest.approx(math.log(48), rel=0.02)


def test_logits_depend_only_on_the_class_and_previous_ids():
    prior = tiny_prior().eval()
    ids_BT, _ = random_batch(size=2)
    ids_BT[1] = ids_BT[0]
    ids_BT[1, 4] = (ids_BT[0, 4] + 1) % 48
    with torch.no_grad():
        logits_BTK = prior(ids_BT, torch.tensor([1, 1]))
        other_class_BTK = prior(ids_BT, torch.tensor([2, NO_CLASS]))
    assert logits_BTK.shape == (2, 9, 48)
    differs_T = (logits_BTK[0] - logits_BTK[1]).abs().amax(dim=1) > 1e-6
    assert differs_T.tolist() == [False] * 5 + [True] * 4  # id 4 is first an input when id 5 is predicted
    assert ((logits_BTK - other_class_BTK).abs().amax(dim=(1, 2)) > 1e-6).all()
    torch.testing.assert_close(prior(ids_BT), prior(ids_BT, torch.tensor([NO_CLASS, NO_CLASS])))


def test_loss_with_two_grids():
    prior = tiny_prior(vocabulary=TWO_GRIDS).eval()
    ids_BT, _ = random_batch(TWO_GRIDS, size=5)
    with torch.no_grad():
        logits_BTK, loss = prior(ids_BT), prior.loss(ids_BT)
    assert logits_BTK.shape == (5, 6, 32) and torch.isinf(logits_BTK[:, :2, 8:]).all() and torch.isfinite(logits_BTK[:, 2:]).all()
    expected = -logits_BTK.log_softmax(-1).gather(2, ids_BT[:, :, None]).mean()
    torch.testing.assert_close(loss, expected)
    assert loss.item() == pytest.approx((2 * math.log(8) + 4 * math.log(32)) / 6, rel=0.02)


def test_loss_is_float32_with_gradients_for_every_weight():
    prior = tiny_prior().to(torch.bfloat16)
    loss = prior.loss(*random_batch())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prior.parameters())


def test_weights_depend_on_the_seed_and_keep_the_global_rng_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = tiny_prior(seed=1), tiny_prior(seed=1), tiny_prior(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.model.get_output_embeddings().weight, other.model.get_output_embeddings().weight)


def test_training_lowers_the_loss():
    prior = tiny_prior(dropout=0.0)
    ids_BT, classes_B = random_batch(size=8)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = prior.loss(ids_BT, classes_B)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


# --- configuration -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "expected"), [
    ("llama", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96,
               "max_position_embeddings": 10, "vocab_size": 52, "tie_word_embeddings": False, "attention_dropout": 0.1, "use_cache": True}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 10, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    ("qwen3", {"hidden_size": 32, "head_dim": 16, "num_key_value_heads": 2, "attention_dropout": 0.1}),
])
def test_sizes_reach_the_configuration(architecture, expected):
    config = tiny_prior(architecture).model.config
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_options_override_sizes():
    prior = tiny_prior(options={"num_key_value_heads": 1, "intermediate_size": 40, "attention_dropout": 0.0})
    assert prior.model.config.num_key_value_heads == 1 and prior.model.model.layers[0].mlp.gate_proj.weight.shape == (40, 32)
    assert tiny_prior("gpt2", options={"hidden_size": 64}).model.config.n_embd == 64


@pytest.mark.parametrize(("changes", "words"), [
    ({"architecture": "lama"}, "Nearest: .*llama"),
    ({"architecture": "vit"}, "causal language models"),
    ({"options": {"num_key_value_head": 1}}, "Did you mean 'num_key_value_heads'"),
    ({"options": {"vocab_size": 7}}, "is set from the tokens"),
    ({"options": {"max_position_embeddings": 9}}, "allows 9 positions; .* need 10"),
    ({"options": {"intermediate_size": "wide"}}, "intermediate_size"),
    ({"options": {"num_attention_heads": 3}}, "does not accept these sizes or prior.options: (?s:.*)attention heads"),
    ({"heads": 32}, "even number"),
    ({"architecture": "xlnet"}, "later"),
    ({"architecture": "mamba"}, "cannot be set: its configuration has no"),
])
def test_invalid_configurations_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        tiny_prior(**changes)


# --- dropout -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_active_only_in_training_and_adds_no_weights(architecture):
    prior = tiny_prior(architecture, dropout=0.5)
    batch = random_batch(size=4)
    assert prior.training and not torch.equal(prior(*batch), prior(*batch))
    prior.eval()
    assert torch.equal(prior(*batch), prior(*batch))
    torch.testing.assert_close(prior(*batch), tiny_prior(architecture, dropout=0.0).eval()(*batch), rtol=0, atol=0)
    unmodified = AutoModelForCausalLM.from_config(prior.model.config)
    assert list(prior.model.state_dict()) == list(unmodified.state_dict())


@pytest.mark.parametrize("architecture", TRANSFORMERS_MODELS)
def test_dropout_is_applied_once_to_embeddings_and_each_block(architecture):
    # without dropout of attention weights, which can zero the whole row of the first position
    no_attention_dropout = {"attn_pdrop" if architecture == "gpt2" else "attention_dropout": 0.0}
    prior = tiny_prior(architecture, dropout=0.25, options=no_attention_dropout)
    outputs = {}

    def save_output(name):
        def hook(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output
        return hook

    attention, feed_forward = ("attn", "mlp") if architecture == "gpt2" else ("self_attn", "mlp")
    layers = prior.model.transformer.h if architecture == "gpt2" else prior.model.model.layers
    embedded = prior.model.transformer.drop if architecture == "gpt2" else prior.model.get_input_embeddings()
    embedded.register_forward_hook(save_output("embedded"))
    for number, layer in enumerate(layers):
        getattr(layer, attention).register_forward_hook(save_output(f"attention {number}"))
        getattr(layer, feed_forward).register_forward_hook(save_output(f"feed-forward {number}"))
    prior(*random_batch(size=64))
    assert len(outputs) == 5
    for name, output in outputs.items():  # dropout once zeroes 25 %; twice would zero 44 %
        assert (output == 0).float().mean().item() == pytest.approx(0.25, abs=0.02), name


def test_dropout_without_matching_blocks_is_refused(monkeypatch):
    monkeypatch.setattr("stage2_prior.model.causal_lm.BLOCK_NAMES", ("mlp",))
    with pytest.raises(InputError, match=r"2 attention and feed-forward blocks were found instead of 4\. Set prior\.dropout 0"):
        tiny_prior(dropout=0.1)
    tiny_prior(dropout=0.0)


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saving_and_loading_is_bit_exact(tmp_path, architecture):
    prior, batch = tiny_prior(architecture).eval(), random_batch(size=4)
    prior.save_pretrained(tmp_path / "prior")
    loaded = TokenPrior.from_pretrained(tmp_path / "prior")
    assert not loaded.training and loaded.vocabulary == VOCABULARY and loaded.num_parameters == prior.num_parameters
    assert torch.equal(loaded(*batch), prior(*batch))
    files = {"config.json", "digests.json", "generation_config.json", "model.safetensors", "vocabulary.json"}
    assert {path.name for path in (tmp_path / "prior").iterdir()} == files
    loaded.save_pretrained(tmp_path / "prior")  # over the same folder
    assert {path.name for path in (tmp_path / "prior").iterdir()} == files
    assert torch.equal(TokenPrior.from_pretrained(tmp_path / "prior", device="cpu")(*batch), prior(*batch))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_of_transformers_returns_only_codes(tmp_path, architecture, capfd):
    tiny_prior(architecture).save_pretrained(tmp_path)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AutoModelForCausalLM.from_pretrained(tmp_path)
            for class_id in (VOCABULARY.class_id(1), VOCABULARY.null_id):
                ids_BS = model.generate(torch.full((256, 1), class_id))
                assert ids_BS.shape == (256, 1 + 9)
                assert ids_BS[:, 1:].min() == 0 and ids_BS[:, 1:].max() == 47
    finally:
        transformers_logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_weights_are_saved_in_float32_and_can_be_loaded_in_bfloat16(tmp_path):
    prior = tiny_prior().to(torch.bfloat16).eval()
    prior.save_pretrained(tmp_path)
    assert prior.model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.float32
    assert TokenPrior.from_pretrained(tmp_path).model.dtype == torch.float32
    loaded = TokenPrior.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    # not exactly equal: `.to` also casts the rotary frequencies, while loading keeps them in float32
    torch.testing.assert_close(loaded(*random_batch(size=4)), prior(*random_batch(size=4)), rtol=0, atol=0.01)
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("change", "words"), [
    (lambda weights: weights.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
    (lambda weights: weights.update(stray=torch.zeros(2)), "unexpected: stray"),
    (lambda weights: weights.update({"model.norm.weight": torch.ones(33)}), r"shape: model\.norm\.weight \(33,\) instead of \(32,\)"),
    (lambda weights: weights.pop("model.embed_tokens.weight"), r"missing: model\.embed_tokens\.weight"),
])
def test_mismatched_weights_are_listed_and_refused(tmp_path, capfd, change, words):
    tiny_prior().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    write_digests(tmp_path)
    with pytest.raises(InputError, match=words):
        TokenPrior.from_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary.json"])
def test_incomplete_folder_is_refused(tmp_path, name):
    tiny_prior().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match=name):
        TokenPrior.from_pretrained(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    tiny_prior().save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-100])
    write_digests(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        TokenPrior.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing known"}))
    write_digests(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        TokenPrior.from_pretrained(tmp_path)


def test_vocabulary_of_another_size_is_refused(tmp_path):
    tiny_prior().save_pretrained(tmp_path)
    TWO_GRIDS.save(tmp_path)
    write_digests(tmp_path)
    with pytest.raises(InputError, match="52 ids and the vocabulary 41"):
        TokenPrior.from_pretrained(tmp_path)


# --- batches -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_reader(tmp_path_factory):
    """Shards in which sample i has the ids i, i + 1, ... modulo K and the class i modulo 3."""
    @functools.cache
    def make(samples=70, labelled=True):
        folder = tmp_path_factory.mktemp("tokens")
        header = ShardSetHeader(split="train", token_fingerprint="f" * 64, grids=VOCABULARY.grids, views=[{"name": "original"}],
                                class_names=VOCABULARY.class_names if labelled else None, dataset={"name": "made up"}, encoding={},
                                images_per_shard=30, num_sources=samples)
        writer = TokenShardWriter(folder, header)
        for number in range(writer.num_shards):
            with writer.shard(number) as shard:
                for index in header.source_range(number):
                    shard.add(index=index, key=default_key(index), source=str(index), label=index % 3 if labelled else None,
                              ids={"image": (index + np.arange(9)[None]) % 48})
        writer.finish()
        return TokenShardReader(folder, seed=0, window_shards=2)
    return make


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_batches_do_not_depend_on_the_number_of_ranks(make_reader, world_size):
    batches = TokenBatches(make_reader(), VOCABULARY, seed=7, label_drop=0.3)
    for step in range(12):
        ids_BT, classes_B, *_ = batches.batch(step, 32)
        parts = [batches.batch(step, 32, rank, world_size) for rank in range(world_size)]
        assert ids_BT.dtype == classes_B.dtype == torch.int64 and ids_BT.shape == (32, 9)
        assert torch.equal(torch.cat([part[0] for part in parts]), ids_BT)
        assert torch.equal(torch.cat([part[1] for part in parts]), classes_B)


def test_token_noise_replaces_a_fraction_of_inputs_but_no_targets(make_reader):
    clean, noisy = (TokenBatches(make_reader(), VOCABULARY, seed=7, label_drop=0.3, token_noise=noise) for noise in (0.0, 0.25))
    replaced = []
    for step in (0, 1, 200):
        batch = noisy.batch(step, 256)
        assert torch.equal(batch.ids_BT, clean.batch(step, 256).ids_BT) and torch.equal(batch.classes_B, clean.batch(step, 256).classes_B)
        assert torch.equal(clean.batch(step, 256).inputs_BT, batch.ids_BT)
        assert batch.inputs_BT.min() >= 0 and batch.inputs_BT.max() < 48
        assert torch.equal(batch.inputs_BT, torch.cat([noisy.batch(step, 256, rank, 3).inputs_BT for rank in range(3)])), "for any number of ranks"
        replaced.append((batch.inputs_BT != batch.ids_BT).float())
    # 1 of 48 random codes equals the code that it replaces
    assert torch.cat(replaced).mean() == pytest.approx(0.25 * 47 / 48, abs=0.02)
    assert torch.cat(replaced).mean(0).numpy() == pytest.approx(0.25 * 47 / 48, abs=0.06), "equal at every position"
    assert (replaced[0] * replaced[2]).mean() == pytest.approx((0.25 * 47 / 48) ** 2, abs=0.02), "independent in another epoch"
    with pytest.raises(InputError, match=r"prior_training\.token_noise is 1"):
        TokenBatches(make_reader(), VOCABULARY, seed=7, label_drop=0.3, token_noise=1)


def test_label_drop_fraction_and_independence_over_epochs(make_reader):
    reader = make_reader(samples=3000)
    batches = TokenBatches(reader, VOCABULARY, seed=7, label_drop=0.2)
    dropped = [batches.dropped(np.full(3000, epoch), np.arange(3000)) for epoch in range(6)]
    assert [flags.mean() for flags in dropped] == pytest.approx([0.2] * 6, abs=0.03)
    assert (dropped[0] & dropped[1]).mean() == pytest.approx(0.04, abs=0.015)
    assert (dropped[0][1:] & dropped[0][:-1]).mean() == pytest.approx(0.04, abs=0.015), "neighbors are independent"
    again = TokenBatches(reader, VOCABULARY, seed=7, label_drop=0.2).dropped(np.full(3000, 4), np.arange(3000))
    assert (again == dropped[4]).all()
    assert not (TokenBatches(reader, VOCABULARY, seed=8, label_drop=0.2).dropped(np.full(3000, 4), np.arange(3000)) == dropped[4]).all()
    for label_drop, expected in ((0.0, set(range(3))), (1.0, {NO_CLASS})):
        assert set(TokenBatches(reader, VOCABULARY, 7, label_drop).batch(0, 500)[1].tolist()) == expected


def test_batch_larger_than_the_data_spans_epochs(make_reader):
    ids_BT = TokenBatches(make_reader(), VOCABULARY, seed=7, label_drop=0.0).batch(0, 7 * 70).ids_BT
    assert np.bincount(ids_BT[:, 0], minlength=48).tolist() == [14] * 22 + [7] * 26  # samples 48 to 69 have the first ids 0 to 21


def test_unlabelled_data_has_no_class(make_reader):
    vocabulary = Vocabulary(grids=VOCABULARY.grids, class_names=None, token_fingerprint="f" * 64)
    batches = TokenBatches(make_reader(labelled=False), vocabulary, seed=7, label_drop=0.1)
    assert set(batches.batch(3, 32)[1].tolist()) == {NO_CLASS}


@pytest.mark.parametrize(("change", "words"), [
    ({"token_fingerprint": "0" * 64}, r"token fingerprint of the tokens in .* is fff.*, but the prior's vocabulary has 000"),
    ({"class_names": ["ant", "bee", "dog"]}, "class_names of the tokens"),
    ({"grids": [Grid(name="image", codebook_size=49, height=3, width=3)]}, "grids of the tokens"),
])
def test_tokens_that_do_not_match_the_vocabulary_are_refused(make_reader, change, words):
    with pytest.raises(InputError, match=words):
        TokenBatches(make_reader(), dataclasses.replace(VOCABULARY, **change), 0, 0.1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("limit", "expected"), [(None, 70), (50, 50), (1000, 70), (3, 3)])
def test_validation_batches_cover_each_sample_once_with_equal_counts_per_rank(make_reader, world_size, limit, expected):
    per_rank = [list(validation_batches(make_reader(), 16, rank, world_size, limit)) for rank in range(world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert all(0 < len(ids_BT) <= -(-16 // world_size) for batches in per_rank for ids_BT, _, _ in batches)
    in_order = [sample for step in zip(*per_rank, strict=True) for ids_BT, _, _ in step for sample in ids_BT[:, 0].tolist()]
    samples = validation_samples(make_reader(), limit)
    assert len(samples) == expected and in_order == [sample % 48 for sample in samples]
    assert all(NO_CLASS not in classes_B for batches in per_rank for _, classes_B, _ in batches)


def test_rank_slices_are_balanced():
    assert [rank_slice(10, 20, rank, 3) for rank in range(3)] == [(10, 13), (13, 16), (16, 20)]
