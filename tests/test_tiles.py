"""Tiled encoding and decoding: where tiles lie, what they have in common with the whole image, and that there are no seams."""

import dataclasses

import pytest
import torch

from stage1_tokenizer import ImageTokenizer, Tokenizer, decode_tiled, encode_tiled, reconstruct_tiled
from stage1_tokenizer.image_files.images import ImageTransform
from stage1_tokenizer.tiles.tiled_images import blend_tiles, tile_weights
from stage1_tokenizer.tiles.tiling import Tiling, tile_starts
from stage1_tokenizer.trainable.hierarchical_tokenizer import HierarchicalTokenizer
from tests.test_tokenizer_protocol import MeanColours
from token_shards import Grid
from vqmosaic.errors import InputError
from vqmosaic.recipes.tokenizer_sections import TokenizerConfig
from vqmosaic.runs.out_of_memory import FittingBatches

HEIGHT, WIDTH = 16, 24
"""The training size. A token has 4 x 4 pixels."""


def make_config(**fields: object) -> TokenizerConfig:
    return TokenizerConfig(**{"channels": 32, "channel_multipliers": [1, 1, 1], "residual_blocks": 0, "codebook_size": 64, "code_dim": 8,
                              "latent_channels": 8, "middle_attention": False, **fields})


def make(channels: int = 1, **fields: object) -> ImageTokenizer:
    """A tokenizer with random weights for rectangular images."""
    return ImageTokenizer(make_config(**fields), ImageTransform([HEIGHT, WIDTH], channels)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return make(channels=3)


@pytest.fixture(scope="module")
def local() -> ImageTokenizer:
    """A tokenizer of convolutions and norms over channels only, so a pixel depends on few pixels around it."""
    return ImageTokenizer(make_config(block="convnext"), ImageTransform(64, 1)).eval()


def random_images(height: int, width: int, channels: int = 3, count: int = 2) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1


# --- where tiles lie -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "tile", "overlap", "expected"), [
    (4, 4, 0.5, [0]), (8, 4, 0.0, [0, 4]), (8, 4, 0.5, [0, 2, 4]), (9, 4, 0.5, [0, 2, 4, 5]), (6, 4, 0.0, [0, 2]), (7, 4, 0.99, [0, 1, 2, 3]),
])
def test_tiles_cover_the_image_and_overlap(length, tile, overlap, expected):
    assert tile_starts(length, tile, overlap) == expected


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_each_token_has_one_tile_and_the_nearest(overlap):
    coarse, fine = Grid("coarse", 9, 2, 3), Grid("fine", 9, 4, 6)
    tiling = Tiling.checked((HEIGHT, WIDTH), [coarse, fine], (56, 72), overlap)
    assert tiling.unit == (8, 8)
    for grid, whole in zip(tiling.grids, tiling.image_grids, strict=True):
        owners = torch.zeros(whole.height, whole.width, dtype=torch.int64)
        for place in tiling.places:
            rows, columns = tiling.central_tokens(grid, place)
            tile_rows, tile_columns = tiling.tokens(grid, place)
            assert tile_rows.start <= rows.start < rows.stop <= tile_rows.stop and tile_columns.start <= columns.start < columns.stop
            owners[rows, columns] += 1
            if grid is coarse:  # one token per unit
                centres = [start + grid.height / 2 for start in tiling.starts[0]]
                for row in range(rows.start, rows.stop):
                    assert abs(row + 0.5 - centres[place[0]]) == min(abs(row + 0.5 - centre) for centre in centres)
        assert (owners == 1).all()


def test_weights_sum_to_one_and_fall_to_the_edge_of_a_tile():
    starts, side, length = [0, 4, 5], 8, 13
    total = torch.zeros(length)
    for start, weights in zip(starts, tile_weights(starts, side, length), strict=True):
        total[start:start + side] += weights
        assert (weights >= 0).all()
    assert torch.allclose(total, torch.ones(length))
    first, second = tile_weights([0, 4], 8, 12)
    assert (first[:4] == 1).all() and (first[4:].diff() < 0).all() and (second[:4].diff() > 0).all() and (second[4:] == 1).all()
    assert all((weights == 1).all() for weights in tile_weights([0, 8], 8, 16))


# --- images --------------------------------------------------------------------------------------------------------------------


def test_training_size_gives_exactly_the_plain_result(tokenizer):
    images_BCHW = random_images(HEIGHT, WIDTH)
    ids = encode_tiled(tokenizer, images_BCHW)
    assert torch.equal(ids, tokenizer.encode(images_BCHW))
    assert torch.equal(decode_tiled(tokenizer, ids), tokenizer.decode(ids))
    assert torch.equal(reconstruct_tiled(tokenizer, images_BCHW), tokenizer.reconstruct(images_BCHW))


def test_without_overlap_tiles_stand_side_by_side(tokenizer):
    images_BCHW = random_images(2 * HEIGHT, 2 * WIDTH)
    ids, restored_BCHW = encode_tiled(tokenizer, images_BCHW, overlap=0), reconstruct_tiled(tokenizer, images_BCHW, overlap=0, batch_size=3)
    for row in range(2):
        for column in range(2):
            part_BCHW = images_BCHW[:, :, row * HEIGHT:(row + 1) * HEIGHT, column * WIDTH:(column + 1) * WIDTH]
            part_ids = tokenizer.encode(part_BCHW)
            assert torch.equal(ids[:, row * 4:(row + 1) * 4, column * 6:(column + 1) * 6], part_ids)
            found_BCHW = restored_BCHW[:, :, row * HEIGHT:(row + 1) * HEIGHT, column * WIDTH:(column + 1) * WIDTH]
            assert torch.allclose(found_BCHW, tokenizer.decode(part_ids), atol=1e-5)


def test_tokens_and_pixels_of_a_local_tokenizer_are_those_of_the_whole_image(local):
    """Convolutions see only some pixels around a token, so with enough overlap, tiles make almost no difference."""
    images_BCHW = random_images(96, 128, channels=1, count=1)
    untiled = ImageTokenizer(local.config, dataclasses.replace(local.transform, image_size=(96, 128))).eval()
    untiled.load_state_dict(local.state_dict())
    ids, expected_ids = encode_tiled(local, images_BCHW), untiled.encode(images_BCHW)
    assert ids.shape == (1, 24, 32) and (ids == expected_ids).float().mean() > 0.99
    assert (encode_tiled(local, images_BCHW, overlap=0) == expected_ids).float().mean() < 0.98
    expected_BCHW = untiled.decode(ids)
    blended, apart = (((decode_tiled(local, ids, overlap) - expected_BCHW).square().mean() / expected_BCHW.var()).item() for overlap in (0.5, 0))
    assert blended < apart / 10, (blended, apart)


@pytest.mark.parametrize(("overlap", "largest_step"), [(0.0, 1.0), (0.25, 0.3), (0.5, 0.13)])
def test_tiles_of_different_brightness_pass_into_each_other_without_a_step(tokenizer, overlap, largest_step):
    """Networks with attention or GroupNorm shift the brightness of a whole tile. Across an overlap, the difference is spread over all its pixels."""
    tiling = Tiling.checked((HEIGHT, WIDTH), tokenizer.grids, (3 * HEIGHT, 3 * WIDTH), overlap)

    def checkerboard(batch):
        return torch.stack([torch.full((1, HEIGHT, WIDTH), float(sum(place) % 2)) for _, place in batch])

    image_HW = blend_tiles(checkerboard, 1, 1, tiling, 4, FittingBatches(torch.device("cpu")))[0, 0]
    steps = max(image_HW.diff(dim=dim).abs().max().item() for dim in (0, 1))
    assert steps <= largest_step and image_HW.min() >= 0 and image_HW.max() <= 1 and image_HW[0, 0] == 0
    assert overlap > 0 or steps == 1


def test_any_size(tokenizer):
    for height, width in ((17, 25), (5, 90), (50, 7), (1, 1), (63, 31)):
        images_BCHW = random_images(height, width)
        ids = encode_tiled(tokenizer, images_BCHW)
        assert ids.shape == (2, -(-height // 4), -(-width // 4))
        assert decode_tiled(tokenizer, ids).shape == (2, 3, 4 * ids.shape[1], 4 * ids.shape[2])
        assert reconstruct_tiled(tokenizer, images_BCHW).shape == images_BCHW.shape


def test_an_image_does_not_depend_on_the_others_or_on_the_batch_size(tokenizer):
    images_BCHW = random_images(40, 48, count=3)
    ids = encode_tiled(tokenizer, images_BCHW, batch_size=5)
    assert torch.equal(ids[1:2], encode_tiled(tokenizer, images_BCHW[1:2], batch_size=64))
    assert torch.allclose(decode_tiled(tokenizer, ids, batch_size=1)[2:], decode_tiled(tokenizer, ids[2:], batch_size=64), atol=1e-5)


def test_one_batch_of_tiles_at_a_time(tokenizer, monkeypatch):
    sizes = []
    for name in ("encode_grids", "decode_grids"):
        method = getattr(Tokenizer if not hasattr(ImageTokenizer, name) else ImageTokenizer, name)

        def counted(self, batch, method=method):
            sizes.append(len(batch if isinstance(batch, torch.Tensor) else batch["image"]))
            return method(self, batch)

        monkeypatch.setattr(ImageTokenizer, name, counted)
    reconstruct_tiled(tokenizer, random_images(64, 96), batch_size=4)
    assert max(sizes) == 4 and len(sizes) > 20


@pytest.mark.parametrize("make_one", [
    lambda: MeanColours({"coarse": 5, "fine": 16}, ImageTransform(16, 2)).eval(),
    lambda: HierarchicalTokenizer(make_config(kind="hierarchical", top={"codebook_size": 16, "code_dim": 4}), ImageTransform(16, 2)).eval(),
    lambda: ImageTokenizer(make_config(quantizer="residual", residual_depth=2), ImageTransform(16, 2)).eval(),
    lambda: ImageTokenizer(make_config(quantizer="kl"), ImageTransform(16, 2)).eval(),
], ids=["mean colours", "hierarchical", "residual", "kl"])
def test_other_tokenizers(make_one):
    tokenizer = make_one()
    images_BCHW = random_images(24, 40, channels=2)
    restored_BCHW = reconstruct_tiled(tokenizer, images_BCHW)
    assert restored_BCHW.shape == images_BCHW.shape
    assert torch.equal(reconstruct_tiled(tokenizer, images_BCHW[..., :16, :16]), tokenizer.reconstruct(images_BCHW[..., :16, :16]))
    if tokenizer.grids:
        ids = encode_tiled(tokenizer, images_BCHW, overlap=0)
        shapes = [each.shape[1:3] for each in (ids.values() if isinstance(ids, dict) else [ids])]
        assert shapes == [(grid.height * 24 // 16, grid.width * 40 // 16) for grid in tokenizer.grids]


def test_errors_say_what_to_change(tokenizer):
    with pytest.raises(InputError, match=r"give \(B, 3, H, W\), of any height and width"):
        encode_tiled(tokenizer, torch.zeros(1, 1, 40, 40))
    with pytest.raises(InputError, match=r"overlap is 1; it must be at least 0 and below 1"):
        encode_tiled(tokenizer, torch.zeros(1, 3, 40, 40), overlap=1)
    with pytest.raises(InputError, match=r"give \(B, h, w\), with any h and w"):
        decode_tiled(tokenizer, torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(InputError, match=r"has no ids|have no ids"):
        encode_tiled(make(quantizer="kl"), torch.zeros(1, 1, 40, 40))
    pair = MeanColours({"coarse": 5, "fine": 16}, ImageTransform(16, 1)).eval()
    with pytest.raises(InputError, match=r"coarse: 1 images of 32 x 32 pixels, fine: 1 images of 16 x 16 pixels"):
        decode_tiled(pair, {"coarse": torch.zeros(1, 4, 4, dtype=torch.int64), "fine": torch.zeros(1, 4, 4, dtype=torch.int64)})
    for size, words in (((17, 24), r"size: the height is 17; it must be a multiple of 4, .* such as 16 or 20"),
                        ((16, 20), r"size: the width is 20, but this pipeline was trained with images of 16 x 24 pixels"),
                        ("big", r"size is 'big'; it must be an integer for square images, or \[height, width\]")):
        with pytest.raises(InputError, match=words):
            Tiling.checked((HEIGHT, WIDTH), tokenizer.grids, size, 0.5)
