"""Loading a data set by name, file or folder."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Collection, Sequence

import numpy as np

from keras_vit.data.arrays import load_digits, load_npz
from keras_vit.data.dataset import NOT_MIRRORED, SHORT, Dataset, DatasetError
from keras_vit.data.folders import (
    COPY,
    TEST,
    TRAIN,
    VALIDATION,
    check_trainable,
    list_folder,
    read_folder,
    warn_of_split,
)
from keras_vit.data.images import ImageError
from keras_vit.data.tfds import load_tfds
from keras_vit.validation import resizing

# Names that refer to a data set even if there is a folder of the same name.
NAMED = ("cifar10", "cifar100", "digits")


def load_dataset(
    source: str = "cifar10",
    data_dir: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str = "squash",
    multiple_of: int = 1,
) -> Dataset:
    """Loads labelled images for training and testing.

    Args:
        source: string, `"digits"` for the 1,797 scanned digits of
            scikit-learn, enlarged from 8x8 to 32x32 RGB; an `.npz` file with
            Keras's arrays `x_train`, `y_train`, `x_test` and `y_test`, and
            optionally `class_names`; a folder with one sub-folder of images
            per class, or with `train`, `test` and optionally `val` above
            them; or the name of any image classification set of TensorFlow
            Datasets, such as `"cifar10"`. Images of different sizes, or with a
            side of more than 128 pixels, are resized to 64x64 (those of a
            folder to their median side, from 32 to 64). If there is no
            labelled test or validation split, a fifth of the images is held
            out for testing; in a folder, by a hash of each file's path.
        data_dir: string, folder of prepared TensorFlow Datasets; by default
            `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
        image_size: int or pair `(height, width)`, size in pixels that the
            images of a folder or of TensorFlow Datasets are resized to.
        resize: string, how images of another aspect ratio are fitted to
            that size, as for `keras_vit.read_image`.
        multiple_of: int, what the sides of images are multiples of where
            `image_size` is not given, such as a model's `patch_size`.

    Returns:
        A `Dataset`.

    Raises:
        DatasetError: if the data set is unknown, is not on disk and cannot be
            downloaded, or is not for image classification.
        ValueError: if `resize` is unknown.
    """
    resizing(resize)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if is_folder(source):
        return _load_folder(pathlib.Path(source).expanduser(), size, resize, multiple_of)
    if not has_fixed_size(source):
        return load_tfds(source, data_dir, size, resize, multiple_of)
    if size is not None:
        raise DatasetError(
            "an image size is only for folders of images and for TensorFlow Datasets, and "
            f"{source} is neither"
        )
    dataset = load_digits() if source == "digits" else load_npz(source)
    return dataclasses.replace(dataset, resize=resize)


def is_folder(source):
    """Whether a source is a folder of images and not the name of a data set."""
    return source not in NAMED and os.path.isdir(os.path.expanduser(source))


def has_fixed_size(source):
    """Whether the images of a source are arrays, which are not resized."""
    return not is_folder(source) and (source == "digits" or source.endswith(".npz"))


def load_unseen(
    folder: str,
    image_size: tuple[int, int],
    class_names: Sequence[str] | None,
    seen: Collection[str],
    resize: str = "squash",
) -> tuple[Dataset, dict[str, int]]:
    """Loads all images of a folder that a model was not trained or validated on.

    Args:
        folder: string, a folder as for `load_dataset`, with some of the classes.
        image_size: pair `(height, width)`, size in pixels that images are resized to.
        class_names: class names of the model, in order; None for the sorted sub-folders.
        seen: short digests of the images that the model was trained or validated on; if empty,
            they are unknown, and only the test images of `load_dataset` are used.
        resize: string, how images of another aspect ratio are fitted to that size.

    Returns:
        A `Dataset` with these images as test images (and as training images); and the number of
        images that were left out, by reason.

    Raises:
        DatasetError: if there are none, or if 1% of the files or more cannot be read.
    """
    path = pathlib.Path(folder).expanduser()
    with _dataset_errors(path):
        listed, names = list_folder(path)
        class_names = list(names if class_names is None else class_names)
        others = ", ".join(name for name in names if name not in class_names)
        if not set(names) & set(class_names):
            raise DatasetError(
                f"{folder} has images of {others}, expected some of {', '.join(class_names)}"
            )
        images, files = read_folder(path, listed, image_size, resize)
    reasons = {
        "that the model was trained or validated on": lambda x: x.digest[:SHORT] in seen,
        "that are copies of others": lambda x: x.split == COPY,
        f"of classes that the model was not trained on ({others})": lambda x: (
            x.class_name not in class_names
        ),
        "of the training split (the model does not record its training images)": lambda x: (
            not seen and x.split != TEST
        ),
    }
    applying = [next((y for y, holds in reasons.items() if holds(x)), None) for x in files]
    left_out = {reason: applying.count(reason) for reason in reasons if reason in applying}
    if len(files) < len(listed):
        left_out["that cannot be read"] = len(listed) - len(files)
    kept = np.array([reason is None for reason in applying])
    if not kept.any():
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DatasetError(f"{folder} has no images to test on, only {counts}")
    images = images if kept.all() else images[kept]
    files = [dataclasses.replace(file, split=TEST) for file, is_kept in zip(files, kept) if is_kept]
    labels = np.array([class_names.index(file.class_name) for file in files], "int64")
    name, pair = path.resolve().name, (images, labels)
    dataset = Dataset(name, *pair, *pair, class_names, True, manifest=tuple(files), resize=resize)
    return dataset, left_out


def _load_folder(folder, image_size, resize, multiple_of):
    with _dataset_errors(folder):
        files, names = list_folder(folder)
        check_trainable(folder, files, names)
        images, files = read_folder(folder, files, image_size, resize, multiple_of)
        check_trainable(folder, files, names)
    warn_of_split(files, names)
    labels = np.array([names.index(file.class_name) for file in files], "int64")
    splits = [file.split for file in files]

    def part(split):
        """Views, because the images of a split are contiguous in the manifest."""
        start, count = splits.index(split), splits.count(split)
        return images[start : start + count], labels[start : start + count]

    name = folder.resolve().name
    return Dataset(
        name,
        *part(TRAIN),
        *part(TEST),
        class_names=names,
        horizontal_flip=name not in NOT_MIRRORED,
        validation=part(VALIDATION) if VALIDATION in splits else None,
        manifest=tuple(files),
        resize=resize,
    )


@contextlib.contextmanager
def _dataset_errors(folder):
    """Turns errors in reading a folder into a `DatasetError`."""
    try:
        yield
    except ImageError as error:
        raise DatasetError(str(error)) from error
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror or error}") from error
