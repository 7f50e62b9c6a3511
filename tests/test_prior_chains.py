"""Several priors that sample one after another, and bundles of them and of the tokenizers of conditions."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.bundle import make_bundle, read_bundle
from pipelines.command_line import dispatch
from pipelines.pipeline_parts import PipelineParts
from stage1_tokenizer import load_tokenizer
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tokenizer_config import FORMATS
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.prior_chain import PriorChain
from stage2_prior.prior import TokenPrior
from stage2_prior.segments import GivenGrid
from stage2_prior.vocabulary import Vocabulary
from tests.conditioned import CLASSES, Parts, given_low, given_text, image_tokenizer, make_parts, saved_prior, sharpened
from tests.run_files import edit_json
from tests.test_tokenizer_protocol import SIZE, MeanColours
from tests.tiny_priors import tiny_prior
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig

TOP, BOTTOM = Grid("top", 5, 1, 2), Grid("bottom", 7, 2, 2)
LOW = GivenGrid(grid=Grid("low", 4, 1, 1, token_fingerprint="a" * 64), drop_rate=0.2)
TOP_PRIOR = Vocabulary(grids=[TOP], class_names=CLASSES, token_fingerprint="f" * 64, label_drop=0.1)
BOTTOM_PRIOR = Vocabulary(grids=[BOTTOM], class_names=CLASSES, token_fingerprint="f" * 64, label_drop=0.1, class_drop=0.1,
                          conditions=[GivenGrid(grid=TOP, drop_rate=0.1)])


# --- vocabularies ----------------------------------------------------------------------------------------------------------------


def test_a_chain_is_given_what_no_earlier_prior_draws():
    chain = ChainVocabulary([dataclasses.replace(TOP_PRIOR, conditions=[LOW]), dataclasses.replace(BOTTOM_PRIOR, conditions=[
        GivenGrid(grid=TOP), dataclasses.replace(LOW, drop_rate=0.1)])])
    assert [grid.name for grid in chain.grids] == ["top", "bottom"] and chain.num_tokens == 6 and chain.most_codes == 7 and chain.most_steps == 4
    assert chain.conditions == [dataclasses.replace(LOW, drop_rate=0.1)], "with the smallest drop rate"
    assert chain.given_names == ["class", "low", "top"] and chain.token_fingerprints == {"low": "a" * 64}


def changed(vocabulary: Vocabulary, **fields: object) -> Vocabulary:
    return dataclasses.replace(vocabulary, **fields)


@pytest.mark.parametrize(("vocabularies", "words"), [
    ([], "there is no prior"),
    ([TOP_PRIOR, TOP_PRIOR], "both draw the grid 'top'"),
    ([BOTTOM_PRIOR, TOP_PRIOR], "prior 1 of 2 is given the grid 'top', which prior 2 of 2 draws later. Give the priors in the order of sampling"),
    ([TOP_PRIOR, changed(BOTTOM_PRIOR, token_fingerprint="e" * 64)], "their token_fingerprint differ"),
    ([TOP_PRIOR, changed(BOTTOM_PRIOR, class_names=["other"])], "their class_names differ"),
    ([TOP_PRIOR, changed(BOTTOM_PRIOR, conditions=[GivenGrid(grid=dataclasses.replace(TOP, codebook_size=6))])],
     "is given the grid 1 x 2 of 6 codes, but prior 1 of 2 draws 1 x 2 of 5 codes"),
    ([changed(TOP_PRIOR, conditions=[LOW]), changed(BOTTOM_PRIOR, conditions=[GivenGrid(grid=TOP), dataclasses.replace(
        LOW, grid=dataclasses.replace(LOW.grid, codebook_size=9))])], "different conditions named 'low'"),
])
def test_priors_that_do_not_belong_together_are_refused(vocabularies, words):
    with pytest.raises(InputError, match=words):
        ChainVocabulary(vocabularies).conditions  # noqa: B018


def test_what_can_be_left_out():
    alone = ChainVocabulary([TOP_PRIOR])
    assert alone.why_not_sampled(True, []) is None and alone.why_not_sampled(False, []) is None
    never = ChainVocabulary([changed(TOP_PRIOR, label_drop=0.0)])
    assert "No class is given" in str(never.why_not_sampled(False, []))
    chain = ChainVocabulary([TOP_PRIOR, changed(BOTTOM_PRIOR, class_drop=0.0)])
    assert "without a drop rate of the class" in str(chain.why_not_sampled(False, [])), "the second prior is given top, but no class"
    assert ChainVocabulary([TOP_PRIOR, BOTTOM_PRIOR]).why_not_sampled(False, []) is None
    needs_low = ChainVocabulary([changed(TOP_PRIOR, conditions=[dataclasses.replace(LOW, drop_rate=0.0)])])
    assert "low is not given" in str(needs_low.why_not_sampled(True, [])) and needs_low.why_not_sampled(True, ["low"]) is None
    assert needs_low.why_not_sampled(False, []) is None, "all segments were dropped together (label_drop)"


# --- sampling --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain() -> PriorChain:
    return PriorChain([sharpened(tiny_prior("grid_transformer", vocabulary)) for vocabulary in (TOP_PRIOR, BOTTOM_PRIOR)])


def test_one_prior_samples_as_without_a_chain():
    prior = sharpened(tiny_prior("grid_transformer", TOP_PRIOR))
    drawn = PriorChain([prior]).sample([0, 1], SamplingConfig(guidance_scale=2.0), [3, 4])
    assert torch.equal(drawn["top"], prior.sample([0, 1], SamplingConfig(guidance_scale=2.0), [3, 4]))


def test_the_second_prior_is_given_what_the_first_draws(chain):
    settings = SamplingConfig(guidance={"top": 2.0, "class": 1.5})
    progress: list[tuple[int, int]] = []
    drawn = chain.sample([0, 1, 1], settings, [1, 2, 3], lambda done, total: progress.append((done, total)))
    assert drawn["top"].shape == (3, 2) and drawn["bottom"].shape == (3, 4) and progress == [(done, 6) for done in range(1, 7)]
    again = chain.sample([0, 1, 1], settings, [1, 2, 3])
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    alone = chain.sample([1], settings, [3])
    assert all(torch.equal(alone[name][0], drawn[name][2]) for name in drawn), "an image does not depend on the others"
    kept = chain.sample([0, 1, 1], SamplingConfig(), [7, 8, 9], known={"top": drawn["top"]})
    assert torch.equal(kept["top"], drawn["top"]) and not torch.equal(kept["bottom"], drawn["bottom"])
    for name in drawn:
        drawn[name] = drawn[name].clone()
    greedy = chain.sample([0], SamplingConfig(temperature=0), [1])
    direct = chain.priors[1].sample([0], SamplingConfig(temperature=0), [5], given={"top": greedy["top"]})
    assert torch.equal(direct, greedy["bottom"])


def any_order_then_raster() -> PriorChain:
    """A prior of top that predicts in any order, and one of bottom that does not."""
    config = PriorConfig(architecture="grid_transformer", width=32, layers=2, heads=2)
    return PriorChain([TokenPrior.from_config(config, TOP_PRIOR, 0, any_order=True), tiny_prior("grid_transformer", BOTTOM_PRIOR)])


@pytest.mark.parametrize(("settings", "words"), [
    ({"order": "spread"}, r"sampling\.order is 'spread', but the prior was trained in raster order"),
    ({"steps": 3}, r"sampling\.steps is 3, but the prior was trained in raster order"),
    ({"steps": 100_000}, r"sampling\.steps is 100000; allowed: 1 to 4, the number of tokens of an image that one prior draws"),
])
def test_settings_that_a_later_prior_does_not_support_are_refused_before_the_first_one_samples(settings, words):
    progress: list[int] = []
    with pytest.raises(InputError, match=words):
        any_order_then_raster().sample([0], SamplingConfig(**settings), [1], lambda done, total: progress.append(done))
    assert not progress


def test_known_tokens_that_a_later_prior_cannot_keep_are_refused_before_the_first_one_samples():
    progress: list[int] = []
    with pytest.raises(InputError, match="there are known tokens after unknown ones"):
        any_order_then_raster().sample([0], SamplingConfig(), [1], lambda done, total: progress.append(done),
                                       known={"bottom": torch.tensor([[-1, 2, -1, -1]])})
    assert not progress


def test_priors_of_a_chain_use_different_random_numbers():
    """With equal numbers, ids of uniform priors would be equal."""
    uniform = [changed(TOP_PRIOR, grids=[Grid("top", 64, 2, 2)]),
               changed(BOTTOM_PRIOR, grids=[Grid("bottom", 64, 2, 2)], conditions=[GivenGrid(grid=Grid("top", 64, 2, 2))])]
    priors = [tiny_prior("grid_transformer", vocabulary).eval() for vocabulary in uniform]
    for prior in priors:
        torch.nn.init.zeros_(prior.model.get_output_embeddings().weight)
    drawn = PriorChain(priors).sample([0, 1], SamplingConfig(), [1, 2])
    assert (drawn["top"] == drawn["bottom"]).float().mean() < 0.5


def test_settings_of_each_prior():
    chain = ChainVocabulary([changed(TOP_PRIOR, label_drop=0.0), BOTTOM_PRIOR])
    settings = SamplingConfig(guidance_scale=2.0, guidance={"top": 3.0}, steps=3)
    assert chain.settings_of(0, settings) == SamplingConfig(steps=2), "the first prior supports no guidance and has two tokens"
    assert chain.settings_of(1, settings) == settings
    assert ChainVocabulary([TOP_PRIOR]).settings_of(0, settings) is settings


# --- bundles of two priors -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def two_grids():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, MeanColours.FORMAT, ("tests.test_tokenizer_protocol", "MeanColours"))
        yield


@pytest.fixture(scope="module")
def two_priors(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A tokenizer with the grids coarse and fine, a prior of coarse, and one of fine given coarse."""
    root = tmp_path_factory.mktemp("two")
    MeanColours({"coarse": 4, "fine": 16}, ImageTransform(SIZE, 1), CLASSES).save_pretrained(root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    coarse, fine = tokenizer.grids
    first = saved_prior(root / "coarse/prior", [coarse], tokenizer.token_fingerprint)
    second = saved_prior(root / "fine/prior", [fine], tokenizer.token_fingerprint, [GivenGrid(grid=coarse, drop_rate=0.2)], class_drop=0.1)
    return root / "tokenizer", first, second


def test_bundle_of_two_priors(two_priors, tmp_path):
    tokenizer, first, second = two_priors
    out = tmp_path / "pipeline"
    assert dispatch(["bundle", "--tokenizer", str(tokenizer), "--prior", str(first), "--prior", str(second), "--out", str(out),
                     "--guidance", "coarse=2,class=1.5"]) == 0
    content = json.loads((out / "pipeline.json").read_text())
    assert content["priors"] == ["prior", "prior_2"] and "conditions" not in content
    assert content["sampling"]["guidance"] == {"coarse": 2, "class": 1.5}
    pipe = ImageGenerationPipeline.from_pretrained(out, "cpu")
    images = pipe(["ant", "bee"], seed=1)
    assert set(images.token_ids) == {"coarse", "fine"} and len(images.images) == 2
    ids_BT = pipe.tokenizer.join_tokens(images.token_ids)
    request = pipe._check_request(["ant", "bee"], 1, 1, {})._replace(known_BT=torch.where(torch.arange(20) < 4, ids_BT, -1))
    assert torch.equal(next(pipe._sample_batches(request, "pil", None, 8, False)).token_ids["coarse"], images.token_ids["coarse"])
    assert pipe.logit_difference(images.token_ids, images.class_indices) < 1e-4
    for settings, words in (({"order": "random"}, "sampling.order is 'random', but the prior was trained in raster order"),
                            ({"steps": 2}, "sampling.steps is 2, but"), ({"steps": 17}, "sampling.steps is 17; allowed: 1 to 16")):
        with pytest.raises(InputError, match=words):
            pipe.batches(["ant"], seed=1, **settings)  # before the first batch
    pipe.save_pretrained(tmp_path / "copy")
    again = ImageGenerationPipeline.from_pretrained(tmp_path / "copy", "cpu")(["ant", "bee"], seed=1)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in images.images]
    with torch.no_grad():
        pipe.chain.priors[1].model.get_output_embeddings().weight.mul_(2)
    pipe.save_pretrained(tmp_path / "changed")
    fingerprints = [PipelineParts.in_folder(path, read_bundle(path)).fingerprints() for path in (out, tmp_path / "changed")]
    assert fingerprints[0]["prior"] == fingerprints[1]["prior"] and fingerprints[0]["prior_2"] != fingerprints[1]["prior_2"]
    assert dispatch(["generate", str(out), "--classes", "ant", "--num", "2", "--out", str(tmp_path / "images"), "--device", "cpu"]) == 0
    assert (tmp_path / "images/ant-1.png").is_file()
    unconditional = pipe(num_images_per_label=2, seed=0)
    assert len(unconditional.images) == 2


def test_priors_that_do_not_draw_all_grids_are_refused(two_priors, tmp_path):
    tokenizer, first, second = two_priors
    for priors, words in (([first], "the prior predicts 2 x 2 of 4 codes"), ([second], "coarse is given to it: add the prior that draws coarse"),
                          ([second, first], "draws later. Give the priors in the order of sampling")):
        with pytest.raises(InputError, match=words):
            make_bundle(tokenizer, priors, tmp_path / "pipeline", SamplingConfig())
    assert not (tmp_path / "pipeline").exists()


def test_sampling_settings_are_checked_for_each_prior(two_priors, tmp_path):
    tokenizer, first, second = two_priors
    for settings, words in ((SamplingConfig(guidance={"depth": 2.0}), r"sampling\.guidance has depth; the given segments of .* are: class, coarse"),
                            (SamplingConfig(order="random"), "trained in raster order"), (SamplingConfig(top_k=17), "has 16 codes")):
        with pytest.raises(InputError, match=words):
            make_bundle(tokenizer, [first, second], tmp_path / "pipeline", settings)
    grids, fingerprint = load_tokenizer(tokenizer).grids, load_tokenizer(tokenizer).token_fingerprint
    never_dropped = saved_prior(tmp_path / "prior", grids[1:], fingerprint, [GivenGrid(grid=grids[0])])
    with pytest.raises(InputError, match="trained without coarse but with class"):
        make_bundle(tokenizer, [first, never_dropped], tmp_path / "pipeline", SamplingConfig(guidance={"class": 3.0}))


@pytest.mark.parametrize("priors", ["prior", ["../prior"], ["prior", "/etc"], [], [3]])
def test_edited_names_of_priors_are_refused(priors, two_priors, tmp_path):
    tokenizer, first, second = two_priors
    folder = make_bundle(tokenizer, [first, second], tmp_path / "pipeline", SamplingConfig())
    edit_json(folder / "pipeline.json", priors=priors)
    with pytest.raises(InputError, match="it must be a list of the folders prior, prior_2"):
        read_bundle(folder)


# --- bundles with conditions -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"), class_drop=0.1)


def test_bundle_copies_the_tokenizers_of_conditions(parts, tmp_path):
    folder = parts.bundle(tmp_path / "pipeline", guidance={"low": 2.0})
    content = json.loads((folder / "pipeline.json").read_text())
    assert content["conditions"] == [{"name": "low", "kind": "low_resolution", "factor": 2}, {"name": "text", "kind": "caption"}]
    assert "priors" not in content
    assert (folder / "conditions/low/model.safetensors").read_bytes() == (parts.low / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (folder / "conditions").iterdir()) == ["low"], "bytes need no tokenizer"
    pipe = ImageGenerationPipeline.from_pretrained(folder, "cpu")
    pipe.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        pipe.prior.model.get_output_embeddings().weight.mul_(2)
    pipe.save_pretrained(tmp_path / "changed")
    for copy in ("copy", "changed"):
        assert read_bundle(tmp_path / copy)["conditions"] == content["conditions"]


def test_bundle_command_finds_conditions_beside_the_prior(parts, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(parts.prior, run / "prior")
    options = ["bundle", "--tokenizer", str(parts.tokenizer), "--prior", str(run / "prior"), "--out", str(tmp_path / "pipeline")]
    with pytest.raises(InputError, match=r"given the grid 'low', so the pipeline needs the tokenizer.*--condition low=FOLDER"):
        dispatch(options)
    assert dispatch([*options, "--condition", f"low={parts.low}"]) == 0
    shutil.copytree(parts.low, run / "conditions/low/tokenizer")
    shutil.rmtree(tmp_path / "pipeline")
    assert dispatch(options) == 0
    for wrong in ("low", "low=/does/not/exist"):
        with pytest.raises(InputError, match="--condition"):
            dispatch([*options, "--condition", wrong])


def test_bundle_refuses_other_tokenizers_of_conditions(parts, two_priors, tmp_path):
    other = image_tokenizer(tmp_path / "other", 8, seed=5)
    for folder, words in ((other, "do not belong together"), (two_priors[0], "the tokenizer of a condition must have one grid")):
        with pytest.raises(InputError, match=words):
            make_bundle(parts.tokenizer, parts.prior, tmp_path / "pipeline", SamplingConfig(), {"low": folder})
    assert not (tmp_path / "pipeline").exists()


def test_changed_conditions_of_a_bundle_are_detected(parts, tmp_path):
    folder = parts.bundle(tmp_path / "pipeline")
    original = (folder / "pipeline.json").read_text()
    for records, words in (([], "has other conditions"), ([{"name": "../low", "kind": "edges"}], "must be a list of records"),
                           ("low", "must be a list")):
        edit_json(folder / "pipeline.json", conditions=records)
        with pytest.raises(InputError, match=words):
            read_bundle(folder)
        (folder / "pipeline.json").write_text(original)
    shutil.rmtree(folder / "conditions/low")
    image_tokenizer(folder / "conditions/low", 8, seed=5)
    with pytest.raises(InputError, match="do not belong together"):
        read_bundle(folder)
    shutil.rmtree(folder / "conditions")
    with pytest.raises(InputError, match="needs the tokenizer that made its ids"):
        read_bundle(folder)


def test_bundles_without_conditions_have_no_new_fields(tiny_run):
    content = json.loads((tiny_run / "pipeline/pipeline.json").read_text())
    assert list(content) == ["format", "format_version", "vqmosaic", "class_names", "token_fingerprint", "sampling"]
    assert "guidance" not in content["sampling"]


def test_a_prior_of_other_text_ids_is_refused(parts, tmp_path):
    tokenizer = load_tokenizer(parts.tokenizer)
    text = dataclasses.replace(given_text(), token_fingerprint="text:" + "b" * 64)
    prior = saved_prior(tmp_path / "prior", tokenizer.grids, tokenizer.token_fingerprint, [given_low(parts.low), text])
    with pytest.raises(InputError, match=r"the text 'text', whose ids come from a tokenizer of transformers. Give its folder with --condition text="):
        make_bundle(parts.tokenizer, prior, tmp_path / "pipeline", SamplingConfig(), {"low": parts.low})
    (tmp_path / "words").mkdir()
    (tmp_path / "words/tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="do not belong together"):
        make_bundle(parts.tokenizer, prior, tmp_path / "pipeline", SamplingConfig(), {"low": parts.low, "text": tmp_path / "words"})


def test_pipelines_in_memory_need_the_tokenizers_of_conditions(parts):
    with pytest.raises(InputError, match="there is no tokenizer for low, text"):
        ImageGenerationPipeline(load_tokenizer(parts.tokenizer), TokenPrior.from_pretrained(parts.prior))
