"""Images of any depth, range, size and aspect ratio as the pixels that a model takes."""

import io
import re
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from keras_vit import data, load_dataset, read_image
from keras_vit.data import dataset as datasets
from keras_vit.data import images as image_files
from keras_vit.data.images import ImageError, TooLarge


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(seed=0, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype("uint8")


def saved(path, image, **settings):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **settings)
    return path


def fill(folder, size=(8, 8)):
    """A folder of two classes of five images each."""
    for number, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            saved(folder / name / f"{index}.png", picture(10 * number + index, *size))
    return folder


# Depth and range


def tiff(pixels, photometric=1, bits=None, content=None, **told):
    """An uncompressed little-endian TIFF of pixels `(H, W)` or `(H, W, C)`.

    Args:
        photometric: int, 0 where white is zero, 2 for colours.
        bits: int, of a sample; by default those of the pixels.
        content: bytes of the pixels, if not as they are.
        **told: a letter of `struct` and values, by the name of a tag.
    """
    height, width, channels = (*pixels.shape, 1)[:3]
    content = content or pixels.tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    entries = {
        **{256: ("L", width), 257: ("L", height), 259: ("H", 1), 262: ("H", photometric)},
        **{258: ("H", *[bits or 8 * pixels.itemsize] * channels), 339: ("H", *[kind] * channels)},
        **{273: ("L", 0), 277: ("H", channels), 278: ("L", height), 279: ("L", len(content))},
        **{{"maximum": 281, "s_min": 340, "s_max": 341}[name]: x for name, x in told.items()},
    }
    values = {tag: struct.pack(f"<{len(x) - 1}{x[0]}", *x[1:]) for tag, x in entries.items()}
    long = {tag: value for tag, value in values.items() if len(value) > 4}
    place = 8 + 2 + 12 * len(entries) + 4
    values[273] = struct.pack("<L", place + sum(map(len, long.values())))
    for tag, value in long.items():
        values[tag] = struct.pack("<L", place)
        place += len(value)
    kinds = {"H": 3, "L": 4, "h": 8, "l": 9, "f": 11}
    table = b"".join(
        struct.pack("<HHL", tag, kinds[x[0]], len(x) - 1) + values[tag].ljust(4, b"\0")
        for tag, x in sorted(entries.items())
    )
    head = b"II*\0" + struct.pack("<LH", 8, len(entries))
    return io.BytesIO(head + table + bytes(4) + b"".join(long.values()) + content)


def ramp(kind, low, high):
    return np.linspace(low, high, 24).reshape(4, 6).astype(kind)


TOLD = {
    "12 bits": (ramp("<u2", 0, 4095), 0, 4095, {"bits": 12}),
    "12 bits in 16": (ramp("<u2", 0, 4095), 0, 4095, {"maximum": ("H", 4095)}),
    "the maximum of the pixels": (ramp("<u2", 0, 900), 0, 1023, {"maximum": ("H", 900)}),
    "16 bits": (ramp("<u2", 0, 65535), 0, 65535, {}),
    "white is zero": (ramp("<u2", 0, 65535), 65535, 0, {"photometric": 0}),
    "int16": (ramp("<i2", -9, 3000), -9, 3000, {"s_min": ("h", -9), "s_max": ("h", 3000)}),
    "int8": (ramp("i1", -128, 127), -128, 127, {"s_min": ("h", -128), "s_max": ("h", 127)}),
    "uint32": (ramp("<u4", 0, 2**32 - 1), 0, 2**32 - 1, {"maximum": ("L", 2**32 - 1)}),
    "int32": (ramp("<i4", 5, 9e6), 5, 9e6, {"s_min": ("l", 5), "s_max": ("l", 9_000_000)}),
    "floats": (ramp("<f4", -1, 3), -1, 3, {"s_min": ("f", -1), "s_max": ("f", 3)}),
}


@pytest.mark.parametrize("name", TOLD)
def test_deep_pixels_are_scaled_by_what_the_file_says(name):
    pixels, black, white, settings = TOLD[name]
    if name == "12 bits":
        packed = np.packbits(pixels.reshape(-1, 1) >> np.arange(11, -1, -1) & 1)
        settings = {**settings, "content": packed.tobytes()}
    expected = (pixels.astype("float64") - black) / (white - black) * 255
    found = read_image(tiff(pixels, **settings))
    for channel in range(3):
        np.testing.assert_allclose(found[..., channel], expected, atol=0.501)


UNTOLD = {
    "signed integers of 16 bits from -7 to 3,000": ramp("<i2", -7, 3000),
    "signed integers of 8 bits from -128 to 127": ramp("i1", -128, 127),
    "signed integers of 32 bits from 0 to 65,535": ramp("<i4", 0, 65535),
    "unsigned integers of 32 bits from 0 to 4,294,967,295": ramp("<u4", 0, 2**32 - 1),
    "floats of 32 bits from -1 to 3": ramp("<f4", -1, 3),
}


@pytest.mark.parametrize("found", UNTOLD)
def test_pixels_of_unknown_range_are_refused_with_the_range_found(found):
    with pytest.raises(ImageError, match=f"{found}, of unknown range: expected 8 or 16 bits"):
        read_image(tiff(UNTOLD[found]))


def test_images_that_use_few_of_16_bits_are_warned_of_once(tmp_path, capsys):
    few, all_of_them = (ramp("<u2", 0, high) for high in (4095, 65535))
    colours = np.dstack([few] * 3)
    in_maxval = io.BytesIO(b"P5 6 4 4095\n" + few.astype(">u2").tobytes())
    files = [saved(tmp_path / f"{i}.png", x) for i, x in enumerate([all_of_them, few, few])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for count in (2, 5):
            sources = [in_maxval, *files, tiff(colours, photometric=2)][:count]
            assert [read_image(x).max() for x in sources] == [255, 255, 16, 16, 15][:count]
            assert len(caught) == (count > 2)
    assert "less than a quarter" in str(caught[0].message)
    with pytest.raises(ImageError, match="colours of 16 bits that end at 4,095"):
        read_image(tiff(colours, photometric=2, maximum=("H", 4095, 4095, 4095)))
    folder = fill(tmp_path / "set")
    for index in range(3):
        saved(folder / "a" / f"deep {index}.png", few + np.uint16(index))
    load_dataset(str(folder))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: 3 of 13 images use less than a quarter of their 16 bits, such")


def chunk(kind, content):
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@pytest.mark.parametrize(
    ("bits", "color", "transparent", "pixels", "expected"),
    [
        (16, 0, b"\x10\x20", b"\x10\x20" + b"\x10\x21" + b"\0\0", [255, 16, 0]),
        (16, 2, b"\1\0\2\0\3\0", b"\1\0\2\0\3\0" + b"\2\0\3\0\4\0" + bytes(6), [255, 3, 0]),
        (2, 0, b"\0\1", bytes([0b01_10_00_00]), [255, 170, 0]),
        (4, 0, b"\0\1", bytes([0x12, 0x00]), [255, 34, 0]),
    ],
)
def test_transparent_pixels_of_any_depth_become_white(bits, color, transparent, pixels, expected):
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 3, 1, bits, color, 0, 0, 0),
        b"tRNS": transparent,
        b"IDAT": zlib.compress(b"\0" + pixels),
        b"IEND": b"",
    }
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())
    assert read_image(io.BytesIO(content))[0, :, 1].tolist() == expected


def test_an_alpha_channel_is_kept_on_request(tmp_path):
    clear = np.dstack([picture(), picture(1)[..., 0]])
    path = saved(tmp_path / "clear.png", Image.fromarray(clear, "RGBA"))
    np.testing.assert_array_equal(read_image(path, channels=4), clear)
    opaque = read_image(saved(tmp_path / "image.png", picture()), channels=4)
    assert (opaque[..., 3] == 255).all() and (opaque[..., :3] == picture()).all()
    with pytest.raises(ValueError, match="Received: channels=2"):
        read_image(path, channels=2)


# What else a file may hold


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_large_texts_and_color_profiles_do_not_make_a_png_unreadable(tmp_path, kind, after):
    content = saved(tmp_path / "image.png", picture()).read_bytes()
    head = {"zTXt": b"key\0\0", "iTXt": b"key\0\1\0\0\0", "iCCP": b"name\0\0"}[kind]
    large = chunk(kind.encode(), head + zlib.compress(bytes(2_000_000)))
    place = content.index(b"IEND" if after else b"IDAT") - 4
    path = tmp_path / "large.png"
    path.write_bytes(content[:place] + large + content[place:])
    np.testing.assert_array_equal(read_image(path), picture())
    np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes())), picture())
    assert image_files._size_of(path) == (6, 8)


def test_a_photo_of_many_pixels_is_read_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MOST_PIXELS", 10_000)
    monkeypatch.setattr(image_files, "MOST_PIXELS_OF_JPEG", 60_000)
    photo = Image.fromarray(picture(height=4, width=4)).resize((240, 200), Image.BICUBIC)
    path = saved(tmp_path / "photo.jpg", photo, quality=95)
    expected = np.asarray(photo.resize((8, 6), Image.BILINEAR)).astype(int)
    assert np.abs(read_image(path, (6, 8)).astype(int) - expected).mean() < 2
    with pytest.raises(TooLarge, match="48,000 pixels; at most 10,000"):
        read_image(path)  # At its full size.
    with pytest.raises(TooLarge, match="48,000 pixels; at most 10,000"):
        read_image(saved(tmp_path / "photo.png", photo), (6, 8))
    monkeypatch.setattr(image_files, "MOST_PIXELS_OF_JPEG", 40_000)
    with pytest.raises(TooLarge, match="48,000 pixels; at most 40,000"):
        read_image(path, (6, 8))


def test_too_large_images_of_a_folder_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_files, "MOST_PIXELS", 100)
    folder = fill(tmp_path / "set")
    saved(folder / "a" / "large.png", Image.new("1", (11, 10)))
    dataset = load_dataset(str(folder), image_size=8)
    assert len(dataset.train_labels) + len(dataset.test_labels) == 10
    assert "left out a/large.png: too large: 110 pixels" in capsys.readouterr().err


def test_heic_without_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_files.formats.cache_clear()
    path = tmp_path / "photo.jpg"
    for brand in (b"heic", b"mif1"):
        path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(100))
        with pytest.raises(ImageError, match="HEIC.*try `pip install pillow-heif`"):
            read_image(path)
    with pytest.raises(ImageError, match="none of 1 files .* pillow-heif"):
        image_files.common_size([path])
    path.write_bytes(b"\0\0\0\x18ftypqt  " + bytes(100))
    with pytest.raises(ImageError, match=re.escape(f"cannot identify image file {str(path)!r}")):
        read_image(path)
    image_files.formats.cache_clear()


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    shown = np.full((48, 64, 3), (200, 40, 90), "uint8")
    heif.from_pillow(Image.fromarray(shown)).save(tmp_path / "photo.heic")
    assert np.abs(read_image(tmp_path / "photo.heic").astype(int) - shown).max() < 8


# Size


@pytest.mark.parametrize("size", [(12, 30), (40, 40), (30, 10)])
def test_images_are_cut_or_padded_to_another_aspect_ratio(tmp_path, size):
    """A smooth image, so that rounding to whole pixels changes little."""
    y, x = np.mgrid[:60, :120]
    pixels = np.dstack([2 * x, 4 * y, 100 + x - y]).astype("uint8")
    path, image = saved(tmp_path / "image.png", pixels), Image.fromarray(pixels)
    height, width = size
    scale = min(60 / height, 120 / width)
    left, top = 60 - scale * width / 2, 30 - scale * height / 2
    box = (left, top, left + scale * width, top + scale * height)
    expected = np.asarray(image.resize((width, height), Image.BILINEAR, box=box)).astype(int)
    assert np.abs(read_image(path, size, resize="crop") - expected).max() <= 1
    scale = max(60 / height, 120 / width)
    inner = round(60 / scale), round(120 / scale)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    expected = np.zeros((*size, 3), int)
    expected[top : top + inner[0], left : left + inner[1]] = image.resize(
        inner[::-1], Image.BILINEAR
    )
    assert np.abs(read_image(path, size, resize="pad") - expected).max() <= 1
    narrow = saved(tmp_path / "narrow.png", np.full((2, 300, 3), 255, "uint8"))
    assert (read_image(narrow, size, resize="pad").max(axis=(1, 2)) == 255).sum() == 1
    with pytest.raises(ValueError, match="'squash', 'crop', 'pad'. Received: resize='stretch'"):
        read_image(path, size, resize="stretch")


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((50, 50), 4, (48, 48)),
        ((50, 70), 5, (50, 70)),
        ((3, 31), 7, (7, 28)),
        ((9, 500), 7, (35, 35)),
    ],
)
def test_default_sizes_are_multiples_of_the_patches(tmp_path, size, patch, expected):
    path = saved(tmp_path / "image.png", Image.new("L", size[::-1]))
    assert image_files.common_size([path], patch) == expected


def test_how_a_folder_was_resized_stays_with_the_data(tmp_path):
    folder = fill(tmp_path / "set", size=(8, 16))
    squashed, cut = (load_dataset(str(folder), None, 8, how) for how in ("squash", "crop"))
    assert (squashed.resize, cut.resize) == ("squash", "crop")
    assert datasets.digest(squashed) != datasets.digest(cut)
    path = folder / cut.manifest[0].path
    np.testing.assert_array_equal(cut.train_images[0], read_image(path, (8, 8), resize="crop"))
    unseen, _ = data.load_unseen(str(folder), (8, 8), None, (), resize="crop")
    np.testing.assert_array_equal(unseen.test_images, cut.test_images)
