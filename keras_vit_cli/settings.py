"""The settings of a run: each with its default, its limits and its help, resolved once."""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import textwrap
import typing

from keras_vit_cli.backend import BACKENDS
from keras_vit_cli.errors import CommandError
from keras_vit_cli.recipes import (
    DEFAULT_RECIPE,
    DEFAULT_RECIPES,
    FINETUNE,
    RECIPE_OPTIONS,
    RECIPES,
    Recipe,
    option,
)

LANGUAGES = ("en", "pl")
WARMUP = 0.05  # Of an extended run whose parent had none.


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run: its own, and its recipe.

    Attributes:
        training: `Recipe`, the recipe named with the values that the user changed.
        named: dictionary, the settings that the user gave.
        dataset_from_file: bool, whether a file named the data set, and not the command line.
    """

    dataset: str = option(
        "cifar10",
        "name of a data set of TensorFlow Datasets, 'digits', a folder with one sub-folder of "
        "images per class, or an .npz file of arrays",
    )
    data_dir: str | None = option(
        None,
        "folder of prepared TensorFlow Datasets (default: TFDS_DATA_DIR, else "
        "~/tensorflow_datasets)",
    )
    image_size: int | None = option(
        None,
        "side that images of a folder or of TensorFlow Datasets are resized to (default: what "
        "suits them and the patches)",
        low=1,
    )
    resize: str = option(
        "squash",
        "how images of another aspect ratio are fitted: scaled in both directions, cut to the "
        "middle, or padded with black",
        choices=("squash", "crop", "pad"),
    )
    limit_train: int | None = option(None, "train on at most N images", low=1)
    validation: int = option(0, "training images held out to validate on after each epoch", low=0)
    recipe: str | None = option(
        None,
        f"settings to start from (default: {DEFAULT_RECIPE}; {FINETUNE} with --init-from; digits "
        "has its own)",
        choices=tuple(RECIPES),
    )
    init_from: str | None = option(
        None,
        "start from the weights of a preset such as cifar10-quick, a .keras or .safetensors file, "
        "or a run directory; their architecture replaces the recipe's",
    )
    extend: int | None = option(
        None,
        "train the finished run of --init-from for N more epochs: its settings, optimizer "
        "state and weights, with a new warm-up and cosine",
        low=1,
    )
    seed: int = option(
        0, "decides weights, augmentation and the order of images", low=0, below=2**32
    )
    backend: str | None = option(
        None, "what Keras computes with (default: Keras's own choice)", choices=BACKENDS
    )
    distribute: str | None = option(
        None,
        "train on all devices of this machine, or of all hosts that run this command (JAX only)",
        choices=("devices", "hosts"),
    )
    precision: str = option(
        "float32",
        "what most layers compute in; weights, loss and logits stay in float32",
        choices=("float32", "bfloat16", "float16"),
    )
    output: str | None = option(None, "run directory (default: runs/<dataset>-<recipe>-seed<seed>)")
    figures_dir: str | None = option(
        None,
        "folder of the pictures (default: figures; with keras-vit, figures in the run directory)",
    )
    language: str = option(
        "en", "language of the report, the page and the pictures", choices=LANGUAGES
    )
    overwrite: bool = option(False, "start over in a folder that holds a run")
    save_every: int | None = option(
        None, "steps between checkpoints, in addition to the one after each epoch", low=1
    )
    tensorboard: bool = option(False, "write TensorBoard's logs into the run directory")
    training: Recipe = RECIPES[DEFAULT_RECIPE]
    named: dict = dataclasses.field(default_factory=dict, compare=False)
    dataset_from_file: bool = dataclasses.field(default=False, compare=False)

    def to_json(self):
        """The settings by name, as `config.json` holds them, without those of this one start."""
        once = ("overwrite", "distribute")
        names = [field.name for field in RUN_OPTIONS if field.name not in once]
        run = {name: getattr(self, name) for name in names}
        return {**run, **{x.name: getattr(self.training, x.name) for x in RECIPE_OPTIONS}}


RUN_OPTIONS = tuple(x for x in dataclasses.fields(Settings) if "help" in x.metadata)
# Those that the file of a run of any version lists.
FIRST_OPTIONS = {
    *("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "milestones", "warmup"),
    *("patch_size", "embed_dim", "mlp_dim", "num_heads", "depth", "dropout", "augmentation"),
}
# A path may begin with `~`, which shells leave in `--output=~/x`.
PATHS = ("dataset", "data_dir", "init_from", "output", "figures_dir")
OPTIONS = {field.name: field for field in (*RUN_OPTIONS, *RECIPE_OPTIONS)}


class Parser(argparse.ArgumentParser):
    """Raises what is wrong with a command line as a `CommandError`."""

    def error(self, message):
        raise CommandError(message)


def parse(arguments=None, prog="train.py"):
    """The settings that the command line names and, with `--config`, a file.

    Args:
        arguments: list of strings; by default the process's own.
        prog: string, what the user typed before them.

    Returns:
        `Settings`.

    Raises:
        CommandError: if a value is not allowed, or values do not go together.
    """
    default = _recipe_of_help(arguments)
    parser = Parser(
        prog=prog,
        description="Trains a Vision Transformer on small images and shows what it learned.",
        epilog="recipes:\n" + "\n".join(_described(name, name == default) for name in RECIPES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="repeat the run whose config.json this is")
    for flag, precision in (("mixed-precision", "bfloat16"), ("no-mixed-precision", "float32")):
        parser.add_argument(
            f"--{flag}",
            action="store_const",
            const=precision,
            dest="precision",
            help=f"the same as --precision {precision}",
        )
    groups = {"run": (RUN_OPTIONS, Settings()), "recipe": (RECIPE_OPTIONS, RECIPES[default])}
    for title, (fields, defaults) in groups.items():
        about = None
        if title == "recipe":
            about = f"defaults of the recipe {default}; --recipe NAME --help shows those of another"
        group = parser.add_argument_group(title, about)
        for field in fields:
            value = getattr(defaults, field.name)
            _add_option(group, field, defaults.usual_epochs if field.name == "epochs" else value)

    named = vars(parser.parse_args(arguments))
    named = {name: tuple(x) if isinstance(x, list) else x for name, x in named.items()}
    if named.get("config") == "":
        raise CommandError("--config must not be empty")
    from_file = {}
    if "config" in named and "extend" in named:
        raise CommandError(
            f"--extend {named['extend']} takes its settings from --init-from: leave out --config"
        )
    if "config" in named:
        from_file = read_config(os.path.expanduser(str(named.pop("config"))))
        if "recipe" in named:  # The settings of the file's own recipe give way to it.
            from_file = {x.name: from_file[x.name] for x in RUN_OPTIONS if x.name in from_file}
    elif "extend" in named:
        for name in ("recipe", "epochs"):
            if name in named:
                raise CommandError(
                    f"--extend {named['extend']} takes the recipe of --init-from for so many "
                    f"epochs: leave out --{name}"
                )
        from_file = settings_to_extend(named.get("init_from"), named["extend"])
    if named.get("schedule", "cosine") != "cosine":
        from_file.pop("warmup", None)
    dataset_from_file = "dataset" in from_file and "dataset" not in named
    settings = resolve({**from_file, **named})
    return dataclasses.replace(settings, dataset_from_file=dataset_from_file)


def settings_to_extend(run, epochs):
    """The settings of a finished run, for more epochs with a new warm-up and cosine.

    Args:
        run: string, its run directory.
        epochs: int.
    """
    config = pathlib.Path(run or "").expanduser() / "config.json"
    if not run or not config.is_file():
        raise CommandError(
            f"--extend {epochs} needs the directory of a finished run, as --init-from "
            f"runs/cifar10-strong-seed0, not {run!r}"
        )
    parent = read_config(config, "--init-from")
    parent.pop("figures_dir", None)  # The new run draws into a folder of its own.
    return {
        **parent,
        "output": f"{run.rstrip('/')}-extended",
        "epochs": epochs,
        "schedule": "cosine",
        "warmup": parent.get("warmup") or WARMUP,
        "image_scales": (),
        "image_scale_milestones": (),
    }


def _recipe_of_help(arguments):
    """The recipe whose defaults `--help` shows: the one that this command line trains."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--dataset", "--init-from"):
        parser.add_argument(name, nargs="?")
    chosen = parser.parse_known_args(arguments)[0]
    if chosen.recipe in RECIPES:
        return chosen.recipe
    return _default_recipe(chosen.dataset, chosen.init_from)


def _default_recipe(dataset, init_from):
    """The recipe where the user names none."""
    return FINETUNE if init_from else DEFAULT_RECIPES.get(dataset, DEFAULT_RECIPE)


def resolve(named):
    """Completes the settings that the user gave with defaults.

    Args:
        named: dictionary of values by the names of `OPTIONS`.

    Returns:
        `Settings`.

    Raises:
        CommandError: if a value is not allowed, or values do not go together.
    """
    for name, value in named.items():
        _check(OPTIONS[name], value)
    named = {x: os.path.expanduser(y) if y and x in PATHS else y for x, y in named.items()}
    recipe = named.get("recipe") or _default_recipe(named.get("dataset"), named.get("init_from"))
    changed = {x.name: named[x.name] for x in RECIPE_OPTIONS if x.name in named}
    training = dataclasses.replace(RECIPES[recipe], **changed)
    if training.schedule != "cosine" and "warmup" not in named:
        training = dataclasses.replace(training, warmup=0.0)
    _check_together(recipe, training)
    if training.needs_weights and not named.get("init_from"):
        raise CommandError(
            f"--recipe {recipe} needs --init-from: a preset such as cifar10-quick, a .keras file, "
            "or a run directory"
        )
    if training.freeze and not named.get("init_from"):
        raise CommandError(
            f"--freeze {training.freeze} needs --init-from: random weights must be trained"
        )
    if named.get("extend") and not named.get("init_from"):
        raise CommandError(f"--extend {named['extend']} needs --init-from RUN")
    if named.get("image_size") and not named.get("init_from"):
        check_patches(training.patch_size, (named["image_size"],), "--image-size {} or {}")
    run = {x.name: named[x.name] for x in RUN_OPTIONS if x.name in named}
    return Settings(**{**run, "recipe": recipe}, training=training, named=dict(named))


def check_patches(patch, sides, other_sizes=None):
    """Raises a `CommandError`, which names what would fit, unless patches divide images.

    Args:
        patch: int, side of a patch.
        sides: sides of an image.
        other_sizes: string, how the command line gives two others, where it can.
    """
    sides = tuple(dict.fromkeys(sides))
    if not any(side % patch for side in sides):
        return
    advice = []
    if other_sizes:
        below = max(sides[0] // patch, 1) * patch
        advice.append(other_sizes.format(*dict.fromkeys((below, below + patch))))
    common = math.gcd(*sides)
    divisors = [x for x in range(2, min(sides)) if common % x == 0]
    larger = [x for x in divisors if x > patch][:2]
    if fitting := larger or divisors[-1:]:
        advice.append(f"--patch-size {' or '.join(map(str, fitting))}")
    shown = f"side{'s' if len(sides) > 1 else ''} of {' and '.join(map(str, sides))}"
    raise CommandError(
        f"--patch-size must divide the image {shown} pixels, but is {patch}"
        + (f". Try {', or '.join(advice)}" if advice else "")
    )


def read_config(path, flag="--config"):
    """Settings out of a `config.json`, each of a known name and the right type.

    Args:
        path: string or `Path` of the file.
        flag: string, the option that an error names.

    Raises:
        CommandError: if the file cannot be read, or holds something else.
    """
    try:
        settings = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{flag} {path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CommandError(f"{flag} {path} must hold an object, but holds {settings!r:.40}")
    settings = current_names(settings)
    for name, value in settings.items():
        if name not in OPTIONS:
            raise CommandError(f"{flag} {path} has an unknown setting {name!r}")
        field, kind = OPTIONS[name], _kind(OPTIONS[name])
        if kind is tuple and isinstance(value, list):
            numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
            settings[name] = tuple(value) if numbers else value
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = float(value) if abs(value) < sys.float_info.max else math.inf
        if type(settings[name]) is not kind and not (value is None and field.default is None):
            raise CommandError(
                f"{flag} {path} has {name} = {value!r:.40}, expected a value of type "
                f"{kind.__name__}"
            )
    return settings


def current_names(settings):
    """Settings of a file, perhaps of an earlier version, under the names that they have now."""
    settings = dict(settings)
    if set(settings) >= FIRST_OPTIONS:
        # A run's own file, which lists every setting: what has become one since was the baseline's.
        for field in RECIPE_OPTIONS:
            settings.setdefault(field.name, _plain(field.default))
        settings.setdefault("resize", "squash")
    if "mixed_precision" in settings:
        mixed = settings.pop("mixed_precision")
        settings["precision"] = "bfloat16" if mixed else "float32"
    return settings


def _plain(value):
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value))


def _described(name, applies):
    """A recipe in the lines that `--help` shows of it."""
    note = " (applies here)" if applies else ""
    text = f"{name}{note}: {RECIPES[name].description} {RECIPES[name].result}"
    return textwrap.fill(text, 78, initial_indent="  ", subsequent_indent="    ")


def _add_option(group, field, default):
    """Adds a dataclass field to the command line, with the default that its help names."""
    kind = _kind(field)
    note = ""
    if default is not None:
        shown = _shown(default) if kind is tuple else default
        if kind is bool:
            shown = "yes" if default else "no"
        note = f" (default: {shown})"
    options = {"help": field.metadata["help"] + note}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is tuple:
        options |= {"type": float, "nargs": "+" if field.default else "*", "metavar": "X"}
    else:
        choices = field.metadata["choices"]
        options |= {"type": kind, "choices": choices}
        if choices is None:
            options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(_flag(field.name), **options)


def _shown(numbers):
    """Numbers as a command line has them."""
    return " ".join(f"{x:g}" for x in numbers) or "none"


def _flag(name):
    return "--" + name.replace("_", "-")


def _kind(field) -> type:
    """The type of a field's values, without the `Optional`."""
    return next((x for x in typing.get_args(field.type) if x is not type(None)), field.type)


def _check(field, value):
    """Refuses a value that a field does not allow."""
    if value is None:
        return
    limits, flag = field.metadata, _flag(field.name)
    if value == "":
        raise CommandError(f"{flag} must not be empty")
    if isinstance(value, str) and "\0" in value:
        raise CommandError(f"{flag} must hold no null byte, but is {value!r}")
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise CommandError(f"{flag} must be a finite number, but is {number}")
        if limits["low"] is not None and not number >= limits["low"]:
            raise CommandError(f"{flag} must be at least {limits['low']}, but is {number}")
        if limits["high"] is not None and not number <= limits["high"]:
            raise CommandError(f"{flag} must be at most {limits['high']}, but is {number}")
        if limits["above"] is not None and not number > limits["above"]:
            raise CommandError(f"{flag} must be greater than {limits['above']}, but is {number}")
        if limits["below"] is not None and not number < limits["below"]:
            raise CommandError(f"{flag} must be below {limits['below']}, but is {number}")
        if limits["choices"] and number not in limits["choices"]:
            raise CommandError(
                f"{flag} must be one of {', '.join(limits['choices'])}, not {number}"
            )


def _check_together(name, recipe):
    """Refuses values of a recipe that are wrong only beside each other."""
    if recipe.embed_dim % recipe.num_heads:
        raise CommandError(
            f"--embed-dim must be a multiple of --num-heads {recipe.num_heads}, but is "
            f"{recipe.embed_dim} (recipe {name})"
        )
    for field in ("crop_scale", "crop_ratio"):
        pair = getattr(recipe, field)
        if len(pair) != 2 or pair[0] > pair[1]:
            raise CommandError(
                f"{_flag(field)} must be two numbers, the smaller one first, but is {_shown(pair)}"
            )
    scales, grown = recipe.image_scales, recipe.image_scale_milestones
    if len(scales) != len(grown) or sorted(scales) != list(scales) or sorted(grown) != list(grown):
        raise CommandError(
            "--image-scales and --image-scale-milestones must have the same number of "
            f"values, in increasing order, but are {_shown(scales)} and {_shown(grown)}"
        )
    if scales and not recipe.augmentation:
        raise CommandError("--image-scales needs --augmentation, whose crops resize the images")
    if recipe.warmup and recipe.schedule != "cosine":
        raise CommandError(f"--warmup {recipe.warmup} needs --schedule cosine")
    if recipe.mixup + recipe.cutmix > 1:
        raise CommandError(
            f"--mixup {recipe.mixup} and --cutmix {recipe.cutmix} must add up to at most 1"
        )
