"""Pages that open from disk and ask for nothing: the report of a run, and the explorer alone."""

import inspect
import itertools
import json
import pathlib
import pkgutil
import typing

import jinja2
import keras
import numpy as np
import pygments
from markupsafe import Markup
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

import keras_vit.layers
from keras_vit.files import atomic_write
from keras_vit.reporting.explorer import COLOURS, MOST_IMAGES, pack, png_uri
from keras_vit.training import step_schedule

TEMPLATES = pathlib.Path(__file__).parent / "templates"
SEED = 0
# For each section, the picture that shows its effect, and what does it: classes and functions.
SECTIONS = {
    "augmentation": (
        "augmentation.png",
        (
            "model.default_augmentation",
            "training.fitting.augmentation",
        ),  # And the layers themselves.
    ),
    "place": (None, ("model.VisionTransformer",)),
    "data": (None, ("data.sources.load_dataset", "data.batches.Batches", "layers.Normalization")),
    "patches": (None, ("layers.Patches",)),
    "shown": ("patches.png", ("reporting.figures.draw_patches",)),
    "model": (
        "model.png",
        (
            *("model.VisionTransformer", "model.transformer_block"),
            *("layers.ClassToken", "layers.PositionEmbedding", "layers.MultiHeadAttention"),
            "reporting.figures.draw_model",
        ),
    ),
    "training": (
        "history.png",
        (
            "training.fitting.fit",
            "training.fitting.compile_model",
            "training.schedules.learning_rate",
            "training.journal.Journal",
        ),
    ),
    "results": (
        "predictions.png",
        (
            *("reporting.metrics.predict", "reporting.metrics.classification_metrics"),
            *("reporting.metrics.calibration_error", "reporting.figures.draw_predictions"),
        ),
    ),
    "rollout": (
        "attention_rollout.png",
        ("attention.attention_scores", "attention.attention_rollout", "reporting.explorer.pack"),
    ),
}


def write_report(path, model, dataset, config, metrics, probabilities, pictures, language="en"):
    """Writes the report of a run as one HTML file.

    Args:
        path: `Path` of the file.
        model: the trained `VisionTransformer`.
        dataset: the `Dataset` that it was trained and tested on.
        config: dictionary, the settings of the run, as `config.json` holds them.
        metrics: dictionary, as `metrics.json` holds them.
        probabilities: array `(N, num_classes)`, the model's answer for each test image.
        pictures: `Path` of a folder with the pictures of the run; what is missing is left out.
        language: `"en"` or `"pl"`.
    """
    number = {"en": str, "pl": _polish}[language]
    facts = _facts(config, metrics, model, dataset, number)
    texts = _filled(_texts(language) | {"explained": ""}, facts)
    sections = [
        _section(key, picture and pictures / picture, names, texts, facts)
        for key, (picture, names) in SECTIONS.items()
    ]
    _describe_augmentation(sections[0], model.augmentation, texts["sections"]["augmentation"])
    results = next(section for section in sections if section["key"] == "results")
    results["more"] = [
        (_data_uri(pictures / "confusion_matrix.png"), texts["sections"]["confusion"])
    ]
    images, titles = _examples(dataset, probabilities)
    try:
        attention = pack(model, images, titles)
    except ValueError:  # Too many tokens for a page.
        attention = None
    headline = {
        "accuracy": f"{metrics['accuracy']:.2%}",
        "loss": f"{metrics['loss']:.3f}",
        "calibration_error": f"{metrics['calibration_error']:.1%}",
        "parameters": f"{metrics['parameters']:,}",
        "epochs": str(metrics["epochs"]),
        "minutes": f"{metrics['training_seconds'] / 60:.1f}",
    }
    light, dark = (HtmlFormatter(style=style) for style in ("default", "github-dark"))
    _write(
        path,
        "report.html",
        language,
        texts,
        title=texts["title"],
        lead=texts["lead"],
        headline=[(texts["headline"][name], number(value)) for name, value in headline.items()],
        sections=sections,
        per_class={
            name: {
                **{x: number(f"{row[x]:.3f}") for x in ("precision", "recall", "f1_score")},
                "images": number(f"{row['images']:,}"),
            }
            for name, row in metrics["per_class"].items()
        },
        attention=attention,
        highlighting=Markup(
            light.get_style_defs(".highlight")
            + "@media (prefers-color-scheme: dark) {"
            + dark.get_style_defs(".highlight")
            + "}.highlight, .highlight pre { background: none; margin: 0; }"
        ),
    )


def write_explorer(path, model, name, images, titles, language="en"):
    """Writes the attention explorer for a few images as one HTML file.

    Args:
        path: `Path` of the file.
        model: a `VisionTransformer`.
        name: string, what to call it.
        images: uint8 array `(B, H, W, C)`, as the model takes them.
        titles: list of strings, one for each image.
        language: `"en"` or `"pl"`.

    Returns:
        Int, how many of the images fit into the page.

    Raises:
        ValueError: if the attention on a single image takes over 3 MiB.
    """
    texts = _texts(language)
    attention = pack(model, images, titles)
    title = _filled(texts["explained"], {"model": name})
    _write(path, "explain.html", language, texts, title=title, attention=attention)
    return len(attention["images"])


def _write(path, template, language, texts, **context):
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(template)
    context |= {"language": language, "texts": texts, "colours": COLOURS}
    with atomic_write(path) as part:
        part.write_text(page.render(context), encoding="utf-8")


def _texts(language):
    return json.loads((TEMPLATES / f"{language}.json").read_text(encoding="utf-8"))


def _filled(texts, facts) -> typing.Any:
    """Texts, or dictionaries and lists of them, with the facts put in where they name them."""
    if isinstance(texts, dict):
        return {key: _filled(value, facts) for key, value in texts.items()}
    if isinstance(texts, list):
        return [_filled(value, facts) for value in texts]
    # Escaped later, by the page's templates.
    return jinja2.Template(texts, undefined=jinja2.StrictUndefined).render(facts)


def _polish(number):
    """A number as Polish writes it, with a comma for decimals and spaces between thousands."""
    return str(number).replace(",", "\u00a0").replace(".", ",")


def _describe_augmentation(section, layers, texts):
    """Adds what the layers of an augmentation do, and the source of those of this package."""
    names = [type(layer).__name__ for layer in layers]
    described = [texts["layers"][name] for name in names if name in texts["layers"]]
    section["paragraphs"] = section["paragraphs"] + (described if names else [texts["without"]])
    kinds = zip(names, map(type, layers))
    ours = [name for name, kind in kinds if getattr(keras_vit.layers, name, None) is kind]
    section["objects"] = [_source(f"layers.{name}") for name in ours] + section["objects"]


def _facts(config, metrics, model, dataset, number):
    """What the texts and tables tell, out of a run's settings, metrics and model.

    `number` is a function that writes a number as the report's language does.
    """
    height, width, channels = dataset.image_shape
    patches = model.get_layer("patches")
    falls = step_schedule(config["learning_rate"], metrics["epochs"], config["milestones"])[1]
    normalization = model.get_layer("normalization")
    return {
        "config": config,
        "metrics": metrics,
        "dataset": dataset.name,
        "number": number,
        "train_count": number(f"{len(dataset.train_labels):,}"),
        "test_count": number(f"{len(dataset.test_labels):,}"),
        "accuracy": number(f"{metrics['accuracy']:.2%}"),
        "calibration_error": number(f"{metrics['calibration_error']:.1%}"),
        **{"height": height, "width": width, "channels": channels},
        "patch": patches.patch_size,
        **dict(zip(("cut_height", "cut_width"), patches.input.shape[1:3])),
        **dict(zip(("patches", "numbers"), patches.output.shape[1:])),
        "falls": falls,
        "classes": dataset.class_names,
        "augmentation": [type(layer).__name__ for layer in model.augmentation],
        "layers": [type(layer).__name__ for layer in model.layers],
        "mean": _numbers(normalization.mean),
        "deviation": np.sqrt(_numbers(normalization.variance)),
        "optimizer": {"adamw": "AdamW", "muon": "Muon"}[config.get("optimizer", "adamw")],
        "pooling": model.pooling,
    }


def _numbers(variable):
    return keras.ops.convert_to_numpy(variable).ravel()


def _section(key, picture, names, texts, facts):
    text = texts["sections"][key]
    rows = _tables(texts, facts).get(key, {})
    return {
        "key": key,
        "title": text["title"],
        "paragraphs": text["paragraphs"],
        "facts": [(texts["facts"][name], value) for name, value in rows.items()],
        "picture": picture and _data_uri(picture),
        "caption": text.get("caption", ""),
        "objects": [_source(name) for name in names],
        "more": [],
    }


def _tables(texts, facts):
    """Names and values of each section's table."""
    config, metrics = facts["config"], facts["metrics"]
    arrow, number = " → ".join, facts["number"]

    def numbers(values):
        return "; ".join(number(f"{value:.2f}") for value in values)

    minutes, seconds = divmod(round(metrics["training_seconds"]), 60)
    return {
        "augmentation": {"layers": arrow(facts["augmentation"]) or texts["none"]},
        "place": {"first_layers": arrow(facts["layers"][: len(facts["augmentation"]) + 3])},
        "data": {
            "source": facts["dataset"],
            "train": facts["train_count"],
            "test": facts["test_count"],
            "classes": ", ".join(facts["classes"]),
            "shape": f"{facts['height']}×{facts['width']}×{facts['channels']}",
            "mean": numbers(facts["mean"]),
            "deviation": numbers(facts["deviation"]),
        },
        "patches": {name: facts[name] for name in ("patch", "patches", "numbers")},
        "model": {
            name: number(config[name])
            for name in ("embed_dim", "depth", "num_heads", "mlp_dim", "dropout")
        },
        "training": {
            "optimizer": facts["optimizer"],
            "learning_rate": number(f"{config['learning_rate']:g}"),
            "schedule": texts[config["schedule"]],
            "weight_decay": number(f"{config['weight_decay']:g}"),
            **{
                name: number(f"{config[name]:.0%}")
                for name in ("warmup", "label_smoothing", "stochastic_depth")
                if config.get(name)
            },
            "batch_size": config["batch_size"],
            "seconds": f"{minutes} min {seconds} s",
            "versions": ", ".join(f"{name} {x}" for name, x in metrics["versions"].items()),
        },
    }


def _source(name):
    """A class or function by its name within the package: its file, and its source as it is now."""
    found = pkgutil.resolve_name(f"keras_vit.{name}")
    file = pathlib.Path(inspect.getfile(found))
    line = inspect.getsourcelines(found)[1]
    source = inspect.cleandoc("\n" + inspect.getsource(found))
    html = pygments.highlight(source, PythonLexer(), HtmlFormatter())
    place = f"{file.parent.name}/{file.name}, {line}"
    return {"name": name.rpartition(".")[-1], "place": place, "source": Markup(html)}


def _examples(dataset, probabilities):
    """A dozen test images at random, half of them wrong if there are so many, and titles."""
    predicted, labels = probabilities.argmax(axis=1), dataset.test_labels
    random, names = np.random.default_rng(SEED), dataset.class_names
    count = min(MOST_IMAGES, len(labels))
    right, wrong = (
        random.permutation(np.flatnonzero(found))[:count]
        for found in (predicted == labels, predicted != labels)
    )
    pairs = itertools.zip_longest(right, wrong)  # As many of each, as far as they go.
    chosen = [i for pair in pairs for i in pair if i is not None][:count]
    titles = [
        f"✓ {names[i]}" if i == j else f"✗ {names[j]} ({names[i]})"
        for i, j in zip(labels[chosen], predicted[chosen])
    ]
    return np.asarray(dataset.test_images[chosen]), titles


def _data_uri(path):
    """A picture as an address inside the page; None where it is missing."""
    if not path.exists():
        return None
    return png_uri(path.read_bytes())
