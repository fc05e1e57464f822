"""Pixels of any format and range as 8 bits a channel."""

import numpy as np
from PIL import Image

# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
MAX_SAMPLE_VALUE, S_MIN_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 281, 340, 341
WHITE_IS_ZERO = 0
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
KINDS = {UNSIGNED: "unsigned integers", SIGNED: "signed integers", FLOAT: "floats"}
# Formats of 16-bit images whose values are scaled to the whole range, if only by Pillow.
SCALED = ("PNG", "PPM", "JPEG2000")


class RangeError(ValueError):
    """The range of an image's pixels is unknown, or too small for what Pillow keeps of them."""


def in_8_bits(image):
    """A Pillow image of any mode with 8 bits a channel.

    Args:
        image: a Pillow image, loaded or not.

    Returns:
        A Pillow image in a mode with 8 bits a channel or less, its transparency included; and the
        largest value of an image with 16 bits a channel and a range that the file does not tell,
        as a fraction of that range, else 1.

    Raises:
        RangeError: if nothing tells which values are black and white.
    """
    raw_mode = _raw_mode(image)  # Lost as soon as the pixels are loaded.
    tags = getattr(image, "tag_v2", {})
    format, transparent = image.format, image.info.get("transparency")
    bits, kind = _bits_and_kind(image, tags)
    is_single = image.mode in ("L", "F") or image.mode.startswith("I")
    if is_single and (bits > 8 or kind != UNSIGNED):
        values = np.asarray(image)
        if kind == UNSIGNED:
            values = values.astype(f"uint{values.itemsize * 8}", copy=False)
        elif kind == SIGNED:
            values = values.astype(f"int{bits}")
        low, high, is_told = _range(values, bits, kind, tags)
        grey = (values.astype("float32") - low) * (255 / (high - low))
        grey = np.clip(np.round(np.nan_to_num(grey)), 0, 255).astype("uint8")
        is_told |= format in ("PPM", "JPEG2000")
        used = 1.0 if is_told else float(values.max()) / high
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8 bits only.
            grey = 255 - grey
        result = Image.fromarray(grey)
        if isinstance(transparent, int):
            result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype("u1")))
        return result, used
    used = 1.0
    if ";16" in raw_mode and image.mode in ("RGB", "RGBA"):
        # Colours, of which Pillow keeps the upper eight bits.
        high = _told_maximum(tags)
        if high is not None and high < 2**15:
            raise RangeError(
                f"it has colours of 16 bits that end at {high:,}, of which little would be left: "
                "save it with 8 bits"
            )
        colours = image.getextrema()[:3]
        used = 1.0 if high or format == "PPM" else max(most for _, most in colours) / 255
    if format == "PNG" and transparent is not None:
        image.info["transparency"] = _scaled(transparent, raw_mode)
    return image, used


def _raw_mode(image):
    """How the pixels of an image lie in its file, in Pillow's words; empty if unknown."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _bits_and_kind(image, tags):
    """Bits of a sample, and whether it is `UNSIGNED`, `SIGNED` or `FLOAT`."""
    if SAMPLE_FORMAT in tags or BITS_PER_SAMPLE in tags:
        kind = tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
        # Format 4 is undefined, which readers take for unsigned.
        return tags.get(BITS_PER_SAMPLE, (1,))[0], kind if kind in KINDS else UNSIGNED
    if image.mode == "F":
        return 32, FLOAT
    if image.mode.startswith("I;16"):
        return 16, SIGNED if image.format == "FITS" else UNSIGNED
    if image.mode == "I":
        return (16, UNSIGNED) if image.format in SCALED else (32, SIGNED)
    return 8, UNSIGNED


def _range(values, bits, kind, tags):
    """Which values are black and white, and whether the file says so."""
    low, high = (tags.get(tag) for tag in (S_MIN_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE))
    if low is not None and high is not None and high[0] > low[0]:
        return low[0], high[0], True
    if kind == UNSIGNED:
        high = _told_maximum(tags)
        if high is not None:
            return 0, high, True
        if bits <= 16:
            return 0, 2**bits - 1, bits < 16
    least, most = values.min(), values.max()
    found = f"{least:,} to {most:,}" if kind != FLOAT else f"{least:g} to {most:g}"
    raise RangeError(
        f"its pixels are {KINDS[kind]} of {bits} bits from {found}, of unknown range: expected 8 "
        "or 16 bits from black at 0, or a TIFF with SMinSampleValue and SMaxSampleValue"
    )


def _told_maximum(tags):
    """The largest value of the bits that MaxSampleValue of a TIFF needs; None without it.

    Some programs write the maximum of the pixels: the bits are the same for similar images.
    """
    values = tags.get(MAX_SAMPLE_VALUE)
    return 2 ** int(max(values)).bit_length() - 1 if values and max(values) > 0 else None


def _scaled(transparent, raw_mode):
    """The transparent grey or colour of a PNG, in 8 bits as Pillow scales the pixels."""
    factor = {"L;2": 85, "L;4": 17}.get(raw_mode)
    if factor and isinstance(transparent, int):
        return transparent * factor
    if ";16" in raw_mode and isinstance(transparent, tuple):
        return tuple(value >> 8 for value in transparent)
    return transparent
