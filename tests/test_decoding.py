"""Decoders: the static decoder matches the models for all supported options, and modified models use the reference decoder."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from pipelines import ImageGenerationPipeline
from pipelines.command_line import dispatch
from stage2_prior.generation import decoding
from stage2_prior.generation.decoding import GraphDecoder, ReferenceDecoder, StaticDecoder, make_decoder
from stage2_prior.generation.known_models import first_outputs, join_linear_layers
from stage2_prior.generation.logit_differences import largest_logit_difference, step_logits
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from token_shards.manifest import Grid
from vqmosaic.kernels import decoding_products
from vqmosaic.kernels.decoding_products import PackedLinear, can_pack, pack, pack_linear_layers, packed_product
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig

GRIDS = [Grid(name="image", codebook_size=24, height=3, width=3)]
TWO_GRIDS = [Grid(name="coarse", codebook_size=6, height=1, width=2), Grid(name="fine", codebook_size=18, height=2, width=2)]
CLASSES = [0, 2, 1, -1, 0]


def make_prior(architecture="llama", grids=GRIDS, any_order=False, **options):
    vocabulary = Vocabulary(grids=grids, class_names=["ant", "bee", "cat"], token_fingerprint="f" * 64, label_drop=0.1)
    config = PriorConfig(architecture=architecture, width=32, layers=2, heads=4, options=options)
    prior = TokenPrior.from_config(config, vocabulary, 0, any_order).eval()
    perturb_weights(prior)
    return prior


def perturb_weights(prior, seed=0):
    """Add noise to every weight in place, so that norms, biases and zero-initialized matrices affect the logits too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)


def random_ids(prior, rows=5):
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(stop - start, (rows,), generator=generator) for start, stop in prior.vocabulary.position_ranges()], dim=1)


def decoder_of(prior, rows=2):
    with torch.inference_mode():
        return make_decoder(prior.model, prior.vocabulary.num_codes, rows, prior.vocabulary.num_tokens)


FUSED = [
    ("llama", {}), ("llama", {"num_key_value_heads": 2}), ("llama", {"num_key_value_heads": 1, "head_dim": 12}), ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "hidden_act": "gelu"}), ("llama", {"tie_word_embeddings": True}), ("llama", {"rms_norm_eps": 0.3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}), ("grid_transformer", {}),
    ("grid_transformer", {"embedding_blocks": 1}), ("grid_transformer", {"embedding_blocks": 0}), ("grid_transformer", {"any_order": True}),
    ("grid_transformer", {"any_order": True, "query_embeddings": False, "num_hidden_layers": 4}),
]


@pytest.mark.parametrize(("architecture", "options"), FUSED)
@pytest.mark.parametrize("grids", [GRIDS, TWO_GRIDS])
def test_static_decoder_matches_the_model(architecture, options, grids):
    prior = make_prior(architecture, grids, **options)
    assert isinstance(decoder_of(prior), StaticDecoder)
    ids_BT = random_ids(prior)
    assert step_logits(prior, ids_BT, CLASSES)[:, -1].std() > 0.3
    assert largest_logit_difference(prior, prior, ids_BT, CLASSES) < 1e-4


@pytest.mark.parametrize(("query_embeddings", "layers"), [(True, 4), (False, 3)])
def test_query_blocks_without_embeddings_share_a_layer_of_the_cache(query_embeddings, layers):
    prior = make_prior(any_order=True, architecture="grid_transformer", query_embeddings=query_embeddings, num_hidden_layers=4)
    assert (prior.model.config.query_blocks, prior.model.config.num_cache_layers) == (2, layers)
    assert len(decoder_of(prior).cache.keys) == layers
    reference = ReferenceDecoder(prior.model, 1)
    reference.step(torch.tensor([prior.vocabulary.class_id(0)]), 0)
    assert len(reference.cache.layers) == layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("architecture", "options"), [FUSED[0], FUSED[1], *FUSED[-4:]])
def test_positions_as_tensors_match_positions_as_integers(architecture, options, dtype):
    prior = make_prior(architecture, **options).to(dtype)
    ids_BT = random_ids(prior)
    inputs_BT = torch.cat([prior.vocabulary.condition_ids(torch.tensor(CLASSES))[:, None], ids_BT[:, :-1]], dim=1)
    plain, with_tensor_positions = decoder_of(prior, len(CLASSES)), decoder_of(prior, len(CLASSES))
    with torch.inference_mode():
        for position in range(9):
            expected = plain.step(inputs_BT[:, position], position)
            found = with_tensor_positions.step(inputs_BT[:, position], position if position == 0 else torch.tensor([position]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer", "qwen3"])
def test_keep_first_continues_with_the_first_rows(architecture):
    prior = make_prior(architecture)
    ids_BT = random_ids(prior)
    inputs_BT = torch.cat([prior.vocabulary.condition_ids(torch.tensor(CLASSES))[:, None], ids_BT[:, :-1]], dim=1)
    all_rows, first_rows = decoder_of(prior, len(CLASSES)), decoder_of(prior, len(CLASSES))
    with torch.inference_mode():
        for position in range(9):
            expected = all_rows.step(inputs_BT[:, position], position)
            found = first_rows.step(inputs_BT[:first_rows.rows, position], position)
            torch.testing.assert_close(found, expected[:first_rows.rows], rtol=0, atol=1e-5)
            if position == 3:
                first_rows.keep_first(2)
    assert first_rows.rows == 2 and len(found) == 2


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_dropping_null_rows_after_the_guidance_interval_changes_nothing(architecture):
    prior, seeds = make_prior(architecture), [1, 2, 3]
    half, always = SamplingConfig(guidance_scale=3.0, guidance_interval=[0.0, 0.5]), SamplingConfig(guidance_scale=3.0)
    unguided = prior.sample([0, 1, 2], SamplingConfig(), seeds)
    ids_BT, guided = prior.sample([0, 1, 2], half, seeds), prior.sample([0, 1, 2], always, seeds)
    assert torch.equal(ids_BT[:, :5], guided[:, :5])  # positions 0 to 4 of 9 are in the interval
    assert not torch.equal(ids_BT, guided) and not torch.equal(ids_BT, unguided)
    hook = prior.model.register_forward_hook(lambda module, inputs, output: None)  # a hook selects the reference decoder
    assert torch.equal(prior.sample([0, 1, 2], half, seeds), ids_BT)
    hook.remove()


def test_changed_weights_are_used():
    prior = make_prior()
    ids_BT = random_ids(prior)
    first = step_logits(prior, ids_BT, CLASSES)
    for change in (lambda weight: weight.data.mul_(1.5), lambda weight: weight.copy_(weight * 0.5),
                   lambda weight: torch._foreach_mul_([weight], 1.7)):
        with torch.no_grad():
            change(prior.model.model.layers[1].mlp.up_proj.weight)
        changed = step_logits(prior, ids_BT, CLASSES)
        assert (changed - first).abs().max() > 1e-3 and largest_logit_difference(prior, prior, ids_BT, CLASSES) < 1e-4
        first = changed
    prior.to(torch.bfloat16)
    assert (step_logits(prior, ids_BT, CLASSES) - first).abs().max() > 1e-3


def replace_layer_class(prior):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    prior.model.model.layers[0].self_attn.v_proj.__class__ = Adapted


def replace_forward(prior):
    layer = prior.model.model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


@pytest.mark.parametrize("change", [
    replace_layer_class, replace_forward,
    lambda prior: prior.model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + 1),
    lambda prior: prior.model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    lambda prior: prior.model.lm_head.to(torch.float64),
    lambda prior: nn.utils.parametrizations.weight_norm(prior.model.lm_head),
])
def test_modified_models_use_the_reference_decoder(change):
    prior = make_prior()
    assert isinstance(decoder_of(prior), StaticDecoder)
    change(prior)
    assert isinstance(decoder_of(prior), ReferenceDecoder)


def test_autocast_and_other_architectures_use_the_reference_decoder():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(decoder_of(make_prior()), ReferenceDecoder)
    for architecture in ("gpt2", "qwen3"):
        assert isinstance(decoder_of(make_prior(architecture)), ReferenceDecoder)
    dynamic = make_prior(rope_parameters={"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0})
    assert isinstance(decoder_of(dynamic), ReferenceDecoder)


def test_model_in_training_mode_uses_the_static_decoder():
    prior = make_prior().train()
    assert isinstance(decoder_of(prior), StaticDecoder)
    ids_BT = random_ids(prior)
    assert largest_logit_difference(prior, prior, ids_BT, CLASSES) < 1e-4 and prior.model.training


def test_static_decoder_is_used_after_a_training_step():
    prior = make_prior()
    prior.loss(random_ids(prior), torch.tensor(CLASSES)).backward()
    assert isinstance(decoder_of(prior), StaticDecoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33, 130])
def test_packed_products_match_linear(rows, dtype):
    if not can_pack("cpu", dtype):
        pytest.skip("this build of torch or this CPU does not support packed products")
    generator = torch.Generator().manual_seed(0)
    x_NK, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 40), (56, 40), (56,)))
    packed = pack(weight, rows + 1)  # packed for another number of rows, as when null rows are dropped
    for each in (None, bias):
        found = packed_product(dtype)(x_NK, packed, each)
        assert found.shape == (rows, 56) and found.is_contiguous() and found.dtype == dtype
        expected = nn.functional.linear(x_NK.double(), weight.double(), None if each is None else each.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_match_linear_layers(bias):
    if not can_pack("cpu", torch.float32):
        pytest.skip("this build of torch or this CPU does not support packed products")
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 24, bias=bias), torch.randn(4, 3, 16)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear, 12)(x), linear(x))


def test_joined_layers_match_separate_ones():
    """Layers with and without bias, and a layer cut to its first outputs."""
    torch.manual_seed(0)
    layers, x = [nn.Linear(16, 24), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)], torch.randn(4, 1, 16)
    torch.testing.assert_close(join_linear_layers(layers)(x), torch.cat([layer(x) for layer in layers], dim=-1))
    for layer in layers[:2]:
        torch.testing.assert_close(first_outputs(layer, 5)(x), layer(x)[..., :5])


def test_packing_copies_modules_and_shares_weights(monkeypatch):
    """Only layers that become faster are packed, and the original does not change."""
    monkeypatch.setattr(decoding_products, "PACKED_MIN_ELEMENTS", 300)
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Sequential(nn.Linear(24, 8)))
    model.compile()
    packed = pack_linear_layers(model, 4)
    assert isinstance(packed[0], PackedLinear) == can_pack("cpu", torch.float32) and packed[2][0] is model[2][0]
    assert packed[1] is not model[1] and packed[1].weight is model[1].weight and type(model[0]) is nn.Linear
    assert packed._compiled_call_impl is None and model._compiled_call_impl is not None
    x_NK = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(packed(x_NK), model.forward(x_NK))


def test_decoding_with_packed_matrices(monkeypatch):
    monkeypatch.setattr(decoding_products, "PACKED_MIN_ELEMENTS", 0)
    for architecture in ("llama", "grid_transformer"):
        prior = make_prior(architecture)
        assert largest_logit_difference(prior, prior, random_ids(prior), CLASSES) < 1e-4
        sampling = SamplingConfig(guidance_scale=2.0, guidance_interval=[0.2, 0.6])
        prior.sample([0, 1], sampling, [1, 2])


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
@pytest.mark.parametrize("float32_cache", [True, False])
def test_bfloat16_logit_difference_is_small(architecture, float32_cache, monkeypatch):
    if not float32_cache:  # as on a GPU
        monkeypatch.setattr(decoding, "CPU_CACHE_DTYPES", {})
    prior, bf16_prior = make_prior(architecture), make_prior(architecture).to(torch.bfloat16)
    assert decoder_of(bf16_prior).cache.keys.dtype == (torch.float32 if float32_cache else torch.bfloat16)
    difference = largest_logit_difference(bf16_prior, prior, random_ids(prior), CLASSES)
    assert 1e-3 < difference < 0.5


def test_pipeline_uses_sampling_settings_and_reports_the_bfloat16_difference(tiny_run, tmp_path, capsys):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu")
    calls = []
    sample = pipe.prior.sample
    pipe.prior.sample = lambda classes, sampling, *rest, **named: calls.append(sampling) or sample(classes, sampling, *rest, **named)
    out = pipe(["3"], 2, seed=1, guidance_schedule="linear", guidance_interval=(0.1, 0.9), min_p=0.1, guidance_power=3.0)
    expected = {"guidance_schedule": "linear", "guidance_interval": [0.1, 0.9], "min_p": 0.1, "guidance_power": 3.0}
    assert calls == [dataclasses.replace(pipe.sampling, **expected)]
    assert pipe.logit_difference(out.token_ids, out.class_indices) < 1e-4
    assert dispatch(["generate", str(tiny_run), "--classes", "3", "--num", "2", "--out", str(tmp_path), "--dtype", "bfloat16", "--device", "cpu",
                     "--guidance_schedule", "cosine", "--guidance_interval", "0", "0.5", "--min_p", "0.01"]) == 0
    difference = re.search(r"logits of the prior in bfloat16 differ from those in float32 by up to (\S+) \(measured on 2", capsys.readouterr().out)
    assert 0 < float(difference[1]) < 0.5


def test_pipeline_without_newer_sampling_settings_loads(tiny_copy):
    path = tiny_copy / "pipeline" / "pipeline.json"
    content = json.loads(path.read_text())
    content["sampling"] = {name: content["sampling"][name] for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    path.write_text(json.dumps(content))
    assert ImageGenerationPipeline.from_pretrained(tiny_copy, device="cpu").sampling == SamplingConfig(**content["sampling"])


@pytest.mark.gpu
@pytest.mark.parametrize(("architecture", "any_order", "settings"), [
    ("llama", False, {}), ("grid_transformer", False, {}), ("grid_transformer", True, {"order": "random"}),
    ("grid_transformer", True, {"order": "spread", "steps": 6}),
], ids=["llama", "raster", "random order", "several tokens per pass"])
def test_cuda_graph_matches_eager_sampling(architecture, any_order, settings):
    prior = make_prior(architecture, any_order=any_order).to("cuda")
    sampling = SamplingConfig(guidance_scale=2.0, guidance_interval=[0.0, 0.7], **settings)
    with torch.inference_mode():
        assert isinstance(make_decoder(prior.model, 24, 4, 9, compile=True), GraphDecoder)
    expected = prior.sample([0, 1], sampling, [1, 2])
    assert torch.equal(prior.sample([0, 1], sampling, [1, 2], compile=True), expected)
