"""The commands edit and score. They load torch only when the options are checked."""

from pipelines.command_parser import Parser, add_device_options, add_sampling_options, given_sampling
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path


def edit(command: str, arguments: list[str]) -> int:
    """edit: draw a part of an image again."""
    parser = Parser(command, "Draw a part of an image again. All other pixels stay the same. After an interruption, the same command continues.")
    parser.add_argument("pipeline", type=given_path, help="a run folder or a pipeline folder")
    parser.add_argument("image", type=given_path, metavar="IMAGE", help="an image file of the size of the pipeline's images")
    parser.add_argument("--mask", required=True, type=given_path, help="an image file of the same size: white is drawn again, black is kept")
    parser.add_argument("--out", required=True, type=given_path, help="output folder")
    parser.add_argument("--classes", help="comma-separated class names or indices for the results, such as cat,3; default: no class")
    parser.add_argument("--prompt", metavar="TEXT", help="the text, for a prior that is given captions")
    parser.add_argument("--num", type=int, default=4, help="results per class; default: 4")
    parser.add_argument("--num_tries", type=int, default=1, help="draw each result this often and keep the most likely one; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same results; default: 0")
    add_device_options(parser)
    add_sampling_options(parser, "default: recommended by the bundle")
    options = parser.parse_args(arguments)

    from pipelines.bundle import check_given_sampling, find_pipeline, read_bundle, usable_device
    from pipelines.editing.result_folder import EditFolder
    from pipelines.image_commands import check_can_sample, check_classes_are_learned
    from pipelines.labels import class_indices, labels_from_text
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_image, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    for name in ("num", "num_tries"):
        check_range(f"--{name}", getattr(options, name), at_least=1)
    check_range("--seed", options.seed, at_least=0)
    sampling = check_given_sampling(folder, content, given_sampling(options))
    names, vocabulary = content["class_names"], PipelineParts.in_folder(folder, content).vocabulary()
    check_classes_are_learned(vocabulary, options.classes)
    labels = None if options.classes is None else class_indices(names, labels_from_text(names, options.classes))
    check_can_sample(vocabulary, labels is not None, options.prompt is not None)
    if not vocabulary.conditions and (why := vocabulary.why_not_sampled(labels is not None, [])):
        raise InputError(f"{why} Give --classes.")
    for path in (options.image, options.mask):
        check_image(path)
    check_can_write("--out", options.out)
    check_output_outside_of_data(options.pipeline, options.out)
    edits = EditFolder(out=options.out, pipeline=folder, class_names=names, labels=labels, image=options.image, mask=options.mask, num=options.num,
                       num_tries=options.num_tries, prompt=options.prompt, seed=options.seed, sampling=sampling, dtype=options.dtype)
    if edits.is_finished():
        return 0
    usable_device(options.device, "--device")

    from pipelines.editing.write_results import write_edits

    return write_edits(edits, options.device)


def score(command: str, arguments: list[str]) -> int:
    """score: measure how unusual images and their parts are."""
    parser = Parser(command, "Measure how unusual images and their parts are. Writes a table, scores.csv, and each image beside its heat map. "
                             "After an interruption, the same command continues.")
    parser.add_argument("pipeline", type=given_path, help="a run folder or a pipeline folder")
    parser.add_argument("images", nargs="+", type=given_path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", required=True, type=given_path, help="output folder")
    parser.add_argument("--classes", help="comma-separated class names or indices: one for all images, or one for each; default: no class")
    add_device_options(parser)
    options = parser.parse_args(arguments)

    from pipelines.bundle import find_pipeline, read_bundle, usable_device
    from pipelines.editing.result_folder import ScoreFolder
    from pipelines.image_commands import check_classes_are_learned, check_out_not_inside
    from pipelines.image_folders.translation_folder import find_images
    from pipelines.labels import class_indices, labels_from_text
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    names, vocabulary = content["class_names"], PipelineParts.in_folder(folder, content).vocabulary()
    check_classes_are_learned(vocabulary, options.classes)
    labels = None if options.classes is None else class_indices(names, labels_from_text(names, options.classes))
    if why := vocabulary.why_not_sampled(labels is not None, []):
        more = "Give --classes." if labels is None and names else "Use the Python interface, pipe.score, which takes conditions."
        raise InputError(f"{why} {more}")
    check_out_not_inside(options.images, options.out)
    images = find_images(options.images)
    if labels is not None and len(labels) not in (1, len(images)):
        raise InputError(f"--classes has {len(labels)} classes for {len(images)} images; give one for all, or one for each.")
    check_can_write("--out", options.out)
    check_output_outside_of_data(options.pipeline, options.out)
    scores = ScoreFolder(out=options.out, pipeline=folder, class_names=names, labels=labels, images=images, dtype=options.dtype)
    if scores.is_finished():
        return 0
    usable_device(options.device, "--device")

    from pipelines.editing.write_results import write_scores

    return write_scores(scores, options.device)
