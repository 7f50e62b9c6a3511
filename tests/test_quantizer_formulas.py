"""Losses, gradients and codes of the quantizers match explicit formulas or brute force."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers import QUANTIZERS
from stage1_tokenizer.quantizers.operations import entropies
from stage1_tokenizer.quantizers.operations.gradient_paths import apply_diveq, apply_rotation_trick
from stage1_tokenizer.quantizers.operations.nearest_code import nearest_codes
from tests.test_quantizer import latents
from vqmosaic.recipes.quantizer_sizes import fsq_levels

D = 6


def rows(latents_BDhw: torch.Tensor) -> torch.Tensor:
    return latents_BDhw.permute(0, 2, 3, 1).reshape(-1, latents_BDhw.shape[1])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta, weight", [(0.25, 1.0), (0.0, 1.0), (1.5, 0.0), (0.5, 2.0)])
def test_gradient_quantizer_loss_and_gradients(beta, weight):
    """The gradient is 2 beta (z - e) / ND for latents and 2 weight (e - z) / ND for codes, without cross terms."""
    module = QUANTIZERS["gradient"](24, D, commitment_weight=beta, codebook_weight=weight).train()
    latents_BDhw = latents().requires_grad_()
    output = module(latents_BDhw)
    output.loss.backward()
    difference_BDhw = (latents_BDhw - module.ids_to_latents(output.ids)).detach()
    torch.testing.assert_close(output.loss.detach(), (beta + weight) * difference_BDhw.square().mean())
    torch.testing.assert_close(latents_BDhw.grad, beta * 2 * difference_BDhw / latents_BDhw.numel())
    expected_KD = torch.zeros(24, D).index_add_(0, output.ids.flatten(), -weight * 2 * rows(difference_BDhw) / latents_BDhw.numel())
    torch.testing.assert_close(module.codebook.grad, expected_KD)


def test_simvq_trains_the_projection_only():
    module, latents_BDhw = QUANTIZERS["simvq"](24, D, commitment_weight=0.25, codebook_weight=2.0).train(), latents()
    with torch.no_grad():
        module.projection.copy_(normal(D, D))
    output = module(latents_BDhw)
    codebook_KD = module.frozen_codebook @ module.projection.T
    assert torch.equal(output.ids.flatten(), nearest_codes(rows(latents_BDhw), codebook_KD))
    output.loss.backward()
    chosen_ND = module.frozen_codebook[output.ids.flatten()]
    error_ND = (chosen_ND @ module.projection.T - rows(latents_BDhw)).detach()
    torch.testing.assert_close(module.projection.grad, 2.0 * 2 * error_ND.T @ chosen_ND / error_ND.numel())
    assert not module.frozen_codebook.requires_grad


def test_residual_loss_is_the_mean_over_levels():
    module, latents_BDhw = QUANTIZERS["residual"](24, D, residual_depth=3, residual_kind="gradient", commitment_weight=0.5), latents()
    output = module(latents_BDhw)
    remainder, losses = latents_BDhw, []
    for index in range(3):
        codes = module.levels[index].codebook.detach()[output.ids[..., index]].permute(0, 3, 1, 2)
        remainder = remainder - codes
        losses.append(1.5 * remainder.square().mean())
    torch.testing.assert_close(output.loss.detach(), torch.stack(losses).mean())
    torch.testing.assert_close(output.quantized.detach(), latents_BDhw - remainder)


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_rotation_trick_matches_the_matrix_of_the_paper(dim):
    """R = I - 2 r r' + 2 q^ z^' with r along z^ + q^ (Fifty et al. 2024, section 4.2) is orthogonal, and R z = q. Gradients use its transpose."""
    latents_ND, codes_ND, downstream_ND = normal(50, dim), 2 * normal(50, dim, seed=1), normal(50, dim, seed=2)
    if dim == 1:
        codes_ND = codes_ND.abs() * latents_ND.sign()  # in one dimension, no rotation maps a vector to the opposite one
    latents_ND.requires_grad_()
    rotated_ND = apply_rotation_trick(codes_ND, latents_ND)
    assert torch.equal(rotated_ND, codes_ND)
    (rotated_ND * downstream_ND).sum().backward()
    for z, q, g, found in zip(latents_ND.detach().double(), codes_ND.double(), downstream_ND.double(), latents_ND.grad, strict=True):
        z_unit, q_unit = z / z.norm(), q / q.norm()
        r = (z_unit + q_unit) / (z_unit + q_unit).norm()
        matrix = torch.eye(dim, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(q_unit, z_unit)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-9, rtol=0)
        scaled = q.norm() / z.norm() * matrix
        torch.testing.assert_close(scaled @ z, q)
        torch.testing.assert_close(found.double(), scaled.T @ g, rtol=1e-3, atol=1e-4)


def test_rotation_trick_is_finite_for_zero_and_opposite_vectors():
    latents_ND = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    codes_ND = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    rotated_ND = apply_rotation_trick(codes_ND, latents_ND)
    assert torch.equal(rotated_ND, codes_ND)
    rotated_ND.sum().backward()
    assert torch.isfinite(latents_ND.grad).all() and torch.equal(latents_ND.grad[[0, 1, 3]], torch.ones(3, 2))


def test_diveq_splits_the_gradient_along_the_error():
    """Outputs are the codes. With u the direction of the error, latents get the gradient g - (g u) u, and learned codes get (g u) u."""
    latents_ND, codes_ND, downstream_ND = normal(50, 6).requires_grad_(), normal(50, 6, seed=1).requires_grad_(), normal(50, 6, seed=2)
    moved_ND = apply_diveq(codes_ND, latents_ND)
    assert torch.equal(moved_ND, codes_ND)
    (moved_ND * downstream_ND).sum().backward()
    directions_ND = F.normalize(codes_ND.detach() - latents_ND.detach(), dim=1)
    along_ND = (downstream_ND * directions_ND).sum(1, keepdim=True) * directions_ND
    torch.testing.assert_close(latents_ND.grad, downstream_ND - along_ND)
    torch.testing.assert_close(codes_ND.grad, along_ND)


def test_diveq_is_straight_through_where_a_latent_equals_its_code():
    latents_ND = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    apply_diveq(latents_ND.detach().clone(), latents_ND).sum().backward()
    assert torch.equal(latents_ND.grad, torch.ones(2, 2))


# --- fsq -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, levels", [(240, [8, 6, 5]), (1000, [8, 5, 5, 5]), (8, [8]), (3, [3]), (64, [8, 8]), (512, [8, 8, 8])])
def test_fsq_levels_and_codes(size, levels):
    """Each id is a different point of the grid. With an even number of levels, the grid contains -1 but not 1."""
    assert fsq_levels(size) == levels
    module = QUANTIZERS["fsq"](size, len(levels))
    codes_KF = rows(module.ids_to_latents(torch.arange(size)[None, :, None]))
    grid = [[(step - level // 2) / (level // 2) for step in range(level)] for level in reversed(levels)]
    expected_KF = torch.tensor([values[::-1] for values in itertools.product(*grid)])  # the first dimension varies fastest
    torch.testing.assert_close(codes_KF, expected_KF)


def test_fsq_rounding():
    module = QUANTIZERS["fsq"](40, 2)  # 8 and 5 levels
    assert fsq_levels(40) == [8, 5]
    values = torch.tensor([[-99.0, -99.0], [99.0, 99.0], [0.0, 0.0], [0.15, 0.3], [-0.15, -0.3], [0.3, 0.6]])
    output = module(values.T[None, :, :, None])

    def bound_to_8_levels(value: float) -> float:
        return math.tanh(value + math.atanh(0.5 / 3.5035)) * 3.5035 - 0.5  # maps 0 to 0; for 5 levels: tanh(value) * 2.002

    steps = [[-4, -2], [3, 2], [0, 0], [round(bound_to_8_levels(0.15)), 1], [round(bound_to_8_levels(-0.15)), -1], [1, 1]]
    assert output.ids.flatten().tolist() == [(first + 4) + 8 * (second + 2) for first, second in steps]
    torch.testing.assert_close(rows(output.quantized), torch.tensor(steps) / torch.tensor([4.0, 2.0]))
    assert float(output.loss) == 0


# --- lfq and ibq --------------------------------------------------------------------------------------------------------------------


def entropies_by_brute_force(vectors_Nb: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All codes, the mean entropy of each vector's code probabilities, and the entropy of the mean of these probabilities."""
    codes_Kb = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=vectors_Nb.shape[1])), dtype=torch.float64)
    distances_NK = (vectors_Nb.double()[:, None] - codes_Kb).square().sum(-1)
    probabilities_NK = (-distances_NK / temperature).softmax(-1)
    mean_entropy = -torch.special.xlogy(probabilities_NK, probabilities_NK).sum(1).mean()
    mean_K = probabilities_NK.mean(0)
    return codes_Kb, mean_entropy, -torch.special.xlogy(mean_K, mean_K).sum()


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("diversity, temperature", [(0.0, 1.0), (1.0, 0.1), (0.7, 4.0)])
def test_lfq_matches_brute_force_over_all_codes(bits, diversity, temperature):
    entropy_fields = {"entropy_weight": 0.3, "entropy_diversity": diversity, "entropy_temperature": temperature}
    module = QUANTIZERS["lfq"](2**bits, bits, commitment_weight=0.25, **entropy_fields)
    latents_BDhw = 0.3 * latents(code_dim=bits)
    codes_Kb, mean_entropy, entropy_of_mean = entropies_by_brute_force(rows(latents_BDhw), temperature)
    output = module(latents_BDhw)
    assert torch.equal(output.ids.flatten(), torch.cdist(rows(latents_BDhw).double(), codes_Kb).argmin(1)), "the signs are the nearest code"
    assert torch.equal(rows(output.quantized), codes_Kb[output.ids.flatten()].float())
    commitment = (rows(latents_BDhw) - rows(output.quantized)).square().mean()
    torch.testing.assert_close(output.loss.double(), 0.25 * commitment + 0.3 * (mean_entropy - diversity * entropy_of_mean), rtol=1e-5, atol=1e-5)


def test_lfq_entropy_gradient_matches_brute_force():
    logits_Nb = normal(30, 5).requires_grad_()
    entropies.entropy_loss_of_bits(logits_Nb, 0.7).backward()
    logits64_Nb = logits_Nb.detach().double().requires_grad_()
    _, mean_entropy, entropy_of_mean = entropies_by_brute_force(logits64_Nb / 4, 1.0)  # the logit of a bit is 4 z / temperature
    (mean_entropy - 0.7 * entropy_of_mean).backward()
    torch.testing.assert_close(logits_Nb.grad.double(), logits64_Nb.grad, rtol=1e-4, atol=1e-6)


def test_grouped_batch_entropy_is_an_upper_bound_and_exact_for_uniform_use(monkeypatch):
    logits_Nb = 3 * normal(200, 10)
    exact = entropies.batch_entropy_of_bits(logits_Nb)
    monkeypatch.setattr(entropies, "MAX_EXACT_CODES", 2**6)
    grouped = entropies.batch_entropy_of_bits(logits_Nb)
    assert float(exact) <= float(grouped) <= 10 * math.log(2) + 1e-4
    assert float(entropies.batch_entropy_of_bits(torch.zeros(7, 10))) == pytest.approx(10 * math.log(2), rel=1e-5)


def test_large_lfq_codebook_is_never_materialized():
    """A tensor with one entry for each of 2^30 codes would take 4 GiB."""
    module = QUANTIZERS["lfq"](2**30, 30).train()
    output = module(latents(code_dim=30).requires_grad_())
    output.loss.backward()
    assert output.ids.max() >= 2**28 and output.ids.max() < 2**30
    assert torch.equal(module.ids_to_latents(output.ids), output.quantized)
    assert sum(buffer.numel() for buffer in module.buffers()) < 100


def test_lfq_loss_and_gradient_are_finite_for_large_latents():
    module = QUANTIZERS["lfq"](2**8, 8).train()
    large_latents = (1e4 * latents(code_dim=8)).requires_grad_()
    output = module(large_latents)
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(large_latents.grad).all()


def test_ibq_matches_its_formulas():
    """A one-hot argmax with the gradient of the softmax (Shi et al. 2024, section 3.2), and entropies of sharpened logits."""
    fields = {"commitment_weight": 0.25, "codebook_weight": 2.0, "entropy_weight": 0.3, "entropy_diversity": 0.7, "entropy_temperature": 0.5}
    module, latents_BDhw, downstream_ND = QUANTIZERS["ibq"](24, D, **fields).train(), latents().requires_grad_(), normal(100, D, seed=5)
    output = module(latents_BDhw)
    (output.loss + (rows(output.quantized) * downstream_ND).sum()).backward()
    vectors_ND = rows(latents_BDhw.detach()).requires_grad_()
    codebook_KD = module.codebook.detach().clone().requires_grad_()
    logits_NK = vectors_ND @ codebook_KD.T
    soft_NK = logits_NK.softmax(-1)
    hard_NK = F.one_hot(logits_NK.argmax(-1), 24).float()
    codes_ND = (hard_NK - soft_NK.detach() + soft_NK) @ codebook_KD
    sharp_NK = (logits_NK / 0.5).softmax(-1)
    mean_K = sharp_NK.mean(0)
    entropy = -(sharp_NK * sharp_NK.log()).sum(1).mean() + 0.7 * (mean_K * mean_K.log()).sum()
    loss = (2.0 * (codes_ND - vectors_ND.detach()).square().mean() + 0.25 * (vectors_ND - codes_ND.detach()).square().mean() + 0.3 * entropy)
    (loss + (codes_ND * downstream_ND).sum()).backward()
    assert torch.equal(output.ids.flatten(), logits_NK.argmax(-1))
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows(latents_BDhw.grad), vectors_ND.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(module.codebook.grad, codebook_KD.grad, rtol=1e-3, atol=1e-4)
    assert (module.codebook.grad.abs().sum(1) > 0).all(), "all codes get a gradient, not only chosen ones"


@pytest.mark.parametrize("kind, size", [("lfq", 64), ("ibq", 24)])
def test_entropy_terms_can_be_disabled(kind, size):
    with_entropy, without_entropy, without_diversity = (QUANTIZERS[kind](size, D, **fields).train()(latents()).loss.detach()
                                                        for fields in ({}, {"entropy_weight": 0.0}, {"entropy_diversity": 0.0}))
    assert with_entropy < without_diversity and without_entropy < without_diversity
