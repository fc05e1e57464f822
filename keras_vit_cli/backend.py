"""What Keras computes with, settled before anything imports Keras."""

import contextlib
import importlib.util
import logging
import os
import platform
import tempfile

from keras_vit_cli.errors import CommandError

BACKENDS = ("tensorflow", "jax", "torch")


def choose(backend):
    """Settles Keras's backend: the one named, else `KERAS_BACKEND`, else Keras's own choice."""
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    backend = os.environ.get("KERAS_BACKEND")
    if backend:
        if backend not in BACKENDS:
            raise CommandError(
                f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, not {backend!r}"
            )
        require(backend, f"backend {backend!r}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if platform.machine() in ("x86_64", "AMD64"):
        # TensorFlow's default leaves Intel's kernels off on some AMD processors, twice as slow.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    for name in ("absl", "tensorflow"):  # Such as TensorFlow's advice where images grow.
        logging.getLogger(name).setLevel(logging.ERROR)


def require(package, what):
    """Refuses what needs a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{what} needs a package that is missing: try `pip install {package}`")


def distribute(kind):
    """Has Keras, which is imported by now, distribute what is built over devices or hosts."""
    from keras_vit import distribution

    if kind == "hosts":
        minutes = distribution.STARTING // 60
        print(f"Waiting up to {minutes} minutes for the other processes of the job.", flush=True)
    try:
        distribution.connect(kind)
    except distribution.DistributionError as error:
        raise CommandError(str(error)) from error


def import_for(source):
    """Imports what reads a data set, without the lines that TensorFlow's libraries write."""
    from keras_vit import data

    if data.is_of_tfds(source):
        with quiet(), contextlib.suppress(ImportError):  # Loading the data set explains it.
            data.import_packages()


@contextlib.contextmanager
def quiet():
    """Holds back what TensorFlow's libraries write to stderr while they load, unless that fails."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except ModuleNotFoundError as error:  # Of the backend that Keras's own settings choose.
            installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
            if error.name not in BACKENDS or not installed:
                advice = f"try `pip install {error.name}`"
            else:
                advice = f"try `pip install {error.name}`, or --backend {installed[0]}"
            raise CommandError(f"package {error.name} is missing: {advice}") from error
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
