"""How the cost of a training step of ours grows with batch, image, depth and width.

`python -m benchmarks.scaling` measures float32 on TensorFlow against what counting operations
predicts. A point and the baseline take turns, each in a process of its own, so that a drift of
the machine meets both; nothing should cost more than 1.3 times what is predicted. A last process
trains for 20 epochs and notes its memory after each. Prints a table and writes it, with a picture,
to `benchmarks/results/`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import statistics

import numpy as np

from benchmarks import contestants, side_by_side

ENVIRONMENT = {
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    **side_by_side.TUNED,
}
TARGET = 1.3
HEAD_SIZE = 32
# Sweeps whose memory should be proportional to what they vary.
MEMORY_SWEEPS = ("batch", "depth")


@dataclasses.dataclass(frozen=True)
class Point:
    """Sizes of a training step; by default the baseline's."""

    side: int = contestants.SIDE
    batch: int = 128
    depth: int = contestants.DEPTH
    width: int = contestants.WIDTH

    @property
    def hidden(self):
        return 2 * self.width

    @property
    def name(self):
        changes = [
            f"{name} {size}" for name, size in vars(self).items() if size != getattr(BASELINE, name)
        ]
        return ", ".join(changes) or "baseline"


BASELINE = Point()
# The processes of a group, and one for the baseline, hold their memory at the same time: the
# points that need gigabytes stand alone.
SWEEPS = {
    "batch": [
        [Point(batch=32), Point(batch=64), Point(batch=256)],
        [Point(batch=512)],
        [Point(batch=1024)],
    ],
    "side": [[Point(side=64, batch=32), Point(side=128, batch=8)], [Point(side=224, batch=2)]],
    "depth": [[Point(depth=2), Point(depth=4), Point(depth=12)]],
    "width": [[Point(width=64), Point(width=128), Point(width=512)]],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each point")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")

    sweeps = {}
    for sweep, groups in SWEEPS.items():
        sweeps[sweep] = measured(sweep, groups, options.rounds)
        print("\n".join(table(sweep, sweeps[sweep])), end="\n\n", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
        resident = process.submit(memory_of_epochs).result()
    summary = [*verdict(sweeps), flatness(resident)]
    print("\n".join(summary))

    tables = [line for sweep, rows in sweeps.items() for line in (*table(sweep, rows), "")]
    content = {
        "command": side_by_side.command("benchmarks.scaling"),
        **side_by_side.machine(),
        "packages": {name: side_by_side.version(name) for name in ("keras", "tensorflow")},
        "rounds": options.rounds,
        "target": TARGET,
        "sweeps": sweeps,
        "resident_mib_after_epochs": resident,
        "table": [*tables, *summary],
    }
    path = side_by_side.write("scaling", content)
    draw(sweeps, resident, path.with_suffix(".png"))
    print(f"\nWritten to {path} and {path.with_suffix('.png')}")


def operations(point):
    """Floating point operations of a training step: every product of matrices but the crop's."""
    from keras_vit.training import operations as of_one_image
    from keras_vit_cli.recipes import RECIPES

    sizes = {"depth": point.depth, "embed_dim": point.width, "mlp_dim": point.hidden}
    recipe = dataclasses.replace(RECIPES["baseline"], **sizes)
    head = 6 * point.width * contestants.CLASSES
    return point.batch * (of_one_image(recipe, (point.side, point.side, 3)) + head)


def predicted_memory(sweep, point):
    """Memory that steps should add, as a multiple of the baseline's; None without a prediction."""
    if sweep in MEMORY_SWEEPS:
        return getattr(point, sweep) / getattr(BASELINE, sweep)


def measured(sweep, groups, rounds):
    """Rows of one sweep in rising order, the baseline's among them."""
    rows = []
    for group in groups:
        entries = {point: contestant(point) for point in (BASELINE, *group)}
        results = side_by_side.measure(entries, rounds, warm_up=2)
        rows += [compare(sweep, results, point) for point in (group if rows else entries)]
    return sorted(rows, key=lambda row: row["sizes"][sweep])


def contestant(point):
    make_step = functools.partial(
        contestants.ours,
        image_shape=(point.side, point.side, 3),
        depth=point.depth,
        embed_dim=point.width,
        mlp_dim=point.hidden,
        num_heads=point.width // HEAD_SIZE,
    )
    return make_step, (point.batch, "float32"), ENVIRONMENT


def compare(sweep, results, point):
    """What a point cost beside the baseline of its group and beside the predictions."""
    result, baseline = results[point], results[BASELINE]
    row = {"name": point.name, "sizes": dataclasses.asdict(point)}
    if "error" in result or "error" in baseline:
        return row | {"error": result.get("error") or f"baseline: {baseline['error']}"}
    seconds = statistics.median(result["seconds"])
    time = side_by_side.ratio(results, BASELINE, point)
    time["predicted"] = operations(point) / operations(BASELINE)
    memory = {
        "median": result["added_mib"] / baseline["added_mib"],
        "predicted": predicted_memory(sweep, point),
    }
    return row | {
        "images_per_second": point.batch / seconds,
        "milliseconds": 1e3 * seconds,
        "added_mib": result["added_mib"],
        "time": time,
        "memory": memory,
        "seconds": {"point": result["seconds"], "baseline": baseline["seconds"]},
    }


def over(row, cost):
    """How many times the predicted `"time"` or `"memory"` a point took; None if unpredicted."""
    values = row[cost]
    return values["predicted"] and values["median"] / values["predicted"]


def misses(row):
    """The costs of a point, `"time"` or `"memory"`, that are beyond the target."""
    if "error" in row:
        return []
    return [cost for cost in ("time", "memory") if (over(row, cost) or 0) > TARGET]


def table(sweep, rows):
    """Lines of text: what each point of a sweep cost; `!` marks what misses the target."""
    head = "images/s", "ms", "MiB", "predicted", "measured (quartiles)", "time/pred.", "MiB/pred."
    lines = [f"{sweep:20}" + "{:>9} {:>7} {:>7} {:>10} {:>22} {:>11} {:>10}".format(*head)]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:20} {row['error']}")
            continue
        marks = {cost: "!" if cost in misses(row) else " " for cost in ("time", "memory")}
        times = "{:.2f} ({:.2f} to {:.2f})".format(row["time"]["median"], *row["time"]["quartiles"])
        memory = f"{over(row, 'memory'):.2f}" if row["memory"]["predicted"] else "-"
        line = (
            f"{row['name']:20}{row['images_per_second']:9.1f} {row['milliseconds']:7.0f} "
            f"{row['added_mib']:7.0f} {row['time']['predicted']:10.2f} {times:>22} "
            f"{over(row, 'time'):11.2f}{marks['time']} {memory:>9}{marks['memory']}"
        )
        lines.append(line.rstrip())
    return lines


def verdict(sweeps):
    """Lines of text: which points miss the target, and which could not be measured."""
    rows = [row for rows in sweeps.values() for row in rows]
    missed = [
        f"{row['name']} ({cost}, {over(row, cost):.2f})" for row in rows for cost in misses(row)
    ]
    failed = [row["name"] for row in rows if "error" in row]
    lines = [f"Over {TARGET} times the prediction: {'; '.join(missed) or 'nothing'}."]
    return lines + ([f"Not measured: {'; '.join(failed)}."] if failed else [])


def memory_of_epochs(epochs=20, steps=4, batch_size=64):
    """Resident MiB of this process, a new one, after each epoch of the baseline on noise."""
    os.environ.update(ENVIRONMENT)
    import keras

    from keras_vit import VisionTransformer
    from keras_vit.data import Dataset
    from keras_vit.training import fit
    from keras_vit_cli.recipes import RECIPES

    resident = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: resident.append(_resident_mib()))

    class Watched(VisionTransformer):
        def fit(self, *arguments, callbacks, **options):
            return super().fit(*arguments, callbacks=[*callbacks, note], verbose=0, **options)

    data = contestants.batch(steps * batch_size)
    names = [str(name) for name in range(contestants.CLASSES)]
    model = Watched()
    model.adapt(data[0])
    recipe = dataclasses.replace(RECIPES["baseline"], epochs=epochs, batch_size=batch_size)
    fit(model, Dataset("noise", *data, *data, names, horizontal_flip=True), recipe)
    return resident


def _resident_mib():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def flatness(resident):
    """A line of text: within how many percent memory stays from the second epoch on."""
    low, high = min(resident[1:]), max(resident[1:])
    return (
        f"Resident memory after epochs 2 to {len(resident)} of fit: {low:.0f} to {high:.0f} MiB, "
        f"within {high / low - 1:.1%}."
    )


def draw(sweeps, resident, path):
    """Draws measured points beside the arithmetic's lines: time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    below = [f"{sweep} memory" for sweep in MEMORY_SWEEPS]
    figure, panels = pyplot.subplot_mosaic(
        [list(sweeps), [*below, "epochs", "epochs"]], figsize=(13, 6.4), layout="constrained"
    )
    for sweep in sweeps:
        # Larger images come in smaller batches: only the time of one image can be compared.
        _draw_growth(panels[sweep], sweep, sweeps[sweep], "time", per_image=sweep == "side")
        panels[sweep].set(title="time of an image" if sweep == "side" else "time of a step")
    for sweep, name in zip(MEMORY_SWEEPS, below):
        _draw_growth(panels[name], sweep, sweeps[sweep], "memory")
        panels[name].set(title="memory that steps add")
    panels["batch"].set_ylabel("times the baseline's")
    panels[below[0]].set_ylabel("times the baseline's")
    entries = panels["batch"].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper center", ncols=3, frameon=False)

    axes = panels["epochs"]
    axes.plot(range(1, len(resident) + 1), resident, "o-", color="tab:orange")
    axes.set(title="resident memory during fit", xlabel="epoch", ylabel="MiB")
    axes.set_ylim(0, 1.15 * max(resident))
    axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_growth(axes, sweep, rows, cost, per_image=False):
    """One log-log panel: measured points, the arithmetic's line and what the target allows."""
    from matplotlib import ticker

    rows = [row for row in rows if "error" not in row]
    sizes = [row["sizes"][sweep] for row in rows]
    batches = np.array([row["sizes"]["batch"] for row in rows])
    per_image_factor = batches / BASELINE.batch if per_image else 1
    line = np.array([row[cost]["predicted"] for row in rows]) / per_image_factor
    middle = np.array([row[cost]["median"] for row in rows]) / per_image_factor
    axes.plot(sizes, line, color="tab:gray", label="arithmetic")
    band = f"up to {TARGET} times"
    axes.fill_between(sizes, line, TARGET * line, color="tab:gray", alpha=0.2, lw=0, label=band)
    axes.plot(sizes, middle, "o", color="tab:orange", label="measured, its ratio to arithmetic")
    for row, size, value in zip(rows, sizes, middle):
        # Every line rises: there is room to the upper left of what lies above it.
        above = over(row, cost) > 1
        axes.annotate(
            f"{over(row, cost):.2f}",
            (size, value),
            (-5, 3) if above else (6, -3),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            color="tab:red" if cost in misses(row) else "black",
            fontsize=9,
        )
    axes.set(xscale="log", yscale="log", xlabel=sweep)
    axes.margins(x=0.24, y=0.12)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.minorticks_off()


if __name__ == "__main__":
    main()
