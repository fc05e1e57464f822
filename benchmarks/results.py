"""The published runs: kept in `results/`, shown in the README's table and in one picture.

`python -m benchmarks.results` rebuilds both from `results/<recipe>/seed-<n>/`;
`python -m benchmarks.results --add RUN` first takes over the numbers of a finished run folder.
"""

import argparse
import json
import pathlib
import shutil
import statistics

import numpy as np

from keras_vit.cli import Run
from keras_vit.files import write_json
from keras_vit.recipes import RECIPES

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "results"
START, END = "<!-- python -m benchmarks.results -->", "<!-- end of results -->"
# Where a run lay on somebody's disk is nobody's business.
PLACES = ("data_dir", "figures_dir", "output")
# Settings that the table's command need not repeat.
IMPLIED = (
    *(*PLACES, "backend", "dataset", "language"),
    *("recipe", "save_every", "seed", "tensorboard"),
)
COLUMNS = (
    *("recipe", "parameters", "epochs", "test accuracy", "corrupted", "calibration error"),
    *("minutes", "on", "command"),
)
# Test accuracies on CIFAR-10, trained on its 50,000 images alone.
CIFAR10 = "[vision-transformers-cifar10](https://github.com/kentaroy47/vision-transformers-cifar10)"
COMPACT = "[Compact Transformers](https://github.com/SHI-Labs/Compact-Transformers)"
PUBLISHED = [
    (f"ViT with patches of 4, {CIFAR10}", "", 200, "80"),
    ("the same", "", "1,000", "89"),
    ("ViT, [ViT-CIFAR](https://github.com/omihub777/ViT-CIFAR)", "6.3 M", 200, "90.92"),
    (f"ViT-Lite-7/4, {COMPACT}", "3.7 M", 200, "91.38"),
    ("CVT-7/4, the same", "3.7 M", 200, "92.43"),
    ("CCT-7/3x1, the same, convolutions in front", "3.8 M", 300, "96.53"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=pathlib.Path, metavar="RUN", help="folder of a finished run")
    options = parser.parse_args()
    if options.add:
        try:
            print(f"Taken over into {add(options.add)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{options.add} cannot be published: {error}")
    runs = read()
    rows = table(runs)
    path = ROOT / "README.md"
    path.write_text(replaced(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print("\n".join(rows))
    if runs:
        draw(runs, RESULTS / "learning_curves.png")


def add(run_dir):
    """Copies settings, history and numbers of a run, without its places; returns the new folder."""
    run = run_of(run_dir)
    config, metrics = run["config"], run["metrics"]
    if metrics["dataset"] != "cifar10":
        raise ValueError(f"the table is about cifar10, not {metrics['dataset']}")
    if "corruptions" in run and run["corruptions"]["clean"] != metrics["accuracy"]:
        raise ValueError("its corruptions.json is about another model: measure it again")
    folder = RESULTS / config["recipe"] / f"seed-{config['seed']}"
    others = [run_of(path) for path in folder.parent.glob("seed-*") if path != folder]
    # Raises what a later one would, before anything is written.
    table({config["recipe"]: [*others, run]})
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in config.items() if name not in PLACES}
    # An `.npz` file is named by where it lay.
    write_json(folder / "config.json", {**config, "dataset": metrics["dataset"]})
    for name in ("metrics.json", "history.csv", "corruptions.json"):
        (folder / name).unlink(missing_ok=True)  # Of another run with this seed.
        if (run_dir / name).exists():
            shutil.copy(run_dir / name, folder)
    return folder


def run_of(folder):
    """What the files of a run's folder hold: dictionaries by name, and the columns of `history`."""
    run = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "metrics", "corruptions")
        if name != "corruptions" or (folder / "corruptions.json").exists()
    }
    columns = np.genfromtxt(folder / "history.csv", delimiter=",", names=True, ndmin=1)
    return {**run, "history": columns}


def read():
    """For each recipe, in their order, a list of dictionaries, one for each seed."""
    runs = {}
    for recipe in RECIPES:
        for folder in sorted((RESULTS / recipe).glob("seed-*")):
            runs.setdefault(recipe, []).append(run_of(folder))
    return runs


def table(runs):
    """Lines of Markdown: what each recipe reached, and what others published."""
    rows = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for recipe, seeds in runs.items():
        metrics = [run["metrics"] for run in seeds]
        commands = {command(run["config"]) for run in seeds}
        if len(commands) > 1:
            raise ValueError(f"seeds of one recipe differ in settings: {'; '.join(commands)}")
        corrupted = [run["corruptions"]["mean"] for run in seeds if "corruptions" in run]
        minutes = statistics.mean(x["training_seconds"] for x in metrics) / 60
        cells = (
            f"**{recipe}**",
            f"{metrics[0]['parameters'] / 1e6:.1f} M",
            str(metrics[0]["epochs"]),
            spread([x["accuracy"] for x in metrics]),
            spread(corrupted) if corrupted else "",
            spread([x["calibration_error"] for x in metrics]),
            f"{minutes:.0f}",
            f"{metrics[0]['device']}, {metrics[0]['backend']}",
            f"`{commands.pop()}`",
        )
        rows.append(f"| {' | '.join(cells)} |")
    for recipe in RECIPES:
        epochs = RECIPES[recipe]().epochs
        in_full = any(run["config"]["epochs"] == epochs for run in runs.get(recipe, ()))
        if not in_full and recipe != "digits":
            line = f"`python train.py --recipe {recipe}`"
            rows.append(f"| **{recipe}** | | {epochs} | not run yet | | | | | {line} |")
    for name, parameters, epochs, accuracy in PUBLISHED:
        rows.append(f"| {name} | {parameters} | {epochs} | {accuracy} % | | | | | |")
    return rows


def spread(values):
    """Mean and standard deviation over the seeds in percent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    if len(values) == 1:
        return f"{mean} %, one seed"
    return f"{mean} ± {100 * statistics.stdev(values):.2f} %, {len(values)} seeds"


def command(config):
    """The command line that repeats a run, but for its seed and its places."""
    recipe = RECIPES[config["recipe"]]()
    words = ["python train.py", f"--recipe {config['recipe']}"]
    for name, value in config.items():
        default = getattr(recipe, name, getattr(Run, name, None))
        value = tuple(value) if isinstance(value, list) else value
        if name in IMPLIED or value == default:
            continue
        words += option_words(name, value)
    return " ".join(words)


def option_words(name, value):
    """The words of a command line that give a setting a value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]


def replaced(text, rows):
    """The README with new lines between its two marks."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return "\n".join([before + START, "", *rows, "", END + after])


def draw(runs, path):
    """Draws loss and accuracy on training images over the epochs, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, (recipe, seeds) in enumerate(runs.items()):
        for number, run in enumerate(seeds):
            history = run["history"]
            label = recipe if number == 0 else None
            style = {"color": f"C{index}", "label": label, "marker": "."}
            left.plot(history["epoch"], history["loss"], **style)
            right.plot(history["epoch"], 100 * history["accuracy"], **style)
    left.set(xlabel="epoch", ylabel="training loss, nats")
    right.set(xlabel="epoch", ylabel="training accuracy, %")
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
