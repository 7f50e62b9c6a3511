"""The vocabulary: layout of ids, conversion, saving and loading."""

import json

import numpy as np
import pytest
import torch

from stage2_prior.vocabulary import NO_CLASS, Vocabulary
from token_shards.manifest import Grid
from vqmosaic.errors import InputError

ONE_GRID = {"grids": [Grid(name="image", codebook_size=16, height=2, width=3)], "class_names": ["ant", "bee", "cat"],
            "token_fingerprint": "f" * 64, "label_drop": 0.1}
TWO_GRIDS = ONE_GRID | {"grids": [Grid(name="coarse", codebook_size=4, height=1, width=2),
                                  Grid(name="fine", codebook_size=10, height=1, width=2, depth=2)]}


def test_layout_of_one_grid():
    vocabulary = Vocabulary(**ONE_GRID)
    assert (vocabulary.num_tokens, vocabulary.num_codes, vocabulary.most_codes, vocabulary.num_classes) == (6, 16, 16, 3)
    assert (vocabulary.size, vocabulary.null_id, vocabulary.suppressed_ids) == (20, 19, [16, 17, 18, 19])
    assert vocabulary.code_ranges == [(0, 16)] and vocabulary.position_ranges() == [(0, 16)] * 6
    assert [vocabulary.class_id(index) for index in range(3)] == [16, 17, 18]


def test_layout_of_two_grids():
    vocabulary = Vocabulary(**TWO_GRIDS)
    assert vocabulary.code_ranges == [(0, 4), (4, 14)] and vocabulary.most_codes == 10
    assert vocabulary.position_ranges() == [(0, 4)] * 2 + [(4, 14)] * 4
    assert vocabulary.offsets_T.tolist() == [0, 0, 4, 4, 4, 4] and vocabulary.offsets_T.dtype == np.int64
    assert vocabulary.class_id(0) == 14 and vocabulary.null_id == 17 and vocabulary.size == 18


def test_vocabulary_without_classes_has_only_the_null_class():
    vocabulary = Vocabulary(**(ONE_GRID | {"class_names": None}))
    assert (vocabulary.num_classes, vocabulary.size, vocabulary.null_id) == (0, 17, 16)
    assert vocabulary.condition_ids(torch.tensor([NO_CLASS, NO_CLASS])).tolist() == [16, 16]
    with pytest.raises(InputError, match="trained without classes"):
        vocabulary.class_id(0)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize("fields", [ONE_GRID, TWO_GRIDS])
def test_conversion_between_grid_ids_and_vocabulary_ids(kind, fields):
    vocabulary = Vocabulary(**fields)
    ids_BT = kind([[0, 3, 0, 9, 1, 2], [1, 0, 5, 0, 0, 9]])
    vocabulary_ids_BT = vocabulary.to_vocabulary(ids_BT)
    assert type(vocabulary_ids_BT) is type(ids_BT) and vocabulary_ids_BT.dtype == ids_BT.dtype
    for position, (start, stop) in enumerate(vocabulary.position_ranges()):
        assert all(start <= id < stop for id in vocabulary_ids_BT[:, position].tolist())
        assert vocabulary.to_vocabulary_at(position, ids_BT[:, position]).tolist() == vocabulary_ids_BT[:, position].tolist()
    assert vocabulary.to_grid_ids(vocabulary_ids_BT).tolist() == ids_BT.tolist()
    assert vocabulary.condition_ids(kind([0, 2, NO_CLASS])).tolist() == [vocabulary.class_id(0), vocabulary.class_id(2), vocabulary.null_id]


@pytest.mark.parametrize("index", [-1, 3, 100])
def test_error_for_an_invalid_class_lists_valid_classes(index):
    with pytest.raises(InputError, match=rf"{index}; allowed: 0 \(ant\) to 2 \(cat\)"):
        Vocabulary(**ONE_GRID).class_id(index)


@pytest.mark.parametrize("fields", [ONE_GRID, TWO_GRIDS, ONE_GRID | {"class_names": None}])
def test_saving_and_loading(tmp_path, fields):
    Vocabulary(**fields).save(tmp_path)
    assert Vocabulary.load(tmp_path) == Vocabulary(**fields)


@pytest.mark.parametrize(("change", "words"), [
    ({"schema_version": 3}, "schema_version 3; this version of vqmosaic reads 1 and 2"),
    ({"schema_version": "2"}, "schema_version 2; this version"),
    ({"extra": 1}, "unknown fields: extra"),
    ({"label_drop": None}, "missing fields: label_drop"),
    ({"label_drop": 1.5}, "label_drop of the vocabulary is 1.5"),
    ({"label_drop": "a lot"}, "label_drop of the vocabulary is 'a lot'; it must be a number"),
    ({"class_names": "cat"}, "must be a list of strings"),
    ({"class_names": []}, "class_names of the vocabulary is empty"),
    ({"token_fingerprint": 3}, "must be a string"),
    ({"grids": []}, "no grids"),
    ({"grids": [{"name": "image", "codes": 3}]}, "codes"),
    ({"grids": None}, "must be a list"),
])
def test_invalid_file_is_refused(tmp_path, change, words):
    path, grid = tmp_path / "vocabulary.json", {"name": "image", "codebook_size": 16, "height": 2, "width": 3, "depth": 1}
    if "grids" in change:  # a field of schema 1; tests/test_segments.py edits the segments of schema 2
        path.write_text(json.dumps(ONE_GRID | {"grids": [grid], "schema_version": 1}))
    else:
        Vocabulary(**ONE_GRID).save(tmp_path)
    content = json.loads(path.read_text()) | change
    if change == {"label_drop": None}:
        del content["label_drop"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        Vocabulary.load(tmp_path)
    assert str(path) in str(caught.value)


def test_error_for_a_missing_or_broken_file_names_it(tmp_path):
    with pytest.raises(InputError, match=r"vocabulary\.json is missing"):
        Vocabulary.load(tmp_path)
    (tmp_path / "vocabulary.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Vocabulary.load(tmp_path)
