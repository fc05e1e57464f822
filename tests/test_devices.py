"""Detection of the precisions that a device supports in hardware."""

import math
import pathlib

import pytest

from keras_vit import devices


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 fma", ["float32"]),
        ("avx512f avx512_vnni", ["float32"]),
        ("fpu avx512_bf16 fsrm", ["float32", "bfloat16"]),
    ],
)
def test_bfloat16_needs_a_processor_with_bfloat16_instructions(flags, expected, monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: [])
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: f"flags : {flags}\n")
    assert devices.precisions() == expected


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (6, ["float32"]),
        (7, ["float32", "float16"]),
        (8, ["float32", "bfloat16", "float16"]),
        (math.inf, ["float32", "bfloat16", "float16"]),
    ],
)
def test_bfloat16_needs_an_ampere_gpu_and_float16_a_volta_gpu(architecture, expected, monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: ["gpu:0"])
    monkeypatch.setattr(devices, "_oldest_nvidia_architecture", lambda: architecture)
    assert devices.precisions() == expected


def test_the_oldest_gpu_architecture_is_infinite_without_a_gpu():
    if not devices.accelerators():
        assert devices._oldest_nvidia_architecture() == math.inf
