"""What the model makes of held-out names, pictures and clips, for looking at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
from PIL import ImageDraw

from emulus.data.source import even
from emulus.evaluate.held_out import Example
from emulus.evaluate.report import Gallery, Section, Shot, Tile
from emulus.log import logger
from emulus.media import Clip
from emulus.pipeline import Emulus
from emulus.sequence import Image, Video

GIVEN, MADE = (150, 156, 162), (226, 106, 32)
"""Colours of the bar under a frame that the model was given, and under one that it made."""


@dataclass(frozen=True, kw_only=True)
class GalleryCounts:
    """How much of each kind to show; 0 leaves a kind out.

    Attributes:
        reconstructions: Pictures beside their reconstructions.
        reconstructed_clips: Clips beside theirs.
        pictures: Pictures drawn from names.
        clips: Clips drawn from names.
        continuations: Clips continued from their first half.
        captions: Captions written, three quarters of them for pictures.
    """

    reconstructions: int = 12
    reconstructed_clips: int = 4
    pictures: int = 8
    clips: int = 4
    continuations: int = 4
    captions: int = 8


def galleries(
    model: Emulus, examples: Sequence[Example], counts: GalleryCounts | None = None, *, seed: int = 0
) -> tuple[Section, ...]:
    """Let the model reconstruct, draw, animate, continue and describe held-out items.

    Args:
        model: A whole model.
        examples: Held-out items; of each kind an even spread is taken, nothing is picked by hand.
        counts: How many of each.
        seed: Of everything drawn.

    Returns:
        A section per kind of which there is something to show.
    """
    counts = counts or GalleryCounts()
    pictures = [example for example in examples if isinstance(example.media, Image)]
    clips = [example for example in examples if isinstance(example.media, Video)]
    sections = [
        reconstructions(model, [*even(pictures, counts.reconstructions), *even(clips, counts.reconstructed_clips)]),
        drawn_pictures(model, even(pictures, counts.pictures), seed=seed),
        drawn_clips(model, even(clips, counts.clips), seed=seed),
        continued_clips(model, even(clips, counts.continuations), seed=seed),
        written_captions(
            model, [*even(pictures, counts.captions - counts.captions // 4), *even(clips, counts.captions // 4)]
        ),
    ]
    return tuple(section for section in sections if section is not None)


def reconstructions(model: Emulus, examples: Sequence[Example]) -> Section | None:
    """Originals beside what the vision tokenizer makes of their codes."""
    if not examples:
        return None
    logger.info(f"reconstructing {len(examples)} pictures and clips")
    tiles = [
        Tile(
            shots=(
                Shot(media=example.original, label="original"),
                Shot(media=model.decode(example.media), label="from its codes"),
            ),
            text=example.caption,
        )
        for example in examples
    ]
    return _section(
        "Reconstructions",
        "Held-out pictures and clips, and what the vision tokenizer paints from their codes alone. No generated "
        "picture can be better than these.",
        tiles,
    )


def drawn_pictures(model: Emulus, examples: Sequence[Example], *, seed: int = 0) -> Section | None:
    """Pictures drawn from the captions of held-out pictures."""
    if not examples:
        return None
    logger.info(f"drawing {len(examples)} pictures")
    drawn = model.generate_images([example.caption for example in examples], seed=seed)
    several = model.defaults.best_of
    tries = "One try each" if several == 1 else f"Of {several} tries each the one that the model kept"
    return _section(
        "Pictures drawn from names",
        "The words under a picture are all that the model was given. The true picture, which it never saw, stands "
        f"beside it. {tries}, seed {seed}.",
        [_beside_truth(media, example) for media, example in zip(drawn, examples, strict=True)],
    )


def drawn_clips(model: Emulus, examples: Sequence[Example], *, seed: int = 0) -> Section | None:
    """Clips drawn from the captions of held-out clips."""
    if not examples:
        return None
    logger.info(f"animating {len(examples)} clips")
    drawn = model.generate_videos([example.caption for example in examples], seed=seed)
    return _section(
        "Clips drawn from names",
        "The words under a clip are all that the model was given. The true clip, which it never saw, stands beside it. "
        f"One try each, seed {seed}.",
        [_beside_truth(media, example) for media, example in zip(drawn, examples, strict=True)],
    )


def continued_clips(model: Emulus, examples: Sequence[Example], *, seed: int = 0) -> Section | None:
    """Clips of which the model sees the first half and no words."""
    factor = model.vision.config.temporal_factor
    tiles = []
    for example in examples:
        clip, total = example.original, len(example.media.codes)
        if not isinstance(clip, Clip) or total < 2:
            continue
        logger.info(f"continuing {example.item.id}")
        given = total // 2 * factor
        continued = model.continue_video(Clip(clip.frames[:given], clip.fps), num_frames=total * factor, seed=seed)
        tiles.append(
            Tile(
                shots=(Shot(media=marked(continued, given), label="continued"), Shot(media=clip, label="original")),
                text=example.caption,
                note=f"{given} frames given, {total * factor - given} made",
            )
        )
    return _section(
        "Clips continued from their first half",
        "The model was given the first half of a held-out clip and no words. The bar under the frames is grey where "
        f"they were given and orange where the model goes on by itself. One try each, seed {seed}.",
        tiles,
    )


def written_captions(model: Emulus, examples: Sequence[Example]) -> Section | None:
    """Captions that the model writes for held-out pictures and clips."""
    if not examples:
        return None
    logger.info(f"describing {len(examples)} pictures and clips")
    written = model.describe_all([example.original for example in examples])
    return _section(
        "Captions written",
        "Held-out pictures and clips, what the model wrote about them (its likeliest words), and their true caption.",
        [
            Tile(shots=(Shot(media=example.original),), text=text or "(nothing)", note=f"true: {example.caption}")
            for text, example in zip(written, examples, strict=True)
        ],
    )


def marked(clip: Clip, given: int) -> Clip:
    """A clip with a bar under every frame: grey under the first ``given``, orange under the others."""
    frames = []
    for place, frame in enumerate(clip.frames):
        bar = max(frame.height // 16, 2)
        taller = PIL.Image.new("RGB", (frame.width, frame.height + bar), GIVEN if place < given else MADE)
        taller.paste(frame)
        # A thin gap tells the bar from the picture.
        ImageDraw.Draw(taller).line([(0, frame.height), (frame.width, frame.height)], fill=(255, 255, 255))
        frames.append(taller)
    return Clip(tuple(frames), clip.fps)


def _beside_truth(media: PIL.Image.Image | Clip, example: Example) -> Tile:
    shots = (Shot(media=media, label="drawn"), Shot(media=example.original, label="true", small=True))
    return Tile(shots=shots, text=example.caption)


def _section(title: str, text: str, tiles: Sequence[Tile]) -> Section | None:
    return Section(title=title, text=text, blocks=(Gallery(tiles=tuple(tiles)),)) if tiles else None
