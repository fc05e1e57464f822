"""Timing in turns, each contestant in a process of its own, and what the numbers are held to."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from benchmarks import contestants, scaling, side_by_side

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


# How the cost of a step grows


@pytest.mark.slow
def test_the_arithmetic_of_scaling_agrees_with_pytorchs_count_of_operations():
    pytest.importorskip("torch")
    script = """
    from torch.utils.flop_counter import FlopCounterMode
    from benchmarks import scaling
    for point in (scaling.Point(batch=3), scaling.Point(side=64, batch=2, depth=3, width=64)):
        make_step, arguments, _ = scaling.contestant(point)
        step = make_step(*arguments, augmentation=[])
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        assert counter.get_total_flops() == scaling.operations(point), point
    """
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True)


def test_every_sweep_varies_its_own_size_and_keeps_to_whole_heads_and_patches():
    for sweep, groups in scaling.SWEEPS.items():
        points = [point for group in groups for point in group]
        sizes = [getattr(point, sweep) for point in (scaling.BASELINE, *points)]
        assert len(set(sizes)) == len(sizes)
        for point in points:
            assert point.width % scaling.HEAD_SIZE == point.side % contestants.PATCH == 0


def test_memory_is_predicted_where_it_should_grow_in_proportion():
    assert scaling.predicted_memory("batch", scaling.Point(batch=32)) == 0.25
    assert scaling.predicted_memory("depth", scaling.Point(depth=12)) == 2
    assert scaling.predicted_memory("width", scaling.Point(width=512)) is None


def made_up(seconds, added_mib):
    return {"seconds": seconds, "peak_mib": 0.0, "added_mib": added_mib}


def test_time_is_compared_with_the_baseline_of_the_same_round():
    point = scaling.Point(batch=256)
    results = {scaling.BASELINE: made_up([1.0, 2.0, 3.0], 100.0)}
    results[point] = made_up([3.0, 6.0, 9.0], 220.0)
    row = scaling.compare("batch", results, point)
    assert row["time"]["median"] == pytest.approx(3)
    assert row["time"]["quartiles"] == pytest.approx([3, 3])
    assert row["images_per_second"] == pytest.approx(256 / 6)
    assert scaling.over(row, "time") == pytest.approx(1.5)
    assert scaling.over(row, "memory") == pytest.approx(1.1)


def test_the_table_marks_what_misses_the_target_and_the_verdict_names_it():
    slow, large, broken = (scaling.Point(batch=size) for size in (256, 512, 1024))
    results = {scaling.BASELINE: made_up([1.0, 1.0], 100.0), broken: {"error": "out of memory"}}
    results |= {slow: made_up([2.8, 2.8], 200.0), large: made_up([4.0, 4.0], 600.0)}
    rows = [scaling.compare("batch", results, point) for point in results]
    lines = {row["name"]: line for row, line in zip(rows, scaling.table("batch", rows)[1:])}
    assert "1.40!" in lines["batch 256"] and lines["batch 512"].endswith("1.50!")
    assert "!" not in lines["baseline"] and lines["batch 1024"].endswith("out of memory")
    missed, failed = scaling.verdict({"batch": rows})
    assert "batch 256 (time, 1.40); batch 512 (memory, 1.50)" in missed
    assert "batch 1024" in failed


def test_points_beside_a_baseline_that_failed_are_not_measured():
    point = scaling.Point(depth=2)
    results = {scaling.BASELINE: {"error": "gone"}, point: made_up([1.0, 1.0], 1.0)}
    assert scaling.compare("depth", results, point)["error"] == "baseline: gone"


def test_flatness_leaves_out_the_first_epoch():
    assert scaling.flatness([10.0, 100.0, 103.0, 102.0]).endswith("100 to 103 MiB, within 3.0%.")


def test_the_picture_of_scaling_is_drawn_without_the_points_that_failed(tmp_path):
    sweeps = {}
    for sweep, (group, *_) in scaling.SWEEPS.items():
        results = {point: made_up([1.0, 1.1], 1.0) for point in (scaling.BASELINE, *group)}
        results[group[-1]] = {"error": "out of memory"}
        sweeps[sweep] = [scaling.compare(sweep, results, point) for point in results]
    scaling.draw(sweeps, [100.0, 101.0], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
