"""Labelled images of a pipeline: balanced classes, the best of several candidates, and rejection by a classifier."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification, ResNetModel

from pipelines import ImageGenerationPipeline
from pipelines.augment.classifier_file import CLASS_NAMES_FILE, ClassifierFile, resolve_classifier_file
from pipelines.augment.classifiers import load_classifier
from pipelines.augment.labelled_images import LabelledOutput
from pipelines.generation_request import tries_seeds
from pipelines.labels import balanced_labels
from tests.conditioned import CLASSES
from tests.editing import make_pipe, make_prior, two_grids
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import image_seeds


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> ImageGenerationPipeline:
    return make_pipe(tmp_path_factory.mktemp("grey") / "tokenizer")


@pytest.fixture(scope="module", params=["one grid", "two grids"])
def any_pipe(request, tmp_path_factory) -> ImageGenerationPipeline:
    """Pipelines of one and of several grids."""
    folder = tmp_path_factory.mktemp("pipe") / "tokenizer"
    if request.param == "one grid":
        return make_pipe(folder, any_order=False)
    tokenizer = two_grids(folder)
    return ImageGenerationPipeline(tokenizer, make_prior(tokenizer), SamplingConfig())


def joined(batches: Iterable[LabelledOutput]) -> LabelledOutput:
    """All batches as one output."""
    batches, whole = list(batches), LabelledOutput(class_indices=[], scores=[])
    for batch in batches:
        for name in ("images", "class_indices", "seeds", "candidates", "accepted", "scores"):
            getattr(whole, name).extend(getattr(batch, name) or [])
    return whole


def log_likelihood(pipe: ImageGenerationPipeline, ids_T: torch.Tensor, label: int | None) -> float:
    """log p(tokens | class), from the logits of the prior one token at a time."""
    with torch.no_grad():
        logits_TK = pipe.prior(ids_T[None], None if label is None else torch.tensor([label]))[0].double()
    return float(sum(logits_TK[t].log_softmax(0)[ids_T[t]] for t in range(len(ids_T))))


def candidates(pipe: ImageGenerationPipeline, label: int, seed: int, count: int) -> list[tuple[int, torch.Tensor]]:
    """(seed, tokens) of the candidates of an image, each drawn alone."""
    seeds = [each for each, in tries_seeds([seed], count)]
    return [(each, pipe.tokenizer.join_tokens(pipe.sample_ids([label], pipe.sampling, [each]))[0]) for each in seeds]


# --- balance -----------------------------------------------------------------------------------------------------------------


def test_classes_come_in_turn_and_the_first_ones_have_one_more(pipe):
    assert balanced_labels(list("abcd"), [3, 1, 2], 8) == [3, 1, 2, 3, 1, 2, 3, 1]
    out = joined(pipe.labelled_batches(5, seed=1, batch_size=2))
    assert out.class_indices == [0, 1, 0, 1, 0] and out.candidates == out.accepted == [1] * 5
    assert joined(pipe.labelled_batches(3, "bee", seed=1)).class_indices == [1, 1, 1]


def test_images_are_those_of_a_call_and_do_not_depend_on_the_batch(pipe):
    out = joined(pipe.labelled_batches(5, seed=1, batch_size=2))
    expected = pipe([0, 1, 0, 1, 0], seed=1)
    assert out.seeds == expected.seeds == image_seeds(1, 5)
    assert [image.tobytes() for image in out.images] == [image.tobytes() for image in expected.images]
    skipped = list(pipe.labelled_batches(5, seed=1, batch_size=2, skip=lambda positions: 2 in positions))
    assert [batch.places for batch in skipped] == [range(2), range(4, 5)] and skipped[1].images[0].tobytes() == out.images[4].tobytes()


def test_images_keep_alpha(tmp_path):
    assert next(make_pipe(tmp_path / "tokenizer", channels=4).labelled_batches(2, seed=1)).images[0].mode == "RGBA"


# --- ranking -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_by", ["posterior", "likelihood"])
def test_the_best_candidate_is_kept(any_pipe, rank_by):
    """Brute force: every candidate is drawn alone, and its likelihood computed token by token."""
    out = joined(any_pipe.labelled_batches(6, seed=3, oversample=4, rank_by=rank_by, batch_size=4))
    numbers = []
    for seed, label, chosen, score in zip(image_seeds(3, 6), out.class_indices, out.seeds, out.scores, strict=True):
        drawn = candidates(any_pipe, label, seed, 4)
        ranks = [log_likelihood(any_pipe, ids_T, label) - (log_likelihood(any_pipe, ids_T, None) if rank_by == "posterior" else 0.0)
                 for _, ids_T in drawn]
        best = max(range(4), key=ranks.__getitem__)
        assert chosen == drawn[best][0] and score == pytest.approx(ranks[best] / torch.tensor(2.0).log().item(), abs=1e-3)
        numbers.append(best)
    assert len(set(numbers)) > 1, "not always the first"
    assert out.candidates == [4] * 6


def test_rankings_differ(pipe):
    chosen = [joined(pipe.labelled_batches(8, seed=3, oversample=4, rank_by=rank_by)).seeds for rank_by in ("posterior", "likelihood")]
    assert chosen[0] != chosen[1]


def test_guidance_does_not_change_how_candidates_are_ranked(pipe):
    out = next(pipe.labelled_batches(2, seed=1, oversample=2, guidance_scale=3.0))
    ids_BT = pipe.tokenizer.join_tokens(out.token_ids)
    expected = [(log_likelihood(pipe, ids_T, label) - log_likelihood(pipe, ids_T, None)) / torch.tensor(2.0).log().item()
                for ids_T, label in zip(ids_BT, out.class_indices, strict=True)]
    assert out.scores == pytest.approx(expected, abs=1e-3)


# --- rejection ---------------------------------------------------------------------------------------------------------------


def is_bright(images_BCHW: torch.Tensor, classes) -> torch.Tensor:
    """Accepts bright ants and dark bees."""
    means_B = images_BCHW.mean(dim=(1, 2, 3)).cpu()
    return (means_B > means_B.new_tensor(THRESHOLD)) == (torch.tensor(list(classes)) == 0)


THRESHOLD = 0.0


@pytest.fixture(scope="module", autouse=True)
def threshold(pipe):
    """The median brightness, so that about half of the candidates are accepted."""
    global THRESHOLD
    THRESHOLD = float(pipe([0, 1], 16, seed=5, output_type="pt").images.mean(dim=(1, 2, 3)).median())


@pytest.mark.parametrize("oversample", [1, 3])
def test_rejected_candidates_are_drawn_again(pipe, oversample):
    out = joined(pipe.labelled_batches(10, seed=3, oversample=oversample, accept=is_bright, batch_size=4))
    for number, (seed, label) in enumerate(zip(image_seeds(3, 10), out.class_indices, strict=True)):
        drawn = candidates(pipe, label, seed, out.candidates[number])
        fits = [bool(is_bright(pipe.tokenizer.decode(pipe.tokenizer.split_tokens(ids_T[None])).clamp(-1, 1), [label])[0]) for _, ids_T in drawn]
        assert out.accepted[number] == sum(fits) and not any(fits[:-oversample]), "it stops after the first candidates with an accepted one"
        ranks = {index: log_likelihood(pipe, ids_T, label) - log_likelihood(pipe, ids_T, None)
                 for index, (_, ids_T) in enumerate(drawn) if fits[index]}
        assert out.seeds[number] == drawn[max(ranks, key=ranks.__getitem__)][0]
    assert max(out.candidates) > oversample


def test_the_error_after_the_last_attempt_counts_the_accepted_candidates(pipe):
    def no_bees(images_BCHW, classes):
        return [label == 0 for label in classes]

    with pytest.raises(InputError, match=r"2 of 4 images had no accepted candidate after 3 attempts\. Accepted in this call: bee 0 of 6, ant 2 of 2"):
        list(pipe.labelled_batches(4, seed=1, accept=no_bees, max_attempts=3))


def test_a_stop_ends_the_sampling(pipe):
    from stage2_prior.generation.sampling import SamplingStopped

    calls = []
    batches = pipe.labelled_batches(4, seed=1, batch_size=2, callback=lambda done, total: calls.append((done, total)) or len(calls) < 20)
    with pytest.raises(SamplingStopped):
        list(batches)
    assert calls[0] == (0, 4) and calls[-1] == (2, 4)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"num_images": 1}, "1 image cannot be balanced over 2 classes"), ({"class_labels": ["ant", 0]}, "'ant' is listed twice"),
    ({"oversample": 0}, "oversample is 0"), ({"rank_by": "beauty"}, "rank_by is 'beauty'; allowed: posterior, likelihood"),
    ({"max_attempts": 0}, "max_attempts is 0"), ({"accept": lambda images, classes: [1.0] * len(images)}, r"must return bool \(4,\)"),
    ({"class_labels": "cow"}, "no class 'cow'"), ({"temperature": -1.0}, "temperature"),
])
def test_invalid_arguments_are_refused(pipe, arguments, words):
    with pytest.raises(InputError, match=words):
        list(pipe.labelled_batches(**{"num_images": 4, "seed": 1, **arguments}))


def test_a_prior_without_label_drop_has_no_posterior(pipe):
    plain = ImageGenerationPipeline(pipe.tokenizer, make_prior(pipe.tokenizer, label_drop=0.0), SamplingConfig())
    with pytest.raises(InputError, match=r"trained without label drop\. Set rank_by to 'likelihood'"):
        plain.labelled_batches(2, oversample=2)
    assert len(joined(plain.labelled_batches(2, oversample=2, rank_by="likelihood", seed=1)).images) == 2
    unlabelled = ImageGenerationPipeline(pipe.tokenizer, make_prior(pipe.tokenizer, class_names=None, label_drop=0.0), SamplingConfig())
    with pytest.raises(InputError, match="trained without classes"):
        unlabelled.labelled_batches(2)


# --- classifier files --------------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Logits of bright and dark for uint8 images."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        means_B = images_B3HW.float().mean(dim=(1, 2, 3))
        return torch.stack([means_B - self.threshold, self.threshold - means_B], dim=1)


def save_torchscript(path: Path, names: list[str] | None = None, threshold: float = 127.5) -> Path:
    """Save Brightness as TorchScript, with the names of its outputs."""
    torch.jit.save(torch.jit.script(Brightness(threshold)), str(path), _extra_files={} if names is None else {CLASS_NAMES_FILE: json.dumps(names)})
    return path


def save_transformers(folder: Path, labels: list[str]) -> Path:
    """Save a tiny classifier of transformers with random weights."""
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(labels)))
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return folder


def test_torchscript_outputs_have_the_order_of_the_classes_or_names(tmp_path):
    bright_dark = torch.tensor([0.9, -0.9]).view(2, 1, 1, 1).expand(2, 1, 16, 16)
    for names, expected in ((None, [True, True]), (["ant", "bee"], [True, True]), (["bee", "ant"], [False, False]), (["Ant", "bee_"], [True, True])):
        file = resolve_classifier_file(save_torchscript(tmp_path / "classifier.pt", names), CLASSES, [0, 1])
        classifier = load_classifier(file, 2, 1, 16, torch.device("cpu"))
        assert classifier.accepts(bright_dark, [0, 1]).tolist() == expected
    only_ant = resolve_classifier_file(save_torchscript(tmp_path / "classifier.pt", ["fly", "ant"]), CLASSES, [0])
    assert only_ant.label_classes == (None, 0)


def test_classifiers_of_transformers_are_matched_by_name(tmp_path):
    images_BCHW = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for labels, expected in ((["fly", "Bee", "ant"], (None, 1, 0)), (["Bee", "fly", "ant"], (1, None, 0)), (["ant", "bee"], (0, 1))):
        file = resolve_classifier_file(save_transformers(tmp_path / "classifier", labels), CLASSES, [0, 1])
        assert file.label_classes == expected
        classifier = load_classifier(file, 2, 1, 16, torch.device("cpu"))
        found = classifier.logits(images_BCHW).argmax(dim=1).tolist()
        for index in range(2):
            assert classifier.accepts(images_BCHW, [index] * 4).tolist() == [expected[label] == index for label in found]


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    folder = save_transformers(tmp_path / "classifier", CLASSES)
    body = ResNetModel(ResNetForImageClassification.from_pretrained(folder).config)
    body.save_pretrained(folder)
    with pytest.raises(InputError, match=r"lacks weights of the model, such as classifier\.1\.\w+, so its predictions would be random"):
        load_classifier(resolve_classifier_file(folder, CLASSES, [0, 1]), 2, 1, 16, torch.device("cpu"))


def test_changed_classifiers_have_other_digests(tmp_path):
    folder = save_transformers(tmp_path / "classifier", CLASSES)
    before = resolve_classifier_file(folder, CLASSES, [0, 1]).sha256
    (folder / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text() + "\n")
    assert resolve_classifier_file(folder, CLASSES, [0, 1]).sha256 != before


def test_unusable_classifiers_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    pickled = save_transformers(tmp_path / "pickled", CLASSES)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for path, words in ((tmp_path / "missing.pt", "does not exist"), (tmp_path / "text.pt", "not a TorchScript file"),
                        (tmp_path / "weights.pt", "not a TorchScript file"),
                        (tmp_path / "empty", "has no config.json and no preprocessor_config.json"),
                        (pickled, "no .safetensors file. Files with pickles are not read"),
                        (save_torchscript(tmp_path / "flies.pt", ["fly", "ant"]), "has no label for the class 'bee'; its 2 labels are: fly, ant"),
                        (save_transformers(tmp_path / "unnamed", ["LABEL_0", "LABEL_1"]), "has no id2label"),
                        (save_torchscript(tmp_path / "number.pt", 3), "not a JSON list")):
        with pytest.raises(InputError, match=words):
            resolve_classifier_file(path, CLASSES, [0, 1])
    with pytest.raises(InputError, match="one label, 'a b', for the classes 'a b' and 'a_b'"):
        resolve_classifier_file(save_torchscript(tmp_path / "spaces.pt", ["a b", "c"]), ["a b", "a_b"], [0, 1])


def test_classifiers_with_another_number_of_outputs_are_refused(tmp_path):
    path = save_torchscript(tmp_path / "classifier.pt")
    file = ClassifierFile(path=path, kind="torchscript", sha256="", label_classes=None)
    with pytest.raises(InputError, match=r"returns the shape \(2, 2\) for two images; it must return \(2, 3\): one for each class of the pipeline"):
        load_classifier(file, 3, 1, 16, torch.device("cpu"))
