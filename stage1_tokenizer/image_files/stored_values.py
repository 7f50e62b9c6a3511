"""Applies header fields of image files that Pillow ignores: white levels, inverted scales, transparent colours and alpha.

Pillow's plugin for each format chooses modes by a table; these rules cover what the tables do not. Colour profiles, gamma and HDR transfer
functions (ICC, gAMA, cHRM, cICP) are not applied: values are used as stored, which is sRGB for nearly all files. check-data reports the other
files (colour_spaces.py). CMYK in JPEG is read by Adobe's convention, as in Pillow.
"""

import os
import struct
from collections.abc import Callable
from typing import cast

import numpy as np
import PIL
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin, features

from stage1_tokenizer.image_files.decoders import low_bytes, raw_mode, reopened, set_raw_mode, stored_file
from stage1_tokenizer.image_files.jpeg2000_header import Jpeg2000Header, read_jpeg2000_header
from stage1_tokenizer.image_files.metadata_limits import limit_metadata

limit_metadata()
# For uncompressed TIFF, Pillow's own decoder reads missing strips as black or as bytes of the header, 16-bit planes as 8-bit planes, and
# YCbCr as RGB. libtiff, which decodes all compressed TIFF files, refuses missing strips and reads the other two correctly.
TiffImagePlugin.READ_LIBTIFF = features.check_codec("libtiff")

_PHOTOMETRIC, _BITS, _COLOR_MAP, _SAMPLE_FORMAT, _INK_SET, _DOT_RANGE, _REFERENCE_LEVELS = 262, 258, 320, 339, 332, 336, 532
_SAMPLES, _PLANES = 277, 284
_SUBFILE_TYPE, _SUBFILES, _PREVIEWS = 254, 330, {1, 3, 4, 5, 6, 7}  # types with the bit of a reduced image (1) or of a mask (4)
_PIXEL_TAGS = frozenset({256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 332, 336, 338, 339, 347, 530, 532})
_WHITE_IS_ZERO, _RGB, _YCBCR, _SIGNED = 0, 2, 6, 2
_NATIVE_ORDER = {"F;32BF": "F;32NF", "I;32BS": "I;32NS", "I;16BS": "I;16NS"}
_BMP_RLE4, _PILLOW_MAJOR = 2, int(PIL.__version__.split(".")[0])
_JP2_CMYK, _JP2_BILEVEL, _JP2_SRGB, _JP2_GREY, _JP2_SYCC = 12, 15, 16, 17, 18
_JP2_ALPHA, _JP2_PREMULTIPLIED = 1, 2
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_TGA_NO_ALPHA, _TGA_PREMULTIPLIED = (0, 1, 2), 4


class UnreadableImage(ValueError):
    """An image cannot be used. The message is the reason, without the file name."""


def header_correction(image: Image.Image, stored_values: bool = False) -> Callable[[Image.Image], Image.Image]:
    """A function that applies the header of an image to its pixels. Call it with the image after loading the pixels.

    Call header_correction before the pixels are loaded, because it may set up the decoder. For an image that is already loaded, only the parts of
    the header that Pillow keeps are applied. Raises UnreadableImage if the header leaves the levels of black and white unknown.

    With stored_values, TIFF values of 8 bits and more, and PFM values, are not scaled. TIFF values may be signed, and must not be inverted. Values of
    fewer than 8 bits are scaled to 0..255 in all formats, and grey PPM and JPEG 2000 values of more than 8 bits to 0..65535.
    """
    read_header = {"PNG": _png, "TIFF": _tiff, "TGA": _tga, "PPM": _ppm, "BMP": _bmp, "DIB": _bmp, "GIF": _gif,
                   "JPEG2000": _jpeg2000}.get(image.format or "")
    opened = cast(ImageFile.ImageFile, image)  # only opened files have a format
    if stored_values and image.format == "TIFF":
        return _tiff(opened, stored_values=True) or (lambda loaded: loaded)
    return (read_header(opened) if read_header is not None else None) or (lambda loaded: loaded)


def _png(image: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image] | None:
    transparent = image.info.get("transparency")
    if not image.tile or transparent is None:
        return None  # without transparency, or already loaded
    if image.mode in ("1", "P"):
        stored = png_chunk(image, b"tRNS")
        # At a bit depth of 1, Pillow reads all 16 bits of the value. With a palette, it misreads alpha that ends in byte 10 (a line feed in its
        # pattern) as a single transparent entry.
        image.info["transparency"] = stored if image.mode == "P" else 255 * (stored[1] & 1)
    if not isinstance(transparent, int | tuple) or image.mode not in ("L", "RGB"):
        return None  # with a palette, or 16-bit grey (see read_images.py)
    stored_mode = raw_mode(image)
    if stored_mode == "RGB;16B":
        check_has_all_bits(image)
        low = np.asarray(low_bytes(image))
        return lambda loaded: _with_alpha(loaded, np.asarray(loaded) * np.uint16(256) + low != np.array(transparent))

    # Pillow scales samples of 2 and 4 bits to 8 bits, but not the transparent value. Its bits beyond the depth have no meaning.
    max_value = {"L;2": 3, "L;4": 15}.get(stored_mode, 255)
    scaled = tuple((value & max_value) * (255 // max_value) for value in np.atleast_1d(transparent).tolist())

    def correct(loaded: Image.Image) -> Image.Image:
        loaded.info["transparency"] = scaled if loaded.mode == "RGB" else scaled[0]
        return loaded

    return correct


def check_has_all_bits(image: ImageFile.ImageFile) -> None:
    """Raise UnreadableImage for a later frame of an animated PNG, whose low bytes are unknown: Pillow combines the frames with 8 bits per value."""
    if image.format == "PNG" and image.tell():
        raise UnreadableImage("a later frame of an animated PNG with 16 bits per value, of which Pillow keeps 8 bits")


def png_chunk(image: Image.Image, wanted: bytes) -> bytes:
    """The content of the chunk of a type that decoders use, which is the last one before the pixels; b"" if there is none."""
    found = b""
    with stored_file(image) as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", start)
            if kind == b"IDAT":
                break
            if kind == wanted:
                found = file.read(size)
                file.seek(4, os.SEEK_CUR)
            else:
                file.seek(size + 4, os.SEEK_CUR)
    return found


def _with_alpha(image: Image.Image, differs_HWC: np.ndarray) -> Image.Image:
    """The image with pixels made transparent where `differs_HWC` is False in all channels."""
    image = image.convert("RGB")
    image.info.pop("transparency", None)
    image.putalpha(Image.fromarray(np.where(differs_HWC.any(axis=2), 255, 0).astype(np.uint8)))
    return image


def keep_extra_channel(image: Image.Image) -> Image.Image:
    """A new handle of an opened TIFF whose last channel, after grey, a palette or RGB, has no specified meaning, so that Pillow drops it.

    After header_correction, the new handle has mode LA, PA or RGBA. Other images, and images that are already loaded, are returned unchanged.
    """
    if not (isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile
            and image.tag_v2.get(_SAMPLES) == len(image.tag_v2.get(_BITS, ())) == (4 if image.mode == "RGB" else 2)):
        return image
    is_planar = image.tag_v2.get(_PLANES, 1) != 1
    if is_planar and (image.mode != "RGB" or image.tile[0][0] != "libtiff"):
        raise UnreadableImage("a TIFF with its last channel in a separate plane, which Pillow drops or misreads")
    colours, separator, depth = raw_mode(image).partition(";")
    # From planes in mode RGBA, Pillow would divide the colours by the fourth channel. Mode RGBX stores the same four bands.
    mode = "RGBX" if is_planar and colours == "RGB" else {"LX": "LA", "PX": "PA", "RGBX": "RGBA"}.get(colours)
    if mode is None:
        return image
    kept = reopened(image)
    kept._mode = mode
    set_raw_mode(kept, mode + separator + depth)
    return kept


def _tiff(image: ImageFile.ImageFile, stored_values: bool = False) -> Callable[[Image.Image], Image.Image] | None:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags = image.tag_v2
    photometric, bits = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO), max(tags.get(_BITS, (1,)))
    if image.tile and (repeated := _repeated_tags(image)):
        raise UnreadableImage(f"a TIFF with tag {repeated[0]} more than once; decoders disagree on which value to use")
    if tags.get(_SUBFILE_TYPE, 0) in _PREVIEWS and (image.is_animated or _SUBFILES in tags):
        raise UnreadableImage("a TIFF whose first page is a preview or a mask of another page (tag NewSubfileType)")
    # without stored_values, 32 bits may be signed, because Pillow writes 16-bit values as signed 32-bit values (see read_images.py)
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()) and bits < (16 if stored_values else 32):
        raise UnreadableImage("a TIFF of signed values; their black and white levels are unknown")
    if image.mode in ("LA", "PA") and tags.get(_PLANES, 1) != 1:
        raise UnreadableImage("a TIFF with alpha in a separate plane, which Pillow does not read")
    if photometric == _YCBCR and image.mode == "RGB" and image.tile and image.tile[0][0] == "raw":
        raise UnreadableImage("a TIFF of uncompressed YCbCr, which Pillow cannot convert without libtiff")
    if image.mode == "CMYK" and (tags.get(_INK_SET, 1) != 1 or tags.get(_DOT_RANGE, (0, 2**bits - 1))[:2] != (0, 2**bits - 1)):
        raise UnreadableImage("a TIFF with inks other than CMYK, or with its own range of CMYK values (tag InkSet or DotRange)")
    levels = tuple(map(float, tags.get(_REFERENCE_LEVELS, ())))
    if photometric == _RGB and levels not in ((), (0, 2**bits - 1) * 3, (0, 255, 128, 255, 128, 255)):  # the last tuple is a leftover from YCbCr
        raise UnreadableImage("an RGB TIFF with its own black and white levels (tag ReferenceBlackWhite)")
    if image.mode in ("P", "PA") and max(tags.get(_COLOR_MAP, (65535,))) < 256:  # 8-bit entries, although the standard requires 16
        image.palette = ImagePalette.raw("RGB;L", bytes(tags[_COLOR_MAP]))
    if image.tile and image.tile[0][0] == "libtiff" and raw_mode(image) in _NATIVE_ORDER:  # libtiff returns all samples in native order
        set_raw_mode(image, _NATIVE_ORDER[raw_mode(image)])
    if image.mode == "RGBX":  # see keep_extra_channel
        return lambda loaded: Image.merge("RGBA", loaded.split())
    is_inverted = photometric == _WHITE_IS_ZERO
    if stored_values:
        if is_inverted and image.mode != "1":
            raise UnreadableImage("a TIFF with an inverted scale, which data.value_range does not support")
        return None
    if image.mode == "F" and is_inverted:
        return lambda loaded: Image.fromarray(1 - np.asarray(loaded))
    if image.mode.startswith("I;16") and (is_inverted or bits < 16):
        white = 2**bits - 1

        def correct(loaded: Image.Image) -> Image.Image:
            values = np.asarray(loaded).astype(np.float64)
            return Image.fromarray(np.round((white - values if is_inverted else values) * (65535 / white)).astype(np.int32))

        return correct
    return None  # Pillow reads all other modes correctly


def _repeated_tags(image: ImageFile.ImageFile) -> list[int]:
    """The _PIXEL_TAGS that the first page of a TIFF has more than once. Pillow uses the last value, but libtiff may use the first."""
    with stored_file(image) as file:
        file.seek(0)
        start = file.read(16)
        order = "<" if start.startswith(b"II") else ">"
        is_big = 43 in (start[2], start[3])
        file.seek(struct.unpack(order + "Q", start[8:16])[0] if is_big else struct.unpack(order + "I", start[4:8])[0])
        count = struct.unpack(order + "Q", file.read(8))[0] if is_big else struct.unpack(order + "H", file.read(2))[0]
        size = 20 if is_big else 12
        entries = file.read(size * min(count, 65535))
        tags = [struct.unpack_from(order + "H", entries, offset)[0] for offset in range(0, len(entries) - size + 1, size)]
        return sorted(tag for tag in _PIXEL_TAGS if tags.count(tag) > 1)


def _tga(image: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image] | None:
    if not image.tile:
        return None
    descriptor, attributes = _tga_alpha(image)
    if descriptor & 0xC0:
        raise UnreadableImage("a TGA with interleaved rows, which Pillow does not reorder")
    has_alpha = image.mode in ("RGBA", "LA") or (image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA")
    if not has_alpha:
        return None
    bits = descriptor & 0x0F
    # In a 16-bit pixel, one bit is not part of a colour. Some writers use it to mean opaque, and others to mean transparent.
    is_declared = bits > 0 and "15" not in raw_mode(image) and not (image.mode == "P" and bits < 8)

    def correct(loaded: Image.Image) -> Image.Image:
        if loaded.mode == "P":
            loaded = loaded.convert("RGBA")
        alpha = loaded.getchannel("A")
        # Many writers store alpha without declaring it. If all of it is zero, it is not meant as alpha.
        if attributes in _TGA_NO_ALPHA or (not is_declared and attributes is None and alpha.getextrema() == (0, 0)):
            return loaded.convert("RGB" if loaded.mode == "RGBA" else "L")
        if attributes == _TGA_PREMULTIPLIED:
            return Image.frombytes("RGBa", loaded.size, loaded.convert("RGBA").tobytes()).convert("RGBA")
        return loaded

    return correct


def _tga_alpha(image: ImageFile.ImageFile) -> tuple[int, int | None]:
    """(image descriptor, attributes type). The low four bits of the descriptor are the bits of alpha. The type is None without an extension area."""
    with stored_file(image) as file:
        file.seek(17)
        descriptor, attributes = file.read(1)[0], None
        if file.seek(0, os.SEEK_END) >= 18 + 26:
            file.seek(-26, os.SEEK_END)
            footer = file.read(26)
            extension = int.from_bytes(footer[:4], "little")
            if footer.endswith(_TGA_FOOTER) and extension:
                file.seek(extension + 494)
                attributes = next(iter(file.read(1)), None)
        return descriptor, attributes


def _ppm(image: ImageFile.ImageFile) -> None:
    if image.info.get("scale", 1.0) != 1:
        raise UnreadableImage(f"floating-point pixels with a scale of {image.info['scale']:g}; their white level is unknown")


def _bmp(image: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image] | None:
    if image.tile and image.info.get("compression") == _BMP_RLE4 and _PILLOW_MAJOR < 13 and _has_odd_run(image):
        raise UnreadableImage("a BMP of compressed 4-bit pixels with a run that this version of Pillow misreads; Pillow 13 can read it")
    if image.tile and image.mode in ("1", "L") and (bits := _bmp_bits(image)) != {"1": 1, "L": 8}[image.mode]:
        # If the palette is black and white, or begins the scale of greys, Pillow assumes 1 or 8 bits per pixel and ignores the header.
        greys = [0, 255] if image.mode == "1" else range(2**bits)
        image.palette, image._mode = ImagePalette.raw("RGB", bytes(grey for grey in greys for _ in range(3))), "P"
        set_raw_mode(image, {1: "P;1", 4: "P;4", 8: "P"}[bits])
    if image.mode == "RGBA":  # alpha that is zero everywhere is ignored, as in browsers
        return lambda loaded: loaded.convert("RGB") if loaded.getchannel("A").getextrema() == (0, 0) else loaded
    return None


def _bmp_bits(image: ImageFile.ImageFile) -> int:
    """Bits per pixel of a BMP."""
    with stored_file(image) as file:
        file.seek(14 if image.format == "BMP" else 0)
        header = file.read(16)
        return int.from_bytes(header[10:12] if header[0] == 12 else header[14:16], "little")


def _has_odd_run(image: ImageFile.ImageFile) -> bool:
    """Whether a compressed 4-bit BMP contains a literal run with an odd number of pixels."""
    with stored_file(image) as file:
        file.seek(image.tile[0][2])
        codes = file.read()
    offset = 0
    while offset + 1 < len(codes):
        count, value = codes[offset], codes[offset + 1]
        offset += 2
        if count or value == 0:
            continue
        if value == 1:
            return False
        if value == 2:
            offset += 2
        elif value % 2:
            return True
        else:
            offset += (value + 3) // 4 * 2  # padded to whole 16-bit words
    return False


def _gif(image: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image] | None:
    if not image.tile or image.tile[0][1] == (0, 0, *image.size) or "transparency" in image.info:
        return None  # around a transparent frame, Pillow keeps the image transparent
    extents, background = image.tile[0][1], image.info.get("background")
    fill: tuple[int, ...] = (255, 255, 255)  # without a background colour, the area around the frame is transparent
    if background is not None:
        palette = getattr(image, "global_palette", None)
        fill = (background,) * 3 if palette is None else tuple(palette.palette[3 * background:3 * background + 3])

    def correct(loaded: Image.Image) -> Image.Image:
        canvas = Image.new("RGB", loaded.size, fill)
        canvas.paste(loaded.convert("RGB").crop(extents), extents)
        return canvas

    return correct


def _jpeg2000(image: ImageFile.ImageFile) -> Callable[[Image.Image], Image.Image] | None:
    if not image.tile:
        return None
    with stored_file(image) as file:
        header = read_jpeg2000_header(file)
    colours = 3 if image.mode in ("RGB", "RGBA") else 1
    order, alpha = _jpeg2000_channels(header, image.mode, colours)
    if header.colour_space not in (None, _JP2_SRGB, _JP2_GREY, _JP2_SYCC, _JP2_BILEVEL) \
            and not (header.colour_space == _JP2_CMYK and image.mode == "CMYK"):
        raise UnreadableImage(f"a JPEG 2000 in a colour space that Pillow does not convert (EnumCS {header.colour_space})")
    if max(header.depths, default=8) > 8 and image.mode != "I;16":
        raise UnreadableImage("a JPEG 2000 with colour or alpha and more than 8 bits; Pillow reads its white as black")
    is_plain = order == list(range(colours)) and alpha is None and min(header.depths, default=8) >= 8
    if header.has_palette and not (image.mode in ("P", "PA") and is_plain and header.palette_columns == sorted(header.palette_columns)):
        raise UnreadableImage("a JPEG 2000 with a palette that Pillow does not apply")
    if image.mode not in ("L", "LA", "RGB", "RGBA") or (is_plain and image.mode in ("L", "RGB")):
        return None
    if header.colour_space == _JP2_SYCC and not (order == [0, 1, 2] and min(header.depths) >= 8):
        raise UnreadableImage("a JPEG 2000 in YCbCr with fewer than 8 bits or another channel order, which Pillow does not convert")

    def correct(loaded: Image.Image) -> Image.Image:
        bands = [band if depth >= 8 else band.point([(value >> 8 - depth) * 255 // (2**depth - 1) for value in range(256)])
                 for band, depth in zip(loaded.split(), header.depths, strict=True)]
        coloured = Image.merge("RGB", [bands[channel] for channel in order]) if colours == 3 else bands[order[0]]
        if alpha is None:
            return coloured
        channel, kind = alpha
        coloured.putalpha(bands[channel])
        if kind == _JP2_PREMULTIPLIED:
            coloured = coloured.convert("RGBA")
            return Image.frombytes("RGBa", coloured.size, coloured.tobytes()).convert("RGBA")
        return coloured

    return correct


def _jpeg2000_channels(header: Jpeg2000Header, mode: str, colours: int) -> tuple[list[int], tuple[int, int] | None]:
    """The channel of each colour, in the order of the colours, and (channel, type) of alpha, or None without alpha."""
    if header.channels is None or mode in ("P", "PA"):
        return list(range(colours)), (colours, _JP2_ALPHA) if mode in ("LA", "RGBA") else None
    by_colour = {association or 1: channel for channel, (kind, association) in header.channels.items() if kind == 0}
    alphas = [(channel, kind) for channel, (kind, _) in header.channels.items() if kind in (_JP2_ALPHA, _JP2_PREMULTIPLIED)]
    plain_ink = mode == "CMYK" and by_colour == {ink + 1: ink for ink in range(4)}
    if not plain_ink and (sorted(by_colour) != list(range(1, colours + 1)) or len(alphas) > 1 or max(header.channels) >= len(header.depths)):
        raise UnreadableImage("a JPEG 2000 with channels that Pillow does not reorder (box cdef)")
    return [by_colour[colour + 1] for colour in range(colours)], alphas[0] if alphas else None
