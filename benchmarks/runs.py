"""Trainings that are compared, each in a process of its own."""

import concurrent.futures
import json
import queue
import subprocess

from keras_vit.files import write_json


def in_processes(commands, folders, jobs):
    """Runs training commands, `jobs` at a time; with more than one, each is pinned to its own core.

    Args:
        commands: list of lists of words.
        folders: list of `Path`, the run directories that they write.
        jobs: int.
    """
    cores = queue.SimpleQueue()
    for core in range(jobs):
        cores.put(str(core) if jobs > 1 else None)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(run, *x, cores) for x in zip(commands, folders, strict=True)]
        for task in tasks:
            task.result()


def run(command, folder, cores):
    """Trains in a process of its own, on the next free core, unless it has finished before."""
    words, options = list(map(str, command)), folder.with_suffix(".json")
    if (folder / "metrics.json").exists():
        if json.loads(options.read_text(encoding="utf-8")) != words:
            raise SystemExit(f"{folder} holds a run with other options: choose another --output")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(options, words)
    core = cores.get()
    pinned = ["taskset", "--cpu-list", core] if core else []
    try:
        with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
            subprocess.run([*pinned, *words], stdout=log, stderr=log, check=True)
    finally:
        cores.put(core)
