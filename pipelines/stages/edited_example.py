"""An example of editing for a finished run whose prior was trained for any order: the lower half of validation images, drawn again."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.decoded_images import decode_in_batches
from pipelines.editing.masked_images import tokens_in_masks
from pipelines.generate import ImageGenerationPipeline
from pipelines.stages.stored_conditions import stored_images
from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.image_files.images import to_uint8
from stage1_tokenizer.pictures import save_picture, titled_picture, viewing_scale
from token_shards import TokenShardReader
from vqmosaic.wording import counted

PICTURE_NAME = "edited.png"
IMAGES, RESULTS = 4, 4
"""Number of validation images in the picture, and of results for each."""


def save_edited_example(pipe: ImageGenerationPipeline, validation: ValidationImages, images_BCHW: torch.Tensor, held_out: TokenShardReader | None,
                        seed: int, path: Path) -> dict[str, Any] | None:
    """Save a picture of validation images, their kept upper half, and results with another lower half. Returns its record for summary.json.

    Returns None, and saves nothing, if the prior was trained in raster order, or if it knows classes and these images have none of them.

    Args:
        validation: the validation images, of which images_BCHW (in [-1, 1]) are those that can be read.
        held_out: the shards of the validation split if the prior is given conditions. The images are then decoded from their tokens there.
    """
    if not pipe.chain.any_order:
        return None
    given: dict[str, torch.Tensor] = {}
    classes: list[str] | list[int] | None
    if held_out is None:
        numbers, classes = images_to_edit(pipe, validation, len(images_BCHW))
        images_BCHW = images_BCHW[numbers]
    else:
        stored = stored_images(held_out, pipe.chain.vocabularies, min(IMAGES, len(held_out)))
        classes, given = stored.learned_by(pipe.vocabulary)
        ids_BT = torch.cat([stored.ids[grid.name] for grid in pipe.tokenizer.grids], dim=1)
        decoded = decode_in_batches(pipe.tokenizer, pipe.tokenizer.split_tokens(ids_BT))
        images_BCHW = torch.cat([images.clamp(-1, 1).cpu() for images in decoded])
    if not len(images_BCHW) or pipe.vocabulary.why_not_sampled(classes is not None, list(given)):
        return None
    height, width = pipe.tokenizer.transform.sides
    mask_HW = torch.zeros(height, width, dtype=torch.bool)
    mask_HW[height // 2:] = True
    out = pipe.inpaint(images_BCHW, mask_HW, classes, num_images_per_label=RESULTS, seed=seed, given_ids=given or None, output_type="np")
    assert isinstance(out.images, np.ndarray)  # as output_type says
    kept_BCHW = images_BCHW.masked_fill(mask_HW, 0.0)  # grey
    rows = [np.concatenate([to_uint8(torch.stack([images_BCHW[number], kept_BCHW[number]])), out.images[number * RESULTS:(number + 1) * RESULTS]])
            for number in range(len(images_BCHW))]
    save_picture(titled_picture(rows, [[("image", 1), ("kept", 1), ("lower half drawn again", RESULTS)]], [""] * len(rows),
                                viewing_scale((height, width))), path)
    drawn_T = tokens_in_masks(mask_HW[None], pipe.tokenizer.grids)[0]
    return {"picture": path.name, "images": len(images_BCHW), "results": len(out.seeds), "tokens_drawn": int(drawn_T.sum()),
            "tokens": len(drawn_T)}


def images_to_edit(pipe: ImageGenerationPipeline, validation: ValidationImages, count: int) -> tuple[list[int], list[str] | None]:
    """Which images to edit, up to IMAGES of the first `count` that can be read, and the names of their classes.

    Images without a class that the prior knows are left out. The names are None for a prior without classes.
    """
    known, source = pipe.vocabulary.learned_class_names, validation.source
    if known is None:
        return list(range(count))[:IMAGES], None
    readable = [index for index in validation.indices if source.source_name(index) not in validation.unreadable][:count]
    labels = [source.label(index) for index in readable]
    names = [None if label is None or source.class_names is None else source.class_names[label] for label in labels]
    chosen = [(number, name) for number, name in enumerate(names) if name is not None and name in known][:IMAGES]
    return [number for number, _ in chosen], [name for _, name in chosen]


def describe_edited_example(record: dict[str, Any]) -> str:
    """The value of the row of the closing table, such as "lower half of 4 validation images drawn again (28 of 49 tokens): edited.png"."""
    return (f"lower half of {counted(record['images'], 'validation image')} drawn again ({record['tokens_drawn']} of {record['tokens']} tokens): "
            f"{record['picture']}")
