"""items -> frames and codes, as the model itself would see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import PIL.Image
import torch
from jaxtyping import UInt8
from torch import Tensor

from emulus.data.media_dataset import decode_item, to_pixels, whole_codes
from emulus.data.source import Item
from emulus.data.tokens import TokenizedItem
from emulus.errors import EmulusError
from emulus.log import logger, progress
from emulus.media import Clip, pixels_to_clip, pixels_to_image
from emulus.pipeline import Emulus
from emulus.sequence import Image, Video

T = TypeVar("T")

_PIXELS_AT_ONCE = 2**17
"""Pictures are encoded 32 at a time at 64 pixels, one at a time at 512."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An item of a data set at the model's size.

    Attributes:
        item: Where it comes from; its first caption is the one that is shown and used as a prompt.
        frames: Its pixels, one frame for a picture.
        media: Its codes.
    """

    item: Item
    frames: UInt8[Tensor, "t 3 h w"]
    media: Image | Video

    @property
    def caption(self) -> str:
        """The caption to show; of an item that has questions alone, the first answer."""
        return self.item.caption

    @property
    def tokenized(self) -> TokenizedItem:
        """What the decoder is to see of it."""
        return TokenizedItem(id=self.item.id, captions=self.item.captions, media=self.media)

    @property
    def original(self) -> PIL.Image.Image | Clip:
        """The picture or clip that was encoded."""
        pixels = to_pixels(self.frames)
        return pixels_to_clip(pixels, self.media.fps) if isinstance(self.media, Video) else pixels_to_image(pixels[0])


def encode_examples(model: Emulus, items: Iterable[Item], *, what: str = "encoding") -> list[Example]:
    """Bring pictures and clips to the model's size and frame rate and encode them.

    Clips are cut to the model's own length and to whole codes. An item that cannot be read is left out and named.

    Args:
        model: Its defaults give size, frame rate and longest clip.
        items: What to encode.
        what: Name of the progress bar.

    Returns:
        Pictures and clips in the order of the items.

    Raises:
        EmulusError: The model's own size is not square, as data sets are.
    """
    defaults = model.defaults
    if defaults.height != defaults.width:
        raise EmulusError(
            f"a model of {defaults.height}x{defaults.width} pixels cannot be evaluated: data sets are of square "
            "pictures; set height and width alike in its generation_config.json"
        )
    examples: dict[int, Example] = {}
    pictures: list[tuple[int, Item, Tensor]] = []
    at_once = max(_PIXELS_AT_ONCE // defaults.height**2, 1)
    factor = model.vision.config.temporal_factor
    for place, item in enumerate(progress(items, what=what)):
        try:
            frames, fps = decode_item(item, size=defaults.height, fps=defaults.fps, max_frames=defaults.num_frames)
            if item.kind == "video" and len(frames) < factor:
                raise EmulusError(f"its {len(frames)} frames are fewer than the {factor} that make one code")
        except EmulusError as error:
            logger.warning(f"left out {item.id}: {error}")
            continue
        if item.kind == "video":
            frames = whole_codes(frames, factor)
            video = Video(_codes(model, frames[None])[0], fps=fps)
            examples[place] = Example(item=item, frames=frames, media=video)
        else:
            pictures.append((place, item, frames))
            if len(pictures) == at_once:
                examples |= _encode_pictures(model, pictures)
                pictures.clear()
    examples |= _encode_pictures(model, pictures)
    return [example for _, example in sorted(examples.items())]


def _encode_pictures(model: Emulus, pictures: Sequence[tuple[int, Item, Tensor]]) -> dict[int, Example]:
    if not pictures:
        return {}
    codes = _codes(model, torch.cat([frames for _, _, frames in pictures]))
    return {
        place: Example(item=item, frames=frames, media=Image(grid))
        for (place, item, frames), grid in zip(pictures, codes, strict=True)
    }


def _codes(model: Emulus, frames: Tensor) -> Tensor:
    return model.vision.encode(to_pixels(frames.to(model.vision.device))).cpu()
