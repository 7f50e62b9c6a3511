"""save_pretrained writes weights that can be loaded. Otherwise it raises an error that names the weights, and writes nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

from pipelines import ImageGenerationPipeline
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from tests.tiny_priors import random_batch, tiny_prior
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import QUANTIZER_NAMES, TokenizerConfig


def tiny_tokenizer(**fields) -> ImageTokenizer:
    sizes = {"channels": 32, "channel_multipliers": [1, 1], "residual_blocks": 1, "middle_attention": False, "latent_channels": 32,
             "codebook_size": 64, "code_dim": 8}
    return ImageTokenizer(TokenizerConfig(**sizes | fields), ImageTransform(image_size=16, channels=3), ["ant", "bee"], seed=3).eval()


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_and_compare(saved: ImageTokenizer, reference: ImageTokenizer, folder: Path) -> bool:
    saved.save_pretrained(folder)
    loaded, training_only = ImageTokenizer.from_pretrained(folder), reference.training_only_names()
    expected = {name: tensor for name, tensor in reference.state_dict().items() if name not in training_only}
    found = loaded.state_dict()
    return expected.keys() <= found.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Adapter(nn.Module):
    """Wraps a layer and adds a low-rank product, as in peft."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = layer, nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, inputs):
        return self.base_layer(inputs) + self.lora_B(self.lora_A(inputs))


def with_adapter(prior: TokenPrior) -> TokenPrior:
    attention = prior.model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)
    return prior


def quantize_to_int8(module: nn.Module, name: str) -> None:
    """Replace a weight by an int8 buffer, as quantization libraries do."""
    weight = getattr(module, name)
    delattr(module, name)
    module.register_buffer(name, (weight.detach() * 127).to(torch.int8))


# --- harmless changes do not affect saved weights -----------------------------------------------------------------------------


WRAPPINGS = {
    "compiled part": lambda tokenizer: setattr(tokenizer, "decoder", torch.compile(tokenizer.decoder)),
    "compiled layer": lambda tokenizer: setattr(tokenizer.encoder, "conv_in", torch.compile(tokenizer.encoder.conv_in)),
    "compiled in place": lambda tokenizer: tokenizer.decoder.compile(),
    "wrapped twice": lambda tokenizer: setattr(tokenizer, "quant_conv", torch.compile(DataParallel(tokenizer.quant_conv))),
    "several devices": lambda tokenizer: setattr(tokenizer, "decoder", DataParallel(tokenizer.decoder)),
    "average": lambda tokenizer: setattr(tokenizer, "decoder", AveragedModel(tokenizer.decoder)),
    "compiled average": lambda tokenizer: setattr(tokenizer, "decoder", torch.compile(AveragedModel(tokenizer.decoder))),
    "compiled quantizer": lambda tokenizer: setattr(tokenizer, "quantizer", torch.compile(tokenizer.quantizer)),
    "channels last": lambda tokenizer: tokenizer.to(memory_format=torch.channels_last),
    "double": lambda tokenizer: tokenizer.double(),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=list(WRAPPINGS))
def test_wrappers_and_lossless_casts_do_not_change_a_saved_tokenizer(tmp_path, wrap):
    reference, tokenizer = tiny_tokenizer(), tiny_tokenizer()
    wrap(tokenizer)
    assert save_and_compare(tokenizer, reference, tmp_path / "tokenizer")


@pytest.mark.parametrize("kind", QUANTIZER_NAMES)
def test_every_quantizer_can_be_saved_and_loaded(tmp_path, kind):
    tokenizer = tiny_tokenizer(quantizer=kind)
    assert save_and_compare(tokenizer, tokenizer, tmp_path / "tokenizer")


def test_bf16_tokenizer_is_saved_in_float32(tmp_path):
    tokenizer = tiny_tokenizer().to(torch.bfloat16)
    assert save_and_compare(tokenizer, copy.deepcopy(tokenizer).float(), tmp_path / "tokenizer")


def test_tied_weights_of_a_tokenizer_are_saved_separately(tmp_path):
    tokenizer = tiny_tokenizer()
    first, second = [name for name, parameter in tokenizer.named_parameters() if parameter.shape == (32,) and name.endswith("norm1.weight")][:2]
    tokenizer.get_submodule(second.rpartition(".")[0]).weight = tokenizer.get_parameter(first)
    assert save_and_compare(tokenizer, tokenizer, tmp_path / "tokenizer")


def compiled_layer(prior: TokenPrior) -> None:
    prior.model.model.layers[0] = torch.compile(prior.model.model.layers[0])


PRIOR_WRAPPINGS = {
    "compiled": lambda prior: setattr(prior, "model", torch.compile(prior.model)),
    "compiled layer": compiled_layer,
    "compiled in place": lambda prior: prior.model.compile(),
    "several devices": lambda prior: setattr(prior, "model", DataParallel(prior.model)),
    "average": lambda prior: setattr(prior, "model", AveragedModel(prior.model)),
    "double": lambda prior: prior.double(),
    "not contiguous": lambda prior: setattr(prior.model.lm_head, "weight", nn.Parameter(prior.model.lm_head.weight.detach().T.contiguous().T)),
}


@pytest.mark.parametrize("wrap", PRIOR_WRAPPINGS.values(), ids=list(PRIOR_WRAPPINGS))
def test_wrappers_and_lossless_casts_do_not_change_a_saved_prior(tmp_path, wrap):
    reference, prior = tiny_prior().eval(), tiny_prior().eval()
    wrap(prior)
    prior.save_pretrained(tmp_path / "prior")
    assert torch.equal(TokenPrior.from_pretrained(tmp_path / "prior")(*random_batch(size=4)), reference(*random_batch(size=4)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tied_weights_of_a_prior_stay_tied(tmp_path, architecture):
    prior = tiny_prior(architecture, options={"tie_word_embeddings": True}).to(torch.bfloat16).eval()
    prior.save_pretrained(tmp_path / "prior")
    loaded = TokenPrior.from_pretrained(tmp_path / "prior")
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert torch.equal(loaded.model.get_input_embeddings().weight, prior.model.get_input_embeddings().weight.float())


def test_half_precision_layer_is_saved_in_float32(tmp_path):
    prior = tiny_prior().eval()
    prior.model.lm_head.half()
    prior.save_pretrained(tmp_path / "prior")
    assert {parameter.dtype for parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "prior").parameters()} == {torch.float32}


# --- weights that could not be loaded are refused -------------------------------------------------------------------------------------


REFUSED_TOKENIZERS = {
    "parametrized": (lambda tokenizer: parametrizations.weight_norm(tokenizer.decoder.conv_out), "unexpected decoder.conv_out.parametrizations"),
    "other layer": (lambda tokenizer: setattr(tokenizer.decoder, "conv_out", nn.Conv2d(32, 4, 3)), r"decoder.conv_out.bias has shape \(4,\)"),
    "no layer": (lambda tokenizer: setattr(tokenizer, "quant_conv", nn.Identity()), "missing quant_conv.bias"),
    "more": (lambda tokenizer: tokenizer.register_buffer("scale", torch.ones(1)), "unexpected scale"),
    "int8": (lambda tokenizer: quantize_to_int8(tokenizer.decoder.conv_out, "weight"), "decoder.conv_out.weight has dtype int8, not float32"),
    "no values": (lambda tokenizer: tokenizer.decoder.to("meta"), "decoder.conv_in.weight has no values"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED_TOKENIZERS.values(), ids=list(REFUSED_TOKENIZERS))
@pytest.mark.parametrize("exists", [False, True], ids=["new", "over an older one"])
def test_tokenizer_that_could_not_be_loaded_is_not_saved(tmp_path, change, words, exists):
    tokenizer, folder = tiny_tokenizer(), tmp_path / "tokenizer"
    if exists:
        tokenizer.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    fingerprints = tokenizer.token_fingerprint, tokenizer.full_fingerprint
    change(tokenizer)
    with pytest.raises(InputError, match=f"this tokenizer cannot be saved.*{words}"):
        tokenizer.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before and folder.exists() == exists
    assert not list(tmp_path.glob(".partial-*")) and (tokenizer.token_fingerprint, tokenizer.full_fingerprint) == fingerprints


class PrefixedModel(nn.Module):
    """Wraps a model, as in peft. It forwards attributes and adds a prefix to weight names."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


def other_class(prior: TokenPrior) -> None:
    prior.model.__class__ = AutoModelForCausalLM._model_mapping[type(tiny_prior("qwen3").model.config)]


def untied(prior: TokenPrior) -> None:
    prior.model.lm_head.weight = nn.Parameter(prior.model.lm_head.weight.detach() + 1)


REFUSED_PRIORS = {
    "adapter": (with_adapter, {}, r"missing model.layers.0.self_attn.q_proj.weight.*merge_and_unload"),
    "wrapped by an adapter": (lambda prior: setattr(prior, "model", PrefixedModel(prior.model)), {}, "missing lm_head.weight.*and 34 more"),
    "parametrized": (lambda prior: parametrizations.orthogonal(prior.model.lm_head), {}, "unexpected lm_head.parametrizations"),
    "int8": (lambda prior: quantize_to_int8(prior.model.lm_head, "weight"), {}, "lm_head.weight has dtype int8, not float32"),
    "no values": (lambda prior: prior.model.lm_head.to("meta"), {}, "lm_head.weight has no values"),
    "more ids": (lambda prior: setattr(prior.model, "lm_head", nn.Linear(32, 99, bias=False)), {}, r"lm_head.weight has shape \(99, 32\)"),
    "quantized": (lambda prior: setattr(prior.model.config, "quantization_config", {"quant_method": "any"}), {}, "it is quantized"),
    "untied": (untied, {"options": {"tie_word_embeddings": True}}, "lm_head.weight differs from model.embed_tokens.weight"),
    "other class": (other_class, {}, "its model is a Qwen3ForCausalLM, but its configuration would be loaded as a LlamaForCausalLM"),
}


@pytest.mark.parametrize(("change", "fields", "words"), REFUSED_PRIORS.values(), ids=list(REFUSED_PRIORS))
@pytest.mark.parametrize("exists", [False, True], ids=["new", "over an older one"])
def test_prior_that_could_not_be_loaded_is_not_saved(tmp_path, change, fields, words, exists):
    prior, folder = tiny_prior(**fields), tmp_path / "prior"
    if exists:
        prior.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    change(prior)
    with pytest.raises(InputError, match=f"this prior cannot be saved.*{words}"):
        prior.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before and folder.exists() == exists


def test_pipeline_is_saved_without_wrappers_or_refused(tmp_path, tiny_run):
    loaded = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu")
    loaded.tokenizer.decoder = torch.compile(loaded.tokenizer.decoder)
    loaded.prior.model = torch.compile(loaded.prior.model)
    pipe = ImageGenerationPipeline(loaded.tokenizer, loaded.prior, loaded.sampling)
    pipe.save_pretrained(tmp_path / "pipeline")
    reloaded = ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
    assert torch.equal(reloaded("3", 2, seed=1).token_ids, ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu")("3", 2, seed=1).token_ids)
    loaded.prior.register_buffer("stray", torch.ones(1))  # outside of the model, so it is not saved
    loaded.prior.model = nn.Sequential()
    with pytest.raises(InputError, match="this prior cannot be saved"):
        pipe.save_pretrained(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuned_pipeline_is_saved_with_its_new_weights(tmp_path, tiny_run, dtype):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu", dtype=dtype)
    pipe.save_pretrained(tmp_path / "unchanged")
    for part in ("prior", "tokenizer"):
        path = f"pipeline/{part}/model.safetensors"
        assert (tmp_path / "unchanged" / part / "model.safetensors").read_bytes() == (tiny_run / path).read_bytes(), "weights stay float32"
    with torch.no_grad():
        pipe.prior.model.get_input_embeddings().weight.mul_(2)
    pipe.save_pretrained(tmp_path / "changed")
    reloaded = ImageGenerationPipeline.from_pretrained(tmp_path / "changed", device="cpu", dtype=dtype)
    assert torch.equal(reloaded.prior.model.get_input_embeddings().weight, pipe.prior.model.get_input_embeddings().weight)


def test_pipeline_can_be_saved_after_its_source_folder_is_gone(tiny_copy, tmp_path):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_copy, device="cpu")
    images = pipe(class_labels="3", seed=1, output_type="np").images
    (tiny_copy / "pipeline").rename(tmp_path / "elsewhere")
    pipe.save_pretrained(tmp_path / "saved")
    reloaded = ImageGenerationPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert (reloaded(class_labels="3", seed=1, output_type="np").images == images).all()


def test_prior_folder_with_an_adapter_is_refused(tmp_path):
    tiny_prior().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter \(adapter_config.json\)"):
        TokenPrior.from_pretrained(tmp_path)
