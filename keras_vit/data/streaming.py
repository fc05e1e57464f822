"""Images that are read as they are needed, because all of them would not fit into memory."""

import collections
import concurrent.futures
import functools
import typing

import numpy as np

# Images whose pixels take more than this in all have their normalization adapted on a sample.
LARGEST_ADAPTED, SAMPLE = 2 * 2**30, 16_384


class StreamedImages:
    """uint8 images `(N, H, W, C)` that are read by parallel threads when they are indexed.

    `images[indices]` is the array that an array of all images would give; the pixels are not kept.
    `subset` is what indexing is to an array: the chosen images, none of which is read yet.

    Args:
        read: function from a row, an int, to its image `(H, W, C)`, which several threads call
            at once. What it raises, indexing raises.
        shape: tuple `(N, H, W, C)`.
        rows: integer array `(N,)`, the rows of `read` in the order of the images; by default
            0 to `N - 1`.
    """

    dtype, ndim = np.dtype("uint8"), 4

    def __init__(self, read, shape, rows=None):
        self._read, self.shape = read, tuple(shape)
        self._rows = np.arange(self.shape[0]) if rows is None else rows
        self._ahead = {}  # Images that are being read, by row.

    def __len__(self):
        return self.shape[0]

    @property
    def nbytes(self):
        return int(np.prod(self.shape, dtype="int64"))

    def __getitem__(self, key):
        rows = self._rows[key]
        if np.ndim(rows) == 0:
            return self._read(int(rows))
        waiting = collections.deque(map(self._submitted, rows.tolist()))
        images = np.empty((len(rows), *self.shape[1:]), "uint8")
        for place in range(len(images)):
            images[place] = waiting.popleft().result()
        return images

    def read_ahead(self, indices):
        """Starts to read images that are indexed next; forgets others that were not asked for.

        Args:
            indices: integer array, in the order in which the images will be needed. Their pixels
                stay in memory until they are indexed or forgotten.
        """
        ahead = {row: self._submitted(row) for row in self._rows[indices].tolist()}
        for forgotten in self._ahead.values():
            forgotten.cancel()
        self._ahead = ahead

    def _submitted(self, row):
        return self._ahead.pop(row, None) or _threads().submit(lambda: self._read(row))

    def subset(self, key):
        """The images of a slice, of indices or of a boolean mask, as `StreamedImages`."""
        rows = self._rows[key]
        return StreamedImages(self._read, (len(rows), *self.shape[1:]), rows)


@functools.cache
def _threads():
    """Pillow and NumPy let other threads run while they decode, resize and copy."""
    return concurrent.futures.ThreadPoolExecutor(thread_name_prefix="images")


def subset(images, key):
    """The images of a slice, of indices or of a boolean mask; those on disk stay there.

    Args:
        images: array `(N, H, W, C)`, in memory or memory-mapped; or `StreamedImages`.
        key: slice, integer array, or boolean array `(N,)`.

    Returns:
        Array, or `StreamedImages`.
    """
    if isinstance(images, np.memmap):
        images = StreamedImages(images.__getitem__, images.shape)
    return images.subset(key) if isinstance(images, StreamedImages) else images[key]


def sample(images) -> typing.Any:
    """The images that a model's normalization is adapted on.

    Args:
        images: array `(N, H, W, C)` or `StreamedImages`.

    Returns:
        The same, or a random but fixed choice of 16,384 of more images that take over 2 GiB. It
        depends on their number and size alone, not on where they are kept.
    """
    if images.nbytes <= LARGEST_ADAPTED or len(images) <= SAMPLE:
        return images
    print(f"Normalization is adapted on {SAMPLE:,} of {len(images):,} training images.")
    chosen = np.random.default_rng(0).choice(len(images), SAMPLE, replace=False)
    return subset(images, np.sort(chosen))
