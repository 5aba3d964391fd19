"""Small images for tests."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def image_bytes(form: str, colour: Any = (200, 30, 30), size: tuple[int, int] = (4, 3), mode: str = "RGB") -> bytes:
    """Return an encoded image of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form)
    return buffer.getvalue()
