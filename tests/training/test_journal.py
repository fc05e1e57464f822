"""A training that stops anywhere and goes on ends where one that never stopped ends."""

import csv
import dataclasses
import os
import signal
import warnings

import keras
import numpy as np
import pytest
from test_training import colours, small_model, small_recipe

from keras_vit import training
from keras_vit.training import checkpoints, fit, fitting, journal
from keras_vit.training.journal import Diverged, Interrupted, Journal, OtherData

RECIPE = small_recipe(epochs=3, dropout=0.2)  # 96 images: 6 steps an epoch.


def learn(run_dir, stop=None, **options):
    """Trains in a folder; `stop` is when a signal comes: an epoch and a batch, counted from one.

    Returns the model, or None if the training was stopped.
    """
    dataset, validation = colours(120).hold_out(24, seed=0)
    recipe = options.get("recipe", RECIPE)
    keras.utils.set_random_seed(0)
    model = training.build_model(dataset, recipe, options.get("precision", "float32"))

    class Stopper(Journal):
        def on_train_batch_end(self, batch, logs=None):
            if stop == (self.epoch + 1, self.skipped + batch + 1):
                for _ in range(options.get("times", 1)):
                    os.kill(os.getpid(), options.get("kind", signal.SIGINT))
            super().on_train_batch_end(batch, logs)

    patch = pytest.MonkeyPatch()
    patch.setattr(fitting, "Journal", Stopper)
    try:
        save_every = options.get("save_every")
        fit(model, dataset, recipe, 0, validation, run_dir, save_every=save_every)
    except Interrupted as error:
        assert error.status == 128 + options.get("kind", signal.SIGINT)
        return None
    finally:
        patch.undo()
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: its model and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return learn(folder), folder


def assert_same(model, folder, whole):
    expected, expected_folder = whole
    pairs = zip(checkpoints.state_of(model), checkpoints.state_of(expected), strict=True)
    for ours, theirs in pairs:
        ours, theirs = (keras.ops.convert_to_numpy(x) for x in (ours, theirs))
        np.testing.assert_array_equal(ours, theirs)
    files = [(path / "history.csv").read_text() for path in (folder, expected_folder)]
    assert files[0] == files[1]
    best = [keras.saving.load_model(path / "best.keras") for path in (folder, expected_folder)]
    for ours, theirs in zip(*(model.get_weights() for model in best), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([(1, 1)], id="first step"),
        pytest.param([(1, 6)], id="end of an epoch", marks=pytest.mark.slow),
        pytest.param([(2, 3)], id="middle"),
        pytest.param([(3, 6)], id="very end", marks=pytest.mark.slow),
        pytest.param(
            [(1, 2), (1, 5), (2, 6), (3, 1)], id="again and again", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_stops_and_goes_on_ends_bit_for_bit_the_same(stops, whole, tmp_path):
    for stop in stops:
        assert learn(tmp_path, stop) is None
    assert_same(learn(tmp_path), tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [
        "mixed_bfloat16",
        pytest.param(
            "mixed_float16",
            marks=pytest.mark.skipif(
                keras.backend.backend() != "jax", reason="others take minutes on a CPU"
            ),
        ),
    ],
)
def test_a_cosine_with_muon_resumes_in_every_precision(precision, tmp_path):
    parts = {"optimizer": "muon", "pooling": "mean", "decay_kernels_only": True}
    recipe = dataclasses.replace(RECIPE, schedule="cosine", warmup=0.3, **parts)
    undisturbed, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (undisturbed, stopped):
        folder.mkdir()
    expected = learn(undisturbed, recipe=recipe, precision=precision)
    for stop in ((1, 1), (2, 3)):
        assert learn(stopped, stop, recipe=recipe, precision=precision) is None
    assert_same(
        learn(stopped, recipe=recipe, precision=precision), stopped, (expected, undisturbed)
    )


def test_a_run_may_resume_in_another_precision(capsys, tmp_path):
    assert learn(tmp_path, (2, 3)) is None
    assert learn(tmp_path, precision="mixed_bfloat16") is not None
    assert "Resuming in bfloat16; the checkpoint was written in float32." in capsys.readouterr().out
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as lines:
        precisions = [row["precision"] for row in csv.DictReader(lines)]
    assert precisions == ["float32", "float32+bfloat16", "bfloat16"]


def test_a_loss_scale_starts_anew_where_a_run_resumes_in_float16_and_is_dropped_elsewhere():
    recipe = small_recipe(optimizer="muon")
    for before, after in (("float32", "mixed_float16"), ("mixed_float16", "float32")):
        models = [training.build_model(colours(), recipe, x) for x in (before, after)]
        for model in models:
            training.compile_model(model, recipe)
        state = checkpoints.copy_of_state(models[0])
        checkpoints.Checkpoint(1, 0, [], 0.0, "", state).assign(models[1])
        found = checkpoints.copy_of_state(models[1])
        shared = set(found) & set(state)
        assert sum("momentum" in name for name in shared) == len(models[0].trainable_variables)
        for name in shared:
            np.testing.assert_array_equal(found[name], state[name])


def test_sigterm_is_obeyed_like_ctrl_c(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert learn(tmp_path, (1, 2), kind=signal.SIGTERM) is None
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.newest(tmp_path / "checkpoints").batch == 2


def test_a_second_signal_does_not_wait_and_leaves_the_last_checkpoint_whole(whole, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Some shells ignore it.
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path, (2, 3), save_every=2, times=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoints.newest(tmp_path / "checkpoints").batch == 2
    assert_same(learn(tmp_path), tmp_path, whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path):
    assert learn(tmp_path, (2, 4), save_every=2) is None
    paths = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in paths] == [
        "step-000001-00000002.checkpoint",
        "step-000001-00000004.checkpoint",
    ]
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    with pytest.warns(UserWarning, match=paths[1].name):
        model = learn(tmp_path)
    assert_same(model, tmp_path, whole)


@pytest.mark.parametrize("length", [0, 10, 31, 1000])
def test_a_checkpoint_that_was_cut_off_is_not_read(length, tmp_path):
    path = tmp_path / "step-000001-00000000.checkpoint"
    path.write_bytes(bytes(length))
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.newest(tmp_path) is None


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert checkpoints.newest(tmp_path / "missing") is None


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path):
    dataset = colours()
    recipe = small_recipe(epochs=2, learning_rate=1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Diverged, match=r"epoch 1, step \d of 6: .* learning rate of 1e\+30"):
            fit(small_model(dataset), dataset, recipe, run_dir=tmp_path)
    assert checkpoints.newest(tmp_path / "checkpoints") is None


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    assert learn(tmp_path, (1, 2)) is None
    dataset, validation = colours(120).hold_out(24, seed=0)
    other = dataclasses.replace(dataset, train_images=255 - dataset.train_images)
    with pytest.raises(OtherData, match="other training images or labels"):
        fit(small_model(dataset), other, RECIPE, 0, validation, tmp_path)


@pytest.fixture(params=[[], ["gpu:0"]], ids=["at once", "while training goes on"])
def writing(request, monkeypatch):
    """Both ways of writing checkpoints: a GPU, or what is taken for one, has them written late."""
    monkeypatch.setattr(journal, "accelerators", lambda: request.param)


def test_checkpoints_written_either_way_lead_to_the_same_end(writing, whole, tmp_path):
    for stop in ((1, 2), (2, 5)):
        assert learn(tmp_path, stop, save_every=2) is None
    assert_same(learn(tmp_path), tmp_path, whole)


def test_a_checkpoint_that_cannot_be_written_ends_the_training(writing, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    dataset = colours(24)
    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(small_model(dataset), dataset, small_recipe(epochs=1), run_dir=tmp_path)


def test_training_does_not_change_a_checkpoint_that_is_written_late(writing, monkeypatch, tmp_path):
    late, at_once, copy_of_state = [], [], checkpoints.copy_of_state

    def noted(model):
        arrays = copy_of_state(model)
        at_once.append([array.tobytes() for array in arrays.values()])
        return arrays

    monkeypatch.setattr(checkpoints, "copy_of_state", noted)
    monkeypatch.setattr(checkpoints, "save", lambda _, checkpoint: late.append(checkpoint))
    dataset = colours(48)
    fit(small_model(dataset), dataset, small_recipe(epochs=2), run_dir=tmp_path, save_every=1)
    written = [[array.tobytes() for array in checkpoint.arrays.values()] for checkpoint in late]
    assert written == at_once
    assert len(late) == 6 and at_once[0] != at_once[1]
