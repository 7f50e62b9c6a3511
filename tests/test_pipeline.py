"""ImageGenerationPipeline on a tiny finished run: arguments, outputs, errors and saved files."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from pipelines import GenerationOutput, ImageGenerationPipeline, make_bundle
from pipelines.bundle import find_pipeline
from pipelines.labels import class_indices, labels_from_text
from stage1_tokenizer.data.digits_source import load_scans
from stage1_tokenizer.image_files.images import ImageTransform, to_uint8
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.generation.sampling import SamplingStopped
from stage2_prior.prior import TokenPrior
from tests.run_files import file_contents
from tests.tiny import CODES, GRID_SIZE, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import image_seeds


@pytest.fixture(scope="module")
def pipe(tiny_run) -> ImageGenerationPipeline:
    return ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def scans() -> list[Image.Image]:
    """Scans of digits in different sizes and modes."""
    images = [Image.fromarray(scan) for scan in load_scans()[0][:5]]
    return [images[0], images[1].convert("RGB"), images[2].resize((30, 20)), images[3].convert("RGBA"), images[4].resize((16, 16))]


def prior_like(pipe: ImageGenerationPipeline, **changes) -> TokenPrior:
    """A new prior for the vocabulary of the pipeline with `changes`."""
    return TokenPrior.from_config(tiny_recipe("unused").prior, dataclasses.replace(pipe.prior.vocabulary, **changes), 0).eval()


# --- generation --------------------------------------------------------------------------------------------------------------


def test_labels_by_name_and_index(pipe):
    out = pipe(class_labels=["3", 7], num_images_per_label=3, seed=7)
    assert isinstance(out, GenerationOutput) and not out.stopped
    assert out.class_indices == [3, 3, 3, 7, 7, 7]
    assert out.seeds == image_seeds(7, 6) and len(set(out.seeds)) == 6
    assert out.token_ids.shape == (6, GRID_SIZE, GRID_SIZE) and out.token_ids.dtype == torch.int64 and out.token_ids.device.type == "cpu"
    assert 0 <= out.token_ids.min() <= out.token_ids.max() < CODES
    assert len(out.images) == 6 and all(image.size == (16, 16) and image.mode == "L" for image in out.images)


@pytest.mark.parametrize("labels", ["3", 3, ["3"], [3], np.int64(3), np.array([3]), torch.tensor(3), torch.tensor([3]), (3,)], ids=repr)
def test_accepted_types_of_labels(pipe, labels):
    assert pipe(labels, 1, seed=1).class_indices == [3]


def test_strings_are_names_and_integers_are_indices():
    names = ["7", "cat", "2"]
    assert class_indices(names, ["7", "2", 1]) == [0, 2, 1]
    assert class_indices(names, labels_from_text(names, "7,2, 1")) == [0, 2, 1], "text is a class name if there is one, else an index"
    assert labels_from_text(None, "cat,3") == ["cat", 3]
    numbers = [str(number) for number in range(1, 13)]
    assert class_indices(numbers, labels_from_text(numbers, "12,1")) == [11, 0]
    with pytest.raises(InputError, match="no class '0'; there are 12: 1, 2"):  # with names that are all numbers, a number is never an index
        class_indices(numbers, labels_from_text(numbers, "0"))


def test_class_names_with_commas_are_parsed():
    names = ["tench, Tinca tinca", "tench", "great white shark, white shark", "white shark"]
    assert labels_from_text(names, "tench, Tinca tinca") == [names[0]]
    assert labels_from_text(names, " tench ,great white shark, white shark,3,white shark") == ["tench", names[2], 3, "white shark"]
    assert labels_from_text(names, "tench,,²") == ["tench", "", "²"]


def test_seed_determines_the_images(pipe):
    first, again, other = (pipe([3, 4], 4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.token_ids, again.token_ids)
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in again.images]
    assert not torch.equal(first.token_ids, other.token_ids)
    drawn, drawn_again = pipe(3, 2), pipe(3, 2)
    assert drawn.seeds != drawn_again.seeds, "each call without a seed draws a new one"


def test_images_do_not_depend_on_the_batch(pipe):
    whole = pipe([3, 7], 5, seed=11)
    for batch_size in (1, 3, 10):
        parts = pipe([3, 7], 5, seed=11, batch_size=batch_size)
        assert torch.equal(parts.token_ids, whole.token_ids) and parts.seeds == whole.seeds
    assert torch.equal(pipe(3, 2, seed=11).token_ids, whole.token_ids[:2])
    assert torch.equal(pipe([3, 9, 1], 5, seed=11).token_ids[:5], whole.token_ids[:5])


def test_output_types(pipe):
    pil, array, tensor = (pipe([3, 4], 2, seed=1, output_type=kind).images for kind in ("pil", "np", "pt"))
    assert array.shape == (4, 16, 16, 1) and array.dtype == np.uint8
    assert tensor.shape == (4, 1, 16, 16) and tensor.dtype == torch.float32 and tensor.min() >= -1 and tensor.max() <= 1
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), array[..., 0])
    assert np.array_equal(to_uint8(tensor), array)
    with pytest.raises(InputError, match=r"output_type is 'png'; allowed: pil, np, pt"):
        pipe(3, output_type="png")


def test_recommended_settings_are_the_defaults(pipe):
    assert pipe.sampling == SamplingConfig(guidance_scale=1.5)
    default = pipe(3, 8, seed=3)
    assert torch.equal(default.token_ids, pipe(3, 8, seed=3, guidance_scale=1.5, temperature=1.0, top_k=0, top_p=1.0).token_ids)
    for changed in ({"guidance_scale": 30.0}, {"temperature": 0.05}, {"top_k": 1}, {"top_p": 0.05}):
        assert not torch.equal(default.token_ids, pipe(3, 8, seed=3, **changed).token_ids), changed
    assert torch.equal(pipe(3, 2, seed=3, top_k=1).token_ids, pipe(3, 2, seed=4, temperature=0.0).token_ids), "both take the most likely token"


def test_images_without_labels(pipe):
    out = pipe(num_images_per_label=3, seed=2)
    assert out.class_indices is None and out.token_ids.shape == (3, GRID_SIZE, GRID_SIZE)


def test_callback_counts_tokens_and_can_stop(pipe):
    calls = []
    out = pipe([3, 4], 3, seed=1, batch_size=4, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 32) for done in range(1, 33)] and not out.stopped, "None continues; two batches of 16 tokens"

    seen = []
    stopped = pipe([3, 4], 3, seed=1, batch_size=4, callback=lambda done, total: seen.append(done) or done < 20)
    assert stopped.stopped and len(stopped.images) == 0 and seen[-1] == 20
    assert pipe([3, 4], 3, seed=1, callback=lambda done, total: True).stopped is False


@pytest.mark.parametrize(("arguments", "message"), [
    ({"class_labels": "cat"}, r"no class 'cat'; there are 10: 0, 1, 2"),
    ({"class_labels": "33"}, r"no class '33'.*Did you mean '3'\?"),
    ({"class_labels": 10}, r"class index 10 does not exist; allowed: 0 to 9"),
    ({"class_labels": [-1]}, r"class index -1 does not exist"),
    ({"class_labels": [2.0]}, r"class_labels has 2.0; allowed: class names as strings, class indices as integers"),
    ({"class_labels": []}, r"class_labels is empty"),
    ({"class_labels": 3, "num_images_per_label": 0}, r"num_images_per_label is 0; it must be at least 1"),
    ({"class_labels": 3, "batch_size": 0}, r"batch_size is 0"),
    ({"class_labels": 3, "temperature": -1.0}, r"temperature is -1"),
    ({"class_labels": 3, "top_p": 0.0}, r"top_p is 0"),
    ({"class_labels": 3, "top_k": CODES + 1}, rf"top_k is {CODES + 1}; allowed: 0 \(off\) to {CODES}"),
    ({"class_labels": 3, "guidance_scale": float("nan")}, r"guidance_scale is nan"),
    ({"class_labels": 3, "seed": "1"}, r"seed is '1'; it must be an integer"),
    ({"class_labels": 3, "seed": 1.0}, r"seed is 1.0; it must be an integer"),
    ({"class_labels": 3, "seed": True}, r"seed is True; it must be an integer"),
    ({"class_labels": 3, "num_images_per_label": "4"}, r"num_images_per_label is '4'; it must be an integer"),
    ({"class_labels": 3, "num_images_per_label": True}, r"num_images_per_label is True"),
    ({"class_labels": 3, "num_images_per_label": None}, r"num_images_per_label is None"),
    ({"class_labels": 3, "batch_size": "8"}, r"batch_size is '8'; it must be an integer"),
    ({"class_labels": 3, "temperature": "0.9"}, r"temperature is '0.9'; it must be a number"),
    ({"class_labels": 3, "top_k": 2.5}, r"top_k is 2.5; it must be an integer"),
    ({"class_labels": 3, "top_p": True}, r"top_p is True; it must be a number"),
    ({"class_labels": 3, "guidance_scale": "2"}, r"guidance_scale is '2'; it must be a number"),
    ({"class_labels": 3, "guidance_interval": "0.1,0.5"}, r"guidance_interval is '0.1,0.5'; it must be a list"),
    ({"class_labels": 3, "compile": "false"}, r"compile is 'false'; it must be true or false"),
], ids=str)
def test_invalid_arguments_are_rejected(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_numpy_and_torch_numbers_are_accepted(pipe):
    expected = pipe([3, 4], 2, seed=7, temperature=0.5, top_k=9, guidance_scale=2.0, guidance_interval=[0.25, 0.75])
    same = pipe(np.array([3, 4]), np.int64(2), seed=np.uint32(7), temperature=np.float32(0.5), top_k=torch.tensor(9), guidance_scale=np.float64(2),
                guidance_interval=np.array([0.25, 0.75]), batch_size=np.int64(64), compile=np.bool_(False))
    assert torch.equal(same.token_ids, expected.token_ids) and same.seeds == expected.seeds
    same = pipe([3, 4], 2, seed=7, temperature=0.5, top_k=9, guidance_scale=2, guidance_interval=(0.25, 0.75))
    assert torch.equal(same.token_ids, expected.token_ids)


@pytest.mark.parametrize(("guidance", "message"), [
    ({"guidance_scale": 2.0}, "guidance_scale is 2.0, but no class_labels are given"),
    ({"guidance_scale": 0}, "guidance_scale is 0, but no class_labels are given"),
    ({"guidance_schedule": "linear"}, "guidance_schedule is linear, but no class_labels are given"),
    ({"guidance_scale": 2.0, "guidance_interval": [0.1, 0.5]}, r"guidance_scale is 2.0 and guidance_interval is \[0.1, 0.5\], but no class_labels"),
], ids=str)
def test_guidance_without_labels_is_rejected(pipe, guidance, message):
    for call in (pipe, pipe.batches):
        with pytest.raises(InputError, match=rf"{message}.* guidance has no effect; give class_labels, or leave it out"):
            call(num_images_per_label=2, seed=1, **guidance)
    assert pipe.sampling.guidance_scale == 1.5, "recommended guidance is dropped without an error"
    off = pipe(num_images_per_label=2, seed=1, guidance_scale=1.0)
    assert torch.equal(off.token_ids, pipe(num_images_per_label=2, seed=1).token_ids)


# --- batches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_batches_give_the_same_images_as_one_call(pipe, kind):
    whole = pipe([3, 7], 5, seed=11, output_type=kind, batch_size=4, temperature=0.8)
    parts = list(pipe.batches([3, 7], 5, 11, output_type=kind, batch_size=4, temperature=0.8))
    assert [part.places for part in parts] == [range(4), range(4, 8), range(8, 10)] and whole.places == range(10)
    assert torch.equal(torch.cat([part.token_ids for part in parts]), whole.token_ids)
    assert [seed for part in parts for seed in part.seeds] == whole.seeds
    assert [index for part in parts for index in part.class_indices] == whole.class_indices
    for image, place in zip((image for part in parts for image in part.images), whole.places, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(whole.images[place]))


def test_batches_can_be_skipped_and_stopped_by_the_callback(pipe):
    whole, calls = list(pipe.batches([3, 7], 5, 11, batch_size=4)), []
    last = list(pipe.batches([3, 7], 5, 11, batch_size=4, skip=lambda places: places.start < 8, callback=lambda *now: calls.append(now)))
    assert len(last) == 1 and last[0].places == range(8, 10) and torch.equal(last[0].token_ids, whole[2].token_ids)
    assert calls == [(done, 16) for done in range(1, 17)], "skipped batches do not count"
    assert list(pipe.batches([3, 7], 5, 11, skip=lambda places: True)) == []
    stopped = pipe.batches([3, 7], 5, 11, batch_size=4, callback=lambda done, total: done < 20)
    assert torch.equal(next(stopped).token_ids, whole[0].token_ids), "finished batches are yielded"
    with pytest.raises(SamplingStopped):
        next(stopped)


def test_batches_checks_arguments_before_iteration(pipe):
    for arguments, message in (({"class_labels": "cat"}, "no class 'cat'"), ({"class_labels": 3, "temperatur": 0.9}, "Did you mean 'temperature'"),
                             ({"class_labels": 3, "batch_size": 0}, "batch_size is 0"), ({"class_labels": 3, "output_type": "png"}, "output_type")):
        with pytest.raises(InputError, match=message):
            pipe.batches(**arguments)


# --- tokens ------------------------------------------------------------------------------------------------------------------


def test_decode_restores_the_generated_images(pipe):
    out = pipe([3, 4], 2, seed=9)
    assert [image.tobytes() for image in pipe.decode(out.token_ids)] == [image.tobytes() for image in out.images]


def test_encode_accepts_image_list_and_tensor(pipe, scans):
    ids_Bhw = pipe.encode(scans)
    assert ids_Bhw.shape == (5, GRID_SIZE, GRID_SIZE) and ids_Bhw.dtype == torch.int64 and ids_Bhw.device.type == "cpu"
    for number, scan in enumerate(scans):
        assert torch.equal(pipe.encode(scan), ids_Bhw[number:number + 1])
    images_BCHW = torch.stack([pipe.tokenizer.transform(image.convert("L")) for image in (scans[0], scans[4])])
    assert torch.equal(pipe.encode(images_BCHW), ids_Bhw[[0, 4]])


def test_reconstruct_is_encode_then_decode(pipe, scans):
    restored = pipe.reconstruct(scans)
    assert len(restored) == 5 and all(image.size == (16, 16) for image in restored)
    assert [image.tobytes() for image in restored] == [image.tobytes() for image in pipe.decode(pipe.encode(scans))]


def test_invalid_ids_and_shapes_are_rejected(pipe):
    with pytest.raises(ValueError, match=rf"token ids run from 0 to {CODES}; allowed: 0 to {CODES - 1}"):
        pipe.decode(torch.tensor([[[0, CODES]]]))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 8, 8\).*\(B, 1, 16, 16\)"):
        pipe.encode(torch.zeros(1, 1, 8, 8))


# --- dtypes ------------------------------------------------------------------------------------------------------------------


def test_encoder_stays_float32_with_bfloat16(tiny_run, pipe, scans, tmp_path):
    pipe_bf16 = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu", dtype=torch.bfloat16)
    formats = {name: parameter.dtype for name, parameter in pipe_bf16.tokenizer.state_dict().items()}
    assert {formats[name] for name in formats if name.startswith(("encoder.", "quant_conv.", "quantizer."))} <= {torch.float32, torch.int64}
    assert {formats[name] for name in formats if name.startswith(("decoder.", "post_quant_conv."))} == {torch.bfloat16}
    assert {parameter.dtype for parameter in pipe_bf16.prior.parameters()} == {torch.bfloat16}
    assert torch.equal(pipe_bf16.encode(scans), pipe.encode(scans))
    assert pipe_bf16.tokenizer.token_fingerprint == pipe.tokenizer.token_fingerprint == pipe_bf16.prior.vocabulary.token_fingerprint

    out = pipe_bf16([3, 4], 2, seed=1, output_type="pt")
    assert out.images.dtype == torch.float32 and out.images.isfinite().all()
    pipe_bf16.save_pretrained(tmp_path / "copy")
    assert file_contents(tmp_path / "copy") == file_contents(tiny_run / "pipeline"), "saved files do not depend on dtype"


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_dtype_can_be_given_by_name(tiny_run, name):
    pipe = ImageGenerationPipeline.from_pretrained(tiny_run, device="cpu", dtype=name)
    assert {parameter.dtype for parameter in (*pipe.prior.parameters(), *pipe.tokenizer.decoder.parameters())} == {torch.bfloat16}
    assert 0 < pipe.logit_difference(pipe([3, 4], 40, seed=1).token_ids, [3] * 40 + [4] * 40) < 1
    assert TokenPrior.from_pretrained(tiny_run / "prior", "cpu", name).model.dtype == torch.bfloat16
    assert ImageTokenizer.from_pretrained(tiny_run / "tokenizer", "cpu", name).decoder.conv_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("arguments", "message"), [
    ({"dtype": "bfloat"}, r"dtype is 'bfloat'; allowed: float32, bfloat16, float16, float64.*Did you mean 'bfloat16'"),
    ({"dtype": "int8"}, r"dtype is 'int8'; allowed"), ({"dtype": torch.int64}, r"dtype is torch.int64; allowed"),
    ({"dtype": 16}, r"dtype is 16; allowed"),
    ({"device": "gpu"}, "device is 'gpu'"), ({"device": 1.5}, r"device is '?1.5"), ({"device": ["cpu"]}, "device is"),
], ids=str)
def test_unknown_dtype_or_device_is_rejected(tiny_run, arguments, message):
    for load, folder in ((ImageGenerationPipeline.from_pretrained, tiny_run), (TokenPrior.from_pretrained, tiny_run / "prior"),
                         (ImageTokenizer.from_pretrained, tiny_run / "tokenizer")):
        with pytest.raises(InputError, match=message):
            load(folder, **arguments)


def test_constructors_reject_strings_for_integers(pipe):
    config, transform = pipe.tokenizer.config, pipe.tokenizer.transform
    with pytest.raises(InputError, match="seed is '1'; it must be an integer"):
        ImageTokenizer(config, transform, seed="1")
    with pytest.raises(InputError, match="seed is '1'; it must be an integer"):
        TokenPrior.from_config(tiny_recipe("unused").prior, pipe.prior.vocabulary, "1")
    with pytest.raises(InputError, match="num_tokens is '16'; it must be an integer"):
        TokenPrior.from_preset("tiny", codebook_size=8, num_classes=2, num_tokens="16")


# --- files -------------------------------------------------------------------------------------------------------------------


def test_pipelines_from_disk_and_from_memory_save_the_same_weights(tiny_run, pipe, tmp_path):
    original = file_contents(tiny_run / "pipeline")
    pipe.save_pretrained(tmp_path / "from_disk")
    assert file_contents(tmp_path / "from_disk") == original

    tokenizer = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    prior = TokenPrior.from_pretrained(tiny_run / "prior")
    ImageGenerationPipeline(tokenizer, prior, pipe.sampling).save_pretrained(tmp_path / "from_memory")
    saved = file_contents(tmp_path / "from_memory")
    assert saved.keys() == original.keys()
    assert all(saved[name] == original[name] for name in original if name.endswith((".safetensors", "pipeline.json", "vocabulary.json")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from_disk", "from_memory"], "no temporary folders are left"

    reloaded = ImageGenerationPipeline.from_pretrained(tmp_path / "from_memory", device="cpu")
    assert torch.equal(reloaded(["3", 7], 2, seed=7).token_ids, pipe(["3", 7], 2, seed=7).token_ids)


def test_changed_sampling_settings_are_saved(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    pipe = ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
    pipe.sampling = SamplingConfig(top_k=5)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu").sampling == SamplingConfig(top_k=5)


def test_saving_replaces_a_pipeline_but_nothing_else(pipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    in_memory = ImageGenerationPipeline(pipe.tokenizer, pipe.prior, pipe.sampling)
    for candidate in (pipe, in_memory):
        with pytest.raises(ValueError, match="would be lost"):
            candidate.save_pretrained(tmp_path / "mine")
        candidate.save_pretrained(tmp_path / "new")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]


def test_exported_files_contain_no_pickle(tiny_run, tmp_path):
    """Every file is JSON or safetensors by content, and a pipeline folder is self-contained."""
    for folder in (tiny_run / "pipeline", tiny_run / "tokenizer", tiny_run / "prior"):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            assert not path.is_symlink()
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                assert path.name == "model.safetensors", path
                with safe_open(path, "pt") as content:
                    assert all(content.get_tensor(name).dtype == torch.float32 for name in content.keys())  # noqa: SIM118, not a dict
    shutil.copytree(tiny_run / "pipeline", tmp_path / "moved")
    assert ImageGenerationPipeline.from_pretrained(tmp_path / "moved", device="cpu")(3, seed=1).token_ids.shape == (1, GRID_SIZE, GRID_SIZE)


def test_token_shards_contain_no_pickled_arrays(tiny_run):
    import io
    import tarfile

    for shard in (tiny_run / "tokens").rglob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".npy"):
                    assert np.load(io.BytesIO(content), allow_pickle=False).dtype == np.uint16
                else:
                    assert member.name.endswith(".json") and json.loads(content)


# --- mismatched parts --------------------------------------------------------------------------------------------------------


def other_tokenizer(folder: Path) -> ImageTokenizer:
    tokenizer = ImageTokenizer(tiny_recipe("unused").tokenizer, ImageTransform(image_size=16, channels=1), seed=1)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_mismatched_parts_are_rejected(tiny_run, pipe, tmp_path):
    other = other_tokenizer(tmp_path / "other")
    both = (other.token_fingerprint[:16], pipe.tokenizer.token_fingerprint[:16])
    with pytest.raises(ValueError, match="do not belong together") as in_memory:
        ImageGenerationPipeline(other, pipe.prior)
    with pytest.raises(ValueError, match="do not belong together") as on_disk:
        make_bundle(tmp_path / "other", tiny_run / "prior", tmp_path / "out", SamplingConfig())
    shutil.copytree(tiny_run / "pipeline", tmp_path / "spoilt")
    shutil.rmtree(tmp_path / "spoilt" / "tokenizer")
    shutil.copytree(tmp_path / "other", tmp_path / "spoilt" / "tokenizer")
    with pytest.raises(ValueError, match="do not belong together") as loading:
        ImageGenerationPipeline.from_pretrained(tmp_path / "spoilt", device="cpu")
    for error, paths in ((in_memory, ()), (on_disk, (tmp_path / "other", tiny_run / "prior")),
                         (loading, (tmp_path / "spoilt" / "tokenizer", tmp_path / "spoilt" / "prior"))):
        assert all(str(part) in str(error.value) for part in (*both, *paths))
    assert not (tmp_path / "out").exists()


def test_unsaved_tokenizer_is_rejected(pipe):
    fresh = ImageTokenizer(tiny_recipe("unused").tokenizer, ImageTransform(image_size=16, channels=1))
    with pytest.raises(ValueError, match="no token fingerprint yet"):
        ImageGenerationPipeline(fresh, pipe.prior)


def test_tokenizer_with_finetuned_decoder_still_fits(tiny_run, pipe, tmp_path):
    tokenizer = ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    with torch.no_grad():
        tokenizer.decoder.conv_out.weight.mul_(0.5)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    make_bundle(tmp_path / "tokenizer", tiny_run / "prior", tmp_path / "pipeline", SamplingConfig())
    changed = ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
    assert changed.tokenizer.token_fingerprint == pipe.tokenizer.token_fingerprint
    assert changed.tokenizer.full_fingerprint != pipe.tokenizer.full_fingerprint


def test_guidance_needs_label_drop(tiny_run, pipe, tmp_path):
    prior = prior_like(pipe, label_drop=0.0)
    without = ImageGenerationPipeline(pipe.tokenizer, prior)
    assert without(3, seed=1).class_indices == [3]
    with pytest.raises(ValueError, match=r"guidance_scale is 2.*label_drop"):
        without(3, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"class_labels is not given.*label drop.*0, 1, 2"):
        without()
    prior.save_pretrained(tmp_path / "prior")
    with pytest.raises(ValueError, match=r"guidance_scale is 2.*label_drop 0.*null class.*\. Set sampling.guidance_scale to 1"):
        make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "out", SamplingConfig(guidance_scale=2.0))


def test_pipeline_without_classes(tiny_run, pipe, tmp_path):
    prior_like(pipe, class_names=None, label_drop=0.0).save_pretrained(tmp_path / "prior")
    make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "out", SamplingConfig(top_k=9))
    unlabelled = ImageGenerationPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert unlabelled.class_names is None
    out = unlabelled(num_images_per_label=3, seed=4)
    assert out.class_indices is None and len(out.images) == 3 and out.seeds == image_seeds(4, 3)
    with pytest.raises(ValueError, match=r"the classes \[3\] are given, but this pipeline was trained without classes"):
        unlabelled(3)
    with pytest.raises(ValueError, match="guidance_scale is 2"):
        unlabelled(guidance_scale=2.0)
    with pytest.raises(ValueError, match="was trained without classes"):
        make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "again", SamplingConfig(guidance_scale=2.0))


# --- finding and loading -----------------------------------------------------------------------------------------------------


def test_find_pipeline_accepts_run_and_pipeline_folders(tiny_run, tmp_path):
    assert find_pipeline(tiny_run) == find_pipeline(str(tiny_run / "pipeline")) == tiny_run / "pipeline"
    with pytest.raises(ValueError, match="has no finished pipeline"):
        find_pipeline(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        find_pipeline(tmp_path / "none")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", torch.device("meta")], ids=str)
def test_unavailable_device_is_rejected(tiny_run, device):
    with pytest.raises(ValueError, match=r"device is .*; this machine has: cpu"):
        ImageGenerationPipeline.from_pretrained(tiny_run, device=device)


@pytest.mark.parametrize(("name", "corrupt", "message"), [
    ("pipeline.json", lambda content: content.replace("vqmosaic.pipeline", "other.pipeline"), "says format 'other.pipeline'"),
    ("pipeline.json", lambda content: content.replace('"format_version": 1', '"format_version": 9'), "version 9"),
    ("pipeline.json", lambda content: content[:20], "is not JSON"),
    ("pipeline.json", lambda content: content.replace('"top_p": 1.0', '"top_p": 7.0'), "top_p is 7"),
    ("tokenizer/config.json", lambda content: content.replace('"format_version": 1', '"format_version": 9'), "version 9"),
], ids=["format", "version", "cut short", "settings", "tokenizer"])
def test_invalid_pipeline_files_are_rejected(tiny_run, tmp_path, name, corrupt, message):
    shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    path = tmp_path / "pipeline" / name
    path.write_text(corrupt(path.read_text()))
    with pytest.raises(ValueError, match=message):
        ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")


def test_weights_changed_since_export_are_rejected(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "pipeline", tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "tokenizer" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has changed since it was exported"):
        ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu")
