"""Reports what the conditions of a recipe lack in a data set: images without a pair, unreadable pairs, images without a caption."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from stage1_tokenizer.conditions.captions import describe_cut_captions, shortened
from stage1_tokenizer.conditions.condition_data import ConditionData, open_condition_data
from stage1_tokenizer.conditions.image_pairs import OtherProportions, find_pairs, name_without_suffix
from stage1_tokenizer.conditions.text_tokenizer import load_text_tokenizer
from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from vqmosaic.errors import listed_names, printable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are

_MAX_LISTED = 10


def check_conditions(data: DataConfig, source: ImageSource, split: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    """(source name, reason) of every image of a split that lacks a pair or a caption, or whose pair cannot be used. Reads every pair."""
    problems: list[tuple[str, str]] = []
    for condition in open_condition_data(data, source, split):
        where = f"{split}, condition {condition.config.name}"
        problems += _report_missing(condition, source, where, report)
        if condition.pairs is not None:
            problems += _report_pairs(condition, source, where, report)
        elif condition.captions is not None:
            _report_captions(condition, source, where, report)
    return problems


def report_pair_names(data: DataConfig, sources: Sequence[ImageSource], report: Callable[[str], None]) -> None:
    """Report paired images that belong to no image of the data set, whose splits are `sources`, and images that share a pair. Reads only names."""
    images: dict[str, list[str]] = {}
    for name in (source.source_name(index) for source in sources for index in range(len(source))):
        images.setdefault(name_without_suffix(name), []).append(name)
    for condition in data.given_conditions:
        if condition.kind != "paired_folder":
            continue
        pairs, where = find_pairs(condition.path or "", data), f"condition {condition.name}"
        unused = [name for key, name in pairs.items() if key not in images]
        if unused:
            report(f"{where}: {counted(len(unused), 'paired image')} {'belongs' if len(unused) == 1 else 'belong'} to no image, because no image has "
                   f"the same path without the suffix: {listed_names(unused, _MAX_LISTED)}")
        for key, names in images.items():
            if key in pairs and len(names) > 1:
                report(f"{where}: warning: {' and '.join(map(printable, names))} have the same pair, {printable(pairs[key])}, because their names "
                       "differ only in the suffix. Rename or remove one of them")


def _report_missing(condition: ConditionData, source: ImageSource, where: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    missing = [(source.source_name(index), reason) for index in range(len(source)) if (reason := condition.missing(index)) is not None]
    if missing:
        report(f"{where}: {counted(len(missing), 'image')} {is_or_are(len(missing))} not used: {missing[0][1]}: "
               f"{listed_names([name for name, _ in missing], _MAX_LISTED)}")
    elif condition.pairs is not None or condition.captions is not None:
        report(f"{where}: every image has a {'pair' if condition.pairs is not None else 'caption'}")
    return missing


def _report_pairs(condition: ConditionData, source: ImageSource, where: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    """(source name, reason) of pairs that are unreadable or have other proportions than their image. Reports them."""
    pairs = condition.pairs
    assert pairs is not None

    def problem_of(index: int) -> UnreadableImage | None:
        image_size: tuple[int, int] | None = None
        with suppress(UnreadableImage):  # reported with the images
            image_size = source.read(index).size
        try:
            pairs.read(index, image_size)
        except UnreadableImage as error:
            return type(error)(str(error))  # a copy, because the traceback of the original keeps images in memory
        return None

    results = zip(pairs.indices, map_in_threads(problem_of, pairs.indices, bar=f"reading pairs of {condition.config.name}"), strict=True)
    problems = [(source.source_name(index), problem) for index, problem in results if problem is not None]
    unreadable = [(name, f"its pair is unreadable: {problem}") for name, problem in problems if not isinstance(problem, OtherProportions)]
    for name, reason in unreadable[:_MAX_LISTED]:
        report(f"{where}: {printable(name)}: {reason}")
    if len(unreadable) > _MAX_LISTED:
        report(f"{where}: and {len(unreadable) - _MAX_LISTED} more unreadable pairs")
    other = [(name, f"its pair cannot be used: {problem}") for name, problem in problems if isinstance(problem, OtherProportions)]
    if other:
        report(f"{where}: {counted(len(other), 'image')} {is_or_are(len(other))} not used, because the pair has other proportions than the image, so "
               f"the same crop would show another part: {listed_names([name for name, _ in other], _MAX_LISTED)}")
    return unreadable + other


def _report_captions(condition: ConditionData, source: ImageSource, where: str, report: Callable[[str], None]) -> None:
    """Report the number of different captions, one of them, and how many are cut."""
    captions, config = condition.captions, condition.config
    assert captions is not None
    tokenizer = load_text_tokenizer(config.text_tokenizer)
    first = next(index for index, text in enumerate(captions.texts) if text)
    report(f"{where}: {counted(len({text for text in captions.texts if text}), 'different caption')}, such as "
           f"'{shortened(captions.texts[first] or '')}' of {printable(source.source_name(first))}")
    if cut := describe_cut_captions(captions, source, config, tokenizer):
        report(f"{where}: warning: {cut}")
