"""How fast a model answers in the runtimes that it is exported to, beside Keras.

`python -m benchmarks.exported MODEL` exports a `.keras` file to each format and prints Markdown:
medians of ten rounds in which Keras and the runtime take turns, after one that warms up.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # It alone writes all formats.
BATCH, ROUNDS = 256, 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="a .keras file")
    options = parser.parse_args()
    import numpy as np

    from keras_vit import export, load_model

    model = load_model(options.model)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *model.input_shape[1:]))
    images = images.astype("float32")
    print("| format | largest difference | one image, ms (Keras) | images/s (Keras) |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, output_format in export.FORMATS.items():
            path = pathlib.Path(folder) / f"model-{name}{output_format.suffix}"
            export.write(export.served(model), path, name)
            run = export.runner(path, name)
            difference = export.compare(model, run, images)
            one, many = (
                _medians({"keras": model.predict_on_batch, "exported": run}, batch)
                for batch in (images[:1], images)
            )
            milliseconds = [f"{1000 * one[x]:.2f}" for x in ("exported", "keras")]
            speeds = [f"{BATCH / many[x]:,.0f}" for x in ("exported", "keras")]
            print(
                f"| {name} | {difference:.1e} | {milliseconds[0]} ({milliseconds[1]}) | "
                f"{speeds[0]} ({speeds[1]}) |",
                flush=True,
            )


def _medians(functions, batch):
    """Seconds that functions take for a batch, by name, measured in turns."""
    seconds = {name: [] for name in functions}
    for _ in range(ROUNDS + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function(batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
