"""Pictures of every mode as RGB, and images that are refused before they take memory, wait or start programs."""

from __future__ import annotations

import io
import json
import os
import socket
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import in_little_memory
from data_examples import picture, talk
from PIL import Image, ImageDraw
from tiny import tiny_processor
from tiny_tiles import EVERY

from himap_train.data.cached import CachedEncoder, FeatureStore, Place, read_image
from himap_train.data.encode import Encoder
from himap_train.data.forms import read_record
from himap_train.data.images import content_digest, image_size, open_image
from himap_train.data.records import RecordError
from himap_train.models.loading import load_config, load_llava, load_processor

RAMP = np.tile(np.linspace(0, 1, 256), (4, 1))  # (4, 256), dark to bright
GREYS = {
    "16 bits": (RAMP * 65535).astype(np.uint16),
    "16 bits in 32": (RAMP * 65535).astype(np.int32),
    "8 bits in 32": (RAMP * 255).round().astype(np.int32),
    "31 bits": (RAMP * (2**31 - 1)).astype(np.int32),
    "floats to 1": RAMP.astype(np.float32),
    "floats to 255": (RAMP * 255).astype(np.float32),
    "floats to 65535": (RAMP * 65535).astype(np.float32),
}


class Listed(list):
    """A map-style source."""


def as_file(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", GREYS)
def test_grey_is_scaled_by_its_bit_depth(name: str) -> None:
    image = Image.fromarray(GREYS[name])
    files: list[Any] = [image, as_file(image, "TIFF")]
    if name == "16 bits":
        files += [
            as_file(image, "PNG"),
            as_file(image, "PPM"),
            Image.frombytes("I;16B", image.size, GREYS[name].astype(">u2").tobytes()),
        ]
    for source in files:
        found = np.asarray(open_image(source, "x"))
        assert found.shape == (4, 256, 3)
        assert np.abs(found - (RAMP * 255)[..., None]).max() <= 1


def test_dark_16_bits_stay_dark() -> None:
    """The depth is that of the file, not of what the brightest pixel happens to need."""
    dark = Image.fromarray(np.full((4, 4), 255, np.uint16))
    for source in (dark, as_file(dark, "PNG"), as_file(dark, "TIFF")):
        assert open_image(source, "x").getpixel((0, 0)) == (1, 1, 1)


def test_12_bits_of_a_tiff_are_12_bits() -> None:
    data = bytearray(as_file(Image.fromarray(np.full((4, 4), 2048, np.uint16)), "TIFF"))
    packed = bytes((0x80, 0x08, 0x00)) * 8  # two pixels of 2048 in three bytes
    with Image.open(io.BytesIO(data)) as opened:
        start = opened.tag_v2[273][0]
    at = data.index((258).to_bytes(2, "little") + (3).to_bytes(2, "little"))  # bits per sample
    data[at + 8 : at + 10] = (12).to_bytes(2, "little")
    data[start : start + len(packed)] = packed
    assert open_image(bytes(data), "x").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("odd", [1e6, np.nan, np.inf, -np.inf, -0.01])
def test_floats_without_a_known_range_are_refused(odd: float, tmp_path: Path) -> None:
    """One pixel is enough; file and record are named."""
    values = np.full((2, 2), 0.5, np.float32)
    values[0, 1] = odd
    Image.fromarray(values).save(tmp_path / "x.tiff")
    expected = r"record 7: .*x.tiff .*grey values from .*, expected 0 to 1 or 255 or 65535; convert it to 8 bits"
    with pytest.raises(RecordError, match=expected):
        open_image(tmp_path / "x.tiff", "record 7")


def test_negative_whole_numbers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[5, -3]], np.int32)).save(tmp_path / "x.tiff")
    with pytest.raises(RecordError, match=r"record 7: .*x.tiff .*grey values from -3 to 5, expected 0 to 255 or"):
        open_image(tmp_path / "x.tiff", "record 7")


def ink(mode: str) -> Image.Image:
    """A black disc on transparency, under which black is stored too."""
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((10, 10, 30, 30), fill=(0, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (40, 40), 0)
        image.putpalette([0] * 768)
        ImageDraw.Draw(image).ellipse((10, 10, 30, 30), fill=1)
        return Image.open(io.BytesIO(as_file(image, "PNG", transparency=0)))
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "P"])
def test_transparency_is_laid_on_white_or_black(mode: str) -> None:
    image = ink(mode)
    assert [open_image(image, "x").getpixel(at) for at in ((2, 2), (20, 20))] == [(255,) * 3, (0,) * 3]
    assert open_image(image, "x", "black").getextrema() == ((0, 0),) * 3


def test_the_transparent_grey_of_a_16_bit_png() -> None:
    grey = Image.fromarray(np.array([[0, 40000]], np.uint16))
    png = bytearray(as_file(grey, "PNG"))
    chunk = b"tRNS" + (0).to_bytes(2, "big")
    at = png.index(b"IDAT") - 4
    png[at:at] = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    for background, shown in (("white", 255), ("black", 0)):
        found = open_image(bytes(png), "x", background)  # type: ignore[arg-type]
        assert [found.getpixel((x, 0))[0] for x in (0, 1)] == [shown, 156]


def test_half_transparent_pixels_are_mixed() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert open_image(half, "x").getpixel((0, 0)) == (255, 127, 127)
    assert open_image(half, "x", "black").getpixel((0, 0)) == (128, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_as_pillow_has_them(mode: str) -> None:
    image = picture(5, 3).convert(mode)
    assert open_image(image, "x").tobytes() == image.convert("RGB").tobytes()


def test_16_bits_and_transparency_are_turned_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for image in (Image.fromarray(GREYS["16 bits"]), Image.new("RGBA", (256, 4))):
        assert open_image(as_file(image, "PNG", exif=exif), "x").size == (4, 256)


def test_images_that_differ_on_one_background_alone_have_different_digests() -> None:
    clear, white = Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("RGB", (2, 2), "white")
    assert open_image(clear, "x").tobytes() == open_image(white, "x").tobytes()
    assert content_digest(clear, "x") != content_digest(white, "x")


def test_background_reaches_the_encoder() -> None:
    conversation = talk("<image>\nWhat?", "A.", images=(ink("RGBA"),))
    light, dark = (Encoder(tiny_processor(), image_background=b).encode(conversation) for b in ("white", "black"))
    assert light["images"][0]["pixel_values"].mean() > 1 > -1 > dark["images"][0]["pixel_values"].mean()
    with pytest.raises(ValueError, match="image_background is 'grey'; expected one of white, black"):
        Encoder(tiny_processor(), image_background="grey")  # type: ignore[arg-type]


# ---- what is not opened ----


def test_only_formats_that_people_train_on_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for opener in (open_image, image_size):
        with pytest.raises(
            RecordError, match="record 7: .*x.png is not an image file .* expected PNG, JPEG, .*convert"
        ):
            opener(tmp_path / "x.png", "record 7")
    assert not (tmp_path / "started").exists()
    with pytest.raises(RecordError, match="is not an image file"):
        open_image(as_file(picture(), "ICO"), "x")
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        assert open_image(as_file(picture(), format), "x").size == (40, 30)


def test_pipes_sockets_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    kinds = {tmp_path / "pipe": "a named pipe", tmp_path: "a folder", Path("/dev/zero"): "a device"}
    for path, kind in {**kinds, tmp_path / "socket": "a socket"}.items():
        for opener in (open_image, image_size, content_digest):
            with pytest.raises(RecordError, match=f"record 7: {path} is broken .*it is {kind}, expected a file"):
                opener(path, "record 7")


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError(7), Exception("decoder")])
def test_whatever_a_decoder_raises_is_an_error_of_the_record(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    expected = "does not fit into memory" if isinstance(error, MemoryError) else "is broken"
    with pytest.raises(RecordError, match=f"record 7: the image stored in the record {expected}"):
        open_image(b"", "record 7")


# ---- what a transform makes ----

STRIPS = ((100_000, 1), (1, 100_000), (60_000, 3))


@pytest.mark.parametrize("aspect_ratio", ["pad", "as_processor"])
@pytest.mark.parametrize("size", STRIPS)
def test_strips_are_refused_before_they_are_made_large(size: tuple[int, int], aspect_ratio: Any) -> None:
    encoder = Encoder(tiny_processor(), None, aspect_ratio)
    if aspect_ratio == "as_processor":  # as LLaVA-1.5's, whose short side becomes 336
        encoder.processor.image_processor.size = {"shortest_edge": 336}
    conversation = talk("<image>\nWhat?", "A.", images=(Image.new("RGB", size),))
    found = rf"{size[0]} x {size[1]} pixels would be .* x .*134217728 pixels are the limit; cut it, or scale it down"
    with pytest.raises(RecordError, match=f"'sample': an image of {found}"):
        encoder.encode(conversation)
    with pytest.raises(RecordError, match=found):  # in the data check too, which decodes nothing
        encoder.image_tokens(size)


def test_strips_are_passed_over_where_features_are_cached() -> None:
    source = Listed([talk("<image>\nWhat?", "A.", images=(Image.new("RGB", size),)) for size in (STRIPS[0], (9, 9))])
    encoder = CachedEncoder(tiny_processor(), None, "pad")
    assert read_image(source, Place("strip", 0, 0, 16), encoder) is None
    assert read_image(source, Place("good", 1, 0, 16), encoder) is not None
    encoder.read_from(FeatureStore(Path("/nowhere"), 8, torch.float32))
    with pytest.raises(RecordError, match="134217728 pixels are the limit"):  # not that the cache lacks it
        encoder.encode(source[0])


def test_long_images_that_fit_are_taken() -> None:
    sample = Encoder(tiny_processor(), None, "pad").encode(talk("<image>\nWhat?", "A.", images=(picture(1, 4000),)))
    assert sample["images"][0]["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("family", EVERY)
def test_strips_take_little_memory_in_every_family(family: str, tmp_path: Path) -> None:
    """Encoded, or refused as a record: alone and with a second image, within 2 GB of address space."""
    EVERY[family].folder(tmp_path, 2)
    encoder = Encoder(load_processor(tmp_path, load_config(tmp_path)))

    def encode() -> int:
        for size in STRIPS:
            for images in (1, 2):
                conversation = talk("<image>" * images + "What?", "A.", images=(Image.new("RGB", size),) * images)
                try:
                    encoder.encode(conversation)
                except RecordError as error:
                    assert "memory" not in str(error), error
                with suppress(RecordError):
                    encoder.image_tokens(*[size] * images)
        return 0

    status, errors = in_little_memory(encode, 2, tmp_path / "log")
    assert status == 0, errors


# ---- zero is a number ----


@pytest.mark.parametrize("name", ["llava_next", "vipllava"])
def test_zero_additional_image_tokens_are_a_fact_of_the_processor(name: str, tmp_path: Path) -> None:
    EVERY[name].folder(tmp_path, 2)
    file = tmp_path / "processor_config.json"
    written = json.loads(file.read_text())
    for value, expected in ((0, 1), (2, 2), (None, 1)):  # towers with a class token, which "default" drops
        content = {**written, "num_additional_image_tokens": value}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        assert load_llava(tmp_path)[1].num_additional_image_tokens == expected


def test_a_record_called_zero_keeps_its_name() -> None:
    row: dict[str, Any] = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    names = [read_record({**row, **named}, 3, "mine", None).id for named in ({"id": 0}, {"id": ""}, {})]
    assert names == ["0", "3", "3"]
