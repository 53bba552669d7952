"""Draw the pictures of the README: what a model makes of held-out items, by a rule and not by hand.

    python scripts/showcase.py --out docs/images

The rule: of the validation split, sorted by id, every n-th picture and every n-th clip, so many that they fill a sheet;
the first seeds. What comes out badly is shown as well. The same model draws the same sheets again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import PIL.Image
import PIL.ImageOps
from PIL import ImageDraw, ImageFont

from emulus.commands.shipped import MODEL, shipped
from emulus.data.source import Source, even, open_source
from emulus.evaluate import Example, encode_examples
from emulus.evaluate.asking import Shown
from emulus.evaluate.galleries import GIVEN, MADE
from emulus.loading import load
from emulus.media import Clip
from emulus.media.image import write_content
from emulus.pipeline import Emulus
from emulus.recipes.emoji import DATA

SPLIT = "validation"
SEEDS = (0, 1)
PICTURES, CLIPS = 8, 6
SCALE, CLIP_SCALE = 2, 1.5
"""Sheets have more pixels than they are shown at, for sharp words on every screen; moving ones fewer, to be small."""
QUALITY, CLIP_QUALITY = 74, 45
CELL, GAP, MARGIN = 96, 10, 10
"""Side of a picture, space between two, and space around everything, as shown."""
LETTER, LINE, BETWEEN = 11, 14, 6
"""Height of a letter and of a line, and space between two rows of words."""

Colour = tuple[int, int, int]
INK, FAINT, RIGHT, WRONG, PAPER = (36, 41, 47), (110, 119, 129), (26, 127, 55), (188, 76, 0), (255, 255, 255)
FONT = ImageFont.load_default(SCALE * LETTER)

Line = tuple[str, Colour]
Medium = PIL.Image.Image | Clip


@dataclass(frozen=True, kw_only=True)
class Column:
    """What is shown of one item.

    Attributes:
        media: A picture or clip for each row of pictures.
        words: Under them, lines for each row of words.
        given: How many frames of the first row's clip the model was given, if it continues one.
    """

    media: Sequence[Medium]
    words: Sequence[Sequence[Line]]
    given: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Columns, with names on the left of the rows of pictures and of the rows of words."""

    media: Sequence[str]
    words: Sequence[str] = ("",)
    columns: Sequence[Column]


def main() -> None:
    """Draw all sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; the shipped one by default")
    parser.add_argument("--data", type=Path, help="the data set it was trained on; the shipped one by default")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    model = load(options.model or shipped(MODEL, "--model"))
    source = open_source(options.data or shipped(DATA, "--data"))
    pictures, clips = chosen(model, source, "image", PICTURES), chosen(model, source, "video", CLIPS)
    sheets = {
        "reconstructions": Sheet(media=("original", "from codes"), columns=reconstructed(model, pictures)),
        "drawn": Sheet(
            media=(*(f"seed {seed}" for seed in SEEDS), "background named", "true"), columns=drawn(model, pictures)
        ),
        "animated": Sheet(media=("seed 0", "true"), columns=animated(model, clips)),
        "continued": Sheet(media=("continued", "true"), columns=continued(model, clips)),
        "answers": answered(model, pictures),
    }
    for name, sheet in sheets.items():
        path = options.out / f"{name}.webp"
        write_content(path, encoded(sheet))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def chosen(model: Emulus, source: Source, kind: str, count: int) -> list[Example]:
    """Every n-th held-out item of a kind, by id."""
    items = sorted((item for item in source if item.split == SPLIT and item.kind == kind), key=lambda item: item.id)
    return encode_examples(model, even(items, count))


def reconstructed(model: Emulus, examples: Sequence[Example]) -> list[Column]:
    """Pictures and what their codes keep."""
    return [Column(media=(each.original, model.decode(each.media)), words=caption(each)) for each in examples]


def drawn(model: Emulus, examples: Sequence[Example]) -> list[Column]:
    """Pictures from captions alone, one for each seed and one that is told the background, above the true one."""
    prompts = [example.caption for example in examples]
    made = [model.generate_images(prompts, seed=seed) for seed in SEEDS]
    made.append(model.generate_images([with_background(example) for example in examples], seed=SEEDS[0]))
    columns = zip(examples, *made, strict=True)
    return [Column(media=(*tries, example.original), words=caption(example)) for example, *tries in columns]


def with_background(example: Example) -> str:
    """The caption that names the background, if one does."""
    return next((words for words in example.item.captions if " background" in words), example.caption)


def animated(model: Emulus, examples: Sequence[Example]) -> list[Column]:
    """Clips from captions alone, above the true one."""
    made = model.generate_videos([example.caption for example in examples], seed=SEEDS[0])
    both = zip(made, examples, strict=True)
    return [Column(media=(clip, example.original), words=caption(example)) for clip, example in both]


def continued(model: Emulus, examples: Sequence[Example]) -> list[Column]:
    """Clips of which the model saw the first half and no words."""
    columns = []
    for example in examples:
        clip = example.original
        assert isinstance(clip, Clip), "only clips are chosen for this sheet"
        factor = model.vision.config.temporal_factor
        given = len(clip.frames) // factor // 2 * factor
        if given:
            start = Clip(clip.frames[:given], clip.fps)
            longer = model.continue_video(start, num_frames=len(clip.frames), seed=SEEDS[0])
            columns.append(Column(media=(longer, clip), words=caption(example), given=given))
    return columns


def answered(model: Emulus, examples: Sequence[Example]) -> Sheet:
    """The caption that the model writes, and its answers to whatever the data set asks: green if right, else brown."""
    asked = list(dict.fromkeys(question for each in examples for question, _ in each.item.questions))
    columns = []
    for example in examples:
        true = dict(example.item.questions)
        written = Shown(model, example.media, [None, *true]).write()
        answers = [judged(written[question], [true[question]]) if question in true else [] for question in asked]
        media = (example.original,)
        columns.append(Column(media=media, words=(judged(written[None], example.item.captions), *answers)))
    return Sheet(media=("",), words=("caption", *asked), columns=columns)


def judged(words: str, true: Sequence[str]) -> list[Line]:
    """What the model said, and below it the truth if it is not that."""
    if words in true:
        return [(words, RIGHT)]
    return [(words or "(nothing)", WRONG), (f"true: {true[0]}", FAINT)]


def caption(example: Example) -> list[list[Line]]:
    """An item's first caption."""
    return [[(example.caption, INK)]]


def encoded(sheet: Sheet) -> BytesIO:
    """A sheet as WebP, moving if it is of clips."""
    clips = [medium for column in sheet.columns for medium in column.media if isinstance(medium, Clip)]
    content = BytesIO()
    if not clips:
        painted(sheet).save(content, "WEBP", quality=QUALITY, method=6)
        return content
    first, *others = (
        PIL.ImageOps.scale(painted(sheet, frame=number), CLIP_SCALE / SCALE, PIL.Image.Resampling.LANCZOS)
        for number in range(max(len(clip.frames) for clip in clips))
    )
    length = round(1000 / clips[0].fps)
    first.save(
        content,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=length,
        loop=0,
        quality=CLIP_QUALITY,
        method=6,
        minimize_size=True,
    )
    return content


def painted(sheet: Sheet, frame: int = 0) -> PIL.Image.Image:
    """One picture of all columns, of clips at one of their frames."""
    names = [wrapped([(name, FAINT)]) for name in (*sheet.media, *sheet.words)]
    left = round(max(FONT.getlength(line) for lines in names for line, _ in lines) / SCALE)
    first = MARGIN + left + (GAP if left else 0)
    written = [[wrapped(lines) for lines in column.words] for column in sheet.columns]
    pictures = [MARGIN + row * (CELL + GAP) for row in range(len(sheet.media) + 1)]
    words = [pictures.pop()]
    for row, name in enumerate(names[len(sheet.media) :]):
        most = max(len(name), *(len(blocks[row]) for blocks in written))
        words.append(words[-1] + most * LINE + BETWEEN)
    size = (first + len(sheet.columns) * (CELL + GAP) - GAP + MARGIN, words.pop() - BETWEEN + MARGIN)
    paper = PIL.Image.new("RGB", (SCALE * size[0], SCALE * size[1]), PAPER)
    pen = ImageDraw.Draw(paper)
    for y, lines in zip((*pictures, *words), names, strict=True):
        write(pen, MARGIN, y, lines)
    for number, (column, blocks) in enumerate(zip(sheet.columns, written, strict=True)):
        x = first + number * (CELL + GAP)
        for y, medium in zip(pictures, column.media, strict=True):
            paper.paste(cell(medium, frame), (SCALE * x, SCALE * y))
        if column.given is not None:
            bar = (SCALE * x, SCALE * (MARGIN + CELL + 2), SCALE * (x + CELL) - 1, SCALE * (MARGIN + CELL + 5))
            pen.rectangle(bar, fill=GIVEN if frame < column.given else MADE)
        for y, lines in zip(words, blocks, strict=True):
            write(pen, x, y, lines)
    return paper


def cell(medium: Medium, frame: int) -> PIL.Image.Image:
    """A picture, or a clip's frame (its last one when it is over), at the size of a cell."""
    picture = medium.frames[min(frame, len(medium.frames) - 1)] if isinstance(medium, Clip) else medium
    return picture.resize((SCALE * CELL, SCALE * CELL), PIL.Image.Resampling.BICUBIC)


def wrapped(lines: Sequence[Line]) -> list[Line]:
    """Lines that are not wider than a picture."""
    parts: list[Line] = []
    for words, colour in lines:
        part = ""
        for word in words.split():
            longer = f"{part} {word}".strip()
            if part and FONT.getlength(longer) > SCALE * CELL:
                parts.append((part, colour))
                longer = word
            part = longer
        parts.append((part, colour))
    return parts


def write(pen: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[Line]) -> None:
    """Lines below one another."""
    for place, (words, colour) in enumerate(lines):
        pen.text((SCALE * x, SCALE * (y + place * LINE)), words, fill=colour, font=FONT)


if __name__ == "__main__":
    main()
