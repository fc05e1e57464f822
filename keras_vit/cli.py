"""The command line: from options to a trained model, its numbers and its pictures."""

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import sys
import typing

from keras_vit.recipes import RECIPES, option

# Epochs of a run on a machine without an accelerator, unless the user says otherwise.
CPU_EPOCHS = 10
BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a run beside its recipe."""

    dataset: str = option("cifar10", "'digits', or the name of a set of TensorFlow Datasets")
    data_dir: typing.Optional[str] = option(
        None, "folder of prepared TensorFlow Datasets (default: TFDS_DATA_DIR, else its own)"
    )
    limit_train: typing.Optional[int] = option(None, "train on so many images only", low=1)
    validation: int = option(0, "training images held out to measure each epoch", low=0)
    recipe: str = option("baseline", "settings to start from", choices=tuple(RECIPES))
    seed: int = option(0, "decides weights, augmentation and the order of images", low=0)
    backend: typing.Optional[str] = option(
        None, "what Keras computes with (default: Keras's own choice)", choices=tuple(BACKENDS)
    )
    mixed_precision: bool = option(False, "compute in bfloat16 where precision allows")
    output: typing.Optional[str] = option(
        None, "folder of the run (default: runs/<dataset>-<recipe>-seed<seed>)"
    )
    figures_dir: str = option("figures", "folder of the pictures")
    overwrite: bool = option(False, "replace a finished run in the same folder")
    tensorboard: bool = option(False, "write TensorBoard's logs into the run folder")


class Failure(Exception):
    """Something that one line can explain; `status` is the exit status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Failure(message)


def main(arguments=None):
    """Runs the command line and returns its exit status.

    Args:
        arguments: list of strings; by default the process's own.
    """
    try:
        return run(*parse(arguments))
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.status


def parse(arguments=None):
    """Settings out of the command line and, with `--config`, of a file.

    Returns:
        A `Run`, a `Recipe`, and the set of the settings that the user named.
    """
    parser = Parser(
        prog="train.py",
        description="Trains a Vision Transformer on small images and shows what it learned.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="repeat the run whose config.json this is")
    fields = {}
    for title, settings in {"run": Run, "recipe": RECIPES["baseline"]}.items():
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(settings):
            fields[field.name] = field
            _add_option(group, field)

    named = vars(parser.parse_args(arguments))
    if "config" in named:
        named = {**_read_config(named.pop("config"), fields), **named}
    for name, value in named.items():
        _check(fields[name], value)
    recipe_name = named.get("recipe", Run.recipe)
    defaults = {**dataclasses.asdict(Run()), **dataclasses.asdict(RECIPES[recipe_name]())}
    values = {**defaults, **named}
    if values["embed_dim"] % values["num_heads"]:
        raise Failure(
            "--embed-dim must be a multiple of --num-heads, but "
            f"{values['embed_dim']} is no multiple of {values['num_heads']}"
        )
    build = {kind: [f.name for f in dataclasses.fields(kind)] for kind in (Run, RECIPES[recipe_name])}
    run, recipe = (kind(**{name: values[name] for name in names}) for kind, names in build.items())
    return run, recipe, set(named)


def run(options, recipe, named):
    """Trains, evaluates and draws; returns the exit status.

    Args:
        options: a `Run`.
        recipe: a `Recipe`.
        named: set of the settings that the user named.
    """
    _choose_backend(options.backend)
    run_dir = _run_dir(options)
    # The rest of the package imports Keras, whose backend is settled only now.
    import keras

    from keras_vit import data, training
    from keras_vit.model import VisionTransformer, default_augmentation

    options, dataset = _load(options, named)
    run_dir = _run_dir(options)
    if "epochs" not in named and not training.has_gpu():
        recipe = dataclasses.replace(recipe, epochs=min(recipe.epochs, CPU_EPOCHS))
        print(f"No GPU found: training for {recipe.epochs} epochs (--epochs N changes that).")

    validation = None
    try:
        if options.validation:
            dataset, validation = dataset.hold_out(options.validation, options.seed)
        if options.limit_train:
            dataset = dataset.limit_train(options.limit_train, options.seed)
        keras.utils.set_random_seed(options.seed)
        keras.config.set_dtype_policy("mixed_bfloat16" if options.mixed_precision else "float32")
        flip = dataset.horizontal_flip
        layers = default_augmentation(dataset.image_shape, flip) if recipe.augmentation else []
        sizes = ("patch_size", "embed_dim", "mlp_dim", "num_heads", "depth", "dropout")
        model = VisionTransformer(
            dataset.image_shape,
            len(dataset.class_names),
            augmentation=layers,
            **{name: getattr(recipe, name) for name in sizes},
        )
    except ValueError as error:
        raise Failure(" ".join(str(error).split())) from error
    model.adapt(dataset.train_images)

    run_dir.mkdir(parents=True, exist_ok=True)
    settings = {**dataclasses.asdict(options), **dataclasses.asdict(recipe)}
    _write_json(run_dir / "config.json", settings)
    print(f"Training on {len(dataset.train_images):,} images of {options.dataset}, into {run_dir}")
    history, interrupted = training.fit(
        model, dataset, recipe, options.seed, validation, run_dir, options.tensorboard
    )
    model.save(run_dir / "model.keras")
    if interrupted:
        print(f"\nInterrupted: what was learned so far is in {run_dir / 'model.keras'}")
        return 130
    report(model, dataset, recipe, history, run_dir, pathlib.Path(options.figures_dir), options)
    return 0


def report(model, dataset, recipe, history, run_dir, figures_dir, options):
    """Measures a trained model on the test set, then writes its numbers and its pictures."""
    from keras_vit import evaluation, figures, training

    probabilities = evaluation.predict(model, dataset.test_images)
    metrics = {
        **evaluation.classification_metrics(
            probabilities, dataset.test_labels, dataset.class_names
        ),
        "dataset": options.dataset,
        "recipe": options.recipe,
        "seed": options.seed,
        "parameters": model.count_params(),
        **evaluation.training_metrics(history, len(dataset.train_images)),
        **evaluation.environment(),
    }
    print(evaluation.per_class_table(metrics))
    figures_dir.mkdir(parents=True, exist_ok=True)
    _, falls = training.step_schedule(recipe.learning_rate, recipe.epochs, recipe.milestones)
    figures.draw_all(model, dataset, probabilities, history, falls, figures_dir)
    # The numbers come last: a folder that holds them holds a finished run.
    _write_json(run_dir / "metrics.json", metrics)
    print(
        f"Test accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f} "
        f"on {len(dataset.test_labels):,} images of {options.dataset}"
    )
    print(f"Model and numbers: {run_dir}. Pictures: {figures_dir}.")


def _load(options, named):
    """The data, and the options with the name of the set that was really loaded."""
    from keras_vit import data

    try:
        return options, data.load_dataset(options.dataset, options.data_dir)
    except data.DatasetError as error:
        if "dataset" in named:
            raise Failure(str(error)) from error
        print(
            f"WARNING: {error}.\nTraining on scikit-learn's embedded digits instead; everything "
            "that this run writes is labelled 'digits'.",
            file=sys.stderr,
        )
        options = dataclasses.replace(options, dataset="digits")
        return options, data.load_dataset("digits")


def _choose_backend(backend):
    """Settles what Keras computes with, before anything imports Keras."""
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if importlib.util.find_spec(backend) is None:
        raise Failure(f"backend {backend!r} is not installed: try `pip install {backend}`")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)


def _run_dir(options):
    """The folder of a run; a finished one is left alone."""
    name = options.dataset.replace("/", "_").replace(":", "_")
    default = f"runs/{name}-{options.recipe}-seed{options.seed}"
    folder = pathlib.Path(options.output or default)
    if folder.exists() and not folder.is_dir():
        raise Failure(f"--output {folder} is a file, expected a folder")
    if (folder / "metrics.json").exists() and not options.overwrite:
        raise Failure(
            f"{folder} holds a finished run: choose another folder with --output, "
            "or allow this one to be replaced with --overwrite"
        )
    return folder


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
        options |= {"type": float, "nargs": "+", "metavar": "SHARE"}
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
    limits = field.metadata
    flag = "--" + field.name.replace("_", "-")
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if limits["low"] is not None and not number >= limits["low"]:
            raise Failure(f"{flag} must be at least {limits['low']}, but is {number}")
        if limits["above"] is not None and not number > limits["above"]:
            raise Failure(f"{flag} must be over {limits['above']}, but is {number}")
        if limits["below"] is not None and not number < limits["below"]:
            raise Failure(f"{flag} must be below {limits['below']}, but is {number}")
        if limits["choices"] and number not in limits["choices"]:
            raise Failure(f"{flag} must be one of {', '.join(limits['choices'])}, not {number}")


def _read_config(path, fields):
    """Settings out of a `config.json`, each of a known name and the right type."""
    try:
        settings = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Failure(f"--config {path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise Failure(f"--config {path} must hold an object, but holds {settings!r:.40}")
    for name, value in settings.items():
        if name not in fields:
            raise Failure(f"--config {path} has an unknown setting {name!r}")
        field, kind = fields[name], _kind(fields[name])
        if kind is tuple and isinstance(value, list):
            numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
            settings[name] = tuple(value) if numbers else value
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = float(value)
        if type(settings[name]) is not kind and not (value is None and field.default is None):
            raise Failure(
                f"--config {path} has {name} = {value!r:.40}, expected a value of type "
                f"{kind.__name__}"
            )
    return settings


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
