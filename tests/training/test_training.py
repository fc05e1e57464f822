"""Schedules, the optimizer of a recipe, and training runs on small data sets."""

import csv
import dataclasses

import keras
import numpy as np
import pytest
from conftest import cifar10_on_disk
from sklearn.utils.class_weight import compute_class_weight

from keras_vit.data import Batches, Dataset, batches
from keras_vit.training import (
    build_model,
    compile_model,
    fit,
    fitting,
    operations,
    schedules,
    step_schedule,
)
from keras_vit.training.journal import Journal
from keras_vit_cli.recipes import RECIPES

SMALL = {"patch_size": 4, "embed_dim": 16, "mlp_dim": 32, "num_heads": 2, "depth": 1}


def colours(count=96):
    """Images of three classes that differ in their colour."""
    labels = np.arange(count) % 3
    noise = np.random.default_rng(0).integers(0, 60, (count, 8, 8, 3))
    images = (noise + 180 * np.eye(3)[labels][:, None, None]).astype("uint8")
    return Dataset("colours", images, labels, images[:9], labels[:9], ["r", "g", "b"], True)


def small_model(dataset, **settings):
    keras.utils.set_random_seed(0)
    return build_model(dataset, small_recipe(**settings))


def small_recipe(**settings):
    return dataclasses.replace(
        RECIPES["baseline"],
        **{"epochs": 4, "batch_size": 16, "learning_rate": 3e-3, **SMALL, **settings},
    )


@pytest.mark.parametrize(
    ("epochs", "drops", "factors"),
    [
        (160, [100, 150], {0: 1, 99: 1, 100: 0.1, 149: 0.1, 150: 0.01, 159: 0.01}),
        (10, [6, 9], {5: 1, 6: 0.1, 8: 0.1, 9: 0.01}),
        (16, [10, 15], {9: 1, 10: 0.1, 15: 0.01}),
        (1, [1, 1], {0: 1}),
    ],
)
def test_the_learning_rate_drops_to_a_tenth_at_each_milestone(epochs, drops, factors):
    schedule, found = step_schedule(3e-4, epochs, RECIPES["baseline"].milestones)
    assert found == drops
    for epoch, factor in factors.items():
        assert schedule(epoch) == pytest.approx(3e-4 * factor)


def test_a_cosine_schedule_warms_up_and_decays_to_zero():
    recipe = dataclasses.replace(
        RECIPES["baseline"], epochs=10, schedule="cosine", warmup=0.2, learning_rate=1e-3
    )
    rate = schedules.learning_rate(recipe, steps_per_epoch=5)
    for step, expected in {0: 0, 5: 5e-4, 10: 1e-3, 30: 5e-4, 50: 0}.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-8)
    rate = schedules.learning_rate(dataclasses.replace(recipe, warmup=0.0), steps_per_epoch=5)
    for step, expected in {0: 1e-3, 25: 5e-4, 50: 0}.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-8)
    rate = schedules.learning_rate(recipe, steps_per_epoch=5, start=1000)
    rate = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(rate))
    for step, expected in {1000: 0, 1005: 5e-4, 1010: 1e-3, 1030: 5e-4, 1050: 0}.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-8)


def test_a_cosine_schedule_is_applied_at_each_step_and_recorded(tmp_path):
    dataset = colours()
    recipe = small_recipe(epochs=3, schedule="cosine")
    history = fit(small_model(dataset), dataset, recipe, run_dir=tmp_path)
    expected = [3e-3 * (1 + np.cos(np.pi * epoch / 3)) / 2 for epoch in (1, 2, 3)]
    np.testing.assert_allclose(history["learning_rate"], expected, atol=1e-7)
    assert "learning_rate" in (tmp_path / "history.csv").read_text().splitlines()[0]


def test_the_optimizer_has_the_settings_of_the_recipe():
    dataset = colours()
    model = small_model(dataset)
    compile_model(model, RECIPES["baseline"])
    assert isinstance(model.optimizer, keras.optimizers.AdamW)
    assert float(model.optimizer.learning_rate) == pytest.approx(3e-4)
    assert model.optimizer.weight_decay == 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kernels_only", [False, True])
def test_weight_decay_applies_to_kernels_and_optionally_to_other_variables(optimizer, kernels_only):
    model = small_model(colours())
    recipe = small_recipe(
        optimizer=optimizer, weight_decay=0.5, learning_rate=0.1, decay_kernels_only=kernels_only
    )
    compile_model(model, recipe)
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    model.optimizer.apply([keras.ops.zeros(x.shape) for x in model.trainable_variables])
    for variable in model.trainable_variables:
        decayed = variable.name == "kernel" or not kernels_only
        expected = 0.95 if decayed else 1.0
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), expected, rtol=1e-6)


def test_loss_scaling_is_used_with_float16():
    dataset = colours()
    model = build_model(dataset, small_recipe(optimizer="muon"), "mixed_float16")
    compile_model(model, small_recipe(optimizer="muon"))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer.iteration_dtype == "float32"


def test_operations_are_counted():
    """Two blocks on four patches, with embeddings of size 16, with and without class token."""
    recipe = small_recipe(depth=2, patch_size=4)
    queries_output_mlp, keys_values = 2 * 16 * 16 + 2 * 16 * 32, 2 * 16 * 16
    embedding = 4 * 48 * 16
    products = 2 * 5 * keys_values + 6 * (queries_output_mlp + 2 * 5 * 16)
    assert operations(recipe, (8, 8, 3)) == 2 * (3 * products + 2 * embedding)
    recipe = dataclasses.replace(recipe, pooling="mean")
    products = 2 * 4 * keys_values + 8 * (queries_output_mlp + 2 * 4 * 16)
    assert operations(recipe, (8, 8, 3)) == 2 * (3 * products + 2 * embedding)


def test_training_reduces_the_loss_and_writes_its_history(tmp_path):
    dataset = colours()
    dataset, validation = dataset.hold_out(24, seed=0)
    model = small_model(dataset)
    recipe = small_recipe()
    history = fit(model, dataset, recipe, 0, validation, tmp_path)
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert history["val_accuracy"][-1] > 0.9
    with open(tmp_path / "history.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row.pop("epoch")) for row in rows] == [1, 2, 3, 4]
    assert [row.pop("precision") for row in rows] == ["float32"] * 4
    keys = ["accuracy", "learning_rate", "loss", "val_accuracy", "val_loss"]
    assert sorted(rows[0]) == keys
    assert sorted(history) == sorted([*keys, "seconds"])
    for key in keys:
        assert [float(row[key]) for row in rows] == pytest.approx(history[key])
    assert history["learning_rate"] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4])
    best = keras.saving.load_model(tmp_path / "best.keras")
    images, labels = validation
    predicted = best.predict(images, verbose=0).argmax(axis=1)
    assert np.mean(predicted == labels) == pytest.approx(max(history["val_accuracy"]))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
@pytest.mark.parametrize("at_once", [4, 100], ids=["some steps", "an epoch"])
def test_steps_in_one_program_train_the_same_model_as_single_steps(at_once, monkeypatch):
    """With a GPU, JAX reads batches from the device and runs several steps per dispatch."""
    results = []
    for accelerated in (False, True):
        for module in (batches, fitting):
            monkeypatch.setattr(module, "on_jax_accelerator", lambda value=accelerated: value)
        monkeypatch.setattr(fitting, "STEPS_AT_ONCE", at_once)
        model = small_model(colours(90))
        history = fit(model, colours(90), small_recipe(epochs=3), seed=1)
        del history["seconds"]
        results.append((history, model.get_weights(), int(model.optimizer.iterations)))
        assert model.steps_per_execution == (at_once if accelerated else 1)
    (history, weights, count), (expected, expected_weights, expected_count) = results
    assert count == expected_count == 3 * 6
    assert history.keys() == expected.keys()
    for key, values in expected.items():
        assert history[key] == pytest.approx(values, rel=1e-5)
    for ours, theirs in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_same_seed_trains_the_same_model():
    weights = []
    for _ in range(2):
        dataset = colours()
        model = small_model(dataset)
        fit(model, dataset, small_recipe(epochs=2), seed=0)
        weights.append(model.get_weights())
    for first, second in zip(*weights, strict=True):
        assert np.allclose(first, second, atol=1e-6)


def test_each_epoch_has_its_own_order_of_images(monkeypatch):
    dataset = colours(48)
    started, read = [], []

    class Recorder(Batches):
        def start_epoch(self, epoch, skipped=0):
            super().start_epoch(epoch, skipped)
            started.append(epoch)
            read.clear()

        def __getitem__(self, index):
            images, labels = super().__getitem__(index)
            read.append((index, images))
            return images, labels

    class Comparer(Journal):
        def on_epoch_end(self, epoch, logs=None):
            expected = Batches(dataset.train_images, dataset.train_labels, 16, seed=7)
            expected.start_epoch(epoch + 1)
            for index, images in read:
                assert np.array_equal(images, expected[index][0])
            assert {index for index, _ in read} == {0, 1, 2}
            super().on_epoch_end(epoch, logs)

    monkeypatch.setattr(batches, "Batches", Recorder)
    monkeypatch.setattr(fitting, "Journal", Comparer)
    fit(small_model(dataset), dataset, small_recipe(epochs=3), seed=7)
    assert started[-3:] == [1, 2, 3]


@pytest.mark.slow
def test_the_loss_falls_on_real_images():
    dataset = cifar10_on_disk().limit_train(2000, seed=0)
    keras.utils.set_random_seed(0)
    recipe = dataclasses.replace(RECIPES["quick"], epochs=3)
    model = build_model(dataset, recipe)
    history = fit(model, dataset, recipe)
    assert history["loss"][0] < 2.4
    assert history["loss"][-1] < history["loss"][0] - 0.15
    predicted = model.predict(dataset.test_images[:2000], batch_size=256, verbose=0).argmax(axis=1)
    assert np.mean(predicted == dataset.test_labels[:2000]) > 0.2


def test_balanced_weights_make_each_class_count_the_same():
    dataset = colours(24)
    kept = np.flatnonzero((dataset.train_labels != 0) | (np.arange(24) < 6))  # Of red, two.
    images, labels = dataset.train_images[kept], dataset.train_labels[kept]
    dataset = dataclasses.replace(dataset, train_images=images, train_labels=labels)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = fitting.class_weights(labels, "balanced")
    np.testing.assert_allclose([weights[label] for label in range(3)], expected)
    # In the first step, of all images.
    plain = {"epochs": 1, "dropout": 0.0, "augmentation": False, "batch_size": 32}
    model = small_model(dataset, **plain)
    losses = keras.losses.sparse_categorical_crossentropy(
        labels, model.predict(images, verbose=0), from_logits=True
    )
    mean = np.mean(expected[labels] * keras.ops.convert_to_numpy(losses))
    history = fit(model, dataset, small_recipe(class_weights="balanced", **plain))
    assert history["loss"][0] == pytest.approx(mean, rel=1e-5)
