"""Progressive resizing: stages of a run, and the state that grows with the images."""

import dataclasses

import keras
import numpy as np
import pytest
from test_training import colours, small_model, small_recipe

from keras_vit.training import compile_model, costs_of_epochs, fit, operations
from keras_vit.training.progressive_resizing import Stage, resized, stages_of, transfer
from keras_vit_cli.recipes import RECIPES

GROWING = {"image_scales": (0.5,), "image_scale_milestones": (0.5,)}


def test_stages_end_at_their_milestones_and_sizes_are_whole_patches():
    recipe = dataclasses.replace(
        RECIPES["baseline"],
        epochs=10,
        image_scales=(0.5, 0.7),
        image_scale_milestones=(0.42, 0.75),
    )
    assert stages_of(recipe, (32, 48, 3)) == [
        Stage(4, (16, 24)),
        Stage(8, (24, 32)),
        Stage(10, (32, 48)),
    ]
    # The last epoch is always one on images of full size.
    assert stages_of(dataclasses.replace(recipe, epochs=1), (32, 48, 3)) == [Stage(1, (32, 48))]
    assert stages_of(RECIPES["baseline"], (32, 32, 3)) == [Stage(160, (32, 32))]


def test_an_epoch_costs_what_its_images_cost():
    recipe = small_recipe(epochs=3, image_scales=(0.5,), image_scale_milestones=(0.6,))
    small, large = operations(recipe, (4, 4, 3)), operations(recipe, (8, 8, 3))
    assert costs_of_epochs(recipe, (8, 8, 3)) == [small, small, large]


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_growing_keeps_weights_optimizer_and_seeds_and_interpolates_positions(pooling):
    dataset, recipe = colours(), small_recipe(pooling=pooling)
    model = small_model(dataset, pooling=pooling)
    smaller = resized(model, (4, 4))
    for each in (model, smaller):
        compile_model(each, recipe)
    smaller.fit(dataset.train_images, dataset.train_labels, batch_size=16, verbose=0)
    table = smaller.get_layer("position_embedding").position
    rows = np.asarray(keras.ops.convert_to_numpy(table)).copy()
    rows[:, -1:] = 7.0  # The only patch of 4x4 pixels.
    table.assign(rows)
    transfer(smaller, model)
    grown = keras.ops.convert_to_numpy(model.get_layer("position_embedding").position)
    np.testing.assert_array_equal(grown[:, -4:], np.full((1, 4, 16), 7.0))
    np.testing.assert_array_equal(grown[:, :-4], rows[:, :-1])
    assert int(model.optimizer.iterations) == int(smaller.optimizer.iterations) > 0
    pairs = zip(
        [*smaller.variables, *smaller.optimizer.variables],
        [*model.variables, *model.optimizer.variables],
        strict=True,
    )
    same = [
        np.array_equal(*map(keras.ops.convert_to_numpy, pair))
        for pair in pairs
        if pair[0].shape == pair[1].shape
    ]
    assert all(same) and len(same) > 50


def test_a_run_does_not_stop_early_on_small_images(tmp_path):
    """The validation accuracy cannot rise: the learning rate is tiny."""
    dataset, growing = colours(), {"image_scales": (0.5,), "image_scale_milestones": (0.6,)}
    recipe = small_recipe(epochs=6, early_stopping=1, learning_rate=1e-12, **growing)
    validation = dataset.test_images, dataset.test_labels
    history = fit(small_model(dataset), dataset, recipe, validation=validation, run_dir=tmp_path)
    assert len(history["loss"]) > stages_of(recipe, dataset.image_shape)[0].end == 4


@pytest.mark.slow
def test_a_run_that_grows_learns_on_images_of_full_size(tmp_path):
    dataset, recipe = colours(), small_recipe(epochs=4, **GROWING)
    keras.utils.set_random_seed(0)
    model = small_model(dataset)
    history = fit(model, dataset, recipe, validation=(dataset.test_images, dataset.test_labels))
    assert len(history["loss"]) == 4 and history["val_accuracy"][-1] > 0.9
    logits = model.predict(dataset.test_images, verbose=0)
    accuracy = (logits.argmax(axis=1) == dataset.test_labels).mean()
    assert accuracy == pytest.approx(history["val_accuracy"][-1])


def test_without_a_crop_nothing_could_be_resized():
    recipe = small_recipe(augmentation=False, **GROWING)
    dataset = colours()
    model = small_model(dataset, augmentation=False)
    with pytest.raises(ValueError, match="Expected a `RandomResizedCrop`.*Received: augmentation="):
        fit(model, dataset, recipe)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_for_fewer_epochs(tmp_path):
    dataset = colours(24)
    first = fit(small_model(dataset), dataset, small_recipe(epochs=3), run_dir=tmp_path)
    again = fit(small_model(dataset), dataset, small_recipe(epochs=2), run_dir=tmp_path)
    assert again == first and len(again["loss"]) == 3
