"""`page`: a model as one HTML page that runs it in the browser, on any picture."""

import pathlib

import numpy as np

from keras_vit.files import make_output
from keras_vit.messages import warn
from keras_vit.reporting.explorer import MAX_IMAGES
from keras_vit.reporting.report import write_page
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import load_model, load_suitable
from keras_vit_cli.run_directory import RunDirectory
from keras_vit_cli.settings import read_config, resolve

SEED = 0


def run(options):
    """Writes a model as an HTML page; returns the exit status."""
    if options.output.suffix != ".html":
        raise CommandError(f"--output must end in .html, but is {options.output}")
    model = load_model(options.model)
    dataset = _test_images(model, options)
    with explaining_failed_writes(options.output):
        if not options.output.parent.exists():
            make_output(options.output.parent)
        try:
            count = write(options.output, model, dataset, options.language)
        except ValueError as error:
            raise CommandError(f"{options.model} does not fit into a page: {error}") from error
        size = options.output.stat().st_size / 1e6
    source = f"{count} test images of {dataset.name}" if dataset else "no images"
    print(f"{options.output}, {size:.1f} MB, with {source}")
    return 0


def write(path, model, dataset, language):
    """Writes a page that begins with test images of a `Dataset`, if there is one.

    Returns:
        Int, the number of images in the page.

    Raises:
        ValueError: if a page could not run the model.
    """
    images, labels = _examples(dataset) if dataset else ((), ())
    return write_page(path, model, images, labels, language)


def _test_images(model, options):
    """The `Dataset` whose test images the page begins with; None if there is none."""
    if options.dataset is not None:
        return load_suitable(model, options.model, options.dataset, options.data_dir)
    model_path = pathlib.Path(options.model)
    config = RunDirectory(model_path if model_path.is_dir() else model_path.parent).config
    if not config.exists():
        return None
    try:
        settings = resolve(read_config(config))
        data_dir = options.data_dir or settings.data_dir
        return load_suitable(model, options.model, settings.dataset, data_dir).without(model.seen)
    except CommandError as error:
        reason = str(error).rstrip(".")
        warn(f"The page begins without images: {reason}. Name others with --dataset.")
        return None


def _examples(dataset):
    """Random test images and the names of their classes, each class as often as the others."""
    order = np.random.default_rng(SEED).permutation(len(dataset.test_labels))
    labels, turn = np.asarray(dataset.test_labels)[order], np.zeros(len(order), int)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        turn[mine] = np.arange(len(mine))
    chosen = order[np.argsort(turn, kind="stable")[:MAX_IMAGES]]
    names = [dataset.class_names[label] for label in dataset.test_labels[chosen]]
    return np.asarray(dataset.test_images[chosen]), names
