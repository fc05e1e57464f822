"""The private APIs of Keras and TensorFlow that this package uses, checked one by one.

If a new version breaks other tests, look here first for the API that has changed.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import pkgutil

import keras
import numpy as np
import pytest

import keras_vit

BACKEND = keras.backend.backend()


@functools.cache
def attention():
    layer = keras.layers.MultiHeadAttention(2, 3)
    layer.build((None, 5, 6), (None, 5, 6))
    return layer


@functools.cache
def crop():
    return keras.layers.RandomCrop(4, 4, data_format="channels_last")


def functional():
    inputs = keras.Input((5, 6))
    return keras.Model(inputs, keras.layers.Dense(3)(inputs))


def has(build, *names):
    """For each name, a check that the object made by `build` has this attribute."""
    return {f"{build.__name__}: {name}": lambda name=name: hasattr(build(), name) for name in names}


def takes(function, *names):
    """Whether a function takes arguments of these names, in this order."""
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    return [name for name in parameters if name in names] == list(names)


def imports(module, name):
    return hasattr(importlib.import_module(module), name)


def masked_softmax():
    scores = np.random.default_rng(0).normal(size=(1, 2, 5, 5)).astype("float32")
    powers = np.exp(scores)
    expected = powers / powers.sum(axis=-1, keepdims=True)
    result = keras.ops.convert_to_numpy(attention()._masked_softmax(keras.ops.array(scores)))
    return np.allclose(result, expected, atol=1e-6)


def run_through_graph():
    model, seen = functional(), []

    def recording(operation):
        seen.append(operation.name)
        return operation

    tokens = keras.ops.ones((2, 5, 6))
    outputs = model._run_through_graph([tokens], operation_fn=recording)
    outputs = outputs[0] if isinstance(outputs, list) else outputs
    return seen == [model.layers[1].name] and outputs.shape == (2, 5, 3)


def flatten_layers():
    model = keras.Sequential([functional()])
    alone = list(model._flatten_layers(include_self=False, recursive=False))
    inside = list(model._flatten_layers(include_self=False))
    return len(alone) < len(inside) and isinstance(inside[-1], keras.layers.Layer)


def hooks_of_muon():
    """`apply` calls `_should_use_adamw` and `_backend_update_step`."""
    asked, updated = [], []

    class Recorder(keras.optimizers.Muon):
        def _should_use_adamw(self, variable):
            asked.append(variable.name)
            return False

        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            updated.extend(x.name for x in trainable_variables)

    optimizer = Recorder()
    pair = [keras.Variable([[float(i)]], name=f"kernel_{i}") for i in range(2)]
    optimizer.build(pair)
    optimizer.apply([keras.ops.ones((1, 1))] * 2, pair)
    indices = [optimizer._get_variable_index(x) for x in pair]
    kept = [len(optimizer.momentums), *optimizer.adam_velocities]
    are_called = set(asked) == set(updated) == {"kernel_0", "kernel_1"}
    return are_called and indices == [0, 1] and kept == [2, None, None]


def name_of_a_slot():
    optimizer, variable = keras.optimizers.SGD(momentum=0.9), keras.Variable([1.0], name="kernel")
    optimizer.build([variable])
    path = f"{variable.path.replace('/', '_')}_momentum"
    return any(x.path.endswith(f"/{path}") for x in optimizer.variables)


def steps_of_jax():
    """`fit` calls `train_function(state, iterator)`, and a train step returns logs and state."""
    model, calls = functional(), []
    model.compile("sgd", "mse", steps_per_execution=2)

    def train_function(state, iterator):
        assert callable(model.jax_state_sync)
        logs, state = model.train_step(state, next(iterator))
        calls.append(set(logs))
        return logs, state

    model.make_train_function()
    model.train_function = train_function
    model.fit(np.ones((2, 5, 6)), np.ones((2, 5, 3)), verbose=0)
    return calls == [{"loss"}] and model.steps_per_execution == 2


PARTS = {
    **has(
        attention, "_activity_regularizer", "_attention_axes", "_dropout", "_dropout_layer",
        "_flash_attention", "_inverse_sqrt_key_dim", "_key_dense", "_key_dim", "_num_heads",
        "_output_dense", "_output_shape", "_query_dense", "_sliding_window", "_use_bias",
        "_use_gate", "_value_dense", "_value_dim",
    ),
    "attention: kernels": lambda: attention()._query_dense.kernel.shape == (6, 2, 3)
    and attention()._output_dense.kernel.shape == (2, 3, 6),
    "attention: quantization_mode": lambda: attention()._query_dense.quantization_mode is None,
    "attention: _masked_softmax": masked_softmax,
    "attention: _build_attention": lambda: takes(attention()._build_attention, "rank"),
    **has(crop, "backend", "height_axis", "width_axis", "_build_at_init", "_convert_input_args"),
    "crop: _get_seed_generator": lambda: crop()._get_seed_generator(BACKEND) is not None,
    "crop: _is_batched": lambda: crop()._is_batched(np.ones((1, 5, 5, 3))),
    "crop: backend.set_backend": lambda: hasattr(crop().backend, "set_backend"),
    "crop: backend.reset": lambda: hasattr(crop().backend, "reset"),
    "crop: get_random_transformation": lambda: takes(
        crop().get_random_transformation, "data", "training", "seed"
    ),
    **{
        f"crop: transform_{name}": lambda name=name: takes(
            getattr(crop(), f"transform_{name}"), name, "transformation", "training"
        )
        for name in ("images", "segmentation_masks")
    },
    "dropout: seed_generator.next": lambda: keras.layers.Dropout(0.5).seed_generator.next().shape
    == (2,),
    "layer normalization: rms_scaling": lambda: not keras.layers.LayerNormalization().rms_scaling,
    "model: _flatten_layers": flatten_layers,
    "model: _run_through_graph": run_through_graph,
    "model: make_train_function": lambda: takes(functional().make_train_function, "force"),
    "model: compute_loss": lambda: takes(
        functional().compute_loss, "x", "y", "y_pred", "sample_weight", "training"
    ),
    "model: metrics_variables": lambda: functional().metrics_variables == [],
    "model on jax: train_function, train_step, jax_state_sync": steps_of_jax,
    **{
        f"optimizer: {name}": hooks_of_muon
        for name in ("_backend_update_step", "_get_variable_index", "_should_use_adamw")
    },
    "optimizer: zeropower_via_newtonschulz5": lambda: takes(
        keras.optimizers.Muon().zeropower_via_newtonschulz5, "x", "steps"
    ),
    "optimizer: names of slots": name_of_a_slot,
    "keras.src.layers.preprocessing.data_layer: DataLayer": lambda: imports(
        "keras.src.layers.preprocessing.data_layer", "DataLayer"
    ),
    **{
        f"keras.src.backend.common.masking: {name}": lambda name=name: imports(
            "keras.src.backend.common.masking", name
        )
        for name in ("get_keras_mask", "set_keras_mask")
    },
    "tensorflow.python.ops: control_flow_util": lambda: imports(
        "tensorflow.python.ops.control_flow_util", "GraphOrParentsInXlaContext"
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_private_api_is_available(part):
    if "jax" in part and BACKEND != "jax":
        pytest.skip("for JAX alone")
    if "tensorflow" in part:
        pytest.importorskip("tensorflow")
    assert PARTS[part](), part


def test_every_private_api_in_use_is_checked_above():
    """Every private name in the package's code is its own, is checked, or is an override."""
    used, own = set(), set()
    for path in pathlib.Path(keras_vit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                for module in ("keras.src", "tensorflow.python"):
                    if (node.module or "").startswith(module):
                        used |= {f"{node.module}: {alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                is_new = isinstance(node.ctx, ast.Store)
                (own if is_new else used).add(node.attr)
    private = {name for name in used if not name.startswith("__")} - own | overridden()
    parts = {name for part in PARTS for name in (part, part.split(": ")[-1])}
    assert private
    assert private - parts == set()


def overridden():
    """Private methods of Keras classes that classes of this package override."""
    names = set()
    for module in pkgutil.walk_packages(keras_vit.__path__, "keras_vit."):
        if module.name.endswith("__main__"):
            continue
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name:
                theirs = [x for x in kind.__mro__ if x.__module__.startswith("keras.")]
                names |= {
                    name
                    for name, value in vars(kind).items()
                    if callable(value) and any(hasattr(x, name) for x in theirs)
                }
    return {name for name in names if name.startswith("_") and not name.startswith("__")}
