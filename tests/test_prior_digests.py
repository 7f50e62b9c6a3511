"""Loading or bundling a prior with damaged, edited or replaced files raises an error that names the files."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines import ImageGenerationPipeline, make_bundle
from pipelines.bundle import part_fingerprints, read_bundle
from pipelines.stages.stage_inputs import input_fingerprints, vocabulary_of_prior
from stage1_tokenizer.tokenizer import ImageTokenizer
from stage2_prior.digests import DIGESTS_NAME, check_digests, fingerprint_of_weights
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from tests.run_files import edit_json
from tests.tiny_priors import random_batch, tiny_prior
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import copy_folder, sha256_of_file
from vqmosaic.recipes.recipe_files import load_recipe
from vqmosaic.recipes.recipe_sections import SamplingConfig


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_prior().save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def zero_block(path: Path) -> None:
    """Overwrite 4 KiB in the middle of a file with zeros, like a lost block of a disk."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 4096] = bytes(4096)
    path.write_bytes(content)


CHANGES = {
    "zeros in the weights": ("model.safetensors", zero_block),
    "one bit": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))),
    "configuration": ("config.json", lambda path: edit_json(path, rms_norm_eps=0.1)),
    "generation": ("generation_config.json", lambda path: edit_json(path, max_new_tokens=8)),
    "class names": ("vocabulary.json", lambda path: edit_json(path, class_names=["bee", "ant", "cat"])),
    "label drop": ("vocabulary.json", lambda path: edit_json(path, label_drop=0.5)),
}


@pytest.mark.parametrize(("name", "spoil"), CHANGES.values(), ids=list(CHANGES))
def test_error_for_a_changed_file_names_it(folder, name, spoil):
    TokenPrior.from_pretrained(folder)
    spoil(folder / name)
    with pytest.raises(InputError, match=f"has changed since it was saved \\(changed: {name}\\)\\. If its files are damaged"):
        TokenPrior.from_pretrained(folder)


def test_error_for_missing_and_added_files_names_them(folder):
    (folder / "generation_config.json").unlink()
    save_file(load_file(folder / "model.safetensors"), folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: generation_config\.json; added: model-00001-of-00001\.safetensors"):
        TokenPrior.from_pretrained(folder)


def test_unrelated_files_are_ignored(folder):
    (folder / "README.md").write_text("about this prior")
    TokenPrior.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["llama", "grid_transformer"])
def test_error_for_a_fine_tuned_prior_says_what_to_do(tmp_path, architecture):
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


def test_digests_cover_sharded_weights(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    sharded = tmp_path / "several"
    model.save_pretrained(sharded, max_shard_size="10KB")
    Vocabulary.load(folder).save(sharded)
    with pytest.warns(UserWarning, match="has no digests.json"):
        TokenPrior.from_pretrained(sharded)
    from stage2_prior.digests import write_digests

    write_digests(sharded)
    before = fingerprint_of_weights(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert torch.equal(TokenPrior.from_pretrained(sharded)(*random_batch(size=4)), TokenPrior.from_pretrained(folder)(*random_batch(size=4)))
    assert vocabulary_of_prior(sharded) == vocabulary_of_prior(folder)
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=f"changed: {path.name}"):
        TokenPrior.from_pretrained(sharded)
    assert fingerprint_of_weights(sharded) != before


def test_prior_without_digests_loads_with_one_warning(folder, tmp_path):
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


def test_fingerprint_of_a_prior_is_the_digest_of_its_weights(tiny_run):
    expected = sha256_of_file(tiny_run / "prior/model.safetensors")
    assert part_fingerprints(tiny_run / "tokenizer", tiny_run / "prior")["prior"] == expected
    assert input_fingerprints(load_recipe(str(tiny_run)), "pipeline")["prior"] == expected


def test_damaged_prior_is_not_bundled(tiny_run, tmp_path):
    copy_folder(tiny_run / "prior", tmp_path / "prior")
    zero_block(tmp_path / "prior/model.safetensors")
    with pytest.raises(InputError, match=r"changed: model\.safetensors"):
        make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "out", SamplingConfig())
    assert not (tmp_path / "out").exists()


def test_bundle_adds_missing_digests(tiny_run, tmp_path):
    copy_folder(tiny_run / "prior", tmp_path / "prior")
    (tmp_path / "prior" / DIGESTS_NAME).unlink()
    with pytest.warns(UserWarning, match="has no digests.json"):
        out = make_bundle(tiny_run / "tokenizer", tmp_path / "prior", tmp_path / "out", SamplingConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ImageGenerationPipeline.from_pretrained(out, device="cpu").save_pretrained(tmp_path / "again")
        check_digests(tmp_path / "again/prior")
    zero_block(tmp_path / "again/prior/model.safetensors")
    with pytest.raises(InputError, match=r"changed: model\.safetensors"):
        ImageGenerationPipeline.from_pretrained(tmp_path / "again", device="cpu")


# --- tokenizers and pipelines ------------------------------------------------------------------------------------------------


def test_edited_class_names_of_a_tokenizer_are_detected(tiny_run, tmp_path):
    copy_folder(tiny_run / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/config.json"
    names = json.loads(path.read_text())["class_names"]
    edit_json(path, class_names=names[::-1])
    with pytest.raises(InputError, match=r"config\.json has changed since it was exported \(its class_names"):
        ImageTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_tokenizer_without_a_config_digest_loads(tiny_run, tmp_path):
    copy_folder(tiny_run / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/config.json"
    content = json.loads(path.read_text())
    del content["config_digest"]
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImageTokenizer.from_pretrained(tmp_path / "tokenizer").class_names == content["class_names"]


@pytest.mark.parametrize(("name", "value"), [("class_names", ["3", "7"]), ("token_fingerprint", "0" * 64)])
def test_pipeline_that_does_not_match_its_prior_is_refused(tiny_run, tmp_path, name, value):
    copy_folder(tiny_run / "pipeline", tmp_path / "pipeline")
    edit_json(tmp_path / "pipeline/pipeline.json", **{name: value})
    with pytest.raises(InputError, match=f"has another {name} than"):
        read_bundle(tmp_path / "pipeline")


def test_sampling_settings_of_a_pipeline_can_be_edited(tiny_run, tmp_path):
    copy_folder(tiny_run / "pipeline", tmp_path / "pipeline")
    path = tmp_path / "pipeline/pipeline.json"
    edit_json(path, sampling=json.loads(path.read_text())["sampling"] | {"temperature": 0.7})
    assert ImageGenerationPipeline.from_pretrained(tmp_path / "pipeline", device="cpu").sampling.temperature == 0.7


def test_saving_removes_the_files_of_an_earlier_model(folder):
    """Such as sharded weights and adapters, which would conflict with the new files."""
    model, vocabulary = TokenPrior.from_pretrained(folder).model, Vocabulary.load(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "notes.txt").write_text("kept")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    TokenPrior(model, vocabulary).save_pretrained(folder)
    TokenPrior.from_pretrained(folder)
    assert (folder / "notes.txt").exists() and not list(folder.glob("model-*"))
