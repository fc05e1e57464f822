"""The command `keras-vit`: training, and what a trained model is good for."""

import csv
import io
import json
import pathlib
import sys
import tempfile

from keras_vit import cli
from keras_vit.cli import BACKENDS, LANGUAGES, Failure, Parser
from keras_vit.files import Busy, is_folder, visible, write_checksums

BATCH_SIZE = 256
# How files of the formats of `export` end, and what packages write and run them.
FORMATS = {
    "onnx": (".onnx", ("onnx", "tf2onnx", "onnxruntime")),
    "saved_model": ("", ()),
    "litert": (".tflite", ("ai_edge_litert",)),
}
LARGEST_DIFFERENCE = 1e-3  # Between two probabilities, of Keras and of an exported model.
EXPORT = "write a model for another runtime, and compare it there"
REPORT = "write the report of a run again"
SHOWN = 5  # Classes of an image that `predict` names.


def main(arguments=None):
    """Runs the command and returns its exit status: 0, 1 if something was left out, 2 if wrong.

    Args:
        arguments: list of strings; by default the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"]:
        return cli.main(arguments[1:], prog="keras-vit train", figures_dir=None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # Names of files are any bytes.
    try:
        options = parse(arguments)
        cli.choose_backend(options.backend)
        return options.command(options)
    except (Busy, Failure) as failure:
        print("error:", " ".join(str(failure).split()), file=sys.stderr)
        return getattr(failure, "status", 2)
    except BrokenPipeError:  # Nobody reads any more, as after `| head`.
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def parse(arguments):
    """The options of a command line, the function that serves it among them."""
    parser = Parser(
        prog="keras-vit",
        description="Trains Vision Transformers on small images and puts them to use.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    commands.add_parser("train", help="train a model; `keras-vit train --help` has the options")

    about_model = Parser(add_help=False)
    about_model.add_argument("model", metavar="MODEL", type=pathlib.Path, help="a .keras file")
    about_model.add_argument("--backend", choices=BACKENDS, help="what Keras computes with")
    about_data = Parser(add_help=False)
    about_data.add_argument(
        "--dataset", metavar="NAME", required=True, help="as for train: a folder, file or name"
    )
    about_data.add_argument("--data-dir", metavar="NAME", help="folder of TensorFlow Datasets")
    about_images = Parser(add_help=False)
    about_images.add_argument(
        "images", metavar="IMAGE", nargs="+", help="files, folders, or - for a list on stdin"
    )

    def add(command, help, *parents):
        command_parser = commands.add_parser(
            command.__name__, help=help, description=help, parents=[about_model, *parents]
        )
        command_parser.set_defaults(command=command)
        return command_parser

    one = add(evaluate, "measure a model on images that it was not trained on", about_data)
    one.add_argument(
        "-o", "--output", metavar="DIR", type=pathlib.Path, help="folder for numbers and pictures"
    )
    one = add(predict, "name the likeliest classes of images", about_images)
    form = one.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per image and line")
    form.add_argument("--csv", action="store_true", help="one line per image and class")
    one = add(explain, "draw where a model looks, as Attention Rollout", about_images)
    one.add_argument(
        *("-o", "--output"), metavar="DIR", type=pathlib.Path, required=True, help="folder for them"
    )
    one.add_argument("--html", action="store_true", help="the attention explorer as well")
    one.add_argument("--language", choices=LANGUAGES, default="en", help="its language")

    one = commands.add_parser("export", help=EXPORT, description=EXPORT)
    # Any backend's model can be loaded by TensorFlow, which alone writes all formats.
    one.set_defaults(command=export, backend="tensorflow")
    one.add_argument("model", metavar="MODEL", type=pathlib.Path, help="a .keras file")
    one.add_argument("--format", choices=FORMATS, required=True, help="for which runtime")
    one.add_argument(
        *("-o", "--output"), metavar="PATH", type=pathlib.Path, required=True, help="where to"
    )
    one.add_argument("--dataset", metavar="NAME", help="test images to compare on, else noise")
    one.add_argument("--data-dir", metavar="NAME", help="folder of TensorFlow Datasets")

    one = commands.add_parser("report", help=REPORT, description=REPORT)
    one.set_defaults(command=report)
    one.add_argument("run", metavar="RUN", type=pathlib.Path, help="folder of a finished run")
    one.add_argument("--backend", choices=BACKENDS, help="what Keras computes with")
    one.add_argument("--data-dir", metavar="NAME", help="folder of TensorFlow Datasets")
    one.add_argument("--language", choices=LANGUAGES, help="its language (default: the run's)")
    return parser.parse_args(arguments)


def evaluate(options):
    """Prints the numbers of a saved model on images that it has not seen, and draws pictures."""
    model = load(options.model)
    dataset, left_out = unseen_by(model, options)
    if options.output and (options.output / "config.json").exists():
        raise Failure(f"{options.output} holds a run, whose numbers would be lost")
    probabilities, metrics = cli.evaluate(model, dataset)
    if options.output:
        with cli.saying_where_writing_fails(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
            facts = {"dataset": dataset.name, "model": options.model.name, "left_out": left_out}
            cli.write_json(options.output / "metrics.json", {**facts, **metrics})
            from keras_vit import figures

            figures.draw_all(model, dataset, probabilities, options.output)
            print(f"Numbers and pictures: {options.output}.")
    return 0


def predict(options):
    """Prints the likeliest classes of images; returns 1 if some could not be read."""
    model = load(options.model)
    from keras_vit import evaluation

    names, failed = class_names(model), False
    writer = csv.writer(sys.stdout)
    if options.csv:
        writer.writerow(("image", "rank", "class", "probability"))
    for paths, images in batches(options.images, model):
        failed |= None in paths
        paths = [path for path in paths if path is not None]
        for path, row in zip(paths, evaluation.predict(model, images) if paths else []):
            likeliest = [(names[i], float(row[i])) for i in row.argsort()[::-1][:SHOWN]]
            if options.csv:
                writer.writerows((path, i, *pair) for i, pair in enumerate(likeliest, start=1))
            elif options.json:
                pairs = [{"class": name, "probability": share} for name, share in likeliest]
                print(json.dumps({"image": path, "predictions": pairs}, ensure_ascii=False))
            else:
                print(f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in likeliest))
    return int(failed)


def explain(options):
    """Draws the attention rollout of images; returns 1 if some could not be read."""
    if options.html:
        cli.require("jinja2", "--html")
    model = load(options.model)
    from keras_vit import evaluation, figures
    from keras_vit.explorer import MOST_IMAGES

    names, failed, shown, taken = class_names(model), False, [], set()
    with cli.saying_where_writing_fails(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        for paths, images in batches(options.images, model):
            failed |= None in paths
            paths = [path for path in paths if path is not None]
            probabilities = evaluation.predict(model, images) if paths else ()
            for path, image, row in zip(paths, images, probabilities):
                title = f"{names[row.argmax()]} {row.max():.0%}"
                place = free_name(options.output, path, taken)
                figures.draw_attention_rollout(model, image[None], [title], place)
                print(f"{path}: {title}, {place}")
                if len(shown) < MOST_IMAGES:
                    shown.append((image, f"{pathlib.Path(path).name}: {title}"))
        if options.html and shown:
            explore(options, model, shown)
    return int(failed)


def explore(options, model, shown):
    """Writes the attention explorer for pairs of image and title."""
    import numpy as np

    from keras_vit.report import write_explorer

    images, titles = zip(*shown)
    path = options.output / "explorer.html"
    try:
        count = write_explorer(
            path, model, options.model.name, np.stack(images), titles, options.language
        )
    except ValueError as error:
        raise Failure(str(error)) from error
    print(f"The first {count} of them to look into: {path}")


def export(options):
    """Writes a model for another runtime; returns 1 if its answers differ there."""
    suffix, packages = FORMATS[options.format]
    if not options.output.name.endswith(suffix):
        raise Failure(f"--output of --format {options.format} must end in {suffix}")
    for package in packages:
        cli.require(package, f"--format {options.format}")
    model = load(options.model)
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (256, *model.input_shape[1:]))
    source = "256 images of noise"
    if options.dataset:
        dataset = dataset_for(model, options.model, options.dataset, options.data_dir)
        images = dataset.test_images[:256]
        source = f"{len(images)} test images of {options.dataset}"
    with cli.quiet():
        from keras_vit.export import compare, runner, served, write

        with cli.saying_where_writing_fails(options.output):
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write(served(model), options.output, options.format)
        found = compare(model, runner(options.output, options.format), images)
    print(f"{options.output}, {options.format}:")
    for name in ("keras", "exported"):
        times = found[name]
        print(
            f"  {name:8} {times['milliseconds']:8.2f} ms for one image, "
            f"{times['images_per_second']:8,.0f} images/s in batches of 256"
        )
    print(f"  largest difference of a probability on {source}: {found['difference']:.1e}")
    if not found["difference"] <= LARGEST_DIFFERENCE:
        raise Failure(f"{options.output} differs from Keras by more than {LARGEST_DIFFERENCE}", 1)
    return 0


def report(options):
    """Writes the report of a finished run again, from its files and its model."""
    cli.require("jinja2", "a report")
    config = options.run / "config.json"
    settings = cli.parse(["--config", str(config)])
    settings = {**settings, "data_dir": options.data_dir or settings.get("data_dir")}
    run, recipe = cli.settle(settings)
    if not (options.run / "metrics.json").exists():
        raise Failure(f"{options.run} holds no finished run: metrics.json is missing")
    source = options.run / "model.keras"
    model = load(source)
    from keras_vit import evaluation
    from keras_vit.journal import read_history
    from keras_vit.report import write_report

    path = options.run / "report.html"
    with cli.saying_where_writing_fails(options.run), tempfile.TemporaryDirectory() as folder:
        try:
            dataset = dataset_for(model, source, run.dataset, run.data_dir)
            dataset, _ = cli.training_part(dataset.without(model.seen), run)
            history = read_history(options.run)
            probabilities = evaluation.predict(model, dataset.test_images)
            pictures = pathlib.Path(folder)
            cli.draw(model, dataset, recipe, probabilities, history, pictures)
            language = options.language or run.language
            write_report(path, options.run, model, dataset, probabilities, pictures, language)
        except (KeyError, ValueError) as error:
            raise Failure(f"{options.run} holds no run to report on: {error}") from error
        write_checksums(options.run, cli.CHECKED)
    print(f"Report: {path}")
    return 0


def load(path):
    """A model of this package out of a file."""
    with cli.quiet():
        from keras_vit.loading import ModelError, load_model
        from keras_vit.model import VisionTransformer
    try:
        model = load_model(path)
    except ModelError as error:
        raise Failure(str(error)) from error
    if not isinstance(model, VisionTransformer):
        raise Failure(f"{path} holds a {type(model).__name__}, not a VisionTransformer")
    if model.input_shape[-1] not in (1, 3):
        raise Failure(f"{path} takes images of {model.input_shape[-1]} channels, not grey or RGB")
    return model


def free_name(folder, path, taken):
    """A path for the picture of an image, which no other image of this call has."""
    stem = f"{pathlib.Path(path).stem}-attention"
    names = (f"{stem}{end}.png" for end in ("", *(f"-{n}" for n in range(2, len(taken) + 2))))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return folder / name


def unseen_by(model, options):
    """What a model is measured on, and how many images of a folder are left out for which reason.

    Of a folder, that is every image that the model was neither trained nor validated on.
    """
    from keras_vit import data

    if not data.is_folder(options.dataset):
        return dataset_for(model, options.model, options.dataset, options.data_dir), {}
    try:
        dataset, left_out = data.load_unseen(
            options.dataset, model.input_shape[1:3], model.class_names, frozenset(model.seen)
        )
    except data.DatasetError as error:
        raise Failure(str(error)) from error
    check_suits(model, options.model, dataset)
    count = len(dataset.test_labels)
    total = count + sum(left_out.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    print(
        f"Measured on {count:,} of {total:,} images in {options.dataset}, without {reasons}"
        if left_out
        else f"Measured on all {count:,} images in {options.dataset}"
    )
    return dataset, left_out


def dataset_for(model, path, name, data_dir):
    """The data set of a name, with images and classes such as the model of a path takes."""
    from keras_vit import data

    if not name:
        raise Failure("--dataset must not be empty")
    # The model knows what it takes; a folder is resized to that.
    size = model.input_shape[1:3] if data.is_folder(name) else None
    try:
        dataset = data.load_dataset(name, data_dir, size)
    except data.DatasetError as error:
        raise Failure(str(error)) from error
    check_suits(model, path, dataset)
    return dataset


def check_suits(model, path, dataset):
    """Refuses a data set whose images or classes are not what the model of a path takes."""
    expected, found = tuple(model.input_shape[1:]), tuple(dataset.image_shape)
    if expected != found:
        raise Failure(f"{path} takes images of {expected}, {dataset.name} has {found}")
    count, names = model.output_shape[-1], tuple(dataset.class_names)
    if len(names) != count or model.class_names not in (None, names):
        raise Failure(
            f"{path} tells apart {', '.join(class_names(model))}, but {dataset.name} "
            f"{', '.join(names)}"
        )


def class_names(model):
    """The names that a model carries; numbers where it has none."""
    return model.class_names or tuple(str(label) for label in range(model.output_shape[-1]))


def batches(words, model):
    """Images for a model, as many at once as it computes.

    Args:
        words: list of strings, files, folders, or `-` for a list on stdin.
        model: a `keras.Model`.

    Yields:
        Names of up to 256 files, None for one that could not be read, which stderr tells; and the
        others' images `(B, H, W, C)`.
    """
    import itertools

    import numpy as np

    from keras_vit.image_files import ImageError, read_image

    height, width, channels = model.input_shape[1:]
    files = listed(words)
    while paths := list(itertools.islice(files, BATCH_SIZE)):
        images, names = [], []
        for path in paths:
            try:
                images.append(read_image(path, (height, width), channels))
                names.append(path)
            except ImageError as error:
                print(f"error: {path} cannot be read: {error}", file=sys.stderr)
                names.append(None)
        yield names, np.array(images)


def listed(words):
    """Names of files, one by one: those named, those in folders, those listed on stdin."""
    for word in words:
        if word == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        elif is_folder(word):
            yield from map(str, visible(pathlib.Path(word).expanduser()))
        else:
            yield word
