"""Data sets of labelled images, and the batches that training reads."""

from keras_vit.data.batches import Batches, DeviceBatches, InOrder
from keras_vit.data.dataset import Dataset, DatasetError, DatasetUnavailable
from keras_vit.data.images import ImageError, read_image
from keras_vit.data.sources import (
    different_classes,
    has_fixed_size,
    is_folder,
    is_of_tfds,
    load_dataset,
    load_unseen,
)
from keras_vit.data.streaming import StreamedImages
from keras_vit.data.tfds import import_packages

__all__ = [
    "Batches",
    "Dataset",
    "DatasetError",
    "DatasetUnavailable",
    "DeviceBatches",
    "ImageError",
    "InOrder",
    "StreamedImages",
    "different_classes",
    "has_fixed_size",
    "import_packages",
    "is_folder",
    "is_of_tfds",
    "load_dataset",
    "load_unseen",
    "read_image",
]
