"""Hostile, damaged and invalid model files run no code and are refused with a one-line error."""

import base64
import io
import json
import marshal
import pathlib
import zipfile

import h5py
import keras
import numpy as np
import pytest

import keras_vit
from keras_vit.loading import ModelError, load_model

RAN = []  # Code of a hostile file that was run.


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras_vit.VisionTransformer(
        (8, 8, 3), 2, patch_size=4, embed_dim=8, mlp_dim=8, num_heads=2, depth=1
    ).save(path)
    return path


def rebuilt(source, target, **members):
    """A copy of a model file with some members replaced by other bytes."""
    with zipfile.ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()} | members
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return target


def with_config(source, target, change):
    with zipfile.ZipFile(source) as archive:
        config = json.loads(archive.read("config.json"))
    change(config)
    return rebuilt(source, target, **{"config.json": json.dumps(config)})


def with_layer(layer):
    """Inserts the config of a layer into the model's augmentation."""
    return lambda config: config["config"]["augmentation"].insert(0, layer)


def layer(class_name, module="keras.layers", registered_name=None, **config):
    return {
        "class_name": class_name,
        "module": module,
        "registered_name": registered_name,
        "config": config,
    }


def run(*arguments):
    RAN.append(arguments)


def bytecode():
    """A function as `Lambda` saves it."""
    code = compile("__import__('test_loading').RAN.append('lambda')", "hostile", "eval")
    return {
        "class_name": "__lambda__",
        "config": {
            "code": base64.b64encode(marshal.dumps(code)).decode(),
            "defaults": None,
            "closure": None,
        },
    }


def test_a_loaded_model_makes_the_same_predictions(model_file):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("float32")
    expected = keras.saving.load_model(model_file).predict(images, verbose=0)
    model = keras_vit.load_model(str(model_file))
    assert isinstance(model, keras_vit.VisionTransformer)
    np.testing.assert_array_equal(model.predict(images, verbose=0), expected)


@pytest.mark.parametrize(
    "change",
    [
        with_layer(layer("Lambda", function=bytecode(), name="lambda")),
        with_layer(layer("run", module="test_loading")),
        with_layer(layer("system", module="os", command="true")),
        with_layer(layer("Popen", module="subprocess", args=["true"])),
        with_layer(layer("eval", module="builtins", source="run()")),
        with_layer(layer("get_file", module="keras.utils", origin="file:///etc/passwd")),
        with_layer(layer("enable_unsafe_deserialization", module="keras.config")),
        with_layer(layer("NeverRegistered", module=None, registered_name="other>NeverRegistered")),
        with_layer(layer("load_model", module="keras.saving", filepath="model.keras")),
        lambda config: config.update(class_name="run", module="test_loading", registered_name=""),
        lambda config: config.update(class_name="Popen", module="subprocess", registered_name=""),
    ],
)
def test_only_registered_classes_are_built_and_no_code_is_run(change, model_file, tmp_path):
    path = with_config(model_file, tmp_path / "hostile.keras", change)
    with pytest.raises(ModelError, match="cannot be loaded safely") as caught:
        load_model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not RAN


@pytest.mark.parametrize("name", ["optimizer", "loss", "metrics"])
@pytest.mark.parametrize(
    "value",
    [layer("run", module="test_loading"), {"class_name": "function", "config": "run"}],
    ids=["class", "function"],
)
def test_code_in_the_compile_config_is_not_run(name, value, model_file, tmp_path):
    def change(config):
        config["compile_config"] = {
            "optimizer": "adam",
            "loss": None,
            "metrics": None,
            name: value,
        }

    path = with_config(model_file, tmp_path / "hostile.keras", change)
    with pytest.raises(ModelError):
        load_model(path)
    assert not RAN


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "assets/../../evil", "C:\\evil", "..\\x"])
def test_members_outside_of_the_folder_are_refused(name, model_file, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    path = rebuilt(model_file, folder / "hostile.keras", **{name: b"evil"})
    with pytest.raises(ModelError, match="would be written outside of its folder"):
        load_model(path)
    assert list(tmp_path.rglob("*")) == [folder, path]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(model_file, tmp_path):
    path = rebuilt(model_file, tmp_path / "bomb.keras", bomb=b"")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # The directory's entry of the last member
    content[at + 24 : at + 28] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"unpacks to 4,2\d\d,\d{3},\d{3} bytes; at most 4,294"):
        load_model(path)


def test_a_file_with_a_false_size_is_refused(model_file, tmp_path):
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes(2**26))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError, match="the checksum of its member .* does not match"):
        load_model(path)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_a_size_limit_is_refused(packing, tmp_path):
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("config.json", bytes(2**20))
    with pytest.raises(ModelError, match="compressed in a way that Keras never uses"):
        load_model(path)


@pytest.mark.parametrize("kind", ["link", "storage"])
def test_external_weight_files_are_not_read(kind, model_file, tmp_path):
    with zipfile.ZipFile(model_file) as archive:
        weights = io.BytesIO(archive.read("model.weights.h5"))
    outside = tmp_path / "secret.h5"
    with h5py.File(outside, "w") as file:
        file["0"] = np.zeros((1, 1, 8), "float32")
    with h5py.File(weights, "a") as file:
        datasets = []
        file.visititems(lambda _, x: datasets.append(x) if isinstance(x, h5py.Dataset) else None)
        dataset = next(x for x in datasets if x.shape == (1, 1, 8))  # The class token
        group, name, shape = dataset.parent, dataset.name.split("/")[-1], dataset.shape
        del group[name]
        if kind == "link":
            group[name] = h5py.ExternalLink(str(outside), "/0")
        else:
            size = 4 * int(np.prod(shape))
            group.create_dataset(name, shape, "float32", external=[(str(outside), 0, size)])
    members = {"model.weights.h5": weights.getvalue()}
    path = rebuilt(model_file, tmp_path / "hostile.keras", **members)
    with pytest.raises(ModelError, match="(?i)external"):
        load_model(path)


def test_pickled_weights_are_not_unpickled(model_file, tmp_path):
    class Hostile:
        def __reduce__(self):
            return run, ("pickle",)

    buffer = io.BytesIO()
    np.savez(buffer, weights=np.array([Hostile()], dtype=object))
    with zipfile.ZipFile(model_file) as archive:
        config = archive.read("config.json")
        metadata = archive.read("metadata.json")
    path = tmp_path / "hostile.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("metadata.json", metadata)
        archive.writestr("model.weights.npz", buffer.getvalue())
    with pytest.raises(ModelError):
        load_model(path)
    assert not RAN


def test_a_flipped_bit_is_detected_or_harmless(model_file, tmp_path):
    content = model_file.read_bytes()
    weights = [x.tolist() for x in keras.saving.load_model(model_file).get_weights()]
    path, detected = tmp_path / "flipped.keras", 0
    for at in np.random.default_rng(0).integers(0, len(content), 30):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(at % 8)
        path.write_bytes(damaged)
        try:
            model = load_model(path)
        except ModelError as error:
            detected += 1
            assert "\n" not in str(error)
        else:
            assert [x.tolist() for x in model.get_weights()] == weights
    assert detected > 15


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(fraction, model_file, tmp_path):
    content = model_file.read_bytes()
    path = tmp_path / "short.keras"
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ModelError, match="short.keras"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.keras", None, "No such file"),
        ("folder.keras", pathlib.Path, "folder.keras is a folder. It holds no model.keras"),
        ("model.h5", b"anything", "does not end in .keras"),
        ("model.keras", b"anything", "not a .keras file, or is damaged"),
    ],
)
def test_an_invalid_model_file_is_named_in_the_error(name, content, expected, tmp_path):
    path = tmp_path / name
    if content is pathlib.Path:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=expected) as caught:
        load_model(path)
    assert name in str(caught.value)


def test_of_a_run_directory_the_model_is_named(tmp_path):
    for name in ("best.keras", "model.keras"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelError, match=rf"is a folder. Did you mean {tmp_path / name}\?"):
            load_model(tmp_path)
