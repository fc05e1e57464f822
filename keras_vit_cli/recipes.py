"""What to train and how, as data: every number that a researcher wants to change.

A recipe's `description` and `result` say what it trains, how, and what that reached.
"""

import dataclasses
import typing


def option(default, help, low=None, high=None, below=None, above=None, choices=None) -> typing.Any:
    """A field that becomes a command line option.

    Args:
        default: default value.
        help: string, its line in `--help`.
        low, high: smallest and largest value that are allowed.
        above, below: values between which it must lie, both excluded.
        choices: values that are allowed.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe fixes; each field with a help line is an option of the command line.

    Attributes:
        description: string, what it trains and how.
        result: string, what that reached, with data, seeds, hardware and time.
        cpu_epochs: int, number of epochs without a GPU, unless `--epochs` is given.
        images_seen: int, training images in all epochs together, unless `--epochs` is given.
        needs_weights: bool, whether it starts from pretrained weights alone.
    """

    description: str = ""
    result: str = ""
    cpu_epochs: int | None = None
    images_seen: int | None = None
    needs_weights: bool = False
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
        "fractions of the run after which the learning rate falls to a tenth",
        above=0,
        below=1,
    )
    warmup: float = option(
        0.0, "fraction of the run in which a cosine's learning rate rises from zero", low=0, below=1
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
    freeze: int = option(0, "freeze the embeddings and the first N blocks", low=0)
    dropout: float = option(0.2, "rate of every dropout", low=0, below=1)
    stochastic_depth: float = option(
        0.0, "drop path rate of the last block; lower before it", low=0, below=1
    )
    augmentation: bool = option(True, "flip and crop training images at random")
    crop_scale: tuple = option(
        (0.8, 1.0),
        "smallest and largest fraction of an image's area that a crop covers",
        above=0,
        high=1,
    )
    crop_ratio: tuple = option((0.9, 1.1), "smallest and largest aspect ratio of a crop", above=0)
    image_scales: tuple = option(
        (),
        "sides of the training images early in the run, as fractions of the whole side",
        above=0,
        below=1,
    )
    image_scale_milestones: tuple = option(
        (),
        "fractions of the run after which they grow, one for each of --image-scales",
        above=0,
        below=1,
    )
    horizontal_flip: bool = option(
        True, "mirror half of the training images, if the data set allows it"
    )
    trivial_augment: bool = option(False, "apply TrivialAugment to each training image")
    erasing: float = option(
        0.0, "probability of random erasing, for each training image", low=0, high=1
    )
    mixup: float = option(0.0, "fraction of the batches that MixUp blends", low=0, high=1)
    cutmix: float = option(
        0.0, "fraction of the batches in which CutMix pastes boxes", low=0, high=1
    )
    label_smoothing: float = option(
        0.0, "probability taken from the label and spread over all classes", low=0, below=1
    )
    class_weights: str | None = option(
        None, "weight the loss so that every class counts the same", choices=("balanced",)
    )
    early_stopping: int | None = option(
        None, "stop after N epochs without a better validation accuracy", low=1
    )

    @property
    def usual_epochs(self):
        """What `--help` says of the number of epochs."""
        if self.images_seen:
            return f"as many as take {self.images_seen:,} images"
        return f"{self.epochs}" + (f"; {self.cpu_epochs} without a GPU" if self.cpu_epochs else "")

    def epochs_for(self, images, has_gpu):
        """How many epochs suit a number of training images and a device, and why, if not `epochs`.

        Args:
            images: int.
            has_gpu: bool.

        Returns:
            Int, and a string or None.
        """
        if self.images_seen:
            return max(1, round(self.images_seen / images)), f"{self.images_seen:,} images seen"
        if self.cpu_epochs and not has_gpu:
            return self.cpu_epochs, f"no GPU found; {self.epochs} with one"
        return self.epochs, None


# The options among the fields of a recipe.
RECIPE_OPTIONS = tuple(x for x in dataclasses.fields(Recipe) if "help" in x.metadata)

RECIPES = {
    "baseline": Recipe(
        description="A small Vision Transformer, 3.2 million parameters, trained as tutorials do: "
        "AdamW at 3e-4, divided by ten after 100 and after 150 of 160 epochs; flip and mild crop. "
        "All variables decay, as with PyTorch's `AdamW(model.parameters())`.",
        result="72.0 % on CIFAR-10 after `--epochs 12 --precision bfloat16`, seed 0: 1.9 hours on "
        "one core of an AMD EPYC with AVX-512, beside other work.",
        cpu_epochs=5,
    ),
    "strong": Recipe(
        description="1.8 million parameters, mean pooling over the patches, Muon, TrivialAugment "
        "and a wider crop, on images that grow from 16x16 to 32x32 pixels, for a few hours on two "
        "CPU cores; kernels alone decay.",
        result="90.4 % on CIFAR-10, seed 0, for 1.5e15 FLOP: 2.3 hours on one and two cores of an "
        "Intel Xeon with AMX, by `--backend torch --precision bfloat16` beside other work. 91.4 % "
        "after 45 more epochs from there, 2.8e15 FLOP in all.",
        epochs=60,
        optimizer="muon",
        learning_rate=2.5e-3,
        weight_decay=0.1,
        decay_kernels_only=True,
        schedule="cosine",
        warmup=0.05,
        embed_dim=192,
        mlp_dim=384,
        num_heads=3,
        pooling="mean",
        dropout=0.0,
        crop_scale=(0.6, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        image_scales=(0.5, 0.75),
        image_scale_milestones=(0.2, 0.6),
        trivial_augment=True,
        label_smoothing=0.1,
    ),
    "quick": Recipe(
        description="A narrow model, mean pooling over the patches and Muon for eight epochs of "
        "CIFAR-10 on images that grow from 16x16 to 32x32 pixels, for a machine without a GPU; "
        "kernels alone decay.",
        result="78.3 ± 0.2 % on CIFAR-10, three seeds, for 4.5e13 FLOP each: 13 to 18 minutes on "
        "one core of an AMD EPYC with AVX-512, in float32 beside other work.",
        images_seen=400_000,
        epochs=8,
        batch_size=64,
        optimizer="muon",
        learning_rate=4e-3,
        weight_decay=0.05,
        decay_kernels_only=True,
        schedule="cosine",
        warmup=0.1,
        embed_dim=128,
        mlp_dim=256,
        num_heads=2,
        depth=4,
        pooling="mean",
        dropout=0.0,
        image_scales=(0.5, 0.75),
        image_scale_milestones=(0.5, 0.75),
        label_smoothing=0.1,
    ),
    "finetune": Recipe(
        description="For `--init-from`: pretrained weights learn other classes, such as a folder "
        "of photos, with Muon; the architecture is that of the weights.",
        result="In 15 epochs from `cifar10-strong`, two seeds: 75.3 ± 0.4 % on photos of clothing, "
        "98.1 ± 0.2 % on sign language digits, 93.2 ± 1.0 % on weather, at 32x32 pixels: 3 to 14 "
        "minutes on one core of an AMD EPYC.",
        needs_weights=True,
        epochs=30,
        batch_size=32,
        optimizer="muon",
        learning_rate=1.5e-3,
        weight_decay=0.05,
        decay_kernels_only=True,
        schedule="cosine",
        warmup=0.1,
        dropout=0.0,
        crop_scale=(0.5, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        label_smoothing=0.1,
    ),
    "digits": Recipe(
        description="scikit-learn's 1,438 training digits: for `--dataset digits`, and where "
        "CIFAR-10 cannot be downloaded; kernels alone decay. The 8x8 scans are enlarged to 32x32, "
        "so a patch of 8x8 covers 2x2 pixels of a scan.",
        result="98.6 % of the 359 test digits, seed 0, in under three minutes on two cores of an "
        "Intel Xeon.",
        images_seen=43_140,
        epochs=30,
        batch_size=32,
        learning_rate=1e-3,
        decay_kernels_only=True,
        patch_size=8,
        dropout=0.1,
    ),
}
# The recipe where nobody names one, and data sets that another suits better.
DEFAULT_RECIPE = "baseline"
DEFAULT_RECIPES = {"digits": "digits"}
FINETUNE = "finetune"  # With `--init-from`.
