"""The command enhance. It loads torch only when the options are checked."""

from pipelines.command_parser import (
    Parser,
    add_device_options,
    add_out_option,
    add_pipeline_argument,
    add_sampling_options,
    add_seed_option,
    given_sampling,
)
from pipelines.enhancing.enhance_settings import NOISE, checked_noise, checked_strength
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path


def enhance(command: str, arguments: list[str]) -> int:
    """enhance: remove noise and damage from images."""
    parser = Parser(command, "Remove noise and damage from images: draw tokens that are likely both for the given image and for the prior. Images of "
                             "other sizes are resized and cropped as in training. After an interruption, the same command continues.")
    add_pipeline_argument(parser)
    parser.add_argument("images", nargs="+", type=given_path, metavar="IMAGE", help="image files, or folders of them")
    add_out_option(parser, ". Files keep their names, and in folders their sub-folders")
    parser.add_argument("--noise", type=float, default=NOISE, help="how far the pixels are from the true ones: the standard deviation, on the 8-bit "
                                                                  f"scale (0 to 255); default: {NOISE:g}")
    parser.add_argument("--strength", type=float, default=1.0, help="the share of the tokens that are drawn again: those that surprise the prior "
                                                                    "most; default: 1, all of them")
    parser.add_argument("--classes", help="comma-separated class names or indices: one for all images, or one for each; default: no class")
    parser.add_argument("--average", type=int, default=1, help="each result is the mean of this many: smoother, and closer to the true image; "
                                                               "default: 1")
    parser.add_argument("--num_tries", type=int, default=1, help="draw each result this often and keep the most likely one; default: 1")
    add_seed_option(parser, "results")
    add_device_options(parser)
    add_sampling_options(parser, "default: recommended by the pipeline, without guidance")
    options = parser.parse_args(arguments)

    from pipelines.bundle import check_given_sampling, find_pipeline, read_bundle, usable_device
    from pipelines.enhancing.enhance_folder import EnhanceFolder
    from pipelines.image_commands import check_out_not_inside, given_classes
    from pipelines.image_folders.translation_folder import find_images
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    noise, strength = checked_noise(options.noise, "--noise"), checked_strength(options.strength, "--strength")
    for name in ("average", "num_tries"):
        check_range(f"--{name}", getattr(options, name), at_least=1)
    check_range("--seed", options.seed, at_least=0)
    given = given_sampling(options)
    sampling = check_given_sampling(folder, content, given)
    if not any(name.startswith("guidance") for name in given):
        sampling = sampling.unguided()
    names, vocabulary = content["class_names"], PipelineParts.in_folder(folder, content).vocabulary()
    labels = given_classes(options.classes, vocabulary)
    if labels is None and sampling.is_guided:
        raise InputError("guidance is given, but no class, so guidance has no effect. Give --classes, or leave guidance out.")
    vocabulary.check_guided_are_given(options.guidance or {}, labels is not None, [])
    if why := vocabulary.why_not_sampled(labels is not None, []):
        more = "Give --classes." if labels is None and names else "Use the Python interface, pipe.enhance, which takes conditions."
        raise InputError(f"{why} {more}")
    check_out_not_inside(options.images, options.out)
    images = find_images(options.images)
    given_classes(options.classes, vocabulary, images)  # there must be one for all or one for each
    check_can_write("--out", options.out)
    check_output_outside_of_data(options.pipeline, options.out)
    request = EnhanceFolder(out=options.out, pipeline=folder, class_names=names, labels=labels, images=images, noise=noise, strength=strength,
                            average=options.average, num_tries=options.num_tries, seed=options.seed, sampling=sampling, dtype=options.dtype)
    if request.is_finished():
        return 0
    usable_device(options.device, "--device")

    from pipelines.enhancing.write_enhanced import write_enhanced

    return write_enhanced(request, options.device)
