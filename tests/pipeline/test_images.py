from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import MAX_PIXELS, UnreadableImage, decoded
from tests.pipeline.made_images import image_bytes


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


COLOURS = {"RGB": (250, 10, 10), "L": 250, "CMYK": (0, 240, 240, 5), "RGBA": (250, 10, 10, 255), "P": None}
MODES = {"PNG": ("RGB", "L", "RGBA", "P"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb_of_the_same_colour(form: str, mode: str) -> None:
    if mode == "P":
        data = _saved(Image.new("RGB", (4, 3), (250, 10, 10)).quantize(8), form)
    else:
        data = image_bytes(form, COLOURS[mode], mode=mode)
    found = decoded(data)
    assert (found.mode, found.size) == ("RGB", (4, 3))
    wanted = (250, 250, 250) if mode == "L" else (250, 10, 10)
    assert np.abs(np.asarray(found).astype(int) - wanted).max() <= 12


def test_sixteen_bits_become_eight_and_not_white() -> None:
    grey = Image.fromarray(np.full((3, 4), 40 << 8, dtype=np.uint16))
    assert np.asarray(decoded(_saved(grey, "PNG"))).tolist() == np.full((3, 4, 3), 40).tolist()


def test_transparent_places_are_white() -> None:
    assert decoded(image_bytes("PNG", (0, 0, 0, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 3), 0)
    palette.putpalette([9, 9, 9])
    assert decoded(_saved(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_a_rotated_photograph_stands_upright() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    found = decoded(_saved(image, "PNG", exif=exif))
    assert found.size == (4, 8)
    assert found.getpixel((1, 1)) == (255, 255, 255)
    assert found.getpixel((1, 6)) == (0, 0, 0)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    first, second = Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("RGB", (4, 3), (0, 0, 255))
    data = _saved(first, form, save_all=True, append_images=[second], duration=10)
    assert decoded(data).getpixel((0, 0))[0] > 200


def _png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9000, 60000])
def test_a_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnreadableImage, match=f"more than {MAX_PIXELS} pixels"):
            decoded(_png_of_size(side, side))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_damage_is_a_reason_and_never_another_error(form: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    whole = _saved(Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)), form)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(UnreadableImage):
            assert decoded(bytes(damaged)).mode == "RGB"


def test_a_picture_cut_short_is_damaged() -> None:
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "WEBP"):
        whole = _saved(Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)), form)
        with pytest.raises(UnreadableImage, match="cannot be decoded"):
            decoded(whole[: len(whole) // 2])
