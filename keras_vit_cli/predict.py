"""`predict`: the likeliest classes of images."""

import csv
import json
import sys

from keras_vit.prediction import predict
from keras_vit_cli.inputs import class_names, image_batches, load_model


def run(options):
    """Prints the likeliest classes of images; returns 1 if some could not be read."""
    model = load_model(options.model)
    names, failed = class_names(model), False
    top = min(options.top, len(names))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if options.csv:
        ends = ("", *(f"_{rank}" for rank in range(2, top + 1)))
        columns = (f"{name}{end}" for end in ends for name in ("class", "probability"))
        writer.writerow(("image", *columns))
    for paths, images, some_failed in image_batches(options.images, model):
        failed |= some_failed
        for path, row in zip(paths, predict(model, images)):
            likeliest = [(names[i], float(row[i])) for i in row.argsort()[::-1][:top]]
            if options.csv:
                writer.writerow((path, *(value for pair in likeliest for value in pair)))
            elif options.json:
                pairs = [{"class": name, "probability": x} for name, x in likeliest]
                print(as_json({"image": path, "predictions": pairs}))
            else:
                print(f"{path}: " + ", ".join(f"{name} {x:.1%}" for name, x in likeliest))
    return int(failed)


def as_json(content):
    """JSON of one line, in ASCII if stdout cannot express it otherwise."""
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(content)
    return line
