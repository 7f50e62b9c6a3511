"""Embeddings of the n-grams of captions, in training, in sampling and in transformers' generate."""

import dataclasses

import pytest
import torch
from transformers import StaticCache

from stage2_prior.generation.decoding import StaticDecoder, make_decoder
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.given_ids import start_ids
from stage2_prior.model.text_embedding import LENGTHS, NGramEmbedding, ngram_hashes, text_slices
from stage2_prior.prior import TokenPrior
from stage2_prior.segments import GivenGrid, GivenText
from stage2_prior.vocabulary import Vocabulary
from tests.test_segments import perturbed, random_given
from tests.tiny_priors import random_batch, tiny_prior
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig

IMAGE = Grid(name="image", codebook_size=6, height=2, width=2)
LOW = GivenGrid(grid=Grid(name="low", codebook_size=5, height=1, width=2, token_fingerprint="a" * 64), drop_rate=0.2)
TEXT = GivenText(text_ids=256, num_tokens=16, drop_rate=0.1, token_fingerprint="text:bytes")
VOCABULARY = Vocabulary(grids=[IMAGE], class_names=["ant", "bee"], token_fingerprint="f" * 64, label_drop=0.1, conditions=[LOW, TEXT])
TEXT_ONLY = dataclasses.replace(VOCABULARY, class_names=None, conditions=[TEXT])


def ids_of(*texts: str) -> torch.Tensor:
    """The ids (B, 16) of texts, padded."""
    return torch.tensor([[*text.encode(), *[256] * (TEXT.num_tokens - len(text.encode()))] for text in texts])


def make_prior(vocabulary: Vocabulary = VOCABULARY, any_order: bool = False, **options) -> TokenPrior:
    config = PriorConfig(architecture="grid_transformer", width=32, layers=2, heads=2, options=options)
    return TokenPrior.from_config(config, vocabulary, seed=0, any_order=any_order)


# --- hashes ------------------------------------------------------------------------------------------------------------------


def test_the_end_of_a_word_has_the_same_hashes_at_every_place():
    ids_BL = ids_of("a photo of truck", "one truck", "one track")
    for length in LENGTHS:
        hashes_BL = ngram_hashes(ids_BL, length)
        assert hashes_BL[0, 15] == hashes_BL[1, 8], f"{length} bytes"
        assert (hashes_BL[1, 8] == hashes_BL[2, 8]) == (length == 2), "both end in ck, and differ before"


def test_hashes_depend_on_order_and_on_the_start():
    assert ngram_hashes(torch.tensor([[1, 2]]), 2)[0, 1] != ngram_hashes(torch.tensor([[2, 1]]), 2)[0, 1]
    assert ngram_hashes(torch.tensor([[0, 0]]), 2)[0].unique().numel() == 2, "the start of a text is not the id 0"
    many = ngram_hashes(torch.randint(0, 257, (50, 100), generator=torch.Generator().manual_seed(0)), 5)
    assert many.unique().numel() > 0.99 * many.numel() and many.min() >= 0


def test_embeddings_have_the_scale_of_one_embedding():
    embedding = NGramEmbedding(rows=64, width=256)
    torch.nn.init.normal_(embedding.embedding.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    assert embedding(ids_of("abcdefghijklmnop")).std().item() == pytest.approx(0.5, rel=0.1)


def test_positions_of_texts():
    assert text_slices([[1, 2, 1], [16], [2, 2, 1], [3]]) == [slice(3, 19), slice(23, 26)]


def test_hashes_of_32_bit_ids():
    ids_BL = ids_of("a photo of truck")
    assert torch.equal(ngram_hashes(ids_BL.int(), 5), ngram_hashes(ids_BL, 5))


# --- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_order", [False, True])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, TEXT_ONLY])
def test_logits_of_sampling_are_those_of_a_forward_pass(vocabulary, any_order):
    prior = perturbed(make_prior(vocabulary, any_order))
    ids_BT, _ = random_batch(vocabulary, 3)
    classes = [0, 1, 1] if vocabulary.num_classes else [-1, -1, -1]
    given = random_given(3, vocabulary)
    assert isinstance(make_decoder(prior.model, vocabulary.num_codes, 3, 30), StaticDecoder)
    assert largest_logit_difference(prior, prior, ids_BT, classes, given) < 1e-4
    without = perturbed(make_prior(vocabulary, any_order, text_ngram_rows=0))
    without.load_state_dict(prior.state_dict(), strict=False)  # it has no embeddings of n-grams
    assert largest_logit_difference(without, prior, ids_BT, classes, given) > 1e-2, "the embeddings have an effect"


@pytest.mark.parametrize("any_order", [False, True])
def test_models_without_a_static_decoder_sample_the_same_images(any_order):
    prior = perturbed(make_prior(any_order=any_order))
    given, sampling, seeds = random_given(3, VOCABULARY), SamplingConfig(guidance_scale=2), [0, 1, 2]
    expected = prior.sample([0, 1, 1], sampling, seeds, given=given)
    prior.model.register_forward_hook(lambda *unused: None)  # models with hooks are called as they are
    assert torch.equal(prior.sample([0, 1, 1], sampling, seeds, given=given), expected)


def test_generate_and_caches_of_transformers_agree():
    prior = perturbed(make_prior())
    start_BP = start_ids(VOCABULARY, torch.tensor([0, 1]), random_given(2, VOCABULARY), torch.zeros(2, 4, dtype=torch.int64))
    expected = prior.model.generate(start_BP, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    static = prior.model.generate(start_BP, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)
    full_BSK = prior.model(expected, use_cache=False).logits
    cache = StaticCache(config=prior.model.config, max_cache_len=expected.shape[1])
    parts = [prior.model(part, past_key_values=cache).logits for part in expected.split([start_BP.shape[1], 2, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BSK, rtol=0, atol=1e-4)


def test_texts_in_two_calls_are_refused():
    prior = make_prior().eval()
    start_BP = start_ids(VOCABULARY, torch.tensor([0]), random_given(1, VOCABULARY), torch.zeros(1, 4, dtype=torch.int64))
    cache = prior.model(start_BP[:, :10], use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"The cache holds 10 ids, which end before or inside of a text"):
        prior.model(start_BP[:, 10:], past_key_values=cache)
    with pytest.raises(InputError, match=r"prefill_chunk_size is 10, which ends before or inside of a text"):
        prior.model.generate(start_BP, max_new_tokens=4, cache_implementation="static", prefill_chunk_size=10)


def test_only_bytes_have_embeddings_of_ngrams():
    other = dataclasses.replace(TEXT, token_fingerprint=f"text:{'0' * 64}")
    assert make_prior().model.config.text_ngram_rows > 0
    for vocabulary in (dataclasses.replace(VOCABULARY, conditions=[LOW, other]), dataclasses.replace(VOCABULARY, conditions=[LOW])):
        model = make_prior(vocabulary).model
        assert model.text_embedding is None and "text_ngram_rows" not in model.config.to_diff_dict()
    with pytest.raises(InputError, match="text_ngram_rows is 8; allowed: 0, or a number of embeddings if a text is given"):
        make_prior(dataclasses.replace(VOCABULARY, conditions=[LOW]), text_ngram_rows=8)
    assert tiny_prior("llama", VOCABULARY).model.config.model_type == "llama", "other architectures have no such embeddings"


def test_saved_prior_gives_the_same_logits(tmp_path):
    prior = perturbed(make_prior())
    prior.save_pretrained(tmp_path)
    loaded, (ids_BT, classes_B) = TokenPrior.from_pretrained(tmp_path), random_batch(VOCABULARY, 2)
    given = random_given(2, VOCABULARY)
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT, classes_B, given), prior(ids_BT, classes_B, given))


def test_words_are_learned_quickly():
    words = ["stop", "post", "spot", "pots", "tops", "opts"]  # only the order of the letters differs
    templates = ["{}", "a {}", "one {} here", "see: {}"]
    pairs = [(template.format(word), number) for number, word in enumerate(words) for template in templates]
    text_BL, images_BT = ids_of(*(text for text, _ in pairs)), torch.tensor([[number] * IMAGE.num_tokens for _, number in pairs])
    unseen_BL = ids_of(*(f"the {word}" for word in words))
    losses = {}
    for name, options in {"bytes": {"text_ngram_rows": 0}, "n-grams": {}}.items():
        prior = make_prior(TEXT_ONLY, **options).train()
        optimizer = torch.optim.AdamW(prior.parameters(), lr=0.003)
        for _ in range(25):
            optimizer.zero_grad()
            prior.loss(images_BT, None, {"text": text_BL}).backward()
            optimizer.step()
        with torch.no_grad():
            logits_BK = prior.eval()(images_BT[::4], None, {"text": unseen_BL})[:, 0]
        losses[name] = torch.nn.functional.cross_entropy(logits_BK, torch.arange(len(words))).item()
    assert losses["n-grams"] < 0.5 * losses["bytes"], losses
