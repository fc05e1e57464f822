"""What a page needs to show the attention of a model and to recompute its rollout."""

import base64
import io

import numpy as np
from PIL import Image

from keras_vit.attention import attention_scores
from keras_vit.model import augmented_for_display

# Bytes of attention in one page, a byte for each score.
BUDGET = 3 * 2**20
MOST_IMAGES = 12
# Five points of Matplotlib's map viridis, which rises evenly in brightness.
COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")


def pack(model, images, titles):
    """Attention on a few images as plain values for JSON, in 8 bits a score.

    Args:
        model: a `VisionTransformer`.
        images: uint8 array `(B, H, W, C)`; of so many that their attention takes over 3 MiB, the
            first ones.
        titles: list of strings, one for each image.

    Returns:
        Dictionary: sizes, `images` with title and data URI, as they are cut into patches,
        `levels`, base64 of bytes `(B, L, A, T, T)`, and `scales`, base64 of float32
        `(B, L, A, T)`. A score is the square of its level over 255, times its row's scale: small
        ones are finer than large ones.

    Raises:
        ValueError: if the attention on a single image takes over 3 MiB.
    """
    patches, config = model.get_layer("patches"), model.get_config()
    _, height, width, _ = patches.input.shape
    rows, columns = height // patches.patch_size, width // patches.patch_size
    class_token = model.pooling == "token"
    size = config["depth"] * config["num_heads"] * (class_token + rows * columns) ** 2
    count = min(BUDGET // size, MOST_IMAGES, len(images))
    if count == 0:
        raise ValueError(
            f"Expected a model with at most {BUDGET:,} attention scores for an image. "
            f"Received: {size:,}"
        )
    scores = attention_scores(model, images[:count])
    cut = augmented_for_display(model.augmentation, images[:count])
    cut = np.clip(np.round(cut), 0, 255).astype("uint8")
    scales = scores.max(axis=-1)
    levels = np.round(255 * np.sqrt(scores / scales[..., None])).astype("uint8")
    _, blocks, heads, tokens, _ = scores.shape
    return {
        **{"height": height, "width": width, "rows": rows, "columns": columns},
        **{"blocks": blocks, "heads": heads, "tokens": tokens},
        "class_token": class_token,
        "images": [
            {"title": title, "source": data_uri(image)} for title, image in zip(titles, cut)
        ],
        "levels": base64.b64encode(levels.tobytes()).decode(),
        "scales": base64.b64encode(scales.astype("<f4").tobytes()).decode(),
    }


def data_uri(image):
    """An image `(H, W, C)` of uint8 as the address of a PNG inside the page."""
    file = io.BytesIO()
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(file, "PNG")
    return png_uri(file.getvalue())


def png_uri(content):
    """The bytes of a PNG file as an address inside the page."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
