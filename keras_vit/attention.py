"""What a trained model attends to: attention scores, how far they reach, and maps of an image."""

import inspect

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from keras_vit.devices import without_gradients
from keras_vit.validation import fraction_below_one, grid_of_patches, positive_integer

BATCH_SIZE = 64


def attention_scores(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Attention of every head of every block of a model.

    The model runs once, in inference mode, and each attention layer returns the scores of that
    call, so that masks, causal attention and cross-attention are accounted for. A layer that the
    model calls several times counts as one block per call.

    The last block of a `VisionTransformer` computes only the tokens that its head reads. Here all
    tokens are queries, so that its matrix has as many rows as those of the other blocks. The same
    holds for other models whose queries are `tokens[:, :count]` of their values and keys, such as
    a clone of one, or a `keras.Model` with a head of its own on the layers of one.

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
    inputs = _checked_inputs(model, images)
    return np.concatenate([_scores_of_batch(model, batch) for batch in _in_batches(inputs)])


def attention_gradients(model: keras.Model, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Gradient of the logit of a class with respect to every attention score of a model.

    Where it is positive, the logit would grow if the token attended more to that other token. It is
    the derivative of all that the model computes from the score, later attention included.

    Args:
        model: as for `attention_scores`, with one output `(B, num_classes)`. Its attention layers
            are `MultiHeadAttention`, of Keras or of this package, without a gate.
        images: as for `attention_scores`.
        classes: integer array `(B,)`, a class for each image.

    Returns:
        NumPy array `(B, L, A, T, S)`, float32, in logits: one value for each of the
        `attention_scores`. In the last block of a `VisionTransformer` with a class token, only the
        first row differs from zero, as the head reads that token alone.

    Raises:
        ValueError: if `attention_scores` would raise one; if the model has other outputs or
            attention layers; or if `classes` is not one class of the model for each image.
    """
    inputs, outputs = _checked_inputs(model, images), [tuple(x.shape) for x in model.outputs]
    if len(outputs) != 1 or len(outputs[0]) != 2:
        raise ValueError(
            "Expected a model with one output of shape (batch, classes). "
            f"Received: model={model.name!r} with outputs of shape {_unpack_single(outputs)}"
        )
    for layer in filter(_is_attention, model.layers):
        if not isinstance(layer, keras.layers.MultiHeadAttention) or layer._use_gate:
            raise ValueError(
                "Expected every attention layer to be a `MultiHeadAttention` without a gate. "
                f"Received: layer {layer.name!r}, a {type(layer).__name__}"
            )
    classes, count = np.asarray(classes), outputs[0][1]
    is_integer = np.issubdtype(classes.dtype, np.integer)
    if classes.shape != (len(inputs[0]),) or not is_integer or set(classes) - set(range(count)):
        raise ValueError(
            f"Expected `classes` to be an integer from 0 to {count - 1} for each of "
            f"{len(inputs[0])} images. Received: classes={classes!r}"
        )
    batches = _in_batches([*inputs, classes])
    return np.concatenate([_gradients_of_batch(model, *batch) for batch in batches])


def attention_distance(
    scores: np.ndarray, grid: tuple[int, int], patch_size: int, class_token: bool = True
) -> np.ndarray:
    """Mean attention distance of each head: how far it looks (Dosovitskiy et al., 2021).

    That is the mean distance between the centers of two patches, over all pairs of them, weighted
    by the attention of the first to the second. It corresponds to the size of a receptive field in
    a convolutional network: near zero for a head that looks at its own patch, and
    `attention_distance(np.ones_like(scores), ...)` for one that looks everywhere equally.

    Args:
        scores: array `(B, L, A, T, T)` of self-attention, as returned by `attention_scores`.
        grid: tuple `(rows, columns)` of patches.
        patch_size: int, side of a patch in pixels.
        class_token: bool, whether token 0 is a class token. It has no position: attention from it
            and to it is left out.

    Returns:
        Array `(B, L, A)`, in pixels; NaN for a head whose patches attend to the class token only.

    Raises:
        ValueError: if the scores have another shape or are not finite and non-negative, if the grid
            does not have as many patches as they have, or if `patch_size` is not a positive
            integer.
    """
    scores = _checked_scores(scores)
    rows, columns = grid_of_patches(grid)
    patch_size = positive_integer("patch_size", patch_size)
    if rows * columns + class_token != scores.shape[-1]:
        raise ValueError(
            f"Expected `grid` to have {scores.shape[-1] - class_token} patches, as `scores` with "
            f"class_token={class_token} have; pass class_token=False for a model that pools by "
            f"mean. Received: grid={grid}"
        )
    centers = patch_size * np.indices((rows, columns)).reshape(2, -1)
    distances = np.hypot(*(centers[:, :, None] - centers[:, None])).astype(scores.dtype)
    first = int(class_token)
    between_patches = scores[..., first:, first:]
    total = between_patches.sum(axis=(-2, -1))
    weighted = np.einsum("...ts,ts->...", between_patches, distances)
    return np.divide(weighted, total, out=np.full_like(total, np.nan), where=total > 0)


def attention_rollout(
    scores: np.ndarray,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    class_token: bool = True,
    gradients: np.ndarray | None = None,
) -> np.ndarray:
    """Attention Rollout: follows attention through all blocks (Abnar & Zuidema, 2020).

    In each block the heads are fused into one matrix, which is averaged with the identity for the
    residual connection; its rows are normalized to sum to one. The product of these matrices,
    the last block's on the left, is the weight of each input token in each output token.

    The rollout is the same for every class. With `gradients`, it is that of one class: each score
    is multiplied by its gradient before the heads are fused, and what is negative after that is
    set to zero (gradient-weighted rollout; Gildenblat, 2020).

    Args:
        scores: array `(B, L, A, T, T)` of self-attention, as returned by `attention_scores`.
        head_fusion: `"mean"`, `"max"` or `"min"` over the heads.
        discard_ratio: float in [0, 1), fraction of the entries of each fused matrix that are set
            to zero, the smallest first.
        class_token: bool, whether token 0 is a class token; attention to it is never discarded.
        gradients: array of the shape of `scores`, as returned by `attention_gradients`; none by
            default.

    Returns:
        Array `(B, T, T)`; each row sums to one. `patch_weights` extracts what the head reads.

    Raises:
        ValueError: if the scores have another shape or are not finite and non-negative, if the
            gradients have another shape than they or are not finite, or if an option is out of
            range.
    """
    scores = _checked_scores(scores)
    if gradients is not None:
        gradients = _checked_gradients(gradients, scores)
    if head_fusion not in ("mean", "max", "min"):
        raise ValueError(
            "Expected `head_fusion` to be 'mean', 'max' or 'min'. "
            f"Received: head_fusion={head_fusion!r}"
        )
    fraction_below_one("discard_ratio", discard_ratio)

    identity = np.eye(scores.shape[-1], dtype=scores.dtype)
    rollout = np.broadcast_to(identity, scores[:, 0, 0].shape)
    for block in range(scores.shape[1]):
        attention = scores[:, block]
        if gradients is not None:
            attention = attention * gradients[:, block]
        attention = getattr(attention, head_fusion)(axis=1).clip(0)
        attention = _discard(attention, discard_ratio, class_token) + identity
        attention /= attention.sum(axis=-1, keepdims=True)
        rollout = attention @ rollout
    return rollout


def attention_relevance(scores: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Relevance of each token for the logit of a class (Chefer et al., ICCV 2021).

    In each block, attention is multiplied by its gradient, negative products are set to zero, and
    the mean over the heads is a matrix `A`. Relevance starts as the identity matrix `R`, and each
    block adds `A @ R` to it (equations 5 and 6 of the paper).

    Args:
        scores: array `(B, L, A, T, T)` of self-attention, as returned by `attention_scores`.
        gradients: array of the same shape, as returned by `attention_gradients`.

    Returns:
        Array `(B, T, T)`, non-negative: row `t` holds the relevance of each input token in output
        token `t`. `patch_weights` extracts what the head reads.

    Raises:
        ValueError: if the scores have another shape or are not finite and non-negative, or if the
            gradients have another shape than they or are not finite.
    """
    scores = _checked_scores(scores)
    gradients = _checked_gradients(gradients, scores)
    relevance = np.broadcast_to(np.eye(scores.shape[-1], dtype=scores.dtype), scores[:, 0, 0].shape)
    for block in range(scores.shape[1]):
        attention = (scores[:, block] * gradients[:, block]).clip(0).mean(axis=1)
        relevance = relevance + attention @ relevance
    return relevance


def patch_weights(rollout: np.ndarray, class_token: bool = True) -> np.ndarray:
    """The weight of each patch in what the head of a `VisionTransformer` reads.

    With a class token, that is the row of the class token. With `pooling="mean"`, the head reads
    the mean of all patch tokens: the weights are the mean of their rows.

    Args:
        rollout: array `(B, T, T)`, as returned by `attention_rollout` or `attention_relevance`.
        class_token: bool, whether token 0 is a class token.

    Returns:
        Array `(B, N)`, one weight for each patch, row by row. Those of a rollout sum to one; with
        a class token, to one minus the weight of the class token.

    Raises:
        ValueError: if the rollout has another shape.
    """
    rollout = np.asarray(rollout)
    if rollout.ndim != 3 or rollout.shape[1] != rollout.shape[2]:
        raise ValueError(
            "Expected `rollout` of shape (batch, tokens, tokens), as `attention_rollout` returns. "
            f"Received: rollout.shape={rollout.shape}"
        )
    return rollout[:, 0, 1:] if class_token else rollout.mean(axis=1)


def _checked_inputs(model, images):
    """The arrays of a model's inputs, if its attention scores for them can be collected."""
    _check_graph(model)
    if isinstance(images, dict) and not isinstance(model.input, dict):  # By name, as in Keras.
        names = [x.name for x in model.inputs]
        if missing := [name for name in names if name not in images]:
            raise ValueError(
                f"Expected `images` to have the keys {names}, but {missing[0]!r} is missing. "
                f"Received: keys {list(images)}"
            )
        images = [images[name] for name in names]
    elif len(model.inputs) == 1 and not isinstance(images, dict):
        images = np.asarray(images)
    inputs, expected = keras.tree.flatten(images), [tuple(x.shape) for x in model.inputs]
    shapes = [tuple(x.shape) for x in inputs]
    fits = len(shapes) == len(expected) and all(map(_fits, shapes, expected))
    if not fits or 0 in shapes[0] or len({len(x) for x in inputs}) > 1:
        raise ValueError(
            f"Expected `images` to be non-empty and of shape {_unpack_single(expected)}. "
            f"Received: images.shape={_unpack_single(shapes)}"
        )
    return inputs


def _in_batches(arrays):
    for start in range(0, len(arrays[0]), BATCH_SIZE):
        yield [array[start : start + BATCH_SIZE] for array in arrays]


def _checked_scores(scores):
    """Scores of self-attention as an array of floats."""
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
    return scores


def _checked_gradients(gradients, scores):
    """Gradients of the scores as an array."""
    gradients = np.asarray(gradients)
    if gradients.shape != scores.shape:
        raise ValueError(
            f"Expected `gradients` to have the shape of `scores`, {scores.shape}. "
            f"Received: gradients.shape={gradients.shape}"
        )
    if not np.isfinite(gradients).all():
        raise ValueError(
            "Expected `gradients` to be finite. "
            f"Received: gradients from {gradients.min()} to {gradients.max()}"
        )
    return gradients


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

    def attend(layer, args, kwargs):
        outputs, scores = _outputs_and_scores(layer, args, kwargs)
        shape = tuple(getattr(scores, "shape", ()))
        _check_shape(layer.name, shape, len(inputs[0]), blocks)
        blocks.append(ops.convert_to_numpy(scores).astype("float32"))
        return outputs, scores

    with without_gradients():
        _run(model, inputs, attend)
    return np.stack(blocks, axis=1)


def _gradients_of_batch(model, *inputs_and_classes):
    """Gradients `(B, L, A, T, S)` of the logits of one class per image by the attention scores."""
    *inputs, classes = inputs_and_classes
    scores = _scores_of_batch(model, inputs)
    picked = ops.one_hot(classes, model.outputs[0].shape[1], dtype="float32")

    def logits_of(changes):
        """The sum of the logits if each block's scores are changed; at zero, they are not."""
        remaining = iter(changes)

        def attend(layer, args, kwargs):
            outputs, scores = _outputs_and_scores(layer, args, kwargs)
            scores = scores + ops.cast(next(remaining), scores.dtype)
            value = inspect.signature(layer.call).bind(*args, **kwargs).arguments["value"]
            heads = ops.einsum("bats,bsad->btad", scores, layer._value_dense(value))
            attended = layer._output_dense(heads)
            set_keras_mask(attended, get_keras_mask(outputs))
            return attended, scores

        (logits,) = keras.tree.flatten(_run(model, inputs, attend))
        return ops.sum(picked * ops.cast(logits, "float32"))

    changes = [np.zeros_like(block) for block in np.moveaxis(scores, 1, 0)]
    gradients = _gradients(logits_of, [ops.convert_to_tensor(x) for x in changes])
    return np.stack([ops.convert_to_numpy(x) for x in gradients], axis=1)


def _gradients(function, tensors):
    """Gradients of a scalar function of a list of tensors by each of them."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            result = function(tensors)
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(result, tensors, unconnected_gradients=zero)
    if backend == "jax":
        import jax

        return jax.grad(function)(tensors)
    import torch

    tensors = [tensor.requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(tensors), tensors, materialize_grads=True)


def _run(model, inputs, attend):
    """Outputs of a model's graph in inference mode, whose attention layers `attend` calls.

    It is called with a layer, its arguments and its keyword arguments, and returns the layer's
    outputs and scores.
    """

    leading = []  # Pairs of the leading tokens of a sequence and the sequence.

    def calling(operation):
        def call(*args, **kwargs):
            if _takes(operation, "training"):
                kwargs["training"] = False
            if not _is_attention(operation):
                outputs = operation(*args, **kwargs)
                if len(args) == 2 and _is_key_of_leading_tokens(args[1]):
                    leading.append((outputs, args[0]))
                return outputs
            returns_scores = kwargs.pop("return_attention_scores", False)
            bound = inspect.signature(operation.call).bind(*args, **kwargs)
            query, value, key = (bound.arguments.get(x) for x in ("query", "value", "key"))
            # The last block of a `VisionTransformer` skips tokens that its head does not read.
            skips = key is None and any(query is x and value is tokens for x, tokens in leading)
            if skips:
                bound.arguments["query"] = value
            outputs, scores = attend(operation, bound.args, bound.kwargs)
            if skips and query is not None:
                outputs = outputs[:, : query.shape[1]]
            return (outputs, scores) if returns_scores else outputs

        return call

    tensors = [ops.convert_to_tensor(x, y.dtype) for x, y in zip(inputs, model.inputs)]
    return model._run_through_graph(tensors, operation_fn=calling)


def _is_key_of_leading_tokens(key):
    """Whether `tokens[key]` is `tokens[:, :count]`."""
    if not isinstance(key, (tuple, list)) or not all(isinstance(x, slice) for x in key):
        return False
    return len(key) == 2 and tuple(key) == (slice(None), slice(None, key[1].stop))


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
