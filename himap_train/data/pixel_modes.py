"""Any picture as RGB with 8 bits a channel: more bits are scaled down, not cut off, and transparency gets a background.

What Pillow's own `convert("RGB")` does instead: 16 bits become white, floats in [0, 1] black, and transparent pixels
whatever colour is stored under them, which is black in most drawings.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from PIL import ExifTags, Image

from himap_train.models.families.base import Background

_WHITES = {"I": (255.0, 65535.0, 2.0**31), "F": (1.0, 255.0, 65535.0)}  # the first that no pixel is above is white
_BITS_PER_SAMPLE = 258  # tag of TIFF
SAY_HOW_IT_LIES = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""What a picture's `info` may hold of its orientation."""
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))
"""What turns a picture upright, by its EXIF orientation from 2 to 8: Pillow's own, without writing the tags anew, which
fails for good pictures with one odd tag."""


def check_background(background: str) -> None:
    """Raises ValueError for what is no `Background`."""
    if background not in get_args(Background):
        raise ValueError(f"image_background is {background!r}; expected one of {', '.join(get_args(Background))}")


def orientation(image: Image.Image) -> int:
    """As EXIF has it, 1 to 8; 1, upright, where that cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds for damaged tags, of which no pixel depends
        return 1


def as_rgb(image: Image.Image, background: Background = "white") -> Image.Image:
    """RGB, turned upright by the EXIF orientation.

    Grey of 9 to 16 bits is scaled by its bit depth. Grey of 32 bits (mode I, which does not say how many are used) is
    taken for 8, 16 or 31 bits, the fewest that hold the brightest pixel; floats for [0, 1], [0, 255] or [0, 65535] in
    the same way. Transparency, that of palettes too, is composited on `background`.

    Raises:
        ValueError: Grey that is negative or no number, floats beyond 65535, whose range nothing tells; a mode without
            RGB (LAB).
    """
    bits = _bits(image)
    image.load()  # a TIFF turns itself then
    if (turned := _TURNS.get(orientation(image))) is not None:
        image = image.transpose(turned)
        image.info = {name: value for name, value in image.info.items() if name not in SAY_HOW_IT_LIES}
    if image.mode.startswith("I;16"):
        values, clear = _values(image), image.info.get("transparency")
        grey = _grey(values, 2**bits - 1)
        if clear is not None:  # of a PNG: the one value that is transparent
            grey.paste(background, mask=Image.fromarray(values == clear))
        return grey
    if image.mode in _WHITES:
        values, whites = _values(image), _WHITES[image.mode]
        return _grey(values, _white(values, whites if bits > 16 else (2.0**bits - 1,)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    above = image.convert("RGBA")
    canvas = Image.new("RGBA", above.size, background)
    canvas.alpha_composite(above)
    return canvas.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Bits of a grey value: as a TIFF says, 16 in other files that have more than 8, 32 where there is no file."""
    found: Any = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    if found:
        return int(found[0])
    return 16 if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")) else 32


def _values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def _white(values: np.ndarray, whites: tuple[float, ...]) -> float:
    """The first of some values that no pixel is above."""
    least, most = values.min(initial=0), values.max(initial=0)  # nan where one is nan
    for white in whites:
        if least >= 0 and most <= white:
            return white
    allowed = " or ".join(f"{white:g}" for white in whites)
    raise ValueError(f"grey values from {least:g} to {most:g}, expected 0 to {allowed}; convert it to 8 bits")


def _grey(values: np.ndarray, white: float) -> Image.Image:
    """Grey values, of which `white` is the brightest."""
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8), "L").convert("RGB")
