"""Damaged, edited or replaced files of a prior are named when it is loaded or bundled."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines import ImageGenerationPipeline, make_bundle
from pipelines.bundle import part_fingerprints, read_bundle
from pipelines.stages.stage_inputs import inputs_of, token_fingerprint_of_prior
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.digests import DIGESTS_NAME, check_digests, fingerprint_of_weights
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.test_prior import random_batch, tiny_prior
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import copy_folder, sha256_of_file
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_prior().save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def zeros_inside(path: Path) -> None:
    """Write 4 KiB of zeros into the middle of a file, like a lost block."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 4096] = bytes(4096)
    path.write_bytes(content)


SPOILS = {
    "zeros in the weights": ("model.safetensors", zeros_inside),
    "one bit": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))),
    "configuration": ("config.json", lambda path: edit(path, rms_norm_eps=0.1)),
    "generation": ("generation_config.json", lambda path: edit(path, max_new_tokens=8)),
    "class names": ("vocabulary.json", lambda path: edit(path, class_names=["bee", "ant", "cat"])),
    "label drop": ("vocabulary.json", lambda path: edit(path, label_drop=0.5)),
}


@pytest.mark.parametrize(("name", "spoil"), SPOILS.values(), ids=list(SPOILS))
def test_a_file_that_changed_is_named(folder, name, spoil):
    TokenPrior.from_pretrained(folder)
    spoil(folder / name)
    with pytest.raises(InputError, match=f"has changed since it was saved \\(changed: {name}\\)\\. If its files are damaged"):
        TokenPrior.from_pretrained(folder)


def test_files_that_are_missing_or_new_are_named(folder):
    (folder / "generation_config.json").unlink()
    save_file(load_file(folder / "model.safetensors"), folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: generation_config\.json; added: model-00001-of-00001\.safetensors"):
        TokenPrior.from_pretrained(folder)


def test_files_without_effect_may_lie_beside_the_prior(folder):
    (folder / "README.md").write_text("about this prior")
    TokenPrior.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_the_error_for_a_prior_trained_further_says_what_to_do(tmp_path, architecture):
    folder = tmp_path / "prior"
    tiny_prior(architecture).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"changed: .*model\.safetensors.*trained it further.*TokenPrior\(model, Vocabulary\.load\(folder\)\)"):
        TokenPrior.from_pretrained(folder)
    TokenPrior(model, Vocabulary.load(folder)).save_pretrained(folder)
    expected = TokenPrior(model, Vocabulary.load(folder)).eval()
    assert torch.equal(TokenPrior.from_pretrained(folder)(*random_batch(size=4)), expected(*random_batch(size=4)))


def test_a_prior_in_several_files_is_checked_too(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    several = tmp_path / "several"
    model.save_pretrained(several, max_shard_size="10KB")
    Vocabulary.load(folder).save(several)
    with pytest.warns(UserWarning, match="has no digests.json"):
        TokenPrior.from_pretrained(several)
    from stage2_prior.digests import write_digests

    write_digests(several)
    before = fingerprint_of_weights(several)
    assert len(list(several.glob("model-*.safetensors"))) > 2
    assert torch.equal(TokenPrior.from_pretrained(several)(*random_batch(size=4)), TokenPrior.from_pretrained(folder)(*random_batch(size=4)))
    assert token_fingerprint_of_prior(several) == token_fingerprint_of_prior(folder)
    path = sorted(several.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=f"changed: {path.name}"):
        TokenPrior.from_pretrained(several)
    assert fingerprint_of_weights(several) != before


def test_a_prior_of_an_earlier_version_loads_with_one_warning(folder, tmp_path):
    (folder / DIGESTS_NAME).unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            TokenPrior.from_pretrained(folder)
    assert len(caught) == 1 and "has no digests.json" in str(caught[0].message) and "vqmosaic bundle" in str(caught[0].message)
    with pytest.warns(UserWarning):
        TokenPrior.from_pretrained(folder).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TokenPrior.from_pretrained(folder)


def test_the_fingerprint_of_a_prior_is_the_digest_of_its_weights(tiny_run):
    expected = sha256_of_file(tiny_run / "prior/model.safetensors")
    assert part_fingerprints(tiny_run / "tokenizer", tiny_run / "prior")["prior"] == expected
    assert inputs_of(load_recipe(str(tiny_run)), "pipeline")["prior"] == expected


def test_a_damaged_prior_is_not_bundled(tiny_run, tmp_path):
    copy_folder(tiny_run / "prior", tmp_path / "prior")
    zeros_inside(tmp_path / "prior/model.safetensors")
    with pytest.raises(InputError, match=r"changed: model\.safetensors"):
        make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "out", SamplingConfig())
    assert not (tmp_path / "out").exists()


def test_a_bundle_adds_digests_to_a_prior_of_an_earlier_version(tiny_run, tmp_path):
    copy_folder(tiny_run / "prior", tmp_path / "prior")
    (tmp_path / "prior" / DIGESTS_NAME).unlink()
    with pytest.warns(UserWarning, match="has no digests.json"):
        out = make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "out", SamplingConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ImageGenerationPipeline.from_pretrained(out, device="cpu").save_pretrained(tmp_path / "again")
        check_digests(tmp_path / "again/prior")
    zeros_inside(tmp_path / "again/prior/model.safetensors")
    with pytest.raises(InputError, match=r"changed: model\.safetensors"):
        ImageGenerationPipeline.from_pretrained(tmp_path / "again", device="cpu")


# --- what else is loaded -----------------------------------------------------------------------------------------------------


def test_edited_class_names_of_a_tokenizer_are_noticed(tiny_run, tmp_path):
    copy_folder(tiny_run / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/config.json"
    names = json.loads(path.read_text())["class_names"]
    edit(path, class_names=names[::-1])
    with pytest.raises(InputError, match=r"config\.json has changed since it was exported \(its class_names"):
        ImageTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_tokenizer_of_an_earlier_version_has_no_digest_of_its_configuration(tiny_run, tmp_path):
    copy_folder(tiny_run / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/config.json"
    content = json.loads(path.read_text())
    del content["config_digest"]
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImageTokenizer.from_pretrained(tmp_path / "tokenizer").class_names == content["class_names"]


@pytest.mark.parametrize(("name", "value"), [("class_names", ["3", "7"]), ("token_fingerprint", "0" * 64)])
def test_a_pipeline_that_names_another_prior_is_refused(tiny_run, tmp_path, name, value):
    copy_folder(tiny_run / "pipeline", tmp_path / "pipeline")
    edit(tmp_path / "pipeline/pipeline.json", **{name: value})
    with pytest.raises(InputError, match=f"has another {name} than"):
        read_bundle(tmp_path / "pipeline")


def test_the_sampling_settings_of_a_pipeline_may_be_edited(tiny_run, tmp_path):
    copy_folder(tiny_run / "pipeline", tmp_path / "pipeline")
    path = tmp_path / "pipeline/pipeline.json"
    edit(path, sampling=json.loads(path.read_text())["sampling"] | {"temperature": 0.7})
    assert ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu").sampling.temperature == 0.7


def test_saving_removes_the_files_of_an_earlier_model(folder):
    """Such as weights in parts, which transformers wrote, and adapters: with the new files they could not be loaded."""
    model, vocabulary = TokenPrior.from_pretrained(folder).model, Vocabulary.load(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "notes.txt").write_text("kept")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    TokenPrior(model, vocabulary).save_pretrained(folder)
    TokenPrior.from_pretrained(folder)
    assert (folder / "notes.txt").exists() and not list(folder.glob("model-*"))
