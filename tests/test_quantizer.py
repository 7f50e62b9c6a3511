"""The EMA quantizer: nearest codes at any precision, gradients, moving averages, revival of dead codes, k-means."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers import QUANTIZERS, EMAQuantizer, ema
from stage1_tokenizer.quantizers.codebook_quantizer import REVIVAL_CANDIDATES
from stage1_tokenizer.quantizers.operations import nearest_code
from stage1_tokenizer.quantizers.operations.nearest_code import code_sums, full_precision, kmeans, nearest_codes

K, D = 24, 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def quantizer(codebook_size: int = K, code_dim: int = D, **fields) -> EMAQuantizer:
    return QUANTIZERS["ema"](codebook_size, code_dim, **fields).train()


def latents(batch: int = 4, size: int = 5, code_dim: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, code_dim, size, size, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, per_cluster: int, code_dim: int = D, seed: int = 0) -> torch.Tensor:
    """Shuffled vectors (N, D) around `count` well-separated centres."""
    rng = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(count, 1, code_dim, generator=rng)
    vectors = (centres + 0.1 * torch.randn(count, per_cluster, code_dim, generator=rng)).flatten(0, 1)
    return vectors[torch.randperm(len(vectors), generator=rng)]


def as_latents(vectors_ND: torch.Tensor) -> torch.Tensor:
    return vectors_ND.T[None, :, :, None]  # (1, D, N, 1)


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_nearest_codes(ids_N: torch.Tensor, vectors_ND: torch.Tensor, codebook_KD: torch.Tensor) -> None:
    """Each id has the smallest distance in float64, up to a relative error of 1e-5."""
    distances = torch.cdist(vectors_ND.double().cpu(), codebook_KD.double().cpu())
    chosen = distances.gather(1, ids_N.cpu()[:, None])[:, 0]
    assert (chosen <= distances.min(1).values * (1 + 1e-5)).all()


# --- forward ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_ids_are_the_nearest_codes_and_decode_to_the_quantized_latents(l2_normalize):
    module, latents_BDhw = quantizer(l2_normalize=l2_normalize), latents()
    output = module(latents_BDhw)
    assert output.ids.shape == (4, 5, 5) and output.ids.dtype == torch.int64
    assert output.quantized.shape == latents_BDhw.shape and output.quantized.dtype == torch.float32
    assert output.ids.min() >= 0 and output.ids.max() < K
    assert torch.equal(module.ids_to_latents(output.ids), output.quantized)
    vectors_ND = module.normalize(latents_BDhw.permute(0, 2, 3, 1).reshape(-1, D))
    assert_nearest_codes(output.ids.flatten(), vectors_ND, module.codebook)


def test_l2_normalize_projects_codes_and_latents_to_the_unit_sphere():
    module, latents_BDhw = quantizer(l2_normalize=True), latents()
    torch.testing.assert_close(module.codebook.norm(dim=1), torch.ones(K))
    output = module(latents_BDhw)
    assert torch.equal(output.ids, module(5 * latents_BDhw).ids)
    cosines = F.normalize(latents_BDhw.permute(0, 2, 3, 1), dim=-1).reshape(-1, D) @ module.codebook.T
    assert torch.equal(output.ids.flatten(), cosines.argmax(1))
    module.commit()
    torch.testing.assert_close(module.codebook.norm(dim=1), torch.ones(K))


def test_straight_through_gradient():
    module, latents_BDhw = quantizer(), latents().requires_grad_()
    downstream = torch.randn(latents_BDhw.shape)
    (module(latents_BDhw).quantized * downstream).sum().backward()
    assert torch.equal(latents_BDhw.grad, downstream)


@pytest.mark.parametrize("beta", [0.25, 1.5])
def test_commitment_loss_and_its_gradient_scale_with_beta(beta):
    module, latents_BDhw = quantizer(commitment_weight=beta), latents().requires_grad_()
    output = module(latents_BDhw)
    codes_BDhw = module.ids_to_latents(output.ids)
    assert float(output.loss.detach()) == pytest.approx(beta * float((latents_BDhw - codes_BDhw).detach().square().mean()), rel=1e-5)
    output.loss.backward()
    expected = beta * 2 * (latents_BDhw.detach() - codes_BDhw) / latents_BDhw.numel()
    torch.testing.assert_close(latents_BDhw.grad, expected)
    assert not any(buffer.requires_grad for buffer in module.buffers()) and not list(module.parameters())  # codes are updated by averages only


def test_only_commit_after_a_training_forward_changes_buffers():
    module = quantizer()
    before = buffers(module)
    module(latents())
    assert_equal(buffers(module), before)
    module.discard()
    module.commit()
    assert_equal(buffers(module), before)
    module.eval()
    module(latents())
    module.commit()
    assert_equal(buffers(module), before)
    module.train()
    module(latents())
    module.commit()
    assert not torch.equal(module.codebook, before["codebook"])


def test_discarded_non_finite_latents_do_not_change_the_codebook():
    module = quantizer()
    before = buffers(module)
    for non_finite in (torch.nan, torch.inf, -torch.inf):
        bad_latents = latents()
        bad_latents[1, 2] = non_finite
        output = module(bad_latents)
        assert output.ids.min() >= 0 and output.ids.max() < K
        assert not torch.isfinite(output.loss)
        module.discard()
    assert_equal(buffers(module), before)
    module(latents())
    module.commit()
    assert all(torch.isfinite(buffer).all() for buffer in module.buffers())


# --- precision -------------------------------------------------------------------------------------------------------------------


PRODUCTS = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.cuda.matmul, torch.backends.cudnn.conv]


def flags() -> tuple[str, ...]:
    return tuple(flag.fp32_precision for flag in (torch.backends, torch.backends.mkldnn, torch.backends.cudnn, *PRODUCTS))


@contextlib.contextmanager
def reduced_precision(how: str):
    """A context in which float32 products use bf16 or TF32, by each of the ways in which a user can set it."""
    before = [flag.fp32_precision for flag in PRODUCTS]
    try:
        if how == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("medium")
        elif how == "one backend":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        elif how == "all backends":
            torch.backends.fp32_precision = "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"
        for flag, precision in zip(PRODUCTS, before, strict=True):
            flag.fp32_precision = precision


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["autocast", "set_float32_matmul_precision", "one backend", "all backends"])
def test_ids_do_not_depend_on_precision_settings(how, device):
    """The codes are so close to each other that distances in bf16 would change some ids, which the last lines check."""
    rng = torch.Generator().manual_seed(1)
    vectors_ND = torch.randn(2000, 32, generator=rng).to(device)
    module = quantizer(512, 32).to(device)
    module.codebook.copy_(torch.randn(512, 32, generator=rng) * 0.3)
    expected = module(as_latents(vectors_ND)).ids
    assert_nearest_codes(expected.flatten(), vectors_ND, module.codebook)
    before = flags()
    with reduced_precision(how):
        inside = flags()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=how == "autocast"):
            output = module(as_latents(vectors_ND))
        assert flags() == inside, "the user's flags must be restored"
    assert flags() == before
    assert torch.equal(output.ids, expected) and output.ids.min() >= 0 and output.ids.max() < 512
    assert output.quantized.dtype == torch.float32 and output.loss.dtype == torch.float32
    low = (0.5 * module.codebook.square().sum(1)).bfloat16() - vectors_ND.bfloat16() @ module.codebook.bfloat16().T
    assert (low.argmin(1) != expected.flatten()).float().mean() > 0.001


def test_bf16_latents_are_compared_in_float32():
    module, latents_BDhw = quantizer(), latents().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(latents_BDhw)
    vectors_ND = latents_BDhw.permute(0, 2, 3, 1).reshape(-1, D)
    assert_nearest_codes(output.ids.flatten(), vectors_ND.float(), module.codebook)
    assert_nearest_codes(nearest_codes(vectors_ND, module.codebook.bfloat16()), vectors_ND.float(), module.codebook.bfloat16().float())
    assert output.quantized.dtype == torch.float32


def test_inherited_precision_flags_stay_inherited():
    """Restoring an inherited flag by writing its value would freeze it at the value of the parent flag."""
    with reduced_precision("all backends"):
        nearest_codes(torch.randn(4, D), torch.randn(K, D))
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_precision_flags_are_restored_after_an_error():
    with reduced_precision("one backend"):
        inside = flags()
        with pytest.raises(RuntimeError):
            nearest_codes(torch.randn(4, D), torch.randn(K, D + 1))
        assert flags() == inside
        with full_precision(torch.device("cpu")):
            on_cpu = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
            assert {flag.fp32_precision for flag in on_cpu} == {"ieee"}  # some CPUs ignore the flags, so results would not show this


def test_nearest_codes_never_allocates_the_full_distance_matrix():
    """Distances of 16,384 codes x 4,096 vectors take 256 MiB. No tensor may be larger than a sixteenth of that."""
    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        max_bytes = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.max_bytes = max(self.max_bytes, tensor.numel() * tensor.element_size())
            return result

    rng = torch.Generator().manual_seed(2)
    vectors_ND, codebook_KD = torch.randn(4096, 8, generator=rng), torch.randn(16384, 8, generator=rng)
    with LargestTensor() as largest:
        ids_N = nearest_codes(vectors_ND, codebook_KD)
    assert largest.max_bytes <= 16 * 2**20
    assert_nearest_codes(ids_N[::64], vectors_ND[::64], codebook_KD)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_chunked_search_finds_the_nearest_codes(count, monkeypatch):
    monkeypatch.setitem(nearest_code.WORKING_SET_BYTES, "cpu", (1, 1))  # 16 rows and 64 codes at a time
    vectors_ND, codebook_KD = latents(1, 32).reshape(D, -1).T[:count], quantizer(200).codebook
    ids_N = nearest_codes(vectors_ND, codebook_KD)
    assert ids_N.shape == (count,)
    if count:
        assert_nearest_codes(ids_N, vectors_ND, codebook_KD)
        assert count < 100 or len(ids_N.unique()) > 50, "codes of every chunk are found"


def test_ties_go_to_the_lowest_id_across_chunks(monkeypatch):
    codebook_KD = torch.arange(50.0).repeat(4)[:, None].repeat(1, D)
    expected = nearest_codes(codebook_KD, codebook_KD)
    assert expected.tolist() == 4 * list(range(50))
    monkeypatch.setitem(nearest_code.WORKING_SET_BYTES, "cpu", (1, 1))
    assert torch.equal(nearest_codes(codebook_KD, codebook_KD), expected)


# --- moving averages -------------------------------------------------------------------------------------------------------------


def test_commit_matches_manual_moving_averages(monkeypatch):
    """Appendix A.1 of van den Oord et al. 2017, with Laplace smoothing strong enough to affect the result."""
    decay, smoothing = 0.9, 0.1
    monkeypatch.setattr(ema, "LAPLACE_EPS", smoothing)
    module = quantizer(ema_decay=decay, revival_threshold=0.0)
    counts, sums = torch.ones(K, dtype=torch.float64), module.codebook.double().clone()
    for step in range(3):
        vectors_ND = latents(seed=step).permute(0, 2, 3, 1).reshape(-1, D)
        ids_N = module(latents(seed=step)).ids.flatten()
        module.commit()
        for code in range(K):
            members = vectors_ND[ids_N == code].double()
            counts[code] = decay * counts[code] + (1 - decay) * len(members)
            sums[code] = decay * sums[code] + (1 - decay) * members.sum(0)
        smoothed = (counts + smoothing) / (counts.sum() + K * smoothing) * counts.sum()
        torch.testing.assert_close(module.ema_counts.double(), counts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.ema_sums.double(), sums, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.codebook.double(), sums / smoothed[:, None], rtol=1e-4, atol=1e-5)
    assert int(module.commits) == 3


def test_laplace_smoothing_keeps_unused_codes_finite():
    module = quantizer(ema_decay=0.0, revival_threshold=0.0)  # only the last commit counts
    module(torch.zeros(1, D, 2, 2))
    module.commit()
    assert torch.isfinite(module.codebook).all()
    assert int((module.ema_counts == 0).sum()) == K - 1


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_micro_batches_match_one_large_batch(l2_normalize):
    whole, parts = (quantizer(l2_normalize=l2_normalize, revival_threshold=0.5) for _ in range(2))
    for step in range(4):
        batch = latents(8, seed=step)
        whole(batch)
        whole.commit()
        for part in batch.chunk(4):
            parts(part)
        parts.commit()
    for name, buffer in whole.state_dict().items():
        torch.testing.assert_close(buffer, parts.state_dict()[name], rtol=1e-6, atol=1e-6)


# --- dead codes ------------------------------------------------------------------------------------------------------------------


def test_dead_codes_are_revived_once_without_changing_other_codes():
    module, vectors_ND = quantizer(), clusters(K, 40)
    module.initialize(vectors_ND)
    dead = [3, 17]
    module.codebook[dead] = 1e3  # far from all vectors
    module.ema_sums[dead] = 1e3
    module.ema_counts[dead] = 1e-9
    alive = [code for code in range(K) if code not in dead]
    twin = quantizer(revival_threshold=0.0)
    twin.load_state_dict(module.state_dict())
    for each in (module, twin):
        each(as_latents(vectors_ND))
        each.commit()
    for buffer in ("ema_counts", "ema_sums"):
        assert torch.equal(getattr(module, buffer)[alive], getattr(twin, buffer)[alive])
    torch.testing.assert_close(module.codebook[alive], twin.codebook[alive], rtol=1e-4, atol=1e-4)  # the total count differs
    for code in dead:
        assert (module.codebook[code] - vectors_ND).norm(dim=1).min() < 1e-3, "a revived code is a vector of the batch"
    revived = module.codebook[dead].clone()
    module.config.ema_decay = 0.9  # an unused code with stale sums and counts would be dead again at step 8
    counts_K = module.ema_counts.clone()
    for _ in range(15):
        used_K = torch.bincount(module(as_latents(vectors_ND)).ids.flatten(), minlength=K)
        counts_K.lerp_(used_K.float(), 0.1)
        module.commit()
    assert (used_K[dead] > 0).all(), "revived codes are still used in the last step"
    torch.testing.assert_close(module.ema_counts[dead], counts_K[dead], msg=lambda text: f"a second revival would reset the count: {text}")
    assert (module.codebook[dead] - revived).norm(dim=1).max() < 5, "a code is revived only once"


def test_unused_revived_code_stays_alive_for_many_steps():
    """The count of a revived code starts at the mean and decays from there, even if no vector chooses the code."""
    module = quantizer(ema_decay=0.9, revival_threshold=0.03)
    module.codebook[5], module.ema_sums[5], module.ema_counts[5] = 1e3, 1e3, 1e-9
    module(latents())
    module.commit()
    revived_code = module.codebook[5].clone()
    assert module.ema_counts[5] == pytest.approx(float(module.ema_counts.mean()), rel=0.1)
    other_code = module.codebook[6]
    for _ in range(20):
        module(other_code[None, :, None, None].expand(1, D, 10, 10))  # far from code 5
        module.commit()
    torch.testing.assert_close(module.codebook[5], revived_code, rtol=0.05, atol=0.01)


def test_revival_with_fewer_vectors_than_dead_codes():
    module = quantizer(64, D, ema_decay=0.0, revival_threshold=0.5)
    module(latents(1, 2))  # four vectors
    module.commit()
    assert int((module.ema_counts > 0).sum()) <= 8
    assert torch.isfinite(module.codebook).all()


def test_revival_depends_on_the_seed_and_is_disabled_by_threshold_zero():
    def after(seed: int, threshold: float) -> torch.Tensor:
        module = quantizer(64, D, ema_decay=0.5, revival_threshold=threshold)
        module.seed = seed
        for step in range(3):
            module(latents(seed=step))
            module.commit()
        return module.codebook

    assert torch.equal(after(1, 0.5), after(1, 0.5))
    assert not torch.equal(after(1, 0.5), after(2, 0.5))
    assert torch.equal(after(1, 0.0), after(2, 0.0))


def test_revival_restores_codebook_usage_on_clustered_vectors():
    """Half of the codes start far from all vectors."""
    module, vectors_ND = quantizer(64, D), clusters(64, 50)
    module.codebook[32:] += 100
    module.ema_sums.copy_(module.codebook)
    for _ in range(150):
        ids = module(as_latents(vectors_ND)).ids
        module.commit()
    assert len(ids.unique()) / 64 > 0.8


def test_number_of_revival_candidates_is_bounded():
    module = quantizer(4096, 2)
    assert module._revival_candidates(torch.randn(10_000, 2)).shape == (REVIVAL_CANDIDATES, 2)
    assert module._revival_candidates(torch.randn(10, 2)).shape == (10, 2)
    assert module._revival_candidates(torch.randn(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("vectors", [64, 1000, 1597, 4096])  # 1597 and its golden section are Fibonacci numbers
def test_revival_candidates_are_distinct_and_spread_over_the_batch(vectors):
    module = quantizer(4096, 1)
    numbers_N1 = torch.arange(vectors, dtype=torch.float32)[:, None]
    first, second = [], []
    for candidates in (first, second):
        candidates += module._revival_candidates(numbers_N1)[:, 0].int().tolist()
        module.commits += 1
    assert len(set(first)) == len(first) == min(vectors, REVIVAL_CANDIDATES)
    assert first[:4] != second[:4]
    assert len({8 * number // vectors for number in first[:16]}) == 8


# --- k-means ---------------------------------------------------------------------------------------------------------------------


def test_kmeans_is_deterministic_and_keeps_the_global_rng_state():
    vectors_ND = clusters(K, 30)
    state = torch.random.get_rng_state()
    first = kmeans(vectors_ND, K, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, kmeans(vectors_ND, K, seed=3))
    assert not torch.equal(first, kmeans(vectors_ND, K, seed=4))


def test_kmeans_has_lower_error_than_random_vectors():
    vectors_ND = clusters(40, 30)

    def error(codebook_KD: torch.Tensor) -> float:
        return float((vectors_ND - codebook_KD[nearest_codes(vectors_ND, codebook_KD)]).square().mean())

    chosen = np.mean([error(vectors_ND[torch.randperm(len(vectors_ND), generator=torch.Generator().manual_seed(seed))[:K]]) for seed in range(5)])
    assert error(kmeans(vectors_ND, K, seed=0)) < 0.7 * chosen


@pytest.mark.parametrize("count", [1, 5, K - 1, K, K + 1])
def test_kmeans_with_few_vectors(count):
    vectors_ND = clusters(K, 2)[:count]
    codebook_KD = kmeans(vectors_ND, K, seed=0)
    assert codebook_KD.shape == (K, D) and torch.isfinite(codebook_KD).all()
    assert (torch.cdist(codebook_KD, vectors_ND).min(1).values < 0.5).all(), "every code is close to a vector"


@pytest.mark.parametrize("count", [3, 10 * K])
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_initialize_leaves_no_dead_code(count, l2_normalize):
    module, vectors_ND = quantizer(l2_normalize=l2_normalize), clusters(K, 40)[:count]
    module(latents())  # initialize must drop these pending statistics of the random codebook
    module.initialize(vectors_ND)
    assert (module.ema_counts > module.config.revival_threshold * module.ema_counts.mean()).all()
    torch.testing.assert_close(module.ema_sums, module.codebook * module.ema_counts[:, None])
    before = buffers(module)
    module.commit()
    assert_equal(buffers(module), before)
    again = quantizer(l2_normalize=l2_normalize)
    again.initialize(vectors_ND)
    assert torch.equal(again.codebook, module.codebook)


def test_initialize_uses_most_codes_and_lowers_the_error():
    module, vectors_ND = quantizer(64, D), clusters(64, 50)
    random_error = float(module(as_latents(vectors_ND)).loss)
    module.initialize(vectors_ND)
    output = module(as_latents(vectors_ND))
    assert len(output.ids.unique()) / 64 > 0.8 and float(output.loss) < 0.2 * random_error


def test_code_sums():
    counts_K, sums_KD = code_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2]), 4)
    assert counts_K.tolist() == [1, 0, 2, 0] and sums_KD.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


# --- state -----------------------------------------------------------------------------------------------------------------------


def test_codebook_depends_on_the_seed_and_keeps_the_global_rng_state():
    state = torch.random.get_rng_state()
    assert torch.equal(quantizer(seed=1).codebook, quantizer(seed=1).codebook)
    assert not torch.equal(quantizer(seed=1).codebook, quantizer(seed=2).codebook)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_continues_identically_from_a_state_dict():
    uninterrupted = quantizer(revival_threshold=0.5)
    for step in range(3):
        uninterrupted(latents(seed=step))
        uninterrupted.commit()
    copied = quantizer(revival_threshold=0.5)
    copied.load_state_dict(uninterrupted.state_dict())
    for step in range(3, 6):
        for module in (uninterrupted, copied):
            module(latents(seed=step))
            module.commit()
    assert_equal(uninterrupted.state_dict(), copied.state_dict())
