"""The commands edit and score. They load torch only when the options and the images are checked."""

import argparse

from pipelines.command_parser import (
    Parser,
    add_device_options,
    add_out_option,
    add_pipeline_argument,
    add_prompt_option,
    add_sampling_options,
    add_seed_option,
    given_sampling,
)
from pipelines.editing.condition_files import add_condition_option, files_for_each, find_condition_images
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path
from vqmosaic.recipes.recipe_sections import SamplingConfig


def edit(command: str, arguments: list[str]) -> int:
    """edit: draw a part of an image again."""
    parser = Parser(command, "Draw a part of an image again. One of --mask, --box, --keep and --strength says what to draw. After an interruption, "
                             "the same command continues.")
    add_pipeline_argument(parser)
    parser.add_argument("image", type=given_path, metavar="IMAGE", help="an image file of the size of the pipeline's images")
    parser.add_argument("--mask", type=given_path, metavar="FILE", help="draw the white part of this mask again, an image file of the same size, and "
                                                                        "keep the black part")
    parser.add_argument("--box", type=box_from_text, metavar="LEFT,TOP,RIGHT,BOTTOM",
                        help="put the image, which has the size of this box, into this box of the result, in pixels, and draw what is around it")
    parser.add_argument("--keep", type=keep_from_text, metavar="top|left|SHARE",
                        help="keep the upper half, the left half, or this share of the rows from the top, and draw the rest")
    parser.add_argument("--strength", type=float, metavar="SHARE", help="variations: draw this share of the image's tokens again, at random places")
    add_out_option(parser)
    parser.add_argument("--classes", help="comma-separated class names or indices for the results, such as cat,3; default: no class")
    add_prompt_option(parser)
    add_condition_option(parser)
    parser.add_argument("--num", type=int, default=4, help="results per class; default: 4")
    parser.add_argument("--num_tries", type=int, default=1, help="draw each result this often and keep the most likely one; default: 1")
    add_seed_option(parser, "results")
    add_device_options(parser)
    add_sampling_options(parser, "default: recommended by the pipeline")
    options = parser.parse_args(arguments)

    from pipelines.bundle import check_given_sampling, find_pipeline, read_bundle, usable_device
    from pipelines.editing.edit_inputs import DRAWN_BY, ImageForm, check_files, single_given
    from pipelines.editing.result_folder import EditFolder
    from pipelines.image_commands import check_can_sample, given_classes
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_image, check_output_outside_of_data

    drawn_by = single_given({name: getattr(options, name) for name in DRAWN_BY}, "--")
    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    for name in ("num", "num_tries"):
        check_range(f"--{name}", getattr(options, name), at_least=1)
    check_range("--seed", options.seed, at_least=0)
    sampling = check_given_sampling(folder, content, given_sampling(options))
    vocabulary = PipelineParts.in_folder(folder, content).vocabulary()
    labels, conditions = given_classes(options.classes, vocabulary), find_condition_images(options.condition_image, vocabulary)
    check_can_sample(vocabulary, labels is not None, options.prompt is not None, conditions)
    if labels is None and options.prompt is None and not conditions:
        sampling = unguided(sampling, options)
    else:
        texts = [each.name for each in vocabulary.learned_conditions if each.kind == "text"] if options.prompt is not None else []
        vocabulary.check_guided_are_given(options.guidance or {}, labels is not None, [*texts, *conditions])
    value = getattr(options, drawn_by)
    for path in (options.image, *([value] if drawn_by == "mask" else []), *conditions.values()):
        check_image(path)
    check_files(options.image, drawn_by, value, ImageForm.of_tokenizer(folder / "tokenizer"))
    check_can_write("--out", options.out)
    check_output_outside_of_data(options.pipeline, options.out)
    edits = EditFolder(out=options.out, pipeline=folder, class_names=content["class_names"], labels=labels, image=options.image, drawn_by=drawn_by,
                       value=value, condition_images=conditions, num=options.num, num_tries=options.num_tries, prompt=options.prompt,
                       seed=options.seed, sampling=sampling, dtype=options.dtype)
    if edits.is_finished():
        return 0
    with edits.explain_interruption():
        usable_device(options.device, "--device")

        from pipelines.editing.write_results import write_edits

        return write_edits(edits, options.device)


def box_from_text(text: str) -> list[int]:
    """The four numbers in a text such as 4,4,12,12. Raises argparse's error for any other text."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given; give left, top, right and bottom in pixels, such as 4,4,12,12") from None
    return [left, top, right, bottom]


def keep_from_text(text: str) -> str | float:
    """The value of --keep: top, left or a number. Raises argparse's error for any other text."""
    try:
        return text if text in ("top", "left") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given; give top, left, or a share of the rows between 0 and 1. For other "
                                         "parts, give --mask") from None


def unguided(sampling: SamplingConfig, options: argparse.Namespace) -> SamplingConfig:
    """The settings of a request with nothing to guide to: those of the bundle without guidance. Raises InputError if guidance is an option."""
    given = [name for name in given_sampling(options) if name.startswith("guidance")]
    if given and options.guidance_scale != 1:
        raise InputError(f"{' and '.join(f'--{name}' for name in given)} {'is' if len(given) == 1 else 'are'} given, but no class, prompt or "
                         "condition image, so guidance has no effect. Give one of them, or leave guidance out.")
    return sampling.unguided()


def score(command: str, arguments: list[str]) -> int:
    """score: measure how unusual images and their parts are."""
    parser = Parser(command, "Measure how unusual images and their parts are. Writes a table, scores.csv, and each image beside its heat map. "
                             "After an interruption, the same command continues.")
    add_pipeline_argument(parser)
    parser.add_argument("images", nargs="+", type=given_path, metavar="IMAGE", help="image files, or folders of them")
    add_out_option(parser)
    parser.add_argument("--classes", help="comma-separated class names or indices: one for all images, or one for each; default: no class")
    add_prompt_option(parser)
    add_condition_option(parser, ": a file for all images, or a folder with an image of the same name for each")
    add_device_options(parser)
    options = parser.parse_args(arguments)

    from pipelines.bundle import find_pipeline, read_bundle, usable_device
    from pipelines.editing.result_folder import ScoreFolder
    from pipelines.image_commands import check_can_sample, check_out_not_inside, given_classes
    from pipelines.image_folders.translation_folder import find_images
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    vocabulary = PipelineParts.in_folder(folder, content).vocabulary()
    conditions = find_condition_images(options.condition_image, vocabulary)
    check_can_sample(vocabulary, given_classes(options.classes, vocabulary) is not None, options.prompt is not None, conditions)
    check_out_not_inside([*options.images, *conditions.values()], options.out)
    images = find_images(options.images)
    labels, condition_images = given_classes(options.classes, vocabulary, images), files_for_each(conditions, images)
    check_can_write("--out", options.out)
    check_output_outside_of_data(options.pipeline, options.out)
    scores = ScoreFolder(out=options.out, pipeline=folder, class_names=content["class_names"], labels=labels, images=images, prompt=options.prompt,
                         condition_images=condition_images, dtype=options.dtype)
    if scores.is_finished():
        return 0
    with scores.explain_interruption():
        usable_device(options.device, "--device")

        from pipelines.editing.write_results import write_scores

        return write_scores(scores, options.device)
