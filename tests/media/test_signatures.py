"""Formats are told by content: every format that can be written here is recognised, texts and archives are not."""

from __future__ import annotations

import zipfile
from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emulus.media import media_type, read_image
from emulus.media.signatures import HEAD, image_format

IMAGES = {
    "PNG": "RGB",
    "JPEG": "RGB",
    "WEBP": "RGB",
    "GIF": "P",
    "BMP": "RGB",
    "TIFF": "RGB",
    "AVIF": "RGB",
    "JPEG2000": "RGB",
    "PPM": "RGB",
    "QOI": "RGB",
    "DDS": "RGBA",
    "ICO": "RGBA",
    "SGI": "RGB",
    "PCX": "RGB",
    "TGA": "RGB",
}


def encoded(kind: str, mode: str, **options: object) -> bytes:
    content = BytesIO()
    Image.new(mode, (24, 16), 1).save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind: str) -> None:
    content = encoded(kind, IMAGES[kind])
    assert image_format(content[:HEAD]) == kind
    assert media_type(content[:HEAD]) == "image"
    assert read_image(content).size in ((24, 16), (16, 11))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_every_targa(mode: str, compression: str | None) -> None:
    assert image_format(encoded("TGA", mode, compression=compression)) == "TGA"


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "F"])
def test_every_netpbm(mode: str) -> None:
    assert image_format(encoded("PPM", mode)) == "PPM"
    assert image_format(b"P5 # made by a tool\n# and another\n24 16\n255\n" + bytes(9)) == "PPM"


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mov", "mpeg4"),
        ("matroska", "mpeg4"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("flv", "flv"),
        ("mpegts", "mpeg2video"),
        ("mpeg", "mpeg1video"),
        ("vob", "mpeg2video"),
        ("ogg", "libtheora"),
        ("asf", "wmv2"),
        ("ivf", "libvpx"),
        ("mxf", "mpeg2video"),
        ("nut", "ffv1"),
        ("3gp", "mpeg4"),
        ("yuv4mpegpipe", "rawvideo"),
    ],
)
def test_videos(container: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    content = BytesIO()
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        output.mux(stream.encode())
    assert media_type(content.getvalue()[:HEAD]) == "video"
    assert media_type(content.getvalue()[:8]) in ("video", None)


def archive() -> bytes:
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a.png", encoded("PNG", "RGB"))
    return content.getvalue()


OTHERS = {
    "empty": b"",
    "text": b"A caption, quite a long one, of a red fox.\n",
    "BMW": b"BMW is a maker of cars, and this is a text that starts with two telling letters.",
    "P3": b"P3 is a proposition that no computer can read as an image",
    "P1 2024": b"P1 2024 was a good year",
    "utf-16": "a\nb\nc\nd\ne\nf\ng\nh\ni".encode("utf-16"),
    "utf-16 without its mark": "a\nb\nc\nd\ne\nf\ng\nh\ni".encode("utf-16-le"),
    "html": b"<!DOCTYPE html><html><body><img src='a.png'></body></html>",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "json": b'{"text": "words"}\n',
    "zip": archive(),
    "tar": b"a.png" + bytes(95) + b"0000644\0" + bytes(400),
    "gzip": b"\x1f\x8b\x08" + bytes(60),
    "parquet": b"PAR1" + bytes(60),
    "numpy": b"\x93NUMPY\1\0v\0{'descr': '|u1'}",
    "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
    "mp3": b"ID3\4\0\0\0\0\0\0" + bytes(60),
    "flac": b"fLaC" + bytes(60),
    "m4a": b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42" + bytes(60),
    "elf": b"\x7fELF\2\1\1" + bytes(60),
    "playlist": b"#EXTM3U\n#EXTINF:1,\na.mkv\n",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "zeros": bytes(HEAD),
    "ones": b"\xff" * HEAD,
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    assert media_type(OTHERS[name][:HEAD]) is None


@given(st.binary(max_size=300))
def test_any_bytes_have_an_answer(head: bytes) -> None:
    assert media_type(head) in ("image", "video", None)


@given(st.text(min_size=1, max_size=300))
def test_no_text_is_media(text: str) -> None:
    assert media_type(text.encode("utf-8", "ignore")) is None


@given(st.sampled_from(sorted(IMAGES)), st.integers(0, 60))
def test_a_cut_head_is_never_another_format(kind: str, length: int) -> None:
    assert image_format(encoded(kind, IMAGES[kind])[:length]) in (kind, None)


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"avif\0\0\0\0avifmif1miafMA1B", "AVIF"),
        (b"mif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"avis\0\0\0\0avifavismsf1", "AVIF"),
        (b"heic\0\0\0\0mif1heic", "HEIF"),
        (b"mif1\0\0\0\0mif1heic", "HEIF"),
        (b"isom\0\0\2\0isomiso2avc1mp41", None),
    ],
)
def test_brands_of_boxes(brands: bytes, kind: str | None) -> None:
    head = (len(brands) + 8).to_bytes(4, "big") + b"ftyp" + brands + bytes(32)
    assert image_format(head) == kind
    assert media_type(head) == ("image" if kind else "video")
