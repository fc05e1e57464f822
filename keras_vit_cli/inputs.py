"""What commands are given: models, data sets that suit them, and images."""

import itertools
import os
import pathlib
import sys

import numpy as np

from keras_vit import loading
from keras_vit.data import (
    DatasetError,
    ImageError,
    is_folder,
    load_dataset,
    load_unseen,
    read_image,
)
from keras_vit.data.folders import composed
from keras_vit.files import visible
from keras_vit.model import VisionTransformer
from keras_vit_cli.errors import CommandError

BATCH_SIZE = 256


def load_model(path):
    """The `VisionTransformer` of a file, for grey or RGB images."""
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


def load_for_test(model, path, name, data_dir, seen=()):
    """Loads test images for a model, and how many images were left out, by reason.

    Training images may be missing; of a folder, every image is taken that is not in `seen`.
    """
    if not name:
        raise CommandError("--dataset must not be empty")
    try:
        dataset, left_out = load_unseen(
            name, model.input_shape[1:3], model.class_names, frozenset(seen), data_dir
        )
    except DatasetError as error:
        raise CommandError(str(error)) from error
    check_suits(model, path, dataset)
    return dataset, left_out


def check_suits(model, path, dataset):
    """Raises a `CommandError` unless images and classes match the model."""
    expected, found = tuple(model.input_shape[1:]), tuple(dataset.image_shape)
    if expected != found:
        raise CommandError(f"{path} takes images of {expected}, {dataset.name} has {found}")
    count, names = model.output_shape[-1], tuple(dataset.class_names)
    known = None if model.class_names is None else tuple(map(composed, model.class_names))
    if len(names) != count or known not in (None, tuple(map(composed, names))):
        raise CommandError(
            f"{path} was trained on the classes {', '.join(class_names(model))}, but "
            f"{dataset.name} has {', '.join(names)}"
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
                print(f"error: {path} cannot be read: {error}", file=sys.stderr)
        yield names, np.array(images), len(names) < len(paths)


def _listed(words):
    """Names of files, one by one: those named, those in folders, those listed on stdin."""
    for word in words:
        folder = os.path.expanduser(word)
        if word == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        elif os.path.isdir(folder):
            yield from map(str, _files_in(pathlib.Path(folder)))
        else:
            yield word


def _files_in(folder):
    try:
        return visible(folder)
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be read: {error.strerror}") from error
