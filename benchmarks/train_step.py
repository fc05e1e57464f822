"""A training step of ours beside those of PyTorch, KerasHub and stock Keras layers.

`python -m benchmarks.train_step` measures float32, `--mixed-precision` bfloat16. Every contestant
runs in a process of its own; they take turns, so that a drift of the machine meets all of them.
Stock Keras and KerasHub run as installed and, "tuned", at their best: XLA off, and Intel's kernels
on where TensorFlow leaves them off. MiB is the process's peak and, of that, what the steps added.
Prints a table and writes it, with a picture, to `benchmarks/results/`.
"""

import argparse
import statistics

from benchmarks import contestants, side_by_side

BACKENDS = ("tensorflow", "jax", "torch")
PRODUCT = 2048  # Side of the matrices whose product is the yardstick.


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contestant")
    parser.add_argument("--mixed-precision", action="store_true", help="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="torch.compile, too: needs g++")
    options = parser.parse_args()
    if options.batch_size < 1 or options.rounds < 2:
        parser.error("--batch-size must be at least 1, --rounds at least 2")

    dtype = "mixed_bfloat16" if options.mixed_precision else "float32"
    entries = chosen(options.batch_size, dtype, options.compiled)
    results = side_by_side.measure(entries, options.rounds)
    product = results.pop("matrix product", {"error": "no PyTorch"})
    rows = table(results, product, options.batch_size)
    print("\n".join(rows))
    packages = ("keras", "keras-hub", *BACKENDS)
    content = {
        "command": side_by_side.command("benchmarks.train_step"),
        **side_by_side.machine(),
        "packages": {name: version for name in packages if (version := side_by_side.version(name))},
        "dtype": dtype,
        "batch_size": options.batch_size,
        "operations_per_image": contestants.operations_per_image(),
        "matrix_product": product,
        "contestants": results,
        "table": rows,
    }
    name = f"train_step_{dtype}" + ("_compiled" if options.compiled else "")
    if options.batch_size != parser.get_default("batch_size"):
        name += f"_batch_{options.batch_size}"
    path = side_by_side.write(name, content)
    draw(results, options.batch_size, dtype, path.with_suffix(".png"))
    print(f"\nWritten to {path} and {path.with_suffix('.png')}")


def chosen(size, dtype, compiled):
    """The contestants whose packages are installed, ours first."""
    entries = {}
    for backend in BACKENDS:
        if side_by_side.version(backend):
            environment = {"KERAS_BACKEND": backend, **side_by_side.TUNED}
            entries[f"ours, {backend}"] = (contestants.ours, (size, dtype), environment)
    tensorflow = {"KERAS_BACKEND": "tensorflow"}
    tuned = {**tensorflow, **side_by_side.TUNED}
    entries["ours, no augmentation"] = (contestants.ours, (size, dtype, []), tuned)
    stock = {"stock Keras": contestants.stock_keras}
    if side_by_side.version("keras-hub"):
        stock["KerasHub"] = contestants.keras_hub
    for title, make in stock.items():
        entries[title] = (make, (size, dtype, "auto"), tensorflow)
        entries[f"{title}, tuned"] = (make, (size, dtype, False), tuned)
    if side_by_side.version("torch"):
        entries["PyTorch module"] = (contestants.pytorch, (size, dtype, "module"), {})
        entries["PyTorch SDPA"] = (contestants.pytorch, (size, dtype, "sdpa"), {})
        if compiled:
            arguments = (size, dtype, "sdpa", True)
            entries["PyTorch SDPA, compiled"] = (contestants.pytorch, arguments, {})
        entries["matrix product"] = (contestants.matrix_product, (dtype, PRODUCT), {})
    return entries


def table(results, product, batch_size):
    """Lines of text: what each contestant reached, and ours on TensorFlow against it."""
    first = next(iter(results))
    peak = None
    if "error" not in product:
        peak = contestants.product_operations(PRODUCT) / statistics.median(product["seconds"])
    head = "contestant", "ms", "images/s", "MiB", "added", "of product", f"{first} is faster by"
    rows = ["{:24} {:>6} {:>9} {:>6} {:>6} {:>11}  {}".format(*head)]
    for name, result in results.items():
        if "error" in result:
            rows.append(f"{name:24} {result['error']}")
            continue
        seconds = statistics.median(result["seconds"])
        speed = batch_size / seconds
        utilization = f"{speed * contestants.operations_per_image() / peak:.0%}" if peak else "-"
        times = side_by_side.ratio(results, first, name)
        low, high = times["quartiles"]
        rows.append(
            f"{name:24} {1e3 * seconds:6.0f} {speed:9.1f} {result['peak_mib']:6.0f} "
            f"{result['added_mib']:6.0f} {utilization:>11}  "
            f"{times['median']:.2f} ({low:.2f} to {high:.2f})"
        )
    return rows


def draw(results, batch_size, dtype, path):
    """Draws images/s of each contestant as a bar, the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = {
        name: batch_size / statistics.median(result["seconds"])
        for name, result in results.items()
        if "error" not in result
    }
    names = sorted(speeds, key=speeds.get)
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(names) + 1.1), layout="constrained")
    colors = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in names]
    bars = axes.barh(names, [speeds[name] for name in names], color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlabel="training images per second", title=f"{dtype}, batch {batch_size}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
