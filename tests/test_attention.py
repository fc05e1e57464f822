"""Scores and gradients against NumPy, from the weights; maps against loops and closed forms."""

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_vit import (
    VisionTransformer,
    attention,
    attention_distance,
    attention_gradients,
    attention_relevance,
    attention_rollout,
    attention_scores,
    load_model,
    patch_weights,
    predict,
)

HEADS, DEPTH = 2, 3


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3)).astype("uint8")


@pytest.fixture(scope="module")
def model(images):
    """A model with a rectangular 2x3 grid of patches and far from uniform attention."""
    model = VisionTransformer(
        (8, 12, 3), num_classes=4, patch_size=4, embed_dim=16, mlp_dim=16, num_heads=HEADS,
        depth=DEPTH,
    )  # fmt: skip
    model.adapt(images)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.4, weight.shape).astype("float32"))
    return model


def softmax(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def random_scores(seed, *shape, dtype="float64"):
    """Scores whose rows sum to one, without ties."""
    return softmax(2 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def rollout_by_loops(scores, head_fusion, discard_ratio, class_token):
    """Abnar & Zuidema's rollout with nothing but Python loops."""
    fuse = {"mean": lambda heads: sum(heads) / len(heads), "max": max, "min": min}[head_fusion]
    tokens = range(scores.shape[-1])
    results = []
    for image in scores.tolist():
        rollout = [[float(i == j) for j in tokens] for i in tokens]
        for block in image:
            fused = [[fuse([head[i][j] for head in block]) for j in tokens] for i in tokens]
            ascending = sorted((fused[i][j], i, j) for i in tokens for j in tokens)
            for _, i, j in ascending[: int(len(tokens) ** 2 * discard_ratio)]:
                if j != 0 or not class_token:
                    fused[i][j] = 0.0
            for i in tokens:
                row = [(fused[i][j] + float(i == j)) / 2 for j in tokens]
                fused[i] = [entry / sum(row) for entry in row]
            rollout = [
                [sum(fused[i][k] * rollout[k][j] for k in tokens) for j in tokens] for i in tokens
            ]
        results.append(rollout)
    return np.array(results)


# Scores


def test_scores_have_one_row_per_image_block_head_and_token(model, images):
    scores = attention_scores(model, images)
    assert scores.shape == (5, DEPTH, HEADS, 7, 7)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(axis=-1), 1, atol=1e-5)
    assert scores.min() >= 0


@pytest.mark.parametrize("block", range(1, DEPTH + 1))
def test_scores_of_each_block_agree_with_numpy(model, images, block):
    tokens = keras.Model(model.input, model.get_layer(f"block_{block}_attention_norm").output)
    tokens = np.asarray(tokens.predict(images, verbose=0))
    expected = numpy_scores(model.get_layer(f"block_{block}_attention"), tokens, tokens)
    assert expected.std() > 0.02
    np.testing.assert_allclose(attention_scores(model, images)[:, block - 1], expected, atol=1e-5)


@pytest.mark.parametrize("made", ["cloned", "given another head", "reloaded"])
def test_models_made_of_a_vision_transformer_have_its_scores(model, images, made, tmp_path):
    if made == "cloned":
        other = keras.models.clone_model(model)
        other.set_weights(model.get_weights())
    else:
        # It reads the mean of all tokens that are left: the class token alone.
        pooled = keras.layers.GlobalAveragePooling1D()(model.get_layer("norm").output)
        head = keras.layers.Dense(4, name="other_head")
        other = keras.Model(model.input, head(pooled))
        head.set_weights(model.get_layer("head").get_weights())
    if made == "reloaded":
        other.save(tmp_path / "model.keras")
        other = load_model(tmp_path / "model.keras")
    assert not isinstance(other, VisionTransformer)
    for found, expected in (
        (attention_scores(other, images), attention_scores(model, images)),
        (attention_gradients(other, images, [0] * 5), attention_gradients(model, images, [0] * 5)),
        (predict(other, images), predict(model, images)),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_scores_agree_with_an_independent_pytorch_model(model, images, pooling):
    torch = pytest.importorskip("torch")
    from torch_reference import reference_of

    if pooling == "mean":
        model = VisionTransformer.from_config({**model.get_config(), "pooling": "mean"})
        model.adapt(images)
        for weight in model.trainable_weights:
            weight.assign(2 * weight)
    reference = reference_of(
        model, images, image_shape=(8, 12, 3), num_classes=4, patch_size=4, embed_dim=16,
        mlp_dim=16, num_heads=HEADS, depth=DEPTH, pooling=pooling,
    )  # fmt: skip
    with torch.no_grad():
        expected = reference(torch.tensor(images))[1].numpy()
    np.testing.assert_allclose(attention_scores(model, images), expected, atol=1e-4)


def test_a_loaded_model_has_the_scores_of_the_saved_one(model, images, tmp_path):
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        attention_scores(again, images), attention_scores(model, images), atol=1e-6
    )


def test_blocks_beyond_the_ninth_keep_their_order(images):
    sizes = {"patch_size": 4, "embed_dim": 4, "mlp_dim": 4, "num_heads": 1, "depth": 11}
    model = VisionTransformer((8, 12, 3), augmentation=[], **sizes)
    # All blocks add nothing and get the same tokens; each has sharper attention than the last.
    for block in range(1, 12):
        attention = model.get_layer(f"block_{block}_attention")
        weights = [np.zeros_like(weight) for weight in attention.get_weights()]
        query_bias, key = weights[1], weights[2]
        query_bias += 1
        key += np.random.default_rng(0).normal(0, 0.2 * block, (4, 1, 1))
        attention.set_weights(weights)
        output = model.get_layer(f"block_{block}_mlp_output")
        output.set_weights([np.zeros_like(weight) for weight in output.get_weights()])
    sharpest = attention_scores(model, images).max(axis=(0, 2, 3, 4))
    assert (np.diff(sharpest) > 0).all()


def test_computing_scores_is_repeatable_and_leaves_the_model_unchanged(model, images, tmp_path):
    names = [layer.name for layer in model.layers]
    logits = model.predict(images, verbose=0)
    first, second = attention_scores(model, images), attention_scores(model, images)
    np.testing.assert_array_equal(first, second)
    assert [layer.name for layer in model.layers] == names
    np.testing.assert_array_equal(model.predict(images, verbose=0), logits)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(images, verbose=0), logits, atol=1e-6)
    assert len(again.weights) == len(model.weights)


def test_scores_do_not_depend_on_the_number_of_images(model, images, monkeypatch):
    monkeypatch.setattr(attention, "BATCH_SIZE", 5)
    many = np.concatenate([images] * 3)[:11]
    scores = attention_scores(model, many)
    assert len(scores) == 11
    np.testing.assert_allclose(scores[10], attention_scores(model, many[10:])[0], atol=1e-6)


def test_scores_under_mixed_precision_are_float32_and_close_to_full_precision(model, images):
    mixed = VisionTransformer.from_config({**model.get_config(), "dtype": "mixed_bfloat16"})
    mixed.set_weights(model.get_weights())
    scores = attention_scores(mixed, images)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[:, 0], attention_scores(model, images)[:, 0], atol=0.1)


TOKENS = np.random.default_rng(2).normal(size=(3, 6, 8)).astype("float32")


def attention_layer(name=None, **options):
    """A layer with far from uniform attention."""
    noise = keras.initializers.RandomNormal(stddev=1.0, seed=len(name or ""))
    return keras.layers.MultiHeadAttention(
        HEADS, 4, kernel_initializer=noise, bias_initializer=noise, name=name, **options
    )


def numpy_scores(layer, queries, keys, allowed=True):
    """Scores `(B, A, T, S)` from a layer's weights; `allowed` is the attention mask."""
    query, query_bias, key, key_bias = (np.asarray(x) for x in layer.get_weights()[:4])
    queries = np.einsum("btd,dah->bath", queries, query) + query_bias[None, :, None]
    keys = np.einsum("btd,dah->bath", keys, key) + key_bias[None, :, None]
    scores = np.einsum("bath,bash->bats", queries, keys) / np.sqrt(query.shape[-1])
    return softmax(np.where(allowed, scores, -1e9))


def masked_by_argument(tokens, layer):
    """A different mask per image: tokens attend to those with a first value not above theirs."""
    first = tokens[:, :, :1]
    mask = keras.ops.greater_equal(first, keras.ops.swapaxes(first, 1, 2))
    first = TOKENS[:, None, :, :1]
    return layer(tokens, tokens, attention_mask=mask), first >= first.swapaxes(2, 3)


def masked_by_keras(tokens, layer):
    """`Masking` masks tokens of zeros: the last two of each image."""
    tokens = keras.layers.Masking()(tokens)
    return layer(tokens, tokens), np.arange(6) < 4


def causal(tokens, layer):
    return layer(tokens, tokens, use_causal_mask=True), np.tri(6, dtype=bool)


@pytest.mark.parametrize("call", [masked_by_argument, masked_by_keras, causal])
def test_masked_tokens_get_no_attention(call):
    tokens = TOKENS.copy()
    inputs, layer = keras.Input((6, 8)), attention_layer()
    outputs, allowed = call(inputs, layer)
    if call is masked_by_keras:
        tokens[:, 4:] = 0
    scores = attention_scores(keras.Model(inputs, outputs), tokens)
    expected = numpy_scores(layer, tokens, tokens, allowed)
    # The rows of masked tokens are undefined.
    queries = 4 if call is masked_by_keras else 6
    np.testing.assert_allclose(scores[:, 0, :, :queries], expected[:, :, :queries], atol=1e-5)


def test_cross_attention_has_a_row_per_query_and_a_column_per_key():
    inputs, layer = keras.Input((6, 8)), attention_layer()
    outputs = layer(inputs[:, :2], value=inputs, key=-inputs)
    scores = attention_scores(keras.Model(inputs, outputs), TOKENS)
    assert scores.shape == (3, 1, HEADS, 2, 6)
    expected = numpy_scores(layer, TOKENS[:, :2], -TOKENS)
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-5)


def test_a_model_with_several_inputs_takes_a_list_or_a_dictionary():
    arrays = {"query": TOKENS[:, :2], "value": TOKENS}
    inputs = {name: keras.Input(array.shape[1:], name=name) for name, array in arrays.items()}
    layer = attention_layer()
    model = keras.Model(inputs, layer(inputs["query"], inputs["value"]))
    expected = numpy_scores(layer, arrays["query"], arrays["value"])
    for images in (arrays, list(arrays.values())):
        np.testing.assert_allclose(attention_scores(model, images)[:, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"Received: images.shape=\(3, 6, 8\)"):
        attention_scores(model, TOKENS)
    with pytest.raises(ValueError, match=r"Received: images.shape=\[\(3, 2, 8\), \(2, 6, 8\)\]"):
        attention_scores(model, [arrays["query"], TOKENS[:2]])


def test_a_dictionary_names_the_inputs_of_a_model_that_was_given_a_list():
    """Whatever the order of their names."""
    inputs, layer = (
        [keras.Input((6, 8), name=name) for name in ("query", "context")],
        attention_layer(),
    )
    model = keras.Model(inputs, layer(*inputs))
    scores = attention_scores(model, {"query": TOKENS, "context": -TOKENS})
    np.testing.assert_allclose(scores[:, 0], numpy_scores(layer, TOKENS, -TOKENS), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"keys \['query', 'context'\].*Received: keys \['query'\]"
    ):
        attention_scores(model, {"query": TOKENS})


def test_a_layer_that_is_called_twice_counts_as_two_blocks():
    inputs, layer = keras.Input((6, 8)), attention_layer()
    # One call returns its scores itself.
    first, scores = layer(inputs, inputs, return_attention_scores=True)
    outputs = layer(first, first)
    ours = attention_scores(keras.Model(inputs, [outputs, scores]), TOKENS)
    second = np.asarray(keras.Model(inputs, first).predict(TOKENS, verbose=0))
    for block, tokens in enumerate((TOKENS, second)):
        expected = numpy_scores(layer, tokens, tokens)
        np.testing.assert_allclose(ours[:, block], expected, atol=1e-5)
    assert ours.shape == (3, 2, HEADS, 6, 6)


def test_scores_are_computed_in_inference_mode_even_if_the_graph_sets_training():
    inputs, layer = keras.Input((6, 8)), attention_layer(dropout=0.5)
    noise = keras.layers.GaussianNoise(1.0)(inputs, training=True)
    model = keras.Model(inputs, layer(noise, noise, training=True))
    expected = numpy_scores(layer, TOKENS, TOKENS)
    np.testing.assert_allclose(attention_scores(model, TOKENS)[:, 0], expected, atol=1e-5)


def nested(tokens):
    inner = keras.Input((6, 8))
    inner = keras.Model(inner, attention_layer()(inner, inner), name="odd")
    return inner(attention_layer()(tokens, tokens))


def over_a_grid(tokens):
    tokens = keras.layers.Reshape((2, 3, 8))(tokens)
    return attention_layer("odd")(tokens, tokens)


def in_windows(tokens):
    tokens = keras.ops.reshape(tokens, (-1, 3, 8))
    return keras.ops.reshape(attention_layer("odd")(tokens, tokens), (-1, 6, 8))


def of_other_heads(tokens):
    tokens = attention_layer()(tokens, tokens)
    return keras.layers.MultiHeadAttention(4, 2, name="odd")(tokens, tokens)


def in_flashes(tokens):
    return attention_layer("odd", flash_attention=True)(tokens, tokens)


class Silent(keras.layers.MultiHeadAttention):
    def call(self, query, value, key=None):
        return super().call(query, value, key)


def without_scores(tokens):
    return Silent(HEADS, 4, name="odd")(tokens, tokens)


@pytest.mark.parametrize(
    "build", [nested, over_a_grid, in_windows, of_other_heads, in_flashes, without_scores]
)
def test_unsupported_attention_is_refused_naming_the_layer(build):
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, build(inputs))
    with pytest.raises(ValueError, match="Received: .*odd|layer 'odd'"):
        attention_scores(model, TOKENS)


def test_a_subclassed_model_is_refused():
    class InPython(keras.Model):
        def __init__(self):
            super().__init__(name="in_python")
            self.attention = attention_layer()

        def call(self, tokens):
            return self.attention(tokens, tokens)

    model = InPython()
    model(TOKENS)
    with pytest.raises(ValueError, match="Received: model='in_python' of class InPython"):
        attention_scores(model, TOKENS)


def test_a_model_without_attention_is_refused_naming_the_model(images):
    model = keras.Sequential([keras.Input((8, 12, 3)), keras.layers.Flatten()], name="plain")
    with pytest.raises(ValueError, match="MultiHeadAttention.*Received: model='plain'"):
        attention_scores(model, images)


# Rollout


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 7)),
    seed=st.integers(0, 1000),
    head_fusion=st.sampled_from(["mean", "max", "min"]),
    discard_ratio=st.one_of(st.floats(0, 0.99), st.sampled_from([0.01, 0.5, 0.999])),
    class_token=st.booleans(),
)
def test_rollout_agrees_with_plain_loops(shape, seed, head_fusion, discard_ratio, class_token):
    scores = random_scores(seed, *shape, shape[-1])
    np.testing.assert_allclose(
        attention_rollout(scores, head_fusion, discard_ratio, class_token),
        rollout_by_loops(scores, head_fusion, discard_ratio, class_token),
        atol=1e-12,
    )


@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
def test_rollout_of_uniform_attention_has_a_closed_form(depth, head_fusion):
    # With P = 1/T everywhere, P P = P, so that ((P + I) / 2)^L = 2^-L I + (1 - 2^-L) P.
    tokens = 7
    scores = np.full((2, depth, 3, tokens, tokens), 1 / tokens)
    residual = 0.5**depth
    expected = residual * np.eye(tokens) + (1 - residual) / tokens
    rollout = attention_rollout(scores, head_fusion)
    np.testing.assert_allclose(rollout, np.stack([expected] * 2), atol=1e-12)


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
def test_rollout_of_identity_attention_is_the_identity(head_fusion):
    scores = np.broadcast_to(np.eye(5), (2, 4, 3, 5, 5))
    np.testing.assert_array_equal(attention_rollout(scores, head_fusion), np.stack([np.eye(5)] * 2))


def test_blocks_are_multiplied_from_the_first_to_the_last():
    # In block 1, token 1 attends to token 2; in block 2, the class token attends to token 1.
    first, last = np.eye(3), np.eye(3)
    first[1] = [0, 0, 1]
    last[0] = [0, 1, 0]
    rollout = attention_rollout(np.stack([first, last])[None, :, None])
    # The class token is half of token 1, which was half of token 2 after block 1.
    np.testing.assert_allclose(rollout[0, 0], [0.5, 0.25, 0.25])


def test_attention_to_the_class_token_is_never_discarded():
    # The class token's column is the smallest of all; of 16 entries, 15 would go.
    scores = np.full((1, 1, 1, 4, 4), 0.33)
    scores[..., 0] = 0.01
    scores[..., 2, 3] = 0.5
    kept = np.zeros((4, 4))
    kept[:, 0], kept[2, 3] = 0.01, 0.5
    expected = (kept + np.eye(4)) / (kept + np.eye(4)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(attention_rollout(scores, discard_ratio=0.95)[0], expected)


@pytest.mark.parametrize("head_fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard_ratio", [0.0, 0.4, 0.95])
def test_rows_of_a_rollout_sum_to_one(head_fusion, discard_ratio):
    scores = random_scores(3, 3, 4, 2, 13, 13, dtype="float32")
    rollout = attention_rollout(scores, head_fusion, discard_ratio)
    assert rollout.shape == (3, 13, 13)
    np.testing.assert_allclose(rollout.sum(axis=-1), 1, atol=1e-5)


def test_images_of_a_batch_are_independent():
    scores = random_scores(4, 3, 2, 2, 6, 6)
    together = attention_rollout(scores, discard_ratio=0.5)
    alone = np.concatenate([attention_rollout(x[None], discard_ratio=0.5) for x in scores])
    np.testing.assert_allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rollout_keeps_the_precision_of_its_input(dtype):
    assert attention_rollout(random_scores(5, 1, 2, 2, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("discard_ratio", [0.0, 0.5])
def test_rollout_does_not_modify_its_input(discard_ratio):
    scores = random_scores(6, 2, 2, 1, 5, 5)
    before = scores.copy()
    attention_rollout(scores, discard_ratio=discard_ratio)
    np.testing.assert_array_equal(scores, before)


def test_rollout_works_for_a_rectangular_grid(model, images):
    rollout = attention_rollout(attention_scores(model, images))
    assert rollout[:, 0, 1:].reshape(5, 2, 3).shape == (5, 2, 3)
    np.testing.assert_allclose(rollout.sum(axis=-1), 1, atol=1e-5)


def test_patch_weights_are_the_row_of_the_class_token_or_the_mean_of_all_rows():
    rollout = attention_rollout(random_scores(7, 2, 3, 2, 4, 4))
    np.testing.assert_array_equal(patch_weights(rollout), rollout[:, 0, 1:])
    expected = (rollout[:, 0] + rollout[:, 1] + rollout[:, 2] + rollout[:, 3]) / 4
    weights = patch_weights(rollout, class_token=False)
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (5, 5), (1, 2, 2, 4, 5), (0, 2, 2, 4, 4), ()])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError) as error:
        attention_rollout(np.zeros(shape))
    assert f"Received: scores.shape={shape}" in str(error.value)
    assert ("square" in str(error.value)) == (shape == (1, 2, 2, 4, 5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_scores_that_are_negative_or_not_finite_are_refused(bad):
    scores = random_scores(7, 1, 2, 2, 4, 4)
    scores[0, 1, 0, 2, 3] = bad
    with pytest.raises(ValueError, match="finite and non-negative"):
        attention_rollout(scores)


@pytest.mark.parametrize("head_fusion", ["median", "sum", "Mean", None])
def test_an_unknown_head_fusion_is_refused(head_fusion):
    with pytest.raises(ValueError) as error:
        attention_rollout(random_scores(8, 1, 1, 1, 3, 3), head_fusion=head_fusion)
    assert "'mean', 'max' or 'min'" in str(error.value)
    assert f"Received: head_fusion={head_fusion!r}" in str(error.value)


@pytest.mark.parametrize("discard_ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_discard_ratio_out_of_range_is_refused(discard_ratio):
    with pytest.raises(ValueError) as error:
        attention_rollout(random_scores(9, 1, 1, 1, 3, 3), discard_ratio=discard_ratio)
    assert f"Received: discard_ratio={discard_ratio!r}" in str(error.value)


# Gradients


def numpy_weights(model):
    """The weights of each layer in float64, by its name."""
    return {
        layer.name: [keras.ops.convert_to_numpy(x).astype("float64") for x in layer.weights]
        for layer in model.layers
    }


def numpy_logits(by_layer, pooling, image, block=None, change=0.0):
    """Logits of one image in float64, with `change` `(A, T, T)` added to the scores of a block."""
    weights = by_layer.get

    def normed(x, name):
        scale, offset = weights(name)
        centered = x - x.mean(axis=-1, keepdims=True)
        return (
            centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + offset
        )

    def dense(x, name):
        kernel, bias = weights(name)
        return x @ kernel + bias

    mean, variance, *_ = weights("normalization")
    pixels = (image - mean) / np.sqrt(variance)
    patches = pixels.reshape(2, 4, 3, 4, 3).swapaxes(1, 2).reshape(6, 48)
    x = dense(patches, "patch_embedding")
    if pooling == "token":
        x = np.concatenate([weights("class_token")[0][0], x])
    x = x + weights("position_embedding")[0][0]
    for number in range(1, DEPTH + 1):
        name = f"block_{number}"
        y = normed(x, f"{name}_attention_norm")
        query, query_bias, key, key_bias, value, value_bias, output, output_bias = weights(
            f"{name}_attention"
        )[:8]
        queries, keys, values = (
            np.einsum("td,dah->ath", y, kernel) + bias[:, None]
            for kernel, bias in ((query, query_bias), (key, key_bias), (value, value_bias))
        )
        scores = softmax(queries @ keys.swapaxes(1, 2) / np.sqrt(query.shape[-1]))
        if number == block:
            scores = scores + change
        x = x + np.einsum("ath,ahd->td", scores @ values, output) + output_bias
        y = dense(normed(x, f"{name}_mlp_norm"), f"{name}_mlp_hidden")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
        x = x + dense(y, f"{name}_mlp_output")
    x = normed(x, "norm")
    return dense(x[0] if pooling == "token" else x.mean(axis=0), "head")


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_gradients_agree_with_finite_differences_of_numpy(model, images, pooling):
    if pooling == "mean":
        mean = VisionTransformer.from_config({**model.get_config(), "pooling": "mean"})
        mean.adapt(images)
        rng = np.random.default_rng(2)
        for weight in mean.trainable_weights:
            weight.assign(rng.normal(0, 0.4, weight.shape))
        model = mean
    classes = np.array([2, 0, 3, 3, 1])
    gradients = attention_gradients(model, images, classes)
    scores = attention_scores(model, images)
    assert gradients.shape == scores.shape and gradients.dtype == np.float32
    start = numpy_weights(model), pooling
    logits = model.predict(images, verbose=0)[1]
    np.testing.assert_allclose(numpy_logits(*start, images[1]), logits, atol=1e-4)
    random = np.random.default_rng(3)
    for image, block, head, query, key in random.integers(0, scores.shape, (40, 5)):
        change = np.zeros(scores.shape[2:])
        change[head, query, key] = 1e-4
        above, below = (
            numpy_logits(*start, images[image], block + 1, sign * change)[classes[image]]
            for sign in (1, -1)
        )
        found = gradients[image, block, head, query, key]
        assert found == pytest.approx((above - below) / 2e-4, rel=1e-3, abs=1e-4)
    if pooling == "token":  # The head reads the class token only.
        assert not gradients[:, -1, :, 1:].any() and gradients[:, -1, :, 0].any()


def test_gradients_of_one_layer_of_keras_agree_with_their_formula():
    """Two of six tokens are masked; the logit is linear in the scores."""
    tokens = TOKENS.copy()
    tokens[:, 4:] = 0
    inputs, layer = keras.Input((6, 8)), attention_layer()
    masked = keras.layers.Masking()(inputs)
    pooled = keras.layers.GlobalAveragePooling1D()(layer(masked, masked))
    head = keras.layers.Dense(3)
    model = keras.Model(inputs, head(pooled))
    classes = np.array([0, 2, 1])
    *_, value, value_bias, output, _ = (np.asarray(x) for x in layer.get_weights())
    values = np.einsum("bsd,dah->bash", tokens, value) + value_bias[None, :, None]
    # Each of the four tokens that are pooled counts for a quarter.
    per_key = np.einsum("bash,ahd,dk->bask", values, output, head.get_weights()[0])
    expected = np.zeros((3, HEADS, 6, 6))
    expected[:, :, :4] = per_key[np.arange(3), :, :, classes][:, :, None] / 4
    found = attention_gradients(model, tokens, classes)[:, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "classes", [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, -1], [0.0] * 5, 1, [[0]] * 5]
)
def test_classes_that_the_images_cannot_have_are_refused(model, images, classes):
    with pytest.raises(ValueError) as error:
        attention_gradients(model, images, classes)
    assert "integer from 0 to 3 for each of 5 images. Received: classes=" in str(error.value)


def test_gradients_of_other_outputs_and_layers_are_refused():
    inputs = keras.Input((6, 8))
    tokens = attention_layer()(inputs, inputs)
    with pytest.raises(ValueError, match=r"one output of shape \(batch, classes\)"):
        attention_gradients(keras.Model(inputs, tokens), TOKENS, [0, 0, 0])
    grouped = keras.layers.GroupQueryAttention(4, 2, 1, name="grouped")(inputs, inputs)
    with pytest.raises(ValueError, match="Received: layer 'grouped', a GroupedQueryAttention"):
        attention_gradients(keras.Model(inputs, grouped[:, 0]), TOKENS, [0, 0, 0])


# Maps of a class


@pytest.mark.parametrize("discard_ratio", [0.0, 0.5])
def test_gradient_weighted_rollout_agrees_with_loops(discard_ratio):
    scores = random_scores(10, 2, 3, 2, 5, 5)
    gradients = np.random.default_rng(11).normal(size=scores.shape)
    weighted = (scores * gradients).mean(axis=2, keepdims=True)
    expected = rollout_by_loops(np.maximum(weighted, 0), "mean", discard_ratio, True)
    found = attention_rollout(scores, discard_ratio=discard_ratio, gradients=gradients)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_relevance_agrees_with_loops():
    scores = random_scores(12, 2, 3, 2, 4, 4)
    gradients = np.random.default_rng(13).normal(size=scores.shape)
    tokens, expected = range(4), []
    for image, slopes in zip(scores.tolist(), gradients.tolist()):
        relevance = [[float(i == j) for j in tokens] for i in tokens]
        for block, slope in zip(image, slopes):
            fused = [
                [sum(max(a[i][j] * g[i][j], 0) for a, g in zip(block, slope)) / 2 for j in tokens]
                for i in tokens
            ]
            relevance = [
                [
                    relevance[i][j] + sum(fused[i][k] * relevance[k][j] for k in tokens)
                    for j in tokens
                ]
                for i in tokens
            ]
        expected.append(relevance)
    np.testing.assert_allclose(attention_relevance(scores, gradients), expected, atol=1e-12)


@pytest.mark.parametrize("function", [attention_relevance, attention_rollout])
def test_gradients_of_other_scores_are_refused(function):
    scores = random_scores(14, 2, 1, 1, 3, 3)
    with pytest.raises(ValueError, match=r"Received: gradients.shape=\(1, 1, 1, 3, 3\)"):
        function(scores, gradients=scores[:1])
    with pytest.raises(ValueError, match="Expected `gradients` to be finite"):
        function(scores, gradients=scores * np.nan)


# Distance


def test_uniform_attention_along_a_line_has_the_distance_of_two_random_points():
    for count in (1, 2, 7):
        scores = np.full((2, 3, 2, count, count), 1 / count)
        expected = 4 * (count**2 - 1) / (3 * count)
        for grid in ((1, count), (count, 1)):
            found = attention_distance(scores, grid, patch_size=4, class_token=False)
            np.testing.assert_allclose(found, np.full((2, 3, 2), expected))
    # Of four patches in a square, two are neighbours and one is across.
    found = attention_distance(np.ones((1, 1, 1, 4, 4)), (2, 2), patch_size=8, class_token=False)
    np.testing.assert_allclose(found, 8 * (1 + 1 + math.sqrt(2)) / 4)


def test_distance_agrees_with_loops_on_a_rectangular_grid():
    scores = random_scores(15, 2, 2, 3, 7, 7)
    found = attention_distance(scores, (2, 3), patch_size=5)
    for index in np.ndindex(found.shape):
        distance = weight = 0.0
        for query in range(6):
            for key in range(6):
                rows, columns = query // 3 - key // 3, query % 3 - key % 3
                attention = scores[(*index, query + 1, key + 1)]
                distance += attention * 5 * math.sqrt(rows**2 + columns**2)
                weight += attention
        assert found[index] == pytest.approx(distance / weight)


def test_a_head_that_looks_at_its_own_patch_has_distance_zero_and_the_class_token_has_none():
    scores = np.zeros((1, 1, 3, 5, 5))
    scores[0, 0, 0] = np.eye(5)
    scores[0, 0, 1, :, 0] = 1
    scores[0, 0, 2, 1, 4] = 0.1  # The rest of it goes to the class token.
    scores[0, 0, 2, 1, 0] = 0.9
    distance = attention_distance(scores, (2, 2), patch_size=4)[0, 0]
    np.testing.assert_allclose(distance, [0, np.nan, 4 * math.sqrt(2)])


@pytest.mark.parametrize("grid", [(2, 2), (7, 1), 6, (2.0, 3), (0, 3)])
def test_a_grid_of_other_patches_is_refused(grid):
    with pytest.raises(ValueError) as error:
        attention_distance(random_scores(16, 1, 1, 1, 7, 7), grid, 4)
    assert f"Received: grid={grid}" in str(error.value)
