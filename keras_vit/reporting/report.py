"""Self-contained HTML pages: the report of a run, the attention explorer, a model that runs."""

import inspect
import itertools
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
from keras_vit.reporting import fonts, page
from keras_vit.reporting.explorer import COLOURS, MAX_IMAGES, data_uri, pack, png_uri
from keras_vit.reporting.figures import MAX_LABELS
from keras_vit.reporting.representations import embedded_pictures
from keras_vit.reporting.texts import TEMPLATES, describe_prediction, load_texts, localize
from keras_vit.training import step_schedule

SEED = 0
MAX_NAMES = 12  # Classes that the title of a page lists.
# For each section, its picture, and the classes and functions whose source it shows. That of the
# augmentation layers is added.
SECTIONS = {
    "augmentation": (
        "augmentation.png",
        ("model.default_augmentation", "training.fitting.augmentation"),
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
            *("prediction.predict", "reporting.metrics.classification_metrics"),
            *("reporting.metrics.calibration_error", "reporting.figures.draw_predictions"),
        ),
    ),
    "rollout": (
        "attention_rollout.png",
        (
            *("attention.attention_scores", "attention.attention_rollout"),
            *("attention.attention_gradients", "attention.attention_relevance"),
            "reporting.explorer.pack",
        ),
    ),
    "learned": (
        None,
        (
            *("embeddings.patch_filters", "embeddings.position_similarity"),
            "attention.attention_distance",
        ),
    ),
}
# Pictures after the first one of a section, each with a caption of its own.
MORE = {
    "rollout": ("class_maps",),
    "learned": ("patch_filters", "position_similarity", "attention_distance"),
}


def write_report(
    path, model, dataset, config, metrics, probabilities, pictures, language="en", page=None
):
    """Writes the report of a run as one HTML file.

    Args:
        path: `Path` of the file.
        model: the trained `VisionTransformer`.
        dataset: the `Dataset` that it was trained and tested on.
        config: dictionary, the settings of the run, from `config.json`.
        metrics: dictionary, from `metrics.json`.
        probabilities: array `(N, num_classes)`, predicted for the test images.
        pictures: `Path` of the folder with the pictures of the run; missing ones are left out.
        language: `"en"` or `"pl"`.
        page: string, the name of the file beside it that runs the model; None if there is none.
    """
    facts = _facts(config, metrics, model, dataset, language)
    texts = _filled(load_texts(language) | {"explained": "", "page": {}}, facts)
    sections = [
        _section(key, picture and pictures / picture, names, texts, facts)
        for key, (picture, names) in SECTIONS.items()
    ]
    _describe_augmentation(sections[0], model.augmentation, texts["sections"]["augmentation"])
    results = next(section for section in sections if section["key"] == "results")
    results["more"] = [
        (_data_uri(pictures / "confusion_matrix.png"), texts["sections"]["confusion"])
    ]
    for section in sections:
        section["more"] += [
            (_data_uri(pictures / f"{name}.png"), texts["sections"][name])
            for name in MORE.get(section["key"], ())
        ]
    images, titles = _examples(dataset, probabilities, language)
    try:
        attention = pack(model, images, titles)
    except ValueError:  # Too many tokens for a page.
        attention = None
    names = list(metrics["per_class"])
    if len(names) > MAX_LABELS or fonts.legible(names, "class") != names:  # As in the pictures.
        names = [f"{number}: {name}" for number, name in enumerate(names)]
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
        page=page,
        headline=[
            (texts["headline"][name], localize(value, language)) for name, value in headline.items()
        ],
        sections=sections,
        per_class={
            name: {
                **{
                    metric: localize(f"{row[metric]:.3f}", language)
                    for metric in ("precision", "recall", "f1_score")
                },
                "images": localize(f"{row['images']:,}", language),
            }
            for name, row in zip(names, metrics["per_class"].values(), strict=True)
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
        name: string, the name of the model in the title.
        images: uint8 array `(B, H, W, C)` of raw pixels.
        titles: list of strings, one for each image.
        language: `"en"` or `"pl"`.

    Returns:
        Int, the number of images in the page, from the first one on.

    Raises:
        ValueError: if the mean of the heads' attention scores exceeds 3 MiB for a single image.
    """
    texts = load_texts(language)
    attention = pack(model, images, titles)
    title = _filled(texts["explained"], {"model": name})
    _write(path, "explain.html", language, texts, title=title, attention=attention)
    return len(attention["images"])


def write_page(path, model, images=(), labels=(), language="en"):
    """Writes a model as one HTML file that runs it on any picture, in the browser.

    Whoever opens the file drops, pastes, chooses or photographs a picture, and sees the likeliest
    classes and the attention of each block, head and patch. Nothing is loaded from anywhere or sent
    to anyone. The page resizes pictures as `read_image` does, and computes in 32 bits from weights
    that are stored in 16.

    Args:
        path: `Path` of the file.
        model: a `VisionTransformer` for grey or RGB images.
        images: uint8 array `(B, H, W, C)` of raw pixels, pictures to begin with; the first 12 are
            used.
        labels: list of strings, the class of each image.
        language: `"en"` or `"pl"`.

    Returns:
        Int, the number of images in the page.

    Raises:
        ValueError: if the page could not run the model as Keras does: if the model is not a
            `VisionTransformer` for grey or RGB images; if a layer of its augmentation also acts in
            inference; if it is quantized; if a weight is not finite; or if it has more than 20
            million parameters or 33 million attention scores per image.
    """
    packed, texts = page.pack(model), load_texts(language)
    names = list(model.class_names or map(str, range(model.output_shape[-1])))
    facts = {"first": ", ".join(names[:-1]), "last": names[-1], "count": len(names)}
    texts["page"] = _filled(texts["page"], {**facts, **packed["sizes"]})
    title = texts["page"]["which" if 1 < len(names) <= MAX_NAMES else "which_of_many"]
    pictures = [
        {"source": data_uri(image), "label": label}
        for image, label in itertools.islice(zip(images, labels), MAX_IMAGES)
    ]
    learned = embedded_pictures(model)
    learned = {
        "filters": [(x, localize(f"{100 * y:.1f}", language)) for x, y in learned["filters"]],
        "positions": learned["positions"],
        "low": localize(f"{learned['low']:.1f}", language),
    }
    context = {"model": packed, "classes": names, "pictures": pictures, "learned": learned}
    title = title[0].upper() + title[1:]
    _write(path, "page.html", language, texts, title=title, **context)
    return len(pictures)


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


def _filled(texts, facts) -> typing.Any:
    """A text, or a dictionary or list of texts, with its `{{ names }}` replaced by the facts."""
    if isinstance(texts, dict):
        return {key: _filled(value, facts) for key, value in texts.items()}
    if isinstance(texts, list):
        return [_filled(value, facts) for value in texts]
    # The templates of the pages escape it.
    return jinja2.Template(texts, undefined=jinja2.StrictUndefined).render(facts)


def _describe_augmentation(section, layers, texts):
    """Adds the descriptions of augmentation layers, and the source of those of this package."""
    names = [type(layer).__name__ for layer in layers]
    described = [texts["layers"][name] for name in names if name in texts["layers"]]
    section["paragraphs"] = section["paragraphs"] + (described if names else [texts["without"]])
    kinds = zip(names, map(type, layers))
    ours = [name for name, kind in kinds if getattr(keras_vit.layers, name, None) is kind]
    section["objects"] = [_source(f"layers.{name}") for name in ours] + section["objects"]


def _facts(config, metrics, model, dataset, language):
    """Values for the texts and tables, from the settings, metrics and model of a run."""
    height, width, channels = dataset.image_shape
    patches = model.get_layer("patches")
    _, milestone_epochs = step_schedule(
        config["learning_rate"], config["epochs"], config["milestones"]
    )
    normalization = model.get_layer("normalization")
    device, _, cores = metrics["device"].rpartition(", ")  # "cpu, AMD EPYC, 2 cores".
    return {
        "config": config,
        "metrics": metrics,
        "dataset": dataset.name,
        "language": language,
        **{"device": device, "cores": cores.removesuffix(" cores")},
        "train_count": localize(f"{len(dataset.train_labels):,}", language),
        "test_count": localize(f"{len(dataset.test_labels):,}", language),
        "accuracy": localize(f"{metrics['accuracy']:.2%}", language),
        "calibration_error": localize(f"{metrics['calibration_error']:.1%}", language),
        **{"height": height, "width": width, "channels": channels},
        "patch_size": patches.patch_size,
        **dict(zip(("cut_height", "cut_width"), patches.input.shape[1:3])),
        **dict(zip(("num_patches", "values_per_patch"), patches.output.shape[1:])),
        "milestone_epochs": [x for x in milestone_epochs if x < metrics["epochs"]],
        "classes": dataset.class_names,
        "augmentation": [type(layer).__name__ for layer in model.augmentation],
        "layers": [type(layer).__name__ for layer in model.layers],
        "mean": _as_vector(normalization.mean),
        "standard_deviation": np.sqrt(_as_vector(normalization.variance)),
        "optimizer": {"adamw": "AdamW", "muon": "Muon"}[config.get("optimizer", "adamw")],
        "pooling": model.pooling,
    }


def _as_vector(variable):
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
    """Names and values of the table of each section."""
    config, metrics, language = facts["config"], facts["metrics"], facts["language"]
    arrow = " → ".join

    def per_channel(values):
        return "; ".join(localize(f"{value:.2f}", language) for value in values)

    minutes, seconds = divmod(round(metrics["training_seconds"]), 60)
    return {
        "augmentation": {"layers": arrow(facts["augmentation"]) or texts["none"]},
        "place": {"first_layers": arrow(facts["layers"][: len(facts["augmentation"]) + 3])},
        "data": {
            "dataset": facts["dataset"],
            "train_images": facts["train_count"],
            "test_images": facts["test_count"],
            "classes": ", ".join(facts["classes"]),
            "image_shape": f"{facts['height']}×{facts['width']}×{facts['channels']}",
            "mean": per_channel(facts["mean"]),
            "standard_deviation": per_channel(facts["standard_deviation"]),
        },
        "patches": {
            "patch_size": f"{facts['patch_size']}×{facts['patch_size']}",
            "num_patches": facts["num_patches"],
            "values_per_patch": facts["values_per_patch"],
        },
        "model": {
            name: localize(config[name], language)
            for name in ("embed_dim", "depth", "num_heads", "mlp_dim", "dropout")
        },
        "training": {
            "optimizer": facts["optimizer"],
            "learning_rate": localize(f"{config['learning_rate']:g}", language),
            "schedule": texts[config["schedule"]],
            "weight_decay": localize(f"{config['weight_decay']:g}", language),
            **{
                name: localize(f"{100 * config[name]:g}%", language)
                for name in ("warmup", "label_smoothing", "stochastic_depth")
                if config.get(name)
            },
            **_image_scales(config, language),
            "batch_size": config["batch_size"],
            "training_time": f"{minutes} min {seconds} s",
            "versions": ", ".join(
                f"{package} {version}" for package, version in metrics["versions"].items()
            ),
        },
    }


def _image_scales(config, language):
    """The row about progressive resizing, if the run had any."""
    scales = config.get("image_scales")
    if not scales:
        return {}
    ends = [f" ({100 * milestone:.3g}%)" for milestone in config["image_scale_milestones"]]
    steps = (f"{100 * x:.3g}%{y}" for x, y in zip([*scales, 1], [*ends, ""]))
    return {"image_scales": localize(" → ".join(steps), language)}


def _source(name):
    """Name, file and highlighted source of a class or function of this package."""
    found = pkgutil.resolve_name(f"keras_vit.{name}")
    file = pathlib.Path(inspect.getfile(found))
    line = inspect.getsourcelines(found)[1]
    source = inspect.cleandoc("\n" + inspect.getsource(found))
    html = pygments.highlight(source, PythonLexer(), HtmlFormatter())
    place = f"{file.parent.name}/{file.name}, {line}"
    return {"name": name.rpartition(".")[-1], "place": place, "source": Markup(html)}


def _examples(dataset, probabilities, language):
    """Up to twelve random test images and their titles; half are misclassified if possible."""
    predicted, labels = probabilities.argmax(axis=1), dataset.test_labels
    random, class_names = np.random.default_rng(SEED), dataset.class_names
    count = min(MAX_IMAGES, len(labels))
    correct, wrong = (
        random.permutation(np.flatnonzero(group))[:count]
        for group in (predicted == labels, predicted != labels)
    )
    pairs = itertools.zip_longest(correct, wrong)  # Alternately, while both last.
    chosen = [index for pair in pairs for index in pair if index is not None][:count]
    titles = [
        describe_prediction(
            class_names[labels[index]], class_names[predicted[index]], language, ",\n"
        )
        for index in chosen
    ]
    return np.asarray(dataset.test_images[chosen]), titles


def _data_uri(path):
    """A picture file as a data URI; None if it is missing."""
    if not path.exists():
        return None
    return png_uri(path.read_bytes())
