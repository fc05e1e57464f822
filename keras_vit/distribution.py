"""Training on several devices and hosts: Keras's data parallelism on JAX, and what it leaves open.

Every process builds the same model, whose variables are replicated, and feeds its part of every
global batch. All that knows of processes is here. On one device, nothing here has an effect.
"""

import contextlib
import json
import os
import platform
import signal

import keras
import numpy as np

# Seconds without a heartbeat of a process after which the others end.
HEARTBEAT = 30
# Seconds that a process waits for the others: to start, and to end after its last checkpoint.
STARTING, ENDING = 300, 120
# What is broadcast at once, in bytes.
CHUNK = 2**27
# Keras's variables for a start by hand, and those that Kubeflow sets and JAX does not read.
ADDRESSES, PROCESSES, PROCESS = (
    f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
)
KUBEFLOW = {
    ADDRESSES: "JAX_COORDINATOR_ADDRESS",
    PROCESSES: "JAX_NUM_PROCESSES",
    PROCESS: "JAX_PROCESS_ID",
}


class DistributionError(Exception):
    """The processes of a run cannot be found, or do not fit together."""


def connect(kind):
    """Distributes what is built from now on, before anything else is asked of JAX.

    Args:
        kind: `"devices"` for all devices of this process, `"hosts"` for those of all processes of
            a job, which are found by JAX or by Keras's `KERAS_DISTRIBUTION_*` variables.

    JAX aborts the process if the others do not come within `STARTING` seconds.

    Raises:
        DistributionError: if Keras does not compute with JAX, or the processes cannot be found.
    """
    if keras.backend.backend() != "jax":
        raise DistributionError(
            f"--distribute {kind} needs JAX, but Keras computes with {keras.backend.backend()}: "
            f"add --backend jax"
        )
    import jax

    if kind == "hosts":
        _connect_processes()
    # Sorted, so that a process feeds neighbouring images of a batch.
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    counts = np.bincount([device.process_index for device in found])
    if len(set(counts)) > 1:
        raise DistributionError(
            "--distribute hosts needs the same number of devices in every process. Received: "
            + ", ".join(f"{count} in process {index}" for index, count in enumerate(counts))
        )
    # One device needs no distribution.
    if len(found) > 1:
        names = [f"{device.platform}:{device.id}" for device in found]
        parallel = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
        keras.distribution.set_distribution(parallel)


def _connect_processes():
    import jax

    values = {name: os.environ.get(name) or os.environ.get(KUBEFLOW[name]) for name in KUBEFLOW}
    received = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    addresses = (values[ADDRESSES] or "").split(",")
    try:
        count, index = (_integer(values[name]) for name in (PROCESSES, PROCESS))
        if addresses[0] and not addresses[0].rpartition(":")[2].isdigit():
            raise ValueError
        if len(addresses) > 1 and len(addresses) != count:
            raise ValueError
        if count is not None and index is not None and not 0 <= index < count:
            raise ValueError
    except ValueError:
        raise DistributionError(
            f"{ADDRESSES} must be like host0:1234 (or one address for each process), and {PROCESS} "
            f"from 0 to {PROCESSES} - 1. Received: {received}"
        ) from None
    # A launcher may show each process its own GPU only, where JAX would look for another one.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = [0] if len(visible) == 1 and visible[0] else None
    try:
        jax.distributed.initialize(
            addresses[0] or None,
            count,
            index,
            local_device_ids=own,
            initialization_timeout=STARTING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=ENDING,
        )
    except ValueError as error:  # JAX has found no job.
        raise DistributionError(
            "--distribute hosts found no job of SLURM, Open MPI or Kubernetes (which needs `pip "
            f"install kubernetes`): set {ADDRESSES}=host0:1234, {PROCESSES}=2 and {PROCESS}=0 or "
            f"1 in the environment of each process. Received: {received or 'none of them'}"
        ) from error
    except RuntimeError as error:  # Such as what Kubernetes answers.
        raise DistributionError(f"--distribute hosts: {' '.join(str(error).split())}") from error


def _integer(text):
    return int(text) if text else None


def devices():
    """Number of devices that a batch is distributed over."""
    distribution = keras.distribution.distribution()
    return distribution.device_mesh.devices.size if distribution else 1


def processes():
    """Number of processes that train together."""
    distribution = keras.distribution.distribution()
    return distribution.num_processes if distribution else 1


def process():
    """Index of this process."""
    if processes() == 1:
        return 0
    import jax

    return jax.process_index()


def is_first():
    """Whether this is the process that writes files."""
    return process() == 0


def topology():
    """The devices in words, such as "4 devices" or "4 devices of 2 processes"."""
    count = f"{devices()} device{'s' if devices() > 1 else ''}"
    return count if processes() == 1 else f"{count} of {processes()} processes"


def check_batch_size(size):
    """Raises a `ValueError`, which names others, unless the devices divide a batch size."""
    if rest := size % devices():
        others = dict.fromkeys((max(size - rest, devices()), size - rest + devices()))
        raise ValueError(
            f"Expected a batch size that {devices()} devices divide, such as "
            f"{' or '.join(map(str, others))}. Received: batch_size={size}"
        )


def own_part(batch):
    """This process's part of an array `(B, ...)`, where the number of devices divides `B`."""
    count = len(batch) // processes()
    return batch[process() * count : (process() + 1) * count]


def gather(text):
    """The strings that all processes pass, in their order."""
    if processes() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    content = np.frombuffer(text.encode(errors="surrogateescape"), "uint8")
    lengths = process_allgather(np.int32(len(content))).ravel()
    padded = np.zeros(max(1, *lengths), "uint8")
    padded[: len(content)] = content
    rows = process_allgather(padded)
    return [
        bytes(row[:length]).decode(errors="surrogateescape") for row, length in zip(rows, lengths)
    ]


def broadcast(content):
    """The bytes that the first process passes."""
    if processes() == 1:
        return content
    from jax.experimental.multihost_utils import broadcast_one_to_all

    content = content if is_first() else b""
    # JAX has no integers of 64 bits, unless asked for.
    sizes = np.array(divmod(len(content), CHUNK), "int32")
    chunks, rest = map(int, broadcast_one_to_all(sizes))
    received = []
    for start, size in [(i * CHUNK, CHUNK) for i in range(chunks)] + [(chunks * CHUNK, rest)]:
        chunk = np.zeros(size, "uint8")
        if is_first():
            chunk[:] = np.frombuffer(content[start : start + size], "uint8")
        received.append(broadcast_one_to_all(chunk).tobytes())
    return b"".join(received)


@contextlib.contextmanager
def together():
    """Context that all processes enter: if one raises in it, the others do so as well.

    Raises:
        DistributionError: if another process raised; the message is its own.
    """
    if processes() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = gather("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    for index, text in enumerate(texts):
        if text:
            raise DistributionError(f"process {index}: {text}")


def agree(facts):
    """Raises a `DistributionError`, which names a process, unless all pass the same facts.

    Args:
        facts: dictionary of what JSON can hold.
    """
    rows = gather(json.dumps({"host": platform.node(), "facts": facts}))
    first, *others = map(json.loads, rows)
    for index, other in enumerate(others, start=1):
        expected, found = first["facts"], other["facts"]
        differences = [
            f"{name} is {found.get(name)!r} there and {expected.get(name)!r} in process 0"
            for name in {**expected, **found}
            if found.get(name) != expected.get(name)
        ]
        if differences:
            raise DistributionError(
                f"process {index} on {other['host']} differs from process 0 on {first['host']}: "
                f"{'; '.join(differences)}"
            )


def stops_after(step):
    """Whether all processes stop after this step, because one of them received SIGTERM.

    JAX listens to the signal, and agrees on a step that no process has done yet.

    Args:
        step: int, the number of steps of this process; to be called after each of them.
    """
    if processes() == 1:
        return False
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    return reached_preemption_sync_point(step)


@contextlib.contextmanager
def suspended():
    """Context in which models lie on this process's own device, whatever other processes do."""
    current = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(current)


def leave():
    """Ends the distribution: what is built from now on lies on this process's own devices.

    Processes wait for each other, and then need each other no more.
    """
    several = processes() > 1
    keras.distribution.set_distribution(None)
    if several:
        import jax

        jax.distributed.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler would ignore it.
