"""The learned embeddings of patches and positions, as arrays to look at."""

import numpy as np

from keras_vit.validation import grid_of_patches, positive_integer


def patch_filters(
    kernel: np.ndarray, patch_size: int, count: int = 28
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the filters of a patch embedding (Dosovitskiy et al., 2021).

    Each of the `D` values of a token is a weighted sum of the pixels of its patch: a filter. The
    first components are the patterns that these filters are mostly made of.

    Args:
        kernel: array `(P * P * C, D)`, the first weight of the model's layer
            `patch_embedding`.
        patch_size: int, side `P` of a patch in pixels.
        count: int, number of components; fewer are returned if there are fewer.

    Returns:
        Array `(count, P, P, C)`, the components as small images, each of norm one; of the two signs
        that a component may have, the one that makes its largest weight positive. And array
        `(count,)`, the fraction of the variance of the filters that each explains, largest first.

    Raises:
        ValueError: if the kernel has another shape, or if an integer is not positive.

    Example:

    >>> kernel, bias = model.get_layer("patch_embedding").get_weights()
    >>> filters, explained = keras_vit.patch_filters(kernel, patch_size=4)
    >>> filters.shape
    (28, 4, 4, 3)
    """
    kernel = _as_floats(kernel)
    patch_size = positive_integer("patch_size", patch_size)
    count = positive_integer("count", count)
    if kernel.ndim != 2 or 0 in kernel.shape or kernel.shape[0] % patch_size**2:
        raise ValueError(
            "Expected `kernel` of shape (patch_size * patch_size * channels, embed_dim). "
            f"Received: kernel.shape={kernel.shape}, patch_size={patch_size}"
        )
    centered = kernel - kernel.mean(axis=1, keepdims=True)
    components, deviations, _ = np.linalg.svd(centered, full_matrices=False)
    components, variances = components.T[:count], deviations**2
    largest = np.take_along_axis(components, abs(components).argmax(axis=1)[:, None], axis=1)
    filters = (components * np.where(largest < 0, -1, 1)).reshape(
        len(components), patch_size, patch_size, -1
    )
    return filters, variances[:count] / max(variances.sum(), np.finfo(kernel.dtype).tiny)


def position_similarity(
    positions: np.ndarray, grid: tuple[int, int], class_token: bool = True
) -> np.ndarray:
    """Cosine similarity of the position embeddings of patches (Dosovitskiy et al., 2021).

    Args:
        positions: array `(T, D)`, the weight of the model's layer
            `position_embedding` without its first axis.
        grid: tuple `(rows, columns)` of patches.
        class_token: bool, whether the first position is that of a class token, which is left out.

    Returns:
        Array `(rows, columns, rows, columns)` of -1 to 1: `similarity[i, j]` is the map of how
        similar each position is to that of the patch in row `i` and column `j`. A position of
        zeros is similar to none.

    Raises:
        ValueError: if the positions have another shape, or not as many patches as the grid.

    Example:

    >>> (positions,) = model.get_layer("position_embedding").get_weights()
    >>> keras_vit.position_similarity(positions[0], grid=(8, 8)).shape
    (8, 8, 8, 8)
    """
    positions = _as_floats(positions)
    rows, columns = grid_of_patches(grid)
    if positions.ndim != 2 or len(positions) != rows * columns + class_token:
        raise ValueError(
            f"Expected `positions` of shape ({rows * columns + class_token}, embed_dim) for "
            f"grid={grid} and class_token={class_token}; pass class_token=False for a model that "
            "pools by mean. "
            f"Received: positions.shape={positions.shape}"
        )
    positions = positions[int(class_token) :]
    norms = np.linalg.norm(positions, axis=1, keepdims=True)
    positions = positions / np.where(norms > 0, norms, 1)
    return (positions @ positions.T).reshape(rows, columns, rows, columns)


def _as_floats(values):
    """An array of float64 as it is, others as float32: NumPy decomposes no narrower floats."""
    values = np.asarray(values)
    return values if values.dtype == "float64" else values.astype("float32")
