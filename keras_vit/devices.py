"""The devices that Keras computes on, and the dtypes that they support."""

import contextlib
import math
import pathlib
import time

import keras
from keras import ops


def accelerators():
    """Names of the GPUs or TPUs that Keras's backend computes on, such as `["gpu:0"]`."""
    if keras.backend.backend() == "torch":  # Keras does not list its devices.
        import torch

        device = torch.accelerator.current_accelerator()
        if device is None or not torch.accelerator.is_available():
            return []
        return [f"{device.type}:{index}" for index in range(torch.accelerator.device_count())]
    # `list_devices("gpu")` raises on JAX if there is no GPU.
    return [name for name in keras.distribution.list_devices() if not name.startswith("cpu")]


@contextlib.contextmanager
def without_gradients():
    """Context in which PyTorch does not keep what gradients would need."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.no_grad():
        yield


def on_jax_accelerator():
    """Whether Keras computes with JAX on a GPU or TPU."""
    return keras.backend.backend() == "jax" and bool(accelerators())


def operations_per_second(dtype="float32", side=2048, repeats=3):
    """Throughput of matrix products on the device, in floating point operations per second.

    Takes a fraction of a second.
    """
    matrix, fastest = ops.ones((side, side), dtype), math.inf
    for _ in range(repeats + 1):  # The first run compiles.
        start = time.perf_counter()
        ops.convert_to_numpy(ops.cast(ops.matmul(matrix, matrix)[0, 0], "float32"))
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def precisions():
    """Names of the dtypes that the device supports in hardware, `"float32"` first.

    A training step in any other dtype is slower than in float32.
    """
    float16 = ["float16"] if accelerators() and _oldest_nvidia_architecture() >= 7 else []  # Volta
    return ["float32", *(["bfloat16"] if _has_bfloat16() else []), *float16]


def _has_bfloat16():
    if accelerators():
        return _oldest_nvidia_architecture() >= 8  # Ampere
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return True  # Not Linux: support is unknown.
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def _oldest_nvidia_architecture():
    """Major compute capability of the oldest NVIDIA GPU; infinite if there is none."""
    backend, majors = keras.backend.backend(), [math.inf]
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            gpus = range(torch.cuda.device_count())
            majors += [torch.cuda.get_device_capability(gpu)[0] for gpu in gpus]
    elif backend == "jax":
        import jax

        versions = (getattr(gpu, "compute_capability", None) for gpu in jax.local_devices())
        majors += [float(version) // 1 for version in versions if version and version[0].isdigit()]
    else:
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            details = tf.config.experimental.get_device_details(gpu)
            majors += details.get("compute_capability", ())[:1]
    return min(majors)
