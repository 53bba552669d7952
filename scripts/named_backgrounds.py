"""How often a drawing has the background that its caption names.

    python scripts/named_backgrounds.py --count 96

Held-out emoji are drawn from the caption that names their background. What a picture's four corners are nearest to,
of the eight colours of the data, counts as its background; the true pictures are looked at likewise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from emulus.commands.shipped import MODEL, shipped
from emulus.data.emoji.art import BACKGROUNDS
from emulus.data.source import Item, even, open_source
from emulus.loading import load
from emulus.media import read_image
from emulus.recipes.emoji import DATA

SPLIT = "validation"
CORNER = 4
"""Side in pixels of what is looked at in each corner."""


def main() -> None:
    """Draw and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; the shipped one by default")
    parser.add_argument("--data", type=Path, help="the data set it was trained on; the shipped one by default")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--guidance-scale", type=float, default=None)
    options = parser.parse_args()
    model = load(options.model or shipped(MODEL, "--model"))
    source = open_source(options.data or shipped(DATA, "--data"))
    items = even(
        [item for item in source if item.split == SPLIT and item.kind == "image" and named(item)], options.count
    )
    drawn = model.generate_images(
        [caption_with_background(item) for item in items], seed=0, guidance_scale=options.guidance_scale
    )
    print(json.dumps({"count": len(items), "drawn": share(drawn, items), "true": share(opened(items), items)}))


def named(item: Item) -> str:
    """The background that one of an item's captions names; empty if none does."""
    found = (name for name in BACKGROUNDS for caption in item.captions if f" {name} background" in caption)
    return next(found, "")


def caption_with_background(item: Item) -> str:
    """The first caption that names it."""
    return next(caption for caption in item.captions if " background" in caption)


def painted(picture: PIL.Image.Image) -> str:
    """The background whose colour is nearest to a picture's corners."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    ends = (slice(CORNER), slice(-CORNER, None))
    corners = np.stack([pixels[rows, columns] for rows in ends for columns in ends])
    colour = np.median(corners.reshape(-1, 3), axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(colour - np.array(BACKGROUNDS[name]))))


def share(pictures: Sequence[PIL.Image.Image], items: Sequence[Item]) -> float:
    """Of pictures, those with the background that their item names."""
    return sum(painted(picture) == named(item) for picture, item in zip(pictures, items, strict=True)) / len(items)


def opened(items: Sequence[Item]) -> list[PIL.Image.Image]:
    """The items' own pictures."""
    return [read_image(item.media) for item in items]


if __name__ == "__main__":
    main()
