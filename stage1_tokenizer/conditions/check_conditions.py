"""Reports what the conditions of a recipe lack in a data set: images without a pair, unreadable pairs, images without a caption."""

from collections.abc import Callable

from stage1_tokenizer.conditions.captions import describe_cut_captions, shortened
from stage1_tokenizer.conditions.condition_data import ConditionData, open_condition_data
from stage1_tokenizer.conditions.text_tokenizer import load_text_tokenizer
from stage1_tokenizer.data.image_sources import ImageSource
from stage1_tokenizer.data.threaded_map import map_in_threads
from stage1_tokenizer.image_files.stored_values import UnreadableImage
from vqmosaic.errors import listed_names, printable
from vqmosaic.recipes.recipe_sections import DataConfig
from vqmosaic.wording import counted, is_or_are

_MAX_LISTED = 10


def check_conditions(data: DataConfig, source: ImageSource, split: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    """(source name, reason) of every image of a split that lacks a pair or a caption, or whose pair is unreadable. Reads every pair once."""
    problems: list[tuple[str, str]] = []
    for condition in open_condition_data(data, source, split):
        where = f"{split}, condition {condition.config.name}"
        problems += _report_missing(condition, source, where, report)
        if condition.pairs is not None:
            problems += _report_pairs(condition, source, where, report)
        elif condition.captions is not None:
            _report_captions(condition, source, where, report)
    return problems


def _report_missing(condition: ConditionData, source: ImageSource, where: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    missing = [(source.source_name(index), reason) for index in range(len(source)) if (reason := condition.missing(index)) is not None]
    if missing:
        report(f"{where}: {counted(len(missing), 'image')} {is_or_are(len(missing))} not used: {missing[0][1]}: "
               f"{listed_names([name for name, _ in missing], _MAX_LISTED)}")
    elif condition.pairs is not None or condition.captions is not None:
        report(f"{where}: every image has a {'pair' if condition.pairs is not None else 'caption'}")
    return missing


def _report_pairs(condition: ConditionData, source: ImageSource, where: str, report: Callable[[str], None]) -> list[tuple[str, str]]:
    """The unreadable pairs. Reports them, and pairs with other proportions than their image."""
    pairs = condition.pairs
    assert pairs is not None

    def compare(index: int) -> tuple[str, str | bool]:
        name = source.source_name(index)
        try:
            width, height = pairs.read(index).size
        except UnreadableImage as error:
            return name, str(error)
        try:
            image_width, image_height = source.read(index).size
        except UnreadableImage:  # reported with the images
            return name, True
        return name, abs(width * image_height - height * image_width) < max(width, height, image_width, image_height)

    results = list(map_in_threads(compare, pairs.indices, bar=f"reading pairs of {condition.config.name}"))
    unreadable = [(name, f"its pair is unreadable: {result}") for name, result in results if isinstance(result, str)]
    for name, reason in unreadable[:_MAX_LISTED]:
        report(f"{where}: {printable(name)}: {reason}")
    if len(unreadable) > _MAX_LISTED:
        report(f"{where}: and {len(unreadable) - _MAX_LISTED} more unreadable pairs")
    other = [name for name, result in results if result is False]
    if other:
        report(f"{where}: {counted(len(other), 'pair')} {'has' if len(other) == 1 else 'have'} other proportions than the image, so the two are "
               f"cropped differently: {listed_names(other, _MAX_LISTED)}")
    return unreadable


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
