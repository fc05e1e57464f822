"""What to train and how, as data: every number that a researcher wants to change."""

import dataclasses
import typing


def option(default, help, low=None, high=None, below=None, above=None, choices=None):
    """A field that becomes a command line option.

    Args:
        default: its value where nobody says otherwise.
        help: string, its line in `--help`.
        low, high: smallest and largest value that are allowed.
        above, below: values between which it must lie, both excluded.
        choices: values that are allowed.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that a recipe fixes.

    Without `--epochs`, `cpu_epochs` stands in for `epochs` where there is no GPU, and a recipe with
    `images_seen` trains for as many epochs as show that many images.
    """

    cpu_epochs: typing.ClassVar[int | None] = None
    images_seen: typing.ClassVar[int | None] = None
    epochs: int = option(160, "passes over the training images", low=1)
    batch_size: int = option(128, "images in a batch", low=1)
    optimizer: str = option(
        "adamw",
        "AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest",
        choices=("adamw", "muon"),
    )
    learning_rate: float = option(3e-4, "highest learning rate", above=0)
    weight_decay: float = option(0.01, "decoupled weight decay", low=0)
    decay_kernels_only: bool = option(
        False, "exempt biases, normalization, class token and positions from weight decay"
    )
    schedule: str = option(
        "milestones",
        "how the learning rate falls: at milestones, or with each step along a cosine to zero",
        choices=("milestones", "cosine"),
    )
    milestones: tuple = option(
        (100 / 160, 150 / 160),
        "shares of the run after which the learning rate falls to a tenth",
        above=0,
        below=1,
    )
    warmup: float = option(
        0.0, "share of the run in which a cosine's learning rate rises from zero", low=0, below=1
    )
    patch_size: int = option(4, "side of a patch in pixels", low=1)
    embed_dim: int = option(256, "width of a token", low=1)
    mlp_dim: int = option(512, "width of the hidden layer of a block's MLP", low=1)
    num_heads: int = option(8, "attention heads of a block", low=1)
    depth: int = option(6, "number of transformer blocks", low=1)
    pooling: str = option(
        "token",
        "what the head reads: a class token, or the mean of the patches' tokens",
        choices=("token", "mean"),
    )
    dropout: float = option(0.2, "rate of every dropout", low=0, below=1)
    stochastic_depth: float = option(
        0.0, "how often training leaves out the last block; fewer before it", low=0, below=1
    )
    augmentation: bool = option(True, "flip and crop training images at random")
    crop_scale: tuple = option(
        (0.8, 1.0),
        "smallest and largest fraction of an image's area that a crop covers",
        above=0,
        high=1,
    )
    crop_ratio: tuple = option((0.9, 1.1), "smallest and largest aspect ratio of a crop", above=0)
    horizontal_flip: bool = option(True, "mirror some of them, where that keeps the class")
    trivial_augment: bool = option(False, "distort each training image in one way at random")
    erasing: float = option(0.0, "share of the training images that lose a box", low=0, high=1)
    mixup: float = option(0.0, "share of the batches whose images are blended", low=0, high=1)
    cutmix: float = option(
        0.0, "share of the batches whose images get a box of another", low=0, high=1
    )
    label_smoothing: float = option(
        0.0, "probability taken from the label and shared out among all", low=0, below=1
    )


@dataclasses.dataclass(frozen=True)
class Baseline(Recipe):
    """A small Vision Transformer, 3.2 million parameters, trained as tutorials do.

    AdamW at 3e-4, divided by ten after 100 and after 150 of 160 epochs; flip and mild crop. All
    variables decay, as with PyTorch's `AdamW(model.parameters())`. `--epochs 12` reached 70.7 % on
    CIFAR-10, one seed, in two hours on two cores of an AMD EPYC.
    """

    cpu_epochs: typing.ClassVar[int | None] = 5


@dataclasses.dataclass(frozen=True)
class Quick(Recipe):
    """A narrow model and Muon for four epochs of CIFAR-10: for two CPU cores and ten minutes.

    73.7 ± 0.5 % on CIFAR-10, three seeds, for 4.6e13 FLOP each: 16 minutes on one core of an Intel
    Xeon with AVX-512, in float32 beside other work. Kernels alone decay.
    """

    images_seen: typing.ClassVar[int | None] = 200_000
    epochs: int = 4
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    decay_kernels_only: bool = True
    schedule: str = "cosine"
    warmup: float = 0.1
    embed_dim: int = 128
    mlp_dim: int = 256
    num_heads: int = 2
    depth: int = 4
    pooling: str = "mean"
    dropout: float = 0.0
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class Strong(Recipe):
    """1.8 million parameters, Muon, TrivialAugment and a wider crop: for a night on two CPU cores.

    88.1 % on CIFAR-10, seed 0, for 1.5e15 FLOP: 2.3 hours on one and two cores of an Intel Xeon
    with AMX, by `--backend torch --precision bfloat16` beside other work. Kernels alone decay.
    """

    epochs: int = 40
    optimizer: str = "muon"
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    decay_kernels_only: bool = True
    schedule: str = "cosine"
    warmup: float = 0.05
    embed_dim: int = 192
    mlp_dim: int = 384
    num_heads: int = 3
    pooling: str = "mean"
    dropout: float = 0.0
    crop_scale: tuple = (0.6, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    trivial_augment: bool = True
    label_smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class Digits(Recipe):
    """scikit-learn's 1,438 training digits, for where there is no other data.

    98.6 % of the 359 test digits, one seed, in under three minutes on two cores of an Intel Xeon.
    Kernels alone decay. The scans have 8x8 pixels, so that a patch of 8x8 out of 32x32 holds four.
    """

    images_seen: typing.ClassVar[int | None] = 43_140
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    decay_kernels_only: bool = True
    patch_size: int = 8
    dropout: float = 0.1


RECIPES = {"baseline": Baseline, "strong": Strong, "quick": Quick, "digits": Digits}
# The recipe where nobody names one, and sets that another suits better.
RECIPE = "baseline"
DEFAULT_RECIPES = {"digits": "digits"}
