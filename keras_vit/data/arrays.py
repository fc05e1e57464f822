"""Data sets of arrays: NumPy's .npz files and scikit-learn's digits."""

import pathlib
import zipfile
import zlib

import numpy as np

from keras_vit.data.dataset import NOT_MIRRORED, Dataset, DatasetError, split_off_test
from keras_vit.data.folders import composed
from keras_vit.data.images import first_line

# The names of the arrays in Keras's own data sets.
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# An axis of at most so many numbers is that of the channels.
MOST_CHANNELS = 4
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


def load_npz(source, test_only=False):
    """A `Dataset` of Keras's arrays.

    With `test_only`, the test images are its training images, too, and `class_names` is empty if
    there are none in the file.
    """
    path = pathlib.Path(source)
    wanted = NPZ_ARRAYS[2:] if test_only else NPZ_ARRAYS
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [_array(source, file, name) for name in wanted]
            names = None
            if "class_names" in file:
                names = _class_names(source, _array(source, file, "class_names"))
    except OSError as error:
        raise DatasetError(f"{source} cannot be read: {error.strerror or error}") from error
    except UNREADABLE as error:
        expected = ", ".join(wanted)
        raise DatasetError(f"{source} does not contain {expected} ({first_line(error)})") from error
    pairs = zip(_pixels(source, arrays[::2]), arrays[1::2])
    splits = [_checked(source, *pair) for pair in pairs]
    (train_images, train_labels), (test_images, test_labels) = splits * (2 if test_only else 1)
    if train_images.shape[1:] != test_images.shape[1:]:
        shapes = f"{train_images.shape[1:]} and {test_images.shape[1:]}"
        raise DatasetError(f"{source} has training and test images of different shapes: {shapes}")
    if not test_only:
        names = _checked_names(source, names, train_labels)
    if names and test_labels.max() >= len(names):
        raise DatasetError(
            f"{source} has test labels up to {test_labels.max()}, expected labels below "
            f"{len(names)}, the number of classes"
        )
    mirror = path.stem not in NOT_MIRRORED
    pairs = train_images, train_labels, test_images, test_labels
    return Dataset(path.stem, *pairs, names or [], mirror)


def _array(source, file, name):
    try:
        return file[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        kind = {"c": "str", "x": "'uint8'", "y": "int"}[name[0]]
        raise DatasetError(
            f"{source} does not contain {name} as text or numbers but as Python objects, which "
            f"could run code when they are read: save np.array({name}, {kind})"
        ) from error


def _class_names(source, array):
    """The names of an array of text, or of bytes in UTF-8."""
    try:
        words = [x.decode() if isinstance(x, bytes) else x for x in array.tolist()]
        names = [composed(str(word)) for word in words]
    except (TypeError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{source} has class_names that are no list of names in UTF-8: {first_line(error)}"
        ) from error
    if len(set(names)) < len(names):
        raise DatasetError(f"{source} has duplicate class names: {', '.join(names)}")
    return names


def _checked_names(source, names, labels):
    """The class names of training labels, which must be 0, 1, 2 and so on, without gaps."""
    found = np.unique(labels)
    names = list(map(str, range(len(found)))) if names is None else names
    if found[-1] >= len(names):
        shown = ", ".join(map(str, found[:5])) + (f", ..., {found[-1]}" if len(found) > 5 else "")
        raise DatasetError(
            f"{source} has the labels {shown} in y_train, expected labels below {len(names)}, the "
            "number of classes. Number the classes from 0 without gaps, in y_train and y_test: "
            "np.searchsorted(np.unique(y_train), y_train)"
        )
    if len(names) < 2:
        raise DatasetError(
            f"{source} has images of {len(names)} class, expected at least two classes"
        )
    if len(found) < len(names):
        missing = next(x for x in range(len(names)) if x not in found)
        raise DatasetError(
            f"class {names[missing]!r} in {source} has no training images: no label in y_train is "
            f"{missing}"
        )
    return names


def _pixels(source, arrays):
    """Images as uint8, from other numbers that clearly reach from 0 to 1 or from 0 to 255."""
    kinds = list(dict.fromkeys(array.dtype for array in arrays))
    if kinds == [np.uint8] or any(array.size == 0 for array in arrays):
        return arrays
    if len(kinds) > 1 or kinds[0].kind not in "biuf":
        raise DatasetError(
            f"{source} has images of dtype {' and '.join(map(str, kinds))}, expected uint8"
        )
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    for top in (1, 255):
        if low >= 0 and top / 2 <= high <= top:
            scale = np.float32(255 / top)
            return [np.round(array * scale).astype("uint8") for array in arrays]
    raise DatasetError(
        f"{source} has images of dtype {kinds[0]} from {low:g} to {high:g}, expected uint8 from 0 "
        "to 255, or numbers that reach from 0 to 1 or to 255"
    )


def _checked(source, images, labels):
    """Validates images and labels; returns them in the shapes and dtypes of a `Dataset`."""
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise DatasetError(
            f"{source} has images of shape {images.shape} and dtype {images.dtype}, expected "
            "(count, height, width, channels) and uint8"
        )
    if images.shape[1] <= MOST_CHANNELS < min(images.shape[2:]):
        raise DatasetError(
            f"{source} has images of shape {images.shape}, which has the channels first, expected "
            "(count, height, width, channels): save np.moveaxis(images, 1, -1)"
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
