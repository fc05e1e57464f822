"""What has been read of a folder of images, kept in the user's cache directory.

All images are decoded once, by all cores, into one file; a set of over 2 GiB stays there, and
training reads what it needs.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import time

import numpy as np

from keras_vit.data.images import ImageError, TooLarge, common_size, read_image
from keras_vit.files import PARTS, atomic_write, write_json

# A larger array stays on disk.
IN_MEMORY = 2 * 2**30
# What a killed process was writing is removed from the cache after so many seconds.
ABANDONED = 24 * 3600


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


def digests(folder, paths):
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


def decoded(folder, files, size):
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
            with atomic_write(array) as part:
                unreadable = _decode(paths, size or common_size(paths), part)
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
