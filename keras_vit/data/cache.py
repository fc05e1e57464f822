"""The cache of decoded images, in the user's cache directory.

All images are decoded once, on all cores, into one file; an array of more than 2 GiB is
memory-mapped. When images of a folder change, the new array takes the place of the old one. Arrays
that were not used for the longest time are removed. For images that do not fit into the cache,
only the list of unreadable files is kept.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np

from keras_vit.data.images import (
    SMALL_PART,
    ImageError,
    common_size,
    formats,
    read_and_measure,
)
from keras_vit.data.streaming import StreamedImages
from keras_vit.files import PARTS, atomic_write, write_json
from keras_vit.messages import is_terminal, warn

# Larger arrays are memory-mapped.
IN_MEMORY = 2 * 2**30
# The arrays that were used last are kept up to this size in all, unless `LIMIT` names another.
MOST_CACHED = 20 * 2**30
LIMIT = "KERAS_VIT_CACHE_GIB"
# Changes whenever the same file is read as other pixels.
VERSION = 3
ARRAYS = "[!.]*.npy"  # Without those that are being written.
# Temporary files of killed processes are removed after this many seconds.
ABANDONED = 24 * 3600


@contextlib.contextmanager
def _cache():
    """Yields the cache directory of decoded images."""
    place = _place()
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield place
    except OSError as error:
        raise ImageError(
            f"{place} cannot be read or written ({error.strerror or error}): set the environment "
            "variable XDG_CACHE_HOME to use another folder"
        ) from error


def _place():
    """The cache directory: in `XDG_CACHE_HOME`, else the home folder, else that of temporary files.

    A container may have no home folder, or none that can be written to.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(os.path.expanduser(chosen)) / "keras_vit"
    home = pathlib.Path(os.path.expanduser("~"))
    with contextlib.suppress(OSError):
        if home.is_absolute():  # Of "~", no home folder is known.
            place = home / ".cache" / "keras_vit"
            place.mkdir(parents=True, exist_ok=True)
            return place
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    return pathlib.Path(tempfile.gettempdir()) / f"keras_vit-{user}"


def most_cached():
    """How many bytes of decoded images the cache keeps."""
    limit = os.environ.get(LIMIT)
    if not limit:
        return MOST_CACHED
    try:
        size = float(limit)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise ImageError(
            f"expected the environment variable {LIMIT} to be a number of GiB, at least 0. "
            f"Received: {LIMIT}={limit}"
        )
    return int(size * 2**30)


def digests(folder, paths):
    """Digests of files, from the cache for files that have not changed."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    with _cache() as place:
        index = place / f"{_digest_of_text(folder.resolve())}-digests.json"
        try:
            known = json.loads(index.read_text(encoding="utf-8", errors="surrogateescape"))
        except (FileNotFoundError, ValueError):
            known = {}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            entries = list(pool.map(lambda x, name: _entry(x, known.get(name)), paths, names))
        current = {name: entry for name, entry in zip(names, entries) if entry[-1]}
        if current != known:
            write_json(index, current)
    return [digest for *_, digest in entries]


def _entry(path, known):
    """Size, times and digest of a file; the digest is reused if size and times are as known."""
    try:
        stat = path.stat()
        # A change of permissions changes only `st_ctime`.
        attributes = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known and known[:-1] == attributes:
            return known
        with open(path, "rb") as file:
            return [*attributes, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:  # Reported when it is read as an image.
        return [0, 0, 0, ""]


def _digest_of_text(text):
    return hashlib.sha256(str(text).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def decoded(folder, files, size, resize="squash", multiple_of=1):
    """The readable images as one array, through the cache; and error messages by path.

    If they would take more than the cache keeps, or than the disk has left, they are
    `StreamedImages`.
    """
    listed = [(file.path, file.digest) for file in files]
    paths = [folder / file.path for file in files]
    if size is None:
        identity = ["size", multiple_of, formats(), listed]
        size = tuple(remembered(identity, lambda: common_size(paths, multiple_of)))
    with _cache() as place:
        content = json.dumps([VERSION, size, resize, listed])
        key, owner = _digest_of_text(content), _digest_of_text((folder.resolve(), size, resize))
        # A folder that was moved or copied finds its images under their content.
        array = next(place.glob(f"{key}*.npy"), place / f"{key}-{owner}.npy")
        errors = array.with_suffix(".json")
        is_checked = errors.exists() and not _any_readable(
            [folder / path for path in _read_errors(errors)], size, resize
        )
        is_decoded = is_checked and array.exists()
        reason = None if is_decoded else _too_large((len(files), *size, 3), place)
        if reason:
            print(f"{reason}: they are read as they are needed")
        if not (is_decoded or reason and is_checked):
            _remove_abandoned(place)
            if reason:
                print(f"Checking {len(files):,} images, once: unreadable ones are left out")
                unreadable = _read_all(paths, size, resize)
            else:
                errors.unlink(missing_ok=True)  # Without it, the new array counts as unfinished.
                with atomic_write(array) as part:
                    unreadable = _decode(paths, size, resize, part, place)
            write_json(
                errors, {x.path: unreadable[y] for x, y in zip(files, paths) if y in unreadable}
            )
            for old in place.glob(f"[!.]*-{owner}.json"):
                if old != errors:
                    _remove(old.with_suffix(".npy"))
        unreadable = _read_errors(errors)
        if reason:
            readable = [y for x, y in zip(files, paths) if x.path not in unreadable]
            return _streamed(readable, size, resize), unreadable
        images = np.load(array, mmap_mode="r")
        _remove_oldest(place, [array])
        images = images[: len(files) - len(unreadable)]
        return (images if images.nbytes > IN_MEMORY else np.array(images)), unreadable


def _read_errors(path):
    return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))


def _any_readable(paths, size, resize):
    """Whether a file can be read by now, after a repair or the installation of a package."""

    def is_readable(path):
        with contextlib.suppress(ImageError):
            read_and_measure(path, size, resize=resize)
            return True
        return False

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return any(pool.map(is_readable, paths))


def remembered(identity, compute):
    """What a function returns, from the cache, or written there.

    Args:
        identity: list, all that it depends on, as JSON.
        compute: function without arguments that returns what JSON can hold, as lists.
    """
    with _cache() as place:
        known = place / f"{_digest_of_text(json.dumps([VERSION, *identity]))}-known.json"
        if not known.exists():
            write_json(known, compute())
        return json.loads(known.read_text(encoding="utf-8"))


def stored(identity, shape, parts, other=None):
    """Decoded images and their labels, memory-mapped: from the cache, or written there.

    Args:
        identity: list, all that pixels and labels depend on, as JSON.
        shape: tuple `(N, H, W, C)`.
        parts: function that returns an iterator of pairs `(images, labels)` of arrays.
        other: images that are used together with these; an array from here has to fit, too.

    Returns:
        uint8 array and int64 array; None if the images do not fit into the cache.
    """
    with _cache() as place:
        kept, taken = [], 0
        if isinstance(other, np.memmap):
            kept, taken = [place / pathlib.Path(str(other.filename)).name], other.nbytes
        array = place / f"{_digest_of_text(json.dumps([VERSION, *identity]))}.npy"
        beside = array.with_suffix(".json")
        if not (array.exists() and beside.exists()):
            if reason := _too_large(shape, place, taken):
                print(f"{reason}: they are read as they are needed")
                return None
            _remove_abandoned(place)
            print(f"Decoding {shape[0]:,} images, once, into {place}")
            labels, row = [], 0
            with atomic_write(array) as part:
                images = _new_array(part, shape)
                for some, their_labels in parts():
                    images[row : row + len(some)] = some
                    row += len(some)
                    labels += their_labels.tolist()
                images.flush()
            write_json(beside, labels)
        _remove_oldest(place, [array, *kept])
        labels = json.loads(beside.read_text(encoding="utf-8"))
        return np.load(array, mmap_mode="r"), np.array(labels, "int64")


def _too_large(shape, place, kept=0):
    """Why images of a shape do not fit into the cache, beside what is kept; None if they do."""
    size, limit = math.prod(shape), most_cached()
    free = shutil.disk_usage(place).free
    if size <= min(limit - kept, free):
        return None
    which = f"what is free in {place}"
    if limit - kept <= free:
        beside = f" beside {kept / 2**30:,.4g} GiB of test images" if kept else ""
        which = f"the cache's {limit / 2**30:,.4g} GiB{beside}"
    return (
        f"{shape[0]:,} images of {shape[1]}x{shape[2]} pixels take {size / 2**30:,.1f} GiB, more "
        f"than {which}"
    )


def _streamed(paths, size, resize):
    """Image files, all of which could be read before, as `StreamedImages`."""

    def read(row):
        try:
            return read_and_measure(paths[row], size, resize=resize)[0]
        except ImageError as error:
            raise ImageError(f"{paths[row]} cannot be read any more: {error}") from error

    return StreamedImages(read, (len(paths), *size, 3))


def _remove_oldest(place, used):
    """Removes the arrays that were not used for the longest time, until the others are small."""
    # The cache may be read-only, or another process faster.
    with contextlib.suppress(OSError):
        for path in used:
            os.utime(path)  # Used now.
        arrays = sorted(place.glob(ARRAYS), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in arrays:
            total += path.stat().st_size
            if total > most_cached() and path not in used:
                _remove(path)


def _remove_abandoned(place):
    """Removes what killed processes left half written."""
    for part in place.glob(PARTS):
        with contextlib.suppress(FileNotFoundError):  # Another process has finished it meanwhile.
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _remove(array):
    """Removes an array of decoded images, and the errors beside it."""
    with contextlib.suppress(OSError):  # Another process may be faster, or have it open on Windows.
        array.unlink(missing_ok=True)
        array.with_suffix(".json").unlink(missing_ok=True)


def usage():
    """The cache directory, the number of arrays of decoded images, and their size in bytes."""
    with _cache() as place:
        arrays = list(place.glob(ARRAYS))
        return place, len(arrays), sum(path.stat().st_size for path in arrays)


def clear():
    """Removes all decoded images and digests from the cache directory."""
    with _cache() as place:
        for pattern in ("*.npy", "*.json", PARTS):
            for path in place.glob(pattern):
                path.unlink(missing_ok=True)


def _new_array(path, shape):
    """A memory-mapped uint8 array in a new .npy file."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype="uint8", shape=shape)
    if hasattr(os, "posix_fallocate"):
        # Otherwise a full disk would kill the process when it writes to the memory map.
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def _decode(paths, size, resize, part, place):
    """Writes the readable images to one .npy file; returns error messages by path."""
    images = _new_array(part, (len(paths), *size, 3))
    print(f"Decoding {len(paths):,} images to {size[0]}x{size[1]} pixels, once, into {place}")
    unreadable = _read_all(paths, size, resize, images)
    images.flush()
    return unreadable


def _read_all(paths, size, resize, images=None):
    """Reads all images, into an array if there is one; returns error messages by path."""
    import keras

    bar = keras.utils.Progbar(len(paths), verbose=int(is_terminal()), unit_name="image")

    def read(path):
        try:
            image, used = read_and_measure(path, size, resize=resize)
            return image if images is not None else None, used
        except ImageError as error:
            return str(error).replace(repr(str(path)), "").strip()

    unreadable, dark, row = {}, [], 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):
            chunk = paths[start : start + 1024]
            for path, found in zip(chunk, pool.map(read, chunk)):
                if isinstance(found, str):
                    unreadable[path] = found
                    continue
                image, used = found
                dark += [path] if used < SMALL_PART else []
                if images is not None:
                    images[row] = image
                row += 1
            bar.update(start + len(chunk))
    if dark:
        warn(
            f"{len(dark):,} of {len(paths):,} images use less than a quarter of their 16 bits, "
            f"such as {dark[0]}: they are read as dark as they are. If they hold 10 or 12 bits, "
            "scale them to 16 first"
        )
    return unreadable
