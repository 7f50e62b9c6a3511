"""The quantizer: right codes at any precision, gradients and moving averages by hand, codes that die and come back."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stage1_tokenizer.quantizers import QUANTIZERS, EMAQuantizer, ema, nearest_code
from stage1_tokenizer.quantizers.codebook_quantizer import REVIVAL_CANDIDATES
from stage1_tokenizer.quantizers.nearest_code import code_sums, full_precision, kmeans, nearest_codes

K, D = 24, 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def quantizer(codebook_size: int = K, code_dim: int = D, **fields) -> EMAQuantizer:
    return QUANTIZERS["ema"](codebook_size, code_dim, **fields).train()


def latents(batch: int = 4, size: int = 5, code_dim: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, code_dim, size, size, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, per_cluster: int, code_dim: int = D, seed: int = 0) -> torch.Tensor:
    """Vectors (N, D), shuffled, around `count` well separated centres."""
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


def assert_nearest(ids_N: torch.Tensor, vectors_ND: torch.Tensor, codebook_KD: torch.Tensor) -> None:
    """Each id is the float64 argmin, or a code as near as it within 1e-5 of the distance."""
    distances = torch.cdist(vectors_ND.double().cpu(), codebook_KD.double().cpu())
    chosen = distances.gather(1, ids_N.cpu()[:, None])[:, 0]
    assert (chosen <= distances.min(1).values * (1 + 1e-5)).all()


# --- forward ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_ids_are_the_nearest_codes_and_lead_back_to_what_forward_gave(l2_normalize):
    module, latents_BDhw = quantizer(l2_normalize=l2_normalize), latents()
    output = module(latents_BDhw)
    assert output.ids.shape == (4, 5, 5) and output.ids.dtype == torch.int64
    assert output.quantized.shape == latents_BDhw.shape and output.quantized.dtype == torch.float32
    assert output.ids.min() >= 0 and output.ids.max() < K
    assert torch.equal(module.ids_to_latents(output.ids), output.quantized)
    vectors_ND = module.normalize(latents_BDhw.permute(0, 2, 3, 1).reshape(-1, D))
    assert_nearest(output.ids.flatten(), vectors_ND, module.codebook)


def test_l2_normalize_puts_codes_and_latents_on_the_sphere():
    module, latents_BDhw = quantizer(l2_normalize=True), latents()
    torch.testing.assert_close(module.codebook.norm(dim=1), torch.ones(K))
    output = module(latents_BDhw)
    assert torch.equal(output.ids, module(5 * latents_BDhw).ids)
    cosines = F.normalize(latents_BDhw.permute(0, 2, 3, 1), dim=-1).reshape(-1, D) @ module.codebook.T
    assert torch.equal(output.ids.flatten(), cosines.argmax(1))
    module.commit()
    torch.testing.assert_close(module.codebook.norm(dim=1), torch.ones(K))


def test_gradient_passes_straight_through():
    module, latents_BDhw = quantizer(), latents().requires_grad_()
    downstream = torch.randn(latents_BDhw.shape)
    (module(latents_BDhw).quantized * downstream).sum().backward()
    assert torch.equal(latents_BDhw.grad, downstream)


@pytest.mark.parametrize("beta", [0.25, 1.5])
def test_commitment_loss_pulls_the_latents_with_weight_beta(beta):
    module, latents_BDhw = quantizer(commitment_weight=beta), latents().requires_grad_()
    output = module(latents_BDhw)
    codes_BDhw = module.ids_to_latents(output.ids)
    assert float(output.loss.detach()) == pytest.approx(beta * float((latents_BDhw - codes_BDhw).detach().square().mean()), rel=1e-5)
    output.loss.backward()
    by_hand = beta * 2 * (latents_BDhw.detach() - codes_BDhw) / latents_BDhw.numel()
    torch.testing.assert_close(latents_BDhw.grad, by_hand)
    assert not any(buffer.requires_grad for buffer in module.buffers()) and not list(module.parameters())  # codes learn by averages alone


def test_forward_changes_nothing_discard_forgets_and_evaluation_gathers_nothing():
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


def test_non_finite_latents_that_are_discarded_leave_the_codebook_finite():
    module = quantizer()
    before = buffers(module)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = latents()
        spoiled[1, 2] = bad
        output = module(spoiled)
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
def lowered(how: str):
    """Global settings that make float32 products bf16 or TF32, each the way a user may set it; put back afterwards."""
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
    """Crowded codes, so that bf16 distances would pick another code for some of the vectors; they do, as the last lines show."""
    rng = torch.Generator().manual_seed(1)
    vectors_ND = torch.randn(2000, 32, generator=rng).to(device)
    module = quantizer(512, 32).to(device)
    module.codebook.copy_(torch.randn(512, 32, generator=rng) * 0.3)
    expected = module(as_latents(vectors_ND)).ids
    assert_nearest(expected.flatten(), vectors_ND, module.codebook)
    before = flags()
    with lowered(how):
        inside = flags()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=how == "autocast"):
            output = module(as_latents(vectors_ND))
        assert flags() == inside, "the flags that a user set must be back"
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
    assert_nearest(output.ids.flatten(), vectors_ND.float(), module.codebook)
    assert_nearest(nearest_codes(vectors_ND, module.codebook.bfloat16()), vectors_ND.float(), module.codebook.bfloat16().float())
    assert output.quantized.dtype == torch.float32


def test_flags_that_follow_a_wider_one_go_on_following_it():
    """Written back as they read, they would keep the value that the wider flag had during the first search."""
    with lowered("all backends"):
        nearest_codes(torch.randn(4, D), torch.randn(K, D))
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_flags_come_back_after_an_error():
    with lowered("one backend"):
        inside = flags()
        with pytest.raises(RuntimeError):
            nearest_codes(torch.randn(4, D), torch.randn(K, D + 1))
        assert flags() == inside
        with full_precision(torch.device("cpu")):
            on_cpu = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
            assert {flag.fp32_precision for flag in on_cpu} == {"ieee"}  # not every processor lowers what it is allowed to


def test_a_large_codebook_is_never_held_against_all_vectors():
    """16,384 codes x 4,096 vectors would be 256 MiB of distances; no tensor may be a sixteenth of that."""
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.most = max(self.most, tensor.numel() * tensor.element_size())
            return result

    rng = torch.Generator().manual_seed(2)
    vectors_ND, codebook_KD = torch.randn(4096, 8, generator=rng), torch.randn(16384, 8, generator=rng)
    with Largest() as largest:
        ids_N = nearest_codes(vectors_ND, codebook_KD)
    assert largest.most <= 16 * 2**20
    assert_nearest(ids_N[::64], vectors_ND[::64], codebook_KD)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_pieces_of_the_search_make_up_the_whole(count, monkeypatch):
    monkeypatch.setitem(nearest_code.WORKING_SET_BYTES, "cpu", (1, 1))  # 16 rows and 64 codes at a time
    vectors_ND, codebook_KD = latents(1, 32).reshape(D, -1).T[:count], quantizer(200).codebook
    ids_N = nearest_codes(vectors_ND, codebook_KD)
    assert ids_N.shape == (count,)
    if count:
        assert_nearest(ids_N, vectors_ND, codebook_KD)
        assert count < 100 or len(ids_N.unique()) > 50, "codes of every piece are found"


def test_the_first_of_equally_near_codes_is_taken_in_whichever_piece_it_lies(monkeypatch):
    codebook_KD = torch.arange(50.0).repeat(4)[:, None].repeat(1, D)
    expected = nearest_codes(codebook_KD, codebook_KD)
    assert expected.tolist() == 4 * list(range(50))
    monkeypatch.setitem(nearest_code.WORKING_SET_BYTES, "cpu", (1, 1))
    assert torch.equal(nearest_codes(codebook_KD, codebook_KD), expected)


# --- moving averages -------------------------------------------------------------------------------------------------------------


def test_commit_is_the_moving_average_by_hand(monkeypatch):
    """Appendix A.1 of van den Oord et al. 2017, and Laplace smoothing of the counts, here strong enough to see all of it."""
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


def test_smoothing_keeps_a_code_without_any_use_finite():
    module = quantizer(ema_decay=0.0, revival_threshold=0.0)  # each commit forgets everything before it
    module(torch.zeros(1, D, 2, 2))
    module.commit()
    assert torch.isfinite(module.codebook).all()
    assert int((module.ema_counts == 0).sum()) == K - 1


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_micro_batches_commit_like_the_whole_batch(l2_normalize):
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


def test_a_dead_code_is_revived_lives_on_and_leaves_the_others_alone():
    module, vectors_ND = quantizer(), clusters(K, 40)
    module.initialize(vectors_ND)
    dead = [3, 17]
    module.codebook[dead] = 1e3  # nothing is ever near these
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
    torch.testing.assert_close(module.codebook[alive], twin.codebook[alive], rtol=1e-4, atol=1e-4)  # the smoothing sees another total
    for code in dead:
        assert (module.codebook[code] - vectors_ND).norm(dim=1).min() < 1e-3, "a revived code is one of the batch's vectors"
    revived = module.codebook[dead].clone()
    module.config.ema_decay = 0.9  # without any use it would be dead again in the eighth step unless sums and counts are reset in the next one
    counts_K = module.ema_counts.clone()
    for _ in range(15):
        used_K = torch.bincount(module(as_latents(vectors_ND)).ids.flatten(), minlength=K)
        counts_K.lerp_(used_K.float(), 0.1)
        module.commit()
    assert (used_K[dead] > 0).all(), "to the last step"
    torch.testing.assert_close(module.ema_counts[dead], counts_K[dead], msg=lambda text: f"a second revival would set the count anew: {text}")
    assert (module.codebook[dead] - revived).norm(dim=1).max() < 5, "it stays in its neighbourhood instead of being moved again and again"


def test_an_unlucky_revived_code_is_not_dead_again_at_once():
    """Even a code that gets no vector at all lives for many steps: its count starts at the mean and falls by the decay."""
    module = quantizer(ema_decay=0.9, revival_threshold=0.03)
    module.codebook[5], module.ema_sums[5], module.ema_counts[5] = 1e3, 1e3, 1e-9
    module(latents())
    module.commit()
    place = module.codebook[5].clone()
    assert module.ema_counts[5] == pytest.approx(float(module.ema_counts.mean()), rel=0.1)
    elsewhere = module.codebook[6]
    for _ in range(20):
        module(elsewhere[None, :, None, None].expand(1, D, 10, 10))  # nothing near code 5
        module.commit()
    torch.testing.assert_close(module.codebook[5], place, rtol=0.05, atol=0.01)


def test_more_dead_codes_than_vectors_wait_for_their_turn():
    module = quantizer(64, D, ema_decay=0.0, revival_threshold=0.5)
    module(latents(1, 2))  # four vectors
    module.commit()
    assert int((module.ema_counts > 0).sum()) <= 8
    assert torch.isfinite(module.codebook).all()


def test_revival_is_seeded_and_threshold_zero_turns_it_off():
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


def test_usage_on_clustered_vectors():
    """Half of all codes start where no vector is; revival brings them back to work."""
    module, vectors_ND = quantizer(64, D), clusters(64, 50)
    module.codebook[32:] += 100
    module.ema_sums.copy_(module.codebook)
    for _ in range(150):
        ids = module(as_latents(vectors_ND)).ids
        module.commit()
    assert len(ids.unique()) / 64 > 0.8


def test_candidates_are_bounded():
    module = quantizer(4096, 2)
    assert module._revival_candidates(torch.randn(10_000, 2)).shape == (REVIVAL_CANDIDATES, 2)
    assert module._revival_candidates(torch.randn(10, 2)).shape == (10, 2)
    assert module._revival_candidates(torch.randn(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("vectors", [64, 1000, 1597, 4096])  # 1597 and its golden section are numbers of Fibonacci
def test_candidates_are_different_vectors_and_few_of_them_come_from_all_parts_of_a_batch(vectors):
    module = quantizer(4096, 1)
    numbers_N1 = torch.arange(vectors, dtype=torch.float32)[:, None]
    first, second = [], []
    for into in (first, second):
        into += module._revival_candidates(numbers_N1)[:, 0].int().tolist()
        module.commits += 1
    assert len(set(first)) == len(first) == min(vectors, REVIVAL_CANDIDATES)
    assert first[:4] != second[:4]
    assert len({8 * number // vectors for number in first[:16]}) == 8


# --- k-means ---------------------------------------------------------------------------------------------------------------------


def test_kmeans_is_seeded_and_leaves_the_global_random_state_alone():
    vectors_ND = clusters(K, 30)
    state = torch.random.get_rng_state()
    first = kmeans(vectors_ND, K, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, kmeans(vectors_ND, K, seed=3))
    assert not torch.equal(first, kmeans(vectors_ND, K, seed=4))


def test_kmeans_beats_a_random_choice():
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
    assert (torch.cdist(codebook_KD, vectors_ND).min(1).values < 0.5).all(), "every code lies at a vector"


@pytest.mark.parametrize("count", [3, 10 * K])
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_initialize_leaves_no_dead_code(count, l2_normalize):
    module, vectors_ND = quantizer(l2_normalize=l2_normalize), clusters(K, 40)[:count]
    module(latents())  # what was gathered on the random codebook says nothing about the new one
    module.initialize(vectors_ND)
    assert (module.ema_counts > module.config.revival_threshold * module.ema_counts.mean()).all()
    torch.testing.assert_close(module.ema_sums, module.codebook * module.ema_counts[:, None])
    before = buffers(module)
    module.commit()
    assert_equal(buffers(module), before)
    again = quantizer(l2_normalize=l2_normalize)
    again.initialize(vectors_ND)
    assert torch.equal(again.codebook, module.codebook)


def test_initialize_makes_good_use_of_the_codebook_at_once():
    module, vectors_ND = quantizer(64, D), clusters(64, 50)
    random_error = float(module(as_latents(vectors_ND)).loss)
    module.initialize(vectors_ND)
    output = module(as_latents(vectors_ND))
    assert len(output.ids.unique()) / 64 > 0.8 and float(output.loss) < 0.2 * random_error


def test_code_sums():
    counts_K, sums_KD = code_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2]), 4)
    assert counts_K.tolist() == [1, 0, 2, 0] and sums_KD.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


# --- state -----------------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_codebook_and_leaves_the_global_random_state_alone():
    state = torch.random.get_rng_state()
    assert torch.equal(quantizer(seed=1).codebook, quantizer(seed=1).codebook)
    assert not torch.equal(quantizer(seed=1).codebook, quantizer(seed=2).codebook)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_saved_quantizer_goes_on_as_if_nothing_had_happened():
    straight = quantizer(revival_threshold=0.5)
    for step in range(3):
        straight(latents(seed=step))
        straight.commit()
    copied = quantizer(revival_threshold=0.5)
    copied.load_state_dict(straight.state_dict())
    for step in range(3, 6):
        for module in (straight, copied):
            module(latents(seed=step))
            module.commit()
    assert_equal(straight.state_dict(), copied.state_dict())
