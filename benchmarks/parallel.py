"""What data parallelism should give on boards and hosts: arithmetic, nothing is measured here.

`python -m benchmarks.parallel` prints the tables of docs/scaling.md: the assumptions, the cost of a
step on one device, the efficiency with the same batch on each device, and the speed-up with the
same batch on all of them together. A step is the operations of its products of matrices at an
assumed rate, or was measured on a processor, by `benchmarks.scaling`; the gradients are summed
by all-reduce in the alpha-beta model (Thakur et al., 2005).
"""

import dataclasses
import json
import math

from benchmarks import side_by_side
from keras_vit.training.flops import operations
from keras_vit_cli.recipes import RECIPES, Recipe

BYTES = 4  # Of a gradient in float32.
BOARD = 8  # Devices.
HOSTS = 4, 32, 256


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection: seconds that any message takes, and bytes a second and device one way."""

    latency: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a step is assumed to run on: operations a second of a device, and its links."""

    name: str
    rate: float
    board: Link
    network: Link


# Of what data sheets promise, as fractions.
RATE_REACHED, BANDWIDTH_REACHED = 0.4, 0.8
# NVIDIA's data sheets: H100 SXM, 989 TFLOP/s in bfloat16 without sparsity, NVLink 450 GB/s in each
# direction; DGX H100, 400 Gb/s of InfiniBand for each GPU.
H100, NVLINK, INFINIBAND, ETHERNET = 989e12, 450e9, 50e9, 12.5e9
_BOARD = Link(5e-6, BANDWIDTH_REACHED * NVLINK)
MACHINES = [
    Machine(
        "InfiniBand, 400 Gb/s a GPU",
        RATE_REACHED * H100,
        _BOARD,
        Link(10e-6, BANDWIDTH_REACHED * INFINIBAND),
    ),
    Machine(
        "Ethernet, 100 Gb/s a host",
        RATE_REACHED * H100,
        _BOARD,
        Link(30e-6, BANDWIDTH_REACHED * ETHERNET / BOARD),
    ),
]
# Between hosts without a GPU, whose step was measured.
SLOW_ETHERNET = Link(50e-6, BANDWIDTH_REACHED * 1.25e9)


@dataclasses.dataclass(frozen=True)
class Model:
    """A recipe on images of a shape, and batch sizes for a device and for all together."""

    name: str
    recipe: Recipe
    image_shape: tuple
    classes: int
    per_device: tuple
    whole: int

    @property
    def gradient(self):
        """Bytes."""
        return BYTES * parameters(self.recipe, self.image_shape, self.classes)

    def seconds(self, images, machine):
        """Seconds of a step on one device, without communication."""
        return images * operations(self.recipe, self.image_shape) / machine.rate


_BASE = Recipe(patch_size=16, embed_dim=768, mlp_dim=3072, num_heads=12, depth=12)
MODELS = [
    Model("baseline", RECIPES["baseline"], (32, 32, 3), 10, (16, 128, 1024), 128),
    Model("strong", RECIPES["strong"], (32, 32, 3), 10, (16, 128, 1024), 128),
    # The batch of Steiner et al., 2021.
    Model("ViT-B/16 at 224", _BASE, (224, 224, 3), 1000, (16, 128), 4096),
]


def parameters(recipe, image_shape, classes):
    """Number of trainable parameters of a recipe's model."""
    height, width, channels = image_shape
    patches = (height // recipe.patch_size) * (width // recipe.patch_size)
    tokens, dim, hidden = patches + (recipe.pooling == "token"), recipe.embed_dim, recipe.mlp_dim
    embedding = (recipe.patch_size**2 * channels + 1) * dim + tokens * dim
    embedding += dim if recipe.pooling == "token" else 0
    block = 4 * (dim + 1) * dim + (dim + 1) * hidden + (hidden + 1) * dim + 2 * 2 * dim
    return embedding + recipe.depth * block + 2 * dim + (dim + 1) * classes


def all_reduce(size, devices, link):
    """Seconds to sum `size` bytes over devices: by a ring or by a tree, whichever is faster.

    A ring takes `2 (n - 1)` messages, each of `size / n` bytes; a tree (two of them, each for half
    of the bytes) about `2 log2(n)` messages one after the other, and twice the bytes.
    """
    if devices == 1:
        return 0.0
    messages = 2 * (devices - 1)
    ring = messages * (link.latency + size / devices / link.bandwidth)
    tree = 2 * math.log2(devices) * link.latency + 2 * size / link.bandwidth
    return min(ring, tree)


def communication(size, hosts, machine, devices=BOARD):
    """Seconds to sum gradients over hosts with so many devices each.

    Within a board, then each device an equal part with its counterparts on the other hosts, then
    within the board again.
    """
    inside = all_reduce(size, devices, machine.board)
    return inside + all_reduce(size / devices, hosts, machine.network)


def efficiency(compute, communicate):
    """The fraction of perfect scaling: without overlap, and if the backward pass hides what it can.

    The backward pass is two thirds of a step.
    """
    exposed = max(0.0, communicate - 2 / 3 * compute)
    return compute / (compute + communicate), compute / (compute + exposed)


def measured_on_a_processor():
    """Milliseconds of the baseline's step of 128 images, and the processor, by `scaling.py`."""
    path = side_by_side.RESULTS / "scaling.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    (row,) = [row for row in content["sweeps"]["batch"] if row["name"] == "baseline"]
    return row["milliseconds"], f"{content['cores']} cores of an {content['processor']}"


def main():
    for lines in (assumptions(), steps(), efficiencies(), speed_ups()):
        print("\n".join(lines), end="\n\n")


def table(*rows):
    """Rows of cells as Markdown, the first one as head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]]


def assumptions():
    infiniband, ethernet = MACHINES
    return table(
        ("assumption", "value", "from"),
        ("rate of a GPU", f"{H100 / 1e12:.0f} TFLOP/s", "data sheet of H100 SXM, dense bfloat16"),
        ("fraction of it that a step reaches", f"{RATE_REACHED:.0%}", "assumed"),
        ("NVLink, each direction", f"{NVLINK / 1e9:.0f} GB/s a GPU", "data sheet"),
        ("InfiniBand", f"{INFINIBAND / 1e9:.0f} GB/s a GPU", "data sheet of DGX H100"),
        ("Ethernet", f"{ETHERNET / 1e9:.1f} GB/s a host of {BOARD} GPUs", "100 Gb/s"),
        ("fraction of a bandwidth that is reached", f"{BANDWIDTH_REACHED:.0%}", "assumed"),
        (
            "latency of a message: NVLink, InfiniBand, Ethernet",
            ", ".join(
                f"{1e6 * link.latency:.0f}"
                for link in (infiniband.board, infiniband.network, ethernet.network)
            )
            + " µs",
            "assumed",
        ),
        ("gradients", f"{BYTES} bytes a parameter", "float32, all of them in each step"),
        ("launching kernels, reading images, waiting for the slowest", "0", "left out"),
    )


def steps():
    rows = [("model", "parameters", "gradients", "GFLOP an image", "images a GPU", "step")]
    for model in MODELS:
        count = parameters(model.recipe, model.image_shape, model.classes)
        cost = operations(model.recipe, model.image_shape) / 1e9
        for images in model.per_device:
            milliseconds = 1e3 * model.seconds(images, MACHINES[0])
            rows.append(
                (
                    model.name,
                    f"{count / 1e6:.1f} M",
                    f"{model.gradient / 1e6:.1f} MB",
                    f"{cost:.2f}",
                    images,
                    f"{milliseconds:.2f} ms",
                )
            )
    return table(*rows)


def efficiencies():
    """The same batch on each device, however many there are."""
    hosts = [f"{count} hosts" for count in HOSTS]
    rows = [("model", "images a device", "between hosts", "one host", *hosts)]
    for model in MODELS:
        for images in model.per_device:
            for machine in MACHINES:
                compute = model.seconds(images, machine)
                found = [
                    efficiency(compute, communication(model.gradient, count, machine))
                    for count in (1, *HOSTS)
                ]
                rows.append((model.name, images, machine.name, *map(_range, found)))
    milliseconds, processor = measured_on_a_processor()
    baseline = MODELS[0]
    found = [
        efficiency(milliseconds / 1e3, all_reduce(baseline.gradient, count, SLOW_ETHERNET))
        for count in HOSTS
    ]
    name = f"Ethernet, 10 Gb/s a host, {processor} ({milliseconds / 1e3:.2f} s a step, measured)"
    rows.append((baseline.name, 128, name, "", *map(_range, found)))
    return table(*rows)


def speed_ups():
    """The same batch on all devices together, so that the result of the training stays."""
    counts = (2, 4, 8), HOSTS
    head = [f"{n} GPUs" for n in counts[0]] + [f"{n} hosts" for n in counts[1]]
    rows = [("model", "images a step", *head)]
    machine = MACHINES[0]
    for model in MODELS:
        alone = model.seconds(model.whole, machine)
        cells = []
        for hosts, devices in [*((1, n) for n in counts[0]), *((n, BOARD) for n in counts[1])]:
            if hosts * devices > model.whole:
                cells.append("-")
                continue
            slow, fast = efficiency(
                alone / hosts / devices, communication(model.gradient, hosts, machine, devices)
            )
            cells.append(f"{slow * hosts * devices:.1f} to {fast * hosts * devices:.1f}")
        rows.append((model.name, model.whole, *cells))
    return table(*rows)


def _range(efficiencies):
    slow, fast = efficiencies
    return f"{slow:.0%} to {fast:.0%}" if f"{slow:.0%}" != f"{fast:.0%}" else f"{slow:.0%}"


if __name__ == "__main__":
    main()
