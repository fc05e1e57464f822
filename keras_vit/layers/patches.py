"""Cutting an image into the sequence of patches that a transformer reads."""

import keras
from keras import ops

from keras_vit.validation import positive_integer


@keras.saving.register_keras_serializable("keras_vit")
class Patches(keras.layers.Layer):
    """Cuts images into square patches that do not overlap.

    Patches are ordered row by row, from the top left corner to the bottom
    right. The values of a patch are ordered the same way, channels last, so
    that `patch.reshape(P, P, C)` is the patch as a small image.

    Input shape:
        4D tensor `(B, H, W, C)`; `H` and `W` are multiples of `patch_size`.

    Output shape:
        3D tensor `(B, N, P * P * C)` with `N = (H // P) * (W // P)`. Integers
        keep their dtype.

    Args:
        patch_size: int, side `P` of a patch in pixels, at least 1.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.

    Raises:
        ValueError: if `patch_size` is not a positive integer, or if it does
            not divide the height and the width of the images.

    Example:

    >>> images = np.random.uniform(0, 255, (2, 32, 32, 3))
    >>> keras_vit.Patches(4)(images).shape
    (2, 64, 48)
    """

    def __init__(self, patch_size: int, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = positive_integer("patch_size", patch_size)
        self._build_at_init()

    def call(self, images):
        rows, columns = self._grid(images.shape)
        side, channels = self.patch_size, images.shape[-1]
        grid = ops.reshape(images, (-1, rows, side, columns, side, channels))
        grid = ops.transpose(grid, (0, 1, 3, 2, 4, 5))
        return ops.reshape(grid, (-1, rows * columns, side * side * channels))

    def compute_output_shape(self, input_shape):
        rows, columns = self._grid(input_shape)
        return (input_shape[0], rows * columns, self.patch_size**2 * input_shape[-1])

    def compute_output_spec(self, images):
        return keras.KerasTensor(self.compute_output_shape(images.shape), images.dtype)

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}

    def _grid(self, input_shape):
        """Rows and columns of patches in images of shape `(B, H, W, C)`."""
        if len(input_shape) != 4 or None in input_shape[1:]:
            raise ValueError(
                "Expected images of shape (batch, height, width, channels) with a known "
                f"height, width and number of channels. Received: shape={tuple(input_shape)}"
            )
        _, height, width, _ = input_shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                "Expected `patch_size` to divide the height and the width of the images. "
                f"Received: patch_size={self.patch_size}, height={height}, width={width}"
            )
        return height // self.patch_size, width // self.patch_size
