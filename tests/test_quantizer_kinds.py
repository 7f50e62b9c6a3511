"""Properties of all quantizers: decoding of ids, gradients, states over micro-batches and processes, revival of dead codes."""

import contextlib
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_tokenizer.quantizers import QUANTIZERS, Quantizer, gumbel
from stage1_tokenizer.quantizers.codebook_quantizer import CodebookQuantizer
from tests.test_quantizer import as_latents, assert_equal, buffers, clusters, latents, reduced_precision
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import NEAREST_CODE_KINDS, QUANTIZER_NAMES, TokenizerConfig

D = 6
NO_DIVERSITY = {"entropy_diversity": 0.0}  # the entropy of a batch is not the mean over its micro-batches
CASES = {
    "ema": {"quantizer": "ema"},
    "ema, l2, rotation": {"quantizer": "ema", "l2_normalize": True, "rotation_trick": True},
    "ema, diveq": {"quantizer": "ema", "diveq": True},
    "gradient": {"quantizer": "gradient"},
    "gradient, l2": {"quantizer": "gradient", "l2_normalize": True},
    "gradient, rotation": {"quantizer": "gradient", "rotation_trick": True},
    "gradient, diveq": {"quantizer": "gradient", "diveq": True},
    "simvq": {"quantizer": "simvq"},
    "simvq, l2": {"quantizer": "simvq", "l2_normalize": True},
    "gumbel": {"quantizer": "gumbel"},
    "fsq": {"quantizer": "fsq", "codebook_size": 240},
    "fsq, own dimension": {"quantizer": "fsq", "codebook_size": 4096 * 2, "code_dim": 5},
    "lfq": {"quantizer": "lfq", "codebook_size": 2**D, **NO_DIVERSITY},
    "lfq, projected": {"quantizer": "lfq", "codebook_size": 16, **NO_DIVERSITY},
    "ibq": {"quantizer": "ibq", **NO_DIVERSITY},
    "residual": {"quantizer": "residual", "residual_depth": 3},
    "residual, one level": {"quantizer": "residual", "residual_depth": 1, "residual_kind": "gradient"},
    "residual, shared, l2, rotation": {"quantizer": "residual", "residual_depth": 3, "residual_kind": "gradient", "residual_shared": True,
                                       "l2_normalize": True, "rotation_trick": True},
    "residual, shared ema": {"quantizer": "residual", "residual_depth": 2, "residual_shared": True},
    "residual of simvq": {"quantizer": "residual", "residual_depth": 2, "residual_kind": "simvq"},
    "residual, diveq": {"quantizer": "residual", "residual_depth": 2, "diveq": True},
}
SAMPLED = "gumbel"


def make(case: str, **fields) -> Quantizer:
    config = TokenizerConfig(**{"codebook_size": 24, "code_dim": D} | CASES[case] | fields)
    return QUANTIZERS[config.quantizer](config, seed=3).train()


def batch(module: Quantizer, count: int = 4, seed: int = 0) -> torch.Tensor:
    return latents(count, code_dim=module.code_dim, seed=seed)


def backward(module: Quantizer, latents_BDhw: torch.Tensor, scale: float = 1.0) -> None:
    """Accumulate gradients of the quantizer's loss and of a downstream loss that is a mean over images."""
    output = module(latents_BDhw if latents_BDhw.requires_grad else latents_BDhw.requires_grad_())
    weights_BDhw = torch.linspace(-1, 1, output.quantized[0].numel()).view_as(output.quantized[0])
    (scale * (output.loss + (output.quantized * weights_BDhw).mean())).backward()


def gradients(module: Quantizer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def step(module: Quantizer, latents_BDhw: torch.Tensor, parts: int = 1, learning_rate: float = 0.05) -> None:
    """An SGD step over micro-batches, and a commit."""
    for part in latents_BDhw.chunk(parts):
        backward(module, part, 1 / parts)
    descend(module, learning_rate)


def descend(module: Quantizer, learning_rate: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= learning_rate * parameter.grad
            parameter.grad = None
    module.commit()


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(gumbel, "gumbel_noise", torch.zeros_like)


# --- names and construction ------------------------------------------------------------------------------------------------------


def test_cases_cover_every_quantizer():
    assert set(QUANTIZERS) == set(QUANTIZER_NAMES)
    assert {CASES[case]["quantizer"] for case in CASES} == set(QUANTIZER_NAMES) - {"kl"}


@pytest.mark.parametrize("case", CASES)
def test_initialization_depends_on_the_seed_and_keeps_the_global_rng_state(case):
    state = torch.random.get_rng_state()
    first, second = make(case), make(case)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_equal(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("kind, size, words", [("fsq", 1000, []), ("fsq", 509, ["509", "504", "512"]), ("lfq", 1000, ["1000", "512", "1024"])])
def test_impossible_codebook_sizes_are_refused_with_the_nearest_valid_sizes(kind, size, words):
    if not words:
        assert QUANTIZERS[kind](size, D).codebook_size == size
        return
    with pytest.raises(InputError) as caught:
        QUANTIZERS[kind](size, D)
    assert all(word in str(caught.value) for word in words)


def test_unknown_residual_kind_is_refused():
    with pytest.raises(InputError, match="residual_kind"):
        QUANTIZERS["residual"](24, D, residual_kind="fsq")


# --- forward ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_ids_are_in_range_and_decode_to_the_quantized_latents(case, training):
    module = make(case).train(training)
    for _ in range(2):  # before and after initialize
        latents_BDhw = batch(module)
        output = module(latents_BDhw)
        depth = (module.depth,) if module.depth > 1 else ()
        assert output.ids.shape == (4, 5, 5, *depth) and output.ids.dtype == torch.int64
        assert output.ids.min() >= 0 and output.ids.max() < module.codebook_size and len(output.ids.unique()) > 3
        assert output.quantized.shape == latents_BDhw.shape and output.quantized.dtype == output.loss.dtype == torch.float32
        assert output.loss.shape == ()
        assert torch.equal(module.ids_to_latents(output.ids), output.quantized)
        module.initialize(batch(module, 16, seed=1).permute(0, 2, 3, 1).reshape(-1, module.code_dim))


@pytest.mark.parametrize("case", [case for case in CASES if case != SAMPLED])
def test_ids_are_equal_in_training_and_evaluation(case):
    module = make(case)
    assert torch.equal(module(batch(module)).ids, module.eval()(batch(module)).ids)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_latents_and_every_parameter(case):
    module = make(case)
    latents_BDhw = batch(module).requires_grad_()
    backward(module, latents_BDhw)
    assert torch.isfinite(latents_BDhw.grad).all() and latents_BDhw.grad.abs().max() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", ["ema", "gradient", "simvq", "fsq, own dimension", "lfq", "residual", "residual of simvq"])
def test_the_decoder_gradient_is_passed_through_once(case):
    module = make(case, commitment_weight=0.0, codebook_weight=0.0, entropy_weight=0.0)
    latents_BDhw = batch(module).requires_grad_()
    downstream = torch.randn(latents_BDhw.shape, generator=torch.Generator().manual_seed(0))
    (module(latents_BDhw).quantized * downstream).sum().backward()
    if case == "fsq, own dimension":  # tanh scales the gradient
        assert (latents_BDhw.grad * downstream >= 0).all()
    else:
        assert torch.equal(latents_BDhw.grad, downstream)


class Bf16Products(TorchDispatchMode):
    """Computes float32 matrix products from bf16 inputs where the flags allow it. Some CPUs ignore the flags."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in self.PRODUCTS and torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32"):
            arguments = [each.bfloat16().to(each.dtype) if isinstance(each, torch.Tensor) and each.ndim > 1 else each for each in arguments]
        return function(*arguments, **(keywords or {}))


def crowded_case(case: str) -> tuple[Quantizer, torch.Tensor]:
    """A quantizer in evaluation mode with perturbed weights, and latents of which some lie between two codes."""
    module = make(case, code_dim=CASES[case].get("code_dim", 32)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return module, latents(32, 8, module.code_dim, seed=1)


@pytest.mark.parametrize("how", ["autocast", "set_float32_matmul_precision", "one backend", "all backends"])
@pytest.mark.parametrize("case", CASES)
def test_ids_do_not_depend_on_precision_settings(case, how):
    module, latents_BDhw = crowded_case(case)
    expected = module(latents_BDhw)
    with Bf16Products(), reduced_precision(how), torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = module(latents_BDhw)
        decoded = module.ids_to_latents(output.ids)
    assert torch.equal(output.ids, expected.ids)
    assert torch.equal(output.quantized, expected.quantized) and torch.equal(decoded, expected.quantized)
    assert output.quantized.dtype == output.loss.dtype == decoded.dtype == torch.float32


@pytest.mark.parametrize("how", ["set_float32_matmul_precision", "one backend", "all backends"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "fsq, own dimension"])  # it has no matrix product
def test_ids_depend_on_precision_settings_without_full_precision(case, how, monkeypatch):
    """Checks the inputs of the test above: without full_precision, some ids change."""
    module, latents_BDhw = crowded_case(case)
    expected = module(latents_BDhw)
    for name, loaded in list(sys.modules.items()):
        if name.startswith("stage1_tokenizer.quantizers.") and hasattr(loaded, "full_precision"):
            monkeypatch.setattr(loaded, "full_precision", lambda device: contextlib.nullcontext())
    with Bf16Products(), reduced_precision(how):
        output = module(latents_BDhw)
    assert not torch.equal(output.ids, expected.ids)


@pytest.mark.parametrize("case", CASES)
def test_non_finite_latents_give_valid_ids_and_a_non_finite_output(case):
    module = make(case)
    before = buffers(module)
    for non_finite in (torch.nan, torch.inf):
        bad_latents = batch(module)
        bad_latents[1, 2] = non_finite
        output = module(bad_latents)
        assert output.ids.min() >= 0 and output.ids.max() < module.codebook_size
        is_detected = not torch.isfinite(output.loss + output.quantized.sum())
        assert is_detected or (non_finite == torch.inf and case.startswith("fsq")), "tanh maps infinity to a finite number"
        module.discard()
    assert_equal(buffers(module), before)


# --- commit, discard, micro-batches, files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_buffers_change_only_in_a_commit_after_training_forwards(case):
    module = make(case)
    before = buffers(module)
    module(batch(module))
    assert_equal(buffers(module), before)
    module.discard()
    module.commit()
    assert_equal(buffers(module), before)
    module.eval()
    module(batch(module))
    module.commit()
    assert_equal(buffers(module), before)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_match_one_large_batch(case, no_noise):
    whole, parts = (make(case, revival_threshold=0.5, ema_decay=0.8) for _ in range(2))
    for count in range(3):
        latents_BDhw = batch(whole, 8, seed=count)
        backward(whole, latents_BDhw)
        for part in latents_BDhw.chunk(4):
            backward(parts, part, 0.25)
        assert_close(gradients(whole), gradients(parts))
        descend(whole)
        descend(parts)
        assert_close(whole.state_dict(), parts.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_training_continues_identically_from_a_state_dict(case, no_noise):
    uninterrupted, copied = make(case, revival_threshold=0.5), make(case, revival_threshold=0.5)
    for count in range(2):
        step(uninterrupted, batch(uninterrupted, seed=count))
    copied.load_state_dict(uninterrupted.state_dict())
    for count in range(2, 4):
        for module in (uninterrupted, copied):
            step(module, batch(module, seed=count))
    assert_equal(uninterrupted.state_dict(), copied.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_export_without_training_only_tensors_gives_the_same_ids(case):
    trained, loaded = make(case), make(case)
    for count in range(2):
        step(trained, batch(trained, seed=count))
    training_only = trained.training_only_names()
    assert training_only <= trained.state_dict().keys()
    assert not training_only & {name for name, _ in trained.named_parameters()}
    export = {name: tensor for name, tensor in trained.state_dict().items() if name not in training_only}
    assert all(tensor.dtype == torch.float32 for tensor in export.values()), "exports contain float32 only"
    loaded.load_state_dict(export | {name: loaded.state_dict()[name] for name in training_only})
    loaded.restart_averages()
    first, second = trained.eval()(batch(trained)), loaded.eval()(batch(loaded))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.quantized, second.quantized)


# --- use of the codes ------------------------------------------------------------------------------------------------------------


def level_ids(module: Quantizer, ids: torch.Tensor) -> list[torch.Tensor]:
    return list(ids.unbind(-1)) if module.depth > 1 else [ids]


def codebooks(module: Quantizer) -> list[CodebookQuantizer]:
    return [each for each in module.modules() if isinstance(each, CodebookQuantizer)]


def code_rows(module: CodebookQuantizer) -> torch.Tensor:
    return (module.frozen_codebook if hasattr(module, "frozen_codebook") else module.codebook).data


@pytest.mark.parametrize("case", ["ema", "gradient", "simvq", "residual", "residual, shared ema", "residual of simvq"])
def test_revival_restores_codebook_usage_on_clustered_vectors(case):
    """Half of the codes start far from all vectors. The optimizer must not undo the revival."""
    module, latents_BDhw = make(case, codebook_size=64, residual_depth=2, ema_decay=0.9), as_latents(clusters(64, 50))
    for each in codebooks(module):
        code_rows(each)[32:] += 100
        each.restart_averages()
    optimizer = torch.optim.AdamW(list(module.parameters()) or [torch.zeros(1, requires_grad=True)], lr=1e-2)
    for _ in range(120):
        output = module(latents_BDhw)
        output.loss.backward() if output.loss.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        module.commit()
    for ids in [output.ids] if "shared" in case else level_ids(module, output.ids):
        assert len(ids.unique()) / 64 > 0.8, "usage in the last step; usage over several steps would also count codes that are used only briefly"


@pytest.mark.parametrize("case", ["gradient", "gradient, l2", "simvq", "simvq, l2", "ibq", "residual, one level", "residual of simvq"])
def test_dead_codes_are_revived_once_without_changing_other_codes(case):
    module, vectors_ND = make(case, revival_threshold=0.03), clusters(24, 40)
    module.initialize(vectors_ND)
    first, dead = codebooks(module)[0], [3, 17]
    with torch.no_grad():
        if case in ("simvq", "residual of simvq"):
            first.projection.copy_(torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0] * 1.5)
    code_rows(first)[dead] = 0.0 if case == "ibq" else -code_rows(first)[5] if "l2" in case else 1e3
    first.ema_counts[dead] = 1e-9
    others = [code for code in range(24) if code not in dead]
    before = code_rows(first).clone()
    module(as_latents(vectors_ND))
    module.commit()
    assert torch.equal(code_rows(first)[others], before[others]), "other codes do not change"
    assert first.ema_counts[dead].tolist() == pytest.approx([float(first.ema_counts.mean())] * 2, rel=0.2), "revived codes start at the mean count"
    codes_KD = first.codebook.detach() if case == "ibq" else first.codes().detach()
    seen_ND = first.normalize(vectors_ND) if case != "ibq" else torch.nn.functional.normalize(vectors_ND, dim=-1) * before.norm(dim=-1).max()
    for code in dead:
        assert (codes_KD[code] - seen_ND).norm(dim=1).min() < 1e-3, "a revived code is a vector of the batch"
    first.config.ema_decay = 0.9  # unused codes would be dead again at step 8 and be revived elsewhere
    counts_K, codes_before = first.ema_counts.clone(), code_rows(first)[dead].clone()
    for _ in range(15):
        used_K = torch.bincount(level_ids(module, module(as_latents(vectors_ND)).ids)[0].flatten(), minlength=24)
        counts_K.lerp_(used_K.float(), 0.1)
        module.commit()
    assert (used_K[dead] > 0).all(), "revived codes are still used in the last step"
    assert torch.equal(code_rows(first)[dead], codes_before)
    torch.testing.assert_close(first.ema_counts[dead], counts_K[dead], msg=lambda text: f"a second revival would reset the count: {text}")


@pytest.mark.parametrize("case", ["ema", "gradient", "simvq", "gumbel", "ibq", "residual", "residual, shared ema"])
def test_initialize_uses_most_codes_and_lowers_the_error(case):
    module, vectors_ND = make(case, codebook_size=64, residual_depth=2).eval(), clusters(64, 50)
    latents_BDhw = as_latents(vectors_ND)
    random_error = float((module(latents_BDhw).quantized.detach() - latents_BDhw).square().mean())
    module.initialize(vectors_ND)
    output = module(latents_BDhw)
    for ids in [output.ids] if "shared" in case else level_ids(module, output.ids):
        assert len(ids.unique()) / 64 > 0.8
    assert float((output.quantized.detach() - latents_BDhw).square().mean()) < (0.9 if case == "ibq" else 0.2) * random_error


def test_each_residual_level_lowers_the_error():
    module, vectors_ND = make("residual", codebook_size=16), latents(16).permute(0, 2, 3, 1).reshape(-1, D)
    assert not torch.equal(module.levels[0].codebook, module.levels[1].codebook)
    module.initialize(vectors_ND)
    ids_Bhwd = module(as_latents(vectors_ND)).ids
    remainder, errors = as_latents(vectors_ND), []
    for index in range(3):
        remainder = remainder - module.level(index).ids_to_latents(ids_Bhwd[..., index])
        errors.append(float(remainder.square().mean()))
    assert errors[2] < 0.8 * errors[1] < 0.64 * errors[0]


# --- two processes -----------------------------------------------------------------------------------------------------------------


def train_on_half_batches(rank: int, folder: str) -> None:
    """Run by each of two processes on its half of each batch: backward, mean of gradients over ranks, step, commit."""
    torch.set_num_threads(1)
    gumbel.gumbel_noise = torch.zeros_like
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states = {}
    for case in CASES:
        module = make(case, revival_threshold=0.5, ema_decay=0.8)
        for count in range(3):
            backward(module, batch(module, 8, seed=count).chunk(2)[rank])
            for parameter in module.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            descend(module)
        states[case] = module.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_match_one_process(tmp_path, no_noise):
    multiprocessing.spawn(train_on_half_batches, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for case in CASES:
        module = make(case, revival_threshold=0.5, ema_decay=0.8)
        for count in range(3):
            step(module, batch(module, 8, seed=count))
        assert_equal(first[case], second[case])
        assert_close(dict(module.state_dict()), dict(first[case]))


def test_residual_commits_all_levels_in_one_all_reduce(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", calls.append)
    module = make("residual")
    module(batch(module))
    module.commit()
    assert len(calls) == 1


# --- specific quantizers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gumbel", "ibq"])
def test_probabilities_of_all_codes_that_exceed_the_memory_limit_are_refused(kind, monkeypatch):
    module = make(kind)
    monkeypatch.setattr("stage1_tokenizer.quantizers.operations.gradient_paths.ALL_CODES_LIMIT_BYTES", 4 * 24 * 99)
    module(batch(module, 3))
    with pytest.raises(InputError, match=r"100 vectors x 24 codes.*accumulation_steps"):
        module(batch(module, 4))
    module.eval()(batch(module, 4))  # evaluation works in chunks


def test_gumbel_uses_the_global_rng_and_anneals_its_temperature():
    module = make("gumbel")
    torch.manual_seed(1)
    first = module(batch(module)).ids
    assert not torch.equal(module(batch(module)).ids, first)
    torch.manual_seed(1)
    assert torch.equal(module(batch(module)).ids, first)
    seen = []
    for share in (0.0, 0.5, 1.0, 2.0):
        module.set_progress(share)
        seen.append(module.temperature)
    assert seen == pytest.approx([1, 1 / 16 + 15 / 32, 1 / 16, 1 / 16])
    assert torch.equal(module.eval()(batch(module)).ids, module(batch(module)).ids)


def test_gumbel_loss_is_the_kl_divergence_from_uniform():
    module = make("gumbel", entropy_weight=2.0)
    vectors_ND = batch(module).permute(0, 2, 3, 1).reshape(-1, D)
    probabilities_NK = module.to_logits(vectors_ND).softmax(-1)
    expected = (probabilities_NK * (probabilities_NK * 24).log()).sum(1).mean()
    assert float(module(batch(module)).loss.detach()) == pytest.approx(2 * 0.005 * float(expected.detach()), rel=1e-4)


def test_kl_samples_in_training_uses_the_mean_in_evaluation_and_has_no_ids():
    module = QUANTIZERS["kl"](TokenizerConfig(quantizer="kl", code_dim=D, kl_weight=0.5)).train()
    latents_BDhw = latents().requires_grad_()
    torch.manual_seed(0)
    output = module(latents_BDhw)
    assert output.ids is None and output.quantized.shape == latents_BDhw.shape and not module.has_ids
    assert not torch.equal(module(latents_BDhw).quantized, output.quantized)
    mean, log_variance = module.projection(latents_BDhw.detach().permute(0, 2, 3, 1)).chunk(2, -1)
    drawn = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(output.loss, 0.5 * torch.distributions.kl_divergence(drawn, standard).mean())
    (output.loss + output.quantized.square().sum()).backward()
    assert torch.isfinite(latents_BDhw.grad).all() and module.projection.weight.grad.abs().max() > 0
    module.eval()
    torch.testing.assert_close(module(latents_BDhw).quantized.permute(0, 2, 3, 1), mean)
    with pytest.raises(InputError, match="continuous"):
        module.ids_to_latents(torch.zeros(1, 2, 2, dtype=torch.int64))
    module.commit()
    module.discard()


def test_nearest_code_kinds_match_the_recipe():
    from stage1_tokenizer.quantizers.nearest_code_quantizer import NearestCodeQuantizer
    from stage1_tokenizer.quantizers.residual import LEVEL_KINDS

    assert tuple(LEVEL_KINDS) == NEAREST_CODE_KINDS
    assert {name for name, kind in QUANTIZERS.items() if issubclass(kind, NearestCodeQuantizer)} == set(NEAREST_CODE_KINDS)
    assert math.isclose(gumbel.FINAL_TEMPERATURE_RATIO, 1 / 16)
