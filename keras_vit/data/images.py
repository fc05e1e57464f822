"""Reading image files of any format as arrays of pixels."""

import concurrent.futures
import functools

import numpy as np
from PIL import Image

# Images with more pixels are rejected, as a small file can decompress to gigabytes. Pillow's limit.
MOST_PIXELS = 89_478_485
# Range and step of the side that images of different sizes are resized to.
SMALLEST_SIDE, LARGEST_SIDE, SIDE_STEP = 32, 64, 8
# Images that all have the same size keep it up to this side.
LARGEST_OWN_SIDE = 128


class ImageError(RuntimeError):
    """An image file cannot be read, or a folder has no images to train on."""


class TooLarge(ImageError):
    """An image has more than `MOST_PIXELS`."""


def read_image(path, size=None, channels=3):
    """Reads an image of any format that Pillow supports as 8-bit RGB or grayscale.

    The EXIF orientation is applied; palettes, CMYK and grayscale become RGB, 16 bits become 8,
    transparent pixels become white; of an animation, the first frame is used.

    Args:
        path: string, `Path` or binary file.
        size: pair `(height, width)` in pixels to resize to, bilinear and antialiased, without
            keeping the aspect ratio; by default the image's own size.
        channels: int, 3 for RGB or 1 for grayscale.

    Returns:
        uint8 array `(H, W, channels)`.

    Raises:
        ImageError: if the file cannot be read.
        TooLarge: if it has more than 89 million pixels.
    """
    try:
        with _opened(path) as image:
            if size is not None:
                # JPEG can be decoded at an eighth, a quarter or half of its size at low cost.
                image.draft(None, (4 * max(size), 4 * max(size)))
            image = _rgb(_upright(image))
            if channels == 1:
                image = image.convert("L")
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(image.height, image.width, channels)
    except ImageError:
        raise
    except Exception as error:  # A damaged file can make Pillow raise anything.
        raise ImageError(first_line(error, with_type=False)) from error


def common_size(files):
    """A common height and width for all images, ignoring unreadable ones."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sizes = [size for size in pool.map(_size_of, files) if size is not None]
    if not sizes:
        raise ImageError(f"none of {len(files)} files can be read as an image, such as {files[0]}")
    if len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_OWN_SIDE:
        return sizes[0]
    side = np.median([min(size) for size in sizes])
    side = int(np.clip(SIDE_STEP * round(side / SIDE_STEP), SMALLEST_SIDE, LARGEST_SIDE))
    return side, side


def _size_of(path):
    """Height and width of an image after EXIF orientation; None if it cannot be read."""
    try:
        with _opened(path) as image:
            is_transposed = _orientation(image) in range(5, 9)
            return image.size if is_transposed else image.size[::-1]
    except TooLarge:
        raise
    except Exception:
        return None


def _orientation(image):
    """The orientation that EXIF data give an image, from 1 to 8; 1 if they cannot be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Damaged EXIF data raise errors of many kinds; the pixels may be intact.
        return 1


def _upright(image):
    """An image as its EXIF orientation says that it is seen."""
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


@functools.cache
def _formats():
    """The formats of Pillow except EPS, for which it would run Ghostscript on an untrusted file."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def _opened(path):
    """Opens an image without decoding its pixels; raises `TooLarge` if there are too many."""
    try:
        image = Image.open(path, formats=_formats())
        width, height = image.size
        if width * height <= MOST_PIXELS:
            return image
        image.close()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    name = getattr(path, "name", path)
    raise TooLarge(f"{name} has more than {MOST_PIXELS:,} pixels")


def _rgb(image):
    """A Pillow image of any mode in 8-bit RGB."""
    if image.mode == "F":
        raise ImageError("its pixels are floats of unknown range")
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16.
        values = np.clip(np.asarray(image).astype("int64"), 0, 65535)
        image = Image.fromarray(np.round(values / 257).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def first_line(error, with_type=True):
    """The first line of an exception's message, for an error message of one line."""
    lines, name = str(error).strip().splitlines(), type(error).__name__
    if not lines:
        return name
    return f"{name}: {lines[0][:200]}" if with_type else lines[0][:200]
