"""The faster layers compute the same as Keras's layers of the same name."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

from keras_vit.layers import Dropout, LayerNormalization, MultiHeadAttention, gelu
from keras_vit.layers.dropout import hashed

hashes_alone = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch's own dropout is used there"
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def trained(layer, inputs, seed=5):
    """Weights of a layer after one step of plain gradient descent, and its loss before."""
    arguments = [keras.Input(x.shape[1:]) for x in inputs]
    is_attention = isinstance(layer, keras.layers.MultiHeadAttention)
    output = layer(arguments[0], arguments[-1]) if is_attention else layer(*arguments)
    model = keras.Model(arguments, output)
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "torch")
    target = normal(seed, len(inputs[0]), *output.shape[1:])
    loss = model.train_on_batch(list(inputs), target)
    return layer.get_weights(), float(loss)


@pytest.mark.parametrize("lengths", [(7, 7), (1, 7), (3, 7)], ids=str)
@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_has_the_outputs_and_gradients_of_keras_s_attention(lengths, use_bias):
    query, value = normal(0, 2, lengths[0], 12), normal(1, 2, lengths[1], 12)
    if lengths[0] == lengths[1]:
        value = query
    ours = MultiHeadAttention(3, 4, use_bias=use_bias)
    theirs = keras.layers.MultiHeadAttention(3, 4, use_bias=use_bias)
    for layer in (ours, theirs):
        layer.build(query.shape, value.shape)
    weights = [normal(i, *w.shape) for i, w in enumerate(ours.get_weights())]
    ours.set_weights(weights)
    theirs.set_weights(weights)

    outputs = [layer(query, value, return_attention_scores=True) for layer in (ours, theirs)]
    for ours_part, theirs_part in zip(*outputs, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(ours_part), ops.convert_to_numpy(theirs_part), atol=1e-5
        )
    inputs = (query,) if value is query else (query, value)
    (after, loss), (expected, expected_loss) = (trained(layer, inputs) for layer in (ours, theirs))
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, a, b in zip(ours.weights, after, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name.path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_causal_mask": True},
        {"attention_mask": np.tril(np.ones((1, 5, 5), bool))},
        {"key": normal(9, 2, 5, 6)},
    ],
    ids=["causal", "mask", "key"],
)
def test_unsupported_attention_falls_back_to_keras(options):
    tokens = normal(0, 2, 5, 6)
    ours, theirs = MultiHeadAttention(2, 3), keras.layers.MultiHeadAttention(2, 3)
    for layer in (ours, theirs):
        layer.build(tokens.shape, tokens.shape)
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(
        ops.convert_to_numpy(ours(tokens, tokens, **options)),
        ops.convert_to_numpy(theirs(tokens, tokens, **options)),
        atol=1e-5,
    )


@pytest.mark.parametrize("filters", [None, "attention_output", "key"])
def test_attention_can_be_quantized_to_int8_entirely_or_in_part(filters):
    tokens = normal(0, 2, 5, 8)
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, MultiHeadAttention(2, 4)(inputs, inputs))
    before = model.predict(tokens, verbose=0)
    model.quantize("int8", filters=filters)
    np.testing.assert_allclose(model.predict(tokens, verbose=0), before, atol=0.1)


def test_attention_has_one_dropout_seed():
    ours, theirs = (
        kind(2, 4, dropout=0.5) for kind in (MultiHeadAttention, keras.layers.MultiHeadAttention)
    )
    for layer in (ours, theirs):
        layer.build((None, 5, 8), (None, 5, 8))
    assert len(ours.variables) == len(theirs.variables) == 8 + 1


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9, 1e-7, 0.0])
def test_dropout_drops_at_its_rate_and_rescales_the_rest(rate):
    ones = np.ones((501, 401), "float32")
    kept = ops.convert_to_numpy(Dropout(rate, seed=1)(ones, training=True))
    deviation = (rate * (1 - rate) / ones.size) ** 0.5
    assert np.mean(kept == 0) == pytest.approx(rate, abs=5 * deviation + 1e-5)
    np.testing.assert_allclose(kept[kept > 0], 1 / (1 - rate), rtol=1e-4)


def test_dropout_is_off_in_inference_and_random_in_each_step():
    ones = np.ones((8, 100), "float32")
    layer = Dropout(0.5, seed=3)
    assert np.array_equal(ops.convert_to_numpy(layer(ones)), ones)
    first, second = (ops.convert_to_numpy(layer(ones, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)
    again = ops.convert_to_numpy(Dropout(0.5, seed=3)(ones, training=True))
    assert np.array_equal(first, again)


def test_dropout_is_independent_for_neighbouring_elements():
    kept = ops.convert_to_numpy(Dropout(0.5, seed=0)(np.ones((400, 400), "float32"), training=True))
    for axis in (0, 1):
        neighbours = np.corrcoef(kept.ravel(), np.roll(kept, 1, axis).ravel())[0, 1]
        assert abs(neighbours) < 5 / 400


@hashes_alone
@pytest.mark.parametrize(
    ("first", "second"),
    [((3, 8), (3, 9)), ((3, 8), (4, 8)), ((3, 8), (8, 3)), ((0, 0), (0, 1))],
    ids=["next step", "next layer", "swapped words", "zeros"],
)
def test_dropout_with_different_seeds_is_independent(first, second):
    count = 2**16
    seeds = (ops.convert_to_tensor(np.array(words, "uint32")) for words in (first, second))
    pair = [ops.convert_to_numpy(hashed(count, seed)) / 2**32 for seed in seeds]
    for uniform in pair:
        assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    # Whether both drop the same elements, at a usual rate.
    table = np.histogram2d(*(uniform < 0.2 for uniform in pair), bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4
    assert abs(np.corrcoef(*pair)[0, 1]) < 5 / count**0.5


@hashes_alone
def test_each_bit_of_the_random_numbers_is_unbiased_and_independent():
    words = ops.convert_to_numpy(hashed(2**16, ops.convert_to_tensor(np.array([1, 2], "uint32"))))
    bits = np.unpackbits(words.view("uint8")).reshape(-1, 32)
    deviation = 0.5 / 2**8
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * deviation
    between = np.corrcoef(bits, rowvar=False) - np.eye(32)
    assert np.abs(between).max() < 5 / 2**8
    for distance in (1, 2, 65, 256):
        along = (bits[distance:] ^ bits[:-distance]).mean(axis=0)
        assert np.abs(along - 0.5).max() < 5 * deviation


def test_gelu_is_x_times_the_normal_cdf_and_has_its_derivative():
    x = np.linspace(-6, 6, 241).astype("float32")
    expected = x * stats.norm.cdf(x)
    np.testing.assert_allclose(ops.convert_to_numpy(gelu(ops.array(x))), expected, atol=1e-6)

    inputs = keras.Input((len(x),))
    shift = keras.layers.EinsumDense("bd,d->bd", (len(x),), kernel_initializer="ones")
    model = keras.Model(inputs, keras.layers.Activation(gelu)(shift(inputs)))
    model.compile(keras.optimizers.SGD(1.0), loss=lambda _, y: ops.sum(y))
    model.train_on_batch(x[None], x[None])
    slope = (1 - shift.get_weights()[0])[x != 0] / x[x != 0]  # The kernel multiplies x.
    derivative = stats.norm.cdf(x) + x * stats.norm.pdf(x)
    np.testing.assert_allclose(slope, derivative[x != 0], atol=1e-4)


def test_no_gradient_flows_through_dropped_elements():
    """A weight in front of each element is updated only where the element was kept."""
    inputs = keras.Input((2000,))
    scaled = keras.layers.Rescaling(1.0)(inputs)
    layer = keras.layers.EinsumDense("bd,d->bd", output_shape=(2000,), kernel_initializer="ones")
    model = keras.Model(inputs, Dropout(0.3, seed=1)(layer(scaled)))
    model.compile(keras.optimizers.SGD(1.0), loss=lambda _, y: ops.sum(y))
    model.train_on_batch(np.ones((1, 2000), "float32"), np.zeros((1, 2000), "float32"))
    moved = 1 - layer.get_weights()[0]
    assert np.mean(moved == 0) == pytest.approx(0.3, abs=0.06)
    np.testing.assert_allclose(moved[moved > 0], 1 / 0.7, rtol=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 3, 4, 6)], ids=str)
def test_layer_normalization_agrees_with_the_formula(shape):
    x, gamma, beta = 3 + 2 * normal(0, *shape), normal(1, 6), normal(2, 6)
    layer = LayerNormalization(epsilon=1e-3)
    layer.build(shape)
    layer.set_weights([gamma, beta])
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    result = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(result, gamma * expected + beta, atol=1e-5)


def test_layer_normalization_has_the_gradients_of_keras_s():
    x = 3 + 2 * normal(0, 4, 5, 6)
    results = []
    for kind in (LayerNormalization, keras.layers.LayerNormalization):
        inputs = keras.Input((5, 6))
        below = keras.layers.Dense(6)
        norm = kind(epsilon=1e-3)
        model = keras.Model(inputs, norm(below(inputs)))
        model.set_weights([normal(i, *w.shape) for i, w in enumerate(model.get_weights())])
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.train_on_batch(x, normal(7, 4, 5, 6))
        results.append(model.get_weights())
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("axis", [[1, 2], [2, 1]])
def test_layer_normalization_over_other_axes_falls_back_to_keras(axis):
    x = normal(0, 2, 5, 6)
    ours = ops.convert_to_numpy(LayerNormalization(axis=axis)(x))
    theirs = ops.convert_to_numpy(keras.layers.LayerNormalization(axis=axis)(x))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("layer", [Dropout(0.3), LayerNormalization()])
def test_half_precision_is_kept(layer):
    layer = type(layer).from_config({**layer.get_config(), "dtype": "mixed_bfloat16"})
    output = (
        layer(normal(0, 2, 5, 6), training=True)
        if isinstance(layer, Dropout)
        else layer(normal(0, 2, 5, 6))
    )
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
