"""Pipelines whose prior is given a low resolution and a text: arguments, errors, and the commands generate, upscale and translate."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.bundle import make_bundle
from pipelines.command_line import dispatch
from pipelines.image_folders import write_images
from pipelines.image_folders.translation_folder import check_has_condition, find_images
from stage1_tokenizer import load_tokenizer
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.vocabulary import Vocabulary
from tests.conditioned import LOW_SIZE, SIZE, TEXT_LENGTH, Parts, given_low, image_tokenizer, make_parts, saved_prior
from tests.run_files import pictures
from tests.test_interruption import signal_soon
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.interruption import Interrupted


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"), class_drop=0.1)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory) -> Path:
    return parts.bundle(tmp_path_factory.mktemp("bundle") / "pipeline", guidance_scale=1.5)


@pytest.fixture(scope="module")
def pipe(folder) -> ImageGenerationPipeline:
    return ImageGenerationPipeline.from_pretrained(folder, "cpu")


@pytest.fixture(scope="module")
def small() -> list[Image.Image]:
    """Black, white and a gradient, which the random tokenizer distinguishes."""
    gradient_HW = np.linspace(0, 255, LOW_SIZE**2).reshape(LOW_SIZE, LOW_SIZE).astype(np.uint8)
    return [Image.fromarray(pixels_HW) for pixels_HW in (np.zeros_like(gradient_HW), np.full_like(gradient_HW, 255), gradient_HW)]


@pytest.fixture(scope="module")
def edges_pipeline(tmp_path_factory) -> Path:
    """A pipeline whose prior needs an image of edges, without classes."""
    root = tmp_path_factory.mktemp("edges")
    tokenizer = image_tokenizer(root / "tokenizer")
    edges = image_tokenizer(root / "edges", derived={"kind": "edges", "method": "sobel"}, seed=2)
    loaded, condition = load_tokenizer(tokenizer), given_low(edges, 0.0)
    condition = dataclasses.replace(condition, grid=dataclasses.replace(condition.grid, name="edges"))
    prior = saved_prior(root / "prior", loaded.grids, loaded.token_fingerprint, [condition], class_names=None, label_drop=0.0)
    return make_bundle(tokenizer, prior, root / "pipeline", SamplingConfig(), {"edges": edges})


def digests(output) -> list[bytes]:
    """The tokens of each image. Images of different tokens may be equal, because the decoder has random weights."""
    return [ids.numpy().tobytes() for ids in output.token_ids]


# --- arguments -------------------------------------------------------------------------------------------------------------------


def test_images_and_prompts_become_ids(pipe, small):
    out = pipe(["ant", "bee", "ant"], prompt="sea", image=small, seed=1)
    assert len(out.images) == 3 and {name: tuple(ids.shape) for name, ids in out.given_ids.items()} == {"low": (3, 4), "text": (3, TEXT_LENGTH)}
    assert out.given_ids["text"].tolist() == [[*b"sea", 256, 256, 256]] * 3
    assert torch.equal(pipe.inputs.ids(prompt=" sea\n")["text"], out.given_ids["text"][:1]), "captions have no spaces at their ends either"
    low = pipe.inputs.tokenizers["low"]
    encoded = low.encode(torch.stack([low.transform.without_derivation(image) for image in small]))
    assert torch.equal(out.given_ids["low"], encoded.flatten(1))


def test_same_ids_give_the_same_images(pipe, small):
    out = pipe("ant", 2, prompt=["a", "bc", "a"], image=small, seed=4)
    assert out.class_indices == [0] * 6 and len(out.images) == 6
    again = pipe("ant", 2, given_ids={name: ids[::2] for name, ids in out.given_ids.items()}, seed=4)
    assert digests(again) == digests(out)
    batches = list(pipe.batches("ant", 2, 4, prompt=["a", "bc", "a"], image=small, batch_size=4))
    assert [digest for batch in batches for digest in digests(batch)] == digests(out)
    assert [image.tobytes() for batch in batches for image in batch.images] == [image.tobytes() for image in out.images]


def test_conditions_change_images_and_can_be_left_out(pipe, small):
    whole = pipe("ant", 4, 1, image=small[0], prompt="abc")
    for other in (pipe("ant", 4, 1, image=small[1], prompt="abc"), pipe("ant", 4, 1, prompt="abc"), pipe("ant", 4, 1, image=small[0]),
                  pipe("ant", 4, 1), pipe(None, 4, 1)):
        assert len(other.images) == 4 and digests(other) != digests(whole)
    assert pipe(None, 4, 1, image=small[0]).class_indices is None


def test_tensors_dicts_and_single_values(pipe, small):
    tensor = torch.stack([pipe.inputs.tokenizers["low"].transform.without_derivation(image) for image in small])
    expected = digests(pipe(image=small, prompt="x", seed=2))
    assert digests(pipe(image=tensor, prompt="x", seed=2)) == expected
    assert digests(pipe(image={"low": small}, prompt={"text": ["x"] * 3}, seed=2)) == expected


def test_super_resolve(pipe, small):
    out = pipe.super_resolve(small, "bee", seed=3)
    assert digests(out) == digests(pipe("bee", image=small, seed=3)) and out.images[0].size == (SIZE, SIZE)
    larger = [image.resize((64, 64), Image.Resampling.NEAREST) for image in small]
    assert pipe.super_resolve(larger, seed=3).given_ids["low"].shape == (3, 4)
    stopped = pipe.super_resolve(small, seed=3, callback=lambda done, total: False)
    assert stopped.stopped and not stopped.images and len(stopped.seeds) == 3


def test_translate(edges_pipeline, pipe, small):
    translator = ImageGenerationPipeline.from_pretrained(edges_pipeline, "cpu")
    assert translator.translate(small, seed=1).images[0].size == (SIZE, SIZE)
    with pytest.raises(InputError, match=r"super_resolve needs a prior that is given an image at low resolution.*takes: image \(edges\)"):
        translator.super_resolve(small)
    with pytest.raises(InputError, match=r"translate needs a prior .*takes: class_labels, image \(low\), prompt \(text\)"):
        pipe.translate(small)
    with pytest.raises(InputError, match="edges is not given, but the prior was trained with drop rate 0"):
        translator(seed=1)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"prompt": 3}, "prompt is '3'; give a text|prompt is 3"),
    ({"prompt": []}, "prompt is"),
    ({"prompt": ["sea", " "]}, "prompt is empty, but the prior was trained without empty captions"),
    ({"prompt": {"caption": "x"}}, "prompt has caption; this pipeline takes: text"),
    ({"image": {"edges": None}}, "image has edges; this pipeline takes: low"),
    ({"image": "photo.png"}, "image for the condition 'low': images is str"),
    ({"image": torch.zeros(1, 1, SIZE, SIZE)}, r"image for the condition 'low': images is a torch.float32 tensor of shape"),
    ({"given_ids": {"depth": torch.zeros(1, 4, dtype=torch.int64)}}, r"given_ids has depth, which this prior was not trained with. .* image \(low\)"),
    ({"given_ids": {"low": torch.full((1, 4), 16)}}, "ids from 16 to 16; allowed: 0 to 15"),
    ({"given_ids": {"low": torch.zeros(1, 3, dtype=torch.int64)}}, "has the shape"),
    ({"prompt": "x", "given_ids": {"text": torch.zeros(1, TEXT_LENGTH, dtype=torch.int64)}}, "text is given as ids and as prompt"),
    ({"prompt": ["a", "b"], "class_labels": ["ant", "bee", "ant"]}, "class_labels has 3 entries and prompt has 2 entries; give one for each image"),
    ({"guidance": {"depth": 2.0}, "prompt": "a"}, "guidance has depth; the given segments of the prior are: class, low, text"),
    ({"guidance_scale": 2.0}, "nothing is given, so guidance has no effect; give class_labels or image or prompt"),
    ({"guidance": {"low": 2.0, "text": 1.5}, "prompt": "a"}, "guidance has low, which is not given, so guidance has no effect there"),
    ({"guidance": {"class": 2.0}, "prompt": "a"}, "guidance has class, which is not given"),
    ({"given_ids": 3}, r"given_ids is int; give a dict .* takes: class_labels, image \(low\), prompt \(text\)"),
    ({"promt": "sea"}, r"there is no argument or sampling setting 'promt'. Did you mean 'prompt'"),
    ({"strength": 1}, "there is no argument or sampling setting 'strength'.* Arguments: class_labels, num_images_per_label, seed, prompt, image"),
])
def test_invalid_arguments_are_refused(arguments, words, pipe):
    with pytest.raises(InputError, match=words):
        pipe(**arguments)


def test_other_pipelines_take_neither_prompt_nor_image(tiny_run, small):
    plain = ImageGenerationPipeline.from_pretrained(tiny_run, "cpu")
    with pytest.raises(InputError, match=r"prompt is given, but this prior was not trained with a text. This pipeline takes: class_labels\."):
        plain("3", prompt="three")
    with pytest.raises(InputError, match="image is given, but this prior was not trained with an image"):
        plain("3", image=small[0])


def test_a_class_is_needed_if_it_was_never_dropped(tmp_path, small):
    parts = make_parts(tmp_path, low_drop=0.0)
    strict = ImageGenerationPipeline.from_pretrained(parts.bundle(tmp_path / "pipeline"), "cpu")
    with pytest.raises(InputError, match=r"No class is given, but the prior was trained without a drop rate of the class.*takes: class_labels"):
        strict(image=small[0])
    with pytest.raises(InputError, match="low is not given, but the prior was trained with drop rate 0"):
        strict("ant")
    assert len(strict("ant", image=small[0]).images) == 1 and len(strict().images) == 1, "all are dropped together (label_drop)"


def test_guidance_by_segment(pipe, small):
    plain = pipe("ant", image=small[0], guidance_scale=1.0, seed=1, num_images_per_label=3)
    by_name = pipe("ant", image=small[0], guidance_scale=1.0, guidance={"low": 4.0}, seed=1, num_images_per_label=3)
    assert digests(plain) != digests(by_name)
    same = pipe("ant", image=small[0], guidance_scale=1.0, guidance={"low": 1.0}, seed=1, num_images_per_label=3)
    assert digests(same) == digests(plain)


# --- commands --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory, small) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for name, image in zip(("a/1.png", "b/1.png", "c.png"), small, strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        image.save(root / name)
    return root


def test_upscale_writes_the_images_of_super_resolve(folder, photos, tmp_path, pipe, small, capsys):
    command = ["upscale", str(folder), str(photos), "--out", str(tmp_path / "out"), "--classes", "ant", "--seed", "5", "--device", "cpu"]
    assert dispatch(command) == 0
    expected = pipe.super_resolve(small, "ant", seed=5).images
    for name, image in zip(("a/1.png", "b/1.png", "c.png"), expected, strict=True):
        with Image.open(tmp_path / "out" / name) as written:
            assert written.tobytes() == image.tobytes()
    with Image.open(tmp_path / "out/grid.png") as grid:
        assert grid.height > 2 * SIZE
    capsys.readouterr()
    assert dispatch(command) == 0 and "nothing to do" in capsys.readouterr().out


def test_upscale_continues_and_replaces_damaged_files(folder, photos, tmp_path, capsys):
    command = ["upscale", str(folder), str(photos / "a/1.png"), str(photos / "c.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert dispatch(command) == 0
    before = pictures(tmp_path / "out")
    (tmp_path / "out/c.png").write_bytes(b"broken")
    (tmp_path / "out/grid.png").unlink()
    assert dispatch(command) == 0 and "damaged or replaced" in capsys.readouterr().out
    assert pictures(tmp_path / "out") == before and set(before) == {"1.png", "c.png", "grid.png"}
    with pytest.raises(InputError, match="contains the images of another request: --seed was 0, now 1"):
        dispatch([*command, "--seed", "1"])
    with pytest.raises(InputError, match="the given images are other files"):
        dispatch(["upscale", str(folder), str(photos / "b/1.png"), str(photos / "c.png"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    (tmp_path / "out/translations.json").unlink()
    with pytest.raises(InputError, match=r"would be replaced and that no translations\.json lists"):
        dispatch(command)


def test_upscale_stops_at_a_signal_and_continues(folder, photos, tmp_path, monkeypatch):
    command = ["upscale", str(folder), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]
    save, stops = write_images.save_picture, []

    class Stop(write_images.StopFlag):
        def __enter__(self):
            stops.append(super().__enter__())
            return stops[-1]

    def save_and_stop(picture, path):
        save(picture, path)
        stops[-1].signal = 15

    with monkeypatch.context() as patch:
        patch.setattr(write_images, "StopFlag", Stop)
        patch.setattr(write_images, "save_picture", save_and_stop)
        with pytest.raises(Interrupted):
            dispatch(command)
    assert dispatch(command) == 0 and (tmp_path / "out/c.png").is_file()


def test_upscale_ends_the_wait_for_an_image_at_the_first_signal(folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(write_images, "read_image", lambda path, **_: time.sleep(60))
    signal_soon(signal.SIGTERM, 3.0)
    started = time.monotonic()
    with pytest.raises(Interrupted, match="0 of 1 image"):
        dispatch(["upscale", str(folder), str(photos / "c.png"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("image", ["other.png", "cat/001.JPG"])
def test_upscale_does_not_write_into_a_data_set(image, folder, photos, tmp_path):
    out = tmp_path / "out"
    (out / image).parent.mkdir(parents=True)
    (out / image).write_text("a photo")
    with pytest.raises(InputError, match=f"contains images of another origin, such as {image}"):
        dispatch(["upscale", str(folder), str(photos), "--out", str(out), "--device", "cpu"])
    assert [path for path in out.rglob("*") if path.is_file()] == [out / image]


def test_results_of_upscale_are_no_data_set(folder, photos, tmp_path):
    assert dispatch(["upscale", str(folder), str(photos / "c.png"), "--out", str(tmp_path / "results/large"), "--device", "cpu"]) == 0
    generate = ["generate", str(folder), "--classes", "bee", "--num", "1", "--device", "cpu", "--out"]
    assert dispatch([*generate, str(tmp_path / "results")]) == 0
    with pytest.raises(InputError, match=r"contains grid\.png that would be replaced and that no samples\.json lists"):
        dispatch([*generate, str(tmp_path / "results/large")])


@pytest.mark.parametrize("is_paired", [False, True])
def test_upscale_does_not_write_into_the_training_images(is_paired, parts, photos, tmp_path):
    folder = parts.bundle(tmp_path / "run/pipeline")
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(photos, tmp_path / "maps")
    pairs = [{"name": "maps", "kind": "paired_folder", "path": str(tmp_path / "maps")}] if is_paired else []
    data = {"source": "folder", "path": str(tmp_path / "photos"), "conditions": pairs}
    (tmp_path / "run/recipe.yaml").write_text(yaml.safe_dump({"data": data}))
    inside = tmp_path / ("maps" if is_paired else "photos") / "new"
    with pytest.raises(InputError, match=f"is inside {inside.parent}, the images that .* was trained on"):
        dispatch(["upscale", str(folder), str(photos / "c.png"), "--out", str(inside), "--device", "cpu"])
    assert not inside.exists()


def test_translate_command(edges_pipeline, folder, photos, tmp_path):
    assert dispatch(["translate", str(edges_pipeline), str(photos / "c.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "out/translations.json").read_text())
    assert record["request"]["condition"] == "edges" and set(record["request"]["pipeline"]) == {"tokens", "tokenizer", "prior", "condition_edges"}
    with pytest.raises(InputError, match=r"translate needs a prior that is given images of another kind.*is given: low \(low_resolution\), text"):
        dispatch(["translate", str(folder), str(photos / "c.png"), "--out", str(tmp_path / "other")])
    with pytest.raises(InputError, match=r"upscale needs a prior that is given images at low resolution.*is given: edges \(edges\)"):
        dispatch(["upscale", str(edges_pipeline), str(photos / "c.png"), "--out", str(tmp_path / "other")])
    with pytest.raises(InputError, match="trained without classes"):
        dispatch(["translate", str(edges_pipeline), str(photos / "c.png"), "--out", str(tmp_path / "other"), "--classes", "ant"])
    assert not (tmp_path / "other").exists()


def test_a_refused_request_leaves_no_record(edges_pipeline, photos, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise InputError("refused")

    monkeypatch.setattr(ImageGenerationPipeline, "batches", refuse)
    with pytest.raises(InputError, match="refused"):
        dispatch(["translate", str(edges_pipeline), str(photos / "c.png"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert not (tmp_path / "out/translations.json").exists()


def test_names_of_results(photos, tmp_path):
    assert list(find_images([photos])) == ["a/1.png", "b/1.png", "c.png"]
    assert list(find_images([photos / "a/1.png", photos / "b/1.png"])) == ["1.png", "1_2.png"]
    with pytest.raises(InputError, match="a folder without images"):
        find_images([tmp_path])
    with pytest.raises(InputError, match="does not exist"):
        find_images([tmp_path / "none.png"])


def test_generate_with_a_prompt(folder, pipe, tmp_path):
    command = ["generate", str(folder), "--prompt", "sea", "--num", "2", "--seed", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert dispatch(command) == 0
    expected = pipe(prompt="sea", num_images_per_label=2, seed=3).images
    for number, image in enumerate(expected):
        with Image.open(tmp_path / f"out/sample-{number}.png") as written:
            assert written.tobytes() == image.tobytes()
    with pytest.raises(InputError, match="another request: --prompt was sea, now sky"):
        dispatch([word.replace("sea", "sky") for word in command])
    by_class = ["generate", str(folder), "--prompt", "sea", "--classes", "bee", "--num", "1", "--out", str(tmp_path / "bee"), "--device", "cpu"]
    assert dispatch([*by_class, "--guidance", "text=2"]) == 0 and (tmp_path / "bee/bee-0.png").is_file()
    assert dispatch(["generate", str(folder), "--classes", "bee", "--num", "1", "--out", str(tmp_path / "none"), "--device", "cpu"]) == 0


def test_long_prompts_give_a_warning(folder, pipe, tmp_path, capsys):
    message = r"the prompt is longer than 6 bytes, the length of captions in training, and the rest is ignored. The prior sees 'a shor'"
    with pytest.warns(UserWarning, match=message) as caught:
        cut = pipe(prompt="a short text", seed=1)
    assert caught[0].filename == __file__, "it points to the call"
    assert digests(cut) == digests(pipe(prompt="a shor", seed=1)), "no warning, which would be an error"
    with pytest.warns(UserWarning, match=r"1 of 2 prompts is longer .* sees, for example, 'a shor'"):
        list(pipe.batches(prompt=["a", "a short text"], seed=1))
    image = Image.new("L", pipe.tokenizer.transform.sides[::-1])
    for call in (lambda: pipe.inpaint(image, Image.new("L", image.size, 255), prompt="a short text", seed=1),
                 lambda: pipe.variations(image, prompt="a short text", seed=1), lambda: pipe.score(image, prompt="a short text")):
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        assert caught[0].filename == __file__
    assert dispatch(["generate", str(folder), "--prompt", "a short text", "--num", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert f"warning: {message}" in capsys.readouterr().out
    image.save(tmp_path / "photo.png")
    Image.new("L", image.size, 255).save(tmp_path / "mask.png")
    assert dispatch(["edit", str(folder), str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--prompt", "a short text", "--num", "1",
                     "--out", str(tmp_path / "edited"), "--device", "cpu"]) == 0
    assert f"warning: {message}" in capsys.readouterr().out


def test_scales_of_what_is_not_given_are_refused(folder, photos, tmp_path):
    generate, upscale = ["generate", str(folder), "--prompt", "sea"], ["upscale", str(folder), str(photos / "c.png")]
    for command, guidance in ((generate, "text=2,low=3"), (generate, "class=2"), (upscale, "low=2,text=3"), (upscale, "class=2")):
        with pytest.raises(InputError, match=f"guidance has {guidance.rpartition(',')[2][:-2]}, which is not given"):
            dispatch([*command, "--out", str(tmp_path / "out"), "--guidance", guidance])
    assert not (tmp_path / "out").exists()


def test_generate_says_what_is_missing(edges_pipeline, tiny_run, tmp_path):
    with pytest.raises(InputError, match=r"edges is not given.* Use `vqmosaic upscale` or `vqmosaic translate`"):
        dispatch(["generate", str(edges_pipeline), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=r"--prompt is given, but the prior of this pipeline was not trained with captions. It takes: --classes"):
        dispatch(["generate", str(tiny_run), "--prompt", "x", "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="argument --prompt: it is empty; give a text"):
        dispatch(["generate", str(tiny_run), "--prompt", "  ", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="argument --guidance: 'low' was given; give a scale for each segment"):
        dispatch(["generate", str(edges_pipeline), "--guidance", "low", "--out", str(tmp_path / "out")])


def test_generate_does_not_ask_for_what_was_given(tmp_path):
    folder = make_parts(tmp_path, class_drop=0.0).bundle(tmp_path / "pipeline")
    with pytest.raises(InputError, match=r"No class is given.* Give --classes, or use `vqmosaic upscale`"):
        dispatch(["generate", str(folder), "--prompt", "x", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_other_dtypes_are_compared_with_the_conditions(folder, photos, tmp_path, dtype, capsys):
    assert dispatch(["generate", str(folder), "--prompt", "x", "--num", "2", "--out", str(tmp_path / "a"), "--dtype", dtype, "--device", "cpu"]) == 0
    assert "differ from those in float32" in capsys.readouterr().out


# --- classes and conditions that the prior has not learned --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_classes(tmp_path_factory) -> Path:
    """A pipeline whose tokens have classes, but whose prior was trained without them, as in the recipes of captions."""
    root = tmp_path_factory.mktemp("dropped")
    return make_parts(root, class_drop=1.0).bundle(root / "pipeline", guidance_scale=1.5)


def test_classes_without_effect_are_refused(without_classes, photos, tmp_path):
    words = "--classes is 'ant', but the prior of this pipeline was trained with drop rate 1 of the class"
    with pytest.raises(InputError, match=words):
        dispatch(["generate", str(without_classes), "--classes", "ant", "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=words):
        dispatch(["upscale", str(without_classes), str(photos / "c.png"), "--classes", "ant", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_calls_with_what_the_prior_was_not_trained_with_are_refused(without_classes, pipe, photos, small, tmp_path):
    with pytest.raises(InputError, match=r"class_labels is given, but .* drop rate 1 of the class.*takes: image \(low\), prompt \(text\)\."):
        ImageGenerationPipeline.from_pretrained(without_classes, "cpu")("ant", prompt="sea")
    folder = make_parts(tmp_path, low_drop=1.0).bundle(tmp_path / "pipeline")
    without_low = ImageGenerationPipeline.from_pretrained(folder, "cpu")
    assert len(without_low("ant", prompt="sea", seed=1).images) == 1
    taken = r"This pipeline takes: class_labels, prompt \(text\)\."
    with pytest.raises(InputError, match=f"image is given, but this prior was not trained with an image. {taken}"):
        without_low("ant", image=small)
    with pytest.raises(InputError, match=f"given_ids has low, which this prior was not trained with. {taken}"):
        without_low("ant", given_ids=pipe.inputs.ids(image=small))
    with pytest.raises(InputError, match="super_resolve needs a prior that is given an image at low resolution"):
        without_low.super_resolve(small)
    with pytest.raises(InputError, match="the image 'low', but it was trained with drop rate 1 of it"):
        dispatch(["upscale", str(folder), str(photos / "c.png"), "--out", str(tmp_path / "out")])


def test_only_learned_images_are_counted(pipe):
    content = {"conditions": [{"name": "edges", "kind": "edges"}, {"name": "grey", "kind": "grey"}]}
    low, grid = next(condition for condition in pipe.vocabulary.conditions if condition.name == "low"), pipe.vocabulary.grids[0]
    edges, grey = (dataclasses.replace(low, grid=dataclasses.replace(low.grid, name=name)) for name in ("edges", "grey"))

    def vocabulary(*conditions) -> ChainVocabulary:
        return ChainVocabulary([Vocabulary(grids=[grid], class_names=None, token_fingerprint="none", conditions=list(conditions))])

    assert check_has_condition(content, vocabulary(dataclasses.replace(edges, drop_rate=1.0), grey), "translate") == "grey"
    with pytest.raises(InputError, match="this one is given several: edges, grey"):
        check_has_condition(content, vocabulary(edges, grey), "translate")


def test_generate_without_learned_classes(without_classes, tmp_path):
    command = ["generate", str(without_classes), "--num", "2", "--device", "cpu", "--out"]
    assert dispatch([*command, str(tmp_path / "plain")]) == 0
    assert len(pictures(tmp_path / "plain")) == 3 and not list((tmp_path / "plain").glob("ant*")), "two images and the grid, of no class"
    assert dispatch([*command, str(tmp_path / "prompted"), "--prompt", "sea", "--guidance", "text=3"]) == 0
    with pytest.raises(InputError, match=r"guidance has class; the given segments .*: low, text"):
        dispatch([*command, str(tmp_path / "guided"), "--prompt", "sea", "--guidance", "class=3"])


def test_demo_has_no_field_for_classes_without_effect(without_classes):
    pytest.importorskip("gradio")
    from pipelines.demo.page import build
    from pipelines.demo.request_checks import checked_request, number_label

    pipe = ImageGenerationPipeline.from_pretrained(without_classes, "cpu")
    page = build(pipe)
    field = next(block for block in page.blocks.values() if getattr(block, "label", None) == "Classes")
    assert not field.visible and number_label(pipe) == "Images"
    with pytest.raises(InputError, match="no class 'ant'"):
        checked_request(pipe, ["ant"], 1, 0, 1, 0, 1, 1)
    page.close(verbose=False)
