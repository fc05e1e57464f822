"""What pretrained weights are worth on photos in class folders, beside training from scratch.

`KERAS_BACKEND=torch python -m benchmarks.fine_tuning FOLDER... --seeds 0 1` trains on each folder
for about the same time: from scratch, from each preset, and timm's ViT of the size of `quick` from
scratch (needs `pip install timm torch`; ours train on TensorFlow, which may not share a process
with PyTorch). Finished runs are not repeated. The table goes to
`benchmarks/results/fine_tuning.json`: accuracy on the test images after the last epoch.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
import time

import numpy as np

from benchmarks.results import ROOT
from benchmarks.runs import in_processes
from keras_vit.data import load_dataset
from keras_vit.files import write_json
from keras_vit_cli.recipes import RECIPES

TIMM = "timm's ViT of that size, from scratch"  # What the table calls it.
# Options by what they train, and the number of epochs that takes about the same time for each.
CONTESTANTS = {
    "`quick`, from scratch": (["--recipe", "quick"], 75),
    "from `cifar10-quick`": (["--init-from", "cifar10-quick"], 45),
    "from `cifar10-strong`": (["--init-from", "cifar10-strong"], 15),
    TIMM: (["--timm"], 45),
}
SIDE = 32  # Of all images, in pixels: what the presets were trained on.


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path, help="photos in class folders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "fine_tuning")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core for each")
    parser.add_argument("--timm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.timm:
        return train_timm(options.folders[0], options.epochs, options.seeds[0], options.output)
    runs = {
        (name, folder, seed): options.output / named(f"{folder.resolve().name} {name} {seed}")
        for folder in options.folders
        for name in CONTESTANTS
        for seed in options.seeds
    }
    commands = [command(*run, place) for run, place in runs.items()]
    in_processes(commands, list(runs.values()), options.jobs)
    found = {}
    for (name, folder, _), place in runs.items():
        metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        for key in ("accuracy", "training_seconds"):
            of_name = found.setdefault(name, {}).setdefault(folder.resolve().name, {})
            of_name.setdefault(key, []).append(metrics[key])
    print("\n".join(table(found)))
    epochs = {name: epochs for name, (_, epochs) in CONTESTANTS.items()}
    settings = {"epochs": epochs, "seeds": options.seeds, "found": found}
    write_json(ROOT / "benchmarks" / "results" / "fine_tuning.json", settings)


def named(name):
    """A name of letters, digits and dashes for a folder."""
    return "-".join(re.findall(r"\w+", name))


def command(name, folder, seed, place):
    """The words of a process that trains one contestant."""
    words, epochs = CONTESTANTS[name]
    words = [*words, "--epochs", str(epochs), "--output", str(place)]
    if name == TIMM:
        words += ["--seeds", str(seed)]
        return [sys.executable, "-m", "benchmarks.fine_tuning", str(folder), *words]
    words += ["--dataset", str(folder), "--seed", str(seed), "--image-size", str(SIDE)]
    words += ["--backend", "tensorflow", "--figures-dir", str(place / "figures")]
    return [sys.executable, str(ROOT / "train.py"), *words]


def train_timm(folder, epochs, seed, output):
    """Trains timm's ViT of the size of `quick` with AdamW, as is usual in PyTorch."""
    import torch
    from timm.models import VisionTransformer

    torch.manual_seed(seed)
    quick, dataset = RECIPES["quick"], load_dataset(str(folder), image_size=(SIDE, SIDE))
    model = VisionTransformer(
        img_size=SIDE,
        patch_size=quick.patch_size,
        num_classes=len(dataset.class_names),
        embed_dim=quick.embed_dim,
        depth=quick.depth,
        num_heads=quick.num_heads,
        mlp_ratio=quick.mlp_dim / quick.embed_dim,
    )
    images = torch.tensor(dataset.train_images).permute(0, 3, 1, 2) / 255
    mean, deviation = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    images, labels = (images - mean) / deviation, torch.tensor(dataset.train_labels)
    steps = epochs * -(-len(images) // quick.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    start = time.perf_counter()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(quick.batch_size):
            logits = model(flipped_and_shifted(images[chosen], torch))
            loss = torch.nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    tests = (torch.tensor(dataset.test_images).permute(0, 3, 1, 2) / 255 - mean) / deviation
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(1) for batch in tests.split(256)]).numpy()
    accuracy = float(np.mean(predicted == dataset.test_labels))
    write_json(output / "metrics.json", {"accuracy": accuracy, "training_seconds": seconds})


def flipped_and_shifted(images, torch):
    """Half of the images mirrored, each shifted by up to four pixels in both directions."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    starts = torch.randint(9, (len(images), 2)).tolist()
    return torch.stack([x[:, y : y + SIDE, z : z + SIDE] for x, (y, z) in zip(padded, starts)])


def table(found):
    """Lines of Markdown: mean accuracy over the seeds, and the standard deviation."""
    folders = list(next(iter(found.values())))
    rows = [f"| | {' | '.join(folders)} | minutes |", "| --- " * (len(folders) + 2) + "|"]
    for name, measured in found.items():
        cells, seconds = [], 0
        for folder in folders:
            values = [100 * x for x in measured[folder]["accuracy"]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
            seconds += statistics.mean(measured[folder]["training_seconds"])
        rows.append(f"| {name} | {' | '.join(cells)} | {seconds / 60:.1f} |")
    return rows


if __name__ == "__main__":
    main()
