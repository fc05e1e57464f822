"""Training cost in floating point operations."""

from keras_vit.training.progressive_resizing import stages_of


def operations(recipe, image_shape):
    """Floating point operations of the forward and backward pass of one training image.

    Counts all matrix products except those of the head, the optimizer and the augmentation.

    Args:
        recipe: a `Recipe`.
        image_shape: tuple `(H, W, C)`.

    Returns:
        Int.
    """
    height, width, channels = image_shape
    patches = (height // recipe.patch_size) * (width // recipe.patch_size)
    has_token = recipe.pooling == "token"
    tokens, dim = patches + has_token, recipe.embed_dim
    # Query, attention and MLP of one token; keys and values are projected for all tokens.
    token = 2 * dim**2 + 2 * dim * recipe.mlp_dim + 2 * tokens * dim
    keys_and_values = tokens * 2 * dim**2
    last = 1 if has_token else tokens
    blocks = recipe.depth * keys_and_values + ((recipe.depth - 1) * tokens + last) * token
    embedding = patches * recipe.patch_size**2 * channels * dim
    # A matrix product has two gradients, one per factor; the pixels need none.
    return 2 * (3 * blocks + 2 * embedding)


def costs_of_epochs(recipe, image_shape):
    """Floating point operations of each epoch of a run, for one training image.

    Args:
        recipe: a `Recipe`.
        image_shape: tuple `(H, W, C)`, the shape of the images at full size.

    Returns:
        List of `recipe.epochs` ints.
    """
    costs, channels = [], image_shape[-1]
    for stage in stages_of(recipe, image_shape):
        cost = operations(recipe, (*stage.size, channels))
        costs += [cost] * (stage.end - len(costs))
    return costs
