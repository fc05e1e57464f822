"""What a training costs."""


def operations(recipe, image_shape):
    """Floating point operations of training on one image, forwards and backwards.

    Every product of matrices counts but for the head's, the optimizer's and the augmentation's.

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
    # A product has two gradients, one for each factor; that of the pixels is not needed.
    return 2 * (3 * blocks + 2 * embedding)
