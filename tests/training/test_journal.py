"""A run that is interrupted and resumed at any step gives the result of an uninterrupted one."""

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
from keras_vit.training.journal import DifferentData, Diverged, Interrupted, Journal

RECIPE = small_recipe(epochs=3, dropout=0.2)  # 96 images: 6 steps an epoch.


def train(run_dir, stop=None, **options):
    """Trains in a run directory, sending a signal at the epoch and batch `stop`, counted from one.

    Returns the model, or None if training was interrupted.
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
def uninterrupted(tmp_path_factory):
    """An uninterrupted run: its model and its run directory."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(folder), folder


def assert_same(model, folder, uninterrupted):
    expected, expected_folder = uninterrupted
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
        pytest.param([(3, 6)], id="last step", marks=pytest.mark.slow),
        pytest.param([(1, 2), (1, 5), (2, 6), (3, 1)], id="several times", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_gives_bitwise_identical_results(stops, uninterrupted, tmp_path):
    for stop in stops:
        assert train(tmp_path, stop) is None
    assert_same(train(tmp_path), tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param((1, 3), id="on small images", marks=pytest.mark.slow),
        pytest.param((2, 6), id="when they grow", marks=pytest.mark.slow),
        pytest.param((3, 2), id="on large images", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_progressive_resizing_resumes_bit_for_bit(stop, tmp_path):
    recipe = dataclasses.replace(RECIPE, image_scales=(0.5,), image_scale_milestones=(0.5,))
    undisturbed, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    for folder in (undisturbed, stopped):
        folder.mkdir()
    expected = train(undisturbed, recipe=recipe)
    assert train(stopped, stop, recipe=recipe) is None
    assert_same(train(stopped, recipe=recipe), stopped, (expected, undisturbed))


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
def test_a_cosine_schedule_with_muon_resumes_in_every_precision(precision, tmp_path):
    parts = {"optimizer": "muon", "pooling": "mean", "decay_kernels_only": True}
    recipe = dataclasses.replace(RECIPE, schedule="cosine", warmup=0.3, **parts)
    undisturbed, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    for folder in (undisturbed, stopped):
        folder.mkdir()
    expected = train(undisturbed, recipe=recipe, precision=precision)
    for stop in ((1, 1), (2, 3)):
        assert train(stopped, stop, recipe=recipe, precision=precision) is None
    assert_same(
        train(stopped, recipe=recipe, precision=precision), stopped, (expected, undisturbed)
    )


@pytest.mark.slow
def test_a_run_can_resume_in_another_precision(capsys, tmp_path):
    assert train(tmp_path, (2, 3)) is None
    assert train(tmp_path, precision="mixed_bfloat16") is not None
    assert "Resuming in bfloat16; the checkpoint was written in float32." in capsys.readouterr().out
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as lines:
        precisions = [row["precision"] for row in csv.DictReader(lines)]
    assert precisions == ["float32", "float32+bfloat16", "bfloat16"]


def test_the_loss_scale_is_reset_or_dropped_if_a_run_resumes_in_another_precision():
    recipe = small_recipe(optimizer="muon")
    for before, after in (("float32", "mixed_float16"), ("mixed_float16", "float32")):
        models = [training.build_model(colours(), recipe, x) for x in (before, after)]
        for model in models:
            training.compile_model(model, recipe)
        state = checkpoints.copy_of_state(models[0])
        checkpoints.Checkpoint(1, 0, [], 0.0, "", state).assign(models[1])
        restored = checkpoints.copy_of_state(models[1])
        shared = set(restored) & set(state)
        assert sum("momentum" in name for name in shared) == len(models[0].trainable_variables)
        for name in shared:
            np.testing.assert_array_equal(restored[name], state[name])


def test_sigterm_interrupts_like_ctrl_c(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert train(tmp_path, (1, 2), kind=signal.SIGTERM) is None
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.newest(tmp_path / "checkpoints").batch == 2


@pytest.mark.slow
def test_a_second_signal_acts_at_once_and_the_last_checkpoint_stays_intact(uninterrupted, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Some shells ignore it.
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, (2, 3), save_every=2, times=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoints.newest(tmp_path / "checkpoints").batch == 2
    assert_same(train(tmp_path), tmp_path, uninterrupted)


def test_a_run_resumes_from_the_previous_checkpoint_if_the_last_is_damaged(uninterrupted, tmp_path):
    assert train(tmp_path, (2, 4), save_every=2) is None
    paths = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in paths] == [
        "step-000001-00000002.checkpoint",
        "step-000001-00000004.checkpoint",
    ]
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[1].write_bytes(content)
    with pytest.warns(UserWarning, match=paths[1].name):
        model = train(tmp_path)
    assert_same(model, tmp_path, uninterrupted)


@pytest.mark.parametrize("length", [0, 10, 31, 1000])
def test_a_truncated_checkpoint_is_ignored(length, tmp_path):
    path = tmp_path / "step-000001-00000000.checkpoint"
    path.write_bytes(bytes(length))
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.newest(tmp_path) is None


def test_a_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoints.newest(tmp_path / "missing") is None


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(tmp_path):
    dataset = colours()
    recipe = small_recipe(epochs=2, learning_rate=1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Diverged, match=r"epoch 1, step \d of 6: .* learning rate of 1e\+30"):
            fit(small_model(dataset), dataset, recipe, run_dir=tmp_path)
    assert checkpoints.newest(tmp_path / "checkpoints") is None


def test_a_run_does_not_resume_with_different_training_data(tmp_path):
    assert train(tmp_path, (1, 2)) is None
    dataset, validation = colours(120).hold_out(24, seed=0)
    other = dataclasses.replace(dataset, train_images=255 - dataset.train_images)
    with pytest.raises(DifferentData, match="different training images or labels"):
        fit(small_model(dataset), other, RECIPE, 0, validation, tmp_path)


@pytest.fixture(params=[[], ["gpu:0"]], ids=["blocking", "in the background"])
def writing(request, monkeypatch):
    """Both ways of writing checkpoints: in the background with a (fake) GPU, else blocking."""
    monkeypatch.setattr(journal, "accelerators", lambda: request.param)


@pytest.mark.slow
def test_checkpoints_written_either_way_give_the_same_result(writing, uninterrupted, tmp_path):
    for stop in ((1, 2), (2, 5)):
        assert train(tmp_path, stop, save_every=2) is None
    assert_same(train(tmp_path), tmp_path, uninterrupted)


def test_training_stops_if_a_checkpoint_cannot_be_written(writing, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    dataset = colours(24)
    monkeypatch.setattr(checkpoints, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(small_model(dataset), dataset, small_recipe(epochs=1), run_dir=tmp_path)


def test_later_steps_do_not_change_a_pending_checkpoint(writing, monkeypatch, tmp_path):
    late, at_once, copy_of_state = [], [], checkpoints.copy_of_state

    def recorded(model):
        arrays = copy_of_state(model)
        at_once.append([array.tobytes() for array in arrays.values()])
        return arrays

    monkeypatch.setattr(checkpoints, "copy_of_state", recorded)
    monkeypatch.setattr(checkpoints, "save", lambda _, checkpoint: late.append(checkpoint))
    dataset = colours(48)
    fit(small_model(dataset), dataset, small_recipe(epochs=2), run_dir=tmp_path, save_every=1)
    written = [[array.tobytes() for array in checkpoint.arrays.values()] for checkpoint in late]
    assert written == at_once
    assert len(late) == 6 and at_once[0] != at_once[1]


def test_a_run_stops_early_also_if_it_was_interrupted(capsys, tmp_path):
    """The validation accuracy cannot rise: the learning rate is tiny."""
    recipe = dataclasses.replace(RECIPE, epochs=5, early_stopping=2, learning_rate=1e-12)
    assert train(tmp_path, (3, 2), recipe=recipe) is None
    train(tmp_path, recipe=recipe)
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith(("Epoch", "Stopped"))]
    assert [line[:11] for line in lines] == [f"Epoch {n}/5: "[:11] for n in (1, 2, 3)] + [
        "Stopped ear"
    ]
    assert "after epoch 3: val_accuracy was best in epoch 1, whose model is best.k" in lines[-1]
    assert not set("\b\r\x1b") & set(output)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4
