"""What holds for any input that Hypothesis can think of."""

import json
import math

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import keras_vit
from keras_vit_cli.errors import CommandError
from keras_vit_cli.settings import OPTIONS, parse

side = st.integers(1, 24)
pixels = st.sampled_from(["uint8", "int32", "float16", "float32", "float64"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def images(shape, dtype, seed):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(OPTIONS)) | st.text(max_size=8), json_values))
def test_a_configuration_is_taken_as_it_stands_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(content))
    try:
        named = parse([f"--config={path}"]).named
    except CommandError as failure:
        assert failure.status == 2 and str(failure)
        return
    assert set(named) == set(content)
    for name, value in named.items():
        if isinstance(value, tuple):
            assert list(value) == content[name]
        else:
            assert value == content[name]
        limits = OPTIONS[name].metadata
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and limits["low"] is not None:
                assert number >= limits["low"]
            if number is not None and limits["below"] is not None:
                assert number < limits["below"]
            if isinstance(number, float):
                assert math.isfinite(number)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_a_file_of_any_bytes_is_a_configuration_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    try:
        assert isinstance(parse([f"--config={path}"]).named, dict)
    except CommandError as failure:
        assert failure.status == 2 and str(path) in str(failure)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    size=st.tuples(side, side, st.integers(1, 4)),
    target=st.tuples(side, side),
    dtype=pixels,
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    interpolation=st.sampled_from(["bilinear", "nearest"]),
    training=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_crop_of_any_image_mixes_its_pixels_and_nothing_else(
    batch, size, target, dtype, scale, ratio, interpolation, training, seed
):
    crop = keras_vit.RandomResizedCrop(
        *target, scale=scale, ratio=ratio, interpolation=interpolation, seed=seed
    )
    source = images((batch, *size), dtype, seed)
    result = keras.ops.convert_to_numpy(crop(source, training=training))
    assert result.shape == (batch, *target, size[2]) and result.dtype == "float32"
    low, high = (getattr(source, end)(axis=(1, 2), keepdims=True) for end in ("min", "max"))
    assert (result >= low.astype("float32") - 1e-2).all()
    assert (result <= high.astype("float32") + 1e-2).all()
    if interpolation == "nearest":
        for image, cropped in zip(source, result):
            known = {tuple(pixel) for pixel in image.reshape(-1, size[2]).astype("float32")}
            assert {tuple(pixel) for pixel in cropped.reshape(-1, size[2])} <= known


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    patch_size=st.integers(1, 8),
    channels=st.integers(1, 4),
    dtype=pixels,
    seed=st.integers(0, 1000),
)
def test_patches_of_any_image_put_together_are_the_image(
    batch, grid, patch_size, channels, dtype, seed
):
    rows, columns = grid
    source = images((batch, rows * patch_size, columns * patch_size, channels), dtype, seed)
    patches = keras.ops.convert_to_numpy(keras_vit.Patches(patch_size)(source))
    assert patches.shape == (batch, rows * columns, patch_size * patch_size * channels)
    parts = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    np.testing.assert_array_equal(parts.swapaxes(2, 3).reshape(source.shape), source)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), patch_size=st.integers(2, 31))
def test_images_that_patches_do_not_tile_are_refused(height, width, patch_size):
    assume(height % patch_size or width % patch_size)
    with pytest.raises(ValueError, match=f"patch_size={patch_size}, height={height}, width="):
        keras_vit.Patches(patch_size)(np.zeros((1, height, width, 3), "float32"))


any_scores = arrays.arrays(
    st.sampled_from(["float16", "float32", "float64", "int32", "uint8", "bool"]),
    arrays.array_shapes(min_dims=1, max_dims=6, max_side=4) | st.just((1, 2, 2, 4, 4)),
)
good_scores = arrays.arrays(
    st.sampled_from(["float16", "float32", "float64"]),
    st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 4)).map(lambda x: (*x, x[-1])),
    elements=st.floats(0, 100, width=16),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scores=any_scores | good_scores,
    head_fusion=st.sampled_from(["mean", "max", "min"]),
    discard_ratio=st.floats(0, 0.99) | st.floats(),
)
def test_rollout_of_any_array_has_rows_that_sum_to_one_or_is_refused(
    scores, head_fusion, discard_ratio
):
    try:
        rollout = keras_vit.attention_rollout(scores, head_fusion, discard_ratio)
    except ValueError as error:
        assert "Expected" in str(error)
        return
    assert 0 <= discard_ratio < 1
    batch, _, _, tokens, _ = scores.shape
    assert rollout.shape == (batch, tokens, tokens)
    assert np.isfinite(rollout).all() and (rollout >= 0).all()
    np.testing.assert_allclose(rollout.sum(axis=-1), 1, rtol=1e-2)
