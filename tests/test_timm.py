"""Weights under timm's names, against PyTorch's own layers; other files are refused."""

import json
import sys

import keras
import numpy as np
import pytest
from test_model import SIZES, make_model, predict, random_images

import keras_vit
from keras_vit.loading import ModelError
from keras_vit.timm import read_timm, write_timm

safetensors = pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file  # noqa: E402

# Names of timm's tensors in `torch_reference`.
RENAMED = {
    "cls_token": "class_token",
    "pos_embed": "position",
    "patch_embed.proj": "embedding",
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attn.qkv.": "attention.in_proj_",
    "attn.proj": "attention.out_proj",
    "mlp.fc1": "hidden",
    "mlp.fc2": "output",
}


@pytest.fixture(scope="module", params=["token", "mean"])
def model(request):
    return make_model(pooling=request.param, class_names=list("abcde"))


def test_without_the_package_safetensors_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModelError, match="try `pip install safetensors`"):
        read_timm(tmp_path / "model.safetensors")


@pytest.fixture
def path(model, tmp_path):
    write_timm(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def facts_of(path):
    with safetensors.safe_open(path, "np") as file:
        return json.loads(file.metadata()["keras_vit"])


def test_logits_agree_with_pytorch_under_timms_names(model, path):
    torch = pytest.importorskip("torch")
    from torch_reference import TorchVisionTransformer

    facts = facts_of(path)
    reference = TorchVisionTransformer(**SIZES, pooling=model.pooling)
    state = dict(reference.state_dict())
    for name, array in load_file(path).items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        assert name in state
        state[name] = torch.tensor(array)
    state["mean"], state["deviation"] = (torch.tensor(facts[x]) for x in ("mean", "std"))
    reference.load_state_dict(state)
    images = random_images(3, 6, *SIZES["image_shape"])
    with torch.no_grad():
        theirs = reference(torch.tensor(images) / 255)[0].numpy()
    np.testing.assert_allclose(predict(model, images), theirs, atol=1e-4)


def test_a_model_comes_back_as_it_was(model, path):
    again = keras_vit.VisionTransformer.from_preset(path)
    images = random_images(4, 6, *SIZES["image_shape"])
    np.testing.assert_allclose(predict(again, images), predict(model, images), atol=1e-5)
    assert again.class_names == model.class_names and again.pooling == model.pooling


def test_how_images_are_resized_comes_back_as_well(tmp_path):
    path = tmp_path / "model.safetensors"
    write_timm(make_model(resize="crop"), path)
    assert read_timm(path).resize == "crop"


def test_a_model_that_resizes_or_rescales_images_is_refused(tmp_path):
    """As the best model of a run whose small images are not over."""
    model = make_model(augmentation=[keras_vit.RandomResizedCrop(4, 4, name="crop")])
    with pytest.raises(ValueError, match="Received: crop$"):
        write_timm(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_timms_config_tells_heads_and_normalization(model, path):
    """As a download from timm's hub, whose `config.json` names the architecture."""
    facts = facts_of(path)
    save_file(load_file(path), path)  # Without metadata.
    with pytest.raises(ModelError, match="config.json beside it"):
        read_timm(path)
    config = {"architecture": "vit_own", "pretrained_cfg": {x: facts[x] for x in ("mean", "std")}}
    write = path.with_name("config.json").write_text
    write(json.dumps(config))
    with pytest.raises(ModelError, match="architecture 'vit_own' is not known"):
        read_timm(path)
    write(json.dumps({**config, "model_args": {"num_heads": 2}}))
    images = random_images(4, 6, *SIZES["image_shape"])
    np.testing.assert_allclose(predict(read_timm(path), images), predict(model, images), atol=1e-5)
    write(json.dumps({**config, "architecture": "vit_tiny_patch4"}))  # Three heads.
    with pytest.raises(ModelError, match="num_heads=3"):
        read_timm(path)


def test_timms_config_tells_the_shape_of_images_that_are_no_squares(tmp_path):
    """Four patches in a row, not two by two."""
    path = tmp_path / "model.safetensors"
    write_timm(make_model(image_shape=(4, 16, 3)), path)
    assert read_timm(path).input_shape == (None, 4, 16, 3)
    facts = facts_of(path)
    preprocessing = {**{x: facts[x] for x in ("mean", "std")}, "input_size": [3, 4, 16]}
    save_file(load_file(path), path)
    config = {"architecture": "vit_own", "pretrained_cfg": preprocessing}
    path.with_name("config.json").write_text(json.dumps({**config, "model_args": {"num_heads": 2}}))
    assert read_timm(path).input_shape == (None, 4, 16, 3)


def test_what_describes_a_file_must_agree_with_it(model, path):
    facts = facts_of(path)
    save_file(load_file(path), path)
    config = {"architecture": "vit_own", "pretrained_cfg": {x: facts[x] for x in ("mean", "std")}}
    arguments = {"num_heads": 2, "global_pool": "avg" if model.pooling == "token" else "token"}
    write = path.with_name("config.json").write_text
    write(json.dumps({**config, "model_args": arguments}))
    with pytest.raises(ModelError, match="reads global_pool="):
        read_timm(path)
    grey = {"mean": [0.5], "std": [0.5]}
    write(json.dumps({**config, "model_args": {"num_heads": 2}, "pretrained_cfg": grey}))
    with pytest.raises(ModelError, match=r"of 3 channels, but .* mean=\[0.5\]"):
        read_timm(path)


@pytest.mark.parametrize(("embed_dim", "mlp_dim"), [(88, 480), (112, 1952), (16, 40)])
def test_timm_computes_the_same_width_of_the_mlp(embed_dim, mlp_dim, tmp_path):
    model = make_model(embed_dim=embed_dim, mlp_dim=mlp_dim, num_heads=2, depth=1)
    write_timm(model, tmp_path / "model.safetensors")
    ratio = facts_of(tmp_path / "model.safetensors")["arguments"]["mlp_ratio"]
    assert int(embed_dim * ratio) == mlp_dim
    assert read_timm(tmp_path / "model.safetensors").get_config()["mlp_dim"] == mlp_dim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update({"dist_token": x["norm.bias"]}), "dist_token is .16,. and should be a"),
        (
            lambda x: x.pop("blocks.1.norm1.bias"),
            r"blocks.1.norm1.bias is missing and should be \(",
        ),
        (lambda x: x.pop("head.bias"), "expected a tensor 'head.bias'"),
        (lambda x: x.update({"blocks.0.ls1.gamma": x["norm.bias"]}), "blocks.0.ls1.gamma is"),
    ],
    ids=["distilled", "no bias", "no head", "layer scale"],
)
def test_another_architecture_is_named_and_nothing_is_dropped(change, message, model, path):
    tensors, metadata = load_file(path), {"keras_vit": json.dumps(facts_of(path))}
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ModelError, match=message):
        read_timm(path)


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    for name, content in (("empty", b""), ("text", b"weights"), ("none", None)):
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match="cannot|can be read"):
            read_timm(path)


def test_a_constant_channel_is_divided_by_one_there_as_well(tmp_path):
    model, images = make_model(), random_images(5, 6, *SIZES["image_shape"])
    images[..., 1] = 9
    with pytest.warns(UserWarning, match="constant"):
        model.adapt(images)
    write_timm(model, tmp_path / "model.safetensors")
    assert facts_of(tmp_path / "model.safetensors")["std"][1] == pytest.approx(1 / 255)
    again = read_timm(tmp_path / "model.safetensors")
    np.testing.assert_allclose(predict(again, images), predict(model, images), atol=1e-5)


def test_weights_in_half_precision_are_read_as_float32(model, path):
    tensors, metadata = load_file(path), {"keras_vit": json.dumps(facts_of(path))}
    save_file({name: x.astype("float16") for name, x in tensors.items()}, path, metadata)
    kernel = read_timm(path).get_layer("head").kernel
    assert keras.backend.standardize_dtype(kernel.dtype) == "float32"
    expected = keras.ops.convert_to_numpy(model.get_layer("head").kernel)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(kernel), expected.astype("float16").astype("float32")
    )
