"""Data sets that are arrays already: NumPy's .npz files and scikit-learn's digits."""

import pathlib
import zipfile
import zlib

import numpy as np

from keras_vit.data.dataset import NOT_MIRRORED, Dataset, DatasetError, first_line, split_off_test

# What Keras's own data sets name their arrays.
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# What NumPy raises over a file that holds something else or is damaged.
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
        wanted = ", ".join(NPZ_ARRAYS)
        raise DatasetError(f"{source} does not hold {wanted} ({first_line(error)})") from error
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
            f"{test_labels.max()}, expected them to name two or more of {len(names)} classes"
        )
    if len(set(names)) < len(names):
        raise DatasetError(f"{source} has a class name twice: {', '.join(names)}")
    mirror = path.stem not in NOT_MIRRORED
    return Dataset(path.stem, train_images, train_labels, test_images, test_labels, names, mirror)


def _checked(source, images, labels):
    """Images and labels of a file as a `Dataset` holds them."""
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise DatasetError(
            f"{source} has images of shape {images.shape} and type {images.dtype}, expected "
            "(count, height, width, channels) and uint8"
        )
    whole = np.issubdtype(labels.dtype, np.integer) and labels.shape == images.shape[:1]
    if not whole or labels.min() < 0:
        raise DatasetError(
            f"{source} has labels of shape {labels.shape} and type {labels.dtype}, expected a "
            f"whole number of at least 0 for each of {len(images)} images"
        )
    return images, labels.astype("int64")


def load_digits():
    from PIL import Image
    from sklearn import datasets

    digits = datasets.load_digits()
    scans = np.round(digits.images * (255 / 16)).astype("uint8")
    side = 32, 32
    images = [Image.fromarray(x).resize(side, Image.Resampling.BICUBIC) for x in scans]
    images = np.repeat(np.stack([np.asarray(x) for x in images])[..., None], 3, axis=-1)
    names = [str(name) for name in digits.target_names]
    return split_off_test("digits", images, digits.target, names, horizontal_flip=False)
