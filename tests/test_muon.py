"""Muon: orthogonal updates for matrices inside a network, AdamW for other parameters, and exact resume."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stage1_tokenizer import train as train_tokenizer
from stage1_tokenizer.adversarial.discriminator import PatchDiscriminator
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.tiny import tiny_recipe
from token_shards.manifest import Grid
from vqmosaic.runs.interruption import StopFlag
from vqmosaic.runs.run_folder import RunFolder
from vqmosaic.training import muon
from vqmosaic.training.muon import Muon, orthogonalize
from vqmosaic.training.training_run import TrainingRun, inner_matrices


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5), (1, 1, 7)])
def test_orthogonalize_keeps_singular_vectors_and_sets_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    in_singular_basis = u.mT @ orthogonalize([matrices])[0] @ vh.mT
    assert (in_singular_basis - torch.diag_embed(in_singular_basis.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    values = in_singular_basis.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_bounds_matrices_of_rank_one(dtype):
    """The only singular value equals the norm, which is the upper limit of the polynomials' range. Rounding must not exceed it."""
    rng = torch.Generator().manual_seed(5)
    for stack in (torch.randn(400, 1, 576, generator=rng), torch.randn(50, 48, 1, generator=rng) @ torch.randn(50, 1, 64, generator=rng)):
        values = torch.linalg.svdvals(orthogonalize([stack.to(dtype)])[0].float())[:, 0]
        assert values.min() > 0.6 and values.max() < 1.4


def test_orthogonalize_matches_orthogonalize_directly():
    rng = torch.Generator().manual_seed(4)
    stacks = [torch.randn(shape, generator=rng) for shape in ((2, 6, 54), (1, 12, 6), (2, 6, 6))]
    for stack, update in zip(stacks, orthogonalize(stacks), strict=True):
        torch.testing.assert_close(update, muon.orthogonalize_directly(stack.double()).float(), rtol=0, atol=1e-5)


def set_random_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=rng)


def test_muon_matches_torch_optim_muon(monkeypatch):
    """torch.optim.Muon takes matrices only, computes in bfloat16 and uses one polynomial for all five iterations."""
    monkeypatch.setattr(muon, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    start = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    own, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([own], [], lr=0.1, weight_decay=0.2, dtype=torch.bfloat16)
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        set_random_gradients([own], step)
        set_random_gradients([other], step)
        ours.step()
        theirs.step()
    assert (own - other).norm() < 0.02 * (own - start).norm()


def test_convolution_kernel_is_updated_like_its_flattened_matrix():
    start = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    kernel, matrix = nn.Parameter(start.to(memory_format=torch.channels_last)), nn.Parameter(start.flatten(1).clone())
    optimizers = [Muon([parameter], [], lr=0.1) for parameter in (kernel, matrix)]
    for step in range(3):
        set_random_gradients([kernel], step)
        matrix.grad = kernel.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("largest", [2**23, 100, 1])
def test_batched_updates_match_separate_optimizers(largest, monkeypatch):
    monkeypatch.setattr(muon, "MAX_GRAM_ELEMENTS", largest)
    rng = torch.Generator().manual_seed(3)
    shapes = [(6, 10), (4, 4), (10, 6), (6, 4, 3, 3), (6, 10), (4, 9)]
    starts = [torch.randn(shape, generator=rng) for shape in shapes]
    starts[3] = starts[3].to(memory_format=torch.channels_last)
    together, alone = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [Muon(together, [], lr=0.1, weight_decay=0.1), *(Muon([parameter], [], lr=0.1, weight_decay=0.1) for parameter in alone)]
    for step in range(2):
        set_random_gradients(together, step)
        set_random_gradients(alone, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_stack_is_updated_like_its_matrices():
    """Including a matrix with zero gradients, like an expert that no token chose."""
    start_ERC = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(6))
    stack, matrices = nn.Parameter(start_ERC.clone()), [nn.Parameter(matrix.clone()) for matrix in start_ERC]
    optimizers = [Muon([stack], [], stacks=[stack], lr=0.1, weight_decay=0.1), Muon(matrices, [], lr=0.1, weight_decay=0.1)]
    for step in range(3):
        set_random_gradients([stack], step)
        stack.grad *= torch.tensor([1.0, 1000.0, 0.0])[:, None, None]
        for matrix, gradient in zip(matrices, stack.grad.clone(), strict=True):
            matrix.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in matrices]))
    torch.testing.assert_close(stack.detach()[2], start_ERC[2] * 0.99**3)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_kernels_of_all_convolutions_are_updated_as_one_matrix(dimensions):
    convolution = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1](4, 6, 3)
    assert [parameter is convolution.weight for parameter in inner_matrices(convolution, matrices_of(convolution))] == [True]
    start = convolution.weight.detach().clone()
    optimizer = Muon([convolution.weight], [], lr=0.1)
    set_random_gradients([convolution.weight], 0)
    gradient = convolution.weight.grad.clone()
    optimizer.step()
    check_first_step((start - convolution.weight.detach()).flatten(1), gradient.flatten(1), learning_rate=0.1)


def check_first_step(update_RC: torch.Tensor, gradient_RC: torch.Tensor, learning_rate: float) -> None:
    """Muon's first update has the singular vectors of the gradient, nearly equal singular values, and the RMS of AdamW's updates."""
    u, values, vh = torch.linalg.svd(gradient_RC, full_matrices=False)
    in_singular_basis = u.mT @ update_RC @ vh.mT / (learning_rate * muon.ADAMW_UPDATE_RMS * max(update_RC.shape) ** 0.5)
    moved = in_singular_basis.diagonal()[values > 0.015 * values.norm()]  # smaller values need more than three iterations
    assert len(moved) > 0.8 * len(values) and moved.min() > 0.6 and moved.max() < 1.35
    assert (in_singular_basis - torch.diag(in_singular_basis.diagonal())).abs().max() < 1e-3


def test_non_contiguous_parameter_is_refused():
    transposed = nn.Parameter(torch.randn(4, 6).T)
    transposed.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"shape \(6, 4\) and strides \(1, 6\)"):
        Muon([transposed], [], lr=0.1).step()


def test_other_parameters_match_torch_adamw_exactly():
    own, other = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    matrix = nn.Parameter(torch.eye(3))
    ours = Muon([matrix], [{"params": [own], "weight_decay": 0.3}], lr=0.1, betas=(0.8, 0.9))
    theirs = torch.optim.AdamW([other], lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, fused=True)
    for step in range(3):
        set_random_gradients([own, matrix], step)
        set_random_gradients([other], step)
        ours.step()
        theirs.step()
    assert torch.equal(own, other) and not torch.equal(matrix, torch.eye(3))


def test_step_skipped_by_a_grad_scaler_changes_nothing():
    """GradScaler expects fused optimizers to skip steps themselves."""
    parameters = [nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(4))]
    optimizer = Muon(parameters[:1], [{"params": parameters[1:]}], lr=0.1)
    for overflowed in (True, False):
        set_random_gradients(parameters, 0)
        before = copy.deepcopy(parameters)
        if overflowed:
            parameters[0].grad[0, 0] = torch.inf
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(overflowed)), None  # as GradScaler.step sets them
        optimizer.step()
        assert [torch.equal(*pair) for pair in zip(parameters, before, strict=True)] == [overflowed] * 2
        assert all(parameter.isfinite().all() for parameter in parameters)


def test_optimization_continues_identically_from_a_state_dict():
    parameters = [nn.Parameter(torch.randn(5, 9, generator=torch.Generator().manual_seed(3))), nn.Parameter(torch.ones(4))]
    optimizer = Muon(parameters[:1], [{"params": parameters[1:]}], lr=0.05)
    for step in range(2):
        set_random_gradients(parameters, step)
        optimizer.step()
    copies = copy.deepcopy(parameters)
    again = Muon(copies[:1], [{"params": copies[1:]}], lr=0.05)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_parameters in ((optimizer, parameters), (again, copies)):
        set_random_gradients(its_parameters, 9)
        each.step()
    assert all(map(torch.equal, parameters, copies))


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2]


def test_embeddings_and_output_layers_of_a_prior_use_adamw(tmp_path):
    vocabulary = Vocabulary(grids=[Grid("image", 8, 2, 2)], class_names=["a"], token_fingerprint="none", label_drop=0.1)
    prior = TokenPrior.from_config(tiny_recipe(tmp_path).prior, vocabulary, seed=0)
    inner = names_of(prior, inner_matrices(prior, matrices_of(prior)))
    left = names_of(prior, matrices_of(prior)) - inner
    assert left == {"model.model.embed_tokens.weight", "model.lm_head.weight"} and any("q_proj" in name for name in inner)
    own = TokenPrior.from_config(dataclasses.replace(tiny_recipe(tmp_path).prior, architecture="grid_transformer"), vocabulary, seed=0)
    inner = names_of(own, inner_matrices(own, matrices_of(own)))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in inner} == {"attention_in", "attention_out", "feed_forward_in", "feed_forward_out"}


@pytest.mark.parametrize("architecture, left", [
    ("llama", {"embed_tokens", "lm_head"}), ("gpt2", {"wte", "wpe", "lm_head"}), ("gpt_neox", {"embed_in", "lm_head"}),
    ("opt", {"embed_tokens", "embed_positions", "lm_head"}), ("mixtral", {"embed_tokens", "lm_head"})])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_output_layers_are_detected_in_every_architecture(architecture, left, tied, tmp_path):
    """Detection does not depend on names and includes tied matrices."""
    vocabulary = Vocabulary(grids=[Grid("image", 8, 2, 2)], class_names=["a"], token_fingerprint="none", label_drop=0.1)
    options = {"tie_word_embeddings": tied} | EXPERTS.get(architecture, {})
    recipe = tiny_recipe(tmp_path, prior__architecture=architecture, prior__options=json.dumps(options), prior__dropout=0)
    prior = TokenPrior.from_config(recipe.prior, vocabulary, seed=0)
    found = names_of(prior, matrices_of(prior)) - names_of(prior, inner_matrices(prior, matrices_of(prior)))
    names = {name.split(".")[-2].replace("embed_out", "lm_head") for name in found}  # depends on the version of transformers
    assert names == (left - {"lm_head"} if tied else left)


class Experts(nn.Module):
    """One parameter of each kind that occurs in models of other projects."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.up_bias = nn.Parameter(torch.ones(4, 6, 8)), nn.Parameter(torch.ones(4, 6))
        self.positions, self.class_token = nn.Parameter(torch.ones(1, 5, 8)), nn.Parameter(torch.ones(1, 1, 8))
        self.decay = nn.Parameter(torch.ones(8, 3))
        self.embedding, self.linear, self.convolution = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3, groups=8)

    def matrix_stacks(self) -> list[nn.Parameter]:
        return [self.up_proj]


def test_tables_tokens_and_biases_use_adamw():
    """They are not factors of matrix products."""
    model = Experts()
    assert names_of(model, inner_matrices(model, matrices_of(model))) == {"up_proj", "linear.weight", "convolution.weight"}


EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("architecture", [*EXPERTS, "gpt2", "llama"])
def test_each_matrix_of_a_transformers_prior_is_orthogonalized_separately(architecture, tmp_path):
    """Experts are stored as stacks (E, R, C), and GPT-2's linear layers are stored transposed. The gradients of experts differ in scale."""
    vocabulary = Vocabulary(grids=[Grid("image", 8, 2, 2)], class_names=["a"], token_fingerprint="none", label_drop=0.1)
    recipe = tiny_recipe(tmp_path, prior__architecture=architecture, prior__options=json.dumps(EXPERTS.get(architecture, {})),
                         prior__dropout=0, prior_training__optimizer="muon", prior_training__weight_decay=0, prior_training__learning_rate=0.01,
                         prior_training__gradient_clip=1e6, prior_training__warmup_fraction=0)
    prior = TokenPrior.from_config(recipe.prior, vocabulary, seed=0)
    run = TrainingRun(recipe, "prior", recipe.prior_training, StopFlag())
    run.prepare(prior)
    before = {name: parameter.detach().clone() for name, parameter in prior.named_parameters()}
    set_random_gradients(list(prior.parameters()), 1)
    experts = {name for name, parameter in prior.named_parameters() if parameter.ndim == 3}
    for name in experts:
        parameter = prior.get_parameter(name)
        parameter.grad *= torch.logspace(0, 3, len(parameter))[:, None, None]
    directions = {name: parameter.grad.clone() for name, parameter in prior.named_parameters()}
    inner = names_of(prior, run.optimizers[0].param_groups[0]["params"])
    _, _, learning_rate = run.optimizer_step(torch.zeros(()), progress=0.0)
    run.end()
    assert bool(experts) == (architecture in EXPERTS) and experts <= inner
    assert not any(word in name for name in inner for word in ("bias", "embed", "wte", "wpe", "lm_head"))
    for name in inner:
        update = before[name] - prior.get_parameter(name).detach()
        for update_RC, gradient_RC in zip(update, directions[name], strict=True) if update.ndim == 3 else [(update, directions[name])]:
            check_first_step(update_RC, gradient_RC, learning_rate)


def test_discriminator_and_codes_use_adamw(tmp_path):
    recipe = tiny_recipe(tmp_path, tokenizer_training__optimizer="muon", tokenizer__quantizer="gradient")
    tokenizer = ImageTokenizer(recipe.tokenizer, ImageTransform(image_size=recipe.data.image_size, channels=recipe.data.channels))
    run = TrainingRun(recipe, "tokenizer", recipe.tokenizer_training, StopFlag())
    run.prepare(tokenizer, PatchDiscriminator(recipe.adversarial, recipe.data.channels, seed=0))
    kinds = [type(optimizer.optimizer) for optimizer in run.optimizers]
    orthogonal = names_of(tokenizer, run.optimizers[0].param_groups[0]["params"])
    assert kinds == [Muon, torch.optim.AdamW]
    assert "encoder.conv_in.weight" in orthogonal and not any("codebook" in name for name in orthogonal)
    assert len(run.parameters) == len(list(tokenizer.parameters()))


def test_training_with_muon_resumes_exactly(tmp_path):
    ends = []
    for name, budgets in (("straight", [6]), ("in parts", [2, 5, 6])):
        for steps in budgets:
            train_tokenizer.train(tiny_recipe(tmp_path / name, tokenizer_training__optimizer="muon", tokenizer_training__max_minutes="null",
                                              tokenizer_training__warmup_fraction=0, tokenizer_training__final_learning_rate=1,
                                              tokenizer_training__max_steps=steps))
        ends.append(load_file(RunFolder(tmp_path / name).export("tokenizer") / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
