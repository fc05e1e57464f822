"""Image files of any kind as arrays of pixels: one by one, or a folder with one of them per class.

A folder is decoded once, by all cores, into a file in the user's cache; a set of over 2 GiB stays
there, and training reads what it needs.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import sys
import time

import numpy as np
from PIL import Image, ImageOps

from keras_vit.files import PARTS, visible, whole, write_json

# An image that would unpack to more pixels is refused, as a small file can hold gigabytes: Pillow
# warns there.
MOST_PIXELS = 89_478_485
# Sides that images of a folder are resized to where they differ in size: from, to, in steps of.
SMALLEST_SIDE, LARGEST_SIDE, SIDE_STEP = 32, 64, 8
# Images that are all of one size keep it up to this side.
LARGEST_OWN_SIDE = 128
# Share of the files that may be unreadable.
MOST_UNREADABLE = 0.01
# A larger array stays on disk.
IN_MEMORY = 2 * 2**30
# What a killed process was writing is removed from the cache after so many seconds.
ABANDONED = 24 * 3600
# Names of the folders that hold the images to test on.
TEST_FOLDERS = ("test", "val", "validation")


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


def read_folder(folder, image_size=None, test_share=0.2, seed=0):
    """Reads labelled images out of a folder with one sub-folder per class.

    Args:
        folder: `Path` of a folder of sub-folders, which name the classes; or of a folder with
            `train` and `test` (or `val`) above them.
        image_size: int or pair `(height, width)`, pixels that images are resized to; by default
            their own size if all agree and it is at most 128, else what suits their median, from
            32 to 64.
        test_share: float, share of each class that becomes the test set where none is set apart.
        seed: int, decides which images those are.

    Returns:
        Training images, training labels, test images, test labels and class names, as a `Dataset`
        holds them. Large sets of images are memory-mapped.

    Raises:
        ImageError: if there are no images, fewer than two classes, a class without images, a test
            class that training lacks, an image of over 89 million pixels, or if one in a hundred
            files cannot be read.
    """
    files, labels, names, train_count = _listed(folder, test_share, seed)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    images, unreadable = _decoded(folder, files, size)
    if unreadable:
        lines = [
            f"{os.fsencode(path.relative_to(folder)).decode(errors='backslashreplace')}: {reason}"
            for path, reason in unreadable.items()
        ]
        shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
        if len(unreadable) >= MOST_UNREADABLE * len(files):
            raise ImageError(
                f"{len(unreadable)} of {len(files)} files in {folder} cannot be read ({shown})"
            )
        for line in lines:
            print(f"WARNING: left out {line}", file=sys.stderr)
    readable = np.array([path not in unreadable for path in files])
    labels, train_count = labels[readable], int(readable[:train_count].sum())
    for label, name in enumerate(names):
        if not (labels[:train_count] == label).any():
            raise ImageError(f"class {name!r} in {folder} has no training image that can be read")
    if train_count == len(labels):
        raise ImageError(f"{folder} has no test image that can be read")
    train, test = slice(train_count), slice(train_count, None)
    return images[train], labels[train], images[test], labels[test], names


def _listed(folder, test_share, seed):
    """Files, training ones in front, their labels, class names and the number for training."""
    tops = {path.name: path for path in _sub_folders(folder)}
    test = next((tops[name] for name in TEST_FOLDERS if name in tops), None)
    if "train" not in tops or (test is None and len(tops) > 1):
        tops, test = {"train": folder}, None
    by_class = _by_class(tops["train"])
    names = list(by_class)
    if not any(by_class.values()):
        raise ImageError(
            f"{tops['train']} has no images in sub-folders, which should name their classes"
        )
    if len(names) < 2:
        raise ImageError(f"{tops['train']} has images of one class only, {names[0]!r}")
    for name, files in by_class.items():
        if not _is_text(name):
            raise ImageError(f"class {name!r} in {tops['train']} has a name that is not UTF-8")
        if not files:
            raise ImageError(f"class {name!r} in {tops['train']} has no images")
    train = [(file, label) for label, name in enumerate(names) for file in by_class[name]]
    if test is None:
        train, tests = _set_aside(folder, train, test_share, seed)
    else:
        tests = _by_class(test)
        for name in tests:
            if name not in by_class:
                raise ImageError(f"class {name!r} in {test} is none of {tops['train']}")
        tests = [(file, names.index(name)) for name in tests for file in tests[name]]
        if not tests:
            raise ImageError(f"{test} has no images in sub-folders, which should name the classes")
    files, labels = zip(*train, *tests)
    return files, np.array(labels, "int64"), names, len(train)


def _set_aside(folder, labelled, share, seed):
    """Splits pairs of file and label into training and test, each class in proportion."""
    from sklearn.model_selection import train_test_split

    labels = [label for _, label in labelled]
    try:
        train, test = train_test_split(
            labelled, test_size=share, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise ImageError(
            f"{folder} has too few images of some class to set some aside for testing"
        ) from error
    return sorted(train, key=lambda pair: pair[0]), sorted(test, key=lambda pair: pair[0])


def _is_text(name):
    """Whether the name of a file can be written as UTF-8, and not as bytes only."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _sub_folders(folder):
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in found if not path.name.startswith(".")]


def _by_class(folder):
    """Files in and below each sub-folder, by its name."""
    return {path.name: visible(path) for path in _sub_folders(folder)}


def _common_size(files):
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


def _decoded(folder, files, size):
    """All images that can be read as one array, from the cache if it has them; reasons by path."""
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    # A change of permissions changes nothing but `st_ctime`.
    facts = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]
    content = json.dumps([str(folder.resolve()), size, facts])
    key = hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    place = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "keras_vit"
    array, notes = place / f"{key}.npy", place / f"{key}.json"
    try:
        if not (array.exists() and notes.exists()):
            place.mkdir(parents=True, exist_ok=True)
            for part in place.glob(PARTS):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
            with whole(array) as part:
                unreadable = _decode(files, size or _common_size(files), part)
            write_json(notes, {str(path.relative_to(folder)): x for path, x in unreadable.items()})
        reasons = json.loads(notes.read_text(encoding="utf-8", errors="surrogateescape"))
        unreadable = {folder / path: reason for path, reason in reasons.items()}
        images = np.load(array, mmap_mode="r")
        images = images[: len(files) - len(unreadable)]
        return (images if images.nbytes > IN_MEMORY else np.array(images)), unreadable
    except OSError as error:
        raise ImageError(
            f"{place} cannot be read or written ({error.strerror or error}): the environment "
            "variable XDG_CACHE_HOME names another folder"
        ) from error


def _decode(files, size, part):
    """Writes all images that can be read into a file of one array; returns reasons by path."""
    import keras

    shape = (len(files), *size, 3)
    images = np.lib.format.open_memmap(part, mode="w+", dtype="uint8", shape=shape)
    if hasattr(os, "posix_fallocate"):
        # Else a disk that is full later ends the process where it writes into the map.
        with open(part, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    bar = keras.utils.Progbar(len(files), unit_name="image")
    print(f"Decoding {len(files):,} images to {size[0]}x{size[1]} pixels, once")

    def read(path):
        try:
            return read_image(path, size)
        except TooLarge:
            raise
        except ImageError as error:
            return str(error)

    unreadable, row = {}, 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 1024):
            group = files[start : start + 1024]
            for path, image in zip(group, pool.map(read, group)):
                if isinstance(image, str):
                    unreadable[path] = image
                else:
                    images[row] = image
                    row += 1
            bar.update(start + len(group))
    images.flush()
    return unreadable
