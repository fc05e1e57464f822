"""Contestants timed in turns, each in a process of its own, and what came out as files."""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import shlex
import statistics
import sys
import time
import traceback

RESULTS = pathlib.Path(__file__).parent / "results"
# What train.py sets before it imports TensorFlow.
TUNED = {"TF_ENABLE_ONEDNN_OPTS": "1"}


def measure(contestants, rounds, warm_up=3):
    """Times one step of every contestant, one after the other, round after round.

    Args:
        contestants: dictionary by name of `(make_step, arguments, environment)`; in a new process
            with that environment, `make_step(*arguments)` returns the function to time.
        rounds: int, steps of each contestant that count; each follows one that does not.
        warm_up: int, steps before the first round.

    Returns:
        Dictionary by name of `{"seconds": [...], "peak_mib": float, "added_mib": float, "gpu_mib":
        float}`, memory being the process's peak, how far the steps raised it, and the most that
        its arrays took on a GPU; or of `{"error": string}` for a contestant that failed.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, [], {}
    for name, contestant in contestants.items():
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(target=_work, args=(far_end, *contestant), daemon=True))
        processes[-1].start()
        far_end.close()  # Else the death of the process would not be noticed here.
        _ask(pipes, results, name, warm_up, counted=0)
    for _ in range(rounds):
        for name in list(pipes):
            if "error" not in results[name]:
                # The first step after a wait finds caches that others have filled.
                _ask(pipes, results, name, 2, counted=1)
    for name, pipe in pipes.items():
        if "error" not in results[name]:
            pipe.send(0)
    for process in processes:
        process.join()
    return results


def _ask(pipes, results, name, steps, counted):
    """Lets a contestant run steps, of which the last ones count."""
    pipes[name].send(steps)
    try:
        answer = pipes[name].recv()
    except EOFError:
        answer = {"error": "the process ended: is there enough memory?"}
    if "error" in answer:
        results[name] = answer
    else:
        result = results.setdefault(name, {"seconds": []})
        result["seconds"] += answer["seconds"][steps - counted :]
        result |= {name: answer[name] for name in ("peak_mib", "added_mib", "gpu_mib")}


def _work(pipe, make_step, arguments, environment):
    os.environ.update(environment)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        step = None
        while steps := pipe.recv():
            if step is None:
                step = make_step(*arguments)
                before = _peak_mib()
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            peak = _peak_mib()
            memory = {"peak_mib": peak, "added_mib": peak - before, "gpu_mib": _gpu_mib()}
            pipe.send({"seconds": seconds, **memory})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]})


def _peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _gpu_mib():
    """The most that PyTorch or JAX held on a GPU so far; 0 without one."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    most = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0
    if jax and jax.default_backend() == "gpu":
        most = max(most, jax.local_devices()[0].memory_stats()["peak_bytes_in_use"])
    return most / 2**20


def ratio(results, name, other):
    """How many times as fast `name` is as `other`: median and quartiles over the rounds."""
    pairs = zip(results[other]["seconds"], results[name]["seconds"], strict=True)
    low, middle, high = statistics.quantiles([b / a for b, a in pairs], n=4)
    return {"median": middle, "quartiles": [low, high]}


def machine():
    """What a reader must know of where numbers come from."""
    names = {
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        "date": datetime.date.today().isoformat(),
        "processor": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def command(module):
    """The command line of a benchmark as it was typed."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def version(package):
    """The installed version of a package; None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(name, content):
    """Writes `results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
