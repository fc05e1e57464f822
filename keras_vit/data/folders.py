"""Folders with one sub-folder of images per class, and how their files are split."""

import dataclasses
import hashlib
import os
import unicodedata

from keras_vit.data import cache
from keras_vit.data.images import ImageError, TooLarge
from keras_vit.files import is_output, is_system_name, links_to_own_parent, visible
from keras_vit.messages import enumerated, warn

# Fraction of the files below which unreadable ones are left out.
MOST_UNREADABLE = 0.01
# Fraction of the images that becomes the test set where a source has none.
TEST_FRACTION = 0.2
# Splits in the order of a manifest. Copies are not used: a later split has a file with the same
# content.
SPLITS = TRAIN, VALIDATION, TEST, COPY = "train", "validation", "test", "copy"

# Names of folders of splits, in any case. Without a test set, the validation set is the test set.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing"), TEST),
    **dict.fromkeys(("val", "valid", "validation"), VALIDATION),
}


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An entry of a folder's manifest.

    Attributes:
        path: string, relative to the folder.
        class_name: string, the name of its sub-folder in Unicode's NFC.
        split: string, one of `SPLITS`.
        digest: string, hexadecimal SHA-256 of its content; empty if it cannot be read.
        moved: bool, whether it was moved to another split than its path implies, because its
            class would have no images there.
    """

    path: str
    class_name: str
    split: str
    digest: str
    moved: bool = False


def list_folder(folder):
    """The manifest of a folder of images: the split of each file.

    What the program wrote into the folder is left out. Linked folders are followed once.

    Without `test` or `val` beside `train`, a hash of a file's path relative to the folder decides
    whether it is a test image, independent of other files and of the location of the folder. Only
    if all files of a class would be in the same split, one of them is moved to the other.

    Args:
        folder: `Path` of a folder with one sub-folder of images per class; or with `train` and
            `test` (or `val`, or both) above them; or with `test` alone.

    Returns:
        List of `ImageFile` in the order of `SPLITS`, and the sorted class names, in Unicode's NFC.

    Raises:
        ImageError: if there are no files.
    """
    parts = _parts(folder)
    files, names = [], set()
    for split, top in parts.items():
        for class_folder in _sub_folders(top):
            paths, name = visible(class_folder), composed(class_folder.name)
            is_split = list(parts) != [TRAIN]
            tested, moved = ((), ()) if is_split else _hold_out(top, paths)
            names.add(name)
            files += [(x, name, TEST if x in tested else split, x in moved) for x in paths]
    if not files:
        raise ImageError(f"{folder} has no images in sub-folders, one per class")
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
    manifest.sort(key=lambda x: (SPLITS.index(x.split), composed(x.path)))
    return manifest, sorted(names)


def read_folder(folder, files, image_size=None, resize="squash", multiple_of=1):
    """Reads the images of a folder.

    Args:
        folder: `Path`.
        files: list of `ImageFile`, its manifest.
        image_size: int or pair `(height, width)`, size in pixels that images are resized to; by
            default their own size if all have the same one of at most 128, else a square from 32
            to 64 by their median side.
        resize: string, how images of another aspect ratio are fitted, as for `read_image`.
        multiple_of: int, what the sides of a default size are multiples of.

    Returns:
        uint8 array `(N, H, W, 3)`, memory-mapped if it is large, or `StreamedImages` if it would
        be larger than the cache; and the entry of `files` of each image. Warnings list the
        unreadable files.

    Raises:
        ImageError: if 1% of the files or more cannot be read, except for too large images.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    images, unreadable = cache.decoded(folder, files, size, resize, multiple_of)
    if unreadable:
        lines = [f"{_printable(path)}: {reason}" for path, reason in unreadable.items()]
        shown = enumerated(lines, "; ")
        damaged = [x for x in unreadable.values() if not x.startswith(TooLarge.START)]
        if damaged and len(damaged) >= MOST_UNREADABLE * len(files):
            raise ImageError(
                f"{len(unreadable)} of {len(files)} files in {folder} cannot be read ({shown})"
            )
        for line in lines:
            warn(f"left out {line}")
    return images, [file for file in files if file.path not in unreadable]


def check_trainable(folder, files, names):
    """Raises an `ImageError` unless a manifest has at least two classes and test images.

    Args:
        folder: `Path`, for the message.
        files: list of `ImageFile`.
        names: names of the classes.
    """
    if not any(file.split in (TRAIN, COPY) for file in files):
        raise ImageError(f"{folder} has no training images: expected a folder train beside test")
    if len(names) < 2:
        raise ImageError(f"{folder} has images of one class only, {names[0]!r}")
    present = {file.class_name for file in files}
    trained = {file.class_name for file in files if file.split == TRAIN}
    for name in names:
        if not _is_text(name):
            raise ImageError(f"class {name!r} in {folder} has a name that is not UTF-8")
        if name not in present:
            raise ImageError(f"class {name!r} in {folder} has no images")
        if name not in trained:
            raise ImageError(
                f"class {name!r} in {folder} has no readable training image that is not a copy of "
                "a test image"
            )
    if not any(file.split == TEST for file in files):
        raise ImageError(f"{folder} has no readable test image")


def warn_of_split(files, names):
    """Warns where the splits of a manifest differ from what the paths of its files imply."""
    for file in files:
        if file.moved and file.split != COPY:
            split = "training" if file.split == TRAIN else file.split
            warn(
                f"class {file.class_name!r} has too few images for both splits: "
                f"{_printable(file.path)} was moved to the {split} images"
            )
    tested = {file.class_name for file in files if file.split == TEST}
    if untested := [name for name in names if name not in tested]:
        warn(f"no test image of class {', '.join(map(repr, untested))}")
    places = {}
    for file in files:
        places.setdefault(file.digest, {}).setdefault(file.class_name, _printable(file.path))
    twice = [" and ".join(paths.values()) for paths in places.values() if len(paths) > 1]
    if twice:
        count = f"{len(twice)} images are" if len(twice) > 1 else "1 image is"
        warn(f"{count} in more than one class: " + enumerated(twice))
    copies = [_printable(file.path) for file in files if file.split == COPY]
    if copies:
        count = f"{len(copies)} copies" if len(copies) > 1 else "1 copy"
        warn(f"left out {count} of test or validation images: {enumerated(copies)}")


def _parts(folder):
    """The folders that contain the class folders, by split."""
    folders = _sub_folders(folder)
    tops = [(SPLIT_NAMES.get(path.name.casefold()), path) for path in folders]
    # A class may be called "train", too: its images lie in that folder itself.
    labelled = [split for split, path in tops if split and _sub_folders(path)]
    if TRAIN not in labelled and (not tops or len(labelled) < len(tops)):
        if len(tops) > 1 and all(split for split, _ in tops):
            raise ImageError(
                f"{folder} has only folders of splits, {', '.join(x.name for _, x in tops)}, and "
                "no sub-folder of training images per class: expected train/<class>/image"
            )
        return {TRAIN: folder}
    parts = {}
    for split, path in tops:
        if split is None:
            raise ImageError(
                f"{folder} has {path.name!r} beside folders of splits: expected either train, test "
                "and val, or one folder per class"
            )
        if split in parts:
            raise ImageError(
                f"{folder} has both {parts[split].name!r} and {path.name!r}: expected one folder "
                f"of {split} images, so merge them"
            )
        parts[split] = path
    for split in (TEST, VALIDATION):
        if split in parts and not _sub_folders(parts[split]) and visible(parts[split]):
            warn(f"{parts.pop(split)} has no sub-folder per class: its images are not used")
    others = [parts.pop(split) for split in (TEST, VALIDATION) if split in parts]
    return parts | dict(zip((TEST, VALIDATION), others))


def _hold_out(top, paths):
    """The test files of a class, and the file that had to be moved, if any."""
    hashes = {path: _path_hash(path.relative_to(top)) for path in paths}
    tested = {path for path in paths if hashes[path] < TEST_FRACTION}
    if 0 < len(tested) < len(paths) or not paths:
        return tested, set()
    if len(paths) == 1:
        return set(), tested
    moved = {(max if tested else min)(paths, key=lambda path: hashes[path])}
    return tested ^ moved, moved


def _path_hash(path):
    """A hash of a path, in [0, 1)."""
    name = os.fsencode(composed(path.as_posix()))
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64


def composed(name):
    """A name in Unicode's composed form, NFC: macOS decomposes accented letters."""
    return unicodedata.normalize("NFC", name)


def _is_text(name):
    """Whether a file name is valid UTF-8."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _printable(path):
    return os.fsencode(path).decode(errors="backslashreplace")


def _sub_folders(folder):
    """The folders in a folder that may hold images."""
    paths = sorted(path for path in folder.iterdir() if path.is_dir())
    paths = [
        path for path in paths if not is_system_name(path.name) and not links_to_own_parent(path)
    ]
    return [path for path in paths if not is_output(path)]
