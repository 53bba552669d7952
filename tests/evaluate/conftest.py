"""A tiny whole model with random weights, a small data set of drawn shapes, and a reader of report pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from emulus.bundle import Bundle
from emulus.media import Clip, write_image, write_video
from emulus.model import Decoder, sized
from emulus.pipeline import Emulus
from emulus.presets import GenerationDefaults
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vocabulary import Vocabulary

SIDE = 16
COLOURS = ("red", "green", "blue", "orange")
SPLITS = ("train", "train", "validation", "test")


@pytest.fixture(scope="session")
def model() -> Emulus:
    torch.manual_seed(0)
    config = VisionTokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64)
    text = TextTokenizer.train(
        [f"a {style} {colour} disc" for style in ("flat", "round") for colour in COLOURS], size=300
    )
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=64)
    shape = sized("tiny", vocab_size=vocabulary.size, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    vision = VisionTokenizer(config).eval()
    # The released starting weights give every pixel the same code.
    vision.quantize.embedding.weight.data.normal_()
    return Emulus(
        Bundle(
            decoder=Decoder(shape).eval(),
            vision=vision,
            text=text,
            vocabulary=vocabulary,
            defaults=GenerationDefaults(height=SIDE, width=SIDE, num_frames=8, max_text_tokens=8, top_k=0),
        )
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs in two styles, and clips of moving ones."""
    folder = tmp_path_factory.mktemp("discs")
    rows = []
    for place, colour in enumerate(COLOURS):
        for style in ("flat", "round"):
            for split in SPLITS if style == "flat" else SPLITS[1:]:
                name = f"{style}/{colour}-{split}-{len(rows)}.png"
                write_image(disc(colour, 3 + place, 4 + len(rows) % 5), folder / name)
                rows.append(
                    {"file": name, "captions": [f"a {style} {colour} disc", f"{colour}, {style}"], "split": split}
                )
        clip = Clip(tuple(disc(colour, 4, 4 + frame) for frame in range(9)), fps=8.0)
        name = f"moving/{colour}.webp"
        (folder / "moving").mkdir(exist_ok=True)
        write_video(clip, folder / name)
        rows.append({"file": name, "captions": [f"a moving {colour} disc"], "split": SPLITS[place], "kind": "video"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def disc(colour: str, radius: int, centre: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).ellipse((centre - radius, 4, centre + radius, 4 + 2 * radius), fill=colour)
    return image


VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects pictures and words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[Image.Image] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.images += [opened(value or "") for name, value in attrs if name == "src"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def opened(uri: str) -> Image.Image:
    kind, content = uri.removeprefix("data:image/").split(";base64,")
    image = Image.open(BytesIO(base64.b64decode(content)))
    assert image.format == kind.upper()
    return image


@pytest.fixture(scope="session")
def check_page() -> Callable[[Path], Page]:
    """Reads a page that asks for nothing from elsewhere and runs nothing."""

    def read(path: Path) -> Page:
        page = path.read_text(encoding="utf-8")
        without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
        assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|\son\w+=", without_data)
        return Page(page)

    return read
