"""What a trained model attends to: attention scores, and Attention Rollout."""

import inspect

import keras
import numpy as np
from keras import ops

from keras_vit.model import VisionTransformer
from keras_vit.validation import share_below_one

BATCH_SIZE = 64


def attention_scores(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Attention of every head of every block of a model.

    The model runs once, in inference, and each attention layer returns its scores from that
    call: masks, causal attention and cross-attention are in them. A layer that the model calls
    several times counts as a block each time.

    The last block of a `VisionTransformer` computes no more tokens than its head reads. Here all of
    its tokens are queries, so that its matrix has the rows of the other blocks.

    Args:
        model: a `VisionTransformer`, fresh from training or loaded from a file, or another
            functional model whose attention layers (`keras.layers.MultiHeadAttention` and others
            with its `return_attention_scores`) stand in its own graph, not inside other layers.
        images: array `(B, H, W, C)` of raw pixels, as the model takes them; a list or dictionary of
            arrays for a model with several inputs.

    Returns:
        NumPy array `(B, L, A, T, S)`, float32: in block `l` and head `a`, token `t` attends to
        token `s` with weight `scores[b, l, a, t, s]`. Each row sums to one. `T` equals
        `S` except in cross-attention. In a `VisionTransformer` both are its
        tokens: the class token, if it has one, then the patches, row by row.

    Raises:
        ValueError: if the model has no attention layer; if one lies inside another layer, cannot
            return its scores, or returns them in another shape than `(B, A, T, S)` or than the
            blocks before it; or if the model takes images of another shape.
    """
    _check_graph(model)
    if len(model.inputs) == 1 and not isinstance(images, dict):
        images = np.asarray(images)
    inputs, expected = keras.tree.flatten(images), [tuple(x.shape) for x in model.inputs]
    shapes = [tuple(x.shape) for x in inputs]
    fits = len(shapes) == len(expected) and all(map(_fits, shapes, expected))
    if not fits or 0 in shapes[0] or len({len(x) for x in inputs}) > 1:
        raise ValueError(
            f"Expected `images` of shape {_alone(expected)} with at least one of them. "
            f"Received: images.shape={_alone(shapes)}"
        )
    starts = range(0, len(inputs[0]), BATCH_SIZE)
    batches = ([x[start : start + BATCH_SIZE] for x in inputs] for start in starts)
    return np.concatenate([_scores_of_batch(model, batch) for batch in batches])


def attention_rollout(
    scores: np.ndarray,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    class_token: bool = True,
) -> np.ndarray:
    """Follows attention through all blocks (Abnar & Zuidema, 2020).

    In each block the heads are fused into one matrix, which is averaged with the identity for the
    residual connection; its rows are scaled to sum to one. The product of these matrices, from
    the first block to the last, tells how much each token of the input weighs in each token of
    the output.

    Args:
        scores: array `(B, L, A, T, T)`, as `attention_scores` returns it for self-attention: the
            matrices must be square.
        head_fusion: `"mean"`, `"max"` or `"min"` over the heads.
        discard_ratio: float in [0, 1), fraction of the entries of each fused matrix that are set
            to zero, the smallest first.
        class_token: bool, whether token 0 is a class token; attention to it is never discarded.

    Returns:
        Array `(B, T, T)`; each row sums to one. `patch_weights` has what the head reads of it.

    Raises:
        ValueError: if the scores have another shape or hold no finite, non-negative numbers, or
            if an option lies outside its range.
    """
    scores = np.asarray(scores)
    if scores.ndim != 5 or 0 in scores.shape:
        raise ValueError(
            "Expected `scores` of shape (batch, blocks, heads, tokens, tokens). "
            f"Received: scores.shape={scores.shape}"
        )
    if scores.shape[-1] != scores.shape[-2]:
        raise ValueError(
            "Expected `scores` of self-attention, (batch, blocks, heads, tokens, tokens): a "
            "rollout multiplies square matrices, and those of cross-attention have other queries "
            f"than keys. Received: scores.shape={scores.shape}"
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
        attention = _discard(attention, discard_ratio, class_token) + identity
        attention /= attention.sum(axis=-1, keepdims=True)
        rollout = attention @ rollout
    return rollout


def patch_weights(rollout: np.ndarray, class_token: bool = True) -> np.ndarray:
    """How much each patch weighs in what the head of a `VisionTransformer` reads.

    With a class token, that is the token's row of the rollout. A model with `pooling="mean"` has
    none: its head reads the mean of the patches' tokens, whose weights are the mean of their rows.

    Args:
        rollout: array `(B, T, T)`, as `attention_rollout` returns it.
        class_token: bool, whether token 0 is a class token.

    Returns:
        Array `(B, N)`, one weight for each patch, row by row. They sum to one, or with a class
        token to one less its own weight.
    """
    return rollout[:, 0, 1:] if class_token else rollout.mean(axis=1)


def _check_graph(model):
    """Refuses a model whose attention cannot be followed call by call."""
    if not any(map(_is_attention, _layers_inside(model))):
        raise ValueError(
            "Expected a model with `MultiHeadAttention` layers in its graph. "
            f"Received: model={model.name!r} with none"
        )
    for layer in model.layers:
        if not _is_attention(layer) and any(map(_is_attention, _layers_inside(layer))):
            raise ValueError(
                "Expected every attention layer to stand in the model's own graph. Received: "
                f"model={model.name!r}, whose layer {layer.name!r} has attention inside. If that "
                f"is a model, pass `model.get_layer({layer.name!r})` and what it takes"
            )
    if not isinstance(model, keras.Function):
        raise ValueError(
            f"Expected a functional model. Received: model={model.name!r} of class "
            f"{type(model).__name__}, which calls its layers in Python"
        )


def _layers_inside(layer):
    return layer._flatten_layers(include_self=False)


def _is_attention(layer):
    return isinstance(layer, keras.layers.MultiHeadAttention) or _takes(
        layer, "return_attention_scores"
    )


def _takes(operation, argument):
    return argument in inspect.signature(operation.call).parameters


def _fits(shape, expected):
    return len(shape) == len(expected) and all(b in (a, None) for a, b in zip(shape, expected))


def _alone(items):
    return items[0] if len(items) == 1 else items


def _scores_of_batch(model, inputs):
    """Attention scores `(B, L, A, T, S)` of one batch, from a run of the model's graph."""
    blocks = []

    def noting(operation):
        def call(*args, **kwargs):
            if _takes(operation, "training"):
                kwargs["training"] = False
            if not _is_attention(operation):
                return operation(*args, **kwargs)
            if isinstance(model, VisionTransformer):
                args = args[1], args[1]
            wants_scores = kwargs.pop("return_attention_scores", False)
            outputs, scores = _outputs_and_scores(operation, args, kwargs)
            shape = tuple(getattr(scores, "shape", ()))
            _check_shape(operation.name, shape, len(inputs[0]), blocks)
            blocks.append(ops.convert_to_numpy(scores).astype("float32"))
            return (outputs, scores) if wants_scores else outputs

        return call

    tensors = [ops.convert_to_tensor(x, y.dtype) for x, y in zip(inputs, model.inputs)]
    model._run_through_graph(tensors, operation_fn=noting)
    return np.stack(blocks, axis=1)


def _outputs_and_scores(layer, args, kwargs):
    try:
        outputs, scores = layer(*args, **kwargs, return_attention_scores=True)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected layer {layer.name!r} to return its attention scores. "
            f"Received: {type(error).__name__}: {reason}"
        ) from error
    return outputs, scores


def _check_shape(name, shape, batch_size, blocks):
    if len(shape) != 4 or shape[0] != batch_size:
        raise ValueError(
            f"Expected layer {name!r} to return scores of shape (batch, heads, queries, keys). "
            f"Received: scores.shape={shape} for a batch of {batch_size}"
        )
    if blocks and shape[1:] != blocks[0].shape[1:]:
        raise ValueError(
            "Expected every layer to have as many heads, queries and keys as the first one, "
            f"{blocks[0].shape[1:]}. Received: layer {name!r} with {shape[1:]}"
        )


def _discard(attention, ratio, class_token):
    """Zeroes the smallest entries of each matrix `(B, T, T)`, but for a class token's column."""
    batch, tokens, _ = attention.shape
    count = int(tokens * tokens * ratio)
    if count == 0:
        return attention
    flat = attention.reshape(batch, -1).copy()
    smallest = np.argpartition(flat, count - 1, axis=1)[:, :count]
    np.put_along_axis(flat, smallest, 0, axis=1)
    kept = flat.reshape(attention.shape)
    if class_token:
        kept[..., 0] = attention[..., 0]
    return kept
