"""Image files of any kind as arrays of pixels: one by one, or a folder with one of them per class.

A folder's manifest says what each file is for. All of them are decoded once, by all cores, into a
file in the user's cache; a set of over 2 GiB stays there, and training reads what it needs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
import time
import unicodedata

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
# Names of the folders beside `train` that hold images to test on or, after the first that is
# there, to validate on.
OTHER_FOLDERS = ("test", "val", "validation")
# What an image file is for, in the order of a manifest. Copies are not used: a later split has a
# file of the same content.
SPLITS = TRAIN, VALIDATION, TEST, COPY = "train", "validation", "test", "copy"


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


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An entry of a folder's manifest.

    Attributes:
        path: string, the file's place inside the folder.
        class_name: string, the sub-folder that it lies in.
        split: string, what it is for: one of `SPLITS`.
        digest: string, SHA-256 of its content in hexadecimal; empty if it cannot be read.
        moved: bool, whether it is on another side than its path says, because its class would have
            none there.
    """

    path: str
    class_name: str
    split: str
    digest: str
    moved: bool = False


def list_folder(folder, test_fraction=0.2):
    """The manifest of a folder of images: what each file is for.

    Where no `test` or `val` lies beside `train`, a hash of its path inside the folder decides
    whether a file is tested on: it stays so whatever else the folder holds, and wherever that lies.
    Only a class whose files would all be on one side has one of them moved to the other.

    Args:
        folder: `Path` of a folder with one sub-folder of images per class; or with `train` and
            `test` (or `val`, or both) above them.
        test_fraction: float, how likely a file is tested on.

    Returns:
        List of `ImageFile` in the order of `SPLITS`, and sorted names of the classes.

    Raises:
        ImageError: if there are no files.
    """
    parts = _parts(folder)
    files, names = [], set()
    for split, top in parts.items():
        for class_folder in _sub_folders(top):
            paths, name = visible(class_folder), class_folder.name
            tested, moved = _set_aside(top, paths, test_fraction) if len(parts) == 1 else ((), ())
            names.add(name)
            files += [(x, name, TEST if x in tested else split, x in moved) for x in paths]
    if not files:
        raise ImageError(f"{folder} has no images in sub-folders, which should name their classes")
    digests = _digests(folder, [path for path, *_ in files])
    last = {}
    for (_, _, split, _), digest in zip(files, digests):
        last[digest] = max(split, last.get(digest, split), key=SPLITS.index)
    manifest = [
        ImageFile(
            path.relative_to(folder).as_posix(),
            name,
            split if last[digest] == split or not digest else COPY,
            digest,
            moved,
        )
        for (path, name, split, moved), digest in zip(files, digests)
    ]
    return sorted(manifest, key=lambda x: (SPLITS.index(x.split), x.path)), sorted(names)


def read_folder(folder, files, image_size=None):
    """Reads the images of a folder.

    Args:
        folder: `Path`.
        files: list of `ImageFile`, its manifest.
        image_size: int or pair `(height, width)`, pixels that images are resized to; by default
            their own size if all agree and it is at most 128, else what suits their median, from
            32 to 64.

    Returns:
        uint8 array `(N, H, W, 3)`, memory-mapped if it is large; and those of `files` that could be
        read, one for each image. stderr tells the others.

    Raises:
        ImageError: if an image has over 89 million pixels, or one in a hundred files cannot be
            read.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    images, unreadable = _decoded(folder, files, size)
    if unreadable:
        lines = [f"{_printable(path)}: {reason}" for path, reason in unreadable.items()]
        shown = "; ".join(lines[:5]) + ("; ..." if len(lines) > 5 else "")
        if len(unreadable) >= MOST_UNREADABLE * len(files):
            raise ImageError(
                f"{len(unreadable)} of {len(files)} files in {folder} cannot be read ({shown})"
            )
        for line in lines:
            warn(f"left out {line}")
    return images, [file for file in files if file.path not in unreadable]


def check_trainable(folder, files, names):
    """Raises an `ImageError` unless a manifest has two classes to train on, and images to test on.

    Args:
        folder: `Path`, for the message.
        files: list of `ImageFile`.
        names: names of the classes.
    """
    if len(names) < 2:
        raise ImageError(f"{folder} has images of one class only, {names[0]!r}")
    filled = {file.class_name for file in files}
    trained = {file.class_name for file in files if file.split == TRAIN}
    for name in names:
        if not _is_text(name):
            raise ImageError(f"class {name!r} in {folder} has a name that is not UTF-8")
        if name not in filled:
            raise ImageError(f"class {name!r} in {folder} has no images")
        if name not in trained:
            raise ImageError(
                f"class {name!r} in {folder} has no training image that can be read and is no copy "
                "of a test image"
            )
    if not any(file.split == TEST for file in files):
        raise ImageError(f"{folder} has no test image that can be read")


def warn_of_split(files, names):
    """Tells stderr where a manifest is not what the paths of its files alone say."""
    for file in files:
        if file.moved and file.split != COPY:
            side = "training" if file.split == TRAIN else file.split
            warn(
                f"class {file.class_name!r} has too few images to lie on both sides: "
                f"{_printable(file.path)} was moved to the {side} images"
            )
    tested = {file.class_name for file in files if file.split == TEST}
    if untested := [name for name in names if name not in tested]:
        warn(f"no test image of class {', '.join(map(repr, untested))}")
    copies = [_printable(file.path) for file in files if file.split == COPY]
    if copies:
        warn(
            f"left out {len(copies)} images that are copies of others to test or validate on: "
            + ", ".join(copies[:5])
            + (", ..." if len(copies) > 5 else "")
        )


def warn(message):
    print(f"WARNING: {message}", file=sys.stderr)


def _parts(folder):
    """The folders above those of the classes, by what their images are for."""
    tops = {path.name: path for path in _sub_folders(folder)}
    others = [tops[name] for name in OTHER_FOLDERS if name in tops]
    if "train" in tops and "val" in tops and "validation" in tops:
        raise ImageError(
            f"{folder} has both 'val' and 'validation': expected one folder of images to validate "
            "on, so merge them"
        )
    if "train" in tops and (others or len(tops) == 1):
        return dict(zip((TRAIN, TEST, VALIDATION), (tops["train"], *others)))
    return {TRAIN: folder}


def _set_aside(top, paths, fraction):
    """The files of a class to test on; and the one among all that had to be moved, if any."""
    places = {path: _place(path.relative_to(top)) for path in paths}
    tested = {path for path in paths if places[path] < fraction}
    if 0 < len(tested) < len(paths) or not paths:
        return tested, set()
    if len(paths) == 1:
        return set(), tested
    moved = {(max if tested else min)(paths, key=lambda path: places[path])}
    return tested ^ moved, moved


def _place(path):
    """A number in [0, 1) that follows from a path alone."""
    # macOS takes accents apart.
    name = os.fsencode(unicodedata.normalize("NFC", path.as_posix()))
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64


def _is_text(name):
    """Whether the name of a file can be written as UTF-8, and not as bytes only."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _printable(path):
    return os.fsencode(path).decode(errors="backslashreplace")


def _sub_folders(folder):
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path for path in found if not path.name.startswith(".")]


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


@contextlib.contextmanager
def _cache():
    """Yields the cache directory of decoded images."""
    place = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "keras_vit"
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield place
    except OSError as error:
        raise ImageError(
            f"{place} cannot be read or written ({error.strerror or error}): the environment "
            "variable XDG_CACHE_HOME names another folder"
        ) from error


def _digests(folder, paths):
    """Digests of files, from the cache where nothing about a file has changed."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    with _cache() as place:
        notes = place / f"{_digest_of_text(folder.resolve())}-digests.json"
        try:
            known = json.loads(notes.read_text(encoding="utf-8", errors="surrogateescape"))
        except (FileNotFoundError, ValueError):
            known = {}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda x, name: _facts(x, known.get(name)), paths, names))
        now = {name: facts for name, facts in zip(names, found) if facts[-1]}
        if now != known:
            write_json(notes, now)
    return [digest for *_, digest in found]


def _facts(path, known):
    """A file's size, its times and its digest, which is taken over if the others are as known."""
    try:
        stat = path.stat()
        # A change of permissions changes nothing but `st_ctime`.
        facts = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known and known[:-1] == facts:
            return known
        with open(path, "rb") as file:
            return [*facts, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:  # Reading it as an image will tell.
        return [0, 0, 0, ""]


def _digest_of_text(text):
    return hashlib.sha256(str(text).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _decoded(folder, files, size):
    """All images that can be read as one array, from the cache if it has them; reasons by path."""
    content = json.dumps([size, [(file.path, file.digest) for file in files]])
    paths = [folder / file.path for file in files]
    with _cache() as place:
        key = _digest_of_text(content)
        array, notes = place / f"{key}.npy", place / f"{key}.json"
        if not (array.exists() and notes.exists()):
            for part in place.glob(PARTS):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
            with whole(array) as part:
                unreadable = _decode(paths, size or _common_size(paths), part)
            write_json(
                notes, {x.path: unreadable[y] for x, y in zip(files, paths) if y in unreadable}
            )
        unreadable = json.loads(notes.read_text(encoding="utf-8", errors="surrogateescape"))
        images = np.load(array, mmap_mode="r")
        images = images[: len(files) - len(unreadable)]
        return (images if images.nbytes > IN_MEMORY else np.array(images)), unreadable


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
            return str(error).replace(repr(str(path)), "").strip()

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
