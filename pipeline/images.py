"""Encoded images: what is taken of them, and how they become pixels, the same in preparation, training and serving.

Of an animated image the first frame counts, EXIF's rotation is applied, 16 bits become 8, transparent places white.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64 << 20
"""Most pixels of an image: a file of a few kilobytes can say that it has more than memory holds."""
FORMATS = ("PNG", "JPEG", "WEBP")
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 16 << 20
"""Most bytes of an encoded image."""
_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's names of grey pixels of more than 8 bits."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message is the reason, free of the library's own words."""


def decoded(data: bytes) -> Image:
    """Return an encoded image as RGB pixels.

    Args:
        data: PNG, JPEG or WebP.

    Raises:
        UnreadableImage: it is damaged, of another format, or of more than :data:`MAX_PIXELS`.
    """
    from PIL import Image, ImageOps  # text tasks need none of it

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        pass
    except Exception as error:  # each format's decoder ends in errors of its own types
        raise UnreadableImage("image cannot be decoded") from error
    raise UnreadableImage(f"image has more than {MAX_PIXELS} pixels")


def _rgb(image: Any) -> Image:
    from PIL import Image

    if image.mode in _WIDE:
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        image = Image.new("RGBA", colours.size, "white")
        image.alpha_composite(colours)
    return image.convert("RGB")


def png_of(pixels: np.ndarray) -> bytes:
    """Return pixels, (height, width, 3) of 8 bits, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
