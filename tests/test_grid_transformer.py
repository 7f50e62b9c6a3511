"""The GridTransformer: grid positions, class embeddings in every block, kernels, presets, and use with transformers."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stage2_prior.model.causal_lm import make_config
from stage2_prior.model.grid_attention import rotate
from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.model.grid_transformer_config import (
    GridTransformerConfig,
    query_block_sizes,
    rotation_tables,
    split_parameter_budget,
    token_coordinates,
)
from stage2_prior.prior import TokenPrior
from stage2_prior.prior_setup import describe_blocks
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.kernels import matmul_attention
from vqmosaic.kernels.matmul_attention import MAX_MATMUL_LENGTH, can_use_matmul_attention
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.wording import counted

CODES, CLASSES = 11, 3


def config_of(grids=((3, 4, 1),), **changes) -> GridTransformerConfig:
    tokens = sum(height * width * depth for height, width, depth in grids)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "embedding_blocks": 1}
    return GridTransformerConfig(**{"grids": grids, "num_codes": CODES, "vocab_size": CODES + CLASSES + 1, "max_position_embeddings": 1 + tokens,
                                    **sizes, **changes})


def with_perturbed_weights(model: GridTransformer) -> GridTransformer:
    """The model in evaluation mode with perturbed weights, because new blocks add nothing to their inputs."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return model.eval()


ANY_ORDER = {"num_hidden_layers": 4, "query_blocks": 2, "query_embeddings": True, "query_intermediate_size": 48}


def make_model(any_order: bool) -> GridTransformer:
    torch.manual_seed(0)
    return with_perturbed_weights(GridTransformer(config_of(**ANY_ORDER if any_order else {})))


@pytest.fixture(params=[False, True], ids=["raster", "any_order"])
def model(request) -> GridTransformer:
    return make_model(request.param)


def sequences(model: GridTransformer, count: int = 3) -> torch.Tensor:
    """Ids (count, S): a class, then codes."""
    rng = torch.Generator().manual_seed(6)
    codes = torch.randint(CODES, (count, model.config.max_position_embeddings - 1), generator=rng)
    return torch.cat([CODES + torch.arange(count)[:, None] % CLASSES, codes], dim=1)


def test_cached_logits_match_the_full_sequence(model):
    ids_BS = sequences(model)
    full_logits = model(ids_BS, use_cache=False).logits
    for cuts in ([*range(1, ids_BS.shape[1])], [5], [1, 9]):
        cache, parts = None, []
        for part in torch.tensor_split(ids_BS, cuts, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), full_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(ids_BS, logits_to_keep=2).logits, full_logits[:, -2:], rtol=0, atol=1e-5)


def test_attention_is_causal(model):
    ids_BS = sequences(model, 1)
    changed = ids_BS.clone()
    changed[0, 6] = (changed[0, 6] + 1) % CODES
    before, after = model(ids_BS).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert ((before - after)[:, 6:].abs().amax(dim=(0, 2)) > 1e-5).all()


def test_class_embeddings_of_each_block_affect_only_their_class(model):
    """Changing a class embedding of a block changes the logits at every position of images with this class, and of no others."""
    ids_BS = sequences(model)
    before = model(ids_BS).logits
    for block in model.blocks[:2]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            first_class = CODES if block.embeds_all_ids else 0
            other.blocks[block.layer].stream_embedding.weight[first_class + 1] += torch.linspace(-3, 3, 32)
        difference = (other(ids_BS).logits - before).abs().amax(dim=2)
        assert (difference[1] > 1e-4).all() and difference[0].max() == 0 and difference[2].max() == 0


def test_rotary_products_depend_only_on_the_offset_in_the_grid():
    """This includes offsets from the beginning of a row."""
    grids = ((4, 5, 1),)
    rotations_S2p2 = rotation_tables(config_of(grids))
    rng = torch.Generator().manual_seed(7)
    query, key = torch.randn(2, 2 * rotations_S2p2.shape[2], generator=rng)

    def query_key_product(target: int, source: int) -> torch.Tensor:  # the query that predicts token `target` is at the position before it
        return rotate(query, rotations_S2p2[target, 0]) @ rotate(key, rotations_S2p2[source + 1, 1])

    above = torch.stack([query_key_product(row * 5 + column, (row - 1) * 5 + column) for row in range(1, 4) for column in range(5)])
    left = torch.stack([query_key_product(row * 5 + column, row * 5 + column - 1) for row in range(4) for column in range(1, 5)])
    torch.testing.assert_close(above, above[:1].expand_as(above), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left, left[:1].expand_as(left), rtol=1e-4, atol=1e-4)
    assert (above[0] - left[0]).abs() > 1e-2


def test_coordinates_with_several_grids_and_depth():
    places = token_coordinates([[1, 2, 2], [2, 4, 1]])
    assert places[:4].tolist() == [[0.5, 0.5], [0.5, 0.5], [0.5, 2.5], [0.5, 2.5]], "centers of the area that a position of the smaller grid covers"
    assert places[4:].tolist() == [[row, column] for row in range(2) for column in range(4)]


def test_auto_model_loads_a_saved_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, GridTransformer) and torch.equal(loaded(sequences(model)).logits, model(sequences(model)).logits)


def prior_of(grids: list[Grid], any_order: bool = False, **changes) -> TokenPrior:
    vocabulary = Vocabulary(grids=grids, class_names=["a", "b", "c"], token_fingerprint="none", label_drop=0.1)
    settings = {"architecture": "grid_transformer", "width": 32, "layers": 2, "heads": 2, "dropout": 0.0}
    return TokenPrior.from_config(PriorConfig(**(settings | changes)), vocabulary, 0, any_order)


def test_prior_with_two_grids_trains_and_samples(tmp_path):
    prior = prior_of([Grid("coarse", 6, 2, 2), Grid("fine", 11, 2, 2, 2)])
    ids_BT = torch.randint(6, (16, 12), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    first = prior.loss(ids_BT).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = prior.loss(ids_BT, torch.zeros(16, dtype=torch.int64))
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2
    drawn = prior.sample([0, 1], SamplingConfig(guidance_scale=1.5), seeds=[1, 2])
    assert drawn.shape == (2, 12) and drawn[:, :4].max() < 6
    prior.save_pretrained(tmp_path)
    assert torch.equal(TokenPrior.from_pretrained(tmp_path).sample([0, 1], SamplingConfig(guidance_scale=1.5), seeds=[1, 2]), drawn)


def test_generate_returns_only_codes():
    prior = prior_of([Grid("image", 11, 3, 3)]).eval()
    torch.manual_seed(0)
    drawn = prior.model.generate(prior.vocabulary.condition_ids(torch.tensor([0, 2]))[:, None])
    assert drawn.shape == (2, 10) and drawn[:, 1:].max() < 11


def test_activation_checkpointing_does_not_change_gradients():
    gradients = []
    for checkpointing in (False, True):
        prior = prior_of([Grid("image", 11, 3, 3)])
        with_perturbed_weights(prior.model).train()
        if checkpointing:
            prior.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        prior.loss(torch.arange(9)[None].expand(2, 9).contiguous(), torch.tensor([0, 1])).backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_dropout_is_active_only_in_training():
    prior = prior_of([Grid("image", 11, 3, 3)], dropout=0.5)
    with_perturbed_weights(prior.model)
    ids_BT = torch.arange(9)[None]
    assert torch.equal(prior.eval()(ids_BT), prior.eval()(ids_BT)) and not torch.equal(prior.train()(ids_BT), prior.train()(ids_BT))
    assert not any(module._forward_hooks for module in prior.modules())


@pytest.mark.parametrize("changes, words", [
    ({"width": 36, "heads": 6}, "multiple of 4"),
    ({"options": {"max_position_embeddings": 9}}, "allows 9 positions"),
    ({"options": {"max_position_embeddings": 90}}, "need 10"),
    ({"options": {"tie_word_embeddings": True}}, "tie_word_embeddings"),
    ({"options": {"grids": [[3, 3, 1]]}}, "is set from the tokens"),
    ({"options": {"embedding_blocks": 3}}, "embedding_blocks is 3; allowed: 0 to 2"),
    ({"options": {"embedding_blocks": 99}}, "prior.options: embedding_blocks is 99; allowed: 0 to 2, the number of blocks"),
    ({"options": {"embedding_blocks": 99, "intermediate_size": 64}}, "embedding_blocks is 99; allowed: 0 to 2"),
    ({"options": {"embedding_blocks": "many"}}, "embedding_blocks is many; allowed: 0 to 2"),
    ({"options": {"embedding_blocks": -1}}, "embedding_blocks is -1; allowed: 0 to 2"),
])
def test_invalid_configurations_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        prior_of([Grid("image", 11, 3, 3)], **changes)


def test_presets_have_the_expected_number_of_parameters():
    tiny = TokenPrior.from_preset("tiny", codebook_size=512, num_classes=10, num_tokens=64)
    base = TokenPrior.from_preset("B", codebook_size=1024, num_classes=10, num_tokens=256)
    assert 4.8e6 < tiny.num_parameters < 5.2e6 and 85.5e6 < base.num_parameters < 87.5e6
    assert tiny.vocabulary.grids[0].height == 8 and base.vocabulary.num_tokens == 256
    with pytest.raises(InputError, match=r"num_tokens is 60; .* 49 or 64"):
        TokenPrior.from_preset("tiny", codebook_size=512, num_classes=10, num_tokens=60)
    with pytest.raises(InputError, match=r"prior.preset is 'Tiny'"):
        TokenPrior.from_preset("Tiny", codebook_size=512, num_classes=10, num_tokens=64)


@pytest.mark.parametrize(("preset", "known", "own", "llama"), [
    ("B", 111e6, 110_426_880, 110_136_576), ("L", 343e6, 336_139_264, 337_189_888),
    ("XL", 775e6, 750_675_200, 751_328_000), ("XXL", 1.4e9, 1_410_657_792, 1_409_468_928)])
def test_preset_sizes_match_llamagen(preset, known, own, llama):
    """LlamaGen's sizes differ because it rounds feed-forward widths up to larger multiples."""
    vocabulary = Vocabulary(grids=[Grid("image", 16384, 16, 16)], class_names=[*"0123456789"], token_fingerprint="none", label_drop=0.1)
    for architecture, expected in (("grid_transformer", own), ("llama", llama)):
        config, _ = make_config(PriorConfig(architecture=architecture, preset=preset, dropout=0.0), vocabulary)
        with torch.device("meta"):
            prior = TokenPrior(AutoModelForCausalLM.from_config(config), vocabulary)
        assert prior.num_parameters == expected == pytest.approx(known, rel=0.04)


def test_given_sizes_override_the_preset():
    assert PriorConfig(preset="B").sizes == (12, 768, 12)
    assert PriorConfig(preset="B", layers=3).sizes == (3, 768, 12) and PriorConfig().sizes == (6, 256, 4)
    with pytest.raises(InputError, match="replace all of its sizes"):
        PriorConfig(preset="B", layers=3, width=64, heads=2)


def test_prior_can_be_trained_after_sampling(tmp_path):
    """Tables that are cached in inference mode must not break the backward pass."""
    prior_of([Grid("image", 11, 3, 3)]).save_pretrained(tmp_path)
    prior = TokenPrior.from_pretrained(tmp_path)
    prior.sample([0], SamplingConfig(), seeds=[0])
    prior.train().loss(torch.arange(9)[None], torch.tensor([1])).backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())


def test_rotation_matches_in_every_dtype():
    rotations_S2p2 = rotation_tables(config_of())
    heads = torch.randn(2, 13, 2, 3, 16, generator=torch.Generator().manual_seed(8))
    rotated = rotate(heads, rotations_S2p2[:, :, None])
    assert not torch.allclose(rotated, heads) and torch.allclose(rotated.norm(dim=-1), heads.norm(dim=-1))
    rotated_in_float64 = rotate(heads.double(), rotations_S2p2[:, :, None])  # by cosines and sines, as in compiled code
    torch.testing.assert_close(rotated.double(), rotated_in_float64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotate(heads.bfloat16(), rotations_S2p2[:, :, None]).float(), rotated, rtol=0.02, atol=0.03)


def test_matmul_attention_is_used_only_for_short_bf16_sequences_with_gradients():
    short, long = (torch.zeros(1, 2, length, 4, dtype=torch.bfloat16, requires_grad=True) for length in (MAX_MATMUL_LENGTH, MAX_MATMUL_LENGTH + 1))
    assert can_use_matmul_attention(short, short) and not can_use_matmul_attention(long, long) and not can_use_matmul_attention(short, long)
    assert not can_use_matmul_attention(short.detach(), short.detach()) and not can_use_matmul_attention(short.float(), short.float())


def test_cache_filled_with_gradients_can_be_read_without_gradients():
    model = with_perturbed_weights(GridTransformer(config_of()))
    ids_BS = sequences(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        full_logits = model(ids_BS, use_cache=False).logits
        begun = model(ids_BS[:, :5], use_cache=True)
        with torch.no_grad():
            rest = model(ids_BS[:, 5:], past_key_values=begun.past_key_values).logits
    assert (torch.cat([begun.logits, rest], dim=1) - full_logits).abs().max() <= 0.03 * full_logits.abs().max()


def test_gradients_of_long_sequences_match_matmul_attention(monkeypatch):
    """Up to rounding of bf16."""
    model, found = with_perturbed_weights(GridTransformer(config_of())), []
    for longest in (MAX_MATMUL_LENGTH, 4):
        monkeypatch.setattr(matmul_attention, "MAX_MATMUL_LENGTH", longest)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits_BSK = model(sequences(model, 2), use_cache=False).logits
        logits_BSK.float().logsumexp(-1).sum().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_gradients_under_autocast_match_float32():
    """Equal up to rounding of bf16, with attention by matrix products."""
    model = with_perturbed_weights(GridTransformer(config_of()))
    ids_BS = torch.cat([torch.full((4, 1), CODES + 1), torch.randint(CODES, (4, 12), generator=torch.Generator().manual_seed(1))], dim=1)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits_BSK = model(ids_BS, use_cache=False).logits
        assert logits_BSK.dtype == (torch.bfloat16 if enabled else torch.float32)
        torch.nn.functional.cross_entropy(logits_BSK[:, :-1].float().flatten(0, 1), ids_BS[:, 1:].flatten()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() <= 0.05 * exact.norm(), name


def test_forward_hooks_on_embeddings_are_applied(model):
    ids_BS = sequences(model, 2)
    before = model(ids_BS).logits
    for module in (model.token_embedding, model.blocks[1].value_embedding):
        hook = module.register_forward_hook(lambda module, inputs, output: output.flip(-1))
        assert (model(ids_BS).logits - before).abs().max() > 1e-3
        hook.remove()
    with pytest.raises(IndexError, match="out of range"):
        model(ids_BS + 1000)


@pytest.mark.parametrize("layers, width, vocabulary, blocks", [(6, 256, 523, 6), (6, 256, 1035, 3), (12, 768, 1035, 12), (12, 768, 5011, 4),
                                                               (12, 768, 16395, 0), (2, 32, 15, 2), (2, 256, 2011, 0), (2, 256, 700, 1)])
def test_embeddings_and_feed_forward_blocks_share_a_parameter_budget(layers, width, vocabulary, blocks):
    """The number of parameters is at most that of a model without embeddings, and at least 92 % of it."""
    chosen, intermediate = split_parameter_budget(layers, width, vocabulary)
    budget, used = 8 * layers * width**2, 2 * layers * width * intermediate + 2 * chosen * vocabulary * width
    assert chosen == blocks and 0.92 * budget < used <= budget and intermediate >= 1.5 * width


@pytest.mark.parametrize(("any_order", "layer", "kind"), [
    (False, 1, "stream_embedding"), (False, 1, "value_embedding"),
    (True, 1, "stream_embedding"), (True, 1, "value_embedding"), (True, 2, "value_embedding"), (True, 3, "value_embedding"),
])
def test_block_embeddings_affect_only_positions_from_their_token_on(any_order, layer, kind):
    model = make_model(any_order)
    assert [block.embeds_all_ids for block in model.blocks[:2]] == [False, True]
    ids_BS = sequences(model, 1)
    before, token_id = model(ids_BS).logits, int(ids_BS[0, 4])
    with torch.no_grad():
        getattr(model.blocks[layer], kind).weight[token_id] += torch.linspace(-3, 3, 32)
    first = int((ids_BS[0] == token_id).nonzero()[0])
    difference = (model(ids_BS).logits - before).abs().amax(dim=(0, 2))
    assert (difference[:first] == 0).all() and (difference[first:] > 1e-4).all()


def test_number_of_blocks_with_embeddings_can_be_set():
    cases = {(): (2, 112), (("embedding_blocks", None),): (2, 112), (("embedding_blocks", 0),): (0, 128), (("embedding_blocks", 1),): (1, 120),
             (("intermediate_size", 48),): (0, 48), (("intermediate_size", 48), ("embedding_blocks", 2)): (2, 48),
             (("num_hidden_layers", 1),): (1, 112)}
    for options, expected in cases.items():
        config = prior_of([Grid("image", 11, 3, 3)], options=dict(options)).model.config
        assert (config.embedding_blocks, config.intermediate_size) == expected, options
        words = f", embeddings of all ids in {counted(expected[0], 'block')}, feed-forward {expected[1]} wide"
        assert describe_blocks(config) == (words if expected[0] else "")


def test_query_blocks_with_embeddings_have_no_more_parameters():
    for codes, has_embeddings, width in ((11, True, 64), (300, False, 128)):
        config = prior_of([Grid("image", codes, 3, 3)], any_order=True).model.config
        assert (config.query_embeddings, config.query_intermediate_size) == (has_embeddings, width)
        embeddings = " with embeddings of all ids" if has_embeddings else ""
        assert describe_blocks(config).endswith(f", 1 query block{embeddings}, feed-forward {width} wide")
    for vocabulary in (100, 1024):
        sizes = query_block_sizes(256, vocabulary)
        assert sizes["query_embeddings"] and 2 * 256 * sizes["query_intermediate_size"] + 256 * vocabulary <= 8 * 256**2


def test_query_blocks_have_the_embeddings_and_the_width_of_the_options():
    grids = [Grid("image", 11, 3, 3)]
    for options, expected in (({"query_embeddings": False}, (False, 128)), ({"query_intermediate_size": 48}, (True, 48)),
                              ({"query_embeddings": False, "query_intermediate_size": 48}, (False, 48)),
                              ({"query_embeddings": None}, (True, 64)), ({"query_intermediate_size": None}, (True, 64)),
                              ({"query_embeddings": False, "query_intermediate_size": None}, (False, 128))):
        model = prior_of(grids, any_order=True, options=options).model
        assert (model.config.query_embeddings, model.config.query_feed_forward) == expected
        assert (model.blocks[-1].value_embedding is not None, model.blocks[-1].feed_forward_in.out_features) == expected
    with_embeddings = prior_of([Grid("image", 300, 3, 3)], any_order=True, options={"query_embeddings": True}).model
    assert with_embeddings.blocks[-1].value_embedding is not None and with_embeddings.blocks[-1].feed_forward_in.out_features == 64


@pytest.mark.parametrize(("any_order", "options", "words"), [
    (True, {"query_intermediate_size": 0}, "query_intermediate_size is 0 with 1 query_blocks; allowed: a width of at least 1"),
    (True, {"query_intermediate_size": -5}, "query_intermediate_size is -5 with 1 query_blocks"),
    (False, {"query_intermediate_size": 64}, "query_intermediate_size is 64 with 0 query_blocks"),
    (False, {"query_embeddings": True}, "query_embeddings is true, but query_blocks is 0"),
    (True, {"query_embeddings": "yes"}, "query_embeddings is 'yes'; allowed: true or false"),
    (True, {"query_embeddings": 1}, "query_embeddings is 1; allowed: true or false"),
])
def test_impossible_options_of_query_blocks_are_refused(any_order, options, words):
    with pytest.raises(InputError, match=words):
        prior_of([Grid("image", 11, 3, 3)], any_order=any_order, options=options)


def test_embeddings_beyond_the_parameter_budget_are_refused():
    with pytest.raises(InputError, match=r"prior.options: embedding_blocks 2, for 304 ids, .* allowed: 0 to 0, or more with an intermediate_size"):
        prior_of([Grid("image", 300, 3, 3)], options={"embedding_blocks": 2})
    prior_of([Grid("image", 300, 3, 3)], options={"embedding_blocks": 2, "intermediate_size": 64})
    assert split_parameter_budget(12, 768, 16395, 2) == (2, 320)


def test_logits_cover_only_codes(model):
    assert model(sequences(model)).logits.shape == (3, 13, CODES)


def test_loss_under_autocast_is_close_to_float32():
    losses = {}
    for name in ("float32", "bfloat16"):
        prior = prior_of([Grid("image", 11, 3, 3)], options={"embedding_blocks": 1})
        with_perturbed_weights(prior.model).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            loss = prior.loss(torch.arange(9)[None].expand(2, 9).contiguous(), torch.tensor([0, 1]))
        loss.backward()
        losses[name] = loss.item()
        assert all(parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in prior.parameters())
    assert losses["float32"] != losses["bfloat16"] and abs(losses["float32"] - losses["bfloat16"]) < 0.1 * losses["float32"]


def test_error_for_a_folder_without_embeddings_says_what_to_do(tmp_path):
    prior_of([Grid("image", 11, 3, 3)]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["blocks.0.query_key_value.weight"] = weights.pop("blocks.0.attention_in.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "digests.json").unlink()  # older folders have none
    with pytest.warns(UserWarning, match="has no digests.json"), pytest.raises(InputError, match=r"before its blocks had embeddings.* --redo prior"):
        TokenPrior.from_pretrained(tmp_path)
