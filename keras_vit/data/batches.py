"""Batches of images for training and validation, and their order."""

import math

import keras
import numpy as np

from keras_vit import distribution
from keras_vit.data.streaming import StreamedImages
from keras_vit.devices import on_jax_accelerator

# Largest training set that is kept in the memory of a GPU.
RESIDENT_BYTES = 4 * 2**30
# Batches whose images are read while a model trains on the one before.
AHEAD = 2


class Batches(keras.utils.PyDataset):
    """Training batches for `model.fit`, in an order that depends on seed and epoch only.

    `fit` creates iterators that it never uses, so the order must not depend on their number: a
    callback calls `start_epoch` instead.

    If training is distributed, each process gets its part of every batch, and the images that do
    not fill a batch on all devices, others in each epoch, are left out.

    Args:
        images: array `(N, H, W, C)`, or `StreamedImages`, of which two batches are read ahead.
        labels: array `(N,)`.
        batch_size: int, images per batch of all processes; the last batch may be smaller.
        seed: int, at least 0.

    Raises:
        ValueError: if `batch_size` is no multiple of the number of devices.
    """

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        distribution.check_batch_size(batch_size)
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.start_epoch(1)

    def start_epoch(self, epoch, skipped=0):
        """Reshuffles the images for an epoch, counted from one, and skips its first batches."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))
        used = len(order) - len(order) % distribution.devices()
        self._order = order[skipped * self.batch_size : used]

    @property
    def num_batches(self):
        return math.ceil(len(self._order) / self.batch_size)

    def __getitem__(self, index):
        if isinstance(self.images, StreamedImages):
            following = range(index, min(index + 1 + AHEAD, self.num_batches))
            self.images.read_ahead(np.concatenate([self._indices(i) for i in following]))
        return self._take(self._indices(index))

    def _indices(self, index):
        batch = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return distribution.own_part(batch)

    def _take(self, indices):
        return self.images[indices], self.labels[indices]


class InOrder(Batches):
    """Batches of images in their original order, for evaluation.

    If evaluation is distributed, the last batch is padded with copies of an image, of weight zero
    and class -1. Keras divides by all images, so its loss and accuracy are too small by the factor
    `padding`.

    Args:
        images: array `(N, H, W, C)`.
        labels: array `(N,)`.
        batch_size: int, images per batch; the last batch may be smaller.
    """

    def __init__(self, images, labels, batch_size):
        super().__init__(images, labels, batch_size, seed=0)

    def start_epoch(self, epoch, skipped=0):
        count = distribution.devices()
        self._order = np.arange(math.ceil(len(self.labels) / count) * count)

    @property
    def padding(self):
        """Number of images with those that pad, divided by that without them."""
        return len(self._order) / len(self.labels)

    def __getitem__(self, index):
        if self.padding == 1:
            return super().__getitem__(index)
        indices = self._indices(index)
        real = indices < len(self.labels)
        images, labels = self._take(np.where(real, indices, 0))
        return images, np.where(real, labels, -1), real.astype("float32")


class DeviceBatches(Batches):
    """`Batches` for JAX, gathered on the device from a training set that is kept there.

    Only the indices of a batch are transferred for a step, which saves most of the host's work. A
    training set of more than `RESIDENT_BYTES` stays on the host.
    """

    def __init__(self, images, labels, batch_size, seed):
        import jax

        if images.nbytes <= RESIDENT_BYTES:
            images, labels = jax.device_put((images, labels.astype("int32")))
            self._gather = jax.jit(lambda images, labels, i: (images[i], labels[i]))
        super().__init__(images, labels, batch_size, seed)

    def _take(self, indices):
        if isinstance(self.images, np.ndarray):
            return super()._take(indices)
        return self._gather(self.images, self.labels, indices)


def batches_of(images, labels, batch_size, seed):
    """Training batches as `Batches`, on the device where the backend benefits from it."""
    in_memory, one_device = isinstance(images, np.ndarray), distribution.devices() == 1
    on_device = on_jax_accelerator() and in_memory and one_device
    kind = DeviceBatches if on_device else Batches
    return kind(images, labels, batch_size, seed)


def fed(batches):
    """Batches in the form that Keras reads fastest.

    On TensorFlow, Keras would convert them to a `tf.data.Dataset` with autotuning. The autotuning
    thread sleeps for up to a minute, and the end of each epoch waits for it (as of TensorFlow
    2.21): here autotuning is off.

    Args:
        batches: a `keras.utils.PyDataset` of arrays.

    Returns:
        A `tf.data.Dataset`, or, on other backends, the batches themselves.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    count = batches.num_batches
    dataset = tf.data.Dataset.from_generator(
        lambda: (batches[index] for index in range(count)),
        output_signature=tuple(tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in batches[0]),
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(count))
    return dataset.prefetch(2).with_options(options)
