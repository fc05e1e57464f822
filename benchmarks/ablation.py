"""What each part of the recipe `strong` is worth, on training images that were held out.

`python -m benchmarks.ablation remove` trains `strong`, and again without each of its parts;
`add` trains with none of them, with each one alone and with all. Further options go to every run of
`train.py`, such as smaller sizes. Runs that are finished with the same options are not repeated.
The table goes to `benchmarks/results/ablation-<mode>.json`; the test set has no part in it.
"""

import argparse
import pathlib
import sys

from benchmarks.results import ROOT, option_words
from benchmarks.runs import in_processes
from keras_vit.files import write_json
from keras_vit.training.journal import read_history
from keras_vit_cli.recipes import RECIPES

# What belongs together, by the names of the recipe's fields.
PARTS = {
    "Muon and its rate": ("optimizer", "learning_rate"),
    "pooling over patches": ("pooling",),
    "cosine": ("schedule", "warmup"),
    "weight decay": ("weight_decay", "decay_kernels_only"),
    "wider crop": ("crop_scale", "crop_ratio"),
    "no dropout": ("dropout",),
    "small images first": ("image_scales", "image_scale_milestones"),
    "TrivialAugment": ("trivial_augment",),
    "label smoothing": ("label_smoothing",),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("remove", "add"))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core for each")
    options, train = parser.parse_known_args()
    train = ["--validation", "5000", *train]
    runs = variants(options.mode)
    folders = [options.output / options.mode / name.replace(" ", "-") for name in runs]
    commands = [
        [sys.executable, ROOT / "train.py", *train, *words]
        + ["--output", folder, "--figures-dir", folder / "figures"]
        for words, folder in zip(runs.values(), folders, strict=True)
    ]
    in_processes(commands, folders, options.jobs)
    accuracies = [accuracy(folder) for folder in folders]
    found = dict(zip(runs, accuracies, strict=True))
    print("\n".join(table(found)))
    settings = {"mode": options.mode, "train": train, "validation_accuracy": found}
    write_json(ROOT / "benchmarks" / "results" / f"ablation-{options.mode}.json", settings)


def variants(mode):
    """Options of `train.py` by the names of the runs, the one to compare with in front."""
    everything = [field for fields in PARTS.values() for field in fields]
    if mode == "remove":
        left_out = {"strong": [], **{f"without {name}": x for name, x in PARTS.items()}}
    else:
        left_out = {"none of them": everything, "all of them": []}
        for name, fields in PARTS.items():
            left_out[name] = [field for field in everything if field not in fields]
    return {name: ["--recipe", "strong", *flags(fields)] for name, fields in left_out.items()}


def flags(fields):
    """Options of `train.py` that give fields the values that they have in the baseline."""
    recipe = RECIPES["baseline"]
    return [word for field in fields for word in option_words(field, getattr(recipe, field))]


def accuracy(folder):
    """On the images held out, after the last epoch."""
    return read_history(folder)["val_accuracy"][-1]


def table(found):
    """Lines of Markdown, the largest gain or loss in front."""
    (first, reference), *others = found.items()
    rows = ["| | validation accuracy | difference |", "| --- | --- | --- |"]
    rows.append(f"| {first} | {reference:.2%} | |")
    for name, value in sorted(others, key=lambda row: -abs(row[1] - reference)):
        rows.append(f"| {name} | {value:.2%} | {100 * (value - reference):+.2f} |")
    return rows


if __name__ == "__main__":
    main()
