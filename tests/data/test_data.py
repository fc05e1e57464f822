import re
import sys
import types

import numpy as np
import pytest
from conftest import cifar10_on_disk
from PIL import Image
from sklearn.datasets import load_digits

from keras_vit import load_dataset
from keras_vit.data import (
    DatasetError,
    DatasetUnavailable,
    StreamedImages,
    images,
    load_unseen,
)
from keras_vit.data import tfds as tfds_sets
from keras_vit.data.dataset import digest
from keras_vit.data.images import ImageError
from keras_vit.data.tfds import RESIZED_SIDE


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_digits_are_rgb_images_of_32x32_pixels(digits):
    assert digits.train_images.shape == (1438, 32, 32, 3)
    assert digits.test_images.shape == (359, 32, 32, 3)
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.image_shape == (32, 32, 3)
    assert digits.class_names == list("0123456789")
    assert not digits.horizontal_flip


def test_digits_are_the_scans_of_scikit_learn(digits):
    scans = load_digits()
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    shrunk = images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64)
    originals = scans.images.reshape(-1, 64) * 255 / 16
    distances = ((shrunk[:200, None] - originals[None]) ** 2).mean(axis=2)
    assert np.array_equal(scans.target[distances.argmin(axis=1)], labels[:200])
    assert distances.min(axis=1).max() < 30**2


def test_the_split_of_digits_is_stratified(digits):
    fractions = np.bincount(digits.test_labels) / np.bincount(load_digits().target)
    assert np.allclose(fractions, 0.2, atol=0.01)


def test_an_unknown_data_set_is_named_in_the_error():
    with pytest.raises(DatasetError, match="'no_such_set'.*'digits'"):
        load_dataset("no_such_set")


def prepare(folder, name, splits, shape=(None, None, 3)):
    """Prepares a data set for TensorFlow Datasets.

    `splits` gives each split's labels; images are dark for even labels, and light for odd ones.
    """
    tfds = pytest.importorskip("tensorflow_datasets")

    def info(self):
        features = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=["dark", "light"]),
        }
        features, keys = tfds.features.FeaturesDict(features), ("image", "label")
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

    def generate(self, labels):
        for index, label in enumerate(labels):
            height, width = (20 + index, 30) if shape[0] is None else shape[:2]
            image = np.full((height, width, 3), 60 if label % 2 == 0 else 200, "uint8")
            yield index, {"image": image, "label": label}

    members = {
        "__module__": __name__,
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_generate_examples": generate,
        "_split_generators": lambda self, _: {
            split: self._generate_examples(labels) for split, labels in splits.items()
        },
    }
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=folder).download_and_prepare()


def test_images_of_different_sizes_are_resized_and_split(tmp_path):
    prepare(tmp_path, "KerasVitMixed", {"train": [0, 1] * 10})
    dataset = load_dataset("keras_vit_mixed", tmp_path)
    assert dataset.train_images.shape == (16, RESIZED_SIDE, RESIZED_SIDE, 3)
    assert dataset.test_images.shape == (4, RESIZED_SIDE, RESIZED_SIDE, 3)
    assert dataset.class_names == ["dark", "light"]
    assert np.array_equal(dataset.train_images[:, 0, 0, 0], np.where(dataset.train_labels, 200, 60))
    assert np.bincount(dataset.test_labels).tolist() == [2, 2]


def test_small_images_keep_their_size_and_large_ones_are_resized(tmp_path):
    for side, expected in ((20, 20), (130, RESIZED_SIDE)):
        name = f"KerasVitSide{side}"
        prepare(tmp_path, name, {"train": [0, 1], "test": [0, 1]}, (side, side, 3))
        dataset = load_dataset(f"keras_vit_side{side}", tmp_path)
        assert dataset.train_images.shape == (2, expected, expected, 3)
        assert dataset.test_images.shape == (2, expected, expected, 3)


def test_an_image_size_and_a_way_of_resizing_apply_to_tensorflow_datasets(tmp_path):
    """Images of 20x30 pixels and one value: padding is black, and nothing else is."""
    prepare(tmp_path, "KerasVitWide", {"train": [0, 1], "test": [1]}, (20, 30, 3))
    padded = load_dataset("keras_vit_wide", tmp_path, 24, "pad")
    assert padded.resize == "pad"
    values = padded.test_images[0, :, :, 0]
    assert values.shape == (24, 24) and (values[4:20] == 200).all()
    assert not values[:4].any() and not values[20:].any()
    cut = load_dataset("keras_vit_wide", tmp_path, (10, 40), "crop")
    assert cut.train_images.shape == (2, 10, 40, 3)
    assert np.unique(cut.train_images).tolist() == [60, 200]
    assert load_dataset("keras_vit_wide", tmp_path, multiple_of=7).image_shape == (21, 28, 3)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_images_of_tensorflow_datasets_are_fitted_like_files(resize):
    pytest.importorskip("tensorflow")
    y, x = np.mgrid[:90, :130]
    image = np.dstack([x, 2 * y, 255 - x]).astype("uint8")
    expected = images._fitted(Image.fromarray(image), (24, 20), resize)
    found = np.asarray(tfds_sets._fitted(image, (24, 20), resize)).astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 3


def test_without_public_test_labels_the_validation_split_becomes_the_test_set(tmp_path):
    splits = {"train": [0, 1, 0, 1], "test": [-1, -1], "validation": [1, 1, 0]}
    prepare(tmp_path, "KerasVitSecret", splits)
    dataset = load_dataset("keras_vit_secret", tmp_path)
    assert sorted(dataset.test_labels) == [0, 1, 1]
    assert sorted(dataset.train_labels) == [0, 0, 1, 1]


def test_a_large_set_of_tensorflow_datasets_is_memory_mapped_and_bounded(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path, "KerasVitLarge", {"train": [0, 1, 1] * 100})
    whole = load_dataset("keras_vit_large", tmp_path, 8)
    monkeypatch.setattr("keras_vit.data.cache.IN_MEMORY", 100)
    capsys.readouterr()
    for decoded in (1, 0):
        mapped = load_dataset("keras_vit_large", tmp_path, 8)
        assert capsys.readouterr().out.count("Decoding 300 images, once") == decoded
        for name in ("train", "test"):
            images = getattr(mapped, f"{name}_images")
            assert isinstance(images, StreamedImages)
            assert np.array_equal(images[:], getattr(whole, f"{name}_images"))
            labels = getattr(mapped, f"{name}_labels")
            assert np.array_equal(labels, getattr(whole, f"{name}_labels"))
        assert digest(mapped) == digest(whole)
    monkeypatch.setenv("KERAS_VIT_CACHE_GIB", "1e-5")
    assert load_dataset("keras_vit_large", tmp_path, 8).image_shape == (8, 8, 3)


@pytest.mark.parametrize(("size", "resize"), [(None, "squash"), (9, "squash"), (9, "pad")])
def test_what_the_cache_cannot_hold_of_tensorflow_datasets_is_read_as_needed(
    size, resize, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shape = (None, None, 3) if size else (12, 10, 3)
    name = f"keras_vit_huge_{'fitted' if size else 'own'}_{resize}"
    prepare(
        tmp_path, name.title().replace("_", ""), {"train": [0, 1, 1] * 20, "test": [0, 1]}, shape
    )
    whole = load_dataset(name, tmp_path, size, resize)
    monkeypatch.setattr("keras_vit.data.cache.IN_MEMORY", 100)
    monkeypatch.setenv("KERAS_VIT_CACHE_GIB", "0")
    capsys.readouterr()
    for listed in (2, 0):  # Both splits, once.
        read = load_dataset(name, tmp_path, size, resize)
        output = capsys.readouterr().out
        assert "than the cache's 0 GiB: they are read as they are needed" in output
        assert output.count(f"images of {name}, once") == listed
        for part in ("train", "test"):
            images, expected = (getattr(x, f"{part}_images") for x in (read, whole))
            assert isinstance(images, StreamedImages)
            chosen = np.random.default_rng(0).permutation(len(images))
            assert np.array_equal(images[chosen], expected[chosen])
            assert np.array_equal(*(getattr(x, f"{part}_labels") for x in (read, whole)))
        assert digest(read) == digest(whole)
    for path in (tmp_path / name).rglob("*.tfrecord*"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ImageError, match="tfrecord.* cannot be read any more: its record"):
        read.train_images[:]


def test_splits_that_fit_into_the_cache_one_by_one_do_not_displace_each_other(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path, "KerasVitTwoParts", {"train": [0, 1, 1] * 20, "test": [0, 1] * 10})
    monkeypatch.setattr("keras_vit.data.cache.IN_MEMORY", 100)
    monkeypatch.setenv("KERAS_VIT_CACHE_GIB", str(70 * 8 * 8 * 3 / 2**30))
    for decoded in (1, 0):
        dataset = load_dataset("keras_vit_two_parts", tmp_path, 8)
        output = capsys.readouterr().out
        assert output.count("Decoding") == output.count("Decoding 20 images, once") == decoded
        assert "60 images of 8x8 pixels take" in output and len(dataset.train_images) == 60


def test_records_of_another_format_are_not_read_as_needed():
    tfds = pytest.importorskip("tensorflow_datasets")
    file_format = tfds.core.FileFormat.ARRAY_RECORD
    splits = {"train": types.SimpleNamespace(filepaths=[])}
    info = types.SimpleNamespace(file_format=file_format, splits=splits)
    builder = types.SimpleNamespace(info=info)
    with pytest.raises(ImageError, match="format array_record cannot .* a smaller --image-size"):
        tfds_sets._streamed(builder, "train", None, "squash", (1, 8, 8, 3), [])


def test_a_data_set_without_a_training_split_is_tested_on_and_not_trained_on(tmp_path):
    prepare(tmp_path, "KerasVitTestOnly", {"test": [0, 1]})
    with pytest.raises(DatasetError, match="keras_vit_test_only has no labelled split named"):
        load_dataset("keras_vit_test_only", tmp_path)
    arguments = (64, 64), ["light", "dark"], (), tmp_path
    dataset, left_out = load_unseen("keras_vit_test_only", *arguments)
    assert left_out == {} and sorted(dataset.test_labels) == [0, 1]
    light = dataset.test_images[dataset.test_labels == 0]
    assert np.all(light == 200)


def test_a_data_set_too_small_to_split_is_refused(tmp_path):
    prepare(tmp_path, "KerasVitTwo", {"train": [0, 1]})
    with pytest.raises(DatasetError, match="keras_vit_two has too few images"):
        load_dataset("keras_vit_two", tmp_path)


def test_a_missing_tensorflow_datasets_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DatasetError, match="pip install tensorflow tensorflow-datasets"):
        load_dataset("cifar10")


def test_a_prepared_data_set_needs_no_network(monkeypatch, tmp_path):
    prepare(tmp_path, "KerasVitPrepared", {"train": [0, 1], "test": [0]}, (20, 20, 3))
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", pytest.fail)
    monkeypatch.setattr("requests.Session.send", pytest.fail)
    assert len(load_dataset("keras_vit_prepared", tmp_path).train_images) == 2


def test_a_damaged_prepared_data_set_is_named_in_the_error(tmp_path):
    prepare(tmp_path, "KerasVitDamaged", {"train": [0, 1] * 10, "test": [0]}, (20, 20, 3))
    (path,) = tmp_path.rglob("*train.tfrecord*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=f"keras_vit_damaged in {path.parent} cannot be read"):
        load_dataset("keras_vit_damaged", tmp_path)


@pytest.fixture
def unreachable(monkeypatch):
    """An unreachable download server; the list of requests to it."""
    requests, sent = pytest.importorskip("requests"), []

    def send(self, request, **_):
        sent.append((request.method, request.url))
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(requests.Session, "send", send)
    return sent


def test_without_a_network_the_error_says_how_to_provide_the_data_set(unreachable, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(DatasetUnavailable, match=r"cifar10 is not in .*no route.*--data-dir"):
        load_dataset("cifar10", tmp_path)
    ((method, url),) = unreachable
    assert method == "HEAD" and url.endswith("cifar-10-binary.tar.gz")


def test_downloaded_archives_need_no_network(monkeypatch, unreachable, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    (tmp_path / "downloads" / "cifar10").mkdir(parents=True)
    (tmp_path / "downloads" / "cifar10" / "cifar.tar.gz.INFO").touch()
    prepared = []
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: prepared.append(True)
    )
    with pytest.raises(DatasetError, match="no labelled split named 'train'"):
        load_dataset("cifar10", tmp_path)
    assert prepared and not unreachable


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), DatasetUnavailable),
        (TimeoutError("timed out"), DatasetUnavailable),
        (AttributeError("module has no attribute 'MAX_RETRIES'"), DatasetError),
        (ImportError("no module named 'scipy'"), DatasetError),
    ],
)
def test_only_network_and_disk_errors_mean_unavailable(error, kind, monkeypatch, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("requests.Session.send", lambda *_, **__: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(DatasetError, match=re.escape(str(error))) as raised:
        load_dataset("cifar10", tmp_path)
    assert type(raised.value) is kind


def test_a_data_set_without_labelled_images_is_refused_before_any_download(monkeypatch, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", pytest.fail)
    with pytest.raises(DatasetError, match="not an image classification set"):
        load_dataset("ag_news_subset", tmp_path)


def test_cifar10_has_the_published_statistics():
    dataset = cifar10_on_disk()
    assert dataset.train_images.shape == (50000, 32, 32, 3)
    assert dataset.test_images.shape == (10000, 32, 32, 3)
    assert np.bincount(dataset.train_labels).tolist() == [5000] * 10
    mean = dataset.train_images.mean(axis=(0, 1, 2)) / 255
    assert np.allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert dataset.class_names[3] == "cat"
    assert dataset.horizontal_flip


def arrays(**changes):
    """The arrays of an `.npz` file of small images."""
    images, labels = np.arange(6 * 48, dtype="uint8").reshape(6, 4, 4, 3), np.arange(6) % 3
    content = {"x_train": images, "y_train": labels, "x_test": images[:3], "y_test": labels[:3]}
    return {name: array for name, array in {**content, **changes}.items() if array is not None}


def test_an_npz_file_with_keras_s_array_names_is_read_unchanged(tmp_path):
    names = np.array(["żaba", "kot", "pies"])
    np.savez(tmp_path / "animals.npz", **arrays(class_names=names))
    data = load_dataset(str(tmp_path / "animals.npz"))
    expected = arrays()
    assert np.array_equal(data.train_images, expected["x_train"])
    assert np.array_equal(data.test_labels, expected["y_test"])
    assert (data.name, data.class_names) == ("animals", list(names))
    assert data.horizontal_flip


def test_grayscale_images_and_labels_in_a_column_are_read_as_in_keras_s_own_files(tmp_path):
    images, labels = np.zeros((4, 28, 28), "uint8"), np.array([[0], [1], [0], [1]], "uint8")
    content = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez_compressed(tmp_path / "mnist.npz", **content)
    data = load_dataset(str(tmp_path / "mnist.npz"))
    assert data.train_images.shape == (4, 28, 28, 1)
    assert (data.train_labels.shape, data.train_labels.dtype) == ((4,), "int64")
    assert data.class_names == ["0", "1"]
    assert not data.horizontal_flip


def scaled(function):
    """Changes of both arrays of images, by a function of their numbers from 0 to 255."""
    images = arrays()["x_train"].astype(int)
    return {"x_train": function(images), "x_test": function(images[:3])}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x: (x / 255).astype("float32"),
        lambda x: x.astype("float16"),
        lambda x: x + 0.3 * (x < 255),
    ],
)
def test_numbers_from_0_to_1_or_to_255_become_bytes(function, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays(**scaled(function)))
    dataset = load_dataset(str(tmp_path / "data.npz"))
    assert dataset.train_images.dtype == "uint8"
    assert np.array_equal(dataset.train_images, arrays()["x_train"])


def test_class_names_of_an_npz_file_may_be_bytes(tmp_path):
    names = ["żaba", "kot", "pies"]
    np.savez(tmp_path / "data.npz", **arrays(class_names=np.array([x.encode() for x in names])))
    assert load_dataset(str(tmp_path / "data.npz")).class_names == names


def test_images_of_arrays_in_training_and_test_or_in_two_classes_are_counted(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype("uint8")
    train, test = images[:6].copy(), images[6:].copy()
    train[1], test[2] = train[0], train[4]  # One of classes 0 and 1, one of class 1 alone.
    labels = {"y_train": np.array([0, 1, 2, 0, 1, 2]), "y_test": np.array([0, 0, 1])}
    np.savez(tmp_path / "data.npz", **labels, x_train=train, x_test=test)
    load_dataset(str(tmp_path / "data.npz"))
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: 1 of 3 test images of data are training images, too: 2 is training image 4",
        "WARNING: 1 image of data in more than one class: 0 and 1",
    ]


def test_a_model_is_tested_on_an_npz_file_without_training_images(tmp_path, capsys):
    content = arrays(x_train=None, y_train=None, y_test=np.array([2, 0, 2]))
    np.savez(tmp_path / "data.npz", **content)
    source, size = str(tmp_path / "data.npz"), (4, 4)
    dataset, left_out = load_unseen(source, size, ["a", "b", "c"], ())
    assert dataset.test_labels.tolist() == [2, 0, 2] and left_out == {}
    assert np.array_equal(dataset.test_images, content["x_test"])
    assert "no names: taken in the order a, b, c" in capsys.readouterr().err
    with pytest.raises(DatasetError, match="labels up to 2, expected labels of 2 classes"):
        load_unseen(source, size, ["a", "b"], ())
    np.savez(tmp_path / "data.npz", **content, class_names=np.array(["x", "b", "c"]))
    dataset, left_out = load_unseen(source, size, ["c", "b", "a"], ())
    assert dataset.test_labels.tolist() == [0, 0] and dataset.class_names == ["c", "b", "a"]
    assert left_out == {"of classes that the model was not trained on (x)": 1}
    assert np.array_equal(dataset.test_images, content["x_test"][[0, 2]])
    assert dataset.test_indices.tolist() == [0, 2]
    with pytest.raises(DatasetError, match=r"\(d, e\) differ from those of data \(x, b, c\)"):
        load_unseen(source, size, ["d", "e"], ())
    with pytest.raises(DatasetError, match="does not contain x_train"):
        load_dataset(source)


class Unpickled:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "y_test"),
        ({"x_train": arrays()["x_train"].astype("float32")}, "float32"),
        ({"x_train": np.zeros((6, 48), "uint8")}, r"\(6, 48\)"),
        ({"x_test": np.zeros((3, 5, 4, 3), "uint8")}, "different shapes"),
        ({"y_train": np.arange(5)}, "one non-negative integer"),
        ({"y_train": np.full(6, -1)}, "one non-negative integer"),
        ({"y_train": np.zeros(6)}, "float64"),
        ({"y_train": np.array(3)}, "one non-negative integer"),
        ({"y_train": np.zeros(6, int)}, "at least two classes"),
        ({"y_test": np.array([0, 1, 7])}, "up to 7"),
        ({"class_names": np.array(["one", "two"])}, "labels below 2"),
        ({"class_names": np.array(["one", "two", "one"])}, "duplicate class names"),
        ({"y_train": np.array(["cat"] * 6)}, "<U3"),
        ({"x_train": np.zeros((0, 4, 4, 3), "uint8")}, r"\(0, 4, 4, 3\)"),
        ({"x_train": np.array([Unpickled()] * 6)}, "x_train .*as Python objects"),
        ({"class_names": np.array(["a", "b", "c"], object)}, r"save np.array\(class_names, str\)"),
        ({"class_names": np.array([b"caf\xe9", b"b", b"c"])}, "no list of names in UTF-8"),
        (
            {"y_train": np.arange(6) % 3 + 1},
            "the labels 1, 2, 3 in y_train, expected labels below 3",
        ),
        ({"y_train": np.array([0, 1, 255] * 2)}, "the labels 0, 1, 255 in y_train"),
        ({"y_train": np.arange(6) * 10**15}, "0, 1000000000000000, .*, ..., 5000000000000000 in"),
        ({"class_names": np.array(list("abcd"))}, "class 'd' in .* has no training images"),
        ({"y_train": np.array([0, 2] * 3), "class_names": np.array(list("abc"))}, "class 'b' in"),
        (
            {"x_train": np.zeros((6, 3, 32, 32), "uint8")},
            r"channels first.*moveaxis\(images, 1, -1",
        ),
        (scaled(lambda x: x / 127.5 - 1), "float64 from -1 to 1, expected uint8"),
        (scaled(lambda x: x / 64), "float64 from 0 to 3.98438, expected uint8"),
        (scaled(lambda x: x * 257), "int64 from 0 to 65535, expected uint8"),
        (scaled(lambda x: np.where(x == 9, np.nan, x)), "from nan to nan"),
    ],
)
def test_an_npz_file_with_invalid_arrays_is_refused(changes, message, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays(**changes))
    with pytest.raises(DatasetError, match=message):
        load_dataset(str(tmp_path / "data.npz"))


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04broken", "an array"])
def test_a_file_that_is_not_an_npz_archive_is_refused(content, tmp_path):
    path = tmp_path / "data.npz"
    if content == "an array":
        np.save(path.with_suffix(".npy"), np.zeros(3))
        path.with_suffix(".npy").rename(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"data\.npz"):
        load_dataset(str(path))
