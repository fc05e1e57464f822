"""The published runs: kept in `results/`, shown in the README's table and in one picture.

`python -m benchmarks.results` rebuilds both from `results/<recipe>/seed-<n>/`, and
`results/<recipe>-<epochs in all>/seed-<n>/` for runs that start from pretrained weights;
`python -m benchmarks.results --add RUN` first copies the metrics of a finished run directory.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import statistics

import numpy as np

from keras_vit.files import write_json
from keras_vit_cli.recipes import RECIPE_OPTIONS, RECIPES
from keras_vit_cli.settings import Settings, current_names

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "results"
START, END = "<!-- python -m benchmarks.results -->", "<!-- end of results -->"
# Where a run lay on somebody's disk is nobody's business.
PLACES = ("data_dir", "figures_dir", "output")
# Settings that the table's command need not repeat.
IMPLIED = (*PLACES, "dataset", "language", "recipe", "save_every", "seed", "tensorboard")
COLUMNS = (
    *("recipe", "parameters", "epochs", "FLOP", "test accuracy", "flip-averaged", "corrupted"),
    *("calibration error", "minutes", "on", "command"),
)
# Vision Transformers trained on CIFAR-10's 50,000 training images alone: name, millions of
# parameters, passes over the images, operations of the training (computed from the architecture
# like ours), test accuracy in percent, and where it is published. Several report the best epoch on
# the test set.
PEERS = [
    ("ViT 128/6", 0.8, 200, 3.4e15, 86.52, "s-chh/2D-Positional-Encoding-Vision-Transformer"),
    (
        *("ViT 128/6, relative positions", 0.8, 200, 3.5e15, 90.57),
        "s-chh/2D-Positional-Encoding-Vision-Transformer",
    ),
    ("ViT-CIFAR", 6.3, 200, 2.55e16, 90.92, "omihub777/ViT-CIFAR"),
    ("ViT-Lite-6/4", 3.2, 200, 1.3e16, 90.94, "SHI-Labs/Compact-Transformers"),
    ("CVT-6/4", 3.2, 200, 1.28e16, 92.58, "SHI-Labs/Compact-Transformers"),
    ("ViT 192/9", 2.8, 300, 1.68e16, 93.58, "aanna0701/SPT_LSA_ViT"),
    ("SL-ViT, overlapping patches", 2.9, 300, 1.8e16, 94.53, "aanna0701/SPT_LSA_ViT"),
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
        draw_accuracy_and_compute(runs, RESULTS / "accuracy_and_compute.png")


def add(run_dir):
    """Copies settings, history and metrics of a run; returns the new folder."""
    run = run_of(run_dir)
    config, metrics = run["config"], run["metrics"]
    if metrics["dataset"] != "cifar10":
        raise ValueError(f"the table is about cifar10, not {metrics['dataset']}")
    if "corruptions" in run and run["corruptions"]["clean"] != metrics["accuracy"]:
        raise ValueError("its corruptions.json is about another model: measure it again")
    folder = RESULTS / group_of(run) / f"seed-{config['seed']}"
    others = [run_of(path) for path in folder.parent.glob("seed-*") if path != folder]
    # Raises what a later one would, before anything is written.
    table({group_of(run): [*others, run]})
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in config.items() if name not in PLACES}
    # An `.npz` file is named by where it lay.
    write_json(folder / "config.json", {**config, "dataset": metrics["dataset"]})
    for name in ("metrics.json", "history.csv", "corruptions.json"):
        (folder / name).unlink(missing_ok=True)  # Of another run with this seed.
        if (run_dir / name).exists():
            shutil.copy(run_dir / name, folder)
    return folder


def group_of(run):
    """Name of the folder of a run's results: its recipe, and after a first run all epochs."""
    recipe = run["config"]["recipe"]
    return f"{recipe}-{epochs_in_all(run)}" if parent_of(run) else recipe


def title_of(run):
    """What table and pictures call a run: its recipe, and after a first run all epochs."""
    recipe = run["config"]["recipe"]
    return f"{recipe}, {epochs_in_all(run)} epochs" if parent_of(run) else recipe


def epochs_in_all(run):
    """Number of epochs of a run and of those before it."""
    parent = parent_of(run)
    return run["metrics"]["epochs"] + (epochs_in_all(parent) if parent else 0)


def parent_of(run):
    """The published run whose weights a run started from; None if it started from nothing."""
    parent = run["config"].get("init_from")
    if parent is None:
        return None
    folder = RESULTS / parent.removeprefix("cifar10-") / "seed-0"
    if not folder.exists():
        raise ValueError(f"what its --init-from {parent} was trained on is not published")
    return run_of(folder)


def run_of(folder):
    """What the files of a run's folder hold: dictionaries by name, and the columns of `history`."""
    run = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("config", "metrics", "corruptions")
        if name != "corruptions" or (folder / "corruptions.json").exists()
    }
    run["config"] = current_names(run["config"])
    columns = np.genfromtxt(folder / "history.csv", delimiter=",", names=True, ndmin=1)
    return {**run, "history": columns}


def read():
    """For each recipe, in their order, and what it started from, a list of runs by seed."""
    runs = {}
    for recipe in RECIPES:
        for name in (recipe, f"{recipe}-[0-9]*"):
            for folder in sorted(RESULTS.glob(f"{name}/seed-*")):
                runs.setdefault(folder.parent.name, []).append(run_of(folder))
    return runs


def table(runs):
    """Lines of Markdown: what each recipe reached, and what others published."""
    rows = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for seeds in runs.values():
        metrics = [run["metrics"] for run in seeds]
        commands = {command(run["config"]) for run in seeds}
        if len(commands) > 1:
            raise ValueError(f"seeds of one recipe differ in settings: {'; '.join(commands)}")
        corrupted = [run["corruptions"]["mean"] for run in seeds if "corruptions" in run]
        mirrored = [x["flip_averaged_accuracy"] for x in metrics if "flip_averaged_accuracy" in x]
        minutes = statistics.mean(x["training_seconds"] for x in metrics) / 60
        cells = (
            f"**{title_of(seeds[0])}**",
            f"{metrics[0]['parameters'] / 1e6:.1f} M",
            epochs_of(seeds[0]),
            f"{flop(seeds[0]):.1e}",
            spread([x["accuracy"] for x in metrics]),
            spread(mirrored) if mirrored else "",
            spread(corrupted) if corrupted else "",
            spread([x["calibration_error"] for x in metrics]),
            f"{minutes:.0f}",
            f"{metrics[0]['device']}, {metrics[0]['backend']}",
            f"`{commands.pop()}`",
        )
        rows.append(f"| {' | '.join(cells)} |")
    for recipe, settings in RECIPES.items():
        if recipe not in runs and recipe != "digits" and not settings.needs_weights:
            line = f"`python train.py --recipe {recipe}`"
            rows.append(f"| **{recipe}** | | | | not run yet | | | | | | {line} |")
    for name, parameters, epochs, operations, accuracy, repository in PEERS:
        source = f"[{repository.split('/')[1]}](https://github.com/{repository})"
        cells = f"{name}, {source} | {parameters} M | {epochs} | {operations:.1e} | {accuracy} %"
        rows.append(f"| {cells} | | | | | | |")
    return rows


def epochs_of(run):
    """How many epochs a run took, beside those of its recipe or of the run that it started from."""
    recipe, epochs = RECIPES[run["config"]["recipe"]], run["metrics"]["epochs"]
    if parent := parent_of(run):
        return f"{epochs} after {epochs_in_all(parent)}"
    return str(epochs) if epochs == recipe.epochs else f"{epochs} of {recipe.epochs}"


def flop(run):
    """Floating point operations of a run's training on CIFAR-10, and of that before it."""
    from keras_vit.training import costs_of_epochs

    config = run["config"]
    changed = {x.name: config[x.name] for x in RECIPE_OPTIONS if x.name in config}
    recipe = dataclasses.replace(RECIPES[config["recipe"]], **changed)
    images = 50_000 - config.get("validation", 0)
    images = min(config.get("limit_train") or images, images)
    parent = parent_of(run)
    before = flop(parent) if parent else 0
    # An early stop leaves out the last epochs.
    costs = costs_of_epochs(recipe, (32, 32, 3))[: run["metrics"]["epochs"]]
    return before + images * sum(costs)


def spread(values):
    """Mean and standard deviation over the seeds in percent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    if len(values) == 1:
        return f"{mean} %, one seed"
    return f"{mean} ± {100 * statistics.stdev(values):.2f} %, {len(values)} seeds"


def command(config):
    """The command line that repeats a run, but for its seed and its places."""
    recipe = RECIPES[config["recipe"]]
    words = ["python train.py", f"--recipe {config['recipe']}"]
    for name, value in config.items():
        default = getattr(recipe, name, getattr(Settings, name, None))
        value = tuple(value) if isinstance(value, list) else value
        if name in IMPLIED or value in (default, "tensorflow"):  # Which is the default backend.
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
    with _picture(path, columns=2, figsize=(10, 4)) as (left, right):
        for index, seeds in enumerate(runs.values()):
            for number, run in enumerate(seeds):
                history = run["history"]
                epochs = history["epoch"] + epochs_in_all(run) - run["metrics"]["epochs"]
                label = title_of(run) if number == 0 else None
                style = {"color": f"C{index}", "label": label, "marker": "."}
                left.plot(epochs, history["loss"], **style)
                right.plot(epochs, 100 * history["accuracy"], **style)
        left.set(xlabel="epoch", ylabel="training loss, nats")
        right.set(xlabel="epoch", ylabel="training accuracy, %")
        right.legend()


def draw_accuracy_and_compute(runs, path):
    """Draws test accuracy over the operations of the training: each recipe, and `PEERS`."""
    points = [
        (seeds[0], flop(seeds[0]), 100 * statistics.mean(x["metrics"]["accuracy"] for x in seeds))
        for seeds in runs.values()
    ]
    with _picture(path, columns=1, figsize=(8, 5)) as axes:
        ours = {"color": "C0", "zorder": 3}
        axes.scatter(*zip(*((x, y) for _, x, y in points)), label="this package", **ours)
        others = [(row[3], row[4]) for row in PEERS]
        axes.scatter(*zip(*others), facecolor="none", edgecolor="C7", label="published by others")
        for run, x, y in points:
            style = {"va": "top"}
            if parent_of(run):  # Beside its recipe's.
                style = {"on_the_left": True, "va": "bottom"}
            _annotate(axes, f"{title_of(run)} {y:.1f}", x, y, color="C0", weight="bold", **style)
        for name, *_, x, y, _ in PEERS:
            _annotate(axes, f"{name} {y:.1f}", x, y, on_the_left=x < 2e16, va="bottom")
        axes.set(xscale="log", xlabel="operations of the training, FLOP")
        axes.set_xlim(right=8e16)
        axes.set(ylabel="test accuracy on CIFAR-10, %")
        axes.legend(loc="lower right")


def _annotate(axes, text, x, y, on_the_left=False, **style):
    side, offset = ("right", -7) if on_the_left else ("left", 7)
    place = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side}
    axes.annotate(text, (x, y), fontsize=8.5, **place, **style)


@contextlib.contextmanager
def _picture(path, columns, figsize):
    """Axes, or a row of them, that are written to a file at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=figsize, layout="constrained")
    yield axes
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
