"""Loading a data set by name, file or folder."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Collection, Sequence

import numpy as np

from keras_vit.data.arrays import load_digits, load_npz
from keras_vit.data.dataset import NOT_MIRRORED, SHORT, Dataset, DatasetError, warn_of_copies
from keras_vit.data.folders import (
    COPY,
    TEST,
    TRAIN,
    VALIDATION,
    check_trainable,
    composed,
    list_folder,
    read_folder,
    warn_of_split,
)
from keras_vit.data.images import ImageError
from keras_vit.data.streaming import subset
from keras_vit.data.tfds import load_tfds
from keras_vit.messages import enumerated, warn
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
            optionally `class_names` (images as uint8, or as other numbers that
            clearly reach from 0 to 1 or to 255); a folder with one sub-folder of images
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
    if has_fixed_size(source):
        if size is not None:
            raise DatasetError(
                "an image size is only for folders of images and for TensorFlow Datasets: leave it "
                f"out for {source}, whose images are not resized"
            )
        dataset = load_digits() if source == "digits" else load_npz(source)
        dataset = dataclasses.replace(dataset, resize=resize)
    else:
        dataset = load_tfds(source, data_dir, size, resize, multiple_of)
    if source != "digits":
        warn_of_copies(dataset)
    return dataset


def is_folder(source):
    """Whether a source is a folder of images and not the name of a data set."""
    return source not in NAMED and os.path.isdir(os.path.expanduser(source))


def has_fixed_size(source):
    """Whether the images of a source are arrays, which are not resized."""
    return not is_folder(source) and (source == "digits" or source.endswith(".npz"))


def is_of_tfds(source):
    """Whether a source is the name of a data set of TensorFlow Datasets."""
    return not is_folder(source) and not has_fixed_size(source)


def load_unseen(
    source: str,
    image_size: tuple[int, int],
    class_names: Sequence[str] | None,
    seen: Collection[str],
    data_dir: str | None = None,
    resize: str = "squash",
) -> tuple[Dataset, dict[str, int]]:
    """Loads images that a model was not trained or validated on: training images may be missing.

    Of a folder, these are all that the model has not seen, of other sources the test images.

    Args:
        source: string, as for `load_dataset`, with some of the classes. A folder
             may have `test` alone, a data set of TensorFlow Datasets a test
             split alone, and an `.npz` file `x_test` and `y_test` alone.
        image_size: pair `(height, width)`, size in pixels that the images of a
            folder or of TensorFlow Datasets are resized to.
        class_names: class names of the model, in order; None for those of the
             source. Labels without names are taken in their order.
        seen: short digests of the images that the model was trained or
             validated on; if empty, they are unknown, and of a folder only the
             test images of `load_dataset` are used.
        data_dir: string, as for `load_dataset`.
        resize: string, how images of another aspect ratio are fitted to that size.

    Returns:
        A `Dataset` with these images as test images (and as training images); and the number of
        images that were left out, by reason.

    Raises:
        DatasetError: if there are none, or if 1% of the files or more cannot be read.
    """
    if is_folder(source):
        return _load_unseen_files(source, image_size, class_names, seen, resize)
    if source == "digits":
        dataset = load_digits()
    elif source.endswith(".npz"):
        dataset = load_npz(source, test_only=True)
    else:
        dataset = load_tfds(source, data_dir, tuple(image_size), resize, test_only=True)
    return _with_labels_of_a_model(dataset, class_names)


def _with_labels_of_a_model(dataset, class_names):
    """The test images of the classes of a model, labelled in its order; and what was left out."""
    images, labels, names = dataset.test_images, dataset.test_labels, dataset.class_names
    if not names:
        numbers = [str(label) for label in range(len(class_names or np.unique(labels)))]
        names = list(class_names or numbers)
        if labels.max() >= len(names):
            raise DatasetError(
                f"{dataset.name} has labels up to {labels.max()}, expected labels of "
                f"{len(names)} classes, from 0 to {len(names) - 1}"
            )
        if names != numbers:
            order = ", ".join(names)
            warn(f"the labels of {dataset.name} have no names: taken in the order {order}")
    class_names = list(names if class_names is None else class_names)
    places = {composed(name): place for place, name in enumerate(class_names)}
    new_labels = np.array([places.get(composed(name), -1) for name in names])[labels]
    kept, others = new_labels >= 0, [name for name in names if composed(name) not in places]
    if not kept.any():
        raise DatasetError(different_classes(class_names, others, f"those of {dataset.name}"))
    left_out = {_of_other_classes(others): int((~kept).sum())} if not kept.all() else {}
    pair = (images if kept.all() else subset(images, kept)), new_labels[kept]
    found = Dataset(dataset.name, *pair, *pair, class_names, dataset.horizontal_flip)
    indices = np.arange(len(kept)) if dataset.test_indices is None else dataset.test_indices
    return dataclasses.replace(found, test_indices=indices[kept]), left_out


def different_classes(expected, received, of):
    """The message for data with other classes than a model's.

    Args:
        expected: list of strings, the class names of the model.
        received: list of strings, those of the data.
        of: string, whose they are, such as "the folder's".
    """
    ours, theirs = enumerated(expected), enumerated(received)
    return f"The model's classes ({ours}) differ from {of} ({theirs})."


def _of_other_classes(names):
    return f"of classes that the model was not trained on ({', '.join(names)})"


def _load_unseen_files(folder, image_size, class_names, seen, resize):
    """`load_unseen` for a folder."""
    path = pathlib.Path(folder).expanduser()
    with _dataset_errors(path):
        listed, names = list_folder(path)
        class_names = list(names if class_names is None else class_names)
        places = {composed(name): place for place, name in enumerate(class_names)}
        others = [name for name in names if name not in places]
        if len(others) == len(names):
            raise DatasetError(different_classes(class_names, others, "the folder's"))
        images, files = read_folder(path, listed, image_size, resize)
    reasons = {
        "that the model was trained or validated on": lambda x: x.digest[:SHORT] in seen,
        "with the content of another": lambda x: x.split == COPY,
        _of_other_classes(others): lambda x: x.class_name not in places,
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
    images = images if kept.all() else subset(images, kept)
    files = [dataclasses.replace(file, split=TEST) for file, is_kept in zip(files, kept) if is_kept]
    labels = np.array([places[file.class_name] for file in files], "int64")
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
        """Views of arrays, because the images of a split are contiguous in the manifest."""
        start = splits.index(split)
        place = slice(start, start + splits.count(split))
        chosen = images[place] if isinstance(images, np.ndarray) else images.subset(place)
        return chosen, labels[place]

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
