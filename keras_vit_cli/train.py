"""`train`: from settings to a trained model, its metrics, its pictures and its report."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import time

import keras
import numpy as np

from keras_vit import devices, distribution, training
from keras_vit.data import DatasetError, DatasetUnavailable, ImageError, load_dataset
from keras_vit.data.dataset import SHORT, digest, digest_of_arrays
from keras_vit.data.folders import VALIDATION
from keras_vit.files import atomic_write, make_output, write_json
from keras_vit.loading import ModelError, load_model
from keras_vit.messages import warn
from keras_vit.presets import load_preset
from keras_vit.training import checkpoints
from keras_vit.training.journal import duration
from keras_vit_cli import backend
from keras_vit_cli.errors import CommandError, Stopped, explaining_failed_writes
from keras_vit_cli.evaluate import measure, show
from keras_vit_cli.recipes import DEFAULT_RECIPE, RECIPES
from keras_vit_cli.report import MOVED_DATA, draw, write_pages
from keras_vit_cli.run_directory import RunDirectory, check_apart, check_writable
from keras_vit_cli.settings import check_patches, resolve

# The fraction of a processor's fastest rate that a training step of the baseline reaches.
EFFICIENCY = 0.6
# What a pretrained model decides.
ARCHITECTURE = ("patch_size", "embed_dim", "mlp_dim", "num_heads", "depth", "pooling")
# From this ratio of the largest class to the smallest on, class weights are suggested.
IMBALANCED = 5
# Settings that may differ between processes: places, and what the first one alone does.
MAY_DIFFER = {"dataset", "data_dir", "output", "figures_dir", "language", "tensorboard"}
# What the backends' errors say when memory is short.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OOM when allocating", "out of memory", "not enough memory")


def run(settings, figures_dir=None):
    """Trains, evaluates, draws and reports; returns the exit status.

    Of several processes that train together, the first one does all but train alone.

    Args:
        settings: `Settings`.
        figures_dir: string, default folder of the pictures; None for the run directory.
    """
    with contextlib.ExitStack() as stack:
        if not distribution.is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return _run(settings, settings.figures_dir or figures_dir)


def _run(settings, figures_dir):
    start, is_first = time.perf_counter(), distribution.is_first()
    with together():
        settings, pretrained, dataset, validation = prepare(settings, figures_dir)
    run_dir = RunDirectory.of(settings)  # May differ if `load` fell back to the digits.
    figures = pathlib.Path(figures_dir) if figures_dir else run_dir.figures
    with explaining_failures(settings):
        distribution.agree(facts(settings, dataset, validation))
        if not settings.overwrite:
            checkpoints.check_first(run_dir.checkpoints)
        try:
            keras.utils.set_random_seed(settings.seed)
            policy = "float32" if settings.precision == "float32" else f"mixed_{settings.precision}"
            model = training.build_model(dataset, settings.training, policy, pretrained)
        except ValueError as error:
            raise CommandError(str(error)) from error

    with contextlib.ExitStack() as stack:
        stack.enter_context(explaining_failed_writes(run_dir))
        with together():
            if is_first:
                stack.enter_context(run_dir.prepared(settings, keras.backend.backend(), dataset))
                make_output(figures)
                announce(settings, dataset, validation, run_dir)
            elif settings.overwrite:
                run_dir.remove_checkpoints()  # Of another run, on a disk of this process.
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
                pretrained,
                bool(settings.extend),
            )
            trained_on = distribution.topology()
            is_distributed = distribution.devices() > 1
            distribution.leave()
        if not is_first:
            return 0
        # As if this process had trained every epoch.
        start += time.perf_counter() - before - sum(history["seconds"])
        with atomic_write(run_dir.model) as path:
            model.save(path)
        if is_distributed:  # On a device of this process.
            model = load_model(run_dir.model)
        probabilities, metrics = measure(model, dataset, history)
        metrics = {
            **{"dataset": dataset.name, "recipe": settings.recipe, "seed": settings.seed},
            **metrics,
            **({"distributed": trained_on} if is_distributed else {}),
            "training_data": digest(dataset),
            "wall_seconds": round(time.perf_counter() - start, 1),
        }
        # Before anything is printed or drawn, whose failure must not cost the metrics.
        write_json(run_dir.metrics, metrics)
        show(metrics, dataset)
        language = settings.language
        draw(model, dataset, settings.training, probabilities, history, figures, language)
        shown = settings, metrics, probabilities
        write_pages(run_dir, model, dataset, *shown, figures, language)
        run_dir.write_checksums()
        # Without a checkpoint the run counts as finished.
        run_dir.remove_checkpoints()
    print(f"Model, metrics and report: {run_dir}. Pictures: {figures}.")
    return 0


@contextlib.contextmanager
def together():
    """Context that all processes enter: if one of them fails, all end with a `CommandError`."""
    try:
        with distribution.together():
            yield
    except Exception as error:
        failure = lost(error)
        if failure is None:
            raise
        raise failure from error


def prepare(settings, figures_dir):
    """Checks the settings and loads what they name.

    Returns:
        The settings, now with what depends on the data; the pretrained model or None, the
        `Dataset` to train on, and the pair `(images, labels)` to validate on or None.
    """
    check_device(settings)
    check_folders(settings, figures_dir)
    pretrained = load_pretrained(settings)
    settings, dataset = load(with_architecture_of(settings, pretrained))
    settings = with_architecture_of(settings, pretrained)  # Of the digits, if `load` took those.
    check_channels(settings, pretrained, dataset)
    dataset = without_images_of(pretrained, dataset, settings.init_from)
    check_folders(settings, figures_dir)
    check_patches(settings.training.patch_size, dataset.image_shape[:2])
    check_validation(settings.validation, dataset)
    try:
        distribution.check_batch_size(settings.training.batch_size)
        dataset, validation = dataset.for_training(
            settings.validation, settings.limit_train, settings.seed
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    if settings.training.early_stopping and validation is None:
        raise CommandError(
            f"--early-stopping {settings.training.early_stopping} needs images to validate "
            "on: add --validation N"
        )
    warn_of_seen(pretrained, dataset, settings)
    return with_epochs(settings, len(dataset.train_images)), pretrained, dataset, validation


def without_images_of(pretrained, dataset, name):
    """The data without test images that a pretrained model was trained on."""
    if pretrained is None:
        return dataset
    new = dataset.without(pretrained.seen)
    known = len(dataset.test_labels) - len(new.test_labels)
    if not len(new.test_labels):
        raise CommandError(
            f"--init-from {name} was trained on all test images of {dataset.name}: choose others, "
            "or other weights"
        )
    if known:
        images = f"{known:,} test images" if known > 1 else "1 test image"
        warn(f"left out {images} that {name} was trained on")
    return new


def warn_of_seen(pretrained, dataset, settings):
    """Warns if a pretrained model has seen images that are validated on now."""
    is_array = dataset.manifest is None
    if pretrained is None or is_array and not (settings.extend and settings.validation):
        return
    if settings.extend and _training_data(settings.init_from) == digest(dataset):
        return  # The images that it was validated on, too.
    if is_array:
        warn(
            f"{settings.init_from} was trained on other images than these: it may have seen "
            "images that are held out for validation now, whose accuracy is too high then"
        )
        return
    held_out = [x for x in dataset.manifest if x.split == VALIDATION]
    known = frozenset(pretrained.seen)
    seen = sum(x.digest[:SHORT] in known for x in held_out)
    if seen:
        warn(
            f"{settings.init_from} was trained or validated on {seen:,} of the {len(held_out):,} "
            "validation images: their accuracy is too high"
        )


def _training_data(run):
    """The digest of the images that a finished run was trained on; None if it does not tell."""
    path = RunDirectory(run).metrics
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("training_data")
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{path} is damaged: {error}") from error


def check_folders(settings, figures_dir):
    """Raises a `CommandError` if the first process cannot write to the output folders."""
    if not distribution.is_first():
        return
    if figures_dir:
        check_writable(figures_dir, "--figures-dir")
        check_apart(figures_dir, settings.dataset, "--figures-dir")
    run_dir = RunDirectory.of(settings)
    check_apart(run_dir.path, settings.dataset, "--output")
    run_dir.check(settings.overwrite)


def facts(settings, dataset, validation):
    """What has to be the same in all processes that train together."""
    if distribution.processes() == 1:
        return {}
    jax = importlib.metadata.version("jax")
    held_out = digest_of_arrays(*validation)[:12] if validation else None
    chosen = {k: v for k, v in settings.to_json().items() if k not in MAY_DIFFER}
    chosen["overwrite"] = settings.overwrite
    versions = {**checkpoints.versions(), "jax": jax}
    images = {"training data": digest(dataset)[:12], "validation data": held_out}
    return json.loads(json.dumps({**versions, **chosen, **images}))


def check_device(settings):
    """Raises a `CommandError` if Keras computes with another backend, or not in the precision."""
    if settings.tensorboard:
        for package in ("tensorboard", "tensorflow"):  # Keras's callback writes with the latter.
            backend.require(package, "--tensorboard")
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
    backend.import_for(settings.dataset)
    try:
        return settings, load_dataset(
            settings.dataset,
            settings.data_dir,
            settings.image_size,
            settings.resize,
            settings.training.patch_size,
        )
    except DatasetError as error:
        if "dataset" in settings.named or not isinstance(error, DatasetUnavailable):
            moved = settings.dataset_from_file
            message = f"{str(error).rstrip('.')}{MOVED_DATA}" if moved else str(error)
            raise CommandError(message) from error
        warn(
            f"{error}.\nTraining on scikit-learn's embedded digits instead; everything that this "
            "run writes is labelled 'digits'."
        )
        digits = load_dataset("digits", resize=settings.resize)
        return resolve({**settings.named, "dataset": "digits", "image_size": None}), digits


def load_pretrained(settings):
    """The model that a run starts from; None if it starts from nothing."""
    if settings.init_from is None:
        return None
    if settings.extend and not RunDirectory(settings.init_from).is_finished:
        raise CommandError(
            f"--extend {settings.extend} needs a finished run, and {settings.init_from} holds "
            "none: type its own command again to finish it"
        )
    try:
        with distribution.suspended():  # Its weights are only copied.
            return load_preset(RunDirectory.model_of(settings.init_from))
    except ModelError as error:
        raise CommandError(f"--init-from {error}") from error


def check_channels(settings, model, dataset):
    """Raises a `CommandError` unless a pretrained model takes the images of a data set."""
    channels, found = model and model.input_shape[-1], dataset.image_shape[-1]
    if channels not in (None, found):
        raise CommandError(
            f"--init-from {settings.init_from} takes images of {channels} channels, but those of "
            f"{dataset.name} have {found}"
        )


def with_architecture_of(settings, model):
    """The settings with the architecture of a pretrained model, if there is one."""
    if model is None:
        return settings
    config = model.get_config()
    found = {name: config[name] for name in ARCHITECTURE}
    for name, value in found.items():
        if settings.named.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise CommandError(
                f"{flag} {settings.named[name]} differs from --init-from {settings.init_from}, "
                f"which has {value}: leave it out"
            )
    recipe = dataclasses.replace(settings.training, **found)
    return dataclasses.replace(settings, training=recipe)


def check_validation(count, dataset):
    """Raises a `CommandError` unless both sides of a held-out split can have all classes."""
    total, classes = len(dataset.train_labels), len(dataset.class_names)
    if count > total - classes:
        raise CommandError(
            f"--validation {count} is more than the {total:,} training images allow (at most "
            f"{total - classes:,})."
        )
    if 0 < count < classes:
        raise CommandError(f"--validation {count} is fewer than the {classes} classes.")


def with_epochs(settings, images):
    """The settings with the number of epochs for these images and this device, unless given."""
    if "epochs" in settings.named:
        return settings
    epochs, reason = settings.training.epochs_for(images, bool(devices.accelerators()))
    if reason:
        print(f"Training for {epochs} epochs ({reason}; --epochs N changes that).")
    recipe = dataclasses.replace(settings.training, epochs=epochs)
    return dataclasses.replace(settings, training=recipe)


def announce(settings, dataset, validation, run_dir):
    """Prints what is trained where and, on a processor, about how long that takes."""
    images = len(dataset.train_images)
    print(f"Training on {images:,} images of {dataset.name}, into {run_dir}")
    held_out = "" if validation is None else f", {len(validation[1]):,} for validation"
    print(f"{len(dataset.test_labels):,} images set aside for testing{held_out}.")
    if (count := distribution.devices()) > 1:
        part = settings.training.batch_size // count
        print(f"Distributed over {distribution.topology()}: {part} images of a batch on each.")
        if rest := images % count:
            skipped = f"{rest} images" if rest > 1 else "1 image"
            print(
                f"Each epoch skips {skipped}, chosen anew each time: {images:,} is not a multiple "
                f"of {count}."
            )
    if settings.training.class_weights is None:
        announce_imbalance(dataset)
    if devices.accelerators() or run_dir.has_checkpoint:
        return
    work = operations_of(settings.training, dataset)
    seconds = work / (EFFICIENCY * devices.operations_per_second(settings.precision))
    shorter = ""
    if settings.recipe == DEFAULT_RECIPE and seconds > 15 * 60:
        quick = RECIPES["quick"]
        epochs, _ = quick.epochs_for(images, has_gpu=False)
        if operations_of(dataclasses.replace(quick, epochs=epochs), dataset) < work / 2:
            shorter = "; `--recipe quick` takes a fraction of that"
    print(f"This will take about {duration(seconds)}{shorter}.", flush=True)


def operations_of(recipe, dataset):
    """Floating-point operations of a whole run."""
    costs = training.costs_of_epochs(recipe, dataset.image_shape)
    return len(dataset.train_images) * sum(costs)


def announce_imbalance(dataset):
    """Prints a line if a class has several times the training images of another."""
    counts = np.bincount(dataset.train_labels, minlength=len(dataset.class_names))
    (fewest, small), (most, large) = (
        (int(counts[i]), dataset.class_names[i]) for i in (counts.argmin(), counts.argmax())
    )
    if most >= IMBALANCED * fewest:
        print(
            f"Class {large} has {most:,} training images, {small} {fewest:,}: "
            "--class-weights balanced makes them count the same."
        )


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
        print(flush=True)
        raise


def explained(error, settings):
    """What ended a training as a `CommandError`; None if one line cannot explain it."""
    if isinstance(error, training.Diverged):
        return CommandError(f"{error}, with --learning-rate and --overwrite", status=3)
    if isinstance(error, training.CannotExtend):
        return CommandError(
            f"{error}: --extend needs the optimizer and the architecture of the run that it "
            "continues"
        )
    if isinstance(error, (training.DifferentData, training.DifferentVariables)):
        return CommandError(
            f"{error}: choose another folder with --output, or start over with --overwrite"
        )
    if isinstance(error, training.Interrupted):
        same = "the same command" + (" without --overwrite" if settings.overwrite else "")
        return Stopped(f"{error} Run {same} to continue.", error.status)
    # TensorFlow's error quotes that of the thread which reads the images.
    if unreadable := re.search(f"{ImageError.__name__}: (.*)", str(error)):
        return CommandError(unreadable[1], status=1)
    # Each backend has a class of its own for this.
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        recipe = settings.training
        return CommandError(
            f"a model of --embed-dim {recipe.embed_dim} and --depth {recipe.depth} on batches of "
            f"--batch-size {recipe.batch_size} needs more memory than this machine has: try "
            "smaller ones, or a larger --patch-size"
        )
    return lost(error)


def lost(error):
    """What went wrong between processes as a `CommandError`; None for anything else."""
    if isinstance(error, checkpoints.NotOnFirst):
        return CommandError(f"{error}, or start over with --overwrite")
    if isinstance(error, distribution.DistributionError):
        return CommandError(str(error))
    is_of_jax = type(error).__name__ == "JaxRuntimeError" or "Gloo" in str(error)
    if distribution.processes() > 1 and is_of_jax:
        reason = str(error).strip().splitlines()[0]
        return CommandError(
            "another process has ended, as its own output may explain. Run the same command in all "
            f"of them to continue ({reason:.200})",
            status=1,
        )
    return None
