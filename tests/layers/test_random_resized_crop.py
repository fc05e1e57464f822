"""The crop against Pillow, torchvision's rule for boxes, and the contract of Keras layers."""

import json
import math
import os
import subprocess
import sys
from unittest import mock

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image
from scipy import stats

from keras_vit import RandomResizedCrop

BACKEND = keras.backend.backend()
COUNT = 10_000
WIDE = (0.2, 1.0)


def crop_and_resize(layer, images, boxes):
    """The layer's output for given boxes `(B, 4)`: top, left, height and width."""
    columns = [ops.convert_to_tensor(column) for column in np.asarray(boxes, "float32").T]
    return to_numpy(layer.transform_images(ops.convert_to_tensor(images), columns))


def pillow_crop_and_resize(image, box, size, resample):
    """One `(H, W, C)` float image, cropped and resized by Pillow channel by channel."""
    top, left, height, width = (int(side) for side in box)
    channels = [
        Image.fromarray(channel)
        .crop((left, top, left + width, top + height))
        .resize((size[1], size[0]), resample)
        for channel in np.moveaxis(image, -1, 0).astype("float32")
    ]
    assert channels[0].mode == "F"
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def random_boxes(rng, count, height, width):
    """Whole-pixel boxes `(count, 4)` inside an image: any size, any position."""
    box_heights = rng.integers(1, height + 1, count)
    box_widths = rng.integers(1, width + 1, count)
    tops = rng.integers(0, height - box_heights + 1)
    lefts = rng.integers(0, width - box_widths + 1)
    return np.stack([tops, lefts, box_heights, box_widths], axis=1)


def draw_boxes(layer, height, width, count=COUNT):
    images = np.zeros((count, height, width, 1), "uint8")
    boxes = layer.get_random_transformation(ops.convert_to_tensor(images))
    return np.stack([to_numpy(side) for side in boxes], axis=1)


def published_rule(rng, count, height, width, scale, ratio):
    """torchvision's `RandomResizedCrop.get_params`, after its documentation, one box at a time."""

    def one():
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
        if width / height < ratio[0]:
            w, h = width, round(width / ratio[0])
        elif width / height > ratio[1]:
            w, h = round(height * ratio[1]), height
        else:
            w, h = width, height
        return (height - h) // 2, (width - w) // 2, h, w

    return np.array([one() for _ in range(count)])


def to_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def pixels(seed, *shape):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype("float32")


# Resampling


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 9), (24, 31), (40, 13), (75, 101)])
def test_bilinear_agrees_with_pillow_for_boxes_that_shrink_and_grow(size):
    rng = np.random.default_rng(sum(size))
    images = pixels(0, 24, 24, 31, 2)
    boxes = random_boxes(rng, 24, 24, 31)
    ours = crop_and_resize(RandomResizedCrop(*size), images, boxes)
    for image, box, result in zip(images, boxes, ours, strict=True):
        theirs = pillow_crop_and_resize(image, box, size, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(result, theirs, atol=1e-3, err_msg=f"box={box}")


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (17, 9), (40, 13), (75, 101)])
def test_nearest_agrees_with_pillow_where_the_nearest_pixel_is_unique(size):
    rng = np.random.default_rng(sum(size))
    images = pixels(1, 24, 24, 31, 2)
    boxes = random_boxes(rng, 24, 24, 31)
    ours = crop_and_resize(RandomResizedCrop(*size, interpolation="nearest"), images, boxes)
    compared = 0
    for image, box, result in zip(images, boxes, ours, strict=True):
        theirs = pillow_crop_and_resize(image, box, size, Image.Resampling.NEAREST)
        # A center on the border of two pixels is equally close to both.
        rows, columns = (
            (2 * np.arange(output) + 1) * length % (2 * output) != 0
            for output, length in zip(size, box[2:], strict=True)
        )
        unique = np.ix_(rows, columns)
        np.testing.assert_array_equal(result[unique], theirs[unique], err_msg=f"box={box}")
        compared += result[unique].size
    assert compared > ours.size / 10


def test_nearest_takes_one_of_the_two_nearest_pixels_where_they_tie():
    column = np.arange(8, dtype="float32").reshape(1, 8, 1, 1)
    result = crop_and_resize(
        RandomResizedCrop(2, 1, interpolation="nearest"), column, [(0, 0, 4, 1)]
    )
    first, second = result.ravel()
    assert first in (0, 1) and second in (2, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(3, 4), (50, 37)])
def test_pixels_outside_the_box_are_never_read(interpolation, size):
    rng = np.random.default_rng(2)
    boxes = random_boxes(rng, 32, 16, 20)
    images = np.full((32, 16, 20, 1), 1e9, "float32")
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        image[top : top + height, left : left + width] = rng.uniform(0, 1, (height, width, 1))
    result = crop_and_resize(RandomResizedCrop(*size, interpolation=interpolation), images, boxes)
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-5


def test_each_image_of_a_batch_is_resampled_from_its_own_box():
    row_and_column = np.stack(np.meshgrid(np.arange(30.0), np.arange(40.0), indexing="ij"), -1)
    images = np.repeat(row_and_column[None], 16, axis=0)
    layer = RandomResizedCrop(8, 8, scale=(0.1, 0.5), interpolation="nearest", seed=3)
    corners = to_numpy(layer(images, training=True))[:, 0, 0]
    assert len(np.unique(corners, axis=0)) > 8


# Boxes


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.8, 1.0), (0.9, 1.1)),
        (20, 28, (0.08, 1.0), (3 / 4, 4 / 3)),
        # Most first draws do not fit, so that clipping or too few attempts would be detected.
        (32, 32, (0.9, 1.0), (0.5, 2.0)),
        # Almost no draw fits at all.
        (24, 36, (1.0, 1.0), (0.5, 2.0)),
    ],
)
def test_boxes_are_distributed_by_the_published_rule(height, width, scale, ratio):
    layer = RandomResizedCrop(8, 8, scale=scale, ratio=ratio, seed=4)
    ours = draw_boxes(layer, height, width)
    rng = np.random.default_rng(5)
    theirs = published_rule(rng, COUNT, height, width, scale, ratio)

    def statistics(boxes):
        top, left, h, w = boxes.astype("float64").T
        return {
            "area": h * w,
            "log ratio": np.log(w / h),
            "height": h,
            "width": w,
            "top": top,
            "left": left,
            "top within the room": top / (height - h + 1),
            "left within the room": left / (width - w + 1),
            "whole image": (h == height) & (w == width),
        }

    ours, theirs = statistics(ours), statistics(theirs)
    for name, values in theirs.items():
        test = stats.ks_2samp(ours[name], values, method="asymp")
        assert test.pvalue > 1e-4, (name, test)


def test_most_first_draws_do_not_fit_in_the_case_that_tests_redrawing():
    rng = np.random.default_rng(6)
    side = 64 * np.sqrt(rng.uniform(0.9, 1.0, 50_000))
    slant = np.sqrt(np.exp(rng.uniform(math.log(0.5), math.log(2), 50_000)))
    first_draw_fits = np.mean((np.round(side * slant) <= 64) & (np.round(side / slant) <= 64))
    assert first_draw_fits < 0.2
    layer = RandomResizedCrop(8, 8, scale=(0.9, 1.0), ratio=(0.5, 2.0), seed=7)
    boxes = draw_boxes(layer, 64, 64)
    is_whole_image = (boxes[:, 2] == 64) & (boxes[:, 3] == 64)
    assert is_whole_image.mean() == pytest.approx((1 - first_draw_fits) ** 10, abs=0.03)


def test_position_is_independent_of_size_in_both_directions():
    layer = RandomResizedCrop(8, 8, scale=(0.05, 0.4), ratio=(0.5, 2.0), seed=8)
    top, left, height, width = draw_boxes(layer, 64, 64).T
    room = np.stack([top / (64 - height), left / (64 - width), height * width, width / height])
    correlations = stats.spearmanr(room, axis=1).statistic[np.triu_indices(4, k=1)]
    assert np.abs(correlations).max() < 0.06


@pytest.mark.parametrize(("height", "width"), [(32, 32), (1, 1), (2, 3), (7, 50), (50, 7)])
@pytest.mark.parametrize("scale", [(0.01, 1.0), (0.8, 1.0)])
def test_boxes_are_whole_pixels_inside_the_image(height, width, scale):
    layer = RandomResizedCrop(8, 8, scale=scale, ratio=(0.2, 5.0), seed=9)
    boxes = draw_boxes(layer, height, width)
    np.testing.assert_array_equal(boxes, np.round(boxes))
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2:].min() >= 1
    assert (boxes[:, 0] + boxes[:, 2]).max() <= height
    assert (boxes[:, 1] + boxes[:, 3]).max() <= width


@pytest.mark.parametrize(
    ("height", "width", "ratio", "box"),
    [
        (4, 100, (0.9, 1.5), (0, 47, 4, 6)),
        (100, 4, (0.8, 1.1), (47, 0, 5, 4)),
        (1, 90, (0.1, 0.2), (0, 44, 1, 1)),
    ],
)
def test_the_central_box_is_used_if_no_draw_fits(height, width, ratio, box):
    layer = RandomResizedCrop(8, 8, scale=(0.8, 1.0), ratio=ratio, seed=10)
    np.testing.assert_array_equal(draw_boxes(layer, height, width), [box] * COUNT)


def test_every_image_of_a_batch_draws_its_own_box():
    boxes = draw_boxes(RandomResizedCrop(8, 8, scale=(0.1, 1.0), seed=11), 64, 64, count=200)
    assert len(np.unique(boxes, axis=0)) > 190


def test_the_same_seed_repeats_the_same_sequence_of_crops():
    images = pixels(12, 4, 20, 28, 3)
    first, again, other = (RandomResizedCrop(8, 12, scale=WIDE, seed=seed) for seed in (13, 13, 14))
    sequence = [to_numpy(first(images, training=True)) for _ in range(3)]
    repeated = [to_numpy(again(images, training=True)) for _ in range(3)]
    np.testing.assert_array_equal(sequence, repeated)
    assert np.abs(sequence[0] - sequence[1]).max() > 1
    assert np.abs(sequence[0] - to_numpy(other(images, training=True))).max() > 1


def test_two_layers_without_seed_draw_different_boxes():
    one, two = (draw_boxes(RandomResizedCrop(8, 8), 64, 64) for _ in range(2))
    assert (one != two).any()


# Inference


@pytest.mark.parametrize("size", [(9, 7), (20, 26), (40, 33)])
def test_inference_resizes_the_whole_image_as_pillow_does(size):
    images = pixels(15, 3, 20, 26, 3)
    result = to_numpy(RandomResizedCrop(*size)(images, training=False))
    for image, ours in zip(images, result, strict=True):
        box = (0, 0, 20, 26)
        theirs = pillow_crop_and_resize(image, box, size, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_inference_is_the_identity_for_images_of_the_target_size(dtype):
    images = pixels(16, 2, 12, 16, 3).astype(dtype)
    layer = RandomResizedCrop(12, 16)
    np.testing.assert_array_equal(to_numpy(layer(images, training=False)), images)
    np.testing.assert_array_equal(to_numpy(layer(images[0], training=False)), images[0])


def test_inference_draws_nothing_so_that_later_crops_do_not_depend_on_it():
    images = pixels(17, 4, 20, 28, 3)
    with_inference, without = (RandomResizedCrop(8, 12, scale=WIDE, seed=18) for _ in range(2))
    with_inference(images, training=False)
    np.testing.assert_array_equal(
        to_numpy(with_inference(images, training=True)), to_numpy(without(images, training=True))
    )


def check_inference_of_random_sizes():
    """Eager and compiled; run below in separate processes."""
    import tensorflow as tf

    rng = np.random.default_rng(46)
    for channels in (1, 2, 3, 4):
        count, height, width, *size = rng.integers(2, 97, 5)
        images = rng.uniform(0, 255, (count, height, width, channels)).astype("float32")
        expected = [
            pillow_crop_and_resize(image, (0, 0, height, width), size, Image.Resampling.BILINEAR)
            for image in images
        ]
        layer = RandomResizedCrop(*size)
        compiled = (tf.function(layer, jit_compile=jit) for jit in (False, True))
        for function in (layer, *compiled):
            result = function(ops.convert_to_tensor(images), training=False)
            np.testing.assert_allclose(to_numpy(result), expected, atol=1e-3)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="The kernels are TensorFlow's.")
@pytest.mark.parametrize("intels_kernels", ["0", "1"])
def test_inference_is_right_with_and_without_intels_kernels(intels_kernels):
    """TensorFlow 2.21's matmul of broadcast batches overruns its buffers on AVX-512."""
    code = f"import {__name__} as tests; tests.check_inference_of_random_sizes()"
    environment = {
        **os.environ,
        "TF_ENABLE_ONEDNN_OPTS": intels_kernels,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# Inputs


@pytest.mark.parametrize("training", [True, False])
def test_a_single_image_is_treated_like_a_batch_of_one(training):
    image = pixels(19, 20, 28, 3)
    alone = RandomResizedCrop(8, 12, scale=WIDE, seed=20)(image, training=training)
    batched = RandomResizedCrop(8, 12, scale=WIDE, seed=20)(image[None], training=training)
    assert tuple(alone.shape) == (8, 12, 3)
    np.testing.assert_array_equal(to_numpy(alone), to_numpy(batched)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("batched", [True, False])
def test_channels_first_and_channels_last_agree(training, interpolation, batched):
    images = pixels(21, 4, 20, 28, 3)
    if not batched:
        images = images[0]
    layers = {
        data_format: RandomResizedCrop(
            8, 12, WIDE, interpolation=interpolation, seed=22, data_format=data_format
        )
        for data_format in ("channels_last", "channels_first")
    }
    last = to_numpy(layers["channels_last"](images, training=training))
    first = to_numpy(layers["channels_first"](np.moveaxis(images, -1, -3), training=training))
    assert first.shape[-3:] == (3, 8, 12)
    np.testing.assert_allclose(np.moveaxis(first, -3, -1), last, atol=1e-4)


def test_the_data_format_follows_the_keras_configuration():
    before = keras.config.image_data_format()
    try:
        keras.config.set_image_data_format("channels_first")
        layer = RandomResizedCrop(8, 12)
    finally:
        keras.config.set_image_data_format(before)
    assert tuple(layer(np.zeros((4, 3, 20, 28), "uint8")).shape) == (4, 3, 8, 12)


def test_uint8_and_float_images_are_cropped_alike():
    images = pixels(23, 4, 20, 28, 3).astype("uint8")
    from_bytes = RandomResizedCrop(8, 12, scale=WIDE, seed=24)(images, training=True)
    from_floats = RandomResizedCrop(8, 12, scale=WIDE, seed=24)(
        images.astype("float32"), training=True
    )
    assert keras.backend.standardize_dtype(from_bytes.dtype) == "float32"
    np.testing.assert_array_equal(to_numpy(from_bytes), to_numpy(from_floats))


@pytest.mark.parametrize(
    ("policy", "relative_error"),
    [
        ("float32", 1e-6),
        ("float64", 1e-6),
        ("float16", 2**-10),
        ("bfloat16", 2**-7),
        ("mixed_float16", 2**-10),
        ("mixed_bfloat16", 2**-7),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_every_dtype_policy_sets_the_output_and_keeps_the_crop(policy, relative_error, training):
    images = pixels(25, 4, 20, 28, 3).astype("uint8")
    layer = RandomResizedCrop(8, 12, scale=WIDE, seed=26, dtype=policy)
    result = layer(images, training=training)
    # JAX disables float64 by default.
    expected = ops.cast(ops.zeros(1), layer.compute_dtype).dtype
    assert result.dtype == expected
    reference = RandomResizedCrop(8, 12, scale=WIDE, seed=26, dtype="float32")(
        images, training=training
    )
    np.testing.assert_allclose(
        to_numpy(result), to_numpy(reference), rtol=relative_error, atol=relative_error
    )


@pytest.mark.parametrize("training", [True, False])
def test_an_integer_dtype_rounds_to_the_nearest_level(training):
    images = pixels(25, 4, 20, 28, 3) * 1.1 - 10
    crops = [
        RandomResizedCrop(8, 12, scale=WIDE, seed=26, dtype=dtype)(images, training=training)
        for dtype in ("float32", "uint8")
    ]
    expected, rounded = map(to_numpy, crops)
    assert keras.backend.standardize_dtype(crops[1].dtype) == "uint8"
    assert np.abs(rounded - np.clip(expected, 0, 255)).max() < 0.501


# Dictionaries of images, masks and labels

IDS = np.array([[0, 1001, 255], [65_537, 2**24 + 1, 7]])


@pytest.mark.parametrize("in_pipeline", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
def test_masks_follow_the_images_and_keep_ids_and_dtype(in_pipeline, training, dtype):
    tf = pytest.importorskip("tensorflow") if in_pipeline else None
    row_and_column = np.stack(np.meshgrid(np.arange(40.0), np.arange(40.0), indexing="ij"), -1)
    images = np.repeat(row_and_column[None], 4, axis=0).astype("float32")
    masks = IDS[(images[..., 0] > 25).astype(int), (images[..., 1] // 14).astype(int)]
    masks = masks.astype(dtype)[..., None]
    data = {"images": images, "segmentation_masks": masks, "labels": np.arange(997, 1001)}
    # Ids and labels would be rounded by a layer that casts whatever it is given.
    layer = RandomResizedCrop(9, 10, (0.3, 0.6), interpolation="nearest", seed=27, dtype="bfloat16")
    if in_pipeline:
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(4)
        (result,) = dataset.map(lambda data: layer(data, training=training)).as_numpy_iterator()
    else:
        result = layer(data, training=training)
        result = {name: ops.convert_to_numpy(x) for name, x in result.items()}
    rows, columns = np.moveaxis(result["images"].astype("int32"), -1, 0)
    expected = IDS[(rows > 25).astype(int), columns // 14].astype(dtype)[..., None]
    assert result["segmentation_masks"].dtype == dtype
    np.testing.assert_array_equal(result["segmentation_masks"], expected)
    np.testing.assert_array_equal(result["labels"], data["labels"])
    assert data["images"] is images and data["segmentation_masks"] is masks


def test_a_dictionary_of_symbolic_inputs_has_the_specs_of_the_results():
    shapes = {"images": ((20, 28, 3), "uint8"), "labels": ((5,), "int32")}
    shapes["segmentation_masks"] = ((20, 28, 1), "int32")
    inputs = {name: keras.Input(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    outputs = RandomResizedCrop(8, 12)(inputs)
    assert outputs.keys() == inputs.keys()
    data = {name: np.ones((3, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    results = keras.Model(inputs, outputs)(data, training=True)
    for name, result in results.items():
        assert tuple(result.shape)[1:] == outputs[name].shape[1:]
        assert keras.backend.standardize_dtype(result.dtype) == outputs[name].dtype


def test_a_single_image_is_cropped_together_with_its_mask():
    image = np.arange(20 * 28, dtype="int32").reshape(20, 28, 1)
    layer = RandomResizedCrop(8, 12, WIDE, interpolation="nearest", seed=28, dtype="int32")
    result = layer({"images": image, "segmentation_masks": image}, training=True)
    assert tuple(result["segmentation_masks"].shape) == (8, 12, 1)
    np.testing.assert_array_equal(
        to_numpy(result["segmentation_masks"]), to_numpy(result["images"])
    )


@pytest.mark.parametrize("make", [np.zeros, keras.KerasTensor])
@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"bounding_boxes": (1, 1, 4)}, "does not support bounding boxes.*Received: keys="),
        ({"segmentation_masks": (1, 20, 20)}, "rank, height and width.*masks.shape=.1, 20, 20."),
        ({"segmentation_masks": (1, 10, 20, 1)}, "rank, height and width.*Received"),
    ],
)
def test_boxes_and_masks_of_another_size_are_refused(make, others, message):
    data = {name: make(shape) for name, shape in {"images": (1, 20, 20, 3), **others}.items()}
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(8, 8)(data, training=True)


def test_a_format_of_bounding_boxes_is_refused():
    with pytest.raises(ValueError, match="bounding boxes.*Received: bounding_box_format='xyxy'"):
        RandomResizedCrop(8, 8, bounding_box_format="xyxy")


# Invalid inputs


@pytest.mark.parametrize("shape", [(20, 20), (1, 2, 20, 20, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_inputs_of_another_rank_are_refused(shape, training):
    with pytest.raises(ValueError, match="rank 3 .* or 4 .* Received"):
        RandomResizedCrop(8, 8)(np.zeros(shape, "float32"), training=training)


@pytest.mark.parametrize("shape", [(20, 20), (1, 2, 20, 20, 3)])
def test_symbolic_inputs_of_another_rank_are_refused(shape):
    with pytest.raises(ValueError, match="rank 3 .* or 4 .* Received"):
        RandomResizedCrop(8, 8)(keras.KerasTensor(shape))


# In models and pipelines


def test_a_model_with_unknown_batch_size_takes_any_batch():
    inputs = keras.Input((20, 28, 3))
    outputs = RandomResizedCrop(8, 12, scale=WIDE, seed=28)(inputs)
    assert outputs.shape == (None, 8, 12, 3)
    model = keras.Model(inputs, outputs)
    for batch_size in (1, 4):
        images = pixels(29, batch_size, 20, 28, 3)
        assert tuple(model(images, training=True).shape) == (batch_size, 8, 12, 3)
    whole = RandomResizedCrop(8, 12)(images, training=False)
    np.testing.assert_allclose(model.predict(images, verbose=0), to_numpy(whole), atol=1e-4)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_symbolic_shape_is_the_shape_of_the_result(data_format):
    layer = RandomResizedCrop(8, 12, data_format=data_format)
    for shape in [(20, 28, 3), (4, 20, 28, 3)]:
        symbolic = layer(keras.KerasTensor(shape)).shape
        assert symbolic == tuple(layer(np.zeros(shape, "float32")).shape)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_gradient_flows_through_the_crop_to_a_layer_before_it(jit_compile, interpolation):
    if jit_compile and BACKEND == "torch":
        pytest.skip("Keras does not compile with XLA on PyTorch.")
    # Crops of constant images are constant, so a step of gradient descent has a closed form.
    gray = np.random.default_rng(30).uniform(1, 2, 8).astype("float32")
    images = np.broadcast_to(gray[:, None, None, None], (8, 10, 10, 1)).copy()
    model = keras.Sequential(
        [
            keras.Input((10, 10, 1)),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"),
            RandomResizedCrop(6, 7, scale=(0.2, 1.0), interpolation=interpolation, seed=31),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), loss="mse", jit_compile=jit_compile)
    model.fit(images, np.zeros((8, 6, 7, 1), "float32"), batch_size=8, verbose=0)
    expected = 1 - 0.1 * np.mean(2 * gray**2)
    np.testing.assert_allclose(to_numpy(model.trainable_weights[0]), expected, rtol=1e-5)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_the_gradient_of_the_input_is_the_transpose_of_the_resampling(interpolation):
    rng = np.random.default_rng(32)
    images, weights = pixels(33, 4, 12, 15, 2) / 255, pixels(34, 4, 7, 20, 2) / 255
    boxes = random_boxes(rng, 4, 12, 15)
    layer = RandomResizedCrop(7, 20, interpolation=interpolation)
    columns = [ops.convert_to_tensor(column) for column in boxes.T.astype("float32")]

    def loss(x):
        return ops.sum(layer.transform_images(x, columns) * weights_tensor)

    weights_tensor, x = ops.convert_to_tensor(weights), ops.convert_to_tensor(images)
    gradient = to_numpy(input_gradient(loss, x))
    # A linear function equals the product of its gradient and its input.
    assert np.sum(gradient * images) == pytest.approx(float(to_numpy(loss(x))), rel=1e-4)
    for values, (top, left, height, width) in zip(gradient, boxes, strict=True):
        inside = values[top : top + height, left : left + width].copy()
        assert np.abs(inside).max() > 0
        assert np.abs(values).sum() == pytest.approx(np.abs(inside).sum())


def input_gradient(loss, x):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return tape.gradient(value, x)
    if BACKEND == "jax":
        import jax

        return jax.grad(loss)(x)
    x = x.detach().requires_grad_()
    loss(x).backward()
    return x.grad


def test_the_layer_does_not_disable_xla():
    assert RandomResizedCrop(8, 8).supports_jit is True


@pytest.mark.parametrize("known_size", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_crops_in_a_tf_data_pipeline_on_any_backend(known_size, batched):
    tf = pytest.importorskip("tensorflow")
    image = np.stack(np.meshgrid(np.arange(30.0), np.arange(40.0), indexing="ij"), -1)
    images = np.repeat(image[None], 12, axis=0).astype("float32")
    layer = RandomResizedCrop(8, 9, scale=(0.2, 0.6), interpolation="nearest", seed=35)
    dataset = pipeline(tf, images, known_size, batch_size=4 if batched else None)
    dataset = dataset.map(lambda x: layer(x, training=True))
    result = np.stack([x.numpy() for x in dataset]).reshape(-1, 8, 9, 2)
    assert result.shape == (12, 8, 9, 2)
    rows, columns = result[:, :, 0, 0], result[:, 0, :, 1]
    np.testing.assert_array_equal(result[..., 0], np.repeat(rows[:, :, None], 9, axis=2))
    np.testing.assert_array_equal(result[..., 1], np.repeat(columns[:, None], 8, axis=1))
    assert (np.diff(rows) >= 1).all() and (np.diff(columns) >= 1).all()
    assert rows.min() >= 0 and rows.max() <= 29 and columns.min() >= 0 and columns.max() <= 39
    assert len(np.unique(result[:, 0, 0], axis=0)) > 6


@pytest.mark.parametrize("known_size", [True, False])
@pytest.mark.parametrize("size", [(8, 9), (30, 40)])
def test_inference_in_a_tf_data_pipeline_resizes_as_pillow_does(known_size, size):
    tf = pytest.importorskip("tensorflow")
    images = pixels(36, 3, 30, 40, 2)
    layer = RandomResizedCrop(*size)
    dataset = pipeline(tf, images, known_size, batch_size=None)
    dataset = dataset.map(lambda x: layer(x, training=False))
    for image, ours in zip(images, dataset, strict=True):
        theirs = pillow_crop_and_resize(image, (0, 0, 30, 40), size, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-3)


def test_a_pipeline_crops_images_of_different_sizes():
    tf = pytest.importorskip("tensorflow")
    sizes = [(20, 30), (50, 11), (9, 9)]
    dataset = tf.data.Dataset.from_generator(
        lambda: (np.full((*size, 3), 7, "uint8") for size in sizes),
        output_signature=tf.TensorSpec((None, None, 3), tf.uint8),
    )
    layer = RandomResizedCrop(16, 16, seed=37)
    results = list(dataset.map(lambda x: layer(x, training=True)).batch(3))
    np.testing.assert_allclose(results[0].numpy(), np.full((3, 16, 16, 3), 7), rtol=1e-6)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_pipeline_interpolates_between_the_pixels_of_its_box(data_format):
    tf = pytest.importorskip("tensorflow")
    sizes = [(12, 17), (20, 9), (6, 6)]

    def images():
        for height, width in sizes:
            rows_and_columns = np.mgrid[:height, :width].astype("uint8")
            last = data_format == "channels_last"
            yield np.moveaxis(rows_and_columns, 0, -1) if last else rows_and_columns

    dataset = tf.data.Dataset.from_generator(
        images, output_signature=tf.TensorSpec((None, None, None), tf.uint8)
    )
    layer = RandomResizedCrop(25, 30, WIDE, seed=40, data_format=data_format)
    for size, result in zip(sizes, dataset.map(lambda x: layer(x, training=True)), strict=True):
        channel_axis = -1 if data_format == "channels_last" else 0
        rows, columns = np.moveaxis(result.numpy(), channel_axis, 0)
        for values, target, side in [(rows, 25, size[0]), (columns.T, 30, size[1])]:
            # When upscaling, the first and the last pixel are not interpolated.
            first, last = values[0, 0], values[-1, 0]
            assert 0 <= first == round(first) and last == round(last) < side
            centers = first - 0.5 + (np.arange(target) + 0.5) * (last - first + 1) / target
            expected = np.clip(centers, first, last)
            np.testing.assert_allclose(values, np.tile(expected, (values.shape[1], 1)).T, atol=1e-4)


def pipeline(tf, images, known_size, batch_size):
    shape = images.shape[1:] if known_size else (None, None, images.shape[-1])
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(images), output_signature=tf.TensorSpec(shape, tf.float32)
    )
    return dataset if batch_size is None else dataset.batch(batch_size)


# Image by image on TensorFlow's CPU

only_tensorflow_on_cpu = pytest.mark.skipif(
    BACKEND != "tensorflow" or keras.distribution.list_devices("gpu") != [],
    reason="JAX, PyTorch and GPUs multiply matrices.",
)


@only_tensorflow_on_cpu
@pytest.mark.parametrize("size", [(8, 8), (32, 64), (32, 8)])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_crops_and_gradients_are_the_same_with_and_without_xla(size, data_format):
    import tensorflow as tf

    boxes = random_boxes(np.random.default_rng(41), 6, 14, 15).T.astype("float32")
    images, weights = pixels(42, 6, 14, 15, 2), pixels(43, 6, *size, 2) / 255
    if data_format == "channels_first":
        images, weights = (np.moveaxis(x, -1, 1) for x in (images, weights))
    layer = RandomResizedCrop(*size, data_format=data_format)

    def crops_and_gradient(images):
        with tf.GradientTape() as tape:
            tape.watch(images)
            crops = layer.transform_images(images, tf.unstack(tf.constant(boxes)))
            loss = tf.reduce_sum(crops * weights)
        return crops, tape.gradient(loss, images)

    mapped, compiled = (tf.function(crops_and_gradient, jit_compile=jit) for jit in (False, True))
    assert maps_over_images(mapped, images) and not maps_over_images(compiled, images)
    for ours, theirs in zip(mapped(images), compiled(images), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-3)


def maps_over_images(function, images):
    operations = function.get_concrete_function(images).graph.get_operations()
    return "MapDefun" in {operation.type for operation in operations}


@only_tensorflow_on_cpu
def test_crops_of_bytes_are_those_of_floats_when_the_size_of_the_images_is_unknown():
    import tensorflow as tf

    images = pixels(44, 4, 20, 28, 3).astype("uint8")
    boxes = list(random_boxes(np.random.default_rng(45), 4, 20, 28).T.astype("float32"))
    layer = RandomResizedCrop(12, 40)

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, None), tf.uint8)])
    def crops(images):
        return layer.transform_images(images, boxes)

    from_floats = layer.transform_images(tf.constant(images, tf.float32), boxes)
    np.testing.assert_allclose(crops(images).numpy(), from_floats.numpy(), atol=1e-4)


@only_tensorflow_on_cpu
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_keras_model_crops_image_by_image_unless_xla_compiles_it(jit_compile):
    layers = [keras.Input((9, 9, 1)), RandomResizedCrop(6, 7), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(loss="mse", jit_compile=jit_compile)
    map_images = mock.patch.object(
        RandomResizedCrop, "_map", autospec=True, side_effect=RandomResizedCrop._map
    )
    with map_images as mapped:
        model.train_on_batch(np.zeros((2, 9, 9, 1)), np.zeros((2, 6, 7, 1)))
    assert mapped.called is not jit_compile


# Configuration

CONFIG = {
    "height": 8,
    "width": 12,
    "scale": (0.3, 0.7),
    "ratio": (0.5, 1.5),
    "interpolation": "nearest",
    "seed": 38,
    "data_format": "channels_first",
}


def test_get_config_contains_every_argument():
    layer = RandomResizedCrop(**CONFIG, name="crop", dtype="float16")
    again = RandomResizedCrop.from_config(layer.get_config())
    for key, value in CONFIG.items():
        assert again.get_config()[key] == value
    assert again.name == "crop"
    assert again.compute_dtype == "float16"


def test_serialized_layers_are_restored_without_custom_objects_and_crop_alike():
    layer = RandomResizedCrop(**CONFIG)
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    assert json.loads(text)["registered_name"] == "keras_vit>RandomResizedCrop"
    again = keras.saving.deserialize_keras_object(json.loads(text))
    images = pixels(39, 4, 3, 20, 28)
    np.testing.assert_array_equal(
        to_numpy(layer(images, training=True)), to_numpy(again(images, training=True))
    )


def test_the_defaults_are_the_documented_ones():
    config = RandomResizedCrop(32, 32).get_config()
    assert config["scale"] == (0.8, 1.0)
    assert config["ratio"] == (0.9, 1.1)
    assert config["interpolation"] == "bilinear"
    assert config["data_format"] == keras.config.image_data_format()


SIZE = "integer of at least 1"
PAIR = "pair of numbers"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("height", 0, SIZE),
        ("height", -3, SIZE),
        ("height", 8.0, SIZE),
        ("height", True, SIZE),
        ("height", None, SIZE),
        ("width", 0, SIZE),
        ("width", "8", SIZE),
        ("width", (8,), SIZE),
        ("scale", (0.0, 1.0), PAIR),
        ("scale", (-0.1, 1.0), PAIR),
        ("scale", (0.5, 1.1), PAIR),
        ("scale", (1.0, 0.8), PAIR),
        ("scale", (0.1, 0.2, 0.3), PAIR),
        ("scale", (0.5,), PAIR),
        ("scale", 0.5, PAIR),
        ("scale", None, PAIR),
        ("scale", ("low", "high"), PAIR),
        ("scale", (math.nan, 1.0), PAIR),
        ("ratio", (0.0, 1.0), PAIR),
        ("ratio", (-2.0, -1.0), PAIR),
        ("ratio", (1.1, 0.9), PAIR),
        ("ratio", (1.0, math.inf), PAIR),
        ("ratio", (1.0, math.nan), PAIR),
        ("ratio", 1.0, PAIR),
        ("interpolation", "bicubic", "'bilinear' or 'nearest'"),
        ("interpolation", None, "'bilinear' or 'nearest'"),
    ],
)
def test_invalid_arguments_are_refused_naming_what_was_expected_and_received(name, value, expected):
    with pytest.raises(ValueError) as error:
        RandomResizedCrop(**{"height": 8, "width": 8, name: value})
    message = str(error.value)
    assert f"Expected `{name}` to be " in message
    assert expected in message
    assert f"Received: {name}={value!r}" in message


def test_an_unknown_data_format_is_refused():
    with pytest.raises(ValueError, match="channels_middle"):
        RandomResizedCrop(8, 8, data_format="channels_middle")


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", (1.0, 1.0)), ("scale", [0.2, 0.4]), ("ratio", (1, 1)), ("height", np.int64(8))],
)
def test_arguments_at_the_limits_of_their_range_are_accepted(name, value):
    layer = RandomResizedCrop(**{"height": 8, "width": 8, name: value})
    assert tuple(layer(np.zeros((2, 9, 9, 3)), training=True).shape) == (2, 8, 8, 3)
    json.dumps(keras.saving.serialize_keras_object(layer))
