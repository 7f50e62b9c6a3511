"""The command augment. It loads torch only when the options are checked."""

from typing import Any

from pipelines.augment.candidates import MAX_ATTEMPTS, RANKINGS
from pipelines.command_parser import (
    Parser,
    add_device_options,
    add_out_option,
    add_pipeline_argument,
    add_sampling_options,
    add_seed_option,
    given_sampling,
)
from vqmosaic.errors import InputError, check_range
from vqmosaic.files.given_paths import given_path

FORMATS = ("folder", "webdataset")
IMAGES_PER_SHARD = 1000


def augment(command: str, arguments: list[str]) -> int:
    """augment: write a labelled synthetic data set."""
    parser = Parser(command, "Write a labelled synthetic data set with equally many images of each class. After an interruption, the same command "
                             "continues.")
    add_pipeline_argument(parser)
    parser.add_argument("--num", type=int, required=True, help="images of all classes together. If not divisible, the first classes have one more")
    add_out_option(parser)
    parser.add_argument("--classes", help="comma-separated class names or indices, such as cat,3; default: all classes")
    parser.add_argument("--format", choices=FORMATS, default="folder",
                        help="PNG files in a sub-folder for each class, or WebDataset shards; default: folder")
    parser.add_argument("--images_per_shard", type=int, help=f"for --format webdataset; default: {IMAGES_PER_SHARD}")
    parser.add_argument("--oversample", type=int, default=1, metavar="K", help="draw K candidates for each image and keep the best; default: 1")
    parser.add_argument("--rank_by", choices=RANKINGS, help="which candidate is the best: the one whose class the prior is most certain of, or the "
                                                            "most likely one; default: posterior")
    parser.add_argument("--classifier", type=given_path, metavar="PATH",
                        help="reject candidates that this classifier assigns to another class: a TorchScript file, whose code is executed, "
                             "or a folder of transformers")
    parser.add_argument("--max_attempts", type=int,
                        help=f"for --classifier: how often the candidates of an image are drawn at most; default: {MAX_ATTEMPTS}")
    add_seed_option(parser)
    add_device_options(parser)
    add_sampling_options(parser, "default: recommended by the pipeline")
    options = parser.parse_args(arguments)

    from pipelines.augment.classifier_file import resolve_classifier_file
    from pipelines.augment.dataset_folder import FolderDataset, ShardDataset
    from pipelines.bundle import check_given_sampling, find_pipeline, read_bundle, usable_device
    from pipelines.image_commands import check_can_sample
    from pipelines.labels import balanced_labels, classes_from_text
    from pipelines.pipeline_parts import PipelineParts
    from pipelines.stages.stage_checks import check_can_write, check_output_outside_of_data

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    check_options(options)
    sampling = check_given_sampling(folder, content, given_sampling(options))
    names, vocabulary = content["class_names"], PipelineParts.in_folder(folder, content).vocabulary()
    if vocabulary.learned_class_names is None:
        raise InputError("augment makes labelled images, but this pipeline was trained without classes. Use `vqmosaic generate`.")
    labels = classes_from_text(names, options.classes) or []
    try:
        balanced_labels(names, labels, options.num)
    except InputError as error:
        raise InputError(f"--num is {options.num}: {error}" if options.num < len(labels) else f"--classes: {error}") from None
    check_can_sample(vocabulary, has_class=True, has_prompt=False)
    vocabulary.check_guided_are_given(options.guidance or {}, True, [])
    if options.oversample > 1 and options.rank_by != "likelihood" and vocabulary.why_not_sampled(False, []):
        raise InputError("--oversample compares candidates by the posterior of their class, for which the prior must be trained with label drop. "
                         "Give --rank_by likelihood.")
    classifier = None if options.classifier is None else resolve_classifier_file(options.classifier, names, labels)
    check_can_write("--out", options.out)
    fields: dict[str, Any] = {"out": options.out, "pipeline": folder, "class_names": names, "labels": labels, "num": options.num,
                              "oversample": options.oversample, "rank_by": options.rank_by or RANKINGS[0], "classifier": classifier,
                              "max_attempts": options.max_attempts or MAX_ATTEMPTS, "seed": options.seed, "sampling": sampling,
                              "dtype": options.dtype}
    dataset = FolderDataset(**fields) if options.format == "folder" else ShardDataset(
        **fields, images_per_shard=options.images_per_shard or IMAGES_PER_SHARD)
    if dataset.is_finished():
        return 0
    check_output_outside_of_data(options.pipeline, options.out)
    usable_device(options.device, "--device")

    from pipelines.augment.write_dataset import write_dataset

    return write_dataset(dataset, options.device)


def check_options(options: Any) -> None:
    """Raise InputError for numbers out of range, and for options that have no effect without another one."""
    for name in ("num", "oversample", "images_per_shard", "max_attempts"):
        if getattr(options, name) is not None:
            check_range(f"--{name}", getattr(options, name), at_least=1)
    check_range("--seed", options.seed, at_least=0)
    for name, needed, is_given in (("images_per_shard", "--format webdataset", options.format == "webdataset"),
                                   ("rank_by", "--oversample above 1", options.oversample > 1),
                                   ("max_attempts", "--classifier", options.classifier is not None)):
        if getattr(options, name) is not None and not is_given:
            raise InputError(f"--{name} is given, but has no effect without {needed}.")
