"""The arithmetic of data parallelism, held to real models, to its limits and to the docs."""

import math
import pathlib

import pytest

from benchmarks import parallel
from benchmarks.parallel import Link, all_reduce, communication, efficiency
from keras_vit import VisionTransformer
from keras_vit_cli.recipes import Recipe

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_the_parameters_of_a_recipe_are_those_of_its_model(pooling):
    sizes = {"patch_size": 4, "embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "depth": 3}
    model = VisionTransformer((8, 12, 3), 5, **sizes, pooling=pooling)
    expected = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    found = parallel.parameters(Recipe(**sizes, pooling=pooling), (8, 12, 3), 5)
    assert found == expected


def test_a_ring_sends_almost_twice_the_bytes_and_a_tree_few_messages():
    """Patarasuk and Yuan, 2009: no all-reduce sends less than `2 (n - 1) / n` of the bytes."""
    assert all_reduce(1e9, 8, Link(0, 1e9)) == pytest.approx(2 * 7 / 8)
    assert all_reduce(8, 256, Link(1, 1e9)) == pytest.approx(2 * math.log2(256))
    assert all_reduce(8, 2, Link(1, 1e9)) == pytest.approx(2)
    assert all_reduce(1e9, 1, Link(1, 1)) == 0


def test_over_a_network_each_device_of_a_board_sends_its_part_alone():
    machine = parallel.Machine("no time inside a board", 1, Link(0, math.inf), Link(0, 1e9))
    assert communication(8e9, 4, machine, devices=8) == pytest.approx(2 * 3 / 4)
    assert communication(8e9, 1, machine, devices=8) == 0


def test_the_backward_pass_hides_communication_up_to_its_own_length():
    assert efficiency(3, 2) == (3 / 5, 1)
    assert efficiency(3, 5) == (3 / 8, 3 / 6)


def test_the_page_on_scaling_has_the_tables_as_they_are_computed(capsys):
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    parallel.main()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
