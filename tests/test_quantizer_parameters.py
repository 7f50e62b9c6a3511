"""Codes of a quantizer are neither averaged nor decayed. Its other parameters are averaged and decayed like network weights."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.quantizers import QUANTIZERS
from stage1_tokenizer.tokenizer import ImageTokenizer
from tests.tiny import tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import QUANTIZER_NAMES
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training.training_run import TrainingRun

KINDS = {
    # quantizer: (its fields, parameters that are codes, parameters that are weights of the network)
    "ema": ({}, set(), set()),
    "gradient": ({}, {"codebook"}, set()),
    "simvq": ({}, {"projection"}, set()),
    "ibq": ({}, {"codebook"}, set()),
    "gumbel": ({}, {"codebook"}, {"to_logits.weight", "to_logits.bias"}),
    "fsq": ({"codebook_size": 40}, set(), {f"project_{way}.{name}" for way in ("in", "out") for name in ("weight", "bias")}),
    "lfq": ({}, set(), {f"project_{way}.{name}" for way in ("in", "out") for name in ("weight", "bias")}),
    "residual": ({"residual_kind": "gradient", "residual_depth": 2}, {"levels.0.codebook", "levels.1.codebook"}, set()),
    "kl": ({}, set(), {"projection.weight", "projection.bias"}),
}
LEARNING = [kind for kind, (_, codes, weights) in KINDS.items() if codes | weights]
WITH_LAYERS = [kind for kind, (_, _, weights) in KINDS.items() if weights]


def recipe_of(kind: str, run_dir, **training):
    fields = {f"tokenizer__{name}": value for name, value in ({"quantizer": kind} | KINDS[kind][0]).items()}
    return tiny_recipe(run_dir, **fields, **{f"tokenizer_training__{name}": value for name, value in training.items()})


def tokenizer_of(recipe) -> ImageTokenizer:
    return ImageTokenizer(recipe.tokenizer, ImageTransform(image_size=recipe.data.image_size, channels=recipe.data.channels))


def test_every_kind_is_listed():
    assert set(KINDS) == set(QUANTIZER_NAMES) == set(QUANTIZERS)


@pytest.mark.parametrize("kind", KINDS)
def test_codebook_parameters_lists_all_codes(kind, tmp_path):
    tokenizer = tokenizer_of(recipe_of(kind, tmp_path))
    code_ids = {id(parameter) for parameter in tokenizer.codebook_parameters()}
    names = dict(tokenizer.quantizer.named_parameters())
    codes = {name for name, parameter in names.items() if id(parameter) in code_ids}
    assert (codes, names.keys() - codes) == KINDS[kind][1:]
    assert len(code_ids) == len(codes), "all codes belong to the quantizer"


@pytest.mark.parametrize("kind", LEARNING)
def test_weight_average_averages_layers_and_copies_codes(kind, tmp_path):
    decay, steps = 0.15, 3
    train_tokenizer.train(recipe_of(kind, tmp_path, max_steps=steps, checkpoint_every=1, keep_checkpoints=steps, weight_ema_decay=decay,
                                    max_minutes="null", warmup_fraction=0, learning_rate=0.01))
    _, codes, layer_names = KINDS[kind]
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, steps + 1):
        checkpoint = RunFolder(tmp_path).checkpoints("tokenizer") / f"step-{step:08d}"
        live, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "weights_ema"))
        warmed = min(decay, step / (9 + step))  # (1 + n) / (10 + n) at update n, counted from 0; update 0 copies
        for name in (f"quantizer.{name}" for name in codes | layer_names):
            is_copied = step == 1 or name.removeprefix("quantizer.") in codes
            expected[name] = live[name] if is_copied else torch.lerp(expected[name], live[name], 1 - warmed)
            torch.testing.assert_close(average[f"module.{name}"], expected[name], rtol=1e-6, atol=1e-7)
    for name in layer_names:
        assert not torch.equal(average[f"module.quantizer.{name}"], live[f"quantizer.{name}"])
    for name in codes:
        assert torch.equal(average[f"module.quantizer.{name}"], live[f"quantizer.{name}"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", LEARNING)
def test_weight_decay_applies_to_layer_matrices_only(kind, optimizer, tmp_path):
    """A step with zero gradients changes weights by decay only."""
    recipe = recipe_of(kind, tmp_path, optimizer=optimizer, weight_decay=0.5, learning_rate=0.1, warmup_fraction=0, gradient_clip=1)
    tokenizer = tokenizer_of(recipe)
    run = TrainingRun(recipe, "tokenizer", recipe.tokenizer_training, StopFlag())
    run.prepare(tokenizer)
    before = {name: parameter.detach().clone() for name, parameter in tokenizer.quantizer.named_parameters()}
    for parameter in tokenizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    accepted, _, learning_rate = run.optimizer_step(torch.zeros(()), progress=0.0)
    run.end()
    assert accepted
    for name, parameter in tokenizer.quantizer.named_parameters():
        is_decayed = name in KINDS[kind][2] and parameter.ndim == 2
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * learning_rate if is_decayed else 1))


def test_muon_updates_layers_but_not_codes(tmp_path):
    for kind in LEARNING:
        recipe = recipe_of(kind, tmp_path / kind, optimizer="muon")
        tokenizer = tokenizer_of(recipe)
        run = TrainingRun(recipe, "tokenizer", recipe.tokenizer_training, StopFlag())
        run.prepare(tokenizer)
        orthogonal = {id(parameter) for parameter in run.optimizers[0].param_groups[0]["params"]}
        run.end()
        assert {name for name, parameter in tokenizer.quantizer.named_parameters() if id(parameter) in orthogonal} == \
            {name for name in KINDS[kind][2] if name.endswith(".weight")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", WITH_LAYERS)
def test_checkpoint_with_layers_grouped_as_codes_is_refused(kind, optimizer, tmp_path, monkeypatch):
    """Its optimizer state has other parameter groups."""
    with monkeypatch.context() as patched:
        patched.setattr(ImageTokenizer, "codebook_parameters", lambda self: list(self.quantizer.parameters()))
        train_tokenizer.train(recipe_of(kind, tmp_path, max_steps=2, optimizer=optimizer))
    with pytest.raises(InputError, match=r"step-00000002 does not fit this recipe: .*group.*--redo tokenizer"):
        train_tokenizer.train(recipe_of(kind, tmp_path, max_steps=3, optimizer=optimizer))


def test_quantizers_without_layers_resume_older_checkpoints(tmp_path, monkeypatch):
    for kind in ("gradient", "simvq"):
        with monkeypatch.context() as patched:
            patched.setattr(ImageTokenizer, "codebook_parameters", lambda self: list(self.quantizer.parameters()))
            train_tokenizer.train(recipe_of(kind, tmp_path / kind, max_steps=2))
        train_tokenizer.train(recipe_of(kind, tmp_path / kind, max_steps=3))


@pytest.mark.parametrize("kind", LEARNING)
def test_replica_check_requires_equal_codes_but_not_equal_layers(kind, tmp_path):
    tokenizer, seen = tokenizer_of(recipe_of(kind, tmp_path)), []

    def check() -> None:
        """Compare the parameters with those of earlier calls, which stand for other ranks."""
        gather = SimpleNamespace(device=torch.device("cpu"), gather=lambda own: seen.append(own) or torch.cat(seen))
        train_tokenizer.check_replicas_agree(tokenizer, SimpleNamespace(world_size=2, accelerator=gather, state=SimpleNamespace(step=0)))

    def change(names: set[str]) -> None:
        with torch.no_grad():
            for name in names:
                tokenizer.quantizer.get_parameter(name).add_(1e-6)

    check()
    change(KINDS[kind][2])
    check()
    if KINDS[kind][1]:
        change(KINDS[kind][1])
        with pytest.raises(RuntimeError, match="differ at step 0"):
            check()


def test_quantizer_layers_are_linear(tmp_path):
    """All parameters outside of linear layers must be listed as codes, which a new quantizer could forget."""
    for kind in KINDS:
        quantizer = tokenizer_of(recipe_of(kind, tmp_path)).quantizer
        codes = {id(parameter) for parameter in quantizer.codebook_parameters()}
        for module in quantizer.modules():
            assert isinstance(module, nn.Linear) or all(id(parameter) in codes for parameter in module.parameters(recurse=False))
