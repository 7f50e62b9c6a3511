"""Headings and titles of pictures."""

import numpy as np
import pytest

from pipelines.stages.stored_conditions import row_titles
from stage1_tokenizer.pictures import GAP_PIXELS, TEXT_PIXELS, text_line, tile_images, titled_picture

ROWS = [np.full((3, 40, 40, 1), grey, np.uint8) for grey in (10, 200)]
LINE = TEXT_PIXELS + 2 * GAP_PIXELS


def test_headings_are_above_the_columns_that_they_span():
    picture = titled_picture(ROWS, [[("given", 1), ("", 1), ("out", 1)]], ["", ""], scale=2)
    pixels = np.array(picture)
    column = 2 * (40 + GAP_PIXELS)
    assert [(pixels[:LINE, start:start + column] < 128).any() for start in (0, column, 2 * column)] == [True, False, True]
    rows = [np.array(tile_images([row], 2)) for row in ROWS]
    assert np.array_equal(pixels[LINE:], np.concatenate(rows)), "empty titles take no space"


def test_titles_are_above_their_rows():
    pixels = np.array(titled_picture(ROWS, [], ["", "asleep"]))
    height = 40 + 2 * GAP_PIXELS
    assert pixels.shape[0] == 2 * (LINE + height)
    assert (pixels[:LINE] == 255).all() and (pixels[LINE + height:][:LINE] < 128).any()


@pytest.mark.parametrize("text", ["a long caption " * 300, "日本語\nčeština"])
def test_long_and_foreign_texts_stay_in_their_part(text):
    pixels = np.array(text_line([(text, 60), ("", 60)]))
    assert pixels.shape == (LINE, 120) and (pixels[:, :60] < 128).any() and (pixels[:, 60:] == 255).all()


def test_title_of_a_row_has_everything_that_is_given_as_text():
    assert row_titles(["boat", "car"], {"text": ["small", "red"]}, 2) == ["class: boat; text: small", "class: car; text: red"]
    assert row_titles(None, {}, 2) == ["", ""]
