"""The one place that reads an image file: upright, opaque, RGB of 8 bits, or refused by name.

A user's file and an image that a stage committed are read by the same function, so that a check sees what a method
sees. What is changed:

- EXIF orientation: the image is turned as a viewer would show it;
- transparency: composed over white, so that colours hidden under it do not appear;
- 16 bits a channel: grey is scaled by 1/257 and rounded; of colour Pillow keeps the upper byte;
- CMYK and other colour models that Pillow converts: converted without their profile.

What is refused: a file that Pillow cannot decode to its end, animation and several pages, floating-point and 32-bit
grey, fully transparent images, more than MAX_PIXELS, sides whose ratio is above MAX_RATIO. Palettes, bilevel and grey
images have an exact RGB form and are not mentioned.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.errors import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
"""Raised when a file is read to other pixels or described by other words, so that remembered digests are not used."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
"""What Pillow may take a file for, whatever its name. Formats that start other programs, such as EPS, are left out."""
MAX_PIXELS = 80_000_000
"""Below the size at which Pillow warns."""
MAX_RATIO = 32
"""Longer side over shorter side. Metrics resize the shorter side first: a line of pixels would need gigabytes."""
TURNED = "turned upright (EXIF orientation)"
COMPOSED = "with transparency, composed over white"
SCALED = "of 16 bits a channel, reduced to 8"
CONVERTED = "in {mode}, converted to RGB without a colour profile"
PROFILE = "with a colour profile other than sRGB, which is not applied"
FIRST = "with further pictures in the file (MPO), of which the first is read"
UNREADABLE_EXIF = "with EXIF data that cannot be read, taken as upright"
BACKGROUND = (255, 255, 255)
"""The colour that transparent images are composed over."""
_ORIENTATION = 0x0112


class BadPicture(ValueError):
    """A file that cannot be read as one image; the message completes "'name' ..."."""


@dataclass(frozen=True)
class Picture:
    """An image as methods see it, and what was changed to make it so."""

    image: Image
    """RGB, upright."""
    changes: tuple[str, ...] = ()
    """What was changed, as words after "2 images"."""

    @property
    def digest(self) -> str:
        """The hexadecimal SHA-256 of size and pixels: equal for files of one picture, however they were saved."""
        width, height = self.image.size
        return hashlib.sha256(f"{width}x{height} RGB\n".encode("ascii") + self.image.tobytes()).hexdigest()


def read(files: Sequence[Path]) -> list[Image]:
    """Return the images in files, RGB. Raises BadPicture as `opened` does."""
    return [opened(file).image for file in files]


def opened(path: Path) -> Picture:
    """Return the image in a file, decoded in full. Raises BadPicture for what is refused; see the module."""
    import PIL.Image

    _load_formats()
    try:
        with _quietly(), PIL.Image.open(path, formats=FORMATS) as image:
            _check_size(image)
            _check_frames(image)
            is_deep = image.mode.startswith("I") or ";16" in str(image.tile)  # known only before decoding
            image.load()
            return _upright(image, is_deep)
    except BadPicture:
        raise
    except PIL.UnidentifiedImageError:
        raise BadPicture(f"is no image that can be read{_looks_like(path)}; repair, convert or remove it") from None
    except Exception as error:  # Pillow's plug-ins raise almost any type on damaged files
        reason = getattr(error, "strerror", None) or error
        what = one_line(f"{type(error).__name__}: {reason}", 100)
        raise BadPicture(f"cannot be decoded ({what}); repair or remove it") from error


@lru_cache(maxsize=1)
def _load_formats() -> None:
    """Import Pillow's modules of the formats that are read; by itself it imports some only when others fail."""
    for name in ("Png", "Jpeg", "Mpo", "WebP", "Bmp", "Gif", "Tiff"):
        importlib.import_module(f"PIL.{name}ImagePlugin")


@contextmanager
def _quietly() -> Iterator[None]:
    """Set Pillow's limit of pixels and its warnings aside, since ours is checked; never fill up a file that was cut.

    Some libraries allow the latter for the whole process.
    """
    import PIL.Image
    import PIL.ImageFile

    before = PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check_size(image: Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPicture(
            f"is too large: {width} x {height} pixels, {width * height / 1e6:.0f} megapixels; at most "
            f"{MAX_PIXELS // 1_000_000} are read: make it smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadPicture(f"is too narrow: {width} x {height} pixels; one side may be {MAX_RATIO} times the other")


def _check_frames(image: Image) -> None:
    """Refuse animations and documents: no frame of them is the image."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        what = "is a document of" if image.format == "TIFF" else "is animated:"
        unit = "pages" if image.format == "TIFF" else "frames"
        raise BadPicture(f"{what} {frames} {unit}; save the one that is meant as an image")


def _upright(image: Image, is_deep: bool) -> Picture:
    """Return a loaded image upright, opaque and RGB."""
    from PIL import ImageOps

    changes = [FIRST] if image.format == "MPO" and getattr(image, "n_frames", 1) > 1 else []
    if _has_other_profile(image):
        changes.append(PROFILE)
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        upright = ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
        changes += [TURNED] if upright is not image else []
    except Exception:  # whatever a damaged block of metadata raises
        upright = image
        changes.append(UNREADABLE_EXIF)
    rgb, further = _rgb(upright, is_deep)
    return Picture(rgb, tuple(changes + further))


def _rgb(image: Image, is_deep: bool) -> tuple[Image, list[str]]:
    """Return an image as RGB, and what that changed."""
    changes = [SCALED] if is_deep else []
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode in ("F", "LAB", "HSV"):
        raise BadPicture(f"has pixels of Pillow's mode {image.mode}, which are not read; save it as 8-bit RGB")
    elif image.mode in ("CMYK", "YCbCr"):
        changes.append(CONVERTED.format(mode=image.mode))
    if not image.has_transparency_data:
        return image.convert("RGB"), changes
    import PIL.Image

    clear = image.convert("RGBA")
    low, high = clear.getchannel("A").getextrema()
    if high == 0:
        raise BadPicture("is fully transparent; remove it")
    if low == 255:
        return clear.convert("RGB"), changes
    ground = PIL.Image.new("RGBA", clear.size, (*BACKGROUND, 255))
    return PIL.Image.alpha_composite(ground, clear).convert("RGB"), [*changes, COMPOSED]


def _eight_bits(image: Image) -> Image:
    """Return 16-bit grey as 8-bit grey: v / 257, rounded; with an alpha channel where one value is transparent."""
    import numpy as np
    import PIL.Image

    values = np.asarray(image).astype(np.int64)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise BadPicture("has grey values of 32 bits (Pillow's mode I), which are not read; save it as 8-bit RGB")
    grey = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _has_other_profile(image: Image) -> bool:
    """Return whether the image has a colour profile that is not called sRGB. CMYK is reported by its mode."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "CMYK":
        return False
    import io

    from PIL import ImageCms

    try:
        made = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        named = ImageCms.getProfileDescription(made)
    except (OSError, ImageCms.PyCMSError):
        return True
    return "srgb" not in named.lower()


_SIGNATURES = {
    b"\xff\x0a": "JPEG XL",
    b"%PDF": "PDF",
    b"%!PS": "EPS",
    b"<svg": "SVG",
    b"<?xm": "SVG or XML",
    b"8BPS": "Photoshop",
    b"<!DO": "a web page",
    b"<htm": "a web page",
    b"version https://": "a Git LFS pointer",
}
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF", b"avis": "AVIF"}


def _looks_like(path: Path) -> str:
    """Return " (it is ...)" for an empty file and for well-known formats that are not read; else ""."""
    with open(path, "rb") as file:
        start = file.read(16)
    if not start:
        return " (it is empty)"
    if start[4:8] == b"ftyp":
        return f" (it is {_BRANDS.get(start[8:12], 'a video or HEIF file')})"
    named = next((name for signature, name in _SIGNATURES.items() if start.startswith(signature)), None)
    return f" (it is {named})" if named else ""
