"""Loading models from `.keras` files that may come from untrusted sources."""

import os
import pathlib
import re
import zipfile

import keras

from keras_vit import losses, model  # noqa: F401  Keras finds their classes registered.

LARGEST = 4 * 2**30  # Largest size of an unpacked file, in bytes.
# Other compression methods may unpack to any size before they can be stopped.
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ModelError(RuntimeError):
    """A file is not a model, is damaged, or is not safe to load."""


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """Loads a model without running any code from its file.

    Before Keras reads anything, the archive is checked: the names, sizes and checksums of all its
    members. Keras then builds only its own and registered classes, in safe mode (unless the
    process has called `keras.config.enable_unsafe_deserialization`). The memory that the layers
    of the file need is not bounded.

    Args:
        path: string or `Path` of a `.keras` file that unpacks to 4 GiB at most.

    Returns:
        The `keras.Model`, compiled if it was when it was saved.

    Raises:
        ModelError: if the file is missing, damaged or too large, or contains other classes than
            Keras's own and registered ones.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        inside = (path / name for name in ("model.keras", "best.keras"))
        found = next((model for model in inside if model.is_file()), None)
        advice = f"Did you mean {found}?" if found else "It holds no model.keras."
        raise ModelError(f"{path} is a folder. {advice}")
    if path.suffix != ".keras":  # Keras would read it as a legacy format.
        raise ModelError(
            f"{path} does not end in .keras, the suffix of Keras model files. Presets and "
            ".safetensors files are loaded by keras_vit.VisionTransformer.from_preset"
        )
    check_archive(path)
    try:
        return keras.saving.load_model(path, safe_mode=True)
    except Exception as error:  # A hostile file can make Keras raise anything.
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path} cannot be loaded safely: {reason}") from error


def check_archive(path: str | os.PathLike[str], largest: float = LARGEST) -> None:
    """Rejects an archive with members that leave its folder, fill memory or fail their checksum.

    Args:
        path: `Path` of a `.keras` file.
        largest: largest size of its unpacked content, in bytes.

    Raises:
        ModelError: if the file cannot be read, or has such a member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                parts, name = re.split(r"[/\\]", member.filename), repr(member.filename)
                if ".." in parts or not parts[0] or ":" in parts[0]:
                    raise ModelError(
                        f"{path} has a member {name}, which would be written outside of its folder"
                    )
                if member.compress_type not in BOUNDED:
                    raise ModelError(
                        f"{path} has a member {name}, compressed in a way that Keras never uses"
                    )
            total = sum(member.file_size for member in archive.infolist())
            if total > largest:
                raise ModelError(
                    f"{path} unpacks to {total:,} bytes; at most {largest:,} are allowed"
                )
            damaged = archive.testzip()
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # A damaged archive can make `zipfile` raise anything.
        raise ModelError(f"{path} is not a .keras file, or is damaged: {error}") from error
    if damaged is not None:
        raise ModelError(
            f"{path} is damaged: the checksum of its member {damaged!r} does not match"
        )
