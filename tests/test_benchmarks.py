"""Timing in turns, each contestant in a process of its own."""

import os
import time

import pytest

from benchmarks import contestants, side_by_side


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def reader(name):
    assert os.environ[name] == "here"
    return lambda: None


def broken():
    raise RuntimeError("no such device\nand a second line")


def dying():
    os._exit(9)


def test_contestants_are_timed_and_compared_round_by_round():
    entries = {"slow": (sleeper, (0.04,), {}), "fast": (sleeper, (0.01,), {})}
    results = side_by_side.measure(entries, rounds=4, warm_up=1)
    assert all(len(result["seconds"]) == 4 for result in results.values())
    assert min(results["slow"]["seconds"]) >= 0.04
    times = side_by_side.ratio(results, "fast", "slow")
    assert times["quartiles"][0] <= times["median"] <= times["quartiles"][1]
    assert 2 < times["median"] < 5


def test_a_contestant_that_fails_or_dies_leaves_the_others_their_turns():
    entries = {
        "broken": (broken, (), {}),
        "dying": (dying, (), {}),
        "well": (reader, ("KERAS_VIT_TEST",), {"KERAS_VIT_TEST": "here"}),
    }
    results = side_by_side.measure(entries, rounds=2, warm_up=1)
    assert results["broken"]["error"] == "RuntimeError: no such device"
    assert "memory" in results["dying"]["error"]
    assert len(results["well"]["seconds"]) == 2 and results["well"]["peak_mib"] > 0


def test_a_training_image_costs_1_3_gigaflop():
    assert contestants.operations_per_image() == pytest.approx(1.3e9, rel=0.05)
