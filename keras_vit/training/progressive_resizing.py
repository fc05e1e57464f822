"""Progressive resizing: a run that starts on smaller images, for more epochs in the same time.

A smaller image has fewer patches, which cost less. Position embeddings are interpolated when the
images grow.
"""

import typing

from keras import ops

from keras_vit.layers import RandomResizedCrop
from keras_vit.training.checkpoints import state_of
from keras_vit.transfer import grid, resampled_positions, with_crops_of


class Stage(typing.NamedTuple):
    """Epochs of a run on images of one size.

    Attributes:
        end: int, the number of epochs after which it ends.
        size: pair `(height, width)` of the training images after their augmentation, in pixels.
    """

    end: int
    size: tuple[int, int]


def stages_of(recipe, image_shape):
    """The stages of a run, the last one on images of full size.

    Args:
        recipe: a `Recipe`.
        image_shape: tuple `(H, W, C)`.

    Returns:
        List of `Stage`; those without an epoch are left out.
    """
    height, width, _ = image_shape
    patch, stages = recipe.patch_size, []
    for scale, milestone in zip(recipe.image_scales, recipe.image_scale_milestones):
        end = min(round(milestone * recipe.epochs), recipe.epochs - 1)
        size = tuple(max(1, round(scale * side / patch)) * patch for side in (height, width))
        if end > (stages[-1].end if stages else 0):
            stages.append(Stage(end, size))
    return [*stages, Stage(recipe.epochs, (height, width))]


def resized(model, size, interpolate=False):
    """A model with the weights of another one, whose crops give images of another size.

    Args:
        model: a `VisionTransformer` with a `RandomResizedCrop` among its augmentation.
        size: pair `(height, width)` in pixels.
        interpolate: bool, whether position embeddings are interpolated, as suits trained ones;
            else they are new.

    Returns:
        A `VisionTransformer`.

    Raises:
        ValueError: if no layer of the augmentation is a `RandomResizedCrop`.
    """
    config = model.get_config()
    if not any(isinstance(layer, RandomResizedCrop) for layer in model.augmentation):
        raise ValueError(
            "Expected a `RandomResizedCrop` in the model's augmentation, which progressive "
            f"resizing needs. Received: augmentation={model.augmentation}"
        )
    layers = with_crops_of(config["augmentation"], size)
    other = type(model).from_config({**config, "augmentation": layers})
    for variable, new in zip(model.variables, other.variables, strict=True):
        if variable.shape == new.shape:
            new.assign(variable)
        elif interpolate:
            value = ops.convert_to_numpy(variable)
            new.assign(resampled_positions(value, grid(model), grid(other)))
    return other


def transfer(source, target):
    """Gives a model the state of another one that was compiled alike, optimizer and seeds included.

    Position embeddings, and what the optimizer keeps of them, are interpolated.

    Args:
        source: a `VisionTransformer`, compiled.
        target: one that differs only in the size of its images after the augmentation.
    """
    grids = grid(source), grid(target)
    frozen = {id(x) for x in target.non_trainable_variables}
    for variable, other in zip(state_of(source), state_of(target), strict=True):
        value = ops.convert_to_numpy(variable)
        if value.shape != tuple(other.shape):
            if id(other) in frozen:  # It is at its size what it shall stay.
                continue
            value = resampled_positions(value, *grids)
        other.assign(value)
