"""Where images come from, and the order in which training sees them."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Collection, Sequence

import keras
import numpy as np

from keras_vit import files
from keras_vit.image_files import (
    COPY,
    TEST,
    TRAIN,
    VALIDATION,
    ImageError,
    ImageFile,
    check_trainable,
    list_folder,
    read_folder,
    warn_of_split,
)

# Sets whose classes a mirror changes: a mirrored 2 is no digit.
NOT_MIRRORED = {
    "binarized_mnist",
    "binary_alpha_digits",
    "cmaterdb",
    "emnist",
    "kmnist",
    "mnist",
    "mnist_corrupted",
    "omniglot",
    "svhn",
    "svhn_cropped",
}
# Hexadecimal digits of an image's digest that a model carries.
SHORT = 12
# What an image of a manifest is for that `limit_train` leaves out.
UNUSED = "unused"
# Share of the images that becomes the test set where a source has none; the seed never changes.
TEST_SHARE, TEST_SEED = 0.2, 0
# Side that images are resized to where those of a set differ in size or are larger than LARGEST.
RESIZED_SIDE, LARGEST = 64, 128

# Largest set of images that is kept on a GPU whole.
RESIDENT_BYTES = 4 * 2**30
# What Keras's own data sets name their arrays.
NPZ_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# Sets that go by their name even where a folder is called the same.
NAMED = ("cifar10", "cifar100", "digits")
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


class DatasetError(RuntimeError):
    """A data set is unknown, cannot be read or downloaded, or is not for image classification."""


class DatasetUnavailable(DatasetError):
    """A data set is not on disk, and the network or the disk keeps it from being downloaded."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images for training and testing, in memory, or mapped into it if they are large.

    `limit_train` and `hold_out` copy what they keep into memory.

    Attributes:
        name: string, the source.
        train_images, test_images: uint8 arrays `(N, H, W, C)`, 0 to 255.
        train_labels, test_labels: int64 arrays `(N,)`, 0 to `len(class_names) - 1`.
        class_names: list of strings.
        horizontal_flip: bool, whether a mirrored image keeps its class.
        validation: pair `(images, labels)` to validate on, if the source sets some apart.
        manifest: tuple of `ImageFile`, what a folder's files are for, those of each split in the
            order of its images; None of other sources.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    horizontal_flip: bool
    validation: tuple[np.ndarray, np.ndarray] | None = None
    manifest: tuple[ImageFile, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train_images.shape[1:]

    @property
    def seen(self) -> tuple[str, ...]:
        """Short digests of the images of a folder that are there to train or to validate on."""
        files = self.manifest or ()
        return tuple(x.digest[:SHORT] for x in files if x.split in (TRAIN, VALIDATION))

    def without(self, seen: Collection[str]) -> "Dataset":
        """The same data but for the test images of a folder whose short digest is among `seen`."""
        if self.manifest is None:
            return self
        is_new = [x.digest[:SHORT] not in seen for x in self.manifest if x.split == TEST]
        if all(is_new):
            return self
        images, labels = self.test_images[is_new], self.test_labels[is_new]
        files = [x for x in self.manifest if x.split != TEST or x.digest[:SHORT] not in seen]
        return dataclasses.replace(
            self, test_images=images, test_labels=labels, manifest=tuple(files)
        )

    def limit_train(self, count: int, seed: int) -> "Dataset":
        """The same data with at most `count` training images, each class in proportion."""
        return self._split_train(
            min(count, len(self.train_labels)), seed, f"limit_train={count}", UNUSED
        )[0]

    def hold_out(self, count: int, seed: int) -> tuple["Dataset", tuple[np.ndarray, np.ndarray]]:
        """Sets `count` training images aside, drawn from each class in proportion.

        Returns:
            The data without them, and the pair `(images, labels)` held out.

        Raises:
            ValueError: if the data have images to validate on, or too few for either side.
        """
        if self.validation is not None:
            raise ValueError(
                f"{self.name} has a validation set of {len(self.validation[1])} images. Leave out "
                "--validation, or move these images to those to train on. "
                f"Received: validation={count}"
            )
        received = f"validation={count}"
        count = len(self.train_labels) - count
        kept, aside = self._split_train(count, seed, received, VALIDATION)
        return kept, (self.train_images[aside], self.train_labels[aside])

    def _split_train(self, count, seed, received, split):
        total, classes = len(self.train_labels), len(self.class_names)
        if count == total:
            return self, np.empty(0, int)
        if not classes <= count <= total - classes:
            raise ValueError(
                f"{self.name} has {total} training images of {classes} classes, and a split leaves "
                f"{classes} or more on either side. Received: {received}"
            )
        kept, aside = stratified_split(self.train_labels, count, seed)
        manifest = self.manifest
        if manifest is not None:
            manifest = list(manifest)
            places = [place for place, file in enumerate(manifest) if file.split == TRAIN]
            for place in (places[index] for index in aside):
                manifest[place] = dataclasses.replace(manifest[place], split=split)
            manifest = tuple(manifest)
        images, labels = self.train_images[kept], self.train_labels[kept]
        data = dataclasses.replace(
            self, train_images=images, train_labels=labels, manifest=manifest
        )
        return data, aside


class Batches(keras.utils.PyDataset):
    """Training batches for `model.fit`, in an order that depends on seed and epoch alone.

    `fit` prepares iterators that it never uses, so that the order must not follow from how many
    there were: a callback calls `start_epoch`.

    Args:
        images: array `(N, H, W, C)`.
        labels: array `(N,)`.
        batch_size: int, images in a batch; the last one holds what is left.
        seed: int, at least 0.
    """

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.start_epoch(1)

    def start_epoch(self, epoch, skipped=0):
        """Shuffles the images anew for an epoch, counted from one, and leaves out first batches."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))
        self._order = order[skipped * self.batch_size :]

    @property
    def num_batches(self):
        return math.ceil(len(self._order) / self.batch_size)

    def __getitem__(self, index):
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return self._take(chosen)

    def _take(self, chosen):
        return self.images[chosen], self.labels[chosen]


class InOrder(Batches):
    """Batches of images as they stand, to measure a model on them.

    Args:
        images: array `(N, H, W, C)`.
        labels: array `(N,)`.
        batch_size: int, images in a batch; the last one holds what is left.
    """

    def __init__(self, images, labels, batch_size):
        super().__init__(images, labels, batch_size, seed=0)

    def start_epoch(self, epoch, skipped=0):
        self._order = np.arange(len(self.labels))


class DeviceBatches(Batches):
    """`Batches` for JAX, cut out of images that lie on the device.

    Only the numbers of the images travel to the device, which saves most of what the host does
    for a step. A set of more than `RESIDENT_BYTES` stays with the host.
    """

    def __init__(self, images, labels, batch_size, seed):
        import jax

        if images.nbytes <= RESIDENT_BYTES:
            images, labels = jax.device_put((images, labels.astype("int32")))
            self._cut = jax.jit(lambda images, labels, chosen: (images[chosen], labels[chosen]))
        super().__init__(images, labels, batch_size, seed)

    def _take(self, chosen):
        if isinstance(self.images, np.ndarray):
            return super()._take(chosen)
        return self._cut(self.images, self.labels, chosen)


def load_dataset(
    source: str = "cifar10",
    data_dir: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Dataset:
    """Loads labelled images for training and testing.

    Args:
        source: string, `"digits"` for the 1,797 scanned digits that
            scikit-learn carries, enlarged from 8x8 to 32x32 RGB; a file
            `*.npz` with Keras's arrays `x_train`, `y_train`, `x_test` and
            `y_test`, and `class_names` if it has them; a folder with one
            sub-folder of images per class, or with `train` and `test` above
            them, and `val` if it has images to validate on; or the name of
            any image classification set of TensorFlow Datasets, such as
            `"cifar10"`, whose images of different sizes, or with a side of over
            128 pixels, are resized to 64x64 (those of a folder to their
            median side, from 32 to 64). A set without a labelled test or
            validation split gives up a fifth of its images for one; in a
            folder, the path of each file inside it decides.
        data_dir: string, folder of prepared TensorFlow Datasets; by default
            `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
        image_size: int or pair `(height, width)`, pixels that the images of
            a folder are resized to.

    Returns:
        A `Dataset`.

    Raises:
        DatasetError: if the set is unknown, if it is neither on disk nor can
            be downloaded, or if it is not for image classification.
    """
    if is_folder(source):
        return _load_folder(pathlib.Path(source).expanduser(), image_size)
    if image_size is not None:
        raise DatasetError(f"an image size is for folders of images, and {source} is none")
    if source == "digits":
        return _load_digits()
    return _load_npz(source) if source.endswith(".npz") else _load_tfds(source, data_dir)


def is_folder(source):
    """Whether the source of a data set is a folder of images, not a set that goes by that name."""
    return source not in NAMED and files.is_folder(source)


def load_unseen(
    folder: str,
    image_size: tuple[int, int],
    class_names: Sequence[str] | None,
    seen: Collection[str],
) -> tuple[Dataset, dict[str, int]]:
    """Loads all images of a folder that a model has not seen, to test it on.

    Args:
        folder: string, a folder as `load_dataset` takes it, with some of the classes.
        image_size: pair `(height, width)`, pixels that images are resized to.
        class_names: names of the model's classes in their order; None for the sorted sub-folders.
        seen: short digests of the images that the model was trained or validated on; if empty,
            nobody knows them, and only what `load_dataset` tests on is taken.

    Returns:
        A `Dataset` whose test images they are, and whose training images as well; and how many
        images were left out, by the reason.

    Raises:
        DatasetError: if there is none, or if one in a hundred files cannot be read.
    """
    path = pathlib.Path(folder).expanduser()
    with _naming(path):
        listed, names = list_folder(path, TEST_SHARE)
        class_names = list(names if class_names is None else class_names)
        others = ", ".join(name for name in names if name not in class_names)
        if not set(names) & set(class_names):
            raise DatasetError(
                f"{folder} has images of {others}, expected some of {', '.join(class_names)}"
            )
        images, files = read_folder(path, listed, image_size)
    reasons = {
        "that the model was trained or validated on": lambda x: x.digest[:SHORT] in seen,
        "that are copies of others": lambda x: x.split == COPY,
        f"of classes that the model does not know ({others})": lambda x: (
            x.class_name not in class_names
        ),
        "of the training split (the model does not record its training images)": lambda x: (
            not seen and x.split != TEST
        ),
    }
    why = [next((y for y, holds in reasons.items() if holds(x)), None) for x in files]
    left_out = {reason: why.count(reason) for reason in reasons if reason in why}
    if len(files) < len(listed):
        left_out["that cannot be read"] = len(listed) - len(files)
    kept = np.array([reason is None for reason in why])
    if not kept.any():
        found = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DatasetError(f"{folder} has no image to test on, only {found}")
    images = images if kept.all() else images[kept]
    files = [dataclasses.replace(file, split=TEST) for file, taken in zip(files, kept) if taken]
    labels = np.array([class_names.index(file.class_name) for file in files], "int64")
    name, pair = path.resolve().name, (images, labels)
    return Dataset(name, *pair, *pair, class_names, True, manifest=tuple(files)), left_out


def digest(dataset):
    """A string that differs for different training images, labels or orders of them."""
    if dataset.manifest is not None:
        files = [(x.class_name, x.digest) for x in dataset.manifest if x.split == TRAIN]
        content = json.dumps([dataset.image_shape, dataset.class_names, files])
        return hashlib.sha256(content.encode()).hexdigest()
    images, labels = dataset.train_images, dataset.train_labels
    content = hashlib.sha256(str((images.shape, images.dtype, labels.dtype)).encode())
    for array in (images, labels):
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def stratified_split(labels, count, seed):
    """Splits indices into `count` and the rest, each class in proportion, both in rising order."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(
        np.arange(len(labels)), train_size=count, stratify=labels, random_state=seed
    )
    return np.sort(first), np.sort(second)


def _load_digits():
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = np.round(digits.images * (255 / 16)).astype("uint8")
    side = 32, 32
    images = [Image.fromarray(x).resize(side, Image.Resampling.BICUBIC) for x in scans]
    images = np.repeat(np.stack([np.asarray(x) for x in images])[..., None], 3, axis=-1)
    names = [str(name) for name in digits.target_names]
    return _split("digits", images, digits.target, names, horizontal_flip=False)


def _load_folder(folder, image_size):
    with _naming(folder):
        files, names = list_folder(folder, TEST_SHARE)
        check_trainable(folder, files, names)
        images, files = read_folder(folder, files, image_size)
        check_trainable(folder, files, names)
    warn_of_split(files, names)
    labels = np.array([names.index(file.class_name) for file in files], "int64")
    splits = [file.split for file in files]

    def part(split):
        """Views, as the manifest has the images of a split side by side."""
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
    )


@contextlib.contextmanager
def _naming(folder):
    """Turns what is wrong with a folder into a `DatasetError`."""
    try:
        yield
    except ImageError as error:
        raise DatasetError(str(error)) from error
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read: {error.strerror or error}") from error


def _load_npz(source):
    path = pathlib.Path(source)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in NPZ_ARRAYS]
            names = [str(name) for name in file["class_names"]] if "class_names" in file else None
    except OSError as error:
        raise DatasetError(f"{source} cannot be read: {error.strerror or error}") from error
    except UNREADABLE as error:
        wanted = ", ".join(NPZ_ARRAYS)
        raise DatasetError(f"{source} does not hold {wanted} ({_first_line(error)})") from error
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


def _load_tfds(source, data_dir):
    builder = _builder(source, data_dir)
    image_feature, label_feature = _supervised_features(builder)
    _prepare(builder)
    parts = [builder.name, builder.builder_config and builder.builder_config.name]
    mirror, names = NOT_MIRRORED.isdisjoint(parts), list(label_feature.names)
    train = _read_split(builder, "train", image_feature)
    if train is None:
        raise DatasetError(f"{source} has no labelled split named 'train' to learn from")
    for split in ("test", "validation"):
        test = _read_split(builder, split, image_feature)
        if test is not None:
            return Dataset(source, *train, *test, class_names=names, horizontal_flip=mirror)
    return _split(source, *train, class_names=names, horizontal_flip=mirror)


def _builder(source, data_dir):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(
            f"{source!r} is no folder of images, and sets of TensorFlow Datasets need packages "
            f"that are missing ({_first_line(error)}): try `pip install tensorflow-datasets`"
        ) from error
    try:
        return tfds.builder(source, data_dir=data_dir)
    except Exception as error:
        raise DatasetError(
            f"no data set named {source!r}: expected a folder of images, 'digits' or the name of "
            f"an image classification set of TensorFlow Datasets ({_first_line(error)})"
        ) from error


def _prepare(builder):
    """Downloads a set unless its files lie on disk."""
    if builder.is_prepared():
        return
    import tensorflow as tf
    import tensorflow_datasets as tfds

    of_network_or_disk = (
        OSError,  # Those of `requests` are among them.
        tfds.download.DownloadError,
        tf.errors.PermissionDeniedError,
        tf.errors.ResourceExhaustedError,
        tf.errors.UnavailableError,
    )
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        _ask_server(builder)
        builder.download_and_prepare(download_config=config)
    except of_network_or_disk as error:
        raise DatasetUnavailable(
            f"{builder.name} is not in {builder.data_dir} and could not be downloaded "
            f"({_first_line(error)}). Prepare it on a machine with a network by "
            f"`tfds build {builder.name}`, copy the folder, and name its parent with --data-dir "
            "or the environment variable TFDS_DATA_DIR"
        ) from error
    except Exception as error:
        raise DatasetError(
            f"{builder.name} could not be prepared in {builder.data_dir} ({_first_line(error)})"
        ) from error


def _ask_server(builder):
    """Raises where no network leads to a set's files: TensorFlow Datasets would try for minutes."""
    import requests

    url = next(iter(builder.url_infos or ()), "")
    # What it writes beside each file that it has downloaded, in older versions into one folder.
    notes = (f"downloads/{builder.name}/*.INFO", "downloads/*.INFO")
    is_downloaded = any(any(builder.data_dir_root.glob(note)) for note in notes)
    if url.startswith("http") and not is_downloaded:
        requests.head(url, timeout=10)


def _supervised_features(builder):
    """The features for image and label of a classification set."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys or ()
    pair = [features[key] for key in keys if isinstance(key, str)]
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(pair) != 2 or not all(map(isinstance, pair, kinds)) or pair[0].np_dtype != np.uint8:
        raise DatasetError(
            f"{builder.name} is not an image classification set: expected 8-bit images with one "
            f"label each, but it is supervised by {keys or 'nothing'}"
        )
    return pair


def _read_split(builder, split, image_feature):
    """Images and labels of one split as two arrays; None if it is not there or has no labels."""
    import tensorflow as tf

    if split not in builder.info.splits:
        return None
    try:
        return _read_arrays(builder, split, image_feature)
    except (OSError, StopIteration, tf.errors.OpError) as error:
        raise DatasetError(
            f"{builder.name} in {builder.data_dir} cannot be read ({_first_line(error)}): if it is "
            f"damaged, remove this folder and prepare it anew by `tfds build {builder.name}`"
        ) from error


def _read_arrays(builder, split, image_feature):
    import tensorflow as tf

    images = builder.as_dataset(split=split, as_supervised=True)
    _, first_label = next(iter(images.take(1)))
    if first_label < 0:  # How sets mark a label that is kept secret.
        return None
    height, width, _ = image_feature.shape
    if None in (height, width) or max(height, width) > LARGEST:
        side = RESIZED_SIDE, RESIZED_SIDE

        def resize(image, label):
            image = tf.image.resize(tf.cast(image, tf.float32), side, antialias=True)
            return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8), label

        images = images.map(resize, num_parallel_calls=tf.data.AUTOTUNE)
    whole = images.batch(builder.info.splits[split].num_examples).get_single_element()
    return tuple(np.asarray(array) for array in whole)


def _split(name, images, labels, class_names, horizontal_flip):
    """A `Dataset` out of images that nobody has split."""
    count = len(labels) - round(len(labels) * TEST_SHARE)
    try:
        train, test = stratified_split(labels, count, TEST_SEED)
    except ValueError as error:
        raise DatasetError(f"{name} has too few images to set some aside for testing") from error
    pairs = images[train], labels[train], images[test], labels[test]
    return Dataset(name, *pairs, class_names, horizontal_flip)


def _first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
