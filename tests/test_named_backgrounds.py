"""Which background a picture has, and which its captions name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import PIL.Image

from emulus.data.emoji.art import BACKGROUNDS
from emulus.data.source import open_source
from scripts.named_backgrounds import caption_with_background, named, opened, painted, share

DATA = Path(__file__).parents[1] / "data/emoji"


def test_colours() -> None:
    for name, colour in BACKGROUNDS.items():
        picture = PIL.Image.new("RGB", (16, 16), colour)
        picture.paste((200, 0, 0), (4, 4, 12, 12))
        assert painted(picture) == name


def test_of_true_pictures() -> None:
    items = [item for item in open_source(DATA) if item.split == "test" and item.kind == "image" and named(item)][:40]
    assert all(named(item) in caption_with_background(item) for item in items)
    assert share(opened(items), items) > 0.8
    assert not named(replace(items[0], captions=("a cat",)))
