"""What the machine says of itself, and what follows for a run."""

import math
import pathlib

import pytest

from keras_vit import devices


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 fma", False), ("avx512f avx512_vnni", False), ("fpu avx512_bf16 fsrm", True)],
)
def test_bfloat16_is_for_processors_with_instructions_for_it(flags, expected, monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: [])
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: f"flags : {flags}\n")
    assert devices.has_bfloat16() == expected


@pytest.mark.parametrize(("architecture", "expected"), [(7, False), (8, True), (math.inf, True)])
def test_bfloat16_is_for_nvidia_gpus_since_ampere(architecture, expected, monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: ["gpu:0"])
    monkeypatch.setattr(devices, "_oldest_nvidia_architecture", lambda: architecture)
    assert devices.has_bfloat16() == expected


def test_a_machine_without_a_gpu_has_no_old_one():
    if not devices.accelerators():
        assert devices._oldest_nvidia_architecture() == math.inf
