"""Filters against scikit-learn's principal components; positions against loops."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from keras_vit import patch_filters, position_similarity


def test_filters_are_the_principal_components_of_the_kernel():
    kernel = np.random.default_rng(0).normal(size=(2 * 2 * 3, 40)) * np.arange(1, 13)[:, None]
    filters, explained = patch_filters(kernel, 2, count=5)
    expected = PCA(5).fit(kernel.T)
    assert filters.shape == (5, 2, 2, 3)
    np.testing.assert_allclose(explained, expected.explained_variance_ratio_)
    flat = filters.reshape(5, -1)
    np.testing.assert_allclose(abs(flat @ expected.components_.T), np.eye(5), atol=1e-10)
    assert (flat.max(axis=1) == abs(flat).max(axis=1)).all()


def test_a_pattern_that_all_filters_are_made_of_is_found():
    pattern = np.random.default_rng(1).normal(size=(4, 4, 1))
    kernel = pattern.reshape(-1, 1) * np.array([1.0, -2.0, 5.0])
    filters, explained = patch_filters(kernel.astype("float32"), 4)
    assert filters.shape == (3, 4, 4, 1)  # There are no more.
    pattern *= np.sign(pattern.flat[abs(pattern).argmax()]) / np.linalg.norm(pattern)
    np.testing.assert_allclose(filters[0], pattern, atol=1e-5)
    np.testing.assert_allclose(explained, [1, 0, 0], atol=1e-6)


def test_a_kernel_of_zeros_has_components_that_explain_nothing():
    assert patch_filters(np.zeros((4, 3)), 2)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(15, 8), (16,), (0, 8), (16, 0)])
def test_a_kernel_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError) as error:
        patch_filters(np.zeros(shape), 4)
    assert f"Received: kernel.shape={shape}, patch_size=4" in str(error.value)


def test_similarity_is_the_cosine_of_each_pair_of_positions():
    positions = np.random.default_rng(2).normal(size=(7, 4))
    positions[6] = 0
    similarity = position_similarity(positions, (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    for i, j, k, l in np.ndindex(2, 3, 2, 3):  # noqa: E741
        a, b = positions[1 + 3 * i + j], positions[1 + 3 * k + l]
        norms = np.sqrt(a @ a) * np.sqrt(b @ b)
        assert similarity[i, j, k, l] == pytest.approx(a @ b / norms if norms else 0)
    alone = position_similarity(positions[1:], (2, 3), class_token=False)
    np.testing.assert_array_equal(alone, similarity)


@pytest.mark.parametrize("grid", [(2, 2), (7, 1), (3,), None])
def test_positions_of_another_grid_are_refused(grid):
    with pytest.raises(ValueError) as error:
        position_similarity(np.zeros((7, 4)), grid)
    assert "Expected `positions` of shape" in str(error.value) or f"grid={grid}" in str(error.value)
