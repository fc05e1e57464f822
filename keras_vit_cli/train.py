"""`train`: from settings to a trained model, its metrics, its pictures and its report."""

import contextlib
import dataclasses
import pathlib
import time

import keras

from keras_vit import devices, training
from keras_vit.data import DatasetError, DatasetUnavailable, load_dataset
from keras_vit.data.folders import warn
from keras_vit.files import atomic_write, write_json
from keras_vit.training.journal import duration
from keras_vit_cli import backend
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.evaluate import measure
from keras_vit_cli.report import draw, write_page
from keras_vit_cli.run_directory import RunDirectory, check_writable
from keras_vit_cli.settings import resolve

# The fraction of a processor's fastest rate that a training step of the baseline reaches.
EFFICIENCY = 0.6
# What the backends' errors say when memory is short.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OOM when allocating", "out of memory", "not enough memory")


def run(settings, figures_dir=None):
    """Trains, evaluates, draws and reports; returns the exit status.

    Args:
        settings: `Settings`.
        figures_dir: string, default folder of the pictures; None for the run directory.
    """
    start = time.perf_counter()
    figures_dir = settings.figures_dir or figures_dir
    check_device(settings)
    if figures_dir:
        check_writable(figures_dir, "--figures-dir")
    RunDirectory.of(settings).check(settings.overwrite)
    settings, dataset = load(settings)
    run_dir = RunDirectory.of(settings)  # May differ if `load` fell back to the digits.
    run_dir.check(settings.overwrite)
    check_patches(settings.training, dataset)
    figures = pathlib.Path(figures_dir) if figures_dir else run_dir.figures
    try:
        dataset, validation = dataset.for_training(
            settings.validation, settings.limit_train, settings.seed
        )
        settings = with_epochs(settings, len(dataset.train_images))
        keras.utils.set_random_seed(settings.seed)
        policy = "float32" if settings.precision == "float32" else f"mixed_{settings.precision}"
        with explaining_failures(settings):
            model = training.build_model(dataset, settings.training, policy)
    except ValueError as error:
        raise CommandError(str(error)) from error

    with (
        explaining_failed_writes(run_dir),
        run_dir.prepared(settings, keras.backend.backend()),
    ):
        figures.mkdir(parents=True, exist_ok=True)
        announce(settings, dataset, run_dir)
        before = time.perf_counter()
        with explaining_failures(settings), ending_the_progress_bar():
            history = training.fit(
                model,
                dataset,
                settings.training,
                settings.seed,
                validation,
                run_dir.path,
                settings.tensorboard,
                settings.save_every,
            )
        # As if this process had trained every epoch.
        start += time.perf_counter() - before - sum(history["seconds"])
        with atomic_write(run_dir.model) as path:
            model.save(path)
        probabilities, metrics = measure(model, dataset, history)
        metrics = {
            **{"dataset": dataset.name, "recipe": settings.recipe, "seed": settings.seed},
            **metrics,
            "wall_seconds": round(time.perf_counter() - start, 1),
        }
        # Before the pictures, whose failure must not cost the metrics.
        write_json(run_dir.metrics, metrics)
        config, language = settings.to_json(), settings.language
        draw(model, dataset, settings.training, probabilities, history, figures, language)
        report = run_dir.report
        write_page(report, model, dataset, config, metrics, probabilities, figures, language)
        run_dir.write_checksums()
        # Without a checkpoint the run counts as finished.
        run_dir.remove_checkpoints()
    print(f"Model, metrics and report: {run_dir}. Pictures: {figures}.")
    return 0


def check_device(settings):
    """Raises a `CommandError` if Keras computes with another backend, or not in the precision."""
    if settings.tensorboard:
        backend.require("tensorboard", "--tensorboard")
    if settings.backend not in (None, keras.backend.backend()):
        raise CommandError(
            f"--backend {settings.backend} comes too late: Keras was imported before and computes "
            f"with {keras.backend.backend()}"
        )
    if settings.precision not in devices.precisions():
        raise CommandError(
            f"--precision {settings.precision} needs instructions that this machine lacks, and "
            f"would only be slower: choose {' or '.join(devices.precisions())}"
        )


def load(settings):
    """The `Dataset` of a run, and its settings.

    Falls back to the digits if no data set was given and the default one cannot be loaded.
    """
    try:
        return settings, load_dataset(settings.dataset, settings.data_dir, settings.image_size)
    except DatasetError as error:
        if "dataset" in settings.named or not isinstance(error, DatasetUnavailable):
            raise CommandError(str(error)) from error
        warn(
            f"{error}.\nTraining on scikit-learn's embedded digits instead; everything that this "
            "run writes is labelled 'digits'."
        )
        return resolve({**settings.named, "dataset": "digits"}), load_dataset("digits")


def check_patches(recipe, dataset):
    """Raises a `CommandError` unless the patches of a recipe divide the images of a data set."""
    sides = dict.fromkeys(dataset.image_shape[:2])
    if any(side % recipe.patch_size for side in sides):
        shown = f"side{'s' if len(sides) > 1 else ''} of {' and '.join(map(str, sides))}"
        raise CommandError(
            f"--patch-size must divide the image {shown} pixels, but is {recipe.patch_size}"
        )


def with_epochs(settings, images):
    """The settings with the number of epochs for these images and this device, unless given."""
    if "epochs" in settings.named:
        return settings
    epochs, reason = settings.training.epochs_for(images, bool(devices.accelerators()))
    if reason:
        print(f"Training for {epochs} epochs ({reason}; --epochs N changes that).")
    recipe = dataclasses.replace(settings.training, epochs=epochs)
    return dataclasses.replace(settings, training=recipe)


def announce(settings, dataset, run_dir):
    """Prints what is trained where and, on a processor, about how long that takes."""
    images = len(dataset.train_images)
    print(f"Training on {images:,} images of {dataset.name}, into {run_dir}")
    if devices.accelerators() or run_dir.has_checkpoint:
        return
    recipe = settings.training
    work = images * sum(training.costs_of_epochs(recipe, dataset.image_shape))
    seconds = work / (EFFICIENCY * devices.operations_per_second(settings.precision))
    shorter = ""
    if "recipe" not in settings.named and seconds > 15 * 60:
        shorter = "; `--recipe quick` takes a fraction of that"
    print(f"This will take about {duration(seconds)}{shorter}.", flush=True)


@contextlib.contextmanager
def explaining_failures(settings):
    """Raises a `CommandError` for what one line can explain."""
    try:
        yield
    except BaseException as error:
        failure = explained(error, settings)
        if failure is None:
            raise
        raise failure from error


@contextlib.contextmanager
def ending_the_progress_bar():
    """Ends the line of Keras's progress bar if training fails: an error message follows."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # Nobody may read any more.
            print(flush=True)
        raise


def explained(error, settings):
    """What ended a training as a `CommandError`; None if one line cannot explain it."""
    if isinstance(error, training.Diverged):
        return CommandError(f"{error} (and --overwrite)", status=3)
    if isinstance(error, (training.DifferentData, training.DifferentVariables)):
        return CommandError(
            f"{error}: choose another folder with --output, or start over with --overwrite"
        )
    if isinstance(error, training.Interrupted):
        same = "The same command" + (" without --overwrite" if settings.overwrite else "")
        return CommandError(f"{error}: interrupted and saved. {same} resumes the run", error.status)
    # Each backend has a class of its own for this.
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        recipe = settings.training
        return CommandError(
            f"a model of --embed-dim {recipe.embed_dim} and --depth {recipe.depth} on batches of "
            f"--batch-size {recipe.batch_size} needs more memory than this machine has: try "
            "smaller ones, or a larger --patch-size"
        )
    return None
