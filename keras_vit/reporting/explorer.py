"""The data of the attention explorer, from which its page recomputes the rollout."""

import base64
import io

import numpy as np
from PIL import Image

from keras_vit.attention import attention_scores
from keras_vit.model import augmented_for_display, check_is_vision_transformer
from keras_vit.transfer import grid

# Bytes of attention scores in one page, one per score.
MAX_BYTES = 3 * 2**20
MAX_IMAGES = 12
# Five points of Matplotlib's colour map viridis, which is perceptually uniform.
COLOURS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")


def pack(model, images, titles):
    """Attention scores for a few images as values for JSON, with 8 bits per score.

    Args:
        model: a `VisionTransformer`.
        images: uint8 array `(B, H, W, C)`. Only the first 12 are used, or fewer if the attention
            scores of all exceed 3 MiB; if those of one image do, the mean of its heads is used.
        titles: list of strings, one for each image.

    Returns:
        Dictionary of sizes; `images`, each with its title and, as a data URI, the image that the
        model splits into patches; `levels`, base64 of uint8 `(B, L, A, T, T)`; and `scales`,
        base64 of float32 `(B, L, A, T)`. A score is `(level / 255) ** 2 * scale` with the scale
        of its row, so small scores are resolved more finely than large ones.

    Raises:
        ValueError: if the model is not a `VisionTransformer`, if there are no images, or if the
            mean of the heads' attention scores exceeds 3 MiB for a single image.
    """
    check_is_vision_transformer(model)
    if not len(images):
        raise ValueError(f"Expected at least one image. Received: images.shape={images.shape}")
    patches, config = model.get_layer("patches"), model.get_config()
    _, height, width, _ = patches.input.shape
    rows, columns = grid(model)
    class_token = model.pooling == "token"
    size = config["depth"] * config["num_heads"] * (class_token + rows * columns) ** 2
    fused = size > MAX_BYTES
    if fused:
        size //= config["num_heads"]
    count = min(MAX_BYTES // size, MAX_IMAGES, len(images))
    if count == 0:
        raise ValueError(
            f"Expected a model with at most {MAX_BYTES:,} attention scores per image and head. "
            f"Received: model with {size:,}"
        )
    scores = attention_scores(model, images[:count])
    if fused:
        scores = scores.mean(axis=2, keepdims=True)
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
    """A uint8 image `(H, W, C)` as a data URI in PNG format, in colour or grey."""
    file = io.BytesIO()
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
    return png_uri(file.getvalue())


def png_uri(content):
    """The bytes of a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
