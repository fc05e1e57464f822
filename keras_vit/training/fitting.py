"""Building, compiling and fitting a model from a recipe."""

import keras
import numpy as np

from keras_vit import distribution
from keras_vit.data.batches import InOrder, batches_of, fed
from keras_vit.data.dataset import digest
from keras_vit.data.streaming import sample
from keras_vit.devices import accelerators, on_jax_accelerator
from keras_vit.layers import MixUpCutMix, TrivialAugment
from keras_vit.losses import LabelSmoothingCrossentropy
from keras_vit.messages import is_terminal
from keras_vit.model import VisionTransformer, default_augmentation
from keras_vit.training.checkpoints import FOLDER, extend, newest_of_first
from keras_vit.training.flops import costs_of_epochs
from keras_vit.training.journal import Journal
from keras_vit.training.optimizers import Muon
from keras_vit.training.progressive_resizing import resized, stages_of, transfer
from keras_vit.training.schedules import learning_rate, step_schedule
from keras_vit.transfer import copy_weights

# Training steps per dispatch with JAX on an accelerator.
STEPS_AT_ONCE = 32


def build_model(dataset, recipe, dtype=None, pretrained=None):
    """An untrained model, adapted to the training images; or one with pretrained weights.

    Args:
        dataset: a `Dataset`.
        recipe: a `Recipe`.
        dtype: dtype policy of the layers.
        pretrained: a `VisionTransformer` with the recipe's architecture, whose weights and
            normalization the model takes over. Its position embeddings are interpolated for
            images of another size; its head is taken over only for the same classes.

    Returns:
        A `VisionTransformer`.

    Raises:
        ValueError: if the recipe's sizes do not match the images or each other.
    """
    if recipe.freeze > recipe.depth:
        raise ValueError(
            f"Expected `freeze` to be at most the number of blocks, {recipe.depth}. "
            f"Received: freeze={recipe.freeze}"
        )
    model = VisionTransformer(
        dataset.image_shape,
        len(dataset.class_names),
        patch_size=recipe.patch_size,
        embed_dim=recipe.embed_dim,
        mlp_dim=recipe.mlp_dim,
        num_heads=recipe.num_heads,
        depth=recipe.depth,
        dropout=recipe.dropout,
        stochastic_depth=recipe.stochastic_depth,
        pooling=recipe.pooling,
        class_names=dataset.class_names,
        augmentation=augmentation(dataset, recipe),
        dtype=dtype,
        resize=dataset.resize,
    )
    model.seen = dataset.seen
    if pretrained is None:
        model.adapt(sample(dataset.train_images))
    else:
        copy_weights(pretrained, model, head=pretrained.class_names == model.class_names)
        model.seen = tuple(sorted({*pretrained.seen, *dataset.seen}))
    if recipe.freeze:
        for layer in layers_up_to(model, recipe.freeze):
            layer.trainable = False
    return model


def layers_up_to(model, block):
    """The layers of a model from its input to a block, counted from one, the augmentation aside."""
    names = [layer.name for layer in model.layers]
    first = names.index("normalization")
    last = names.index(f"block_{block}_mlp_sum")
    return model.layers[first : last + 1]


def augmentation(dataset, recipe):
    """The augmentation layers of a recipe, for the training images of a data set.

    Args:
        dataset: a `Dataset`.
        recipe: a `Recipe`.

    Returns:
        List of layers.
    """
    layers = []
    if recipe.augmentation:
        mirror = dataset.horizontal_flip and recipe.horizontal_flip
        crop = {"scale": recipe.crop_scale, "ratio": recipe.crop_ratio}
        layers += default_augmentation(dataset.image_shape, mirror, **crop)
    if recipe.trivial_augment:
        layers.append(TrivialAugment(dtype="float32", name="trivial_augment"))
    if recipe.erasing:
        probability = (recipe.erasing, recipe.erasing)
        layers.append(
            keras.layers.RandomErasing(
                probability,
                fill_value=128,
                data_format="channels_last",
                dtype="float32",
                name="erasing",
            )
        )
    if recipe.mixup or recipe.cutmix:
        layers.append(MixUpCutMix(recipe.mixup, recipe.cutmix, dtype="float32", name="mix"))
    return layers


def fit(
    model,
    dataset,
    recipe,
    seed=0,
    validation=None,
    run_dir=None,
    tensorboard=False,
    save_every=None,
    pretrained=None,
    extends=False,
):
    """Compiles and trains a model with a recipe, resuming from the newest checkpoint if any.

    Args:
        model: a `VisionTransformer`, adapted to the training images. With progressive resizing
            (`recipe.image_scales`), smaller ones are trained first, and it takes over their state.
        dataset: a `Dataset`.
        recipe: a `Recipe`.
        seed: int, seed of the order of the images.
        validation: pair `(images, labels)` to evaluate on after each epoch.
        run_dir: `Path` of an existing folder for `history.csv`, `best.keras` (with `validation`),
            checkpoints and TensorBoard logs. If it has a checkpoint, training resumes from it.
        tensorboard: bool, whether to write TensorBoard logs.
        save_every: int, minimum number of steps between checkpoints within an epoch; each epoch
            ends with a checkpoint anyway.
        pretrained: the `VisionTransformer` that `build_model` was given, if any.
        extends: bool, whether the optimizer's state continues from that of `pretrained`, which
            must be compiled as the recipe says. The schedule starts anew.

    Returns:
        Dictionary of lists with one value per epoch: `loss`, `accuracy`, `learning_rate` and
        `seconds`, and `val_loss` and `val_accuracy` with `validation`. With a cosine schedule,
        `learning_rate` is the rate after the last step of the epoch.

    Raises:
        Interrupted: on SIGINT or SIGTERM, after the current dispatch of steps is finished and
            saved.
        Diverged: if the loss becomes NaN or infinite; the last checkpoint is from before that.
        DifferentData: if the checkpoint was made with different training images or labels.
        DifferentVariables: if it is of another model.
        CannotExtend: if `pretrained` has no optimizer of the recipe's kind to continue from.
        DistributionError: if the rest of an epoch fills no batch on the number of devices.
    """
    batches = batches_of(dataset.train_images, dataset.train_labels, recipe.batch_size, seed)
    stages = stages_of(recipe, dataset.image_shape)
    checkpoint = newest_of_first(run_dir / FOLDER) if run_dir else None
    last_epoch = checkpoint.last_epoch if checkpoint else 0
    # A run of more epochs than the recipe's has no stage left.
    first = next((i for i, x in enumerate(stages) if last_epoch < x.end), len(stages) - 1)

    # Adam's bias correction goes by the step, so an optimizer that continues keeps its count.
    before = pretrained.optimizer if extends and pretrained else None
    steps_before = int(getattr(before, "inner_optimizer", before).iterations) if before else 0

    def model_of(stage):
        at_size = model
        if stage is not stages[-1]:
            at_size = resized(model, stage.size, interpolate=pretrained is not None)
        compile_model(at_size, recipe, batches.num_batches, steps_before)
        return at_size

    current = model_of(stages[first])
    if extends and not checkpoint:
        extend(pretrained, current)
    data = digest(dataset) if run_dir else ""
    costs = costs_of_epochs(recipe, dataset.image_shape)
    journal = Journal(
        *(current, batches, run_dir, save_every, data, costs, checkpoint),
        early_stopping=recipe.early_stopping,
        small_until=stages[-2].end if len(stages) > 1 else 0,
    )
    padding = 1.0
    if validation is not None:
        images, labels = validation
        in_order = InOrder(images, labels, recipe.batch_size)
        padding, validation = in_order.padding, fed(in_order)
    logs = run_dir / "tensorboard" if tensorboard and run_dir and distribution.is_first() else None
    callbacks = _callbacks(journal, recipe, padding, logs)
    weights = class_weights(dataset.train_labels, recipe.class_weights)
    settings = {
        "shuffle": False,
        "class_weight": weights,
        "validation_data": validation,
        "callbacks": callbacks,
        # Otherwise the journal prints one line per epoch.
        "verbose": int(is_terminal()),
    }

    def fit_until(epochs):
        """Trains the current model, which grows with the images, up to a number of epochs."""
        if journal.epoch < epochs and not journal.stopped_early:
            if current.train_function is None:
                height, width = current.get_layer("patches").input.shape[1:3]
                print(
                    f"Compiling for images of {height}x{width} pixels: the first step takes "
                    "longer than the others.",
                    flush=True,
                )
            current.fit(fed(batches), initial_epoch=journal.epoch, epochs=epochs, **settings)

    with journal.running():
        # The rest of an interrupted epoch: the number of its batches differs from the others'.
        if checkpoint and journal.skipped:
            batches.start_epoch(journal.epoch + 1, journal.skipped)
            if not batches.num_batches:  # The other devices filled one batch more.
                raise distribution.DistributionError(
                    f"an epoch on {distribution.topology()} has fewer batches than the checkpoint "
                    f"was trained on: resume on {checkpoint.devices}"
                )
            fit_until(journal.epoch + 1)
            batches.start_epoch(journal.epoch + 1)
        fit_until(stages[first].end)
        for stage in stages[first + 1 :]:
            smaller, current = current, model_of(stage)
            transfer(smaller, current)
            fit_until(stage.end)
    measured = [key for key in journal.rows[0] if key not in ("epoch", "precision")]
    return {key: [row[key] for row in journal.rows] for key in measured}


def _callbacks(journal, recipe, padding, logs):
    """The callbacks of `fit`, in the order in which they act."""
    start = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: journal.start_epoch(epoch)
    )
    callbacks: list[keras.callbacks.Callback] = [Unpadded(padding), start]
    if recipe.schedule == "milestones":
        schedule, _ = step_schedule(recipe.learning_rate, recipe.epochs, recipe.milestones)
        # After the state is restored, and before the journal, which writes down the rate.
        callbacks.append(keras.callbacks.LearningRateScheduler(schedule))
    callbacks.append(journal)
    return callbacks + ([keras.callbacks.TensorBoard(logs)] if logs else [])


class Unpadded(keras.callbacks.Callback):
    """The callback that corrects the metrics of a padded validation set.

    Args:
        padding: float, the factor that they are too small by, as `InOrder` has it.
    """

    def __init__(self, padding):
        super().__init__()
        self.padding = padding

    def on_epoch_end(self, epoch, logs):
        for name in logs:
            if name.startswith("val_"):
                logs[name] *= self.padding  # Later callbacks get the same dictionary.


def class_weights(labels, kind):
    """The factor of each class in the loss.

    Args:
        labels: integer array `(N,)`, the true classes.
        kind: string, `"balanced"` for `N / (number of classes * images of the class)`, so that
            every class counts the same and the mean over the images is one; None for no weights.

    Returns:
        Dictionary of floats by class, or None.
    """
    if kind is None:
        return None
    classes, counts = np.unique(labels, return_counts=True)
    weights = len(labels) / (len(classes) * counts)
    return {int(label): float(weight) for label, weight in zip(classes, weights)}


def optimizer(model, recipe, steps_per_epoch, steps_before):
    """The recipe's optimizer, with the variables that it excludes from weight decay.

    Args:
        model: a `VisionTransformer`.
        recipe: a `Recipe`.
        steps_per_epoch: int, number of batches in an epoch.
        steps_before: int, as for `compile_model`.

    Returns:
        A Keras optimizer.
    """
    rate = learning_rate(recipe, steps_per_epoch, steps_before)
    precision = model.get_layer("norm").compute_dtype
    if recipe.optimizer == "muon":
        # float16 overflows where bfloat16 does not.
        iteration = "bfloat16" if precision == "bfloat16" else "float32"
        chosen = Muon(rate, weight_decay=recipe.weight_decay, iteration_dtype=iteration)
    else:
        chosen = keras.optimizers.AdamW(rate, weight_decay=recipe.weight_decay)
    if recipe.decay_kernels_only:
        others = [v for v in model.trainable_variables if v.name != "kernel"]
        chosen.exclude_from_weight_decay(var_list=others)
    # Small gradients would underflow in float16.
    return keras.optimizers.LossScaleOptimizer(chosen) if precision == "float16" else chosen


def compile_model(model, recipe, steps_per_epoch=1, steps_before=0):
    """Compiles a model with the recipe's optimizer, its loss and accuracy.

    Args:
        model: a `VisionTransformer`.
        recipe: a `Recipe`.
        steps_per_epoch: int, number of batches in an epoch.
        steps_before: int, number of steps that an extended run's optimizer has taken already.
    """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if recipe.label_smoothing:
        loss = LabelSmoothingCrossentropy(recipe.label_smoothing)
    # On a CPU, TensorFlow's own kernels run a training step faster than XLA's.
    on_tensorflow_cpu = keras.backend.backend() == "tensorflow" and not accelerators()
    # Keras itself dispatches distributed steps one by one.
    one_device = distribution.devices() == 1
    steps_at_once = STEPS_AT_ONCE if on_jax_accelerator() and one_device else 1
    model.compile(
        optimizer=optimizer(model, recipe, steps_per_epoch, steps_before),
        loss=loss,
        metrics=["accuracy"],
        jit_compile=False if on_tensorflow_cpu else "auto",
        steps_per_execution=steps_at_once,
    )
    # Built now rather than by the first step, which TensorFlow would trace twice, and because a
    # checkpoint can be restored only afterwards.
    model.optimizer.build(model.trainable_variables)
    logits = np.zeros((1, model.output_shape[-1]), "float32")
    model.compute_metrics(None, np.zeros((1,), "int32"), logits)
    model.reset_metrics()
