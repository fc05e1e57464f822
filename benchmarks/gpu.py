"""Training on one NVIDIA GPU: ours on JAX beside plain PyTorch, then the baseline recipe itself.

`python -m benchmarks.gpu --dataset cifar10.npz` needs Keras, JAX and PyTorch, but no TensorFlow;
the file holds Keras's arrays `x_train, y_train, x_test, y_test`. First, epochs of 50,000 images of
noise in bfloat16, contestants in processes of their own, in turns; then `train.py` with the
baseline recipe, whose wall time and test accuracy are read from its run folder. Prints a table
and writes it to `benchmarks/results/`; without a GPU, everything runs, and nothing is written.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks import contestants, side_by_side

ROOT = pathlib.Path(__file__).parents[1]
DTYPE = "mixed_bfloat16"
PRODUCT = 8192  # Side of the matrices whose product is the yardstick.


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10", help="as train.py's: an .npz file, say")
    parser.add_argument("--epochs", type=int, default=160, help="length of the baseline's run")
    parser.add_argument("--images", type=int, default=50_000, help="images in a timed epoch")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 1024], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each contestant")
    parser.add_argument("--product", type=int, default=PRODUCT, help="side of the yardstick")
    options = parser.parse_args()
    if options.rounds < 2 or min(options.epochs, options.images, *options.batch_sizes) < 1:
        parser.error("--rounds must be at least 2, the other numbers at least 1")

    device = gpu()
    measured, rows = {}, [device or "no GPU: a rehearsal on the processor", ""]
    for size in options.batch_sizes:
        results = side_by_side.measure(chosen(size, options), options.rounds, warm_up=1)
        measured[size] = results
        rows += [f"epochs of {options.images:,} images, batch {size}, {DTYPE}"]
        rows += [*table(results, options), ""]
        print("\n".join(rows[-len(results) - 2 :]), flush=True)
    run = baseline(options, mixed_precision=device is not None)
    rows += [summary(run)]
    print(rows[-1])
    if device is None:
        print("Nothing written: this was not measured on a GPU.")
        return
    packages = ("keras", "jax", "torch")
    content = {
        "command": side_by_side.command("benchmarks.gpu"),
        **side_by_side.machine(),
        "gpu": device,
        "packages": {name: side_by_side.version(name) for name in packages},
        "contestants": measured,
        "baseline": run,
        "table": rows,
    }
    print(f"Written to {side_by_side.write('gpu', content)}")


def gpu():
    """Name of the first NVIDIA GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines.splitlines()[0] if lines.strip() else None


def chosen(batch_size, options):
    """Ours and PyTorch's at its settings, and the yardstick."""
    # All live at once: none may claim the whole memory of the GPU.
    jax = {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    arguments = batch_size, DTYPE, options.images
    return {
        "ours, jax": (contestants.ours_epoch, arguments, jax),
        "PyTorch": (contestants.pytorch_epoch, arguments, {}),
        "PyTorch, compiled": (contestants.pytorch_epoch, (*arguments, True), {}),
        "matrix product": (contestants.matrix_product, (DTYPE, options.product), {}),
    }


def table(results, options):
    """Lines of text: what each contestant reached, and ours against it."""
    ours, product = "ours, jax", results["matrix product"]
    peak = None
    if "error" not in product:
        operations = contestants.product_operations(options.product)
        peak = operations / statistics.median(product["seconds"])
    head = "contestant", "s/epoch", "images/s", "GPU MiB", "of product", "ours is faster by"
    rows = ["{:20} {:>8} {:>10} {:>8} {:>10}  {}".format(*head)]
    for name, result in results.items():
        if name == "matrix product":
            continue
        if "error" in result:
            rows.append(f"{name:20} {result['error']}")
            continue
        seconds = statistics.median(result["seconds"])
        speed = options.images / seconds
        utilization = f"{speed * contestants.operations_per_image() / peak:.0%}" if peak else "-"
        faster = "-"
        if "error" not in results[ours]:
            times = side_by_side.ratio(results, ours, name)
            faster = "{:.2f} ({:.2f} to {:.2f})".format(times["median"], *times["quartiles"])
        rows.append(
            f"{name:20} {seconds:8.2f} {speed:10,.0f} {result['gpu_mib']:8.0f} {utilization:>10}  "
            f"{faster}"
        )
    return rows


def baseline(options, mixed_precision):
    """Trains the baseline by the command that everybody uses; returns what it reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--backend", "jax"]
        command += ["--mixed-precision"] if mixed_precision else []
        command += ["--recipe", "baseline", "--dataset", options.dataset]
        command += ["--epochs", str(options.epochs), "--output", f"{folder}/run"]
        command += ["--figures-dir", f"{folder}/figures"]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        path = pathlib.Path(folder, "run", "metrics.json")
        if not path.exists():
            return {"error": f"train.py ended with status {result.returncode}"}
        metrics = json.loads(path.read_text(encoding="utf-8"))
    names = "epochs", "accuracy", "loss", "training_seconds", "wall_seconds", "images_per_second"
    return {name: metrics[name] for name in (*names, "device")}


def summary(run):
    if "error" in run:
        return f"baseline: {run['error']}"
    return (
        f"baseline: {run['epochs']} epochs in {run['training_seconds']:.0f} s "
        f"({run['images_per_second']:,.0f} images/s), {run['wall_seconds']:.0f} s with evaluation; "
        f"test accuracy {run['accuracy']:.2%}, one seed"
    )


if __name__ == "__main__":
    main()
