"""Singular and plural in messages."""

import re

import pytest

from tests.test_structure import SOURCES, name_of
from vqmosaic.wording import counted, is_or_are


@pytest.mark.parametrize(("number", "noun", "expected"), [
    (0, "image", "0 images"), (1, "image", "1 image"), (1418, "image", "1,418 images"), (1, "class", "1 class"), (2, "class", "2 classes"),
    (2, "process", "2 processes"), (2, "epoch", "2 epochs"), (2, "batch", "2 batches"), (3, "skipped image", "3 skipped images"),
])
def test_counted(number, noun, expected):
    assert counted(number, noun) == expected


def test_irregular_plural_and_verb():
    assert counted(2, "entry", "entries") == "2 entries" and counted(1, "entry", "entries") == "1 entry"
    assert [is_or_are(number) for number in (0, 1, 2)] == ["are", "is", "are"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sources_use_counted_for_plurals(path):
    """A run often has only one shard or reconstruction, and "1 shards" would be wrong."""
    assert not re.findall(r"\{len\([^{}]*\)\} (?:shards|reconstructions|views)\b(?! at\b)", path.read_text())
