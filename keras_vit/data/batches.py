"""The batches that training and validation see, and their order."""

import math

import keras
import numpy as np

from keras_vit.devices import on_jax_accelerator

# Largest set of images that is kept on a GPU whole.
RESIDENT_BYTES = 4 * 2**30


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


def batches_of(images, labels, batch_size, seed):
    """Training batches as `Batches`, kept where the backend reads them fastest."""
    kind = DeviceBatches if on_jax_accelerator() else Batches
    return kind(images, labels, batch_size, seed)


def fed(batches):
    """Batches as Keras reads them without waiting.

    On TensorFlow, Keras makes a `tf.data.Dataset` of them. The thread that would tune it sleeps up
    to a minute at a time, and the end of each epoch waits for it to wake (seen with TensorFlow
    2.21): here nothing is tuned.

    Args:
        batches: a `keras.utils.PyDataset` of arrays.

    Returns:
        A `tf.data.Dataset`, or on other backends the batches as they are.
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
