"""Image classification data sets of TensorFlow Datasets."""

import contextlib
import dataclasses
import math
import pathlib
import typing

import keras
import numpy as np

from keras_vit.data import cache, tfrecord
from keras_vit.data.dataset import (
    NOT_MIRRORED,
    Dataset,
    DatasetError,
    DatasetUnavailable,
    split_off_test,
)
from keras_vit.data.images import ImageError, first_line, nearest_multiple
from keras_vit.data.streaming import StreamedImages

# Side that images are resized to if they differ in size or have a side larger than LARGEST.
RESIZED_SIDE, LARGEST = 64, 128


def load_tfds(source, data_dir, image_size=None, resize="squash", multiple_of=1, test_only=False):
    """A `Dataset` of TensorFlow Datasets.

    With `test_only`, the test images are its training images, too, where there are such; and
    `class_names` is empty if the labels are only numbers.
    """
    builder = _builder(source, data_dir)
    image_feature, label_feature = _supervised_features(builder)
    _prepare(builder)
    parts = [builder.name, builder.builder_config and builder.builder_config.name]
    mirror, names = NOT_MIRRORED.isdisjoint(parts), list(label_feature.names)
    size = _new_size(image_feature.shape, image_size, multiple_of)
    if test_only and names == [str(label) for label in range(len(names))]:
        names = []
    tests = (_read_split(builder, split, size, resize) for split in ("test", "validation"))
    test = next((pair for pair in tests if pair is not None), None)
    train = test
    if not test_only or test is None:
        train = _read_split(builder, "train", size, resize, test and test[0])
    if train is None:
        raise DatasetError(f"{source} has no labelled split named 'train'")
    if test is None:
        dataset = split_off_test(source, *train, class_names=names, horizontal_flip=mirror)
    else:
        dataset = Dataset(source, *train, *test, class_names=names, horizontal_flip=mirror)
    return dataclasses.replace(dataset, resize=resize)


def _new_size(shape, image_size, multiple_of):
    """The height and width that images of a shape are resized to; None if they keep theirs."""
    own = shape[:2]
    size = image_size
    if size is None:
        keeps = None not in own and max(own) <= LARGEST
        size = own if keeps else (RESIZED_SIDE, RESIZED_SIDE)
        size = tuple(nearest_multiple(side, multiple_of) for side in size)
    return None if tuple(own) == tuple(size) else size


def import_packages():
    """Imports TensorFlow Datasets; TensorFlow leaves GPUs to another backend of Keras.

    Raises:
        ImportError: if a package is missing.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if keras.backend.backend() != "tensorflow":
        with contextlib.suppress(RuntimeError):  # The caller's own TensorFlow has them already.
            tf.config.set_visible_devices([], "GPU")
    return tfds


def _builder(source, data_dir):
    try:
        tfds = import_packages()
    except ImportError as error:
        raise DatasetError(
            f"{source!r} is not a folder of images, and TensorFlow Datasets needs packages "
            f"that are missing ({first_line(error)}): try "
            "`pip install tensorflow tensorflow-datasets`"
        ) from error
    try:
        return tfds.builder(source, data_dir=data_dir)
    except Exception as error:
        raise DatasetError(
            f"no data set named {source!r}: expected a folder of images, 'digits' or the name of "
            f"an image classification set of TensorFlow Datasets ({first_line(error)})"
        ) from error


def _prepare(builder):
    """Downloads and prepares a data set unless it is on disk."""
    if builder.is_prepared():
        return
    import tensorflow as tf
    import tensorflow_datasets as tfds

    network_or_disk_errors = (
        OSError,  # Includes the exceptions of `requests`.
        tfds.download.DownloadError,
        tf.errors.PermissionDeniedError,
        tf.errors.ResourceExhaustedError,
        tf.errors.UnavailableError,
    )
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        _check_network(builder)
        builder.download_and_prepare(download_config=config)
    except network_or_disk_errors as error:
        raise DatasetUnavailable(
            f"{builder.name} is not in {builder.data_dir} and could not be downloaded "
            f"({first_line(error)}). Prepare it on a machine with network access with "
            f"`tfds build {builder.name}`, copy the folder, and pass its parent folder by "
            "--data-dir or the environment variable TFDS_DATA_DIR"
        ) from error
    except Exception as error:
        raise DatasetError(
            f"{builder.name} could not be prepared in {builder.data_dir} ({first_line(error)})"
        ) from error


def _check_network(builder):
    """Raises at once if the download server is unreachable, which takes `tfds` minutes."""
    import requests

    url = next(iter(builder.url_infos or ()), "")
    # Written beside each downloaded file; older versions use a single folder.
    patterns = (f"downloads/{builder.name}/*.INFO", "downloads/*.INFO")
    is_downloaded = any(any(builder.data_dir_root.glob(x)) for x in patterns)
    if url.startswith("http") and not is_downloaded:
        requests.head(url, timeout=10)


def _supervised_features(builder):
    """The image and label features of a classification data set."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys or ()
    pair = [features[key] for key in keys if isinstance(key, str)]
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(pair) != 2 or not all(map(isinstance, pair, kinds)) or pair[0].np_dtype != np.uint8:
        raise DatasetError(
            f"{builder.name} is not an image classification set: expected 8-bit images with one "
            f"label each, but its supervised keys are {keys or 'missing'}"
        )
    return pair


def _read_split(builder, split, size, resize, other=None):
    """Images and labels of a split as two arrays; None if it is missing or unlabelled.

    `other` are the images that will be used together with them, if any.
    """
    import tensorflow as tf

    if split not in builder.info.splits:
        return None
    try:
        return _read_arrays(builder, split, size, resize, other)
    except ImageError as error:
        raise DatasetError(f"{builder.name}: {error}") from error
    except (OSError, StopIteration, tf.errors.OpError) as error:
        raise DatasetError(
            f"{builder.name} in {builder.data_dir} cannot be read ({first_line(error)}): if it is "
            f"damaged, remove this folder and prepare it again with `tfds build {builder.name}`"
        ) from error


def _read_arrays(builder, split, size, resize, other) -> typing.Any:
    import tensorflow as tf

    images = builder.as_dataset(split=split, as_supervised=True)
    if size is not None:
        images = images.map(
            lambda image, label: (_fitted(image, size, resize), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    first, first_label = next(iter(images.take(1)))
    if first_label < 0:  # Marks labels that are not public.
        return None
    count = builder.info.splits[split].num_examples
    shape = (count, *first.shape)
    if math.prod(shape) > cache.IN_MEMORY:
        files = [(name, path.stat()) for name, path in _shards(builder, split)]
        stats = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
        identity = [builder.info.full_name, str(builder.data_dir), split, shape, resize, stats]
        stored = cache.stored(identity, shape, images.batch(256).as_numpy_iterator, other)
        return stored or _streamed(builder, split, size, resize, shape, stats)
    arrays = images.batch(count).get_single_element()
    return tuple(np.asarray(array) for array in arrays)


def _streamed(builder, split, size, resize, shape, stats):
    """The images of a split, which are read from its records as they are needed, and all labels."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    info, paths = builder.info, dict(_shards(builder, split))
    if info.file_format is not tfds.core.FileFormat.TFRECORD:
        raise ImageError(
            f"files of format {info.file_format.value} cannot be read as they are needed: choose a "
            f"smaller --image-size, raise {cache.LIMIT}, or save the images in a folder with a "
            "sub-folder for each class"
        )
    image_key, label_key = info.supervised_keys

    def index():
        """File and offset of each record, and its label, in the order of `as_dataset`."""
        print(f"Listing {shape[0]:,} images of {builder.name}, once")
        offsets = {name: tfrecord.offsets(path) for name, path in paths.items()}
        examples = builder.as_dataset(
            split=split,
            decoders={image_key: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(add_tfds_id=True),
        )
        records, labels = [], []
        for example in examples.as_numpy_iterator():
            name, number = example["tfds_id"].decode().rsplit("__", 1)
            records.append([name, offsets[name][int(number)]])
            labels.append(int(example[label_key]))
        return [records, labels]

    identity = ["records", info.full_name, str(builder.data_dir), split, stats]
    records, labels = cache.remembered(identity, index)

    def read(row):
        name, offset = records[row]
        try:
            example = info.features.deserialize_example(tfrecord.read(paths[name], offset))
            image = example[image_key]
            return (image if size is None else _fitted(image, size, resize)).numpy()
        except OSError as error:
            reason = first_line(error)
        except (tf.errors.OpError, ValueError):  # Whose message is the record itself.
            reason = f"its record at byte {offset:,} is damaged"
        raise ImageError(f"{paths[name]} cannot be read any more: {reason}")

    return StreamedImages(read, shape), np.array(labels, "int64")


def _shards(builder, split):
    """Names and paths of the files of a split."""
    paths = map(pathlib.Path, builder.info.splits[split].filepaths)
    return [(path.name, path) for path in paths]


def _fitted(image, size, resize):
    """A uint8 image in another size, as `read_image` fits those of files."""
    import tensorflow as tf

    def whole(numbers):
        return tf.cast(tf.round(numbers), tf.int32)

    sides, new = (tf.cast(x, tf.float64) for x in (tf.shape(image)[:2], size))
    inner = size
    if resize == "crop":  # The largest box of the new aspect ratio, in the middle.
        box = tf.maximum(whole(new * tf.reduce_min(sides / new)), 1)
        place = (tf.shape(image)[:2] - box) // 2
        image = tf.image.crop_to_bounding_box(image, *tf.unstack(place), *tf.unstack(box))
    elif resize == "pad":
        inner = tf.maximum(whole(sides * tf.reduce_min(new / sides)), 1)
    image = tf.image.resize(tf.cast(image, tf.float32), inner, antialias=True)
    if resize == "pad":
        place = whole((new - tf.cast(inner, tf.float64)) / 2)
        image = tf.image.pad_to_bounding_box(image, *tf.unstack(place), *size)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
