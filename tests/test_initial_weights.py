"""Initial weights for fine-tuning: finding them by a path, checks against the recipe, strict loading, no pickles."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.stages.stage_checks import check_before_start
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.find_initial_weights import check_init_from, fingerprint_of_initial_weights, locate_initial_weights
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.load_initial_weights import load_initial_weights, read_initial_weights
from tests.tiny import ROOT, tiny_recipe
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import sha256_of_file, write_json

CONFIG = tiny_recipe("unused").tokenizer
CHECKPOINT = "checkpoints/tokenizer/step-00000006"


def make_tokenizer(**changes) -> ImageTokenizer:
    """A tokenizer of the tiny recipe with a seed that differs from the tiny run's."""
    return ImageTokenizer(dataclasses.replace(CONFIG, **changes), ImageTransform(image_size=16, channels=1), seed=9)


def rewrite(checkpoint: Path, name: str, weights: dict[str, torch.Tensor] | None) -> None:
    """Replace or delete a weight file of a checkpoint, and update its checksum."""
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    if weights is None:
        (checkpoint / name).unlink()
        del checksums[name]
    else:
        save_file(weights, checkpoint / name)
        checksums[name] = {"size": (checkpoint / name).stat().st_size, "sha256": sha256_of_file(checkpoint / name)}
    write_json(checkpoint / "checksums.json", checksums)


@pytest.fixture
def checkpoint(tiny_run, tmp_path) -> Path:
    """A copy of the tiny run's last checkpoint outside of its run, which a test may change."""
    return Path(shutil.copytree(tiny_run / CHECKPOINT, tmp_path / "step-00000006"))


# --- finding weights ---------------------------------------------------------------------------------------------------------


def test_tokenizer_run_and_pipeline_folders_and_checkpoints_are_found(tiny_run):
    for path in (tiny_run, tiny_run / "tokenizer"):
        found = locate_initial_weights(str(path))
        assert found.is_export and found.folder == tiny_run / "tokenizer"
    assert locate_initial_weights(str(tiny_run / "pipeline")).folder == tiny_run / "pipeline/tokenizer"
    found = locate_initial_weights(str(tiny_run / CHECKPOINT))
    assert not found.is_export and found.file == tiny_run / CHECKPOINT / "weights_ema.safetensors"
    assert found.config["network"]["codebook_size"] == CONFIG.codebook_size, "the config comes from the run's record"
    assert found.config["transform"] == {"image_size": 16, "channels": 1, "resampling": "bicubic"}


@pytest.mark.parametrize(("path", "words"), [
    ("{run}/tokeniser", ["does not exist", "step-00000500", "Did you mean", "run/tokenizer"]),
    ("{run}/recipe.yaml", ["is a file", "a tokenizer folder"]),
    ("{run}/prior", ["none of these", "config.json and model.safetensors"]),
    ("{run}/logs", ["none of these"]),
    ("{run}/checkpoints/tokenizer", ["none of these", "Did you mean the checkpoint", "step-00000006"]),
], ids=["missing", "file", "prior", "folder", "all checkpoints"])
def test_other_paths_are_refused(path, words, tiny_run):
    with pytest.raises(InputError) as caught:
        locate_initial_weights(path.format(run=tiny_run))
    assert all(word in str(caught.value) for word in ["tokenizer_training.init_from is", *words])


def test_checkpoint_without_a_stage_record_has_an_unknown_config(checkpoint, tiny_copy):
    (tiny_copy / "stages/tokenizer.json").unlink()
    for path in (checkpoint, tiny_copy / CHECKPOINT):
        assert locate_initial_weights(str(path)).config == {}
        assert read_initial_weights(str(path), CONFIG), "loading checks the weights strictly"


def test_error_for_an_unfinished_run_suggests_its_checkpoint(tiny_copy):
    shutil.rmtree(tiny_copy / "tokenizer")
    shutil.rmtree(tiny_copy / "pipeline")
    with pytest.raises(InputError, match=r"Did you mean the checkpoint '.*step-00000006'"):
        locate_initial_weights(str(tiny_copy))


# --- loading -----------------------------------------------------------------------------------------------------------------


def test_loading_an_export_restarts_codebook_averages(tiny_run):
    weights = read_initial_weights(str(tiny_run / "tokenizer"), CONFIG)
    assert weights.keys() == load_file(tiny_run / "tokenizer/model.safetensors").keys()
    tokenizer, original = make_tokenizer(), ImageTokenizer.from_pretrained(tiny_run / "tokenizer")
    load_initial_weights(tokenizer, str(tiny_run))
    loaded, expected = tokenizer.state_dict(), original.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in weights)
    assert torch.equal(tokenizer.quantizer.ema_sums, tokenizer.quantizer.codebook), "not the averages of the random codebook"
    assert tokenizer.training and all(parameter.requires_grad for parameter in tokenizer.parameters())


def test_loading_a_checkpoint_uses_averaged_weights_and_training_state(tiny_run):
    tokenizer = make_tokenizer()
    load_initial_weights(tokenizer, str(tiny_run / CHECKPOINT))
    average = load_file(tiny_run / CHECKPOINT / "weights_ema.safetensors")
    loaded = tokenizer.state_dict()
    assert {f"module.{name}" for name in loaded} == average.keys() - {"n_averaged"} and tokenizer.training_only_names() <= loaded.keys()
    assert all(torch.equal(loaded[name], average[f"module.{name}"]) for name in loaded)
    exported = load_file(tiny_run / "tokenizer/model.safetensors")
    assert all(torch.equal(loaded[name], exported[name]) for name in exported), "the last checkpoint contains the exported weights"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoint_without_an_average_loads_the_model_weights(prefix, checkpoint):
    model_weights = load_file(checkpoint / "model.safetensors")
    rewrite(checkpoint, "weights_ema.safetensors", None)
    rewrite(checkpoint, "model.safetensors", {f"{prefix}{name}": tensor for name, tensor in model_weights.items()})
    tokenizer = make_tokenizer()
    load_initial_weights(tokenizer, str(checkpoint))
    assert all(torch.equal(tensor, model_weights[name]) for name, tensor in tokenizer.state_dict().items())


# --- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tokenizer", CHECKPOINT], ids=["export", "checkpoint"])
def test_error_for_another_network_lists_differing_fields(path, tiny_run):
    other_config = dataclasses.replace(CONFIG, codebook_size=64, l2_normalize=True, dropout=0.5)
    with pytest.raises(InputError) as caught:
        read_initial_weights(str(tiny_run / path), other_config)
    words = str(caught.value)
    assert "tokenizer.codebook_size is 64 in the recipe and 32 in the weights" in words
    assert "tokenizer.l2_normalize is True in the recipe and False in the weights" in words
    assert "Set tokenizer.codebook_size, tokenizer.l2_normalize to the values of the weights" in words
    assert "dropout" not in words, "training-only fields may differ"


def test_training_only_fields_may_differ(tiny_run):
    tokenizer = make_tokenizer(dropout=0.1, commitment_weight=1.0, ema_decay=0.9, revival_threshold=0.0, residual_depth=2)
    load_initial_weights(tokenizer, str(tiny_run))


def test_mismatched_weights_are_listed(checkpoint):
    weights = load_file(checkpoint / "weights_ema.safetensors")
    del weights["module.encoder.conv_in.bias"]
    weights["module.encoder.extra"] = torch.zeros(1)
    weights["module.quantizer.codebook"] = torch.zeros(3, 8)
    rewrite(checkpoint, "weights_ema.safetensors", weights)
    tokenizer = make_tokenizer()
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_initial_weights(tokenizer, str(checkpoint))
    for word in ("missing encoder.conv_in.bias", "unexpected encoder.extra", "quantizer.codebook has shape (3, 8), not (32, 8)"):
        assert word in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items()), "no weight was loaded"


def test_checkpoint_of_a_prior_is_refused(tiny_run):
    with pytest.raises(InputError, match=r"missing .* and \d+ more"):
        load_initial_weights(make_tokenizer(), str(tiny_run / CHECKPOINT.replace("tokenizer", "prior")))


def test_damaged_weights_are_refused(checkpoint, tiny_copy):
    path = checkpoint / "weights_ema.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"damaged checkpoint: weights_ema.safetensors is missing or cut short"):
        read_initial_weights(str(checkpoint), CONFIG)
    path = tiny_copy / "tokenizer/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="has changed since it was exported"):
        read_initial_weights(str(tiny_copy), CONFIG)


def test_pickle_file_is_not_loaded(checkpoint):
    (checkpoint / "weights_ema.safetensors").write_bytes(b"\x80\x04N.")
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    checksums["weights_ema.safetensors"] = {"size": 4, "sha256": hashlib.sha256(b"\x80\x04N.").hexdigest()}
    write_json(checkpoint / "checksums.json", checksums)
    with pytest.raises(InputError, match="not a weight file"):
        read_initial_weights(str(checkpoint), CONFIG)


# --- checks before training --------------------------------------------------------------------------------------------------


def test_initial_weights_are_checked_before_the_stage_starts(tiny_run, tmp_path):
    def check(init_from, **changes):
        return check_before_start(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=init_from, **changes), "tokenizer")

    assert check(tiny_run) == check(tiny_run / "tokenizer") == check(tiny_run / CHECKPOINT) == "start"
    with pytest.raises(InputError, match=r"init_from is .* does not exist"):
        check(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"tokenizer.channels is 64 in the recipe and 32 in the weights"):
        check(tiny_run, tokenizer__channels=64)
    for path in (tiny_run, tiny_run / CHECKPOINT):
        with pytest.raises(InputError, match=r"data.channels is 3, but .* trained with 1\. Set data.channels to 1"):
            check(path, data__channels=3)
        assert check(path, data__image_size=32) == "start", "the network accepts images of any size"
    check_init_from(tiny_recipe(tmp_path / "run"))


@pytest.mark.parametrize("path", ["", "tokenizer", "pipeline", CHECKPOINT])
def test_run_cannot_start_from_its_own_outputs(path, tiny_run):
    with pytest.raises(InputError, match="which this run writes"):
        check_init_from(tiny_recipe(tiny_run, tokenizer_training__init_from=tiny_run / path))


def test_finished_stage_does_not_need_its_initial_weights(tiny_run, tmp_path):
    source = shutil.copytree(tiny_run / "tokenizer", tmp_path / "source")
    run = shutil.copytree(tiny_run, tmp_path / "run")
    recipe = tiny_recipe(run, tokenizer_training__init_from=source)
    record = json.loads((run / "stages/tokenizer.json").read_text())
    record["fields"]["tokenizer_training.init_from"] = str(source)
    write_json(run / "stages/tokenizer.json", record)
    shutil.rmtree(source)
    assert check_before_start(recipe, "tokenizer") == "skip"


def test_unfinished_stage_needs_its_initial_weights_only_without_a_checkpoint(tiny_run, tmp_path):
    source = shutil.copytree(tiny_run / "tokenizer", tmp_path / "source")
    run = shutil.copytree(tiny_run, tmp_path / "run")
    recipe = tiny_recipe(run, tokenizer_training__init_from=source)
    record = json.loads((run / "stages/tokenizer.json").read_text()) | {"finished": False}
    record["fields"]["tokenizer_training.init_from"] = str(source)
    write_json(run / "stages/tokenizer.json", record)
    assert check_before_start(recipe, "tokenizer") == "resume"
    shutil.rmtree(source)
    assert check_before_start(recipe, "tokenizer") == "resume"
    with pytest.raises(InputError, match=r"init_from is .* does not exist"):
        check_before_start(recipe, "tokenizer", redo="tokenizer")
    shutil.rmtree(run / "checkpoints/tokenizer")
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(InputError, match=r"init_from is .* does not exist"):
        check_before_start(recipe, "tokenizer")


def test_fingerprints_depend_on_the_weights(tiny_run, checkpoint):
    config = json.loads((tiny_run / "tokenizer/config.json").read_text())
    assert fingerprint_of_initial_weights(str(tiny_run)) == config["full_fingerprint"]
    before = fingerprint_of_initial_weights(str(checkpoint))
    assert before == fingerprint_of_initial_weights(str(tiny_run / CHECKPOINT)) == sha256_of_file(checkpoint / "checksums.json")
    weights = load_file(checkpoint / "weights_ema.safetensors")
    weights["module.encoder.conv_in.bias"] += 1
    rewrite(checkpoint, "weights_ema.safetensors", weights)
    assert fingerprint_of_initial_weights(str(checkpoint)) != before


def test_fingerprinting_does_not_import_torch(tiny_run):
    code = ("import sys\nfrom stage1_tokenizer.find_initial_weights import fingerprint_of_initial_weights\n"
            f"fingerprint_of_initial_weights({str(tiny_run)!r})\nassert not {{'torch', 'safetensors', 'numpy'}} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- fine-tuning -------------------------------------------------------------------------------------------------------------

DECODER = {"tokenizer_training__train_parts": "decoder", "tokenizer_training__max_steps": 2}


@pytest.mark.parametrize("path", ["", CHECKPOINT], ids=["run", "checkpoint"])
def test_decoder_fine_tuning_keeps_the_token_fingerprint(path, tiny_run, tmp_path):
    from stage1_tokenizer.train import train

    train(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=tiny_run / path, **DECODER))
    before, after = (ImageTokenizer.from_pretrained(folder / "tokenizer") for folder in (tiny_run, tmp_path / "run"))
    assert after.token_fingerprint == before.token_fingerprint and after.full_fingerprint != before.full_fingerprint


def error_messages(recipe) -> list[str]:
    """Errors of the check before the start, and of the training itself, which other launchers call directly."""
    from stage1_tokenizer.train import train

    words = []
    for call in (lambda: check_before_start(recipe, "tokenizer"), lambda: train(recipe)):
        with pytest.raises(InputError) as caught:
            call()
        words.append(str(caught.value))
    return words


@pytest.mark.parametrize("path", ["tokenizer", CHECKPOINT], ids=["export", "checkpoint"])
def test_decoder_fine_tuning_with_another_image_size_is_refused(path, tiny_run, tmp_path):
    """Images of another size would change the tokens and the fingerprint that priors check."""
    for words in error_messages(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=tiny_run / path, data__image_size=32, **DECODER)):
        for word in ("data.image_size is 32", str(tiny_run / path), "trained with 16", "Set data.image_size to 16",
                     "tokenizer_training.train_parts to all"):
            assert word in words
    assert not (tmp_path / "run/stages/tokenizer.json").exists() and not (tmp_path / "run/tokenizer").exists()


def test_decoder_fine_tuning_with_an_unknown_image_size_is_refused(checkpoint, tmp_path):
    for words in error_messages(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=checkpoint, **DECODER)):
        for word in ("train_parts is 'decoder'", "data.image_size that the weights", str(checkpoint), "a tokenizer folder",
                     "<run_dir>/checkpoints/tokenizer", "tokenizer_training.train_parts to all"):
            assert word in words
    assert check_before_start(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=checkpoint), "tokenizer") == "start"


@pytest.mark.parametrize("path", ["tokenizer", CHECKPOINT], ids=["export", "checkpoint"])
def test_decoder_fine_tuning_on_derived_images_is_refused(path, tiny_run, tmp_path):
    """Edges have the size and channels of grey images, but would be other images to the encoder."""
    changes = {"data__derived": "{kind: edges}", **DECODER}
    for words in error_messages(tiny_recipe(tmp_path / "run", tokenizer_training__init_from=tiny_run / path, **changes)):
        assert "data.derived is {'kind': 'edges', 'method': 'sobel'}, but the weights" in words and "Set data.derived to null" in words
