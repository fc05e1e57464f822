"""The command line: from options to a trained model, its numbers and its pictures."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import pathlib
import platform
import sys
import tempfile
import time
import typing

from keras_vit.files import (
    CHECKSUMS,
    PARTS,
    Busy,
    is_folder,
    locked,
    whole,
    write_checksums,
    write_json,
)
from keras_vit.recipes import DEFAULT_RECIPES, RECIPE, RECIPES, Recipe, option

BACKENDS = ("tensorflow", "jax", "torch")
LANGUAGES = ("en", "pl")
# Image sides of the sets that everyone tries first: a wrong --patch-size is refused at once.
KNOWN_SIDES = {"cifar10": 32, "cifar100": 32, "digits": 32}

# What a run leaves, beside its settings and its model.
OF_A_RUN = ("metrics.json", "best.keras", "history.csv", "timing.csv", "report.html")
CHECKED = (*OF_A_RUN, "model.keras", "config.json")
# Inside the folder of a run that is not finished.
CHECKPOINTS = "checkpoints"
# Settings that a run may go on with although they changed.
FREE_TO_CHANGE = (
    *("data_dir", "figures_dir", "language", "output"),
    *("precision", "save_every", "tensorboard"),
)
# What part of a processor's largest rate a training step of the baseline reaches.
REACHED = 0.6
# What the backends' errors say when memory is short.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "OOM when allocating", "out of memory", "not enough memory")


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a run beside its recipe."""

    dataset: str = option(
        "cifar10",
        "name of a set of TensorFlow Datasets, 'digits', a folder with one sub-folder of images "
        "per class, or an .npz file of arrays",
    )
    data_dir: str | None = option(
        None, "folder of prepared TensorFlow Datasets (default: TFDS_DATA_DIR, else its own)"
    )
    image_size: int | None = option(
        None, "side that images of a folder are resized to (default: what suits them)", low=1
    )
    limit_train: int | None = option(None, "train on so many images only", low=1)
    validation: int = option(0, "training images held out to measure each epoch", low=0)
    recipe: str | None = option(
        None,
        "settings to start from (default: baseline; digits has its own)",
        choices=tuple(RECIPES),
    )
    seed: int = option(
        0, "decides weights, augmentation and the order of images", low=0, below=2**32
    )
    backend: str | None = option(
        None, "what Keras computes with (default: Keras's own choice)", choices=BACKENDS
    )
    precision: str = option(
        "float32",
        "what most layers compute in; weights, loss and logits stay in float32",
        choices=("float32", "bfloat16", "float16"),
    )
    output: str | None = option(
        None, "folder of the run (default: runs/<dataset>-<recipe>-seed<seed>)"
    )
    figures_dir: str | None = option(
        None, "folder of the pictures (default: figures; of keras-vit, inside the run's folder)"
    )
    language: str = option("en", "language of the report", choices=LANGUAGES)
    overwrite: bool = option(False, "start over in a folder that holds a run")
    save_every: int | None = option(
        None, "least steps between checkpoints, beside the one after each epoch", low=1
    )
    tensorboard: bool = option(False, "write TensorBoard's logs into the run folder")


class Failure(Exception):
    """Something that one line can explain; `status` is the exit status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Failure(message)


def main(arguments=None, prog="train.py", figures_dir: str | None = "figures"):
    """Runs the command line and returns its exit status.

    Args:
        arguments: list of strings; by default the process's own.
        prog: string, what the user typed before them.
        figures_dir: string, where pictures go if nobody says; None for the run's folder.
    """
    try:
        return run(parse(arguments, prog), figures_dir)
    except (Busy, Failure) as failure:
        print("error:", " ".join(str(failure).split()), file=sys.stderr)
        return getattr(failure, "status", 2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def parse(arguments=None, prog="train.py"):
    """The settings that the command line names and, with `--config`, a file.

    Returns:
        Dictionary of valid values by the names of the fields of `Run` and `Recipe`.
    """
    parser = Parser(
        prog=prog,
        description="Trains a Vision Transformer on small images and shows what it learned.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="repeat the run whose config.json this is")
    parser.add_argument(
        "--mixed-precision",
        action="store_const",
        const="bfloat16",
        dest="precision",
        help="the same as --precision bfloat16",
    )
    parser.add_argument(
        "--no-mixed-precision",
        action="store_const",
        const="float32",
        dest="precision",
        help="the same as --precision float32",
    )
    fields = {}
    for title, settings in {"run": Run, "recipe": RECIPES["baseline"]}.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(settings):
            fields[field.name] = field
            _add_option(group, field)

    named = vars(parser.parse_args(arguments))
    named = {name: tuple(x) if isinstance(x, list) else x for name, x in named.items()}
    if named.get("config") == "":
        raise Failure("--config must not be empty")
    if "config" in named:
        from_file = _read_config(named.pop("config"), fields)
        if "recipe" in named:  # The settings of the file's own recipe give way to it.
            from_file = {name: from_file[name] for name in from_file if hasattr(Run, name)}
        if named.get("schedule", "cosine") != "cosine":
            from_file.pop("warmup", None)
        named = {**from_file, **named}
    for name, value in named.items():
        _check(fields[name], value)
    settle(named)
    return named


def settle(named):
    """All settings: those that the user named, and a recipe's for the others.

    Args:
        named: dictionary of the settings that the user named.

    Returns:
        A `Run` and a `Recipe`.

    Raises:
        Failure: if settings do not go together.
    """
    default = DEFAULT_RECIPES.get(named.get("dataset", Run.dataset), RECIPE)
    name = named.get("recipe") or default
    recipe = RECIPES[name]
    values = {**dataclasses.asdict(Run()), **dataclasses.asdict(recipe()), **named, "recipe": name}
    if values["schedule"] != "cosine" and "warmup" not in named:
        values["warmup"] = 0.0
    _check_together(values)
    return _pick(Run, values), _pick(recipe, values)


def run(named, figures_dir: str | None = "figures"):
    """Trains, evaluates and draws; returns the exit status.

    Args:
        named: dictionary of the settings that the user named, as `parse` returns it.
        figures_dir: string, where pictures go if they name no place; None for the run's folder.
    """
    options, recipe = settle(named)
    start = time.perf_counter()
    choose_backend(options.backend)
    if options.tensorboard:
        require("tensorboard", "--tensorboard")
    _run_dir(options)
    figures_dir = options.figures_dir or figures_dir
    if figures_dir:
        _writable(figures_dir, "--figures-dir")
    # The rest of the package imports Keras, whose backend is settled only now.
    with quiet():
        import keras

        from keras_vit import devices, training
    if options.backend not in (None, keras.backend.backend()):
        raise Failure(
            f"--backend {options.backend} comes too late: Keras was imported before and computes "
            f"with {keras.backend.backend()}"
        )
    if options.precision not in devices.precisions():
        raise Failure(
            f"--precision {options.precision} needs instructions that this machine lacks, and "
            f"would only be slower: choose {' or '.join(devices.precisions())}"
        )

    dataset, missing = _load(options, named)
    if missing:
        options, recipe = settle({**named, "dataset": "digits"})
    run_dir = _run_dir(options)
    pictures = pathlib.Path(figures_dir) if figures_dir else run_dir / "figures"

    try:
        dataset, validation = training_part(dataset, options)
        if "epochs" not in named:
            recipe = _with_epochs(recipe, len(dataset.train_images), bool(devices.accelerators()))
        keras.utils.set_random_seed(options.seed)
        dtype = "float32" if options.precision == "float32" else f"mixed_{options.precision}"
        needed = training.least_memory(recipe, dataset, dtype)
        if not devices.accelerators() and needed > _memory():
            # Linux would grant it, and kill the process once it is used.
            raise _too_large(recipe)
        model = training.build_model(dataset, recipe, dtype)
    except ValueError as error:
        raise Failure(str(error)) from error

    with saying_where_writing_fails(run_dir), contextlib.ExitStack() as stack:
        for folder in (run_dir, pictures):
            folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(run_dir))
        _run_dir(options)  # Another process may have finished there since.
        settings = {**dataclasses.asdict(options), **dataclasses.asdict(recipe)}
        settings["backend"] = keras.backend.backend()
        del settings["overwrite"]  # A wish for this once, not for every repetition.
        _start_or_continue(run_dir, settings, options.overwrite)
        count = f"{len(dataset.train_images):,}"
        print(f"Training on {count} images of {dataset.name}, into {run_dir}")
        if not devices.accelerators() and not _has_checkpoint(run_dir):
            _say_how_long(recipe, dataset, options.precision, named)
        before = time.perf_counter()
        history = _fit(model, dataset, recipe, options, validation, run_dir)
        # As if this process had trained every epoch.
        start += time.perf_counter() - before - sum(history["seconds"])
        with whole(run_dir / "model.keras") as path:
            model.save(path)
        probabilities, metrics = evaluate(model, dataset, history)
        run_facts = {"dataset": dataset.name, "recipe": options.recipe, "seed": options.seed}
        seconds = {"wall_seconds": round(time.perf_counter() - start, 1)}
        # Before the pictures, whose failure must not cost the numbers.
        write_json(run_dir / "metrics.json", {**run_facts, **metrics, **seconds})
        draw(model, dataset, recipe, probabilities, history, pictures)
        write_report(run_dir, model, dataset, probabilities, pictures, options.language)
        write_checksums(run_dir, CHECKED)
        # Without a checkpoint the run counts as finished.
        _remove_checkpoints(run_dir)
    print(f"Model, numbers and report: {run_dir}. Pictures: {pictures}.")
    return 0


def _with_epochs(recipe, images, has_gpu):
    """The recipe with the number of epochs that suits the data and the device, which is printed."""
    if recipe.images_seen:
        epochs = max(1, round(recipe.images_seen / images))
        reason = f"{recipe.images_seen:,} images seen"
    elif recipe.cpu_epochs and not has_gpu:
        epochs, reason = recipe.cpu_epochs, f"no GPU found, with one {recipe.epochs}"
    else:
        return recipe
    print(f"Training for {epochs} epochs ({reason}; --epochs N changes that).")
    return dataclasses.replace(recipe, epochs=epochs)


def _say_how_long(recipe, dataset, precision, named):
    """Prints about how long a training takes on this machine's processor."""
    from keras_vit import devices, journal, training

    images = recipe.epochs * len(dataset.train_images)
    work = images * training.operations(recipe, dataset.image_shape)
    seconds = work / (REACHED * devices.operations_per_second(precision))
    shorter = ""
    if "recipe" not in named and seconds > 15 * 60:
        shorter = "; `--recipe quick` takes about 10 minutes on two cores"
    print(f"This will take about {journal.duration(seconds)}{shorter}.", flush=True)


def training_part(dataset, options):
    """The data that a run learns from, and what it holds out, which may be None."""
    validation = dataset.validation
    if options.validation:
        dataset, validation = dataset.hold_out(options.validation, options.seed)
    if options.limit_train:
        dataset = dataset.limit_train(options.limit_train, options.seed)
    return dataset, validation


def _fit(model, dataset, recipe, options, validation, run_dir):
    """Trains; returns the history, or raises a `Failure` for what one line can explain."""
    from keras_vit import training

    extras = options.tensorboard, options.save_every
    try:
        return training.fit(model, dataset, recipe, options.seed, validation, run_dir, *extras)
    except BaseException as error:
        with contextlib.suppress(OSError):  # Nobody may read any more.
            print(flush=True)  # Ends the line of the progress bar.
        failure = _explained(error, recipe, options)
        if failure is None:
            raise
        raise failure from error


def _explained(error, recipe, options):
    """What ended a training as a `Failure`; None if one line cannot explain it."""
    from keras_vit.checkpoints import OtherVariables
    from keras_vit.journal import Diverged, Interrupted, OtherData

    if isinstance(error, Diverged):
        return Failure(f"{error} (and --overwrite)", status=3)
    if isinstance(error, (OtherData, OtherVariables)):
        return Failure(
            f"{error}: choose another folder with --output, or start over with --overwrite"
        )
    if isinstance(error, Interrupted):
        same = "The same command" + (" without --overwrite" if options.overwrite else "")
        return Failure(f"{error}: interrupted and saved. {same} goes on from there", error.status)
    # Each backend has a class of its own for this.
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return _too_large(recipe)
    return None


def _start_or_continue(run_dir, settings, overwrite):
    """Prepares a folder for a run, or for the rest of the same run that left a checkpoint there."""
    from keras_vit.loading import ModelError, check_archive

    path = run_dir / "config.json"
    before = _settings_of(path) if path.exists() and not overwrite else {}
    if not (overwrite or "recipe" in before):
        others = (*CHECKED, CHECKSUMS, CHECKPOINTS)
        if found := [name for name in others if (run_dir / name).exists()]:
            raise Failure(
                f"{run_dir} holds {', '.join(found)}, but not the settings of a run: choose "
                "another folder with --output, or allow these to be replaced with --overwrite"
            )
    for folder in (run_dir, run_dir / CHECKPOINTS):
        for part in folder.glob(PARTS):  # What a killed process was writing.
            part.unlink()
    if not overwrite and _has_checkpoint(run_dir):
        now = _plain(settings)
        before = current_names(before)
        names = [name for name in {**before, **now} if name not in FREE_TO_CHANGE]
        changes = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in names
            if before.get(name) != now.get(name)
        ]
        if changes:
            raise Failure(
                f"{run_dir} holds a run that was not finished, with other settings in {path.name}: "
                f"{'; '.join(changes)}. Choose another folder with --output, or start over in this "
                "one with --overwrite"
            )
        best = run_dir / "best.keras"
        try:
            if best.exists():
                check_archive(best, math.inf)
        except ModelError as error:
            raise Failure(
                f"{error}. Remove it to go on without the best model so far, or start over with "
                "--overwrite"
            ) from error
        print(f"Going on with the run in {run_dir}.")
    else:
        # What an earlier run saved as `model.keras` stays until this one has a model of its own.
        for name in (*OF_A_RUN, CHECKSUMS):
            (run_dir / name).unlink(missing_ok=True)
        _remove_checkpoints(run_dir)
    write_json(path, settings)


@contextlib.contextmanager
def saying_where_writing_fails(run_dir):
    try:
        yield
    except BrokenPipeError:  # Of stdout, which nobody reads any more.
        raise
    except OSError as error:
        raise Failure(
            f"{error.filename or run_dir} cannot be read or written: {error.strerror or error}. "
            "What was saved before is still there",
            status=1,
        ) from error


def _memory():
    """Bytes of memory that this machine has; infinite where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def _too_large(recipe):
    return Failure(
        f"a model of --embed-dim {recipe.embed_dim} and --depth {recipe.depth} on batches of "
        f"--batch-size {recipe.batch_size} needs more memory than this machine has: try smaller "
        "ones, or a larger --patch-size"
    )


def evaluate(model, dataset, history=None):
    """Measures a trained model on the test set and prints it; returns probabilities and numbers.

    The numbers are about training as well if its history is known.
    """
    import keras

    from keras_vit import evaluation

    probabilities = evaluation.predict(model, dataset.test_images)
    labels, names = dataset.test_labels, dataset.class_names
    metrics = {
        **evaluation.classification_metrics(probabilities, labels, names),
        "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        **(evaluation.training_metrics(history, len(dataset.train_images)) if history else {}),
        **evaluation.environment(),
    }
    if any(isinstance(layer, keras.layers.RandomFlip) for layer in model.augmentation):
        metrics["flip_averaged_accuracy"] = evaluation.flip_averaged_accuracy(
            model, dataset.test_images, labels, probabilities
        )
    print(evaluation.per_class_table(metrics))
    print(
        f"Test accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f}, calibration error "
        f"{metrics['calibration_error']:.2%} on {len(labels):,} images of {dataset.name}"
    )
    return probabilities, metrics


def draw(model, dataset, recipe, probabilities, history, folder):
    """Draws the pictures of a run into a folder."""
    from keras_vit import figures, training

    falls = []
    if recipe.schedule == "milestones":
        _, falls = training.step_schedule(recipe.learning_rate, recipe.epochs, recipe.milestones)
    try:
        figures.draw_all(model, dataset, probabilities, folder, history, falls)
    except OSError as error:
        raise Failure(f"the pictures cannot be written to {folder}: {error.strerror}", 1) from error


def write_report(run_dir, model, dataset, probabilities, pictures, language):
    """Writes `report.html` into the folder of a run; without Jinja2 a warning takes its place."""
    try:
        from keras_vit import report
    except ModuleNotFoundError as error:
        print(f"WARNING: report.html was not written: {error}", file=sys.stderr)
        return
    path = run_dir / "report.html"
    report.write_report(path, run_dir, model, dataset, probabilities, pictures, language)


def _load(options, named):
    """The data that was asked for and False; where nobody asked and it is missing, digits, True."""
    from keras_vit import data

    try:
        return data.load_dataset(options.dataset, options.data_dir, options.image_size), False
    except data.DatasetError as error:
        if "dataset" in named or not isinstance(error, data.DatasetUnavailable):
            raise Failure(str(error)) from error
        print(
            f"WARNING: {error}.\nTraining on scikit-learn's embedded digits instead; everything "
            "that this run writes is labelled 'digits'.",
            file=sys.stderr,
        )
        return data.load_dataset("digits"), True


def choose_backend(backend):
    """Settles what Keras computes with, before anything imports Keras."""
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    backend = os.environ.get("KERAS_BACKEND")
    if backend:
        if backend not in BACKENDS:
            raise Failure(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, not {backend!r}")
        require(backend, f"backend {backend!r}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if platform.machine() in ("x86_64", "AMD64"):
        # TensorFlow's default leaves Intel's kernels off on some AMD processors, twice as slow.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    logging.getLogger("absl").setLevel(logging.ERROR)


def require(package, wish):
    if importlib.util.find_spec(package) is None:
        raise Failure(f"{wish} needs a package that is missing: try `pip install {package}`")


@contextlib.contextmanager
def quiet():
    """Holds back what TensorFlow's libraries write to stderr while they load, unless that fails."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except ModuleNotFoundError as error:  # Of the backend that Keras's own settings choose.
            raise Failure(
                f"package {error.name} is missing: try `pip install {error.name}`, or another "
                "--backend"
            ) from error
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _run_dir(options):
    """The folder of a run; a finished one is left alone."""
    name = options.dataset
    if name.endswith(".npz"):
        name = pathlib.Path(name).stem
    elif is_folder(name):
        name = pathlib.Path(name).expanduser().resolve().name
    name = name.replace("/", "_").replace(":", "_")
    default = f"runs/{name}-{options.recipe}-seed{options.seed}"
    folder = _writable(options.output or default, "--output")
    finished = (folder / "metrics.json").exists() and not _has_checkpoint(folder)
    if finished and not options.overwrite:
        raise Failure(
            f"{folder} holds a finished run: choose another folder with --output, "
            "or allow this one to be replaced with --overwrite"
        )
    return folder


def _writable(folder, flag):
    """A folder that is there or can be made, and written to; nothing is made yet."""
    folder = pathlib.Path(folder)
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return folder
    except OSError as error:
        raise Failure(f"{flag} {folder} cannot be written to: {error.strerror}") from error


def _add_option(group, field):
    """Adds a dataclass field to the command line."""
    kind = _kind(field)
    default = field.default
    note = ""
    if default is not None and kind is not bool:
        shown = " ".join(f"{x:g}" for x in default) if kind is tuple else default
        note = f" (default: {shown})"
    options = {"help": field.metadata["help"] + note}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is tuple:
        options |= {"type": float, "nargs": "+", "metavar": "X"}
    else:
        choices = field.metadata["choices"]
        options |= {"type": kind, "choices": choices}
        if choices is None:
            options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument("--" + field.name.replace("_", "-"), **options)


def _kind(field):
    """The type of a field's values, without the `Optional`."""
    return next((x for x in typing.get_args(field.type) if x is not type(None)), field.type)


def _check(field, value):
    """Refuses a value that a field does not allow."""
    if value is None:
        return
    limits = field.metadata
    flag = "--" + field.name.replace("_", "-")
    if value == "":
        raise Failure(f"{flag} must not be empty")
    if isinstance(value, str) and "\0" in value:
        raise Failure(f"{flag} must hold no null byte, but is {value!r}")
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise Failure(f"{flag} must be a finite number, but is {number}")
        if limits["low"] is not None and not number >= limits["low"]:
            raise Failure(f"{flag} must be at least {limits['low']}, but is {number}")
        if limits["high"] is not None and not number <= limits["high"]:
            raise Failure(f"{flag} must be at most {limits['high']}, but is {number}")
        if limits["above"] is not None and not number > limits["above"]:
            raise Failure(f"{flag} must be over {limits['above']}, but is {number}")
        if limits["below"] is not None and not number < limits["below"]:
            raise Failure(f"{flag} must be below {limits['below']}, but is {number}")
        if limits["choices"] and number not in limits["choices"]:
            raise Failure(f"{flag} must be one of {', '.join(limits['choices'])}, not {number}")


def _check_together(values):
    """Refuses values that are wrong only beside each other."""
    heads, width = values["num_heads"], values["embed_dim"]
    if width % heads:
        raise Failure(
            f"--embed-dim must be a multiple of --num-heads {heads}, but is {width} (recipe "
            f"{values['recipe']})"
        )
    if values["image_size"] and (
        values["dataset"] in KNOWN_SIDES or not is_folder(values["dataset"])
    ):
        raise Failure(f"--image-size is for folders of images, and {values['dataset']} is none")
    for name in ("crop_scale", "crop_ratio"):
        pair = values[name]
        if len(pair) != 2 or pair[0] > pair[1]:
            flag, shown = "--" + name.replace("_", "-"), " ".join(f"{x:g}" for x in pair)
            raise Failure(f"{flag} must be two numbers, the smaller one first, but is {shown}")
    if values["warmup"] and values["schedule"] != "cosine":
        raise Failure(f"--warmup {values['warmup']} needs --schedule cosine")
    mixup, cutmix = values["mixup"], values["cutmix"]
    if mixup + cutmix > 1:
        raise Failure(f"--mixup {mixup} and --cutmix {cutmix} must be 1 at most together")
    side = KNOWN_SIDES.get(values["dataset"])
    if side is not None and side % values["patch_size"]:
        patch = values["patch_size"]
        raise Failure(f"--patch-size must divide the image side of {side} pixels, but is {patch}")


def _pick(kind, values):
    """A dataclass out of the values that carry its fields' names."""
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _read_config(path, fields):
    """Settings out of a `config.json`, each of a known name and the right type."""
    try:
        settings = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Failure(f"--config {path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise Failure(f"--config {path} must hold an object, but holds {settings!r:.40}")
    settings = current_names(settings)
    for name, value in settings.items():
        if name not in fields:
            raise Failure(f"--config {path} has an unknown setting {name!r}")
        field, kind = fields[name], _kind(fields[name])
        if kind is tuple and isinstance(value, list):
            numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
            settings[name] = tuple(value) if numbers else value
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = float(value) if abs(value) < sys.float_info.max else math.inf
        if type(settings[name]) is not kind and not (value is None and field.default is None):
            raise Failure(
                f"--config {path} has {name} = {value!r:.40}, expected a value of type "
                f"{kind.__name__}"
            )
    return settings


def _has_checkpoint(folder):
    return any((folder / CHECKPOINTS).glob("*.checkpoint"))


def _remove_checkpoints(folder):
    """Removes a run's checkpoints, and their folder unless somebody has put other files there."""
    for path in (folder / CHECKPOINTS).glob("*.checkpoint"):
        path.unlink()
    with contextlib.suppress(OSError):
        (folder / CHECKPOINTS).rmdir()


def _settings_of(path):
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise Failure(f"{path} is damaged: start over in its folder with --overwrite")
    return before


def current_names(settings):
    """Settings of a file, perhaps of an earlier version, under the names that they have now."""
    settings = dict(settings)
    if {"epochs", "learning_rate", "depth"} <= set(settings) and "optimizer" not in settings:
        # A run's own file, which lists every setting: what has become one since was the baseline's.
        for name, value in _plain(dataclasses.asdict(Recipe())).items():
            settings.setdefault(name, value)
    if "mixed_precision" in settings:
        mixed = settings.pop("mixed_precision")
        settings["precision"] = "bfloat16" if mixed else "float32"
    return settings


def _plain(settings):
    """Settings as they come back from a file."""
    return json.loads(json.dumps(settings))
