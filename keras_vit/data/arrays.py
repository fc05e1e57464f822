"""Data sets of arrays: NumPy's .npz files and scikit-learn's digits."""

import pathlib
import zipfile
import zlib

import numpy as np

from keras_vit.data.dataset import NOT_MIRRORED, Dataset, DatasetError, split_off_test
from keras_vit.data.images import first_line

# The names of the arrays in Keras's own data sets.
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# What NumPy raises for a file that is not such an archive or is damaged.
UNREADABLE = (
    EOFError,
    KeyError,
    NotImplementedError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_npz(source):
    path = pathlib.Path(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in NPZ_ARRAYS]
            names = [str(name) for name in file["class_names"]] if "class_names" in file else None
    except OSError as error:
        raise DatasetError(f"{source} cannot be read: {error.strerror or error}") from error
    except UNREADABLE as error:
        expected = ", ".join(NPZ_ARRAYS)
        raise DatasetError(f"{source} does not contain {expected} ({first_line(error)})") from error
    splits = [_checked(source, *pair) for pair in (arrays[:2], arrays[2:])]
    (train_images, train_labels), (test_images, test_labels) = splits
    if train_images.shape[1:] != test_images.shape[1:]:
        shapes = f"{train_images.shape[1:]} and {test_images.shape[1:]}"
        raise DatasetError(f"{source} has training and test images of different shapes: {shapes}")
    classes = int(train_labels.max()) + 1
    names = names or [str(label) for label in range(classes)]
    if not 2 <= classes <= len(names) or test_labels.max() >= len(names):
        raise DatasetError(
            f"{source} has training labels up to {classes - 1} and test labels up to "
            f"{test_labels.max()}, expected at least two classes and labels below {len(names)}"
        )
    if len(set(names)) < len(names):
        raise DatasetError(f"{source} has duplicate class names: {', '.join(names)}")
    mirror = path.stem not in NOT_MIRRORED
    return Dataset(path.stem, train_images, train_labels, test_images, test_labels, names, mirror)


def _checked(source, images, labels):
    """Validates images and labels; returns them in the shapes and dtypes of a `Dataset`."""
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise DatasetError(
            f"{source} has images of shape {images.shape} and dtype {images.dtype}, expected "
            "(count, height, width, channels) and uint8"
        )
    are_integers = np.issubdtype(labels.dtype, np.integer) and labels.shape == images.shape[:1]
    if not are_integers or labels.min() < 0:
        raise DatasetError(
            f"{source} has labels of shape {labels.shape} and dtype {labels.dtype}, expected "
            f"one non-negative integer for each of {len(images)} images"
        )
    return images, labels.astype("int64")


def load_digits():
    from PIL import Image
    from sklearn import datasets

    digits = datasets.load_digits()
    scans = np.round(digits.images * (255 / 16)).astype("uint8")
    size = 32, 32
    images = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in scans]
    images = np.repeat(np.stack([np.asarray(x) for x in images])[..., None], 3, axis=-1)
    names = [str(name) for name in digits.target_names]
    return split_off_test("digits", images, digits.target, names, horizontal_flip=False)
