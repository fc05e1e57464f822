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
    different_classes,
    has_fixed_size,
    load_dataset,
    load_unseen,
)
from keras_vit.data.folders import composed
from keras_vit.data.images import MODES
from keras_vit.files import visible
from keras_vit.prediction import read_for
from keras_vit.presets import load_preset
from keras_vit_cli import backend
from keras_vit_cli.errors import CommandError
from keras_vit_cli.run_directory import RunDirectory

BATCH_SIZE = 256


def load_model(path):
    """The `VisionTransformer` of a preset, a file or a run directory."""
    try:
        return load_preset(RunDirectory.model_of(path))
    except loading.ModelError as error:
        raise CommandError(str(error)) from error


def class_names(model):
    """The class names that a model carries; numbers where it has none."""
    return model.class_names or tuple(str(label) for label in range(model.output_shape[-1]))


def load_suitable(model, path, name, data_dir):
    """Loads a data set and checks that its images and classes are those of the model."""
    dataset = load_resized(model, path, name, data_dir)
    check_classes(model, dataset)
    return dataset


def load_resized(model, path, name, data_dir):
    """Loads a data set of any classes, with images of the model's shape."""
    if not name:
        raise CommandError("--dataset must not be empty")
    backend.import_for(name)
    # The model knows what it takes; all but arrays are resized to that.
    size = None if has_fixed_size(name) else model.input_shape[1:3]
    try:
        dataset = load_dataset(name, data_dir, size, model.resize)
    except DatasetError as error:
        raise CommandError(str(error)) from error
    check_shape(model, path, dataset)
    return dataset


def load_for_test(model, path, name, data_dir, seen=()):
    """Loads test images for a model, and how many images were left out, by reason.

    Training images may be missing; of a folder, every image is taken that is not in `seen`.
    """
    if not name:
        raise CommandError("--dataset must not be empty")
    backend.import_for(name)
    try:
        dataset, left_out = load_unseen(
            name,
            model.input_shape[1:3],
            model.class_names,
            frozenset(seen),
            data_dir,
            model.resize,
        )
    except DatasetError as error:
        raise CommandError(str(error)) from error
    check_shape(model, path, dataset)
    check_classes(model, dataset)
    return dataset, left_out


def check_shape(model, path, dataset):
    """Raises a `CommandError` unless the images of a data set have the model's input shape."""
    expected, found = tuple(model.input_shape[1:]), tuple(dataset.image_shape)
    if expected != found:
        raise CommandError(
            f"{path} takes images of shape {expected}, but those of {dataset.name} have {found}"
        )


def check_classes(model, dataset):
    """Raises a `CommandError` unless the classes of a data set are those of the model."""
    count, names = model.output_shape[-1], tuple(dataset.class_names)
    known = None if model.class_names is None else tuple(map(composed, model.class_names))
    if len(names) != count or known not in (None, tuple(map(composed, names))):
        of = "the folder's" if dataset.manifest is not None else f"those of {dataset.name}"
        raise CommandError(different_classes(class_names(model), names, of))


def image_batches(words, model):
    """Images for a model, as many at once as it computes.

    Args:
        words: list of strings, files, folders, or `-` for a list on stdin.
        model: a `keras.Model`.

    Yields:
        Names of up to 256 files, the images `(B, H, W, C)` of those that could be read, whose names
        these are; and whether stderr names others that could not.
    """
    if model.input_shape[-1] not in MODES:
        raise CommandError(
            f"the model takes images of {model.input_shape[-1]} channels: expected one of 1, 3 or "
            "4, as files of images have them"
        )
    files = _listed(words)
    while paths := list(itertools.islice(files, BATCH_SIZE)):
        images, names = [], []
        for path in paths:
            try:
                images.append(read_for(model, path))
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
            yield from map(str, _files_in(pathlib.Path(path)) or [path])
        else:
            yield path


def _files_in(folder):
    try:
        return visible(folder)
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be read: {error.strerror}") from error


def _lines_of_stdin():
    """The lines of stdin without their ends; names of files are any bytes."""
    lines = sys.stdin
    if os.name != "nt" and hasattr(sys.stdin, "buffer"):
        lines = map(os.fsdecode, sys.stdin.buffer)
    for number, line in enumerate(lines):
        yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
