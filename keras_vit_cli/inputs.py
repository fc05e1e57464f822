"""What commands are given: models, data sets that suit them, and images."""

import itertools
import os
import pathlib
import sys

import numpy as np

from keras_vit import loading
from keras_vit.data import DatasetError, ImageError, is_folder, load_dataset, read_image
from keras_vit.files import visible
from keras_vit.model import VisionTransformer
from keras_vit_cli.errors import CommandError

BATCH_SIZE = 256


def load_model(path):
    """The `VisionTransformer` of a file or a run directory, for grey or RGB images."""
    if (path / "model.keras").is_file():
        path = path / "model.keras"
    try:
        model = loading.load_model(path)
    except loading.ModelError as error:
        raise CommandError(str(error)) from error
    if not isinstance(model, VisionTransformer):
        raise CommandError(f"{path} holds a {type(model).__name__}, not a VisionTransformer")
    if model.input_shape[-1] not in (1, 3):
        raise CommandError(
            f"{path} takes images of {model.input_shape[-1]} channels, not grey or RGB"
        )
    return model


def class_names(model):
    """The class names that a model carries; numbers where it has none."""
    return model.class_names or tuple(str(label) for label in range(model.output_shape[-1]))


def enumerated(names, most=10):
    """The first of some names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def load_suitable(model, path, name, data_dir):
    """Loads a data set and checks that it matches the model."""
    if not name:
        raise CommandError("--dataset must not be empty")
    # The model knows what it takes; a folder is resized to that.
    size = model.input_shape[1:3] if is_folder(name) else None
    try:
        dataset = load_dataset(name, data_dir, size)
    except DatasetError as error:
        raise CommandError(str(error)) from error
    check_suits(model, path, dataset)
    return dataset


def check_suits(model, path, dataset):
    """Raises a `CommandError` unless images and classes match the model."""
    expected, found = tuple(model.input_shape[1:]), tuple(dataset.image_shape)
    if expected != found:
        raise CommandError(f"{path} takes images of {expected}, {dataset.name} has {found}")
    count, names = model.output_shape[-1], tuple(dataset.class_names)
    if len(names) != count or model.class_names not in (None, names):
        of = "the folder's" if dataset.manifest is not None else f"those of {dataset.name}"
        raise CommandError(
            f"The model's classes ({enumerated(class_names(model))}) differ from {of} "
            f"({enumerated(names)})."
        )


def image_batches(words, model):
    """Images for a model, as many at once as it computes.

    Args:
        words: list of strings, files, folders, or `-` for a list on stdin.
        model: a `keras.Model`.

    Yields:
        Names of up to 256 files, the images `(B, H, W, C)` of those that could be read, whose names
        these are; and whether stderr names others that could not.
    """
    height, width, channels = model.input_shape[1:]
    files = _listed(words)
    while paths := list(itertools.islice(files, BATCH_SIZE)):
        images, names = [], []
        for path in paths:
            try:
                images.append(read_image(path, (height, width), channels))
                names.append(path)
            except ImageError as error:
                reason = "has no images" if os.path.isdir(path) else f"cannot be read: {error}"
                print(f"error: {path} {reason}", file=sys.stderr)
        yield names, np.array(images), len(names) < len(paths)


def _listed(words):
    """Names of files, one by one: those named, those in folders, those listed on stdin."""
    for word in words:
        path = os.path.expanduser(word)
        if word == "-":
            yield from _listed(filter(None, _lines_of_stdin()))
        elif os.path.isdir(path):
            yield from map(str, visible(pathlib.Path(path)) or [path])
        else:
            yield path


def _lines_of_stdin():
    """The lines of stdin without their ends; names of files are any bytes."""
    lines = sys.stdin
    if os.name != "nt" and hasattr(sys.stdin, "buffer"):
        lines = map(os.fsdecode, sys.stdin.buffer)
    for number, line in enumerate(lines):
        yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
