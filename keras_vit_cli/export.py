"""`export`: a model for another runtime or library, compared there with Keras."""

import contextlib
import typing
from collections.abc import Callable

import numpy as np

from keras_vit import export
from keras_vit.files import atomic_write, make_output
from keras_vit.prediction import predict
from keras_vit.presets import load_preset, write_preset
from keras_vit.timm import read_timm, write_timm
from keras_vit.transfer import adapted
from keras_vit_cli import backend
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import load_for_test, load_model

LARGEST_DIFFERENCE = 1e-3  # Between two probabilities, of Keras and of an exported model.


class Weights(typing.NamedTuple):
    """A file of weights, which a model is built from again, and its functions."""

    suffix: str
    packages: tuple[str, ...]
    write: Callable
    read: Callable
    largest_difference: float = LARGEST_DIFFERENCE


WEIGHTS = {
    # Weights in half precision differ by one part in 2,048.
    "keras": Weights(".keras", (), write_preset, load_preset, 0.01),
    "timm": Weights(".safetensors", ("safetensors",), write_timm, read_timm),
}
FORMATS = {**export.FORMATS, **WEIGHTS}


def run(options):
    """Writes a model for another runtime or library; returns the exit status."""
    if options.format not in FORMATS:
        raise CommandError(f"--format must be one of {', '.join(FORMATS)}, not {options.format}")
    output_format = FORMATS[options.format]
    if not options.output.name.endswith(output_format.suffix):
        raise CommandError(
            f"--output of --format {options.format} must end in {output_format.suffix}"
        )
    for package in output_format.packages:
        backend.require(package, f"--format {options.format}")
    # Other runtimes compute in float32, also what was trained in bfloat16.
    source_model = load_model(options.model)
    model = adapted(source_model, dtype="float32")
    images = np.random.default_rng(0).integers(0, 256, (256, *model.input_shape[1:]))
    source = "256 images of noise"
    if options.dataset:
        dataset, _ = load_for_test(model, options.model, options.dataset, options.data_dir)
        images = dataset.test_images[:256]
        source = f"{len(images)} test images of {options.dataset}"
    largest = LARGEST_DIFFERENCE
    with backend.quiet():
        with explaining_failed_writes(options.output):
            if not options.output.parent.exists():
                make_output(options.output.parent)
            if options.format in WEIGHTS:
                try:
                    output_format.write(source_model, options.output)
                except ValueError as error:  # Such as a quantized model.
                    raise CommandError(
                        f"{options.model} cannot be written as {options.format}: {error}"
                    ) from error
                largest = output_format.largest_difference
            else:
                is_file = bool(output_format.suffix)
                writing = atomic_write if is_file else contextlib.nullcontext
                with writing(options.output) as part:
                    export.write(export.served(model), part, options.format)
                    export.add_metadata(part, options.format, export.metadata(model))
        if options.format in WEIGHTS:
            again = output_format.read(options.output)
            difference = np.abs(predict(again, images) - predict(model, images)).max()
        else:
            runtime = export.runner(options.output, options.format)
            difference = export.compare(model, runtime, images)
    print(
        f"{options.output}, {options.format}: largest difference of a probability on {source}: "
        f"{difference:.1e}"
    )
    if not difference <= largest:
        raise CommandError(f"{options.output} differs from Keras by more than {largest}", 1)
    return 0
