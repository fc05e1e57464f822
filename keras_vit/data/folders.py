"""A folder with one sub-folder of images per class: what each of its files is for."""

import dataclasses
import hashlib
import os
import sys
import unicodedata

from keras_vit.data import cache
from keras_vit.data.images import ImageError
from keras_vit.files import visible

# Share of the files that may be unreadable.
MOST_UNREADABLE = 0.01
# Names of the folders beside `train` that hold images to test on or, after the first that is
# there, to validate on.
OTHER_FOLDERS = ("test", "val", "validation")
# What an image file is for, in the order of a manifest. Copies are not used: a later split has a
# file of the same content.
SPLITS = TRAIN, VALIDATION, TEST, COPY = "train", "validation", "test", "copy"


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
    digests = cache.digests(folder, [path for path, *_ in files])
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
    images, unreadable = cache.decoded(folder, files, size)
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
