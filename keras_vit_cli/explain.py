"""`explain`: where a model looks, as Attention Rollout, and the evidence for a class."""

import pathlib

import numpy as np
from PIL import Image

from keras_vit.files import is_output, make_output
from keras_vit.prediction import predict
from keras_vit.reporting import figures, fonts, representations
from keras_vit.reporting.explorer import MAX_IMAGES
from keras_vit.reporting.report import write_explorer
from keras_vit.reporting.texts import load_texts
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import class_names, image_batches, load_model


def run(options):
    """Draws the attention rollout of images; returns 1 if some could not be read."""
    model = load_model(options.model)
    names, failed, shown, taken = class_names(model), False, [], set()
    targets = [_index(names, target, options.model) for target in options.target]
    drawn_names = fonts.legible(names, load_texts(options.language)["class"])
    with explaining_failed_writes(options.output):
        if options.output.is_dir() and not is_output(options.output):
            kinds = Image.registered_extensions()
            found = (x for x in sorted(options.output.iterdir()) if x.suffix.casefold() in kinds)
            _refuse_beside(found, options.output)
        make_output(options.output)
        for paths, images, some_failed in image_batches(options.images, model):
            place = options.output.resolve()
            beside = (x for x in paths if pathlib.Path(x).resolve().parent == place)
            _refuse_beside(beside, options.output)
            failed |= some_failed
            probabilities = predict(model, images) if paths else ()
            for path, image, row in zip(paths, images, probabilities):
                title = f"{names[row.argmax()]} {row.max():.0%}"
                picture = _free_name(options.output, path, "attention", taken)
                drawn = f"{drawn_names[row.argmax()]} {row.max():.0%}"
                figures.draw_attention_rollout(
                    model, image[None], [drawn], picture, language=options.language
                )
                print(f"{path}: {title}, {picture}")
                if targets:
                    picture = _free_name(options.output, path, "classes", taken)
                    titles = [f"{names[target]} {row[target]:.0%}" for target in targets]
                    drawn = [f"{drawn_names[target]} {row[target]:.0%}" for target in targets]
                    repeated = np.repeat(image[None], len(targets), axis=0)
                    representations.draw_class_maps(
                        model, repeated, targets, drawn, picture, language=options.language
                    )
                    print(f"{path}: {', '.join(titles)}, {picture}")
                if len(shown) < MAX_IMAGES:
                    shown.append((image, f"{pathlib.Path(path).name}: {title}"))
        if options.html and shown:
            _write_explorer(options, model, shown)
    return int(failed)


def _refuse_beside(images, folder):
    """Raises a `CommandError` if images of a data set lie in the folder of the pictures."""
    for image in images:
        raise CommandError(
            f"--output {folder} holds {pathlib.Path(image).name}, beside which pictures would be "
            f"taken for images to train on: choose another folder, such as {folder / 'attention'}"
        )


def _write_explorer(options, model, shown):
    """Writes the attention explorer for pairs of image and title."""
    images, titles = zip(*shown)
    path = options.output / "explorer.html"
    try:
        count = write_explorer(
            path, model, options.model.name, np.stack(images), titles, options.language
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(f"Attention explorer of {count} image{'s' if count > 1 else ''}: {path}")


def _index(names, target, model):
    """The number of a class of a model."""
    if target not in names:
        raise CommandError(
            f"--target must be a class of {model}, one of {', '.join(names)}, not {target!r}"
        )
    return names.index(target)


def _free_name(folder, path, kind, taken):
    """A path for the picture of an image, which no other image of this call has."""
    stem = f"{pathlib.Path(path).stem}-{kind}"
    names = (f"{stem}{end}.png" for end in ("", *(f"-{n}" for n in range(2, len(taken) + 2))))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return folder / name
