"""What a trained model attends to: attention scores, and Attention Rollout."""

import keras
import numpy as np
from keras import ops

from keras_vit.arguments import share_below_one

BATCH_SIZE = 64


def attention_scores(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Attention of every head of every block of a model.

    Args:
        model: a `VisionTransformer`, fresh from training or loaded from a file.
        images: array `(B, H, W, C)` of raw pixels, as the model takes them.

    Returns:
        NumPy array `(B, L, A, T, T)`, float32: in block `l` and head `a`, token `t` attends to
        token `s` with weight `scores[b, l, a, t, s]`. Each row sums to one; token 0 is the class
        token, the others are the patches, row by row.

    Raises:
        ValueError: if the model has no `MultiHeadAttention` layer, or takes images of another
            shape.
    """
    attentions = [x for x in model.layers if isinstance(x, keras.layers.MultiHeadAttention)]
    if not attentions:
        raise ValueError(
            "Expected a model with `MultiHeadAttention` layers in its graph. "
            f"Received: model={model.name!r} with none"
        )
    shape, expected = tuple(images.shape), model.input_shape
    fits = len(shape) == len(expected) and all(b in (a, None) for a, b in zip(shape, expected))
    if not fits or 0 in shape:
        raise ValueError(
            f"Expected `images` of shape {expected} with at least one of them. "
            f"Received: images.shape={shape}"
        )
    scores = [_Scores(attention)(attention.input) for attention in attentions]
    explainer = keras.Model(model.input, ops.stack(scores, axis=1))
    batches = np.array_split(images, range(BATCH_SIZE, len(images), BATCH_SIZE))
    outputs = [ops.convert_to_numpy(explainer(batch, training=False)) for batch in batches]
    return np.concatenate(outputs).astype("float32")


def attention_rollout(
    scores: np.ndarray, head_fusion: str = "mean", discard_ratio: float = 0.0
) -> np.ndarray:
    """Follows attention through all blocks (Abnar & Zuidema, 2020).

    In each block the heads are fused into one matrix, which is averaged with the identity for the
    residual connection; its rows are scaled to sum to one. The product of these matrices, from
    the first block to the last, tells how much each token of the input weighs in each token of
    the output.

    Args:
        scores: array `(B, L, A, T, T)`, as `attention_scores` returns it.
        head_fusion: `"mean"`, `"max"` or `"min"` over the heads.
        discard_ratio: float in [0, 1), share of the entries of each fused matrix that are set to
            zero, the smallest first. Attention to the class token is never discarded.

    Returns:
        Array `(B, T, T)`; each row sums to one. `rollout[:, 0, 1:]` is how much each patch weighs
        in the class token, which the classifier reads.

    Raises:
        ValueError: if the scores have another shape or hold no finite, non-negative numbers, or
            if an option lies outside its range.
    """
    scores = np.asarray(scores)
    if scores.ndim != 5 or scores.shape[-1] != scores.shape[-2] or 0 in scores.shape:
        raise ValueError(
            "Expected `scores` of shape (batch, blocks, heads, tokens, tokens). "
            f"Received: scores.shape={scores.shape}"
        )
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype("float32")
    if not np.isfinite(scores).all() or (scores < 0).any():
        raise ValueError(
            "Expected `scores` to be finite and non-negative. Received: numbers from "
            f"{scores.min()} to {scores.max()}"
        )
    if head_fusion not in ("mean", "max", "min"):
        raise ValueError(
            "Expected `head_fusion` to be 'mean', 'max' or 'min'. "
            f"Received: head_fusion={head_fusion!r}"
        )
    share_below_one("discard_ratio", discard_ratio)

    identity = np.eye(scores.shape[-1], dtype=scores.dtype)
    rollout = np.broadcast_to(identity, scores[:, 0, 0].shape)
    for block in range(scores.shape[1]):
        attention = getattr(scores[:, block], head_fusion)(axis=1)
        attention = _discard(attention, discard_ratio) + identity
        attention /= attention.sum(axis=-1, keepdims=True)
        rollout = attention @ rollout
    return rollout


class _Scores(keras.layers.Layer):
    """Leads the scores out of an attention layer, which by itself returns tokens only."""

    def __init__(self, attention):
        super().__init__(dtype=attention.dtype_policy)
        self.attention = attention

    def call(self, inputs):
        # The last block asks for the class token's scores alone; here every token asks.
        _, tokens = inputs
        return self.attention(tokens, tokens, return_attention_scores=True)[1]


def _discard(attention, ratio):
    """Zeroes the smallest entries of each matrix `(B, T, T)`, but for the class token's column."""
    batch, tokens, _ = attention.shape
    count = int(tokens * tokens * ratio)
    if count == 0:
        return attention
    flat = attention.reshape(batch, -1).copy()
    smallest = np.argpartition(flat, count - 1, axis=1)[:, :count]
    np.put_along_axis(flat, smallest, 0, axis=1)
    kept = flat.reshape(attention.shape)
    kept[..., 0] = attention[..., 0]
    return kept
