"""Wrong input at every surface: one line that names the value and what was expected, status 2."""

import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_vit
from keras_vit.data import Dataset, DatasetError
from keras_vit.layers import ClassToken, Dropout, PositionEmbedding
from keras_vit.loading import ModelError
from keras_vit_cli import backend, main

ROOT = pathlib.Path(__file__).resolve().parents[2]

COMMAND_LINES = [
    ("--epochs 0", "--epochs must be at least 1, but is 0"),
    ("--epochs -3", "--epochs must be at least 1, but is -3"),
    ("--epochs many", "--epochs: invalid int value: 'many'"),
    ("--epochs 1e3", "--epochs: invalid int value: '1e3'"),
    ("--epochs", "--epochs: expected one argument"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--batch-size 0", "--batch-size must be at least 1, but is 0"),
    ("--batch-size 2.5", "--batch-size: invalid int value: '2.5'"),
    ("--learning-rate 0", "--learning-rate must be greater than 0, but is 0.0"),
    ("--learning-rate=-1e-3", "--learning-rate must be greater than 0, but is -0.001"),
    ("--learning-rate 1e-999", "--learning-rate must be greater than 0, but is 0.0"),
    ("--learning-rate nan", "--learning-rate must be a finite number, but is nan"),
    ("--learning-rate inf", "--learning-rate must be a finite number, but is inf"),
    ("--learning-rate fast", "--learning-rate: invalid float value: 'fast'"),
    ("--weight-decay -0.1", "--weight-decay must be at least 0, but is -0.1"),
    ("--dropout 1", "--dropout must be below 1, but is 1.0"),
    ("--dropout -0.1", "--dropout must be at least 0, but is -0.1"),
    ("--milestones 0.5 1.5", "--milestones must be below 1, but is 1.5"),
    ("--stochastic-depth 1", "--stochastic-depth must be below 1, but is 1.0"),
    ("--erasing 1.5", "--erasing must be at most 1, but is 1.5"),
    ("--mixup 0.6 --cutmix 0.5", "--mixup 0.6 and --cutmix 0.5 must add up to at most 1"),
    ("--label-smoothing 1", "--label-smoothing must be below 1, but is 1.0"),
    ("--warmup 0.1 --recipe baseline", "--warmup 0.1 needs --schedule cosine"),
    ("--warmup 1 --schedule cosine", "--warmup must be below 1, but is 1.0"),
    ("--schedule linear", "invalid choice: 'linear' (choose from"),
    ("--milestones 0", "--milestones must be greater than 0, but is 0.0"),
    ("--crop-scale 0.5", "--crop-scale must be two numbers, the smaller one first, but is 0.5"),
    ("--crop-ratio 2 1", "--crop-ratio must be two numbers, the smaller one first, but is 2 1"),
    ("--image-scales 0.5", "in increasing order, but are 0.5 and none"),
    ("--image-scales 1.5 --image-scale-milestones 0.5", "--image-scales must be below 1, but is"),
    ("--image-scales 0.7 0.5 --image-scale-milestones 0.4 0.6", "but are 0.7 0.5 and 0.4 0.6"),
    ("--recipe quick --no-augmentation", "--image-scales needs --augmentation"),
    ("--milestones", "--milestones: expected at least one argument"),
    ("--num-heads 7", "--embed-dim must be a multiple of --num-heads 7, but is 256"),
    ("--num-heads 0", "--num-heads must be at least 1, but is 0"),
    ("--depth 0", "--depth must be at least 1, but is 0"),
    ("--seed -1", "--seed must be at least 0, but is -1"),
    ("--seed 4294967296", "--seed must be below 4294967296, but is 4294967296"),
    ("--limit-train 0", "--limit-train must be at least 1, but is 0"),
    ("--validation -1", "--validation must be at least 0, but is -1"),
    ("--save-every 0", "--save-every must be at least 1, but is 0"),
    ("--freeze 2", "--freeze 2 needs --init-from"),
    ("--config a.json --init-from b --extend 2", "--extend 2 takes its settings from --init-from"),
    ("--init-from b --extend 2 --recipe strong", "for so many epochs: leave out --recipe"),
    ("--init-from b --extend 2 --epochs 3", "for so many epochs: leave out --epochs"),
    ("--backend theano", "invalid choice: 'theano' (choose from"),
    ("--recipe best", "invalid choice: 'best' (choose from"),
    ("--augmentation=yes", "ignored explicit argument 'yes'"),
    ("extra", "unrecognized arguments: extra"),
    ("two\nlines", "unrecognized arguments: two lines"),
    ("--config missing.json", "--config missing.json cannot be read: No such file"),
    ("--config .", "--config . cannot be read: Is a directory"),
    ("--config=", "--config must not be empty"),
    ("--output=", "--output must not be empty"),
    ("--figures-dir=", "--figures-dir must not be empty"),
    ("--dataset=", "--dataset must not be empty"),
]

CONFIGS = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b'{"epochs": 3', "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b"[1]", "must hold an object, but holds [1]"),
    (b"null", "must hold an object, but holds None"),
    (b'{"epoch": 3}', "unknown setting 'epoch'"),
    (b'{"overwrite now": true}', "unknown setting 'overwrite now'"),
    (b'{"epochs": "3"}', "epochs = '3', expected a value of type int"),
    (b'{"epochs": 3.0}', "epochs = 3.0, expected a value of type int"),
    (b'{"epochs": true}', "epochs = True, expected a value of type int"),
    (b'{"epochs": null}', "epochs = None, expected a value of type int"),
    (b'{"epochs": 0}', "--epochs must be at least 1, but is 0"),
    (b'{"learning_rate": null}', "learning_rate = None, expected a value of type float"),
    (b'{"learning_rate": NaN}', "--learning-rate must be a finite number, but is nan"),
    (b'{"learning_rate": 1e999}', "--learning-rate must be a finite number, but is inf"),
    (b'{"learning_rate": ' + b"9" * 400 + b"}", "--learning-rate must be a finite number"),
    (b'{"milestones": ["a"]}', "milestones = ['a'], expected a value of type tuple"),
    (b'{"milestones": 0.5}', "milestones = 0.5, expected a value of type tuple"),
    (b'{"milestones": [true]}', "milestones = [True], expected a value of type tuple"),
    (b'{"milestones": [0.5, 2]}', "--milestones must be below 1, but is 2"),
    (b'{"augmentation": 1}', "augmentation = 1, expected a value of type bool"),
    (
        b'{"recipe": "best"}',
        "--recipe must be one of baseline, strong, quick, finetune, digits, not best",
    ),
    (b'{"dataset": ["digits"]}', "dataset = ['digits'], expected a value of type str"),
    (b'{"dataset": null}', "dataset = None, expected a value of type str"),
    (b'{"output": ""}', "--output must not be empty"),
    (b'{"output": "a\\u0000b"}', "--output must hold no null byte, but is 'a\\x00b'"),
    (b'{"seed": 99999999999}', "--seed must be below 4294967296, but is 99999999999"),
    (b'{"embed_dim": 100}', "--embed-dim must be a multiple of --num-heads 8, but is 100"),
]


def assert_one_line(error, expected):
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
    assert expected in error


@pytest.fixture
def before_keras(monkeypatch):
    """What is wrong with the words alone is said before Keras is imported, which takes seconds."""
    monkeypatch.setattr(backend, "quiet", lambda: pytest.fail("Keras would have been imported"))


@pytest.mark.parametrize(("line", "expected"), COMMAND_LINES, ids=[x for x, _ in COMMAND_LINES])
def test_a_wrong_command_line_ends_at_once_with_one_line(
    line, expected, before_keras, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main.train([line] if "\n" in line else line.split(" ")) == 2
    captured = capsys.readouterr()
    assert_one_line(captured.err, expected)
    assert not captured.out and not list(tmp_path.iterdir())


def test_a_process_ends_with_that_line_and_status(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "train.py", "--epochs", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert_one_line(process.stderr, "--epochs must be at least 1, but is 0")
    assert process.returncode == 2 and not process.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "expected"), CONFIGS, ids=[str(x)[:40] for x, _ in CONFIGS])
def test_a_wrong_configuration_ends_at_once_with_one_line(
    content, expected, before_keras, capsys, monkeypatch, tmp_path
):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert main.train([f"--config={path}"]) == 2
    assert_one_line(capsys.readouterr().err, expected)
    assert list(tmp_path.iterdir()) == [path]


def arrays(**changes):
    """A small `.npz` data set with some arrays changed; None leaves one out."""
    images, labels = np.zeros((12, 8, 8, 3), "uint8"), np.arange(12) % 3
    good = {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6]}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


# The others are in `test_data.py`.
DATA = [
    (arrays(y_test=None), "'y_test is not a file in the archive'"),
    (None, "cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("content", "expected"), DATA, ids=[x for _, x in DATA])
def test_a_wrong_data_file_ends_with_one_line(content, expected, capsys, monkeypatch, tmp_path):
    path = tmp_path / "set.npz"
    if content is not None:
        np.savez(path, **content)
    monkeypatch.chdir(tmp_path)
    assert main.train(["--dataset=set.npz", "--patch-size=4"]) == 2
    error = capsys.readouterr().err
    assert_one_line(error, expected)
    assert "set.npz" in error
    assert {entry.name for entry in tmp_path.iterdir()} <= {"set.npz"}


DIGITS = [
    ("--limit-train=5", "digits has 1438 training images of 10 classes"),
    (
        "--validation=1437",
        "--validation 1437 is more than the 1,438 training images",
    ),
    ("--limit-train=1430", "Received: limit_train=1430"),
    ("--patch-size=5", "--patch-size must divide the image side of 32 pixels, but is 5"),
    ("--patch-size=64", "must divide the image side of 32 pixels, but is 64"),
    (f"--output={'x' * 300}", "file name too long"),
    (
        f"--output={__file__}",
        f"Cannot write to {__file__}: not a directory. Existing files are",
    ),
    (
        f"--figures-dir={__file__}",
        "are unchanged. Choose another --figures-dir.",
    ),
]


@pytest.mark.parametrize(("argument", "expected"), DIGITS)
def test_settings_that_the_digits_or_the_machine_cannot_fulfil_end_with_one_line(
    argument, expected, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main.train(["--dataset=digits", "--epochs=1", argument]) == 2
    assert_one_line(capsys.readouterr().err, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no_such_set", "no/such/set", "../x", "imdb_reviews", "a b\nc"])
def test_a_name_that_is_no_image_set_ends_with_one_line(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main.train([f"--dataset={name}", f"--data-dir={tmp_path / 'data'}"]) == 2
    error = capsys.readouterr().err
    assert_one_line(error, "image classification set")
    assert not list(tmp_path.iterdir())


def small(**changes):
    sizes = {"patch_size": 4, "embed_dim": 8, "mlp_dim": 8, "num_heads": 2, "depth": 1}
    return keras_vit.VisionTransformer(**{"image_shape": (8, 8, 3), **sizes, **changes})


def rollout(scores=None, **options):
    scores = np.full((1, 2, 2, 5, 5), 0.2) if scores is None else scores
    return keras_vit.attention_rollout(scores, **options)


def colours():
    images, labels = np.zeros((12, 8, 8, 3), "uint8"), np.arange(12) % 3
    return Dataset("colours", images, labels, images, labels, ["r", "g", "b"], True)


FUNCTIONS = {
    "image_shape=32": lambda: small(image_shape=32),
    "image_shape=(8, 8)": lambda: small(image_shape=(8, 8)),
    "image_shape=(None, None, 3)": lambda: small(image_shape=(None, None, 3)),
    "image_shape=(8, 8, 0)": lambda: small(image_shape=(8, 8, 0)),
    "height=8, width=10": lambda: small(image_shape=(8, 10, 3)),
    "num_classes=0": lambda: small(num_classes=0),
    "num_classes='ten'": lambda: small(num_classes="ten"),
    "patch_size=3": lambda: small(patch_size=3),
    "patch_size=-4": lambda: small(patch_size=-4),
    "embed_dim=9, num_heads=2": lambda: small(embed_dim=9),
    "mlp_dim=2.5": lambda: small(mlp_dim=2.5),
    "depth=True": lambda: small(depth=True),
    "dropout=1.5": lambda: small(dropout=1.5),
    "stochastic_depth=1": lambda: small(stochastic_depth=1),
    "augmentation='flip'": lambda: small(augmentation="flip"),
    "augmentation=[<built-in function abs>]": lambda: small(augmentation=[abs]),
    "shape=(None, 192) from 'flatten_1'": lambda: small(
        augmentation=[keras.layers.Flatten(name="flatten_1")]
    ),
    "patch_size=4, height=6, width=8": lambda: small(augmentation=[keras.layers.Resizing(6, 8)]),
    "'dropout' twice. Pass another `name` to this SpatialDropout2D": lambda: small(
        augmentation=[keras.layers.SpatialDropout2D(0.1, name="dropout")]
    ),
    "'flip' twice": lambda: small(
        augmentation=[keras.layers.RandomFlip("horizontal", name="flip")] * 2
    ),
    "'mix', a `keras.layers.MixUp`": lambda: small(
        augmentation=[keras.layers.Pipeline([keras.layers.MixUp(name="mix")])]
    ),
    "Received: images.shape=(0, 8, 8, 3)": lambda: small().adapt(np.zeros((0, 8, 8, 3))),
    "mixup='much'": lambda: keras_vit.MixUpCutMix(mixup="much"),
    "dropout='much'": lambda: small(dropout="much"),
    "dropout=nan": lambda: small(dropout=float("nan")),
    "patch_size=0": lambda: keras_vit.Patches(0),
    "shape=(2, 8, 8)": lambda: keras_vit.Patches(4)(np.zeros((2, 8, 8), "float32")),
    "height=0": lambda: keras_vit.RandomResizedCrop(0, 8),
    "width=1.5": lambda: keras_vit.RandomResizedCrop(8, 1.5),
    "scale=(0, 1)": lambda: keras_vit.RandomResizedCrop(8, 8, scale=(0, 1)),
    "scale=(0.9, 0.5)": lambda: keras_vit.RandomResizedCrop(8, 8, scale=(0.9, 0.5)),
    "scale=0.5": lambda: keras_vit.RandomResizedCrop(8, 8, scale=0.5),
    "ratio=(-1, 1)": lambda: keras_vit.RandomResizedCrop(8, 8, ratio=(-1, 1)),
    "ratio=(1, inf)": lambda: keras_vit.RandomResizedCrop(8, 8, ratio=(1, float("inf"))),
    "interpolation='cubic'": lambda: keras_vit.RandomResizedCrop(8, 8, interpolation="cubic"),
    "data.shape=(8, 8)": lambda: keras_vit.RandomResizedCrop(8, 8)(np.zeros((8, 8))),
    "rate=2": lambda: Dropout(2),
    "(2, 3)": lambda: ClassToken()(np.zeros((2, 3), "float32")),
    "(2, 3, 4, 5)": lambda: PositionEmbedding()(np.zeros((2, 3, 4, 5), "float32")),
    "images.shape=(8, 8, 3)": lambda: keras_vit.attention_scores(small(), np.zeros((8, 8, 3))),
    "images.shape=(2, 9, 9, 3)": lambda: keras_vit.attention_scores(
        small(), np.zeros((2, 9, 9, 3))
    ),
    "images.shape=(0, 8, 8, 3)": lambda: keras_vit.attention_scores(
        small(), np.zeros((0, 8, 8, 3))
    ),
    "model='plain'": lambda: keras_vit.attention_scores(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="plain"), np.zeros((1, 4))
    ),
    "scores.shape=(5, 5)": lambda: rollout(np.zeros((5, 5))),
    "scores.shape=(1, 2, 2, 5, 4)": lambda: rollout(np.zeros((1, 2, 2, 5, 4))),
    "scores.shape=(0, 2, 2, 5, 5)": lambda: rollout(np.zeros((0, 2, 2, 5, 5))),
    "nan": lambda: rollout(np.full((1, 2, 2, 5, 5), np.nan)),
    "-0.2": lambda: rollout(np.full((1, 2, 2, 5, 5), -0.2)),
    "head_fusion='median'": lambda: rollout(head_fusion="median"),
    "head_fusion=None": lambda: rollout(head_fusion=None),
    "discard_ratio=1": lambda: rollout(discard_ratio=1),
    "discard_ratio=nan": lambda: rollout(discard_ratio=float("nan")),
    "discard_ratio='half'": lambda: rollout(discard_ratio="half"),
    "Received: limit_train=0": lambda: colours().limit_train(0, 0),
    "Received: validation=99": lambda: colours().hold_out(99, 0),
    "'no_such_set'": lambda: keras_vit.load_dataset("no_such_set"),
    "missing.npz": lambda: keras_vit.load_dataset("missing.npz"),
    "missing.keras": lambda: keras_vit.load_model("missing.keras"),
}


@pytest.mark.parametrize("received", FUNCTIONS)
def test_a_wrong_argument_of_a_public_function_is_named_in_its_documented_error(received):
    documented = (ValueError, DatasetError, ModelError)
    with pytest.raises(documented) as caught:
        FUNCTIONS[received]()
    assert type(caught.value) in documented, "a subclass that nobody documented"
    assert received in str(caught.value)
