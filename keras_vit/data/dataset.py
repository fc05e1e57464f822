"""Labelled images for training and testing, and how they are split."""

import dataclasses
import hashlib
import json
from collections.abc import Collection

import numpy as np

from keras_vit.data.folders import (
    COPY,
    TEST,
    TEST_FRACTION,
    TRAIN,
    VALIDATION,
    ImageFile,
)
from keras_vit.data.streaming import StreamedImages, subset
from keras_vit.messages import enumerated, warn

# Data sets whose classes are not invariant to horizontal flips, such as digits.
NOT_MIRRORED = {
    "binarized_mnist",
    "binary_alpha_digits",
    "cmaterdb",
    "emnist",
    "gtsrb",
    "kmnist",
    "mnist",
    "mnist_corrupted",
    "omniglot",
    "svhn",
    "svhn_cropped",
}
# Hexadecimal digits of the image digests that are saved with a model.
SHORT = 12
# The split of images that `limit_train` leaves out.
UNUSED = "unused"
# Of the split of data without a test set; it never changes.
TEST_SEED = 0
# Images and their labels.
Pair = tuple[np.ndarray | StreamedImages, np.ndarray]


class DatasetError(RuntimeError):
    """A data set is unknown, cannot be read or downloaded, or is not for image classification."""


class DatasetUnavailable(DatasetError):
    """A data set is not on disk and cannot be downloaded, because of the network or the disk."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images for training and testing: in memory, memory-mapped, or read when needed.

    Where not all images fit into the cache, or a part of those on disk was chosen, they are no
    array but `StreamedImages`, which are indexed like one.

    Attributes:
        name: string, the source.
        train_images: uint8 array `(N, H, W, C)`, 0 to 255, or `StreamedImages`.
        train_labels: int64 array `(N,)`, 0 to `len(class_names) - 1`.
        test_images: like `train_images`.
        test_labels: like `train_labels`.
        class_names: list of strings.
        horizontal_flip: bool, whether a flipped image keeps its class.
        validation: pair `(images, labels)`, the validation set of a folder that has one.
        manifest: tuple of `ImageFile`, the files of a folder, those of each split in the order of
            its images; None for other sources.
        resize: string, how images of another aspect ratio were fitted to the size of these, as
            for `read_image`.
        test_indices: int array, which test images of the source these are; None for all of them,
            and for a folder.
    """

    name: str
    train_images: np.ndarray | StreamedImages
    train_labels: np.ndarray
    test_images: np.ndarray | StreamedImages
    test_labels: np.ndarray
    class_names: list[str]
    horizontal_flip: bool
    validation: Pair | None = None
    manifest: tuple[ImageFile, ...] | None = None
    resize: str = "squash"
    test_indices: np.ndarray | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train_images.shape[1:]

    @property
    def seen(self) -> tuple[str, ...]:
        """Short digests of the training and validation images of a folder."""
        files = self.manifest or ()
        return tuple(x.digest[:SHORT] for x in files if x.split in (TRAIN, VALIDATION))

    def without(self, seen: Collection[str]) -> "Dataset":
        """The same data without the test images of a folder whose short digest is in `seen`."""
        if self.manifest is None:
            return self
        seen = frozenset(seen)
        is_new = [x.digest[:SHORT] not in seen for x in self.manifest if x.split == TEST]
        if all(is_new):
            return self
        is_new = np.array(is_new)
        images, labels = subset(self.test_images, is_new), self.test_labels[is_new]
        files = [x for x in self.manifest if x.split != TEST or x.digest[:SHORT] not in seen]
        return dataclasses.replace(
            self, test_images=images, test_labels=labels, manifest=tuple(files)
        )

    def for_training(
        self, validation: int, limit_train: int | None, seed: int
    ) -> tuple["Dataset", Pair | None]:
        """Applies `hold_out` and then `limit_train`.

        Args:
            validation: int, number of training images to hold out; 0 for the validation set of
                the source, if any.
            limit_train: int, maximum number of training images; None for all.
            seed: int.

        Returns:
            The data, and the validation set `(images, labels)` or None.
        """
        data, held_out = self, self.validation
        if validation:
            data, held_out = data.hold_out(validation, seed)
        if limit_train:
            data = data.limit_train(limit_train, seed)
        return data, held_out

    def limit_train(self, count: int, seed: int) -> "Dataset":
        """The same data with at most `count` training images, stratified by class.

        Raises:
            ValueError: if a class would have no training image left.
        """
        received = f"limit_train={count}"
        count = min(count, len(self.train_labels))
        limited, _ = self._split_train(count, seed, received, UNUSED)
        for label in self._classes_lost_in(limited):
            raise ValueError(
                f"Class {self.class_names[label]!r} would have no training image left: take more. "
                f"Received: {received}"
            )
        return limited

    def hold_out(self, count: int, seed: int) -> tuple["Dataset", Pair]:
        """Holds out a validation set of `count` training images, stratified by class.

        Returns:
            The data without them, and the pair `(images, labels)` held out.

        Raises:
            ValueError: if there already is a validation set, or if there are too few images.
        """
        if self.validation is not None:
            raise ValueError(
                f"{self.name} has a validation set of {len(self.validation[1])} images already: "
                "leave out --validation, or move these images to the training set. "
                f"Received: validation={count}"
            )
        received = f"validation={count}"
        count = len(self.train_labels) - count
        kept, held_out = self._split_train(count, seed, received, VALIDATION)
        pair = subset(self.train_images, held_out), self.train_labels[held_out]
        left = kept._without_copies_of_validation()
        for label in self._classes_lost_in(left):
            reason = "are all held out for validation: hold out fewer"
            if label in kept.train_labels:
                reason = "are copies of those held out for validation: add others"
            raise ValueError(
                f"The training images of class {self.class_names[label]!r} {reason}. "
                f"Received: {received}"
            )
        return left, pair

    def _classes_lost_in(self, part):
        """Labels of the training images that a part of the data has no training image of."""
        return sorted(set(self.train_labels.tolist()).difference(part.train_labels.tolist()))

    def _without_copies_of_validation(self):
        """The same data without training images whose content is held out, too."""
        if self.manifest is None:
            return self
        held_out = {x.digest for x in self.manifest if x.split == VALIDATION}
        files = [
            dataclasses.replace(x, split=COPY) if x.split == TRAIN and x.digest in held_out else x
            for x in self.manifest
        ]
        pairs = zip(self.manifest, files, strict=True)
        kept = np.array([new is old for old, new in pairs if old.split == TRAIN])
        if all(kept):
            return self
        images, labels = subset(self.train_images, kept), self.train_labels[kept]
        return dataclasses.replace(
            self, train_images=images, train_labels=labels, manifest=tuple(files)
        )

    def _split_train(self, count, seed, received, split):
        total, classes = len(self.train_labels), len(self.class_names)
        if count == total:
            return self, np.empty(0, int)
        if not classes <= count <= total - classes:
            raise ValueError(
                f"{self.name} has {total} training images of {classes} classes: a split must leave "
                f"at least {classes} images on either side. Received: {received}"
            )
        kept, held_out = stratified_split(self.train_labels, count, seed)
        manifest = self.manifest
        if manifest is not None:
            manifest = list(manifest)
            places = [place for place, file in enumerate(manifest) if file.split == TRAIN]
            for place in (places[index] for index in held_out):
                manifest[place] = dataclasses.replace(manifest[place], split=split)
            manifest = tuple(manifest)
        images, labels = subset(self.train_images, kept), self.train_labels[kept]
        data = dataclasses.replace(
            self, train_images=images, train_labels=labels, manifest=manifest
        )
        return data, held_out


def digest(dataset):
    """A digest of the training images, their labels and their order."""
    if dataset.manifest is not None:
        files = [(x.class_name, x.digest) for x in dataset.manifest if x.split == TRAIN]
        content = json.dumps([dataset.image_shape, dataset.class_names, files])
        if dataset.resize != "squash":  # The digest of earlier versions, which knew no other.
            content += dataset.resize
        return hashlib.sha256(content.encode()).hexdigest()
    return digest_of_arrays(dataset.train_images, dataset.train_labels)


def digest_of_arrays(images, labels):
    """A digest of images, their labels and their order."""
    content = hashlib.sha256(str((images.shape, images.dtype, labels.dtype)).encode())
    for array in (images, labels):
        for start in range(0, len(array), 1024):  # All of them may be more than memory holds.
            content.update(np.ascontiguousarray(array[start : start + 1024]).data)
    return content.hexdigest()


def warn_of_copies(dataset):
    """Warns of the same image in training and test, or with different labels, of arrays.

    `warn_of_split` does so for folders.
    """
    trained, tested = [
        [
            hashlib.blake2b(image.tobytes()).digest()
            for start in range(0, len(images), 1024)  # Which threads read at once.
            for image in images[start : start + 1024]
        ]
        for images in (dataset.train_images, dataset.test_images)
    ]
    first = {digest: index for index, digest in reversed(list(enumerate(trained)))}
    both = [(index, first[digest]) for index, digest in enumerate(tested) if digest in first]
    if both:
        pairs = [f"{index} is training image {other}" for index, other in both]
        warn(
            f"{len(both)} of {len(tested)} test images of {dataset.name} are training images, too: "
            + enumerated(pairs)
        )
    labels = {}
    for digest, label in zip(trained + tested, [*dataset.train_labels, *dataset.test_labels]):
        labels.setdefault(digest, set()).add(label)
    twice = [{dataset.class_names[label] for label in x} for x in labels.values() if len(x) > 1]
    if twice:
        classes = [" and ".join(sorted(names)) for names in twice]
        count = f"{len(twice)} images" if len(twice) > 1 else "1 image"
        warn(f"{count} of {dataset.name} in more than one class: {enumerated(classes)}")


def stratified_split(labels, count, seed):
    """Splits indices into `count` and the rest, stratified by label, both in ascending order."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(
        np.arange(len(labels)), train_size=count, stratify=labels, random_state=seed
    )
    return np.sort(first), np.sort(second)


def split_off_test(name, images, labels, class_names, horizontal_flip):
    """A `Dataset` from images without a test set: a fraction of them is held out."""
    count = len(labels) - round(len(labels) * TEST_FRACTION)
    try:
        train, test = stratified_split(labels, count, TEST_SEED)
    except ValueError as error:
        raise DatasetError(f"{name} has too few images to hold out a test set") from error
    pairs = subset(images, train), labels[train], subset(images, test), labels[test]
    return Dataset(name, *pairs, class_names, horizontal_flip, test_indices=test)
