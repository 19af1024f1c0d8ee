"""How one image file is read: upright, opaque, RGB of 8 bits, or refused by name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from harness.core import pictures
from harness.core.pictures import BadPicture

WIDTH, HEIGHT = 5, 3


def drawing(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return an RGB image without any symmetry."""
    count = width * height * 3
    return Image.fromarray((np.arange(count) * 7 % 256).astype(np.uint8).reshape(height, width, 3))


def same(image: Image.Image, other: Image.Image) -> bool:
    """Return whether two images have the same mode and pixels."""
    return image.mode == other.mode and image.size == other.size and image.tobytes() == other.tobytes()


def deep_png(path, values: np.ndarray, *further: tuple[bytes, bytes]) -> None:
    """Write 16-bit channels [height, width, channels] as PNG, with further chunks; Pillow writes only grey ones."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), *further,
        (b"IDAT", zlib.compress(rows)), (b"IEND", b""),
    ]  # fmt: skip
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
def test_image_is_turned_as_exif_says(tmp_path, orientation, form):
    """All eight orientations, in every format that holds EXIF: the top left of what a viewer shows is the first."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that makes the stored pixels
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((200, 0, 0), (0, 0, 16, 8))
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{form}", exif=exif, quality=100)

    picture = pictures.opened(tmp_path / f"a.{form}")

    assert picture.image.size == (32, 16)
    for x, y in ((4, 3), (27, 3), (4, 12), (27, 12)):
        assert picture.image.getpixel((x, y)) == pytest.approx(upright.getpixel((x, y)), abs=40)
    assert picture.changes == (() if orientation == 1 else (pictures.TURNED,))


def test_damaged_exif_is_said(tmp_path):
    """The pixels are read as they are."""
    drawing().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")

    picture = pictures.opened(tmp_path / "a.png")

    assert same(picture.image, drawing())


def test_colours_under_transparency_do_not_appear(tmp_path):
    """Composed over white: half of black is grey, none of magenta is white."""
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(255, 0, 255, 0), (0, 0, 0, 128), (10, 20, 30, 255)]):
        image.putpixel((x, 0), pixel)
    image.save(tmp_path / "a.png")

    picture = pictures.opened(tmp_path / "a.png")

    assert [picture.image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (127, 127, 127), (10, 20, 30)]
    assert picture.changes == (pictures.COMPOSED,)


def test_alpha_of_an_opaque_image_is_nothing(tmp_path):
    """Its colours are exact, and nothing is said."""
    drawing().convert("RGBA").save(tmp_path / "a.png")

    picture = pictures.opened(tmp_path / "a.png")

    assert same(picture.image, drawing()) and picture.changes == ()


def test_palette_with_a_transparent_colour_is_composed(tmp_path):
    """As cut-outs of eight bits are saved."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 255, 9, 8, 7])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)

    picture = pictures.opened(tmp_path / "a.png")

    assert [picture.image.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (9, 8, 7)]
    assert picture.changes == (pictures.COMPOSED,)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_transparent_colour_is_composed(tmp_path, mode):
    """PNG can name one colour that is transparent, without a channel for it."""
    clear, other = {"L": (7, 90), "RGB": ((7, 8, 9), (90, 91, 92))}[mode]
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), other)
    image.save(tmp_path / "a.png", transparency=clear)

    picture = pictures.opened(tmp_path / "a.png")

    assert picture.image.getpixel((0, 0)) == (255, 255, 255)
    assert picture.image.getpixel((1, 0)) == (other if mode == "RGB" else (90, 90, 90))


def test_grey_with_alpha_is_composed(tmp_path):
    """Pillow's mode LA."""
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (40, 255))
    image.save(tmp_path / "a.png")

    picture = pictures.opened(tmp_path / "a.png")

    assert [picture.image.getpixel((x, 0)) for x in range(2)] == [(255,) * 3, (40,) * 3]


def test_image_of_nothing_is_refused(tmp_path):
    """All of it transparent: white would be made up."""
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "a.png")

    with pytest.raises(BadPicture, match="is fully transparent"):
        pictures.opened(tmp_path / "a.png")


def test_grey_of_16_bits_is_scaled_by_257(tmp_path):
    """65535 / 257 = 255; half steps are rounded."""
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")

    picture = pictures.opened(tmp_path / "a.png")

    assert [picture.image.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 1, 1, 128, 255]
    assert picture.changes == (pictures.SCALED,)


def test_grey_of_16_bits_with_a_transparent_value_is_composed(tmp_path):
    """The value is compared before it is scaled: its neighbour is opaque."""
    values = np.array([[[1000], [1001], [0]]], dtype=np.uint16)
    deep_png(tmp_path / "a.png", values, (b"tRNS", struct.pack(">H", 1000)))

    picture = pictures.opened(tmp_path / "a.png")

    assert [picture.image.getpixel((x, 0))[0] for x in range(3)] == [255, 4, 0]


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_of_16_bits_keeps_its_upper_byte_and_is_said(tmp_path, channels):
    """What Pillow does without a word."""
    values = np.full((1, 1, channels), 65535, dtype=np.uint16)
    values[0, 0, :3] = (0x1234, 0x8001, 0xFFFF)
    deep_png(tmp_path / "a.png", values)

    picture = pictures.opened(tmp_path / "a.png")

    assert picture.image.getpixel((0, 0)) == (0x12, 0x80, 0xFF)
    assert picture.changes == (pictures.SCALED,)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_grey_of_32_bits_is_refused_by_its_mode(tmp_path, mode):
    """No scale is known for it."""
    Image.new(mode, (2, 2), 100_000).save(tmp_path / "a.tiff")

    with pytest.raises(BadPicture, match=f"mode {mode}"):
        pictures.opened(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_bilevel_and_palette_are_exact(tmp_path, mode):
    """They have an RGB form: nothing is changed, nothing said."""
    image = drawing().convert(mode)
    image.save(tmp_path / "a.png")

    picture = pictures.opened(tmp_path / "a.png")

    assert same(picture.image, image.convert("RGB")) and picture.changes == ()


def test_cmyk_is_converted_and_said(tmp_path):
    """As print shops deliver JPEGs."""
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)

    picture = pictures.opened(tmp_path / "a.jpg")

    assert picture.image.getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)
    assert picture.changes == ("in CMYK, converted to RGB without a colour profile",)


def test_profile_is_said_unless_it_is_srgb(tmp_path):
    """Its colours are read as if they were sRGB."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    drawing().save(tmp_path / "lab.png", icc_profile=lab)
    drawing().save(tmp_path / "srgb.png", icc_profile=srgb)
    drawing().save(tmp_path / "broken.png", icc_profile=b"no profile")

    assert pictures.opened(tmp_path / "lab.png").changes == (pictures.PROFILE,)
    assert pictures.opened(tmp_path / "srgb.png").changes == ()
    assert pictures.opened(tmp_path / "broken.png").changes == (pictures.PROFILE,)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("webp", "is animated: 2 frames"),
        ("png", "is animated: 2 frames"),
        ("gif", "is animated: 2 frames"),
        ("tiff", "a document of 2 pages"),
    ],
)
def test_several_frames_are_refused(tmp_path, form, words):
    """None of them is the image."""
    drawing().save(tmp_path / f"a.{form}", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))])

    with pytest.raises(BadPicture, match=words):
        pictures.opened(tmp_path / f"a.{form}")


def test_first_picture_of_a_phone_is_read_and_said(tmp_path):
    """Phones keep a preview or a depth map in the same JPEG (MPO): the first is the photograph."""
    first = Image.new("RGB", (16, 16), (250, 0, 0))
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (16, 16), (0, 0, 250))], quality=100)
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")

    picture = pictures.opened(tmp_path / "a.jpg")

    assert picture.image.getpixel((8, 8)) == pytest.approx((250, 0, 0), abs=4)
    assert picture.changes == (pictures.FIRST,)


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0.4, 0.6, 0.9])
def test_file_that_was_cut_is_refused(tmp_path, form, kept):
    """In whatever format, and wherever it was cut."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / f"a.{form}")
    content = (tmp_path / f"a.{form}").read_bytes()
    (tmp_path / f"a.{form}").write_bytes(content[: int(len(content) * kept)])

    with pytest.raises(BadPicture, match="repair"):
        pictures.opened(tmp_path / f"a.{form}")


def test_file_that_was_cut_is_refused_whatever_libraries_allow(tmp_path, monkeypatch):
    """Some set Pillow to fill the rest with grey, for the whole process."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    drawing(64, 64).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) - 300])

    with pytest.raises(BadPicture, match="cannot be decoded"):
        pictures.opened(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "it is AVIF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is EPS"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"just some words", "is no image that can be read"),
    ],
)
def test_other_file_called_an_image_is_refused(tmp_path, content, words):
    """Well-known formats are named; no other program is started to read one."""
    (tmp_path / "a.png").write_bytes(content)

    with pytest.raises(BadPicture, match=words):
        pictures.opened(tmp_path / "a.png")


@pytest.mark.parametrize(("size", "words"), [((10_000, 10_000), "is too large: 10000 x 10000 pixels, 100 megapixels"),
                                             ((20_000, 20_000), "400 megapixels"), ((33, 1), "is too narrow: 33 x 1"),
                                             ((2, 100), "is too narrow: 2 x 100")])  # fmt: skip
def test_size_is_limited_in_our_words(tmp_path, size, words):
    """No warning of a library: pixels are not decoded first."""
    Image.new("1", size, 1).save(tmp_path / "a.png")

    with warnings.catch_warnings(), pytest.raises(BadPicture, match=words):
        warnings.simplefilter("error")
        pictures.opened(tmp_path / "a.png")


def test_one_pixel_is_an_image(tmp_path):
    """Small is not wrong."""
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")

    assert pictures.opened(tmp_path / "a.png").image.getpixel((0, 0)) == (1, 2, 3)


def test_digest_is_of_what_is_seen(tmp_path):
    """Of pixels and size, not of the file: other compression, format and metadata are the same picture."""
    drawing().save(tmp_path / "a.png")
    drawing().save(tmp_path / "b.png", compress_level=0, dpi=(72, 72))
    drawing().save(tmp_path / "c.bmp")
    drawing().save(tmp_path / "d.webp", lossless=True)
    drawing().convert("RGBA").save(tmp_path / "e.png")
    drawing(HEIGHT, WIDTH).save(tmp_path / "other.png")  # the same bytes in other rows

    digests = {path.name: pictures.opened(path).digest for path in tmp_path.iterdir()}

    assert len({digests[name] for name in ("a.png", "b.png", "c.bmp", "d.webp", "e.png")}) == 1
    assert digests["other.png"] != digests["a.png"]


def test_limit_of_pillow_is_put_back(tmp_path):
    """Other code in the process keeps its protection."""
    before = Image.MAX_IMAGE_PIXELS
    buffer = io.BytesIO()
    drawing().save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())

    pictures.opened(tmp_path / "a.png")

    assert before is not None and before == Image.MAX_IMAGE_PIXELS
