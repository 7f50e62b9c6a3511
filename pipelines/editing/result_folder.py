"""The output folder of `vqmosaic edit` and `vqmosaic score`: files of one request, and a record of the request. Importing it does not load torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.image_folders.output_folder import check_no_other_images, check_no_unrecorded_files, format_option, make_folder
from pipelines.image_folders.png_files import is_whole_png
from pipelines.sweep.sweep_record import describe_pipeline_change, is_pipeline_field, iterate_differences
from vqmosaic import __version__
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import write_json
from vqmosaic.files.json_files import read_object

FORMAT_VERSION = 1
TABLE_NAME = "scores.csv"
"""The table that `score` writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultFolder:
    """An output folder and the request for its files. A folder never holds files of two requests."""

    out: Path
    """The output folder."""
    record: str
    """The file name of the record, such as edits.json."""
    names: list[str]
    """The names of the files to write."""
    request: Mapping[str, Any]
    """Everything that determines the files, as JSON content."""

    @property
    def format(self) -> str:
        """The name of the format of the record, such as vqmosaic.edits."""
        return f"vqmosaic.{Path(self.record).stem}"

    def is_finished(self) -> bool:
        """Whether all files exist and all PNGs are complete. If so, prints that there is nothing to do.

        Raises:
            InputError: the folder has files of another request, or it has no record, but it or a sub-folder has images.
        """
        path = self.out / self.record
        if not path.exists():
            check_no_unrecorded_files(self.out, {name for name in self.names if (self.out / name).exists()}, self.record)
            check_no_other_images(self.out)
            return False
        content = read_object(path, "give another --out")
        if (content.get("format"), content.get("format_version")) != (self.format, FORMAT_VERSION) or not isinstance(content.get("request"), dict):
            raise InputError(f"{path} is not a record that this vqmosaic can read. Give another --out.")
        if content["request"] != self.request:
            raise InputError(f"--out {self.out} contains the results of another request: {describe_differences(content['request'], self.request)}. "
                             f"Give another --out, or delete these files and {self.record}.")
        if not all(is_whole_png(self.out / name) if name.endswith(".png") else (self.out / name).is_file() for name in self.names):
            return False
        print(f"nothing to do: {self.out} already contains the results of this request")
        return True

    def begin(self) -> None:
        """Create the folder and record the request. Called before the first file is written."""
        make_folder(self.out)
        if not (self.out / self.record).exists():
            write_json(self.out / self.record, {"format": self.format, "format_version": FORMAT_VERSION, "vqmosaic": __version__,
                                                "request": self.request})


def describe_differences(recorded: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """What differs between a recorded request for given images and the current one."""
    changed = list(iterate_differences(dict(recorded), dict(request)))
    words = [describe_pipeline_change(changed)] if any(is_pipeline_field(name) for name, _, _ in changed) else []
    for name, before, now in changed:
        if name in ("contents", "images"):
            words.append("the given images are other files, or have changed")
        elif not is_pipeline_field(name):
            option = name.removeprefix("sampling.")
            words.append(f"--{option} was {format_option(option, before, None)}, now {format_option(option, now, None)}")
    return "; ".join(dict.fromkeys(words))
