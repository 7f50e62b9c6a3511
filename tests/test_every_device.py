"""Training steps, sampling steps and decoding keep all tensors on one device. Without a GPU, this is tested on the `meta` device, which has no data.

Each case runs on three devices: on `meta`, on the CPU, which shows that the case itself works, and on CUDA (`make test-gpu`). DATA_DEPENDENT
lists what cannot run on `meta`, with the reason; it runs on the CPU and on CUDA. Branches for `device.type == "cuda"` run on CUDA only.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import StaticCache

from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator
from stage1_tokenizer.adversarial.discriminator_training import Adversary
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.losses import RECONSTRUCTION_LOSSES, reconstruction_loss
from stage1_tokenizer.perceptual import LPIPS
from stage1_tokenizer.perceptual_weights import PerceptualWeights
from stage1_tokenizer.quantizers.operations.nearest_code import full_precision
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage1_tokenizer.tokenizer_setup import measure_step_seconds
from stage1_tokenizer.trainable.codebook_usage import CodeCounts
from stage1_tokenizer.trainable.hierarchical_tokenizer import HierarchicalTokenizer
from stage2_prior.generation.decoding import ReferenceDecoder, StaticDecoder
from stage2_prior.generation.guidance import combine_levels
from stage2_prior.generation.known_models import KnownGridTransformer, KnownLlama
from stage2_prior.generation.logit_differences import largest_logit_difference, step_logits
from stage2_prior.generation.passes import OrderedPasses
from stage2_prior.generation.sampling import draw_ids
from stage2_prior.losses import next_token_loss, z_loss
from stage2_prior.model.causal_lm import check_causal
from stage2_prior.model.grid_transformer import GridTransformer
from stage2_prior.prior import TokenPrior
from stage2_prior.prior_setup import time_and_loss_of_one_step
from stage2_prior.token_batches import TrainingBatch
from tests.one_device import WrongDevice, one_device
from tests.test_decoding import GRIDS, TWO_GRIDS, make_prior
from tests.tiny import make_tiny_run
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.recipes.tokenizer_sections import QUANTIZER_NAMES, AdversarialConfig, TokenizerConfig
from vqmosaic.runs.devices import default_device
from vqmosaic.training.muon import Muon, orthogonalize
from vqmosaic.training.training_run import TrainingRun
from vqmosaic.training.weight_averaging import make_average

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TOKENIZER = {"codebook_size": 64, "code_dim": 5, "latent_channels": 16, "channels": 32, "channel_multipliers": [1, 1], "residual_blocks": 1}
SIZE, ROWS = 16, 4
CASES: dict[str, Callable[[torch.device], object]] = {}
"""Cases for every device, by name. A case returns the tensors, modules and losses that must be on its device."""
DATA_DEPENDENT: dict[str, tuple[Callable[[torch.device], object], str]] = {}
"""Cases that need data, with the reason."""


def case(*variants: dict, reason: str | None = None):
    """Registers a function of a device, once for each variant (keyword arguments). With a reason, it is registered as data-dependent."""
    def register(function):
        for variant in variants or ({},):
            words = ",".join(f"{key}={value}" for key, value in variant.items())
            name, bound = f"{function.__name__}({words})", functools.partial(function, **variant)
            if reason is None:
                CASES[name] = bound
            else:
                DATA_DEPENDENT[name] = bound, reason
        return function
    return register


def tokenizer_on(device: torch.device, **fields) -> ImageTokenizer:
    return ImageTokenizer(TokenizerConfig(**TOKENIZER | fields), ImageTransform(SIZE, 3), None).to(device)


def images_on(device: torch.device) -> torch.Tensor:
    return (torch.rand(ROWS, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(device)


def ids_on(device: torch.device, prior: TokenPrior) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) of the smallest grid's codes, and classes (B,), one of them the null class."""
    ids_BT = torch.randint(6, (ROWS, prior.vocabulary.num_tokens), generator=torch.Generator().manual_seed(2))
    return ids_BT.to(device), torch.tensor([0, 1, 2, -1]).to(device)


def autocast_on(device: torch.device, wanted: bool):
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def clip_gradients(model: nn.Module) -> torch.Tensor:
    """The norm of the gradients before they are clipped to a norm of 0.5. Like TrainingRun._clip, but without the check that needs data."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
    return norm


def random_lpips(device: torch.device) -> LPIPS:
    """The perceptual loss with random weights instead of those of files."""
    def weights_for(file, expected: dict[str, torch.Tensor], ignored=()) -> dict[str, torch.Tensor]:
        return random_weights(tuple((name, tuple(tensor.shape)) for name, tensor in expected.items()))

    with patch("stage1_tokenizer.perceptual._read_weights", weights_for):
        return LPIPS(PerceptualWeights("vgg16", "linear")).to(device)


@functools.cache
def random_weights(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, torch.Tensor]:
    """Weights by name, with a variance that keeps features finite."""
    return {name: torch.randn(shape) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5 for name, shape in shapes}


# --- the tokenizer -----------------------------------------------------------------------------------------------------------

KINDS = [{"quantizer": kind} for kind in QUANTIZER_NAMES]
KINDS_WITH_IDS = [kind for kind in KINDS if kind["quantizer"] != "kl"]
OPTIONS = [{"quantizer": "ema", option: True} for option in ("l2_normalize", "rotation_trick", "diveq")]
OPTIONS += [{"quantizer": "residual", "residual_kind": "simvq", "residual_shared": False, "l2_normalize": True}]


@case(*KINDS, *OPTIONS, {"quantizer": "ema", "in_bf16": True}, {"quantizer": "gumbel", "in_bf16": True}, {"block": "convnext"}, {"patch_size": 2},
      {"attention_levels": [1], "middle_attention": True}, {"attention_levels": [1], "in_bf16": True}, {"dropout": 0.1},
      *({"loss": name} for name in RECONSTRUCTION_LOSSES))
def tokenizer_training_step(device, loss="l1", in_bf16=False, **fields):
    tokenizer, images_BCHW = tokenizer_on(device, **fields).to(memory_format=torch.channels_last).train(), images_on(device)
    tokenizer.quantizer.set_progress(0.5)
    with autocast_on(device, in_bf16):
        output = tokenizer(images_BCHW.contiguous(memory_format=torch.channels_last))
    total = reconstruction_loss(loss, output.reconstructions, images_BCHW) + output.quantizer.loss
    total.backward()
    norm = clip_gradients(tokenizer)
    tokenizer.quantizer.discard()
    return tokenizer, output.reconstructions, output.quantizer.quantized, output.quantizer.ids, total, norm


ADVERSARIES = [{"loss": loss} for loss in ("hinge", "vanilla", "non_saturating")]
ADVERSARIES += [{"balance": "fixed"}, {"norm": "none", "spectral_norm": True}, {"augmentations": ["color", "translation", "cutout"]}]


@case(*ADVERSARIES, {"in_bf16": True})
def vq_gan_training_step(device, in_bf16=False, **settings):
    tokenizer, images_BCHW = tokenizer_on(device).train(), images_on(device)
    config = AdversarialConfig(weight=0.5, layers=1, channels=16, **settings)
    discriminator, perceptual = PatchDiscriminator(config, 3, seed=0).to(device), random_lpips(device)
    adversary = Adversary(config, discriminator, discriminator, tokenizer.decoder.last_layer, lambda: autocast_on(device, in_bf16))
    with autocast_on(device, in_bf16):
        output = tokenizer(images_BCHW)
    reconstruction = reconstruction_loss("l1", output.reconstructions, images_BCHW) + perceptual(output.reconstructions, images_BCHW)
    added, generator_metrics = adversary.generator_terms(images_BCHW, output.reconstructions, reconstruction, 0.5, 0.3)
    (reconstruction + output.quantizer.loss + added).backward()
    with autocast_on(device, in_bf16):
        discriminator_loss, discriminator_metrics = adversary.discriminator_terms(images_BCHW, output.reconstructions)
    discriminator_loss.backward()
    norms = clip_gradients(tokenizer), clip_gradients(discriminator)
    discriminator.commit()
    return tokenizer, discriminator, perceptual, *generator_metrics.values(), *discriminator_metrics.values(), *norms


@case({"channels_last": True, "parts": "all"}, {"channels_last": False, "parts": "decoder"})
def measured_step(device, channels_last, parts):
    tokenizer, config = tokenizer_on(device), AdversarialConfig(weight=0.5, layers=1, channels=16)
    discriminator = PatchDiscriminator(config, 3, seed=0).to(device)
    run = SimpleNamespace(training=SimpleNamespace(accumulation_steps=2, channels_last=channels_last, train_parts=parts), unwrapped=tokenizer,
                          optimizers=[], accelerator=SimpleNamespace(device=device, backward=lambda loss: loss.backward()))
    adversary = Adversary(config, discriminator, discriminator, tokenizer.decoder.last_layer)
    measure_step_seconds(tokenizer, adversary, random_lpips(device), SimpleNamespace(images_BCHW=images_on(torch.device("cpu"))), run)
    return tokenizer, discriminator


@case({}, {"in_bf16": True})
def step_with_two_levels(device, in_bf16=False):
    config = TokenizerConfig(kind="hierarchical", top={"codebook_size": 16}, **TOKENIZER)
    tokenizer, images_BCHW = HierarchicalTokenizer(config, ImageTransform(SIZE, 3)).to(device).train(), images_on(device)
    with autocast_on(device, in_bf16):
        output = tokenizer(images_BCHW)
    (reconstruction_loss("l1", output.reconstructions, images_BCHW) + output.quantizer_loss).backward()
    tokenizer.discard()
    counts = CodeCounts(tokenizer.quantizers, device)
    ids = tokenizer.encode(images_BCHW)
    return tokenizer, output.reconstructions, *ids.values(), *counts.counts.values(), clip_gradients(tokenizer)


@case(*KINDS, *OPTIONS)
def codebook_initialization(device, **fields):
    tokenizer = tokenizer_on(device, **fields)
    tokenizer.quantizer.initialize(torch.randn(50, 5).to(device))  # fewer vectors than codes
    tokenizer.quantizer.initialize(torch.randn(300, 5).to(device))
    return tokenizer


@case(*({"quantizer": kind} for kind in ("ema", "gradient", "ibq", "residual")), {"quantizer": "residual", "residual_shared": False})
def commit_with_a_cpu_counter(device, **fields):
    """Counting and revival after a step, without the one check that needs data."""
    tokenizer = tokenizer_on(device, **fields).train()
    for module in tokenizer.quantizer.modules():
        if hasattr(module, "commits"):
            module.commits = torch.zeros((), dtype=torch.int64)
    for _ in range(2):  # two micro-batches
        tokenizer(images_on(device))
    tokenizer.quantizer.commit()
    return tokenizer


@case(*KINDS_WITH_IDS)
def images_to_ids(device, **fields):
    return tokenizer_on(device, **fields).encode(images_on(device))


@case({})
def reconstruction_without_ids(device):
    return tokenizer_on(device, quantizer="kl").reconstruct(images_on(device))


@case(*KINDS_WITH_IDS)
def ids_to_images(device, **fields):
    """ImageTokenizer.decode without the check that needs data."""
    tokenizer = tokenizer_on(device, **fields)
    with torch.inference_mode():
        ids = torch.zeros(ROWS, *tokenizer.grid_shape, dtype=torch.int64).to(device)
        return tokenizer.decode_latents({"image": tokenizer.quantizer.ids_to_latents(ids)})


@case({"dtype": torch.float32}, {"dtype": torch.bfloat16})
def orthogonal_updates(device, dtype):
    return orthogonalize([torch.randn(2, 4, 9).to(device, dtype), torch.randn(1, 6, 4).to(device, dtype)])


# --- the prior ---------------------------------------------------------------------------------------------------------------

PRIORS = [{"architecture": "llama"}, {"architecture": "grid_transformer"}, {"architecture": "grid_transformer", "embedding_blocks": 0},
          {"architecture": "grid_transformer", "any_order": True}]


@case(*PRIORS, *(prior | {"checkpointing": True} for prior in PRIORS), *(prior | {"in_bf16": True} for prior in PRIORS),
      *(prior | {"grids": 2} for prior in PRIORS[:2]), {"architecture": "gpt2"})
def prior_training_step(device, architecture, checkpointing=False, in_bf16=False, grids=1, **options):
    prior = make_prior(architecture, TWO_GRIDS if grids == 2 else GRIDS, **options).to(device).train()
    if checkpointing:
        prior.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids_BT, classes_B = ids_on(device, prior)
    with autocast_on(device, in_bf16):
        logits_BTK = prior(ids_BT, classes_B)
    loss = next_token_loss(logits_BTK, ids_BT) + 1e-4 * z_loss(logits_BTK)
    loss.backward()
    return prior, logits_BTK, loss, clip_gradients(prior), prior.loss(ids_BT)


def vocabulary_ids(device: torch.device, prior: TokenPrior) -> torch.Tensor:
    """Ids (B, 1 + T) of the model: a class, then codes."""
    ids_BT, classes_B = ids_on(device, prior)
    return torch.cat([prior.vocabulary.condition_ids(classes_B)[:, None], ids_BT], dim=1)


@case(*PRIORS)
def training_step_with_labels(device, architecture, **options):
    prior = make_prior(architecture, **options).to(device).train()
    ids_BS = vocabulary_ids(device, prior)
    output = prior.model(input_ids=ids_BS, labels=ids_BS, output_hidden_states=True)
    output.loss.backward()
    return prior, output.loss, output.logits, *output.hidden_states


CUTS = [(1, 2, 3), (4, 7)]


@case(*({**prior, "cuts": cuts} for prior in PRIORS[1:] for cuts in CUTS))
@case(*({**PRIORS[0], "cuts": cuts} for cuts in CUTS), reason="In transformers, Llama checks whether a static cache is empty.")
def steps_with_the_static_cache_of_transformers(device, architecture, cuts, **options):
    prior = make_prior(architecture, **options).to(device)
    cache = StaticCache(config=prior.model.config, max_cache_len=10)
    with torch.inference_mode():
        return [prior.model(input_ids=part, past_key_values=cache, use_cache=True).logits
                for part in vocabulary_ids(device, prior).tensor_split(cuts, dim=1)]


def sampling_steps(device: torch.device, prior: TokenPrior, decoder: ReferenceDecoder | StaticDecoder,
                   is_recorded: bool = False) -> list[torch.Tensor]:
    """Sampling with guidance: half of the rows have a class. Like sample_tokens, but without the check that needs data."""
    vocabulary, drawn = prior.vocabulary, []
    sampling = SamplingConfig(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01)
    ids_N = vocabulary.condition_ids(torch.tensor([0, 1, -1, -1]).to(device))
    for position, (start, stop) in enumerate(vocabulary.position_ranges()):
        if position == 5:
            decoder.keep_first(2)
        step_position = torch.full((1,), position, device=device) if is_recorded and position else position
        logits_NK = decoder.step(ids_N[:decoder.rows], step_position)[:, start:stop].float()
        logits_BK = combine_levels(logits_NK.chunk(2)[::-1], [2.0]) if decoder.rows == 4 else logits_NK[:2]
        drawn.append(draw_ids(logits_BK, torch.rand(2, dtype=torch.float64).to(device), sampling))
        ids_N = vocabulary.to_vocabulary_at(position, drawn[-1].repeat(2))
    return drawn


@case({}, {"is_recorded": True}, {"decoder": "reference"}, {"grids": 2})
def passes_in_any_order(device, is_recorded=False, decoder="static", grids=1):
    """Several tokens per pass with guidance. With `is_recorded`, one token per pass and the position on the device, as for CUDA graphs."""
    prior = make_prior("grid_transformer", TWO_GRIDS if grids == 2 else GRIDS, any_order=True).to(device)
    vocabulary, length = prior.vocabulary, prior.vocabulary.num_tokens
    known_BT = torch.full((2, length), -1).to(device)
    orders_BT = torch.stack([torch.randperm(length), torch.randperm(length)]).to(device)
    with torch.inference_mode():
        made = StaticDecoder(KnownGridTransformer(prior.model, 4, length), 4, length) if decoder == "static" else ReferenceDecoder(prior.model, 4)
        start_N1 = vocabulary.condition_ids(torch.tensor([0, 1, -1, -1]).to(device))[:, None]
        passes, results = OrderedPasses(made, vocabulary, start_N1, known_BT, orders_BT, [1] * length if is_recorded else [1, 3, length - 4]), []
        if is_recorded:
            original = made.predict
            made.predict = lambda *inputs: original(*inputs[:3], torch.full((1,), inputs[3], device=device) if inputs[3] else 0)
        while passes.remaining:
            logits_NmK, places_Bm = passes.predict()
            ids_Bm = logits_NmK[:2].argmax(dim=-1)
            passes.accept(ids_Bm, logits_NmK[:2])
            results += [logits_NmK, places_Bm, ids_Bm]
    return prior, *results, passes.ids_BT


STATIC = [*PRIORS, {"architecture": "llama", "num_key_value_heads": 2}]


@case(*STATIC, *(prior | {"is_recorded": True} for prior in STATIC), *(prior | {"dtype": torch.bfloat16} for prior in STATIC[:2]),
      *(prior | {"grids": 2} for prior in PRIORS[:2]))
def sampling_steps_with_static_decoder(device, architecture, is_recorded=False, dtype=torch.float32, grids=1, **options):
    """With `is_recorded`, the position is on the device, as for CUDA graphs."""
    prior = make_prior(architecture, TWO_GRIDS if grids == 2 else GRIDS, **options).to(device, dtype)
    with torch.inference_mode():
        length = prior.vocabulary.num_tokens
        model = (KnownLlama(prior.model, prior.vocabulary.num_codes, 4, length) if architecture == "llama"
                 else KnownGridTransformer(prior.model, 4, length))
        decoder = StaticDecoder(model, 4, length)
        return *sampling_steps(device, prior, decoder, is_recorded), decoder.cache.keys, decoder.cache.values


@case(*PRIORS, {"architecture": "gpt2"})
def sampling_steps_through_the_model(device, architecture, **options):
    prior = make_prior(architecture, **options).to(device)
    with torch.inference_mode():
        return sampling_steps(device, prior, ReferenceDecoder(prior.model, 4))


@case(*PRIORS)
def logits_of_given_ids(device, architecture, **options):
    prior = make_prior(architecture, **options).to(device)
    return step_logits(prior, ids_on(torch.device("cpu"), prior)[0], [0, 1, 2, -1])


# --- data-dependent cases ----------------------------------------------------------------------------------------------------


@case(*KINDS_WITH_IDS[:3], {"quantizer": "ibq"}, {"quantizer": "residual"}, reason="The number of commits decides which latents may revive codes.")
def codebook_commit(device, **fields):
    tokenizer = tokenizer_on(device, **fields).train()
    for _ in range(2):  # two micro-batches
        tokenizer(images_on(device))
    tokenizer.quantizer.commit()
    return tokenizer


@case(*KINDS_WITH_IDS, reason="The smallest and the largest id are compared with the codebook.")
def decode(device, **fields):
    tokenizer = tokenizer_on(device, **fields)
    return tokenizer.decode(tokenizer.encode(images_on(device)))


@case(*PRIORS, reason="The first and the last logits are checked for non-finite values.")
def sample(device, architecture, **options):
    sampling = SamplingConfig(guidance_scale=2.0, guidance_interval=[0.0, 0.5], temperature=0.9, top_p=0.9)
    return make_prior(architecture, **options).to(device).sample([0, 1], sampling, seeds=[1, 2], compile=True)


@case(*({**prior, "cache": cache} for prior in PRIORS for cache in ("dynamic", "static")),
      reason="transformers checks after each token whether all sequences have ended.")
def generate(device, architecture, cache, **options):
    prior = make_prior(architecture, **options).to(device)
    return prior.model.generate(vocabulary_ids(device, prior)[:, :1], cache_implementation=cache, disable_compile=True)


@case(*PRIORS, reason="The difference is returned as a number.")
def logit_difference(device, architecture, **options):
    prior = make_prior(architecture, **options).to(device)
    largest_logit_difference(prior, prior, ids_on(device, prior)[0], [0, 1, 2, -1])


@case(*PRIORS, reason="The logits of two sequences are compared.")
def causality_check(device, architecture, **options):
    check_causal(make_prior(architecture, **options).to(device).model, architecture)


@case(*PRIORS, reason="The first loss is returned as a number.")
def measured_step_and_loss(device, architecture, **options):
    prior = make_prior(architecture, **options).to(device)
    run = SimpleNamespace(training=SimpleNamespace(accumulation_steps=2, z_loss=1e-4, order="raster"),
                          optimizers=[SimpleNamespace(zero_grad=lambda **how: None)],
                          accelerator=SimpleNamespace(device=device, backward=lambda loss: loss.backward(), reduce=lambda value, how: value))
    ids_BT, classes_B = ids_on(torch.device("cpu"), prior)
    orders_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    time_and_loss_of_one_step(prior, TrainingBatch(ids_BT, classes_B, ids_BT, ids_BT[:, :0], orders_BT), run)
    return prior


@case({}, reason="The norm of the gradients is compared with the limit.")
def clipping(device):
    tokenizer = tokenizer_on(device)
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.1)
    tokenizer(images_on(device)).reconstructions.square().sum().backward()
    run = SimpleNamespace(training=SimpleNamespace(gradient_clip=1e-3), is_sharded=False,
                          accelerator=SimpleNamespace(unscale_gradients=lambda: None))
    return tokenizer, TrainingRun._clip(run, optimizer)


@case({}, reason="torch checks whether this is the first update.")
def weight_average(device):
    tokenizer = tokenizer_on(device)
    average = make_average(tokenizer, 0.99)
    average.update_parameters(tokenizer)
    average.update_parameters(tokenizer)
    return average


@case({"muon": False}, {"muon": True}, reason="torch has no fused AdamW for `meta`.")
def optimizer_step(device, muon):
    tokenizer = tokenizer_on(device)
    matrices = [parameter for parameter in tokenizer.parameters() if parameter.ndim >= 2 and muon]
    rest = [{"params": [parameter for parameter in tokenizer.parameters() if parameter.ndim < 2 or not muon]}]
    for parameter in tokenizer.parameters():
        parameter.grad = torch.ones_like(parameter)
    (Muon(matrices, rest, lr=0.1) if muon else torch.optim.AdamW(rest, fused=True)).step()
    return tokenizer


# --- the tests ---------------------------------------------------------------------------------------------------------------


def tensors_of(result: object) -> list[torch.Tensor]:
    """All tensors of a case's result, with the parameters, buffers and gradients of its modules."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, nn.Module):
        weights = list(result.parameters())
        return [*weights, *result.buffers(), *(weight.grad for weight in weights if weight.grad is not None)]
    return [tensor for part in result for tensor in tensors_of(part)] if isinstance(result, tuple | list) else []


def run_on(function: Callable[[torch.device], object], name: str) -> None:
    """Run a case on a device. Tensors on another device are an error."""
    device = torch.device(name)
    torch.manual_seed(0)
    with one_device(device):
        result = function(device)
    # scalars may be on the CPU, such as the counter of AveragedModel
    assert {tensor.device.type for tensor in tensors_of(result) if tensor.dim()} <= {device.type}


@pytest.mark.parametrize("device", ["meta", "cpu", CUDA])
@pytest.mark.parametrize("name", CASES)
def test_case_stays_on_one_device(name, device):
    run_on(CASES[name], device)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_data_dependent_case_stays_on_one_device(name, device):
    run_on(DATA_DEPENDENT[name][0], device)


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_data_dependent_case_fails_on_meta(name):
    """A case that works on `meta` belongs to CASES."""
    # Reading data from `meta` raises different types for different operators in torch, so the message is checked too.
    with pytest.raises((RuntimeError, NotImplementedError, ValueError), match=r"(?i)meta|supported devices") as error:
        run_on(DATA_DEPENDENT[name][0], "meta")
    assert not isinstance(error.value, WrongDevice)


@pytest.mark.gpu
@pytest.mark.slow
def test_complete_run_on_a_gpu(tmp_path):
    """Includes validation, checkpoints and images, which the cases omit."""
    assert default_device().type == "cuda"
    make_tiny_run(tmp_path)


# --- tests of the check ------------------------------------------------------------------------------------------------------

FACTORIES = [
    ("arange", "tokenizer_training_step(quantizer=ema)"), ("arange", "prior_training_step(architecture=grid_transformer)"),
    ("zeros", "codebook_initialization(quantizer=ema)"), ("empty", "tokenizer_training_step(quantizer=ema)"),
    ("ones", "tokenizer_training_step(quantizer=lfq)"), ("rand", "vq_gan_training_step(augmentations=['color', 'translation', 'cutout'])"),
    ("randint", "vq_gan_training_step(augmentations=['color', 'translation', 'cutout'])"),
]


@pytest.mark.parametrize(("factory", "name"), FACTORIES)
def test_tensor_created_without_a_device_is_detected(factory, name):
    """Simulates source code that omits the argument `device`."""
    original = getattr(torch, factory)

    def factory_without_device(*args, device=None, **kwargs):
        return original(*args, **kwargs)

    # Either OneDevice reports mixed devices, or torch refuses to copy a `meta` tensor to the CPU first.
    with patch(f"torch.{factory}", factory_without_device), pytest.raises((WrongDevice, NotImplementedError), match=r"cpu and meta|copy out of meta"):
        run_on(CASES[name], "meta")


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_weights_left_on_another_device_are_detected(architecture):
    def forward_with_cpu_norm(device: torch.device) -> torch.Tensor:
        prior = make_prior(architecture).to(device)
        model = prior.model if architecture == "grid_transformer" else prior.model.model
        norm = model.final_norm if architecture == "grid_transformer" else model.norm
        norm.to("cpu") if device.type != "meta" else norm.to_empty(device="cpu")
        return prior(ids_on(device, prior)[0])

    with pytest.raises(WrongDevice, match="cpu and meta"):
        run_on(forward_with_cpu_norm, "meta")


def test_cached_tables_on_another_device_are_detected():
    rotations = GridTransformer.rotations
    with patch.object(GridTransformer, "rotations", lambda self, device: rotations(self, torch.device("cpu"))):
        for name in ("prior_training_step(architecture=grid_transformer)", "sampling_steps_with_static_decoder(architecture=grid_transformer)"):
            with pytest.raises(WrongDevice, match="cpu and meta"):
                run_on(CASES[name], "meta")


class BackwardWithoutDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones(gradient.shape)


MIXED_OPERATIONS = {
    "sum": lambda here, there: here(3) + there(3),
    "product": lambda here, there: here(2, 2) @ there(2, 2),
    "convolution": lambda here, there: F.conv2d(here(1, 2, 4, 4), there(3, 2, 3, 3)),
    "embedding": lambda here, there: F.embedding(there(2).long(), here(5, 3)),
    "index": lambda here, there: here(5)[there(2).long()],
    "index_copy": lambda here, there: here(5, 2).index_copy_(0, there(1).long(), here(1, 2)),
    "index_select": lambda here, there: here(5).index_select(0, there(1).long()),
    "gather": lambda here, there: here(2, 3).gather(1, there(2, 1).long()),
    "searchsorted": lambda here, there: torch.searchsorted(here(2, 3), there(2, 1)),
    "where": lambda here, there: torch.where(there(3).bool(), here(3), here(3)),
    "cat": lambda here, there: torch.cat([here(2), there(2)]),
    "mask": lambda here, there: F.scaled_dot_product_attention(*(here(1, 2, 3, 4) for _ in range(3)), attn_mask=there(3, 3).bool()),
    "scalar in a list": lambda here, there: torch.stack([here(), there()]),
    "gradient": lambda here, there: BackwardWithoutDevice.apply(here(3).requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", MIXED_OPERATIONS)
def test_mixed_devices_raise_an_error(name):
    with one_device(torch.device("meta")), pytest.raises(WrongDevice, match="cpu and meta"):
        MIXED_OPERATIONS[name](lambda *shape: torch.ones(shape, device="meta"), lambda *shape: torch.ones(shape))


def test_copies_and_scalars_from_the_cpu_are_allowed():
    with one_device(torch.device("meta")):
        here = torch.ones(3).to("meta")
        here.copy_(torch.ones(3))
        assert (here * torch.tensor(2.0)).is_meta and torch.where(here > 0, torch.tensor(1.0), here).is_meta
        here[0] = torch.tensor(2.0)


def test_full_precision_sets_cuda_flags():
    """They can be set without a GPU."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    with full_precision(torch.device("cuda")):
        assert [flag.fp32_precision for flag in flags] == ["ieee", "ieee"]
    assert [flag.fp32_precision for flag in flags] == before
