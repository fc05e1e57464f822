"""`predict`: the likeliest classes of images."""

import csv
import json
import sys

from keras_vit.prediction import predict
from keras_vit_cli.inputs import class_names, image_batches, load_model

SHOWN = 5  # Classes of an image that are named.


def run(options):
    """Prints the likeliest classes of images; returns 1 if some could not be read."""
    model = load_model(options.model)
    names, failed = class_names(model), False
    writer = csv.writer(sys.stdout)
    if options.csv:
        writer.writerow(("image", "rank", "class", "probability"))
    for paths, images, some_failed in image_batches(options.images, model):
        failed |= some_failed
        for path, row in zip(paths, predict(model, images)):
            likeliest = [(names[i], float(row[i])) for i in row.argsort()[::-1][:SHOWN]]
            if options.csv:
                writer.writerows((path, i, *pair) for i, pair in enumerate(likeliest, start=1))
            elif options.json:
                pairs = [{"class": name, "probability": x} for name, x in likeliest]
                print(json.dumps({"image": path, "predictions": pairs}, ensure_ascii=False))
            else:
                print(f"{path}: " + ", ".join(f"{name} {x:.1%}" for name, x in likeliest))
    return int(failed)
