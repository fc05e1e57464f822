"""Reading image files of any format as arrays of pixels."""

import concurrent.futures
import contextlib
import functools
import io
import os
import struct
import typing
import warnings

import numpy as np
from PIL import Image, ImageOps

from keras_vit.data.pixels import in_8_bits
from keras_vit.validation import resizing

# Images with more pixels are not decoded, as a small file can decompress to gigabytes. Pillow's
# limit.
MOST_PIXELS = 89_478_485
# A larger JPEG is decoded at a fraction of its size, up to here: phones take 200 million pixels.
MOST_PIXELS_OF_JPEG = 2**28
# Range and step of the side that images of different sizes are resized to.
SMALLEST_SIDE, LARGEST_SIDE, SIDE_STEP = 32, 64, 8
# Images that all have the same size keep it up to this side.
LARGEST_OWN_SIDE = 128
# Pillow's modes, by the number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
PNG = b"\x89PNG\r\n\x1a\n"
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Images of 16 bits whose largest value is below this fraction of theirs may hold fewer bits.
SMALL_PART = 1 / 4


class ImageError(RuntimeError):
    """An image file cannot be read, or a folder has no images to train on."""


class TooLarge(ImageError):
    """An image has too many pixels to be decoded. The message starts with `START`."""

    START = "too large: "


def read_image(
    path: str | os.PathLike[str] | typing.BinaryIO,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    resize: str = "squash",
) -> np.ndarray:
    """Reads an image of any format that Pillow supports, with 8 bits a channel.

    The EXIF orientation is applied; palettes, CMYK and grayscale become RGB; of an animation, the
    first frame is used. Values of more than 8 bits are scaled by the range that the file gives;
    without one, 16 bits by all of theirs. HEIC is read if the package pillow-heif is installed.

    Args:
        path: string, `Path` or binary file.
        size: pair `(height, width)` in pixels to resize to, bilinear and antialiased; by default
            the image's own size.
        channels: int, 1 for grayscale, 3 for RGB, 4 for RGB and alpha. Without alpha, transparent
            pixels become white.
        resize: string, how an image of another aspect ratio is fitted to `size`: `"squash"`
            scales both sides, `"crop"` cuts off what extends beyond the middle, `"pad"` adds
            black (transparent, if `channels` is 4).

    Returns:
        uint8 array `(H, W, channels)`.

    Raises:
        ImageError: if the file cannot be read, if it has more than 89 million pixels (a JPEG that
            is resized: 268 million), or if its pixels are signed, of 32 bits, or floats, and
            the file does not give their range.
        ValueError: if `channels` or `resize` is not one of these.

    Example:

    >>> keras_vit.read_image("cat.jpg", (32, 32)).shape
    (32, 32, 3)
    """
    image, used = read_and_measure(path, size, channels, resize)
    if used < SMALL_PART:
        # The same text each time: Python shows it once.
        warnings.warn(
            "Images of 16 bits that use less than a quarter of that range were read, as dark as "
            "they are. If they hold 10 or 12 bits, scale them to 16 first.",
            stacklevel=2,
        )
    return image


def read_and_measure(path, size=None, channels=3, resize="squash"):
    """What `read_image` returns, and which fraction of 16 bits it uses (1 for other images)."""
    if channels not in MODES:
        raise ValueError(f"Expected `channels` to be 1, 3 or 4. Received: channels={channels!r}")
    resizing(resize)
    try:
        return _retried(lambda file: _read(file, size, channels, resize), path)
    except ImageError:
        raise
    except Exception as error:  # A damaged file can make Pillow raise anything.
        raise ImageError(first_line(error, with_type=False)) from error


def common_size(files, multiple_of=1):
    """A common height and width for all images, ignoring unreadable ones.

    Args:
        files: list of paths.
        multiple_of: int, what the sides must be multiples of, such as the side of a patch.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sizes = list(pool.map(_size_of, files))
    errors = [size for size in sizes if isinstance(size, str)]
    sizes = [size for size in sizes if not isinstance(size, str)]
    if not sizes:
        raise ImageError(
            f"none of {len(files)} files can be read as an image, such as {files[0]}: {errors[0]}"
        )
    if len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_OWN_SIDE:
        height, width = sizes[0]
    else:
        side = np.median([min(size) for size in sizes])
        side = int(np.clip(SIDE_STEP * round(side / SIDE_STEP), SMALLEST_SIDE, LARGEST_SIDE))
        height, width = side, side
    return nearest_multiple(height, multiple_of), nearest_multiple(width, multiple_of)


def nearest_multiple(side, divisor):
    """The multiple of a divisor that is nearest to a side, the smaller one of two; at least one."""
    return max(1, -(-(2 * side - divisor) // (2 * divisor))) * divisor


def _read(file, size, channels, resize):
    with _opened(file) as image:
        count = image.width * image.height
        if size is not None:
            # JPEG can be decoded at an eighth, a quarter or half of its size at low cost.
            image.draft(None, (4 * max(size), 4 * max(size)))
        decoded = image.width * image.height
        most = MOST_PIXELS if decoded == count else MOST_PIXELS_OF_JPEG
        if count > most or decoded > MOST_PIXELS:
            raise TooLarge(
                f"{TooLarge.START}{count:,} pixels; at most {most:,} are read. Save a smaller copy"
            )
        pixels, used = in_8_bits(image)
        pixels.load()  # A PNG may tell its orientation after its pixels.
        # Pillow itself turns a TIFF.
        image = pixels if image.format == "TIFF" else _turned(pixels, _orientation(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if channels != 4:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
        image = image.convert("RGBA" if channels == 4 else "RGB")
        if channels == 1:
            image = image.convert("L")
        if size is not None:
            image = _fitted(image, size, resize)
        return np.asarray(image).reshape(image.height, image.width, channels), used


def _fitted(image, size, resize):
    """A Pillow image in another size `(height, width)`."""
    size, bilinear = size[::-1], Image.Resampling.BILINEAR
    if image.size == size:
        return image
    if resize == "crop":
        return ImageOps.fit(image, size, bilinear)
    if resize == "pad":
        # As by Pillow's own `pad`, but for a row or a column at least of a narrow image.
        if image.width / image.height > size[0] / size[1]:
            inner = size[0], max(1, round(image.height / image.width * size[0]))
        else:
            inner = max(1, round(image.width / image.height * size[1])), size[1]
        padded = Image.new(image.mode, size)
        left, top = (round((new - old) / 2) for new, old in zip(size, inner))
        padded.paste(image.resize(inner, bilinear), (left, top))
        return padded
    return image.resize(size, bilinear)


def _size_of(path):
    """Height and width of an image after EXIF orientation; a string if it cannot be read."""

    def size(file):
        with _opened(file) as image:
            is_turned = image.format != "TIFF" and _orientation(image) in range(5, 9)
            return image.size if is_turned else image.size[::-1]

    try:
        return _retried(size, path)
    except Exception as error:
        return first_line(error, with_type=False)


def _orientation(image):
    """The orientation that EXIF data give an image, from 1 to 8; 1 if they cannot be read."""
    try:
        # That of a PNG would decode the pixels first.
        return int(Image.Image.getexif(image).get(0x0112, 1))
    except Exception:  # Damaged EXIF data raise errors of many kinds; the pixels may be intact.
        return 1


def _turned(image, orientation):
    """An image as an EXIF orientation says that it is seen."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


@functools.cache
def formats():
    """The formats of Pillow except EPS, for which it would run Ghostscript on an untrusted file."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.OPEN if name != "EPS")


@contextlib.contextmanager
def _opened(path):
    """Opens an image of any number of pixels without decoding them.

    `Image.open` would refuse a photo of 200 million, whose format is read at an eighth of its size.
    """
    with contextlib.ExitStack() as stack:
        file = path if hasattr(path, "read") else stack.enter_context(open(path, "rb"))
        file.seek(0)
        start, reason = file.read(16), f"cannot identify image file {str(path)!r}"
        if start[4:8] == b"ftyp" and start[8:12] in HEIC:
            reason = "HEIC needs another package: try `pip install pillow-heif`"
        for name in formats():
            factory, accepts = Image.OPEN[name]
            answer = accepts is None or accepts(start)
            if isinstance(answer, str):  # Pillow was built without this format.
                reason = answer
            elif answer:
                file.seek(0)
                try:
                    image = factory(file, "")
                except (SyntaxError, IndexError, TypeError, struct.error):  # As `Image.open` does.
                    continue
                yield stack.enter_context(image)
                return
        raise ImageError(reason)


def _retried(function, path):
    """What a function returns for an image file, or for a PNG without its texts if they are large.

    Pillow reads at most a megabyte of each.
    """
    try:
        return function(path)
    except ValueError:
        file = _without_texts(path)
        if file is None:
            raise
        return function(file)


def _without_texts(path):
    """A PNG without its texts and its color profile, as a binary file; None for other formats."""
    with contextlib.ExitStack() as stack:
        file = path if hasattr(path, "read") else stack.enter_context(open(path, "rb"))
        file.seek(0)
        content = file.read()
    if not content.startswith(PNG):
        return None
    kept, start = [PNG], len(PNG)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if content[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(content[start:end])
        start = end
    return io.BytesIO(b"".join(kept))


def first_line(error, with_type=True):
    """The first line of an exception's message, for an error message of one line."""
    lines, name = str(error).strip().splitlines(), type(error).__name__
    if not lines:
        return name
    return f"{name}: {lines[0][:200]}" if with_type else lines[0][:200]
