"""Image files of any kind as arrays of pixels."""

import concurrent.futures
import functools

import numpy as np
from PIL import Image, ImageOps

# An image that would unpack to more pixels is refused, as a small file can hold gigabytes: Pillow
# warns there.
MOST_PIXELS = 89_478_485
# Sides that images of a folder are resized to where they differ in size: from, to, in steps of.
SMALLEST_SIDE, LARGEST_SIDE, SIDE_STEP = 32, 64, 8
# Images that are all of one size keep it up to this side.
LARGEST_OWN_SIDE = 128


class ImageError(RuntimeError):
    """A file holds no image that can be read, or a folder no images to learn from."""


class TooLarge(ImageError):
    """An image would unpack to more than `MOST_PIXELS`."""


def read_image(path, size=None, channels=3):
    """Reads an image of any kind that Pillow knows as 8-bit RGB or grey.

    It is turned as its EXIF data say; palettes, CMYK and grey become RGB, 16 bits become 8,
    transparent pixels white; of an animation, the first frame is taken.

    Args:
        path: string, `Path` or binary file.
        size: pair `(height, width)` in pixels to resize to, whatever the image's own shape is,
            bilinear and antialiased; by default its own size.
        channels: int, 3 for RGB or 1 for grey.

    Returns:
        uint8 array `(H, W, channels)`.

    Raises:
        ImageError: if the file cannot be read.
        TooLarge: if it would unpack to over 89 million pixels.
    """
    try:
        with _opened(path) as image:
            if size is not None:
                # A JPEG file unpacks to an eighth, a fourth or half of its size for little work.
                image.draft(None, (4 * max(size), 4 * max(size)))
            image = _rgb(ImageOps.exif_transpose(image))
            if channels == 1:
                image = image.convert("L")
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(image).reshape(image.height, image.width, channels)
    except ImageError:
        raise
    except Exception as error:  # What a damaged file provokes in Pillow is of any kind.
        raise ImageError(_reason(error)) from error


def common_size(files):
    """Height and width that suit all images; unreadable ones do not count."""
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
    """Height and width of an image as it is shown; None if it cannot be read."""
    try:
        with _opened(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return image.size if turned else image.size[::-1]
    except TooLarge:
        raise
    except Exception:
        return None


@functools.cache
def _formats():
    """What Pillow reads but for EPS, for which it would start Ghostscript on a stranger's file."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def _opened(path):
    """A Pillow image whose pixels are not unpacked yet, if it is not too large for that."""
    try:
        image = Image.open(path, formats=_formats())
        width, height = image.size
        if width * height <= MOST_PIXELS:
            return image
        image.close()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    name = getattr(path, "name", path)
    raise TooLarge(f"{name} would unpack to over {MOST_PIXELS:,} pixels")


def _rgb(image):
    """A Pillow image of any mode in 8-bit RGB."""
    if image.mode == "F":
        raise ImageError("its pixels are fractions, whose range is not known")
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16.
        values = np.clip(np.asarray(image).astype("int64"), 0, 65535)
        image = Image.fromarray(np.round(values / 257).astype("uint8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reason(error):
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
