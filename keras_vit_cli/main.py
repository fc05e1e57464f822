"""Command lines: which command runs, with which options, and how it ends."""

import contextlib
import importlib
import os
import pathlib
import sys
import traceback

from keras_vit_cli import backend, settings, streams
from keras_vit_cli.backend import BACKENDS
from keras_vit_cli.errors import CommandError, Stopped
from keras_vit_cli.settings import LANGUAGES, Parser

# Commands that write down layers, for which Keras imports TensorFlow on every backend.
WRITING = ("train", "explain", "export", "page", "report")


def main(arguments=None):
    """Runs `keras-vit`; returns its exit status: 0, 1 if something was left out, 2 if wrong.

    Args:
        arguments: list of strings; by default the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"]:
        return train(arguments[1:], "keras-vit train", figures_dir=None)
    streams.prepare(must_be_read=arguments[:1] == ["predict"])
    return _ended(_run, arguments)


def train(arguments=None, prog="train.py", figures_dir: str | None = "figures"):
    """Runs `train.py`; returns its exit status.

    Args:
        arguments: list of strings; by default the process's own.
        prog: string, what the user typed before them.
        figures_dir: string, default folder of the pictures; None for the run directory.
    """
    streams.prepare()
    return _ended(_train, arguments, prog, figures_dir)


def _train(arguments, prog, figures_dir):
    chosen = settings.parse(arguments, prog)
    if chosen.distribute != "hosts":
        return _command("train", chosen.backend, chosen.distribute)(chosen, figures_dir)
    return _one_of_several(chosen, figures_dir)


def _one_of_several(chosen, figures_dir):
    """Trains in one of several processes; a failure ends this one at once.

    On exit, JAX would wait for the others, which wait for this one's part of the next step.
    """
    status = 1
    try:
        status = _ended(
            lambda: _command("train", chosen.backend, chosen.distribute)(chosen, figures_dir)
        )
    except Exception:
        traceback.print_exc()
    if status in (0, 143):  # All processes finish, or have saved the same step.
        return status
    streams.flush()
    os._exit(status)


def _run(arguments):
    options = parse(arguments)
    return _command(options.command, options.backend)(options)


def _command(name, chosen, distribute=None):
    """The function `run` of a command's module, which imports Keras: its backend is settled."""
    backend.choose(chosen)
    with backend.quiet():
        run = importlib.import_module(f"keras_vit_cli.{name}").run
    if distribute:
        backend.distribute(distribute)
    with backend.quiet():
        if name in WRITING:
            with contextlib.suppress(ImportError):
                importlib.import_module("tensorflow")
        # TensorFlow and JAX look for GPUs when they are first asked, and say so.
        importlib.import_module("keras_vit.devices").accelerators()
        image_error = importlib.import_module("keras_vit.data").ImageError

    def explaining_lost_images(*arguments):
        try:
            return run(*arguments)
        except image_error as error:  # A file of a streamed set was removed or damaged meanwhile.
            raise CommandError(str(error), status=1) from error

    return explaining_lost_images


def _ended(function, *arguments):
    """Calls a function; returns the exit status, whatever ends it."""
    try:
        return function(*arguments)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except CommandError as failure:
        print("error:", " ".join(str(failure).split()), file=sys.stderr)
        return failure.status
    except BrokenPipeError:  # Nobody reads any more, as after `| head`.
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    finally:
        streams.flush()


def parse(arguments):
    """The options of a command line of `keras-vit`, and the name of its command."""
    parser = Parser(
        prog="keras-vit",
        description="Trains Vision Transformers on small images and puts them to use.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    commands.add_parser("train", help="train a model; `keras-vit train --help` has the options")

    def add(name, help):
        return commands.add_parser(name, help=help, description=help)

    evaluate = add("evaluate", "measure a model on images that it was not trained on")
    predict = add("predict", "name the likeliest classes of images")
    explain = add(
        "explain", "draw where a model looks, as Attention Rollout, and the evidence for a class"
    )
    features = add("features", "write what a model's head reads of images, one row each")
    export = add("export", "write a model for another runtime, and compare it there")
    page = add("page", "write a model as one HTML page that runs it on any picture")
    report = add("report", "write the report of a run again")
    cache = add("cache", "show how large the cache of decoded images is, or clear it")

    for command in (evaluate, predict, explain, features, export, page):
        command.add_argument(
            "model",
            metavar="MODEL",
            type=_path,
            help="a .keras or .safetensors file, a run directory or a preset",
        )
    for command in (predict, explain, features):
        command.add_argument(
            "images", metavar="IMAGE", nargs="+", help="files, folders, or - for a list on stdin"
        )
    report.add_argument("run", metavar="RUN", type=_path, help="run directory")
    for command in (evaluate, predict, explain, features, page, report):
        command.add_argument("--backend", choices=BACKENDS, help="what Keras computes with")
    # Any backend's model can be loaded by TensorFlow, which alone writes all formats.
    export.set_defaults(backend="tensorflow")

    name = {"metavar": "NAME", "type": os.path.expanduser}
    evaluate.add_argument(
        "--dataset", **name, required=True, help="as for train: a folder, file or name"
    )
    export.add_argument("--dataset", **name, help="test images to compare on, else noise")
    page.add_argument(
        "--dataset", **name, help="test images to begin with (default: those of the run)"
    )
    report.add_argument("--dataset", **name, help="where the run's data set lies now")
    for command in (evaluate, export, page, report):
        command.add_argument("--data-dir", **name, help="folder of TensorFlow Datasets")

    output = {"metavar": "PATH", "type": _path}
    evaluate.add_argument("-o", "--output", **output, help="folder for metrics and pictures")
    evaluate.add_argument(
        "--probe",
        action="store_true",
        help="measure the features too: a linear probe and nearest neighbours, trained on the "
        "training images of the data set, whose classes may be others than the model's",
    )
    explain.add_argument("-o", "--output", **output, required=True, help="folder for the pictures")
    features.add_argument("-o", "--output", **output, required=True, help="an .npz file to write")
    export.add_argument("-o", "--output", **output, required=True, help="file or folder to write")
    page.add_argument("-o", "--output", **output, required=True, help="an .html file to write")

    output_format = predict.add_mutually_exclusive_group()
    output_format.add_argument("--json", action="store_true", help="one JSON object per image")
    output_format.add_argument("--csv", action="store_true", help="one line per image")
    predict.add_argument(
        "--top", metavar="N", type=int, default=5, help="classes to print for an image (default: 5)"
    )
    explain.add_argument(
        "--target",
        metavar="CLASS",
        action="append",
        default=[],
        help="also draw the evidence for this class; may be repeated",
    )
    explain.add_argument("--html", action="store_true", help="the attention explorer as well")
    explain.add_argument(
        "--language",
        choices=LANGUAGES,
        default="en",
        help="language of the pictures and the explorer",
    )
    page.add_argument("--language", choices=LANGUAGES, default="en", help="language of the page")
    export.add_argument(
        "--format",
        metavar="NAME",
        required=True,
        help="onnx, saved_model, litert, timm (weights for PyTorch) or keras (half precision)",
    )
    report.add_argument(
        "--language", choices=LANGUAGES, help="language of the report (default: the run's)"
    )
    cache.add_argument("--clear", action="store_true", help="remove all decoded images")
    cache.set_defaults(backend=None)
    options = parser.parse_args(arguments)
    if options.command == "predict" and options.top < 1:
        raise CommandError(f"--top must be at least 1, but is {options.top}")
    return options


def _path(text):
    return pathlib.Path(os.path.expanduser(text))
