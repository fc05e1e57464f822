"""Models out of `.keras` files, which may come from strangers."""

import os
import pathlib
import re
import zipfile

import keras

from keras_vit import losses, model  # noqa: F401  Keras finds their classes registered.

LARGEST = 4 * 2**30  # Bytes that a file may unpack to.
# Others unpack to any size before they can be stopped.
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ModelError(RuntimeError):
    """A file holds no model, a damaged one, or one that is not safe to load."""


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """Loads a model without running code that its file brings along.

    Before Keras reads anything, the archive is checked as a whole: the names and the sizes of its
    members, and the checksum that each of them carries. Keras then builds classes of its own and
    registered ones only, in safe mode (unless the process has called
    `keras.config.enable_unsafe_deserialization`). How much memory the layers want that the file
    describes is not bounded.

    Args:
        path: string or `Path` of a `.keras` file that unpacks to 4 GiB at most.

    Returns:
        The `keras.Model`, compiled if it was when it was saved.

    Raises:
        ModelError: if the file is missing, damaged or larger than that, or asks for anything but
            Keras's and registered classes.
    """
    path = pathlib.Path(path)
    if path.suffix != ".keras":  # Keras would read it by the rules of an older format.
        raise ModelError(f"{path} does not end in .keras, like the files that hold a Keras model")
    check_archive(path)
    try:
        return keras.saving.load_model(path, safe_mode=True)
    except Exception as error:  # What a hostile file provokes in Keras is of any kind.
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path} holds no model that can be loaded safely: {reason}") from error


def check_archive(path: str | os.PathLike[str], largest: float = LARGEST) -> None:
    """Refuses members that would leave a folder, fill memory, or differ from their checksum.

    Args:
        path: `Path` of a `.keras` file.
        largest: how many bytes it may unpack to.

    Raises:
        ModelError: if the file cannot be read, or holds such a member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                parts, name = re.split(r"[/\\]", member.filename), repr(member.filename)
                if ".." in parts or not parts[0] or ":" in parts[0]:
                    raise ModelError(f"{path} has a member {name}, which would leave its folder")
                if member.compress_type not in BOUNDED:
                    raise ModelError(f"{path} has a member {name}, packed as Keras never does")
            total = sum(member.file_size for member in archive.infolist())
            if total > largest:
                raise ModelError(
                    f"{path} unpacks to {total:,} bytes, at most {largest:,} are allowed"
                )
            damaged = archive.testzip()
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # What a damaged archive provokes is of many kinds.
        raise ModelError(f"{path} is no .keras file, or it is damaged: {error}") from error
    if damaged is not None:
        raise ModelError(f"{path} is damaged: its member {damaged!r} differs from its checksum")
