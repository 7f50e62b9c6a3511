"""Singular and plural in messages."""

import re

import pytest

from tests.test_structure import SOURCES, name_of
from vqmosaic.wording import counted, is_or_are


@pytest.mark.parametrize(("number", "noun", "words"), [
    (0, "image", "0 images"), (1, "image", "1 image"), (1418, "image", "1,418 images"), (1, "class", "1 class"), (2, "class", "2 classes"),
    (2, "process", "2 processes"), (2, "epoch", "2 epochs"), (2, "batch", "2 batches"), (3, "skipped image", "3 skipped images"),
])
def test_a_number_with_its_noun(number, noun, words):
    assert counted(number, noun) == words


def test_another_plural_and_the_verb():
    assert counted(2, "entry", "entries") == "2 entries" and counted(1, "entry", "entries") == "1 entry"
    assert [is_or_are(number) for number in (0, 1, 2)] == ["are", "is", "are"]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_numbers_of_shards_and_reconstructions_go_through_counted(path):
    """A run often has only one of them."""
    assert not re.findall(r"\{len\([^{}]*\)\} (?:shards|reconstructions|views)\b(?! at\b)", path.read_text())
