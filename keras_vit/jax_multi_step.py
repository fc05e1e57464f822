"""Several training steps per dispatch on JAX, where Keras dispatches each step."""

import itertools

import keras


def can_scan(model):
    """Whether a compiled model should be trained by `scanned_train_function`."""
    return (
        keras.backend.backend() == "jax"
        and model.steps_per_execution > 1
        and model.jit_compile
        and not model.run_eagerly
        and keras.distribution.distribution() is None
    )


def scanned_train_function(model):
    """A train function for JAX that runs `model.steps_per_execution` steps in one `lax.scan`.

    Keras's own train function dispatches them one by one, so that a small model waits for the
    host.

    Args:
        model: a compiled `keras.Model`.

    Returns:
        A function of the state and an iterator of batches, as `Model.train_function` is on JAX:
        it returns the logs of the last step and the new state. Consecutive batches of one
        shape run in one program; a smaller last batch runs in its own.
    """
    import jax

    def steps(state, batches):
        def step(state, batch):
            logs, state = model.train_step(state, batch)
            return state, logs

        stacked = jax.tree.map(lambda *arrays: jax.numpy.stack(arrays), *batches)
        state, logs = jax.lax.scan(step, state, stacked)
        return jax.tree.map(lambda values: values[-1], logs), state

    compiled = jax.jit(steps, donate_argnums=0)

    def train_function(state, iterator):
        batches = list(itertools.islice(iterator, model.steps_per_execution))
        if not batches:
            raise StopIteration
        for _, group in itertools.groupby(batches, key=_shapes):
            logs, state = compiled(state, tuple(group))
        return logs, state

    return train_function


def _shapes(batch):
    return [tuple(array.shape) for array in keras.tree.flatten(batch) if array is not None]
