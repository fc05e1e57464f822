"""Muon against Keras's own on matrices, and the variables that it treats as matrices."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_vit import Muon, VisionTransformer, load_model
from keras_vit.layers import MultiHeadAttention


def to_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def updated(optimizer, variables, gradients):
    """The variables as arrays after one step for each list of gradients."""
    optimizer.build(variables)
    for step in gradients:
        optimizer.apply([ops.convert_to_tensor(x) for x in step], variables)
    return [to_numpy(variable) for variable in variables]


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def by_keras(arrays, gradients, **options):
    """Matrices updated by `keras.optimizers.Muon`."""
    variables = [keras.Variable(x, name=f"matrix_{i}") for i, x in enumerate(arrays)]
    options = {"learning_rate": 0.01, "weight_decay": 0.1, **options}
    return updated(keras.optimizers.Muon(**options), variables, gradients)


@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_are_updated_as_by_keras_s_muon(nesterov):
    shapes = [(6, 6), (6, 12), (12, 6), (6, 6)]
    arrays = [noise(i, *shape) for i, shape in enumerate(shapes)]
    gradients = [[noise(10 * i + j, *shape) for j, shape in enumerate(shapes)] for i in range(3)]
    variables = []
    for i, array in enumerate(arrays):
        with keras.name_scope(f"layer_{i}"):
            variables.append(keras.Variable(array, name="kernel"))
    results = updated(Muon(0.01, weight_decay=0.1, nesterov=nesterov), variables, gradients)
    for ours, theirs in zip(results, by_keras(arrays, gradients, nesterov=nesterov), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_attention_projections_are_matrices_and_the_rest_is_left_to_adamw():
    layer = MultiHeadAttention(num_heads=2, key_dim=3)
    layer.build((None, 5, 6), (None, 5, 6))
    variables = layer.trainable_variables
    arrays = [to_numpy(variable) for variable in variables]
    gradients = [[noise(20 * i + j, *x.shape) for j, x in enumerate(arrays)] for i in range(2)]
    results = updated(Muon(0.01, weight_decay=0.1), variables, gradients)
    kernels = [i for i, x in enumerate(arrays) if x.ndim == 3]
    assert len(kernels) == 4

    def pick(values, indices, *shape):
        return [values[i].reshape(shape or values[i].shape) for i in indices]

    matrices = [pick(step, kernels, 6, 6) for step in gradients]
    expected = by_keras(pick(arrays, kernels, 6, 6), matrices)
    for i, theirs in zip(kernels, expected, strict=True):
        np.testing.assert_allclose(results[i].reshape(6, 6), theirs, atol=2e-5)

    biases = [i for i in range(len(arrays)) if i not in kernels]
    others = [keras.Variable(arrays[i]) for i in biases]
    adamw = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    expected = updated(adamw, others, [pick(step, biases) for step in gradients])
    for i, theirs in zip(biases, expected, strict=True):
        np.testing.assert_allclose(results[i], theirs, atol=1e-6)


def test_convolutions_are_left_to_adamw_and_dense_kernels_named_like_projections_are_not():
    layers = [keras.layers.Conv2D(8, 3), keras.layers.Dense(8, name="attention_output")]
    for layer in layers:
        layer.build((None, 6, 6, 4))
    optimizer = Muon()
    optimizer.build([layer.kernel for layer in layers])
    assert [x is None for x in optimizer.adam_velocities] == [False, True]
    gradients = [np.ones((3, 3, 4, 8), "float32"), noise(5, 4, 8)]
    before = to_numpy(layers[1].kernel)
    optimizer.apply([ops.convert_to_tensor(x) for x in gradients], [x.kernel for x in layers])
    sizes = np.linalg.svd(to_numpy(layers[1].kernel) - before, compute_uv=False)
    assert sizes.min() > 0.5 * sizes.max()


@pytest.mark.parametrize("options", [{"exclude_layers": "head"}, {"iteration_dtype": "bf16"}])
def test_invalid_arguments_are_refused(options):
    with pytest.raises(ValueError, match=f"Received: {next(iter(options))}="):
        Muon(**options)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow only")
def test_several_tensorflow_replicas_are_refused(monkeypatch):
    import tensorflow as tf

    strategy = type("Strategy", (), {"num_replicas_in_sync": 2})()
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    with pytest.raises(ValueError, match="one replica.*Received: num_replicas_in_sync=2"):
        Muon().build([keras.Variable(np.ones((2, 2)), name="kernel")])


def small_model():
    sizes = {"embed_dim": 8, "mlp_dim": 16, "num_heads": 2, "depth": 2, "pooling": "mean"}
    return VisionTransformer((8, 8, 3), augmentation=[], **sizes)


def test_the_matrices_of_a_model_are_the_kernels_of_its_blocks():
    model = small_model()
    optimizer = Muon()
    optimizer.build(model.trainable_variables)
    pairs = zip(model.trainable_variables, optimizer.adam_velocities, strict=True)
    matrices = {variable.path for variable, velocity in pairs if velocity is None}
    assert len(matrices) == 2 * (4 + 2)
    assert all(x.startswith("block_") and x.endswith("/kernel") for x in matrices)


def test_updates_have_singular_values_close_to_one():
    matrix = keras.Variable(np.zeros((16, 32), "float32"), name="kernel")
    (results,) = updated(Muon(0.5, weight_decay=0.0), [matrix], [[1e-3 * noise(3, 16, 32)]])
    sizes = np.linalg.svd(results / (0.5 * 0.2 * 32**0.5), compute_uv=False)
    # The iteration ends between these bounds (Jordan et al., 2024).
    assert sizes.min() > 0.6 and sizes.max() < 1.3


def test_the_iteration_in_bfloat16_is_close_to_float32():
    gradient = noise(4, 24, 24)
    full, half = (
        updated(
            Muon(0.1, weight_decay=0.0, iteration_dtype=dtype),
            [keras.Variable(np.zeros((24, 24), "float32"), name="kernel")],
            [[gradient]],
        )[0]
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.1 * np.abs(full).max())


@pytest.mark.slow
def test_a_model_compiled_with_muon_trains_and_can_be_saved_and_loaded(tmp_path):
    model = small_model()
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3)).astype("uint8")
    labels = np.arange(32) % 10
    model.adapt(images)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Muon(0.01, iteration_dtype="bfloat16"), loss)
    history = model.fit(images, labels, epochs=12, verbose=0).history["loss"]
    assert history[-1] < history[0] - 0.3
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.optimizer.iteration_dtype == "bfloat16"
    pairs = zip(loaded.optimizer.variables, model.optimizer.variables, strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
