"""What a trained model attends to: attention scores, and Attention Rollout."""

import inspect

import keras
import numpy as np
from keras import ops

from keras_vit.model import VisionTransformer
from keras_vit.validation import fraction_below_one

BATCH_SIZE = 64


def attention_scores(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Attention of every head of every block of a model.

    The model runs once, in inference mode, and each attention layer returns the scores of that
    call, so that masks, causal attention and cross-attention are accounted for. A layer that the
    model calls several times counts as one block per call.

    The last block of a `VisionTransformer` computes only the tokens that its head reads. Here all
    tokens are queries, so that its matrix has as many rows as those of the other blocks.

    Args:
        model: a `VisionTransformer`, or another functional model whose attention layers
            (`keras.layers.MultiHeadAttention` and others that take `return_attention_scores`) are
            nodes of its own graph, not nested in other layers.
        images: array `(B, H, W, C)` of raw pixels, as the model takes them; a list or dictionary of
            arrays for a model with several inputs.

    Returns:
        NumPy array `(B, L, A, T, S)`, float32: in block `l` and head `a`, token `t` attends to
        token `s` with weight `scores[b, l, a, t, s]`. Each row sums to one. `T` equals
        `S` except in cross-attention. In a `VisionTransformer` both are its
        tokens: the class token, if it has one, then the patches, row by row.

    Raises:
        ValueError: if the model has no attention layer; if an attention layer is nested in another
            layer, cannot return its scores, or returns them in a shape other than `(B, A, T, S)`
            or other than that of the previous blocks; or if the images do not have the model's
            input shape.
    """
    _check_graph(model)
    if len(model.inputs) == 1 and not isinstance(images, dict):
        images = np.asarray(images)
    inputs, expected = keras.tree.flatten(images), [tuple(x.shape) for x in model.inputs]
    shapes = [tuple(x.shape) for x in inputs]
    fits = len(shapes) == len(expected) and all(map(_fits, shapes, expected))
    if not fits or 0 in shapes[0] or len({len(x) for x in inputs}) > 1:
        raise ValueError(
            f"Expected `images` to be non-empty and of shape {_unpack_single(expected)}. "
            f"Received: images.shape={_unpack_single(shapes)}"
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
    """Attention Rollout: follows attention through all blocks (Abnar & Zuidema, 2020).

    In each block the heads are fused into one matrix, which is averaged with the identity for the
    residual connection; its rows are normalized to sum to one. The product of these matrices,
    from the first block to the last, is the weight of each input token in each output token.

    Args:
        scores: array `(B, L, A, T, T)` of self-attention, as returned by `attention_scores`.
        head_fusion: `"mean"`, `"max"` or `"min"` over the heads.
        discard_ratio: float in [0, 1), fraction of the entries of each fused matrix that are set
            to zero, the smallest first.
        class_token: bool, whether token 0 is a class token; attention to it is never discarded.

    Returns:
        Array `(B, T, T)`; each row sums to one. `patch_weights` extracts what the head reads.

    Raises:
        ValueError: if the scores have another shape or are not finite and non-negative, or if
            an option is out of range.
    """
    scores = np.asarray(scores)
    if scores.ndim != 5 or 0 in scores.shape:
        raise ValueError(
            "Expected `scores` of shape (batch, blocks, heads, tokens, tokens). "
            f"Received: scores.shape={scores.shape}"
        )
    if scores.shape[-1] != scores.shape[-2]:
        raise ValueError(
            "Expected `scores` of self-attention, (batch, blocks, heads, tokens, tokens): the "
            "matrices of a rollout must be square, and cross-attention has different queries and "
            f"keys. Received: scores.shape={scores.shape}"
        )
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype("float32")
    if not np.isfinite(scores).all() or (scores < 0).any():
        raise ValueError(
            "Expected `scores` to be finite and non-negative. "
            f"Received: scores from {scores.min()} to {scores.max()}"
        )
    if head_fusion not in ("mean", "max", "min"):
        raise ValueError(
            "Expected `head_fusion` to be 'mean', 'max' or 'min'. "
            f"Received: head_fusion={head_fusion!r}"
        )
    fraction_below_one("discard_ratio", discard_ratio)

    identity = np.eye(scores.shape[-1], dtype=scores.dtype)
    rollout = np.broadcast_to(identity, scores[:, 0, 0].shape)
    for block in range(scores.shape[1]):
        attention = getattr(scores[:, block], head_fusion)(axis=1)
        attention = _discard(attention, discard_ratio, class_token) + identity
        attention /= attention.sum(axis=-1, keepdims=True)
        rollout = attention @ rollout
    return rollout


def patch_weights(rollout: np.ndarray, class_token: bool = True) -> np.ndarray:
    """The weight of each patch in what the head of a `VisionTransformer` reads.

    With a class token, that is the row of the class token. With `pooling="mean"`, the head reads
    the mean of all patch tokens: the weights are the mean of their rows.

    Args:
        rollout: array `(B, T, T)`, as returned by `attention_rollout`.
        class_token: bool, whether token 0 is a class token.

    Returns:
        Array `(B, N)`, one weight for each patch, row by row. They sum to one; with a class
        token, to one minus the weight of the class token.
    """
    return rollout[:, 0, 1:] if class_token else rollout.mean(axis=1)


def _check_graph(model):
    """Raises a `ValueError` for a model whose attention scores cannot be collected."""
    if not any(map(_is_attention, _layers_inside(model))):
        raise ValueError(
            "Expected a model with `MultiHeadAttention` layers in its graph. "
            f"Received: model={model.name!r} with none"
        )
    for layer in model.layers:
        if not _is_attention(layer) and any(map(_is_attention, _layers_inside(layer))):
            raise ValueError(
                "Expected every attention layer to be a node of the model's own graph. Received: "
                f"model={model.name!r}, whose layer {layer.name!r} contains attention. If that "
                f"layer is a model, pass `model.get_layer({layer.name!r})` and its inputs"
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


def _unpack_single(items):
    return items[0] if len(items) == 1 else items


def _scores_of_batch(model, inputs):
    """Attention scores `(B, L, A, T, S)` of one batch, from a run of the model's graph."""
    blocks = []

    def recording(operation):
        def call(*args, **kwargs):
            if _takes(operation, "training"):
                kwargs["training"] = False
            if not _is_attention(operation):
                return operation(*args, **kwargs)
            if isinstance(model, VisionTransformer):
                args = args[1], args[1]
            returns_scores = kwargs.pop("return_attention_scores", False)
            outputs, scores = _outputs_and_scores(operation, args, kwargs)
            shape = tuple(getattr(scores, "shape", ()))
            _check_shape(operation.name, shape, len(inputs[0]), blocks)
            blocks.append(ops.convert_to_numpy(scores).astype("float32"))
            return (outputs, scores) if returns_scores else outputs

        return call

    tensors = [ops.convert_to_tensor(x, y.dtype) for x, y in zip(inputs, model.inputs)]
    model._run_through_graph(tensors, operation_fn=recording)
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
    """Zeroes the smallest entries of each matrix `(B, T, T)`, except in a class token's column."""
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
