"""Embed pictures into a page as data URIs of bounded size."""

import base64
import io
from pathlib import Path

from PIL import Image

_WIDTHS = (1600, 1200, 900, 640, 420)
_QUALITY = 82
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}
_MOST_PIXELS = 2**26


def data_uri(path: Path, max_bytes: int) -> str:
    """Return a picture as a data URI: the file itself, or a smaller JPEG of it if the file is too large.

    Args:
        path: A PNG or JPEG file.
        max_bytes: Size limit of the picture. If no JPEG is small enough, the one of 420 pixels width is used.

    Raises:
        OSError: The file cannot be read or is not a PNG or JPEG.
        ValueError: It has more than 2^26 pixels.
    """
    with Image.open(path, formats=tuple(_TYPES)) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
        kind = _TYPES[image.format or "PNG"]
        if path.stat().st_size <= max_bytes:
            return _uri(kind, path.read_bytes())
        pixels = image.convert("RGB")
    data = b""
    for width in (width for width in (pixels.width, *_WIDTHS) if width <= pixels.width):
        size = width, max(1, round(pixels.height * width / pixels.width))
        file = io.BytesIO()
        pixels.resize(size, Image.Resampling.LANCZOS).save(file, format="JPEG", quality=_QUALITY)
        data = file.getvalue()
        if len(data) <= max_bytes:
            break
    return _uri("image/jpeg", data)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
