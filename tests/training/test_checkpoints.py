"""A checkpoint restores variables by name, or reports which ones differ."""

import hashlib
import io
import json

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_vit.training import checkpoints
from keras_vit.training.checkpoints import Checkpoint, DifferentVariables
from keras_vit_cli import train


class ReorderedAdamW(keras.optimizers.AdamW):
    """AdamW that creates its variables in another order."""

    def build(self, variables):
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        self._velocities, self._momentums = [], []
        for variable in variables:
            for name, kept in (("velocity", self._velocities), ("momentum", self._momentums)):
                kept.append(self.add_variable_from_reference(variable, name=name))


def compiled(optimizer="adamw", units=4, dtype="float32", seed=0):
    """A model with random variables, in which only the last layer has an explicit name."""
    layers = [keras.layers.Dense(4, dtype=dtype), keras.layers.Dropout(0.5, dtype=dtype)]
    layers += [
        keras.layers.Dense(4, dtype=dtype),
        keras.layers.Dense(units, dtype=dtype, name="head"),
    ]
    x = inputs = keras.Input((3,))
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, x)
    model.compile(optimizer, loss="mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros((1, units), "float32"), np.zeros((1, units), "float32"))
    rng = np.random.default_rng(seed)
    for variable in checkpoints.state_of(model):
        noise = rng.integers(0, 100, variable.shape)
        variable.assign(noise / 64 if "float" in variable.dtype else noise)
    return model


def saved(folder, model):
    """The state of a model, saved to a file and loaded restored."""
    copy = checkpoints.copy_of_state(model)
    checkpoints.save(folder, Checkpoint(1, 0, [], 0.0, "", copy))
    return checkpoints.newest(folder)


def assert_same(model, other):
    pairs = [checkpoints.copy_of_state(x) for x in (model, other)]
    assert list(pairs[0]) == list(pairs[1])
    for name, array in pairs[0].items():
        assert array.dtype == pairs[1][name].dtype
        np.testing.assert_array_equal(array, pairs[1][name], err_msg=name)


def ema_of_muon():
    return keras.optimizers.Muon(1e-2, use_ema=True, ema_momentum=0.9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", [lambda: "adamw", ema_of_muon], ids=["adamw", "muon"])
def test_a_new_model_restores_the_state_of_an_earlier_one(optimizer, dtype, tmp_path):
    first = compiled(optimizer(), dtype=dtype)
    checkpoint = saved(tmp_path, first)
    second = compiled(optimizer(), dtype=dtype, seed=1)
    assert {x.path for x in first.variables} != {x.path for x in second.variables}
    checkpoint.assign(second)
    assert_same(second, first)
    names = set(checkpoint.arrays)
    assert {"dense/kernel", "dense_1/kernel", "head/kernel", "loss/total"} <= names
    assert "seed_generator/seed_generator_state" in names
    for name in ("dense_1/kernel_momentum", "head/bias_momentum"):
        assert any(x.endswith(f"/{name}") for x in names), name


def test_optimizer_slots_are_restored_in_any_order(tmp_path):
    expected, model = compiled(), compiled(ReorderedAdamW(name="adam_w"), seed=1)
    saved(tmp_path, expected).assign(model)
    for ours, theirs in zip(model.optimizer._momentums, expected.optimizer._momentums):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))


@pytest.mark.parametrize(
    ("build", "difference"),
    [
        (
            lambda: compiled(units=5),
            r"head/kernel is \(4, 4\) float32 in the checkpoint and \(4, 5\) float32 in the model",
        ),
        (
            lambda: compiled(dtype="bfloat16"),
            r"dense/kernel is \(3, 4\) float32 in .* and \(3, 4\) bfloat16 in the model",
        ),
        (
            lambda: compiled("lion"),
            r"adam_w/iteration is \(\) int\d+ in .* and missing in the model",
        ),
    ],
    ids=["shape", "dtype", "optimizer"],
)
def test_a_model_with_different_variables_is_left_unchanged_and_the_difference_reported(
    build, difference, tmp_path
):
    checkpoint, model = saved(tmp_path, compiled()), build()
    before = checkpoints.copy_of_state(model)
    with pytest.raises(DifferentVariables, match=rf"of the model: .*{difference}.* and \d+ more$"):
        checkpoint.assign(model)
    for name, array in checkpoints.copy_of_state(model).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("name", ["keras", "keras_vit"])
def test_a_checkpoint_of_another_version_is_restored_with_a_warning(name, monkeypatch, tmp_path):
    model = compiled()
    checkpoint = saved(tmp_path, model)
    now = {**checkpoints.versions(), name: "9.9.9"}
    monkeypatch.setattr(checkpoints, "versions", lambda: now)
    with pytest.warns(UserWarning, match=f"written by keras .* is resumed with .*{name} 9.9.9"):
        checkpoint.assign(model)


def test_a_checkpoint_without_variable_names_is_refused_with_a_one_line_error(tmp_path):
    buffer = io.BytesIO()
    place = {"epoch": 1, "batch": 0, "rows": [], "seconds": 0.0, "data": ""}
    np.savez(buffer, place=json.dumps(place), **{"0": np.ones(3)})
    content = buffer.getvalue()
    path = tmp_path / "step-000001-00000000.checkpoint"
    path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(DifferentVariables, match="written by an older version of keras_vit") as old:
        checkpoints.newest(tmp_path)
    failure = train.explained(old.value, None)
    assert str(path) in str(failure) and "start over with --overwrite" in str(failure)
    assert failure.status == 2 and path.exists()


@pytest.mark.parametrize(
    "dtype",
    [bool, "int64", "uint32", "float16", "float64", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn],
)
def test_arrays_of_any_dtype_are_restored_bit_for_bit(dtype, tmp_path):
    values = np.array([[0, 1, 0.5], [-1, 3, 7]]).astype(dtype)
    arrays = {"matrix": values, "transposed": values.T, "scalar": values[0, 1], "empty": values[:0]}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    checkpoints.save(tmp_path, Checkpoint(1, 2, [{"loss": 0.5}], 0.0, "", arrays))
    restored = checkpoints.newest(tmp_path)
    assert (restored.epoch, restored.batch, restored.rows) == (1, 2, [{"loss": 0.5}])
    assert list(restored.arrays) == list(arrays)
    for name, array in arrays.items():
        ours = restored.arrays[name]
        assert (ours.dtype, ours.shape) == (array.dtype, array.shape)
        assert ours.tobytes() == array.tobytes()
