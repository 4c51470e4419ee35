"""Pictures inside a page: data URIs of a bounded size."""

import base64
import io
from pathlib import Path

from PIL import Image

_WIDTHS = (1600, 1200, 900, 640, 420)
_QUALITY = 82
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}
_MOST_PIXELS = 2**26


def data_uri(path: Path, max_bytes: int) -> str:
    """Return a picture as a data URI: the file itself, or a smaller JPEG of it where that has too many bytes.

    Args:
        path: A PNG or JPEG file.
        max_bytes: Of the picture. The smallest JPEG, 420 pixels wide, is taken where none has so few.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such picture, or has more than 64 million pixels.
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
