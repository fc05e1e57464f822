"""Images that are made worse on purpose, and the table of published runs."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import results
from benchmarks.corruptions import CORRUPTIONS, blurred, compressed, noisy, pale


@pytest.fixture
def images():
    """Smooth colours with some noise, like photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (6, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (coarse + rng.normal(scale=5, size=coarse.shape)).astype("uint8")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_is_further_from_the_images_than_the_one_before(name, images):
    corrupt, settings = CORRUPTIONS[name]
    distances = []
    for setting in settings:
        worse = corrupt(images, setting)
        assert worse.shape == images.shape and worse.dtype == np.uint8
        distances.append(np.square(worse.astype(float) - images).mean())
    assert len(settings) == 5 and distances == sorted(distances) and distances[0] > 0


def test_noise_has_the_deviation_that_it_is_asked_for():
    gray = np.full((20, 32, 32, 3), 128, "uint8")
    assert (noisy(gray, 0.1) - 128.0).std() == pytest.approx(25.5, rel=0.02)


def test_paleness_shrinks_the_distance_to_the_mean_and_keeps_the_mean(images):
    worse = pale(images, 0.3)
    ratio = worse.astype(float).std(axis=(1, 2)) / images.astype(float).std(axis=(1, 2))
    np.testing.assert_allclose(ratio, 0.3, rtol=0.05)
    np.testing.assert_allclose(worse.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=0.5)


def test_blur_spreads_one_pixel_as_a_normal_distribution_and_into_no_other_image():
    images = np.zeros((2, 15, 15, 1), "uint8")
    images[0, 7, 7] = 250
    worse = blurred(images, 1.0)
    assert worse[0, 7, 7, 0] == round(250 * 0.3989**2) and worse[0, 7, 8, 0] == round(250 * 0.0965)
    assert not worse[1].any()


def test_jpeg_takes_colours_and_gray():
    for channels in (1, 3):
        flat = np.full((2, 16, 16, channels), 90, "uint8")
        np.testing.assert_allclose(compressed(flat, 80).astype(int), 90, atol=2)


@pytest.fixture
def published(monkeypatch, tmp_path):
    """An empty `results/`, and a function that makes the folder of a finished run."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")

    def finished(seed, accuracy, **settings):
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        config = {"recipe": "baseline", "seed": seed, "dataset": "cifar10", "epochs": 160}
        config |= {"data_dir": "/home/me", "output": str(run), **settings}
        metrics = {"dataset": "cifar10", "accuracy": accuracy, "calibration_error": 0.05}
        metrics |= {"epochs": 2}
        metrics |= {"training_seconds": 600, "parameters": 3_195_146}
        metrics |= {"device": "a processor", "backend": "jax"}
        (run / "config.json").write_text(json.dumps(config))
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "history.csv").write_text("epoch,accuracy,loss\n1,0.4,1.5\n2,0.6,1.1\n")
        return run

    return finished


def test_a_published_run_says_what_it_reached_and_not_where_it_lay(published, tmp_path):
    folder = results.add(published(3, 0.8))
    assert folder == tmp_path / "results" / "baseline" / "seed-3"
    assert not {"data_dir", "output"} & set(json.loads((folder / "config.json").read_text()))
    row = results.table(results.read())[2]
    assert row == (
        "| **baseline** | 3.2 M | 2 of 160 | 1.1e+14 | 80.00 %, one seed |  |  | "
        "5.00 %, one seed | 10 | "
        "a processor, jax | `python train.py --recipe baseline` |"
    )


def test_an_npz_file_is_published_without_the_folder_it_lay_in(published):
    folder = results.add(published(0, 0.8, dataset="/home/me/cifar10.npz"))
    assert "/home/me" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "history.csv").unlink(),
        lambda run: (run / "metrics.json").unlink(),
        lambda run: (run / "metrics.json").write_text("{}"),
        lambda run: (run / "metrics.json").write_text('{"dataset": "digits"}'),
        lambda run: (run / "metrics.json").write_text('{"dataset": "cifar10"}'),
        lambda run: (run / "config.json").write_text("[]"),
        lambda run: (run / "corruptions.json").write_text('{"clean": 0.5, "mean": 0.4}'),
    ],
)
def test_what_cannot_be_published_is_said_in_one_line_and_leaves_nothing(
    damage, capsys, monkeypatch, published, tmp_path
):
    run = published(0, 0.8)
    damage(run)
    monkeypatch.setattr("sys.argv", ["results", "--add", str(run)])
    with pytest.raises(SystemExit) as ended:
        results.main()
    assert ended.value.code == 2
    assert f"error: {run} cannot be published: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "results").exists()


def test_seeds_are_averaged_and_told_with_their_spread(published, tmp_path):
    for seed, accuracy in enumerate((0.78, 0.80, 0.82)):
        run = published(seed, accuracy, epochs=2, augmentation=False, milestones=[0.5])
        corruptions = {"clean": accuracy, "mean": accuracy / 2}
        (run / "corruptions.json").write_text(json.dumps(corruptions))
        results.add(run)
    runs = results.read()
    row = results.table(runs)[2]
    assert "| 80.00 ± 2.00 %, 3 seeds |  | 40.00 ± 1.00 %, 3 seeds |" in row
    assert (
        "`python train.py --recipe baseline --epochs 2 --no-augmentation --milestones 0.5`" in row
    )
    for draw in (results.draw, results.draw_accuracy_and_compute):
        draw(runs, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_seed_that_is_run_again_takes_nothing_over_from_before(published):
    run = published(0, 0.8)
    (run / "corruptions.json").write_text('{"clean": 0.8, "mean": 0.4}')
    results.add(run)
    (run / "corruptions.json").unlink()
    assert not (results.add(run) / "corruptions.json").exists()


def test_seeds_with_other_settings_are_not_averaged(published):
    results.add(published(0, 0.8))
    with pytest.raises(ValueError, match="differ in settings"):
        results.add(published(1, 0.7, epochs=12))
    assert not (results.RESULTS / "baseline" / "seed-1").exists()


def test_a_recipe_without_runs_is_named_as_not_run(published):
    def not_run():
        rows = results.table(results.read())
        return [row.split(" | ")[0] for row in rows if "not run yet" in row]

    assert not_run() == ["| **baseline**", "| **strong**", "| **quick**"]
    results.add(published(0, 0.7, epochs=2))
    assert not_run() == ["| **strong**", "| **quick**"]


def test_operations_are_those_of_the_settings(published):
    """Twice the parameters in matrices, three times, on each token, and attention."""
    results.add(published(0, 0.7, depth=1, embed_dim=64, mlp_dim=128, num_heads=4, pooling="mean"))
    (run,) = results.read()["baseline"]
    matrices, attention = 4 * 64 * 64 + 2 * 64 * 128, 2 * 64 * 64
    by_image = 64 * (6 * (matrices + attention) + 4 * 48 * 64)
    assert results.flop(run) == 2 * 50_000 * by_image


def test_an_early_stop_takes_the_operations_of_its_epochs(published):
    """Small images came first, until half of the epochs that were planned."""
    small = {"image_scales": [0.5], "image_scale_milestones": [0.5], "limit_train": 60_000}
    for seed, epochs in ((0, 4), (1, 2)):
        results.add(published(seed, 0.7, epochs=epochs, **small))
        shutil.move(results.RESULTS, results.RESULTS.with_name(str(seed)))
    stopped, whole = (
        results.flop(
            results.run_of(results.RESULTS.with_name(str(seed)) / "baseline" / f"seed-{seed}")
        )
        for seed in (0, 1)
    )
    assert 3 * stopped < 2 * whole


def test_a_run_that_starts_from_a_preset_counts_the_training_before_it(published, tmp_path):
    more = {"init_from": "cifar10-baseline", "epochs": 2}
    with pytest.raises(ValueError, match="--init-from cifar10-baseline was trained on is not"):
        results.add(published(1, 0.9, **more))
    results.add(published(0, 0.8))
    assert results.add(published(0, 0.9, **more)).parent.name == "baseline-4"
    third = {**more, "init_from": "cifar10-baseline-4"}
    assert results.add(published(0, 0.9, **third)).parent.name == "baseline-6"
    runs = results.read()
    assert list(runs) == ["baseline", "baseline-4", "baseline-6"]
    first, *others = (results.flop(run) for (run,) in runs.values())
    assert others == [2 * first, 3 * first]
    row = results.table(runs)[3]
    assert row.startswith("| **baseline, 4 epochs** | 3.2 M | 2 after 2 | 2.3e+14 |")
    assert "--epochs 2 --init-from cifar10-baseline`" in row
    assert results.table(runs)[4].startswith("| **baseline, 6 epochs** | 3.2 M | 2 after 4 | ")
    for draw in (results.draw, results.draw_accuracy_and_compute):
        draw(runs, tmp_path / "picture.png")


def test_the_table_takes_the_place_of_the_one_before():
    text = f"before\n{results.START}\nold\n{results.END}\nafter\n"
    once = results.replaced(text, ["new"])
    assert once == f"before\n{results.START}\n\nnew\n\n{results.END}\nafter\n"
    assert results.replaced(once, ["new"]) == once
