"""Training that starts from pretrained weights: copied, frozen, or extended."""

import dataclasses
import os
import signal

import keras
import numpy as np
import pytest
from test_training import colours, small_model, small_recipe

from keras_vit import VisionTransformer
from keras_vit.training import CannotExtend, build_model, compile_model, fit, fitting
from keras_vit.training.checkpoints import copy_of_state, extend
from keras_vit.training.journal import Interrupted, Journal
from keras_vit.transfer import adapted

RECIPE = small_recipe(epochs=2, depth=2, dropout=0.2, schedule="cosine")


@pytest.fixture(scope="module")
def parent():
    """A trained and compiled model of three colours."""
    dataset = colours()
    model = small_model(dataset, depth=2, dropout=0.2)
    fit(model, dataset, RECIPE)
    return model


def weights_of(model, *layers):
    return [x for name in layers for x in model.get_layer(name).get_weights()]


def assert_equal(ones, others, equal=True):
    for one, other in zip(ones, others, strict=True):
        assert np.array_equal(one, other) == equal


def test_a_model_takes_over_weights_and_normalization(parent):
    dataset = dataclasses.replace(colours(), train_images=colours().train_images // 2)
    model = build_model(dataset, RECIPE, pretrained=parent)
    assert_equal(model.get_weights(), parent.get_weights())
    others = dataclasses.replace(dataset, class_names=["x", "y", "z"])
    model = build_model(others, RECIPE, pretrained=parent)
    assert not any(x.any() for x in weights_of(model, "head"))
    assert_equal(*(weights_of(x, "normalization", "norm") for x in (model, parent)))


def test_frozen_blocks_and_embeddings_stay_as_they_are(parent):
    dataset = colours()
    recipe = dataclasses.replace(RECIPE, freeze=1, weight_decay=0.5)
    model = build_model(dataset, recipe, pretrained=parent)
    fit(model, dataset, recipe, pretrained=parent)
    frozen = ["patch_embedding", "class_token", "position_embedding", "normalization"]
    frozen += [layer.name for layer in model.layers if layer.name.startswith("block_1_")]
    assert_equal(weights_of(model, *frozen), weights_of(parent, *frozen))
    trained = ["block_2_attention", "block_2_mlp_output", "norm", "head"]
    assert_equal(weights_of(model, *trained), weights_of(parent, *trained), equal=False)
    with pytest.raises(ValueError, match="freeze=3"):
        build_model(dataset, dataclasses.replace(RECIPE, freeze=3))


def test_frozen_positions_stay_as_they_are_where_small_images_come_first(parent):
    dataset = colours()
    small = {"image_scales": (0.5,), "image_scale_milestones": (0.5,)}
    recipe = dataclasses.replace(RECIPE, freeze=1, **small)
    model = build_model(dataset, recipe, pretrained=parent)
    fit(model, dataset, recipe, pretrained=parent)
    frozen = "position_embedding", "block_1_mlp_output"
    assert_equal(weights_of(model, *frozen), weights_of(parent, *frozen))


def test_what_would_be_lost_is_refused(parent):
    """Layers that the normalization depends on, and the scales of quantized kernels."""
    dataset = colours()
    doubled = keras.layers.Rescaling(2.0, name="doubled")
    model = VisionTransformer(**{**parent.get_config(), "augmentation": [doubled]})
    with pytest.raises(ValueError, match="Received: doubled"):
        build_model(dataset, RECIPE, pretrained=model)
    quantized = small_model(dataset, depth=2, dropout=0.2)
    quantized.get_layer("block_1_mlp_hidden").quantize("int8")
    with pytest.raises(ValueError, match="Received: layer .* with quantization_mode='int8'"):
        build_model(dataset, RECIPE, pretrained=quantized)
    with pytest.raises(ValueError, match="Expected a model that is not quantized"):
        adapted(quantized, class_names=["x", "y", "z"])


@pytest.mark.slow
def test_positions_are_interpolated_where_small_images_come_first(parent):
    dataset = colours()
    recipe = dataclasses.replace(RECIPE, image_scales=(0.5,), image_scale_milestones=(0.5,))
    seen = []

    class Watching(Journal):
        def on_train_begin(self, logs=None):
            seen.append(self.model.get_layer("position_embedding").position.numpy())
            super().on_train_begin(logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Journal", Watching)
        fit(build_model(dataset, recipe, pretrained=parent), dataset, recipe, pretrained=parent)
    table = parent.get_layer("position_embedding").position.numpy()
    np.testing.assert_allclose(seen[0][:, 1], table[:, 1:].mean(axis=1), atol=1e-6)


def extended(parent, run_dir, stop=None):
    """A run that extends another one, interrupted after so many steps."""
    dataset = colours()

    class Stopper(Journal):
        def on_train_batch_end(self, batch, logs=None):
            if stop == (self.epoch, batch):
                os.kill(os.getpid(), signal.SIGINT)
            super().on_train_batch_end(batch, logs)

    keras.utils.set_random_seed(1)
    model = build_model(dataset, RECIPE, pretrained=parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "Journal", Stopper)
        fit(model, dataset, RECIPE, run_dir=run_dir, pretrained=parent, extends=True)
    return model


def test_an_extended_run_continues_the_optimizer_with_a_new_schedule(parent):
    model = build_model(colours(), RECIPE, pretrained=parent)
    steps = int(parent.optimizer.iterations)
    compile_model(model, RECIPE, steps_per_epoch=6, steps_before=steps)
    extend(parent, model)
    before, after = copy_of_state(parent), copy_of_state(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    others = {"total", "count", "seed_generator_state"}
    assert {name.split("/")[-1] for name in changed} <= others
    # Whose count of steps Adam's bias correction needs.
    assert int(model.optimizer.iterations) == steps > 0
    rates = [float(x.optimizer.learning_rate) for x in (parent, model)]
    assert rates == pytest.approx([0, RECIPE.learning_rate], abs=1e-8)


@pytest.mark.slow
def test_an_extended_run_resumes_bit_for_bit(parent, tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    expected = extended(parent, tmp_path / "whole")
    with pytest.raises(Interrupted):
        extended(parent, tmp_path / "stopped", stop=(1, 2))
    assert_equal(extended(parent, tmp_path / "stopped").get_weights(), expected.get_weights())


def test_a_model_without_its_optimizer_cannot_be_extended(parent):
    model = build_model(colours(), RECIPE, pretrained=parent)
    compile_model(model, dataclasses.replace(RECIPE, optimizer="muon"))
    with pytest.raises(CannotExtend, match="missing in the"):
        extend(parent, model)
    with pytest.raises(CannotExtend, match="without its optimizer"):
        extend(type(parent).from_config(parent.get_config()), model)
    others = dataclasses.replace(colours(), class_names=["x", "y", "z"])
    model = build_model(others, RECIPE, pretrained=parent)
    compile_model(model, RECIPE)
    with pytest.raises(CannotExtend, match="classes of the data differ"):
        extend(parent, model)
