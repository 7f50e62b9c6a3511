"""Quantizers match those of vector-quantize-pytorch (lucidrains) where both have the same definition.

The reference takes (B, N, D) or (B, D, H, W) and updates its codebook in forward. `_codebook.embed` is (1, K, D).
"""

import pytest
import torch

from stage1_tokenizer.quantizers import QUANTIZERS
from tests.test_quantizer import latents
from vqmosaic.recipes.quantizer_sizes import fsq_levels

vqp = pytest.importorskip("vector_quantize_pytorch")
K, D = 24, 6


def vector_quantize(codebook_KD: torch.Tensor, **fields) -> torch.nn.Module:
    module = vqp.VectorQuantize(dim=D, codebook_size=K, accept_image_fmap=True, rotation_trick=False, threshold_ema_dead_code=0, **fields)
    module._codebook.embed.data.copy_(codebook_KD[None])
    module._codebook.embed_avg.data.copy_(codebook_KD[None])
    return module.train()


@pytest.mark.parametrize("cosine", [False, True])
def test_ema_matches_step_by_step(cosine):
    """Both smooth with 1e-5 and update first the averages, then the codebook. Neither normalizes the averages."""
    ours = QUANTIZERS["ema"](K, D, ema_decay=0.9, commitment_weight=0.25, revival_threshold=0.0, l2_normalize=cosine).train()
    reference = vector_quantize(ours.codebook, decay=0.9, commitment_weight=0.25, use_cosine_sim=cosine)
    for count in range(4):
        latents_BDhw = latents(seed=count)
        output, (quantized_BDhw, ids_Bhw, loss) = ours(latents_BDhw), reference(latents_BDhw)
        assert torch.equal(output.ids, ids_Bhw)
        torch.testing.assert_close(output.quantized, quantized_BDhw)
        torch.testing.assert_close(output.loss, loss.squeeze())
        ours.commit()
        for buffer, reference_buffer in (("codebook", "embed"), ("ema_sums", "embed_avg"), ("ema_counts", "cluster_size")):
            torch.testing.assert_close(getattr(ours, buffer), getattr(reference._codebook, reference_buffer)[0], rtol=1e-5, atol=1e-6)


def test_gradient_matches_a_learnable_codebook():
    """The reference has one squared error with gradients to both sides. Ours has two terms, so with weights 1 the gradients are equal and
    the loss is twice as large."""
    ours = QUANTIZERS["gradient"](K, D, commitment_weight=1.0, codebook_weight=1.0).train()
    reference = vector_quantize(ours.codebook.detach(), commitment_weight=1.0, learnable_codebook=True, ema_update=False)
    first, second = latents().requires_grad_(), latents().requires_grad_()
    output, (quantized_BDhw, ids_Bhw, loss) = ours(first), reference(second)
    assert torch.equal(output.ids, ids_Bhw)
    torch.testing.assert_close(output.quantized, quantized_BDhw)
    torch.testing.assert_close(output.loss, 2 * loss.squeeze())
    output.loss.backward()
    loss.backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.codebook.grad, reference._codebook.embed.grad[0])


def assert_same_quantization_and_gradient(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    """Ids, values and the gradient of a downstream loss at the latents are equal."""
    first, second, downstream = latents().requires_grad_(), latents().requires_grad_(), torch.linspace(-1, 1, 4 * D * 25).view(4, D, 5, 5)
    output, (quantized_BDhw, ids_Bhw, _) = ours(first), reference(second)
    assert torch.equal(output.ids, ids_Bhw)
    torch.testing.assert_close(output.quantized, quantized_BDhw, rtol=1e-4, atol=1e-5)
    (output.quantized * downstream).sum().backward()
    (quantized_BDhw * downstream).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ema", "simvq"])
def test_rotation_trick_matches(kind):
    ours = QUANTIZERS[kind](K, D, rotation_trick=True).train()
    if kind == "ema":
        reference = vqp.VectorQuantize(dim=D, codebook_size=K, accept_image_fmap=True, rotation_trick=True).train()
        reference._codebook.embed.data.copy_(ours.codebook[None])
    else:
        reference = reference_simvq(ours, rotation_trick=True)
    assert_same_quantization_and_gradient(ours, reference)


def test_diveq_matches():
    """The reference's noise on the direction is turned off, because it would change the values."""
    ours = QUANTIZERS["gradient"](K, D, diveq=True, commitment_weight=0.0, codebook_weight=0.0).train()
    reference = vqp.VectorQuantize(dim=D, codebook_size=K, accept_image_fmap=True, directional_reparam=True, directional_reparam_variance=0.0,
                                   threshold_ema_dead_code=1e-9).train()
    reference._codebook.embed.data.copy_(ours.codebook.detach()[None])
    assert_same_quantization_and_gradient(ours, reference)
    torch.testing.assert_close(ours.codebook.grad, reference._codebook.embed.grad[0], rtol=1e-3, atol=1e-5)


def reference_simvq(ours: torch.nn.Module, **fields) -> torch.nn.Module:
    reference = vqp.SimVQ(dim=D, codebook_size=K, channel_first=True, input_to_quantize_commit_loss_weight=0.25, **fields).train()
    copy_simvq(ours, reference)
    return reference


def copy_simvq(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    reference.frozen_codebook.copy_(ours.frozen_codebook)
    reference.code_transform.weight.data.copy_(ours.projection)


def test_simvq_matches():
    ours = QUANTIZERS["simvq"](K, D, commitment_weight=0.25, codebook_weight=1.0).train()
    with torch.no_grad():
        ours.projection += 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    reference = reference_simvq(ours, rotation_trick=False)
    first, second = latents().requires_grad_(), latents().requires_grad_()
    output, (quantized_BDhw, ids_Bhw, loss) = ours(first), reference(second)
    assert torch.equal(output.ids, ids_Bhw)
    torch.testing.assert_close(output.quantized, quantized_BDhw)
    torch.testing.assert_close(output.loss, loss)
    output.loss.backward()
    loss.backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.projection.grad, reference.code_transform.weight.grad)


@pytest.mark.parametrize("size, code_dim", [(240, 3), (1000, 4), (64, 3), (240, D)])
def test_fsq_matches(size, code_dim):
    ours = QUANTIZERS["fsq"](size, code_dim).train()
    reference = vqp.FSQ(fsq_levels(size), dim=code_dim).train()
    copy_projections(ours, reference)
    first, second = (2 * latents(code_dim=code_dim)).requires_grad_(), (2 * latents(code_dim=code_dim)).requires_grad_()
    output, (quantized_BDhw, ids_Bhw) = ours(first), reference(second)
    assert torch.equal(output.ids, ids_Bhw.long())
    torch.testing.assert_close(output.quantized, quantized_BDhw)
    torch.testing.assert_close(ours.ids_to_latents(output.ids), reference.indices_to_codes(ids_Bhw))
    output.quantized.square().sum().backward()
    quantized_BDhw.square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


def copy_projections(ours: torch.nn.Module, reference: torch.nn.Module) -> None:
    assert isinstance(ours.project_in, torch.nn.Identity) == isinstance(reference.project_in, torch.nn.Identity)
    for name in ("project_in", "project_out"):
        getattr(reference, name).load_state_dict(getattr(ours, name).state_dict())


@pytest.mark.parametrize("size, code_dim", [(64, D), (256, D)])
def test_lfq_matches(size, code_dim):
    """The reference clamps probabilities at 1e-5 in the logarithm, which hardly matters at this temperature. Its logit of a code is 2 z.c / T."""
    ours = QUANTIZERS["lfq"](size, code_dim, commitment_weight=0.25, entropy_weight=0.3, entropy_diversity=0.7, entropy_temperature=2.0).train()
    reference = vqp.LFQ(codebook_size=size, dim=code_dim, commitment_loss_weight=0.25, entropy_loss_weight=0.3, diversity_gamma=0.7).train()
    copy_projections(ours, reference)
    first, second = (0.5 * latents(code_dim=code_dim)).requires_grad_(), (0.5 * latents(code_dim=code_dim)).requires_grad_()
    output, (quantized_BDhw, ids_Bhw, loss) = ours(first), reference(second, inv_temperature=0.5)
    assert torch.equal(output.ids, ids_Bhw.long())
    torch.testing.assert_close(output.quantized, quantized_BDhw)
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    loss.backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.ids_to_latents(output.ids), reference.indices_to_codes(ids_Bhw))


def rows(images_BDhw: torch.Tensor) -> torch.Tensor:
    """Vectors (1, N, D) of images (B, D, h, w). As of version 1.32, the reference's residual quantizer does not take images."""
    return images_BDhw.permute(0, 2, 3, 1).reshape(1, -1, images_BDhw.shape[1])


def test_residual_of_ema_matches_step_by_step():
    """Ours averages the losses of levels, the reference lists them. Gradients are not compared: the reference's passes through every level,
    so the latents get it `depth` times."""
    ours = QUANTIZERS["residual"](K, D, residual_depth=3, ema_decay=0.9, commitment_weight=0.25, revival_threshold=0.0).train()
    reference = vqp.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K, decay=0.9, commitment_weight=0.25,
                               rotation_trick=False, threshold_ema_dead_code=0).train()
    for level, layer in zip(ours.levels, reference.layers, strict=True):
        layer._codebook.embed.copy_(level.codebook[None])
        layer._codebook.embed_avg.copy_(level.codebook[None])
    for count in range(3):
        latents_BDhw = latents(seed=count)
        output, (quantized_1ND, ids_1Nd, losses) = ours(latents_BDhw), reference(rows(latents_BDhw))
        assert torch.equal(output.ids.view(1, -1, 3), ids_1Nd)
        torch.testing.assert_close(rows(output.quantized), quantized_1ND)
        torch.testing.assert_close(output.loss, losses.mean())
        ours.commit()
        for level, layer in zip(ours.levels, reference.layers, strict=True):
            torch.testing.assert_close(level.codebook, layer._codebook.embed[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_residual_with_a_shared_codebook_matches(kind):
    """EMA updates are not compared: the reference decays averages once per level, ours once per step. Gradients are equal."""
    is_learned = kind == "gradient"
    weights = {"commitment_weight": 1.0, "codebook_weight": 1.0} if is_learned else {"commitment_weight": 0.25}
    ours = QUANTIZERS["residual"](K, D, residual_depth=3, residual_kind=kind, residual_shared=True, revival_threshold=0.0, **weights).train()
    reference = vqp.ResidualVQ(dim=D, num_quantizers=3, codebook_size=K, shared_codebook=True, commitment_weight=weights["commitment_weight"],
                               rotation_trick=False, threshold_ema_dead_code=0, learnable_codebook=is_learned, ema_update=not is_learned).train()
    codebook = reference.layers[0]._codebook
    assert all(layer._codebook is codebook for layer in reference.layers)
    codebook.embed.data.copy_(ours.levels[0].codebook.detach()[None])
    first, second = latents().requires_grad_(), latents().requires_grad_()
    output, (quantized_1ND, ids_1Nd, losses) = ours(first), reference(rows(second))
    assert torch.equal(output.ids.view(1, -1, 3), ids_1Nd)
    torch.testing.assert_close(rows(output.quantized), quantized_1ND)
    torch.testing.assert_close(output.loss, (2 if is_learned else 1) * losses.mean())  # with weights 1, ours has two equal terms
    output.loss.backward()
    losses.mean().backward()
    torch.testing.assert_close(first.grad, second.grad)
    if is_learned:
        torch.testing.assert_close(ours.levels[0].codebook.grad, codebook.embed.grad[0])
        torch.testing.assert_close(rows(ours.ids_to_latents(output.ids)), reference.get_output_from_indices(ids_1Nd))


def test_residual_of_simvq_matches():
    """The reference does not support a shared codebook."""
    ours = QUANTIZERS["residual"](K, D, residual_depth=3, residual_kind="simvq", commitment_weight=0.25, codebook_weight=1.0).train()
    reference = vqp.ResidualSimVQ(dim=D, num_quantizers=3, codebook_size=K, channel_first=True, rotation_trick=False,
                                  input_to_quantize_commit_loss_weight=0.25).train()
    rng = torch.Generator().manual_seed(0)
    for level, layer in zip(ours.levels, reference.layers, strict=True):
        with torch.no_grad():
            level.projection += 0.3 * torch.randn(D, D, generator=rng)
        copy_simvq(level, layer)
    first, second = latents().requires_grad_(), latents().requires_grad_()
    output, (quantized_BDhw, ids_Bhwd, losses) = ours(first), reference(second)
    assert torch.equal(output.ids, ids_Bhwd)
    torch.testing.assert_close(output.quantized, quantized_BDhw)
    torch.testing.assert_close(ours.ids_to_latents(output.ids), reference.get_output_from_indices(ids_Bhwd))
    torch.testing.assert_close(output.loss, losses.mean())
    output.loss.backward()
    losses.mean().backward()
    torch.testing.assert_close(first.grad, second.grad)
    for level, layer in zip(ours.levels, reference.layers, strict=True):
        torch.testing.assert_close(level.projection.grad, layer.code_transform.weight.grad)
