"""Muon: orthogonal updates for the matrices inside a network, AdamW for all else, and trainings with it that resume exactly."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.discriminator import PatchDiscriminator
from stage1_tokenizer.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.tiny import tiny_recipe
from token_shards.manifest import Grid
from vqmosaic import muon
from vqmosaic.interruption import StopFlag
from vqmosaic.muon import Muon, orthogonalized
from vqmosaic.run_folder import RunFolder
from vqmosaic.training_run import TrainingRun, inner_matrices


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5), (1, 1, 7)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ orthogonalized([matrices])[0] @ vh.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_one_direction_stays_bounded(dtype):
    """Its one singular value is the norm, at the edge of what the polynomials are made for, and rounding must not push it over."""
    draw = torch.Generator().manual_seed(5)
    for stack in (torch.randn(400, 1, 576, generator=draw), torch.randn(50, 48, 1, generator=draw) @ torch.randn(50, 1, 64, generator=draw)):
        values = torch.linalg.svdvals(orthogonalized([stack.to(dtype)])[0].float())[:, 0]
        assert values.min() > 0.6 and values.max() < 1.4


def test_the_short_way_of_many_matrices_leads_where_the_long_way_of_each_does():
    draw = torch.Generator().manual_seed(4)
    stacks = [torch.randn(shape, generator=draw) for shape in ((2, 6, 54), (1, 12, 6), (2, 6, 6))]
    for stack, update in zip(stacks, orthogonalized(stacks), strict=True):
        torch.testing.assert_close(update, muon.iterated(stack.double()).float(), rtol=0, atol=1e-5)


def gradients(parameters: list[nn.Parameter], seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=noise)


def test_it_steps_as_torch_does_where_torch_can(monkeypatch):
    """torch.optim.Muon, for matrices only, in bfloat16, and with one polynomial for all of its five iterations."""
    monkeypatch.setattr(muon, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    start = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    own, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([own], [], lr=0.1, weight_decay=0.2, dtype=torch.bfloat16)
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradients([own], step)
        gradients([other], step)
        ours.step()
        theirs.step()
    assert (own - other).norm() < 0.02 * (own - start).norm()


def test_a_kernel_is_stepped_as_the_matrix_it_flattens_to():
    start = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    kernel, matrix = nn.Parameter(start.to(memory_format=torch.channels_last)), nn.Parameter(start.flatten(1).clone())
    optimizers = [Muon([parameter], [], lr=0.1) for parameter in (kernel, matrix)]
    for step in range(3):
        gradients([kernel], step)
        matrix.grad = kernel.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("largest", [2**23, 100, 1])
def test_each_of_many_is_stepped_as_if_it_were_alone(largest, monkeypatch):
    monkeypatch.setattr(muon, "LARGEST_STACK", largest)
    draw = torch.Generator().manual_seed(3)
    shapes = [(6, 10), (4, 4), (10, 6), (6, 4, 3, 3), (6, 10), (4, 9)]
    starts = [torch.randn(shape, generator=draw) for shape in shapes]
    starts[3] = starts[3].to(memory_format=torch.channels_last)
    together, alone = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [Muon(together, [], lr=0.1, weight_decay=0.1), *(Muon([parameter], [], lr=0.1, weight_decay=0.1) for parameter in alone)]
    for step in range(2):
        gradients(together, step)
        gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_a_parameter_in_an_order_of_its_own_is_refused_and_not_silently_left_as_it_is():
    transposed = nn.Parameter(torch.randn(4, 6).T)
    transposed.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"shape \(6, 4\) and strides \(1, 6\)"):
        Muon([transposed], [], lr=0.1).step()


def test_everything_else_is_stepped_by_adamw_bit_for_bit():
    own, other = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    matrix = nn.Parameter(torch.eye(3))
    ours = Muon([matrix], [{"params": [own], "weight_decay": 0.3}], lr=0.1, betas=(0.8, 0.9))
    theirs = torch.optim.AdamW([other], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, fused=True)
    for step in range(3):
        gradients([own, matrix], step)
        gradients([other], step)
        ours.step()
        theirs.step()
    assert torch.equal(own, other) and not torch.equal(matrix, torch.eye(3))


def test_a_step_that_a_gradient_scaler_calls_off_changes_nothing():
    """torch's GradScaler leaves it to fused optimizers to skip the step."""
    parameters = [nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(4))]
    optimizer = Muon(parameters[:1], [{"params": parameters[1:]}], lr=0.1)
    for overflowed in (True, False):
        gradients(parameters, 0)
        before = copy.deepcopy(parameters)
        if overflowed:
            parameters[0].grad[0, 0] = torch.inf
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(overflowed)), None  # as GradScaler.step sets them
        optimizer.step()
        assert [torch.equal(*pair) for pair in zip(parameters, before, strict=True)] == [overflowed] * 2
        assert all(parameter.isfinite().all() for parameter in parameters)


def test_a_loaded_state_goes_on_bit_for_bit():
    parameters = [nn.Parameter(torch.randn(5, 9, generator=torch.Generator().manual_seed(3))), nn.Parameter(torch.ones(4))]
    optimizer = Muon(parameters[:1], [{"params": parameters[1:]}], lr=0.05)
    for step in range(2):
        gradients(parameters, step)
        optimizer.step()
    copies = copy.deepcopy(parameters)
    again = Muon(copies[:1], [{"params": copies[1:]}], lr=0.05)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_parameters in ((optimizer, parameters), (again, copies)):
        gradients(its_parameters, 9)
        each.step()
    assert all(map(torch.equal, parameters, copies))


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2]


def test_embeddings_and_logits_of_a_prior_are_left_to_adamw(tmp_path):
    vocabulary = Vocabulary(grids=[Grid("image", 8, 2, 2)], class_names=["a"], token_fingerprint="none", label_drop=0.1)
    prior = TokenPrior.from_config(tiny_recipe(tmp_path).prior, vocabulary, seed=0)
    inner = names_of(prior, inner_matrices(prior, matrices_of(prior)))
    left = names_of(prior, matrices_of(prior)) - inner
    assert left == {"model.model.embed_tokens.weight", "model.lm_head.weight"} and any("q_proj" in name for name in inner)
    own = TokenPrior.from_config(dataclasses.replace(tiny_recipe(tmp_path).prior, architecture="grid_transformer"), vocabulary, seed=0)
    inner = names_of(own, inner_matrices(own, matrices_of(own)))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in inner} == {"attention_in", "attention_out", "feed_forward_in", "feed_forward_out"}


def test_a_discriminator_and_codes_are_left_to_adamw(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer_training__optimizer="muon", tokenizer__quantizer="gradient")
    tokenizer = ImageTokenizer(recipe.tokenizer, ImageTransform(image_size=recipe.data.image_size, channels=recipe.data.channels))
    run = TrainingRun(recipe, "tokenizer", recipe.tokenizer_training, StopFlag())
    run.prepare(tokenizer, PatchDiscriminator(recipe.adversarial, recipe.data.channels, seed=0))
    kinds = [type(optimizer.optimizer) for optimizer in run.optimizers]
    orthogonal = names_of(tokenizer, run.optimizers[0].param_groups[0]["params"])
    assert kinds == [Muon, torch.optim.AdamW]
    assert "encoder.conv_in.weight" in orthogonal and not any("codebook" in name for name in orthogonal)
    assert len(run.parameters) == len(list(tokenizer.parameters()))


def test_a_training_with_muon_resumes_bit_for_bit(tmp_path):
    ends = []
    for name, budgets in (("straight", [6]), ("in parts", [2, 5, 6])):
        for steps in budgets:
            train_tokenizer.train(tiny_recipe(tmp_path / name, tokenizer_training__optimizer="muon", tokenizer_training__max_minutes="null",
                                              tokenizer_training__warmup_fraction=0, tokenizer_training__final_learning_rate=1,
                                              tokenizer_training__max_steps=steps))
        ends.append(load_file(RunFolder(tmp_path / name).export("tokenizer") / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
