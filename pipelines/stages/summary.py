"""Draws the pictures of a finished run, collects its measures for summary.json, and formats them as a text table."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.decoded_images import decode_in_batches, tokenizer_batch_size
from pipelines.doctor import processor_name
from pipelines.generate import ImageGenerationPipeline
from pipelines.labels import evenly_spaced_classes
from pipelines.stages.edited_example import PICTURE_NAME, describe_edited_example, save_edited_example
from pipelines.stages.measures import DigitsClassifier, measure_generation
from pipelines.stages.stored_conditions import (
    SAMPLES_OF_CONDITIONS,
    comparison_picture,
    condition_images,
    row_titles,
    stored_images,
    texts_of,
)
from stage1_tokenizer.data.data_location import resolve_source
from stage1_tokenizer.data.image_batches import ValidationImages
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.pictures import save_picture, tile_images, viewing_scale
from stage1_tokenizer.validation import reconstruction_picture
from token_shards import TokenShardReader
from vqmosaic.errors import InputError, printable
from vqmosaic.files.durable_files import write_bytes
from vqmosaic.recipes.data_section import DIGITS
from vqmosaic.recipes.recipe import Recipe
from vqmosaic.runs.run_folder import STAGES, RunFolder
from vqmosaic.runs.stage_records import load_record
from vqmosaic.training.tracking import read_metrics
from vqmosaic.wording import counted

ROWS, COLUMNS = 10, 10
PICTURE_IMAGES = 16
"""Number of validation images in reconstructions.png."""
LIBRARIES = ("torch", "transformers", "accelerate", "numpy")


def summarize(recipe: Recipe) -> dict[str, Any]:
    """Write the pictures of a finished run, and return the content of summary.json."""
    run = RunFolder(Path(recipe.run_dir))
    pipe = ImageGenerationPipeline.from_pretrained(run.export("pipeline"))
    splits = open_splits(recipe.data)
    held_out = TokenShardReader(run.export("tokens") / "validation") if pipe.vocabulary.conditions else None
    if held_out is None:
        save_samples(pipe, recipe, run.root / "samples.png")
    else:
        save_comparison(pipe, held_out, recipe.seed, run.root / "samples.png")
    validation = ValidationImages(splits.validation, pipe.tokenizer.transform, limit=PICTURE_IMAGES)
    images_BCHW = torch.cat([images for images, _ in validation.batches(batch_size=PICTURE_IMAGES)])
    batch_size = tokenizer_batch_size(pipe.tokenizer.transform.image_size)
    restored_BCHW = torch.cat([pipe.tokenizer.reconstruct(batch_BCHW.to(pipe.device)).cpu() for batch_BCHW in images_BCHW.split(batch_size)])
    save_picture(reconstruction_picture(images_BCHW, restored_BCHW), run.root / "reconstructions.png")
    edited = save_edited_example(pipe, validation, images_BCHW, held_out, recipe.seed, run.root / PICTURE_NAME)

    reader = TokenShardReader(run.export("tokens") / "train")
    classifier = None
    source = resolve_source(recipe.data)
    if source in DIGITS:
        # The source name of a digit is its row number. The classifier trains on the other rows and reports its accuracy on these.
        held_out_rows = [int(splits.validation.source_name(index)) for index in range(len(splits.validation))]
        classifier = DigitsClassifier(held_out_rows, source)
    tokenizer_error = "reconstruction_l2" if recipe.tokenizer_training.reconstruction_loss == "l2" else "reconstruction_l1"
    grids = pipe.tokenizer.grids
    summary = {
        "run_dir": recipe.run_dir, "images": {"train": len(splits.train), "validation": len(splits.validation)},
        "tokens": {"count": sum(grid.num_tokens for grid in grids),
                   "codebook_size": grids[0].codebook_size if len(grids) == 1 else {grid.name: grid.codebook_size for grid in grids},
                   "bits_per_image": sum(grid.num_tokens * math.log2(grid.codebook_size) for grid in grids)},
        "tokenizer": exported_validation(run, "tokenizer", recipe.tokenizer_training.export, tokenizer_error),
        "tokenizer_export": recipe.tokenizer_training.export,
        "prior": exported_validation(run, "prior", recipe.prior_training.export, "nll"), "prior_export": recipe.prior_training.export,
        "sampling": pipe.sampling.to_dict(),
        "generation": measure_generation(pipe, reader, recipe.seed, classifier, held_out),
        **({"edited": edited} if edited else {}),
        **({"classifier_accuracy_on_held_out_digits": classifier.accuracy} if classifier else {}),
        "stage_seconds": {stage: record.seconds for stage in STAGES if (record := load_record(run, stage))},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "hardware": {"device": str(pipe.device), "processor": processor_name(), "threads": torch.get_num_threads()},
    }
    return summary


def exported_validation(run: RunFolder, stage: str, export: str, error: str) -> dict[str, Any]:
    """The validation record of the weights that a stage exported, including their step. The last validation if there is none of that step.

    Args:
        export: the weights that the recipe exports, "best" or "last".
        error: the metric that selects the best weights. Used only if the stage record has no exported step, as in older versions.
    """
    validations = read_metrics(run.logs(stage) / "metrics.jsonl", "validation")
    stage_record = load_record(run, stage)
    step = stage_record.exported_step if stage_record is not None else None
    if not validations:
        raise InputError(f"{run.logs(stage) / 'metrics.jsonl'} has no validations, so the metrics of stage {stage} are unknown. Restore the "
                         f"file, or rerun the stage with --redo {stage}.")
    if step is None:
        finite = [record for record in validations if math.isfinite(record[error])]
        step = min(finite, key=lambda record: record[error])["step"] if finite and export == "best" else validations[-1]["step"]
    record = next((record for record in validations if record["step"] == step), validations[-1])
    return {name: value for name, value in record.items() if name != "kind"}


def save_samples(pipe: ImageGenerationPipeline, recipe: Recipe, path: Path) -> None:
    """Save a picture of samples with one row for each of up to ten evenly spaced classes, or ten rows without classes."""
    names = pipe.vocabulary.learned_class_names
    if names:
        labels = evenly_spaced_classes(len(names), ROWS)
        out = pipe(labels, num_images_per_label=COLUMNS, seed=recipe.seed, output_type="np")
    else:
        out = pipe(num_images_per_label=ROWS * COLUMNS, seed=recipe.seed, output_type="np")
    assert isinstance(out.images, np.ndarray)  # as output_type says
    rows = [out.images[start:start + COLUMNS] for start in range(0, len(out.images), COLUMNS)]
    save_picture(tile_images(rows, viewing_scale(out.images.shape[1:3])), path)


def save_comparison(pipe: ImageGenerationPipeline, held_out: TokenShardReader, seed: int, path: Path) -> None:
    """Save a picture of validation images: each row has the conditions that are images, samples, and the image itself, below class and captions.

    The captions, which the picture may cut, are also in a text file with one line for each row.
    """
    stored = stored_images(held_out, pipe.chain.vocabularies, min(ROWS, len(held_out)))
    if pipe.vocabulary.why_not_sampled(stored.classes is not None, stored.ids):
        return  # no validation image has a class, and the prior has not learned to sample without one
    class_indices, given = stored.learned_by(pipe.vocabulary)
    out = pipe(class_indices, SAMPLES_OF_CONDITIONS, seed, given_ids=given, output_type="np")
    assert isinstance(out.images, np.ndarray)  # as output_type says
    ids_BT = torch.cat([stored.ids[grid.name] for grid in pipe.tokenizer.grids], dim=1)
    originals_BCHW = torch.cat([images.cpu() for images in decode_in_batches(pipe.tokenizer, pipe.tokenizer.split_tokens(ids_BT))])
    texts, names = texts_of(pipe.inputs, given), pipe.class_names or []
    classes = None if class_indices is None else [names[index] for index in class_indices]
    titles = row_titles(classes, texts, len(originals_BCHW))
    save_picture(comparison_picture(condition_images(pipe.inputs, given), titles, out.images, originals_BCHW), path)
    if texts:
        lines = ["\t".join(map(printable, row)) for row in zip(*texts.values(), strict=True)]
        write_bytes(path.with_suffix(".txt"), ("\n".join(lines) + "\n").encode())


def summary_table(summary: dict[str, Any]) -> str:
    """The summary of a run as a text table."""
    tokenizer, prior, tokens = summary["tokenizer"], summary["prior"], summary["tokens"]
    rows = [
        ("tokens per image", f"{tokens['count']} of {format_codes(tokens['codebook_size'])}, {tokens['bits_per_image']:.0f} bits"),
        ("reconstruction, validation", f"PSNR {tokenizer['psnr']:.2f} dB, SSIM {tokenizer['ssim']:.3f} (step {tokenizer['step']:,}"
                                       f"{format_image_count(tokenizer)})"),
        *((f"{name}codebook, validation", f"{tokenizer[f'codebook_usage{suffix}']:.1%} used, perplexity {tokenizer[f'perplexity{suffix}']:.0f}")
          for name, suffix in codebook_names(tokens["codebook_size"])),
        ("prior, validation", f"{prior['nll']:.3f} nats per token, {prior['bits_per_image']:.1f} bits per image (step {prior['step']:,}"
                              f"{format_image_count(prior)})"),
    ]
    for name, measures in summary["generation"].items():
        words = [f"{measures['copies']:.1%} copies", f"{measures['distinct']:.1%} distinct"]
        if "class_agreement" in measures:
            words = [f"{measures['class_agreement']:.1%} of the requested class", *words,
                     f"spread {measures['spread']:.2f} relative to the real digits"]
        words += [f"{key.removeprefix('psnr_of_')}: PSNR {value:.1f} dB to the given one" for key, value in measures.items()
                  if key.startswith("psnr_of_")]
        rows.append((f"{measures['samples']} samples, {name}", ", ".join(words)))
    if "edited" in summary:
        rows.append(("edited example", describe_edited_example(summary["edited"])))
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"    {title:<{width}}  {value}" for title, value in rows)


def codebook_names(codebook_size: int | dict[str, int]) -> list[tuple[str, str]]:
    """For each grid, the words before "codebook" in the table, and the end of the names of its metrics. Both are empty for a single grid."""
    return [("", "")] if isinstance(codebook_size, int) else [(f"{name} ", f"_{name}") for name in codebook_size]


def format_codes(codebook_size: int | dict[str, int]) -> str:
    """The number of codes, such as "512 codes", or that of each grid."""
    if isinstance(codebook_size, int):
        return counted(codebook_size, "code")
    return " and ".join(f"{counted(codes, 'code')} ({name})" for name, codes in codebook_size.items())


def format_image_count(record: dict[str, Any]) -> str:
    """The number of images of a validation record, such as ", 500 images". Empty for records of version 0.1.0, which have no number."""
    return f", {counted(record['images'], 'image')}" if "images" in record else ""
