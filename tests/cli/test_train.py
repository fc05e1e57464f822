import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from conftest import coloured

from keras_vit import data, devices, files, prediction, training
from keras_vit.reporting import figures, representations
from keras_vit.training import checkpoints
from keras_vit_cli import backend, inputs, main, settings
from keras_vit_cli import train as train_command
from keras_vit_cli.errors import CommandError, failed_write
from keras_vit_cli.recipes import RECIPES
from keras_vit_cli.run_directory import RunDirectory

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=1", "--patch-size=8"]


@pytest.fixture(autouse=True)
def keep_the_backend(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())


@pytest.fixture(autouse=True)
def save_time(monkeypatch):
    """Four of a run's pictures, which `tests/reporting` looks at; the speed; a second batch."""
    monkeypatch.setattr(representations, "draw_all", lambda *_, **__: None)
    monkeypatch.setattr(devices, "operations_per_second", lambda *_: 1e11)
    monkeypatch.setattr(prediction, "BATCH_SIZE", 512)


def train(*arguments, folder):
    """Runs a tiny training in this process and returns its exit status."""
    places = [f"--output={folder / 'run'}", f"--figures-dir={folder / 'figures'}"]
    return main.train([*TINY, "--limit-train=32", "--epochs=1", *places, *arguments])


def command(*arguments):
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def test_help_answers_without_importing_keras():
    timed = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not re.search(r"\| +(keras|tensorflow|numpy)$", timed.stderr, re.MULTILINE)
    for option in ("dataset", "data-dir", "epochs", "batch-size", "learning-rate", "seed"):
        assert f"--{option} " in timed.stdout
    for option in ("mixed-precision", "no-augmentation", "overwrite", "tensorboard"):
        assert f"--{option}" in timed.stdout


def test_a_backend_that_is_not_installed_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    assert main.train(["--backend", "jax"]) == 2
    assert "pip install jax" in capsys.readouterr().err


@pytest.mark.parametrize("installed", ["jax", None])
def test_a_backend_of_keras_s_own_choice_that_is_missing_is_one_line(installed, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name == installed)
    wanted = "try `pip install tensorflow`" + (", or --backend jax" if installed else "$")
    with pytest.raises(CommandError, match=wanted), backend.quiet():
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")


def test_reading_tensorflow_datasets_writes_nothing_to_stderr():
    pytest.importorskip("tensorflow_datasets")
    code = """
from keras_vit_cli import backend, main
main._command("evaluate", None)
backend.import_for("cifar10")
import tensorflow as tf
next(iter(tf.data.Dataset.range(1)))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_writing_down_layers_writes_nothing_to_stderr():
    """On JAX, where Keras imports TensorFlow for it."""
    pytest.importorskip("jax")
    code = """
from keras_vit_cli import main
main._command("page", "jax")
import keras
keras.saving.serialize_keras_object(keras.layers.RandomFlip())
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("package", ["tensorboard", "tensorflow"])
def test_tensorboard_that_is_not_installed_says_what_to_install(package, capsys, monkeypatch):
    monkeypatch.setattr(backend, "choose", lambda _: None)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name != package or None)
    assert main.train(["--tensorboard"]) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def test_an_unknown_backend_in_the_environment_is_named(capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "theano")
    assert main.train([]) == 2
    assert "KERAS_BACKEND must be one of tensorflow, jax, torch, not 'theano'" in (
        capsys.readouterr().err
    )


def test_a_backend_chosen_too_late_is_an_error(capsys, monkeypatch, tmp_path):
    late = next(name for name in backend.BACKENDS if name != keras.backend.backend())
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: True)
    assert train(f"--backend={late}", folder=tmp_path) == 2
    error = capsys.readouterr().err
    assert f"--backend {late} comes too late" in error and keras.backend.backend() in error


@pytest.mark.parametrize(
    ("error", "arguments"),
    [(data.DatasetUnavailable, ["--dataset=cifar10"]), (data.DatasetError, [])],
    ids=["missing, but asked for by name", "wrong in another way than missing"],
)
def test_digits_take_the_place_of_no_other_data(error, arguments, capsys, monkeypatch, tmp_path):
    def fail(name, *_):
        raise error(f"{name} cannot be downloaded")

    monkeypatch.setattr(train_command, "load_dataset", fail)
    assert train(*arguments, folder=tmp_path) == 2
    assert capsys.readouterr().err == "error: cifar10 cannot be downloaded\n"
    assert not list(tmp_path.iterdir())


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"epochs": 3, "seed": 5, "milestones": [0.5], "limit_train": null}')
    run = settings.parse(["--config", str(path), "--epochs", "7"])
    recipe = run.training
    assert (recipe.epochs, run.seed, recipe.milestones, run.limit_train) == (7, 5, (0.5,), None)
    assert recipe.batch_size == RECIPES["baseline"].batch_size
    assert set(run.named) == {"epochs", "seed", "milestones", "limit_train"}


def test_a_run_of_an_earlier_version_squashed_its_images(tmp_path):
    before = settings.parse(["--resize", "crop"]).to_json()
    del before["resize"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert settings.parse(["--config", str(tmp_path / "config.json")]).named["resize"] == "squash"


FITTING = {
    (4, 50, 50): "the image side of 50 pixels, but is 4. Try --patch-size 5 or 10",
    (4, 50, 70): "the image sides of 50 and 70 pixels, but is 4. Try --patch-size 5 or 10",
    (9, 16, 16): "the image side of 16 pixels, but is 9. Try --patch-size 8",
    (4, 53, 53): "the image side of 53 pixels, but is 4",
}


@pytest.mark.parametrize("numbers", FITTING)
def test_patches_that_do_not_divide_the_images_are_refused_with_what_would(numbers):
    with pytest.raises(CommandError) as caught:
        settings.check_patches(numbers[0], numbers[1:])
    assert str(caught.value) == f"--patch-size must divide {FITTING[numbers]}"


def test_an_image_size_that_no_patches_divide_is_refused_at_once():
    with pytest.raises(CommandError, match="Try --image-size 48 or 52, or --patch-size 5 or 10$"):
        settings.parse(["--image-size", "50"])
    assert settings.parse(["--image-size", "50", "--patch-size", "5"]).image_size == 50


def test_a_recipe_wins_over_that_of_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"recipe": "quick", "embed_dim": 96, "warmup": 0.1, "seed": 5}')
    run = settings.parse(["--config", str(path), "--recipe", "strong"])
    assert (run.recipe, run.seed, run.training) == ("strong", 5, RECIPES["strong"])
    recipe = settings.parse(["--config", str(path), "--schedule", "milestones"]).training
    assert (recipe.embed_dim, recipe.schedule, recipe.warmup) == (96, "milestones", 0)


def test_the_digits_have_a_recipe_of_their_own():
    run = settings.parse(["--dataset", "digits"])
    assert (run.recipe, run.training) == ("digits", RECIPES["digits"])
    run = settings.parse(["--dataset", "digits", "--recipe", "baseline"])
    assert (run.recipe, run.training) == ("baseline", RECIPES["baseline"])
    assert settings.parse([]).recipe == "baseline"


@pytest.mark.parametrize(
    ("has_gpu", "epochs", "milestones"), [(False, 5, [3, 5]), (True, 160, [100, 150])]
)
def test_a_plain_run_trains_the_baseline_on_every_machine(
    has_gpu, epochs, milestones, capsys, monkeypatch, tmp_path
):
    """AdamW and `LearningRateScheduler` on the baseline's model, for fewer epochs without a GPU."""
    other = dataclasses.replace(data.load_dataset("digits"), name="cifar10")
    monkeypatch.setattr(train_command, "load_dataset", lambda *_: other)
    monkeypatch.setattr(devices, "accelerators", lambda: ["gpu:0"] if has_gpu else [])
    monkeypatch.chdir(tmp_path)
    seen = {}

    def stopped(model, dataset, recipe, *_):
        seen["recipe"], seen["width"] = recipe, model.get_layer("norm").gamma.shape[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_command.run(settings.resolve({}), "figures")
    assert dataclasses.replace(seen["recipe"], epochs=160) == RECIPES["baseline"]
    assert (seen["recipe"].epochs, seen["width"]) == (epochs, 256)
    _, falls = training.step_schedule(1.0, epochs, seen["recipe"].milestones)
    assert falls == milestones
    config = json.loads((tmp_path / "runs/cifar10-baseline-seed0/config.json").read_text())
    assert (config["recipe"], config["epochs"]) == ("baseline", epochs)
    output = capsys.readouterr().out
    assert ("no GPU found; 160 with one" in output) == (not has_gpu)
    assert ("This will take about " in output) == (not has_gpu)


def test_a_recipe_that_promises_a_number_of_images_takes_more_epochs_of_fewer(capsys, monkeypatch):
    monkeypatch.setattr(devices, "accelerators", list)
    quick, strong = (settings.resolve({"recipe": name}) for name in ("quick", "strong"))
    for images, epochs in {50_000: 8, 45_000: 9, 3_068: 130, 1_000_000: 1}.items():
        assert train_command.with_epochs(quick, images).training.epochs == epochs
        line = f"Training for {epochs} epochs (400,000 images seen; --epochs N changes that)."
        assert capsys.readouterr().out == line + "\n"
    assert train_command.with_epochs(strong, 3_068) == strong


def test_without_cifar10_a_plain_run_trains_on_digits_and_says_so(capsys, monkeypatch, tmp_path):
    load = data.load_dataset

    def offline(name, data_dir=None, *_, **__):
        if name != "digits":
            raise data.DatasetUnavailable(f"{name} is not in {data_dir}: use --data-dir")
        return load(name)

    monkeypatch.setattr(train_command, "load_dataset", offline)
    monkeypatch.chdir(tmp_path)
    assert main.train([*TINY, "--limit-train=32", "--epochs=1"]) == 0
    captured = capsys.readouterr()
    assert "cifar10 is not in None: use --data-dir" in captured.err and "digits" in captured.err
    folder = tmp_path / "runs" / "digits-digits-seed0"
    assert json.loads((folder / "config.json").read_text())["dataset"] == "digits"
    assert json.loads((folder / "metrics.json").read_text())["dataset"] == "digits"
    assert len(list((tmp_path / "figures").glob("*.png"))) == 7
    assert "images of digits" in captured.out


def test_a_run_leaves_its_files_and_can_be_repeated(capsys, monkeypatch, tmp_path):
    first = tmp_path / "run"
    arguments = ["--dataset=digits", "--limit-train=192", "--validation=64", "--seed=3"]
    assert train(*arguments, folder=tmp_path) == 0
    names = {"model.keras", "best.keras", "history.csv", "timing.csv", "config.json"}
    names |= {"report.html", "page.html"}
    assert {path.name for path in first.iterdir()} == {
        *names,
        "metrics.json",
        "SHA256SUMS",
        ".lock",
    }
    sums = [line.split("  ") for line in (first / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == {*names, "metrics.json"}
    for digest, name in sums:
        assert hashlib.sha256((first / name).read_bytes()).hexdigest() == digest
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["epochs"] == 1 and metrics["seed"] == 3 and metrics["wall_seconds"] > 0
    assert sum(row["images"] for row in metrics["per_class"].values()) == 359

    model = keras.saving.load_model(first / "model.keras")
    dataset = data.load_dataset("digits")
    predicted = model.predict(dataset.test_images, verbose=0).argmax(axis=1)
    assert (predicted == dataset.test_labels).mean() == pytest.approx(metrics["accuracy"])

    assert train(*arguments, folder=tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    for name in ("draw", "write_pages"):
        monkeypatch.setattr(train_command, name, lambda *_: None)
    config = f"--config={first / 'config.json'}"
    assert main.train([config, f"--output={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-4)

    assert train(*arguments, "--overwrite", folder=tmp_path) == 0
    # Its repetition does not overwrite what the run once overwrote.
    assert "overwrite" not in json.loads((first / "config.json").read_text())
    assert main.train([config]) == 2


def test_only_a_finished_run_is_extended(capsys, tmp_path):
    """Not one whose settings have replaced those of the model that still lies there."""
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text(json.dumps({"recipe": "digits", "dataset": "digits"}))
    (half / "model.keras").write_text("of the run before")
    places = [f"--output={tmp_path / 'run'}", f"--figures-dir={tmp_path / 'figures'}"]
    assert main.train([f"--init-from={half}", "--extend=1", *places]) == 2
    assert f"--extend 1 needs a finished run, and {half} holds none" in capsys.readouterr().err


def test_overwriting_removes_what_an_earlier_run_left(monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in (
        "metrics.json",
        "best.keras",
        "history.csv",
        "checkpoints/step-1.checkpoint",
        "tensorboard/train/events.out.tfevents.1.host",
        ".part-x",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("of the run before")
    monkeypatch.setattr(training, "fit", killed)
    assert train("--dataset=digits", "--overwrite", folder=tmp_path) == 130
    left = {path.name for path in run.rglob("*") if path.is_file()}
    assert left == {"config.json", ".lock"}


@pytest.mark.parametrize(
    "others",
    [
        {"checkpoints/epoch-1.ckpt": "of another project"},
        {"config.json": '{"model_type": "bert"}', "model.keras": "of another project"},
        {"checkpoints/step-000001-00000000.checkpoint": "of ours", "history.csv": "of ours"},
    ],
)
def test_what_no_run_can_go_on_with_is_left_alone(others, capsys, tmp_path):
    for name, content in others.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(content)
    assert train("--dataset=digits", folder=tmp_path) == 2
    error = capsys.readouterr().err
    assert "holds " in error and "--overwrite" in error
    for name, content in others.items():
        assert (tmp_path / "run" / name).read_text() == content


@pytest.mark.slow
def test_overwriting_leaves_the_checkpoints_of_others(monkeypatch, tmp_path):
    place = tmp_path / "run" / "checkpoints" / "epoch-1.ckpt"
    place.parent.mkdir(parents=True)
    place.write_text("of another project")
    assert train("--dataset=digits", "--overwrite", folder=tmp_path) == 0
    assert [path.name for path in place.parent.iterdir()] == ["epoch-1.ckpt"]


def test_a_run_that_ends_at_once_leaves_the_model_of_an_interrupted_one(monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"recipe": "digits"}')
    (tmp_path / "run" / "model.keras").write_text("learned before")
    monkeypatch.setattr(training, "fit", killed)
    assert train("--dataset=digits", folder=tmp_path) == 130
    assert (tmp_path / "run" / "model.keras").read_text() == "learned before"


def test_pictures_that_cannot_be_written_do_not_cost_the_numbers(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(figures, "draw_all", full)
    assert train("--dataset=digits", folder=tmp_path) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert "accuracy" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_a_training_that_diverges_says_when_and_leaves_no_model(capsys, tmp_path):
    assert train("--dataset=digits", "--learning-rate=1e38", "--epochs=3", folder=tmp_path) == 3
    error = capsys.readouterr().err
    assert "error: the loss is nan in epoch" in error and "learning rate of 1e+38" in error
    assert not (tmp_path / "run" / "model.keras").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34 bytes."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] not enough memory: you tried to"),
        type("ResourceExhaustedError", (Exception,), {})("OOM when allocating tensor with shape"),
    ],
    ids=["NumPy", "JAX", "PyTorch", "TensorFlow"],
)
def test_memory_that_runs_out_is_one_line(error, capsys, monkeypatch, tmp_path):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(training, "fit", exhausted)
    assert train("--dataset=digits", "--batch-size=39", folder=tmp_path) == 2
    assert "--batch-size 39 needs more memory than" in capsys.readouterr().err


def test_an_error_that_is_not_about_memory_is_not_hidden(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(training, "fit", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train("--dataset=digits", folder=tmp_path)


def test_bfloat16_without_instructions_for_it_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "precisions", lambda: ["float32", "float16"])
    assert train("--dataset=digits", "--mixed-precision", folder=tmp_path) == 2
    assert "error: --precision bfloat16 needs instructions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_reach_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "precisions", lambda: ["float32", "bfloat16"])
    for name in ("draw", "write_pages"):
        monkeypatch.setattr(train_command, name, lambda *_: None)
    arguments = ["--dataset=digits", "--no-augmentation", "--mixed-precision", "--dropout=0.3"]
    assert train(*arguments, folder=tmp_path) == 0
    model = keras.saving.load_model(tmp_path / "run" / "model.keras")
    assert model.augmentation == []
    assert model.get_layer("dropout").rate == 0.3
    assert model.get_layer("block_1_attention").compute_dtype == "bfloat16"
    assert model.get_layer("patches").patch_size == 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT between processes on Windows")
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    places = [f"--output={tmp_path / 'run'}", f"--figures-dir={tmp_path / 'figures'}"]
    arguments = ["--dataset=digits", "--epochs=40", "--limit-train=40", *TINY, *places]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            process.send_signal(signal.SIGINT)
            break
    output = process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert "progress saved. Run the same command to continue." in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.json").exists()

    other = subprocess.run(
        command(*arguments, "--epochs=41", "--seed=1"), capture_output=True, text=True
    )
    assert other.returncode == 2
    assert "seed was 0 and is 1; epochs was 40 and is 41" in other.stderr

    again = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Resuming the run" in again.stdout and "Epoch 1/" not in again.stdout
    with open(tmp_path / "run" / "history.csv", encoding="utf-8") as lines:
        assert len(lines.readlines()) == 41
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_in_which_a_run_finished_meanwhile_is_left_alone(capsys, monkeypatch, tmp_path):
    def finished_meanwhile(*arguments):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.json").write_text("of the other run")
        return build(*arguments)

    build = training.build_model
    monkeypatch.setattr(training, "build_model", finished_meanwhile)
    assert train("--dataset=digits", folder=tmp_path) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_text() == "of the other run"


@pytest.mark.slow
def test_a_run_whose_pictures_failed_goes_on_to_draw_them(capsys, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw_all", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        assert train("--dataset=digits", folder=tmp_path) == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert train("--dataset=digits", folder=tmp_path) == 0
    assert "Resuming the run" in capsys.readouterr().out
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["wall_seconds"] > again["training_seconds"] == metrics["training_seconds"]
    assert [again[key] for key in ("accuracy", "loss")] == [
        metrics[key] for key in ("accuracy", "loss")
    ]
    assert len(list((tmp_path / "figures").glob("*.png"))) == 7
    assert train("--dataset=digits", folder=tmp_path) == 2


@pytest.fixture
def photos(monkeypatch, tmp_path):
    """A folder of images that is the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, channel in (("cat", 0), ("dog", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(5):
            coloured(channel, index).save(tmp_path / "photos" / name / f"{index}.png")
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


def test_output_may_lie_inside_of_the_data(monkeypatch, photos):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "build_model", lambda *_: None)
    monkeypatch.setattr(train_command, "announce", killed)
    expected = data.load_dataset(".")
    for words in ([], ["--figures-dir=pictures"], ["--output=cat/run"], []):
        assert main.main(["train", "--dataset=.", *words]) == 130
        for folder in ("runs/photos-baseline-seed0/figures", "pictures", "cat/run/figures"):
            if pathlib.Path(folder).is_dir():
                shutil.copy("dog/0.png", f"{folder}/drawn.png")
    assert pathlib.Path("cat/run/figures/drawn.png").exists()
    dataset = data.load_dataset(".")
    assert (dataset.class_names, dataset.manifest) == (["cat", "dog"], expected.manifest)


def test_nothing_is_written_among_the_images_that_are_trained_on(capsys, photos):
    for word in ("--output=.", "--output=cat", f"--figures-dir={photos / 'dog'}"):
        assert main.train(["--dataset=.", word]) == 2
        assert (
            "holds images of --dataset .: choose a new folder, such as" in capsys.readouterr().err
        )
    assert {path.suffix for path in photos.rglob("*") if path.is_file()} == {".png"}


def test_a_run_resumes_on_the_same_images_elsewhere_and_on_no_others(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3)).astype("uint8")
    labels = np.arange(4) % 2
    for name, pixels in (("here", images), ("there", images), ("other", 255 - images)):
        arrays = {"x_train": pixels[:4], "x_test": pixels[4:], "y_train": labels, "y_test": labels}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    run = RunDirectory(tmp_path / "run")

    def prepared(name):
        source = str(tmp_path / f"{name}.npz")
        dataset = data.load_dataset(source)
        return dataset, run.prepared(settings.resolve({"dataset": source}), "jax", dataset)

    dataset, context = prepared("here")
    with context:
        state = checkpoints.Checkpoint(1, 0, [], 0.0, data.dataset.digest(dataset), {})
        checkpoints.save(run.checkpoints, state)
    with pytest.raises(CommandError, match="here.npz' and is .*other.npz', with other training"):
        prepared("other")[1].__enter__()
    assert json.loads(run.config.read_text())["dataset"] == str(tmp_path / "here.npz")
    with prepared("there")[1]:
        assert json.loads(run.config.read_text())["dataset"] == str(tmp_path / "there.npz")


def test_a_file_that_names_data_which_have_moved_says_how_to_name_them(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"dataset": "gone.npz", "recipe": "quick"}')
    hint = "elsewhere now, name them with --dataset or --data-dir"
    assert main.train([f"--config={config}"]) == 2
    assert hint in capsys.readouterr().err
    assert main.train([f"--config={config}", "--dataset=lost.npz"]) == 2
    error = capsys.readouterr().err
    assert "lost.npz" in error and hint not in error


def test_a_folder_that_another_run_has_is_refused(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    with files.locked(tmp_path / "run"):
        assert train("--dataset=digits", folder=tmp_path) == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_named_like_the_digits_is_not_taken_for_them(tmp_path):
    digits = data.load_dataset("digits")
    arrays = {"x_train": digits.train_images[:300], "y_train": digits.train_labels[:300]}
    arrays |= {"x_test": digits.test_images[:50], "y_test": digits.test_labels[:50]}
    path = tmp_path / "digits.npz"
    np.savez(path, **arrays)
    assert train(f"--dataset={path}", folder=tmp_path) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"] == str(path)


def test_a_disk_that_fills_up_ends_the_run_with_one_line(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert train("--dataset=digits", folder=tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Cannot write to ") and "no space left on device" in error
    assert len(error.splitlines()) == 1


def test_messages_say_what_is_possible(capsys, tmp_path):
    images, labels = np.zeros((245, 8, 8, 3), "uint8"), np.repeat([0, 1], [45, 200])
    pair = images, labels
    insects = data.Dataset("insects", *pair, *pair, ["ants", "bees"], True)
    wanted = "--validation 500 is more than the 245 training images allow .at most 243.."
    with pytest.raises(CommandError, match=wanted):
        train_command.check_validation(500, insects)
    train_command.check_validation(243, insects)
    with pytest.raises(CommandError, match="--validation 1 is fewer than the 2 classes"):
        train_command.check_validation(1, insects)
    train_command.announce_imbalance(insects)
    assert capsys.readouterr().out == ""
    train_command.announce_imbalance(dataclasses.replace(insects, train_labels=labels[5:]))
    assert "Class bees has 200 training images, ants 40: --class-w" in capsys.readouterr().out
    model = types.SimpleNamespace(
        input_shape=(None, 8, 8, 3), output_shape=(None, 2), class_names=("cats", "dogs")
    )
    folder = dataclasses.replace(insects, manifest=())
    for dataset, of in ((folder, "the folder's"), (insects, "those of insects")):
        wanted = rf"The model's classes \(cats, dogs\) differ from {of} \(ants, bees\)\."
        with pytest.raises(CommandError, match=wanted):
            inputs.check_classes(model, dataset)
    stopped = train_command.explained(training.Interrupted(2, 0, 42), settings.resolve({}))
    expected = "Stopped in epoch 1, batch 42; progress saved. Run the same command to continue."
    assert (str(stopped), stopped.status) == (expected, 130)
    path = tmp_path / files.PARTS.replace("*", "17-w")
    error = OSError(errno.EROFS, "Read-only file system", str(path))
    assert failed_write(error, "run") == (
        f"Cannot write to {tmp_path / 'w'}: read-only file system. Existing files are unchanged."
    )


def test_early_stopping_needs_validation(capsys, tmp_path):
    assert train("--dataset=digits", "--early-stopping=2", folder=tmp_path) == 2
    assert "--early-stopping 2 needs images to validate on" in capsys.readouterr().err


def test_help_has_the_defaults_of_the_chosen_recipe(capsys):
    for words, name in ((["--recipe=quick"], "quick"), (["--dataset", "digits"], "digits")):
        with pytest.raises(SystemExit):
            settings.parse([*words, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"defaults of the recipe {name};" in text and f"{name} (applies here): " in text
        assert f"learning rate (default: {RECIPES[name].learning_rate})" in text
        assert f"(default: as many as take {RECIPES[name].images_seen:,} images)" in text


def test_the_home_folder_may_be_typed_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.json").write_text('{"data_dir": "~/data"}')
    words = ["--output=~/run", "--dataset=~/x.npz", "--config=~/c.json", "--figures-dir=~/pictures"]
    run = settings.parse(words)
    assert (run.output, run.dataset) == (f"{tmp_path}/run", f"{tmp_path}/x.npz")
    assert (run.data_dir, run.figures_dir) == (f"{tmp_path}/data", f"{tmp_path}/pictures")
    options = main.parse(["evaluate", "~/m.keras", "--dataset=~/photos", "--output=~/out"])
    assert (str(options.model), options.dataset) == (f"{tmp_path}/m.keras", f"{tmp_path}/photos")
    assert str(options.output) == f"{tmp_path}/out"
