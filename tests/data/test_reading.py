"""Image files as cameras, phones and converters leave them."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dset_d2.data.reading import read_image

FRAME = Path(__file__).parents[3] / "shared" / "data" / "rope3d_frame" / "frame.jpg"


def test_bytes_decide_not_the_suffix(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    path = tmp_path / "frame.jpg"
    with open(path, "wb") as file:
        Image.fromarray(image).save(file, format="PNG")
    np.testing.assert_array_equal(read_image(str(path)), image)


@pytest.mark.skipif(not FRAME.is_file(), reason="the genuine frame is not here")
def test_genuine_frame_with_a_wrong_suffix():
    assert read_image(str(FRAME)).shape == (1080, 1920, 3)


def test_broken_images_are_named(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, format="JPEG")
    (tmp_path / "half.jpg").write_bytes(stream.getvalue()[:400])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("half.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=f"{name}: cannot read this image"):
            read_image(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        read_image(str(tmp_path / "absent.jpg"))


def turned(path, orientation: int, size=(20, 12), red=(0, 0)) -> None:
    """An image with one red pixel, stored in the (width, height), whose EXIF data turn it."""
    image = Image.new("RGB", size)
    image.putpixel(red, (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@settings(deadline=None, max_examples=30)
@given(orientation=st.integers(0, 9), suffix=st.sampled_from(["png", "jpg", "tif"]))
def test_images_are_upright_as_pillow_says(tmp_path_factory, orientation, suffix):
    path = tmp_path_factory.mktemp("turned") / f"image.{suffix}"
    turned(path, orientation)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)


GREY = np.linspace(0, 65535, 240).reshape(12, 20)


@pytest.mark.parametrize("name, dtype", [("a.png", "u2"), ("a.tif", "u2"), ("b.tif", "i4")])
def test_sixteen_bits_become_eight(tmp_path, name, dtype):
    Image.fromarray(GREY.astype(dtype)).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == (12, 20, 3)
    np.testing.assert_allclose(image[..., 0] * 257.0, GREY, atol=257)


@pytest.mark.parametrize(
    "name, pixels",
    [("float.tif", GREY.astype("f4")), ("twelve.png", (GREY / 16).astype("u2")),
     ("large.tif", GREY.astype("i4") * 9), ("signed.tif", -GREY.astype("i4"))],
)  # fmt: skip
def test_pixels_without_a_known_white_are_named(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: pixels are .* convert the image to 8 bits"):
        read_image(tmp_path / name)
