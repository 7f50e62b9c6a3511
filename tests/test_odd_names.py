"""File and class names that are not UTF-8, contain control characters or are very long."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.image_folders.output_folder import format_option
from pipelines.image_folders.sample_folder import NAME_BYTES, file_name, shorten_name
from pipelines.image_folders.write_images import write_reconstructions
from pipelines.labels import class_indices
from pipelines.stages.chain import example_classes
from pipelines.stages.preprocess import preprocess
from pipelines.tokens.audit_command import audit_run
from stage1_tokenizer.data.check_data import check_data
from stage1_tokenizer.data.image_batches import TrainingImages, ValidationImages
from stage1_tokenizer.data.image_sources import refuse_if_too_many_unreadable
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import ImageTransform
from tests.image_bytes import encoded
from tests.image_folders import write_classes
from tests.tiny import command, tiny_recipe
from token_shards.reader import TokenShardReader
from vqmosaic.errors import InputError, printable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.seeding import derive_seed
from vqmosaic.training.tracking import Reporter
from vqmosaic.training.training_plan import describe_classes

LATIN, FORGED = b"caf\xe9.png", b"a.png is unreadable\n40 of 40 images are readable.png"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes with oddly named images. The name of one class is not UTF-8."""
    rng = np.random.default_rng(0)
    for folder in (b"plain", b"stra\xdfe"):
        path = os.fsencode(tmp_path / "photos") + b"/" + folder
        os.makedirs(path)
        for name in [LATIN, FORGED, b"emoji \xf0\x9f\x98\x80.png", *(b"%02d.png" % number for number in range(10))]:
            with open(path + b"/" + name, "wb") as file:
                file.write(encoded(Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))))
    return tmp_path / "photos"


def test_printable_names():
    assert printable("größe 1/é.png") == "größe 1/é.png"
    assert printable("caf\udce9\n\x1b[2J\u202e") == r"caf\xe9\n\x1b[2J\u202e"


def test_seeds_of_utf8_names_are_those_of_version_0_1_0():
    """Other seeds would move images from one split to the other."""
    assert [derive_seed("validation", name) for name in ("cat/000.png", "katze/größe.png", 17)] == [
        1081042154422673631, 4029508031497277362, 5568982810398587030]
    assert derive_seed("validation order", "a\nb.png") == 2868284908469853193
    assert derive_seed("validation", "caf\udce9.png") != derive_seed("validation", "caf\udce8.png")


def test_reporter_escapes_characters_that_cannot_be_encoded(monkeypatch):
    for encoding in ("utf-8", "ascii"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        Reporter("tokens")("skipped caf\udce9 größe", all_processes=True)
        assert written.getvalue().decode(encoding).endswith("skipped caf\\udce9 größe\n" if encoding == "utf-8" else
                                                            "skipped caf\\udce9 gr\\xf6\\xdfe\n")


def test_check_data_and_batches_with_odd_names(photos):
    data = DataConfig(path=str(photos), image_size=16, workers=0, validation_fraction=0.3)
    with open(os.fsencode(photos) + b"/plain/" + FORGED, "wb") as file:
        file.write(b"junk")
    lines: list[str] = []
    assert len(check_data(data, lines.append)) == 1
    assert not any("\n" in line for line in lines) and "\n".join(lines).encode(), "names are printable and cannot add lines"
    assert "25 of 26 images are readable" in lines and any(r"readable\n40 of 40" in line for line in lines)
    splits = open_splits(data)
    assert splits.class_names == ["plain", r"stra\xdfe"]
    transform = ImageTransform(16)
    batches = TrainingImages(splits.train, transform, data, 0).batches(0, 26)
    assert next(batches).images_BCHW.shape == (26, 3, 16, 16)
    batches.close()
    assert sum(size for _, size in ValidationImages(splits.validation, transform).batches(4)) >= len(splits.validation) - 1
    with pytest.raises(InputError, match=r"caf\\xe9\.png \(empty\)"):
        refuse_if_too_many_unreadable({"caf\udce9.png": "empty"}, 1, DataConfig(path="x", max_unreadable=0.0))


def test_preprocess_with_odd_names(photos, tiny_run, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data__source="folder", data__path=photos, data__validation_fraction=0.3,
                         tokens__tokenizer=tiny_run / "tokenizer", tokens__images_per_shard=8, tokens__batch_size=8)
    preprocess(recipe)
    assert audit_run(tmp_path / "run", recipe) == 0
    manifest = TokenShardReader(tmp_path / "run/tokens/train").manifest
    assert manifest.class_names == ["plain", r"stra\xdfe"] and not manifest.skipped


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_command_prints_odd_names(encoding, photos):
    result = command("check-data", "image_folder", "--data.path", photos, PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and not result.stderr and "26 of 26 images are readable" in result.stdout


def test_recipe_paths_that_are_not_utf8_are_rejected(tmp_path):
    for field in ("data__path", "run_dir", "tokens__tokenizer"):
        with pytest.raises(InputError, match=r"is 'caf\\xe9', which is not UTF-8.*a link to it"):
            tiny_recipe(**{"run_dir": tmp_path, "data__source": "auto", "data__path": "here"} | {field: "caf\udce9"})


def test_long_names_are_shortened_and_remain_distinct():
    assert shorten_name("a" * NAME_BYTES) == "a" * NAME_BYTES and file_name("two words") == "two_words"
    first, second = (file_name("ü" * 200 + end) for end in "ab")
    assert first != second and max(len(os.fsencode(name)) for name in (first, second)) <= NAME_BYTES


def test_reconstructions_of_images_with_long_names(tiny_run, tmp_path):
    paths = [tmp_path / f"{'a' * count}.png" for count in (5, 230, 251)] + [tmp_path / f"{'ü' * 125}.png"]
    for path in paths:
        Image.new("L", (16, 16)).save(path)
    assert write_reconstructions(tiny_run / "tokenizer", paths, tmp_path / "out", "cpu", "float32") == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == len(paths) + 1


def test_class_names_cannot_forge_lines(tmp_path, capsys):
    forged = "cat\n[tokenizer  9.0 s] exported\x1b[2J"
    write_classes(tmp_path / "photos", {forged: 6, "dog": 6})
    splits = open_splits(DataConfig(path=str(tmp_path / "photos")))
    shown = r"cat\n[tokenizer  9.0 s] exported\x1b[2J"
    assert splits.class_names == [forged, "dog"] and describe_classes(splits.class_names) == f"{shown}, dog"
    assert format_option("classes", [0], splits.class_names) == shown
    assert example_classes([forged, "dog"]) == "dog" and example_classes([forged]) == ""
    with pytest.raises(InputError) as error:
        class_indices(splits.class_names, ["cow"])
    assert str(error.value).isprintable() and shown in str(error.value)
