"""The commands that write images: generate, upscale, translate and reconstruct. They load torch only when the options are checked."""

from collections.abc import Collection, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command_parser import (
    Parser,
    add_device_options,
    add_out_option,
    add_pipeline_argument,
    add_prompt_option,
    add_sampling_options,
    add_seed_option,
    given_sampling,
    size_from_text,
)
from pipelines.labels import class_indices, classes_from_text, labels_from_text
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path

if TYPE_CHECKING:
    from stage2_prior.chain_vocabulary import ChainVocabulary

RECONSTRUCTIONS = "reconstructions"
"""The default output folder of `reconstruct`."""


def generate(command: str, arguments: list[str]) -> int:
    """generate: sample images from a run or a pipeline to PNG files and a grid."""
    parser = Parser(command, "Generate images, one PNG each plus a grid. After an interruption, the same command continues.")
    add_pipeline_argument(parser)
    parser.add_argument("--classes", help="comma-separated class names or indices, such as cat,3; default: all classes")
    parser.add_argument("--num", type=int, default=4, help="images per class; default: 4")
    add_seed_option(parser)
    parser.add_argument("--out", type=given_path, help="output folder; default: samples in the working directory, or samples-2 and so on "
                                                      "if samples holds other images")
    add_prompt_option(parser)
    parser.add_argument("--size", type=size_from_text, metavar="HEIGHTxWIDTH", help="larger images than in training, such as 64x96 pixels. "
                                                                                    "They are drawn in overlapping windows of the training size")
    parser.add_argument("--window_overlap", type=float, metavar="SHARE", help="with --size: the share of a window that the next one overlaps, from 0 "
                                                                              "to below 1; default: 0.5")
    add_device_options(parser)
    add_sampling_options(parser, "default: recommended by the pipeline")
    options = parser.parse_args(arguments)

    from pipelines.bundle import check_given_sampling, find_pipeline, read_bundle, usable_device
    from pipelines.image_folders.sample_folder import SampleFolder, check_size, find_output_folder
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    check_range("--num", options.num, at_least=1)
    sampling = check_given_sampling(folder, content, given_sampling(options))
    size = check_size(folder, options.size, options.window_overlap)
    check_can_write("--out", options.out or Path("samples"))
    names = content["class_names"]
    vocabulary = PipelineParts.in_folder(folder, content).vocabulary()
    check_classes_are_learned(vocabulary, options.classes)
    # a prompt says what to draw, so without --classes there is no class
    has_class = options.classes is not None or (options.prompt is None and vocabulary.learned_class_names is not None)
    labels = classes_from_text(names, options.classes) if has_class else None
    check_can_sample(vocabulary, labels is not None, options.prompt is not None)
    texts = [condition.name for condition in vocabulary.learned_conditions if condition.kind == "text"] if options.prompt is not None else []
    vocabulary.check_guided_are_given(options.guidance or {}, labels is not None, texts)
    samples = SampleFolder(out=options.out or Path("samples"), pipeline=folder, class_names=names, labels=labels, num=options.num, seed=options.seed,
                           sampling=sampling, dtype=options.dtype, prompt=options.prompt, **size)
    samples = samples if options.out else find_output_folder(samples)
    if samples.is_finished():
        return 0
    check_output_outside_of_data(options.pipeline, samples.out)
    with samples.explain_interruption():
        usable_device(options.device, "--device")
        if options.out is None:
            print(f"without --out, the images are written to {samples.out.absolute()}", flush=True)

        from pipelines.image_folders.write_images import write_generated

        return write_generated(samples, options.device)


def check_can_sample(vocabulary: "ChainVocabulary", has_class: bool, has_prompt: bool, images: Collection[str] | None = None) -> None:
    """Raise InputError if a pipeline does not take a prompt, or needs more than what is given.

    `images` are the names of the conditions whose images are given. None is for a command without --condition_image.
    """
    texts = [condition.name for condition in vocabulary.learned_conditions if condition.kind == "text"]
    if has_prompt and not texts:
        classes = ["--classes"] if vocabulary.learned_class_names else []
        takes = ", ".join([*classes, *(f"an image ({each.name})" for each in vocabulary.learned_conditions)])
        raise InputError(f"--prompt is given, but the prior of this pipeline was not trained with captions. It takes: {takes or 'nothing'}.")
    if has_prompt and len(texts) > 1:
        raise InputError(f"--prompt is given, but the prior of this pipeline takes several texts: {', '.join(texts)}. Use the Python interface.")
    given = [*(texts if has_prompt else []), *(images or [])]
    why = vocabulary.why_not_sampled(has_class, given)
    if why and images is not None:
        names = image_conditions(vocabulary)
        with_more = {"--classes": (vocabulary.learned_class_names is not None, given), "--prompt TEXT": (has_class, [*given, *texts]),
                     **{f"--condition_image {f'{name}=' if len(names) > 1 else ''}FILE": (has_class, [*given, name]) for name in names}}
        raise InputError(f"{why} Give {' or '.join(option for option, more in with_more.items() if vocabulary.why_not_sampled(*more) != why)}.")
    if why and vocabulary.conditions:
        options = [*(["--classes"] if vocabulary.learned_class_names and not has_class else []), *(["--prompt"] if texts and not has_prompt else [])]
        hint = f"Give {' or '.join(options)}, or use" if options else "Use"
        raise InputError(f"{why} {hint} `vqmosaic upscale` or `vqmosaic translate` if it is an image.")


def image_conditions(vocabulary: "ChainVocabulary") -> list[str]:
    """Names of the images that the priors are given."""
    return [condition.name for condition in vocabulary.learned_conditions if condition.kind != "text"]


def given_classes(classes: str | None, vocabulary: "ChainVocabulary", images: Sized | None = None) -> list[int] | None:
    """The class indices in --classes, or None if it is not given. With `images`, there must be one for all or one for each.

    Raises InputError for other numbers, for unknown classes, and if a class would have no effect.
    """
    check_classes_are_learned(vocabulary, classes)
    if classes is None:
        return None
    labels = class_indices(vocabulary.class_names, labels_from_text(vocabulary.class_names, classes))
    if images is not None and len(labels) not in (1, len(images)):
        raise InputError(f"--classes has {len(labels)} classes for {len(images)} images; give one for all, or one for each.")
    return labels


def check_classes_are_learned(vocabulary: "ChainVocabulary", classes: str | None) -> None:
    """Raise InputError if --classes is given, but the priors have never seen a class in training, so it would have no effect."""
    if classes is not None and vocabulary.class_names and not vocabulary.learned_class_names:
        raise InputError(f"--classes is {classes!r}, but the prior of this pipeline was trained with drop rate 1 of the class, so a class has no "
                         "effect. Leave it out, or train with prior_training.drop_rates.class and label_drop below 1.")


def upscale(command: str, arguments: list[str]) -> int:
    """upscale: make large images from small ones."""
    return make_from_images(command, arguments, "Make large images from small ones. Larger images are first reduced to the prior's low resolution.",
                            "images")


def translate(command: str, arguments: list[str]) -> int:
    """translate: make images from others, such as edges."""
    return make_from_images(command, arguments, "Make images from others of the kind that the prior was trained with, such as edges.",
                            "images of this kind")


def make_from_images(command: str, arguments: list[str], description: str, what: str) -> int:
    """upscale and translate, which differ in the condition that they need."""
    parser = Parser(command, f"{description} After an interruption, the same command continues.")
    add_pipeline_argument(parser)
    parser.add_argument("images", nargs="+", type=given_path, metavar="IMAGE", help=f"{what}: files, or folders of them")
    add_out_option(parser, ". Files keep their names, and in folders their sub-folders")
    parser.add_argument("--classes", help="comma-separated class names or indices: one for all images, or one for each")
    add_seed_option(parser)
    add_device_options(parser)
    add_sampling_options(parser, "default: recommended by the pipeline")
    options = parser.parse_args(arguments)

    from pipelines.bundle import check_given_sampling, find_pipeline, read_bundle, usable_device
    from pipelines.image_folders.translation_folder import TranslationFolder, check_has_condition, find_images
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    names, vocabulary = content["class_names"], PipelineParts.in_folder(folder, content).vocabulary()
    name = check_has_condition(content, vocabulary, command)
    sampling = check_given_sampling(folder, content, given_sampling(options))
    has_class = given_classes(options.classes, vocabulary) is not None
    vocabulary.check_guided_are_given(options.guidance or {}, has_class, [name])
    if why := vocabulary.why_not_sampled(has_class, [name]):
        raise InputError(f"{why}{' Give --classes.' if options.classes is None and names else ''}")
    check_out_not_inside(options.images, options.out)
    images = find_images(options.images)
    labels = given_classes(options.classes, vocabulary, images)
    check_range("--seed", options.seed, at_least=0)
    check_can_write("--out", options.out)
    request = TranslationFolder(out=options.out, pipeline=folder, class_names=names, condition=name, images=images, labels=labels, seed=options.seed,
                                sampling=sampling, dtype=options.dtype)
    if request.is_finished():
        return 0
    check_output_outside_of_data(options.pipeline, options.out)
    with request.explain_interruption():
        usable_device(options.device, "--device")

        from pipelines.image_folders.write_translations import write_translations

        return write_translations(request, options.device)


def check_out_not_inside(images: Sequence[Path], out: Path) -> None:
    """Raise InputError if --out is inside one of the given folders of images."""
    for path in images:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--out {out} is inside {path}, so the same command would take its results as further images. Give a folder outside of "
                             "it.")


def reconstruct(command: str, arguments: list[str]) -> int:
    """reconstruct: encode images to tokens and decode them."""
    parser = Parser(command, "Encode images to tokens and decode them again.")
    parser.add_argument("tokenizer", type=given_path, help="a run folder, a pipeline folder or a tokenizer folder")
    parser.add_argument("images", nargs="+", type=given_path, metavar="IMAGE", help="image files")
    parser.add_argument("--out", type=given_path, help=f"output folder; default: {RECONSTRUCTIONS} in the working directory")
    add_device_options(parser)
    options = parser.parse_args(arguments)

    from pipelines.bundle import find_tokenizer, usable_device
    from pipelines.stages.stage_checks import check_can_write, check_image, check_output_outside_of_data

    folder = find_tokenizer(options.tokenizer)
    for image in options.images:
        check_image(image)
    out = options.out or Path(RECONSTRUCTIONS)
    check_can_write("--out", out)
    check_output_outside_of_data(options.tokenizer, out)
    usable_device(options.device, "--device")

    from pipelines.image_folders.write_images import write_reconstructions

    if options.out is None:
        print(f"without --out, the images are written to {out.absolute()}", flush=True)
    return write_reconstructions(folder, options.images, out, options.device, options.dtype)
