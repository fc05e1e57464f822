"""Reading image files of all formats, and folders of images as data sets."""

import hashlib
import io
import os
import shutil
import struct
import sys
import unicodedata
import warnings
import zlib

import keras
import numpy as np
import pytest
from PIL import Image

from keras_vit import VisionTransformer, data, files, load_dataset
from keras_vit.data import cache as image_cache
from keras_vit.data import dataset as datasets
from keras_vit.data import folders
from keras_vit.data import images as image_files
from keras_vit.data.folders import SPLITS
from keras_vit.data.images import ImageError, TooLarge, read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(seed=0, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype("uint8")


def saved(path, image, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **settings)
    return path


# Single images


def test_an_image_is_read_unchanged(tmp_path):
    path = saved(tmp_path / "image.png", picture())
    np.testing.assert_array_equal(read_image(path), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation):
    """The orientations of the EXIF standard, inverted in NumPy."""
    shown = picture()
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](shown))
    for suffix in ("png", "tiff"):
        path = saved(tmp_path / f"turned.{suffix}", stored, exif=exif)
        np.testing.assert_array_equal(read_image(path), shown)
        assert image_files._size_of(path) == shown.shape[:2]


def entry(tag, kind, count, value):
    """An entry of a directory of TIFF, little-endian."""
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


TURNED = entry(0x0112, 3, 1, b"\6")


@pytest.mark.parametrize(
    "entries",
    [
        [entry(0x0112, 2, 2, b"6")],  # The orientation in ASCII.
        [TURNED, entry(0x011A, 5, 1, struct.pack("<I", 38))],  # A resolution of 0/0.
        [TURNED, entry(0x8769, 2, 3, b"ab")],
    ],
    ids=["orientation in ASCII", "0/0", "a directory in ASCII"],
)
def test_odd_exif_data_do_not_make_an_image_unreadable(tmp_path, entries):
    """`ImageOps.exif_transpose` would parse and write all of it, and needs the orientation only."""
    count = struct.pack("<H", len(entries))
    content = b"II*\0\x08\0\0\0" + count + b"".join(entries) + bytes(12)
    path = tmp_path / "odd.jpg"
    Image.fromarray(np.full((16, 24, 3), 200, "uint8")).save(path, exif=b"Exif\0\0" + content)
    image = read_image(path)
    assert image.shape == (24, 16, 3) and abs(int(image.mean()) - 200) < 3
    assert image_files._size_of(path) == (24, 16)


def test_a_png_may_tell_its_orientation_after_its_pixels(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 24, 3), 200, "uint8")).save(file, "PNG")
    content, kind = file.getvalue(), b"eXIf"
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + TURNED + bytes(4)
    chunk = struct.pack(">I", len(exif)) + kind + exif + struct.pack(">I", zlib.crc32(kind + exif))
    end = content.index(b"IEND") - 4
    (tmp_path / "turned.png").write_bytes(content[:end] + chunk + content[end:])
    assert read_image(tmp_path / "turned.png").shape == (24, 16, 3)


def grey_of_16_bits():
    return np.array([[0, 257, 128 * 257], [255 * 257, 100, 65535]], "uint16")


def test_all_pixel_formats_become_rgb(tmp_path):
    deep = read_image(saved(tmp_path / "deep.png", grey_of_16_bits()))
    np.testing.assert_array_equal(deep[..., 0], [[0, 1, 128], [255, 0, 255]])
    deep = read_image(saved(tmp_path / "deep.tiff", grey_of_16_bits()))
    np.testing.assert_array_equal(deep[..., 2], [[0, 1, 128], [255, 0, 255]])
    grey = picture()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "grey.png", grey)), expected)
    two = Image.fromarray(np.array([[0, 255], [255, 0]], "uint8")).convert("1")
    assert read_image(saved(tmp_path / "two.png", two))[..., 0].tolist() == [[0, 255], [255, 0]]
    few = Image.fromarray(picture()).quantize(8)
    np.testing.assert_array_equal(
        read_image(saved(tmp_path / "few.png", few)), np.asarray(few.convert("RGB"))
    )
    ink = Image.fromarray(picture()).convert("CMYK")
    assert read_image(saved(tmp_path / "ink.tiff", ink)).shape == (6, 8, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "ink.tiff"), np.asarray(ink.convert("RGB")))


def test_transparent_pixels_become_white(tmp_path):
    pixels = np.dstack([picture(), np.full((6, 8), 255, "uint8")])
    pixels[2:4, :, 3] = 0
    pixels[5, :, 3] = 51
    found = read_image(saved(tmp_path / "clear.png", Image.fromarray(pixels, "RGBA")))
    np.testing.assert_array_equal(found[:2], picture()[:2])
    np.testing.assert_array_equal(found[2:4], 255)
    np.testing.assert_allclose(found[5], 0.2 * picture()[5] + 0.8 * 255, atol=1)
    few = Image.fromarray(np.array([[0, 1]], "uint8"), "P")
    few.putpalette([10, 20, 30, 40, 50, 60])
    found = read_image(saved(tmp_path / "few.gif", few, transparency=0))
    assert found.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), value, "uint8")) for value in (0, 128, 255)]
    path = tmp_path / "film.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert not read_image(path).any()


def test_images_are_resized_and_converted_to_grayscale_on_request(tmp_path):
    path = saved(tmp_path / "image.png", picture(height=40, width=60))
    small = read_image(path, (10, 12))
    expected = Image.fromarray(picture(height=40, width=60)).resize((12, 10), Image.BILINEAR)
    np.testing.assert_array_equal(small, np.asarray(expected))
    grey = read_image(path, channels=1)
    assert grey.shape == (40, 60, 1)
    photo = Image.fromarray(picture(height=4, width=4)).resize((1600, 1200), Image.BICUBIC)
    path = saved(tmp_path / "photo.jpg", photo, quality=95)
    expected = np.asarray(photo.resize((32, 32), Image.BILINEAR)).astype(int)
    assert np.abs(read_image(path, (32, 32)).astype(int) - expected).mean() < 2


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50],
    ids=["empty", "text", "no PNG"],
)
def test_a_file_that_is_not_an_image_is_refused(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        read_image(path)


def test_damaged_files_are_read_or_raise_an_image_error(tmp_path):
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp"):
        intact = saved(tmp_path / f"intact.{suffix}", picture(height=40, width=40)).read_bytes()
        random = np.random.default_rng(0)
        for _ in range(30):
            damaged = bytearray(intact)
            for position in random.integers(0, len(intact), 3):
                damaged[position] ^= 1 << random.integers(8)
            cut = bytes(damaged[: random.integers(len(intact) // 2, len(intact))])
            for content in (bytes(damaged), cut):
                try:
                    assert read_image(io.BytesIO(content), (8, 8)).shape == (8, 8, 3)
                except ImageError as error:
                    assert str(error)


def test_eps_files_are_refused_and_never_run_ghostscript(tmp_path):
    path = saved(tmp_path / "image.eps", picture()).rename(tmp_path / "image.jpg")
    assert path.read_bytes().startswith(b"%!PS")
    with pytest.raises(ImageError, match="cannot identify"):
        read_image(path)


def test_an_image_with_too_many_pixels_is_refused_before_decoding(tmp_path):
    path = saved(tmp_path / "bomb.png", Image.new("1", (20000, 10000)))
    assert path.stat().st_size < 100_000
    with warnings.catch_warnings(action="error"):
        with pytest.raises(TooLarge, match="too large: 200,000,000 pixels; at most 89,478,485 are"):
            read_image(path)
        assert image_files._size_of(path) == (10000, 20000)


# Folders of images


def fill(folder, classes, count, size=(8, 8), suffix="png"):
    for number, name in enumerate(classes):
        for index in range(count):
            saved(folder / name / f"{index}.{suffix}", picture(100 * number + index, *size))
    return folder


PETS = ["zebra", "Żółw", "猫"]
# The test set of a folder must not change between versions of this package.
TESTED = [
    *("zebra/0.png", "zebra/2.png", "zebra/7.png"),
    *("Żółw/0.png", "Żółw/3.png", "Żółw/4.png"),
    *("猫/0.png", "猫/2.png", "猫/8.png"),
]


def test_sub_folders_are_the_classes_and_file_paths_decide_the_split(tmp_path, capsys):
    folder = fill(tmp_path / "pets", PETS, 10)
    (folder / ".hidden").mkdir()
    dataset = load_dataset(str(folder))
    assert dataset.class_names == sorted(PETS)
    assert (dataset.name, dataset.image_shape, dataset.horizontal_flip) == ("pets", (8, 8, 3), True)
    for name in PETS:
        label = dataset.class_names.index(name)
        for split, images, labels in (
            (False, dataset.train_images, dataset.train_labels),
            (True, dataset.test_images, dataset.test_labels),
        ):
            expected = {
                picture(100 * PETS.index(name) + index, 8, 8).tobytes()
                for index in range(10)
                if (f"{name}/{index}.png" in TESTED) is split
            }
            found = [image.tobytes() for image in images[labels == label]]
            assert set(found) == expected and len(found) == len(expected)
    assert capsys.readouterr().err == ""


def splits(folder):
    """The split of each file of a folder, by its path."""
    files, _ = folders.list_folder(folder)
    return {file.path: file.split for file in files}


def test_the_split_of_a_file_does_not_depend_on_other_files_or_the_location(tmp_path):
    folder = fill(tmp_path / "set", ["a", "b"], 40, size=(2, 2))
    before = splits(folder)
    assert 8 <= list(before.values()).count("test") <= 24  # A fifth, give or take two sigmas.
    for index in range(10):
        saved(folder / "a" / f"new {index}.png", picture(1000 + index))
    (folder / "b" / "0.png").unlink()
    fill(folder, ["between"], 3)
    after = splits(folder.rename(tmp_path / "elsewhere"))
    assert len(after) == 80 + 10 - 1 + 3
    assert {path: after[path] for path in before if path in after} == {
        path: split for path, split in before.items() if path != "b/0.png"
    }
    (tmp_path / "top").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "top" / "train")
    assert splits(tmp_path / "top") == {f"train/{path}": split for path, split in after.items()}


def test_a_file_is_moved_with_a_warning_only_if_its_class_is_too_small_to_split(tmp_path, capsys):
    folder = fill(tmp_path / "set", ["a"], 40, size=(2, 2))
    own = splits(folder)
    trained = [path for path, split in own.items() if split == "train"][:3]
    tested = [path for path, split in own.items() if split == "test"][:3]
    for path in own:
        if path not in (*trained, *tested):
            (folder / path).unlink()
    fill(folder, ["b"], 40)

    def moved(*removed):
        """The files whose split changes, and the warnings, if some files are removed."""
        contents = {path: (folder / path).read_bytes() for path in removed}
        for path in removed:
            (folder / path).unlink()
        load_dataset(str(folder))
        found = {path: split for path, split in splits(folder).items() if path.startswith("a/")}
        for path, content in contents.items():
            (folder / path).write_bytes(content)
        changed = [path for path, split in found.items() if split != own[path]]
        return changed, capsys.readouterr().err

    assert moved() == ([], "")
    for removed, split in ((tested, "test"), (trained, "training")):
        (path,), warnings = moved(*removed)
        assert warnings == (
            "WARNING: class 'a' has too few images for both splits: "
            f"{path} was moved to the {split} images\n"
        )
    changed, warnings = moved(*trained, *tested[1:])
    assert changed == tested[:1] and warnings.endswith("WARNING: no test image of class 'a'\n")


def test_copies_of_test_images_are_removed_from_the_training_set(tmp_path, capsys):
    folder = fill(tmp_path / "set", ["a", "b"], 10)
    before = load_dataset(str(folder))
    paths = {split: [x for x, y in splits(folder).items() if y == split] for split in SPLITS}
    copy = folder / paths["train"][0]
    copy.write_bytes((folder / paths["test"][0]).read_bytes())
    after = load_dataset(str(folder))
    np.testing.assert_array_equal(after.test_images, before.test_images)
    np.testing.assert_array_equal(after.train_images, before.train_images[1:])
    assert "left out 1 copy of test or validation images: " in capsys.readouterr().err


def test_copies_of_held_out_images_are_not_trained_on(tmp_path):
    folder = fill(tmp_path / "set" / "train", ["a", "b"], 10, size=(8, 8)).parent
    for path in list(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    fill(folder / "test", ["a", "b"], 2, size=(7, 8))
    dataset, (images, _) = load_dataset(str(folder), image_size=(8, 8)).hold_out(8, seed=0)
    contents = [{x.tobytes() for x in some} for some in (dataset.train_images, images)]
    assert len(images) == 8 and not contents[0] & contents[1]
    assert len(dataset.train_images) == len(dataset.train_labels) < 32
    files = [x for x in dataset.manifest if x.split == "train"]
    expected = [read_image(folder / x.path, (8, 8)) for x in files]
    np.testing.assert_array_equal(dataset.train_images, expected)


def test_a_folder_can_have_a_validation_set(tmp_path):
    for count, name in ((3, "train"), (2, "val"), (1, "test")):
        fill(tmp_path / "set" / name, ["b"], 1, size=(count, 8))
        fill(tmp_path / "set" / name, ["a", "b"], count, size=(8, count))
    dataset = load_dataset(str(tmp_path / "set"), image_size=(8, 9))
    images, labels = dataset.validation
    assert (dataset.train_labels.tolist(), dataset.test_labels.tolist()) == (
        [0] * 3 + [1] * 3,
        [0, 1],
    )
    assert labels.tolist() == [0, 0, 1, 1]
    expected = read_image(tmp_path / "set" / "val" / "b" / "1.png", (8, 9))
    np.testing.assert_array_equal(images[3], expected)
    assert dataset.for_training(0, None, seed=0)[1] is dataset.validation
    with pytest.raises(ValueError, match="set has a validation set of 4 images"):
        dataset.hold_out(2, seed=0)


def test_a_class_of_one_picture_is_not_emptied_by_holding_out(tmp_path):
    folder = fill(tmp_path / "set" / "train", ["a", "b"], 6).parent
    for path in (folder / "train" / "b").iterdir():
        saved(path, picture(0, 8, 8))
    fill(folder / "test", ["a", "b"], 1, size=(9, 8))
    with pytest.raises(ValueError, match="class 'b' are copies .* Received: validation=4"):
        load_dataset(str(folder)).hold_out(4, seed=0)


def test_a_data_set_lists_the_training_and_validation_files_as_seen(tmp_path):
    folder = fill(tmp_path / "set", ["a", "b"], 20)
    dataset = load_dataset(str(folder))
    contents = {
        read_image(folder / path).tobytes(): hashlib.sha256(
            (folder / path).read_bytes()
        ).hexdigest()
        for path in splits(folder)
    }

    def short(images):
        return {contents[image.tobytes()][: datasets.SHORT] for image in images}

    kept, (images, _) = dataset.hold_out(6, seed=0)
    fewer = kept.limit_train(10, seed=0)
    assert set(dataset.seen) == short(dataset.train_images)
    assert set(kept.seen) == set(dataset.seen)
    assert set(fewer.seen) == short(fewer.train_images) | short(images)
    assert fewer.without(fewer.seen) is fewer
    first = short(fewer.test_images[:1])
    np.testing.assert_array_equal(fewer.without(first).test_images, fewer.test_images[1:])


def test_the_digest_depends_on_the_training_images_only(tmp_path):
    folder = fill(tmp_path / "set", ["a", "b"], 10)

    def digest():
        return datasets.digest(load_dataset(str(folder)))

    paths, before = splits(folder), digest()
    (tested,) = [path for path in paths if paths[path] == "test"][:1]
    saved(folder / tested, picture(1000, 8, 8))
    assert digest() == before
    folder = folder.rename(tmp_path / "other")
    assert digest() == before
    (trained,) = [path for path in paths if paths[path] == "train"][:1]
    saved(folder / trained, picture(1001, 8, 8))
    assert digest() != before


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_can_be_split_already(tmp_path, test):
    fill(tmp_path / "set" / "train", ["a", "b"], 3)
    fill(tmp_path / "set" / test, ["a", "b"], 2, size=(9, 8))
    dataset = load_dataset(str(tmp_path / "set"), image_size=16)
    assert dataset.train_images.shape == (6, 16, 16, 3)
    assert dataset.test_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("names", ["Train Test", "training testing", "TRAIN validation"])
def test_names_of_splits_are_known_in_any_case(tmp_path, names):
    train, test = names.split()
    fill(tmp_path / "set" / train, ["a", "b"], 3)
    fill(tmp_path / "set" / test, ["a", "b"], 2, size=(9, 8))
    dataset = load_dataset(str(tmp_path / "set"), image_size=16)
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (6, 4)
    assert dataset.class_names == ["a", "b"]


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "set", ["car", "train"], 8)
    assert load_dataset(str(tmp_path / "set")).class_names == ["car", "train"]


def test_without_labels_for_the_test_images_the_validation_images_are_tested_on(tmp_path, capsys):
    fill(tmp_path / "set" / "train", ["a", "b"], 3)
    fill(tmp_path / "set" / "val", ["a", "b"], 2, size=(9, 8))
    fill(tmp_path / "set", ["test"], 4, size=(8, 9))
    dataset = load_dataset(str(tmp_path / "set"), image_size=16)
    assert len(dataset.test_labels) == 4 and dataset.validation is None
    assert "test has no sub-folder per class: its images are not used" in capsys.readouterr().err


def test_what_systems_and_people_leave_beside_images_is_not_data(tmp_path, capsys):
    folder = fill(tmp_path / "set", ["a", "b"], 6)
    expected = load_dataset(str(folder))
    fill(folder, ["@eaDir", "__MACOSX", "lost+found"], 2)
    fill(folder / "a", ["@eaDir"], 3)
    for name in ("a/Thumbs.db", "a/desktop.ini", "b/notes.txt", "b/Labels.CSV", "README.md"):
        (folder / name).write_text("no image")
    dataset = load_dataset(str(folder))
    assert dataset.class_names == ["a", "b"] and capsys.readouterr().err == ""
    np.testing.assert_array_equal(dataset.train_images, expected.train_images)
    np.testing.assert_array_equal(dataset.test_images, expected.test_images)


def test_a_folder_with_only_train_is_split(tmp_path):
    fill(tmp_path / "set" / "train", ["a", "b"], 5)
    assert load_dataset(str(tmp_path / "set")).class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(20, 20), (24, 40)], 32),
        ([(50, 70), (47, 47)], 48),
        ([(500, 700), (300, 200)], 64),
        ([(200, 200), (200, 200)], 64),
    ],
)
def test_images_of_different_sizes_are_resized_by_their_median_side(tmp_path, sizes, expected):
    for name in ("a", "b"):
        for index in range(6):
            saved(tmp_path / "set" / name / f"{index}.png", picture(index, *sizes[index % 2]))
    assert load_dataset(str(tmp_path / "set")).image_shape == (expected, expected, 3)


def test_images_are_decoded_once(tmp_path, monkeypatch):
    folder = fill(tmp_path / "set", ["a", "b"], 5)
    first = load_dataset(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_opened", None)
        second = load_dataset(str(folder))
        np.testing.assert_array_equal(first.train_images, second.train_images)
        folder = folder.rename(tmp_path / "renamed")
        third = load_dataset(str(folder))
        np.testing.assert_array_equal(first.train_images, third.train_images)
    # A changed file is decoded again.
    saved(folder / "a" / "0.png", 255 - picture(0, 8, 8))
    os.utime(folder / "a" / "0.png", ns=(1, 1))
    third = load_dataset(str(folder))
    both = [np.concatenate([x.train_images, x.test_images]) for x in (first, third)]
    assert sum(not (image == both[0]).all(axis=(1, 2, 3)).any() for image in both[1]) == 1


def test_the_usual_size_and_the_same_one_named_share_an_array(tmp_path, monkeypatch):
    folder = fill(tmp_path / "set", ["a", "b"], 5)
    usual = load_dataset(str(folder), multiple_of=2)
    monkeypatch.setattr(image_cache, "_decode", None)
    monkeypatch.setattr(image_cache, "common_size", None)
    named = load_dataset(str(folder), image_size=usual.image_shape[:2])
    np.testing.assert_array_equal(named.train_images, usual.train_images)
    assert load_dataset(str(folder), multiple_of=2).image_shape == usual.image_shape


def test_a_repaired_file_is_read_again(tmp_path):
    folder = fill(tmp_path / "set", ["a", "b"], 5)
    path = folder / "a" / "0.png"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(b"?" * len(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(data.DatasetError, match="1 of 10 files"):
        load_dataset(str(folder))
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    dataset = load_dataset(str(folder))
    assert len(dataset.train_labels) + len(dataset.test_labels) == 10


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_an_incomplete_cache_entry_is_ignored(tmp_path, suffix):
    folder = fill(tmp_path / "set", ["a", "b"], 5)
    first = load_dataset(str(folder))
    for path in (tmp_path / "cache" / "keras_vit").glob(f"*{suffix}"):
        path.unlink()
    np.testing.assert_array_equal(load_dataset(str(folder)).train_images, first.train_images)


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(data.DatasetError, match="No space left on device.*XDG_CACHE_HOME"):
        load_dataset(str(fill(tmp_path / "set", ["a", "b"], 5)))
    assert not list((tmp_path / "cache" / "keras_vit").glob("*.npy"))


def test_a_large_data_set_is_memory_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "IN_MEMORY", 100)
    dataset = load_dataset(str(fill(tmp_path / "set", ["a", "b"], 5)))
    assert isinstance(dataset.train_images, np.memmap)
    batches = data.Batches(dataset.train_images, dataset.train_labels, 4, seed=0)
    images, labels = batches[0]
    assert images.shape == (4, 8, 8, 3) and len(labels) == 4
    model = VisionTransformer(
        (8, 8, 3), num_classes=2, embed_dim=8, mlp_dim=8, num_heads=2, depth=1
    )
    model.adapt(dataset.train_images)
    normalization = model.get_layer("normalization")
    pixels = np.asarray(dataset.train_images).reshape(-1, 3).astype("float64")
    mean, variance = (
        keras.ops.convert_to_numpy(getattr(normalization, x)).ravel() for x in ("mean", "variance")
    )
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, pixels.var(axis=0), rtol=1e-5)


def test_a_few_unreadable_files_are_left_out_with_a_warning(tmp_path, capsys):
    folder = fill(tmp_path / "set", ["a", "b"], 60, size=(4, 4))
    (folder / "b" / "broken.png").write_bytes(b"no image")
    dataset = load_dataset(str(folder))
    assert len(dataset.train_labels) + len(dataset.test_labels) == 120
    assert "left out b/broken.png: cannot identify image file" in capsys.readouterr().err
    load_dataset(str(folder))  # From the cache.
    assert "left out b/broken.png" in capsys.readouterr().err
    (folder / "b" / "broken.png").rename(folder / "b" / os.fsdecode(b"br\xf6ken.png"))
    for _ in "decoded", "from the cache":
        load_dataset(str(folder))
        assert "left out b/br" in capsys.readouterr().err
    (folder / "a" / "list.dat").write_text("no image")
    with pytest.raises(data.DatasetError, match="2 of 122 files in .*b/br"):
        load_dataset(str(folder))


def test_what_the_program_wrote_into_a_folder_is_not_data(tmp_path):
    folder = fill(tmp_path / "set", ["a", "b"], 6)
    expected = splits(folder)
    outputs = [folder / "explained", folder / "a" / "attention", folder / "test"]
    for output in outputs:
        files.make_output(output)
    for name in (".lock", "config.json"):
        path = folder / "runs" / "group" / "set-quick-seed0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "runs" / "notes.txt").touch()
    (folder / "exported").mkdir()
    (folder / "exported" / "saved_model.pb").touch()
    for output in (*outputs, path.parent, path.parent / "figures", folder / "exported"):
        saved(output / "confusion.png", picture())
    assert splits(folder) == expected
    assert len(files.visible(folder)) == len(expected)
    files.make_output(folder / "b")  # It holds images: a class, as before.
    assert splits(folder) == expected
    top = tmp_path / "top"
    top.mkdir()
    folder.rename(top / "train")
    (top / "train" / "runs").rename(top / "runs")
    assert splits(top) == {f"train/{path}": split for path, split in expected.items()}


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")
def test_linked_folders_are_followed_once(tmp_path):
    folder = fill(tmp_path / "set", ["a", "b"], 6)
    fill(tmp_path, ["elsewhere"], 3, size=(9, 8))
    saved(folder / "a" / "z" / "own.png", picture(500))
    links = {"a/linked": "../../elsewhere", "a/again": "../../elsewhere", "a/first": "z"}
    loops = {"b/loop": ".", "b/up": "..", "all": "."}
    for name, target in {**links, **loops}.items():
        (folder / name).symlink_to(target, target_is_directory=True)
    found, names = folders.list_folder(folder)
    assert names == ["a", "b"]
    contents = [(folder / file.path).read_bytes() for file in found]
    assert len(contents) == len(set(contents)) == 6 + 1 + 3 + 6
    assert "a/z/own.png" in {file.path for file in found}


def test_names_of_classes_are_compared_in_composed_form(tmp_path):
    """As in folders that were copied from macOS, in training and in `evaluate`."""
    composed, decomposed = (unicodedata.normalize(x, "żółw") for x in ("NFC", "NFD"))
    linux, mac = fill(tmp_path / "linux", ["kot", composed], 6), tmp_path / "mac"
    shutil.copytree(linux, mac)
    (mac / composed).rename(mac / decomposed)
    digests = {datasets.digest(load_dataset(str(folder))) for folder in (linux, mac)}
    assert len(digests) == 1 and load_dataset(str(mac)).class_names == ["kot", composed]
    for folder, name in ((mac, composed), (linux, decomposed)):
        unseen, left_out = data.load_unseen(str(folder), (8, 8), ["pies", name, "kot"], ("none",))
        assert np.bincount(unseen.test_labels).tolist() == [0, 6, 6] and left_out == {}
        assert unseen.class_names == ["pies", name, "kot"]


def test_a_folder_may_hold_test_images_only_unless_it_is_trained_on(tmp_path):
    fill(tmp_path / "set" / "test", ["b", "c"], 2)
    for seen in (("none",), ()):  # A model without digests of what it has seen, too.
        unseen, left_out = data.load_unseen(str(tmp_path / "set"), (8, 8), ["a", "b", "c"], seen)
        assert unseen.test_labels.tolist() == [1, 1, 2, 2] and left_out == {}
    with pytest.raises(data.DatasetError, match="no training images: expected a folder train"):
        load_dataset(str(tmp_path / "set"))


def test_an_image_in_two_classes_is_named(tmp_path, capsys):
    folder = fill(tmp_path / "set", ["a", "b"], 10)
    first, second = (next(path for path in splits(folder) if path[0] == name) for name in "ab")
    shutil.copy(folder / first, folder / second)
    load_dataset(str(folder))
    assert f"1 image is in more than one class: {first} and {second}\n" in capsys.readouterr().err


def empty(folder):
    folder.mkdir(parents=True)


BROKEN = {
    "has 'cats' beside folders of splits: expected either train": lambda root: (
        fill(root / "train", ["a", "b"], 3),
        fill(root, ["cats"], 3),
    ),
    "has both 'test' and 'testing': expected one folder of test": lambda root: (
        fill(root / "train", ["a", "b"], 3),
        fill(root / "test", ["a", "b"], 3),
        fill(root / "testing", ["a", "b"], 3),
    ),
    "has only folders of splits, test, train, and": lambda root: fill(root, ["train", "test"], 5),
    "has only folders of splits, test, train, val, and": lambda root: (
        fill(root, ["train", "val"], 5),
        fill(root / "test", ["a", "b"], 3),
    ),
    "no images in sub-folders": lambda root: empty(root),
    "images of one class only, 'a'": lambda root: fill(root, ["a"], 5),
    "class 'b' in .* has no images": lambda root: (fill(root, ["a"], 5), empty(root / "b")),
    "has a name that is not UTF-8": lambda root: fill(root, ["a", os.fsdecode(b"caf\xe9")], 5),
    "has no readable test image": lambda root: fill(root, ["a", "b"], 1),
    "class 'c' in .* has no readable training image": lambda root: (
        fill(root / "train", ["a", "b"], 3),
        fill(root / "test", ["a", "c"], 3, size=(9, 8)),
    ),
    "class 'a' in .* is not a copy of a test image": lambda root: (
        fill(root / "train", ["a", "b"], 3),
        fill(root / "test", ["a", "b"], 3),
    ),
    "set has no readable test image": lambda root: (
        fill(root / "train", ["a", "b"], 3),
        empty(root / "test" / "a"),
    ),
    "none of 10 files can be read": lambda root: [
        (root / name).mkdir(parents=True, exist_ok=True)
        or (root / name / f"{index}.jpg").write_text(f"no image {name} {index}")
        for name in ("a", "b")
        for index in range(5)
    ],
}


@pytest.mark.parametrize("message", BROKEN)
def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, message):
    BROKEN[message](tmp_path / "set")
    with pytest.raises(data.DatasetError, match=message):
        load_dataset(str(tmp_path / "set"))


def test_an_image_size_is_not_for_arrays():
    with pytest.raises(data.DatasetError, match="is only for folders of images and for Tensor"):
        load_dataset("digits", image_size=48)
    assert load_dataset("digits", resize="pad").resize == "pad"


def test_the_cache_keeps_the_arrays_that_were_used_last(tmp_path, monkeypatch):
    folders_of_images = []
    for name in ("first", "second", "third"):
        folder = tmp_path / name
        for class_name in ("a", "b"):
            (folder / class_name).mkdir(parents=True)
            for index in range(6):
                pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3))
                path = folder / class_name / f"{name}-{index}.png"
                Image.fromarray((pixels + len(name)).astype("uint8")).save(path)
        folders_of_images.append(folder)
    arrays = tmp_path / "cache" / "keras_vit"
    first, second, third = folders_of_images
    load_dataset(str(first))
    (oldest,) = arrays.glob("*.npy")
    size = oldest.stat().st_size
    load_dataset(str(second))
    (other,) = set(arrays.glob("*.npy")) - {oldest}
    os.utime(other, (1, 1))
    load_dataset(str(first))  # Used again, so that the second one is older now.
    monkeypatch.setattr(image_cache, "MOST_CACHED", 2 * size)
    load_dataset(str(third))
    kept = set(arrays.glob("*.npy"))
    assert oldest in kept and other not in kept and len(kept) == 2
    assert not other.with_suffix(".json").exists()
    written = arrays / ".part-0-x.npy"  # By another process.
    written.touch()
    assert image_cache.usage()[1] == 2
    monkeypatch.setattr(image_cache, "MOST_CACHED", 0)
    load_dataset(str(third))  # Kept while it is used.
    assert len(set(arrays.glob("*.npy")) - {written}) == 1 and written.exists()


def test_files_that_can_be_read_by_now_are_read(capsys, monkeypatch, tmp_path):
    """As HEIC can after the installation of a package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = fill(tmp_path / "set", ["a", "b"], 60)
    saved(folder / "a" / "60.bmp", picture(7, 8, 8))
    few = tuple(name for name in image_files.formats() if name != "BMP")
    for module in (image_files, image_cache):
        monkeypatch.setattr(module, "formats", lambda: few)
    assert len(load_dataset(str(folder)).manifest) == 120
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capsys.readouterr()
    assert len(load_dataset(str(folder)).manifest) == 121
    assert "Decoding 121 images" in capsys.readouterr().out
    assert len(load_dataset(str(folder)).manifest) == 121
    assert "Decoding" not in capsys.readouterr().out


def test_a_photo_that_changed_does_not_leave_the_old_array_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / f"photos/{name}/{index}.png")

    def arrays():
        data.load_dataset(str(tmp_path / "photos"))
        return {path.name for path in (tmp_path / "cache" / "keras_vit").glob("*.npy")}

    before = arrays()
    os.utime(tmp_path / "photos/a/0.png")  # Its content is the same.
    assert arrays() == before
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "photos/a/0.png")
    after = arrays()
    assert len(before) == len(after) == 1 and before != after
    (tmp_path / "photos").rename(tmp_path / "moved")
    (tmp_path / "photos").symlink_to(tmp_path / "moved")
    assert arrays() == after


def test_without_a_home_folder_the_cache_is_among_temporary_files(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(image_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(
            image_cache.os.path, "expanduser", lambda path: path
        )  # Unknown user, no HOME.
        assert image_cache._place().parent == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert image_cache._place() == tmp_path / "home" / ".cache" / "keras_vit"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))  # It cannot be made.
    assert image_cache._place().parent == tmp_path
