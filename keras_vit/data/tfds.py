"""Image classification sets of TensorFlow Datasets."""

import numpy as np

from keras_vit.data.dataset import (
    NOT_MIRRORED,
    Dataset,
    DatasetError,
    DatasetUnavailable,
    first_line,
    split_off_test,
)

# Side that images are resized to where those of a set differ in size or are larger than LARGEST.
RESIZED_SIDE, LARGEST = 64, 128


def load_tfds(source, data_dir):
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
    return split_off_test(source, *train, class_names=names, horizontal_flip=mirror)


def _builder(source, data_dir):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetError(
            f"{source!r} is no folder of images, and sets of TensorFlow Datasets need packages "
            f"that are missing ({first_line(error)}): try `pip install tensorflow tensorflow-datasets`"
        ) from error
    try:
        return tfds.builder(source, data_dir=data_dir)
    except Exception as error:
        raise DatasetError(
            f"no data set named {source!r}: expected a folder of images, 'digits' or the name of "
            f"an image classification set of TensorFlow Datasets ({first_line(error)})"
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
            f"({first_line(error)}). Prepare it on a machine with a network by "
            f"`tfds build {builder.name}`, copy the folder, and name its parent with --data-dir "
            "or the environment variable TFDS_DATA_DIR"
        ) from error
    except Exception as error:
        raise DatasetError(
            f"{builder.name} could not be prepared in {builder.data_dir} ({first_line(error)})"
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
            f"{builder.name} in {builder.data_dir} cannot be read ({first_line(error)}): if it is "
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
