"""Whole pictures and captions in bits: what the decoder would need to store them, beside files of the same.

A model that gives something the probability p can store it in -log2 p bits (and a fraction of a bit for all of it
together), so its bits can be compared with the sizes of files.
"""

from __future__ import annotations

import lzma
import math
import statistics
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import PIL.Image

from emulus.data.source import even
from emulus.data.tokens import TokenizedItem
from emulus.evaluate.held_out import Example
from emulus.evaluate.likelihood import BitsPerId, Likelihood, with_captions
from emulus.evaluate.reconstruction import paint
from emulus.log import progress
from emulus.media import image_to_pixels, pixels_to_image, read_image, resize
from emulus.sequence import Image
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.metrics import psnr

_SHRINKS = (1, 2, 4)
_WEBP_QUALITIES = (0, 100)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Bits of one picture's codes, or of one caption, on average over held-out ones.

    Attributes:
        count: How many pictures or captions.
        ids: Of each, on average.
        model: The decoder's, where they come first: it knows nothing of them.
        model_given: The decoder's for a picture whose caption it has read, or a caption whose picture it has seen.
        unigram: Of counts of training ids (see :class:`~emulus.evaluate.likelihood.BitsPerId`), where they come first.
        bigram: Of counts of pairs, likewise.
        plain: Stored as they are: each code in as many bits as tell one from all, text as UTF-8.
        gzip: All of them in one file: codes as 16-bit numbers, captions as lines of text (zlib's format, level 9).
        xz_told: By how much the training items' file grows when these are put behind it, both packed with xz
            (level 6, extreme): an estimate of the bits of a compressor that knows the training data as the decoder
            does.
    """

    count: int
    ids: float
    model: float
    model_given: float
    unigram: float
    bigram: float
    plain: float
    gzip: float
    xz_told: float


@dataclass(frozen=True, kw_only=True)
class FileSizes:
    """Bits of a picture's pixels in a WebP file, headers included, on average.

    Attributes:
        count: How many pictures.
        psnr: Of the pictures that the vision tokenizer paints from their codes, in dB.
        as_good: The smallest lossy file of at least the same PSNR, picture by picture; it may hold the picture smaller.
        lossless: The file of the very pixels.
    """

    count: int
    psnr: float
    as_good: float
    lossless: float


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the decoder's bits can be compared with.

    Attributes:
        pictures: ``None`` without pictures in both orders.
        captions: Of these pictures.
        files: ``None`` without pictures.
    """

    pictures: Bound | None
    captions: Bound | None
    files: FileSizes | None


def bounds(
    vision: VisionTokenizer,
    examples: Sequence[Example],
    training: Sequence[TokenizedItem],
    found: Likelihood,
    *,
    files: int = 0,
) -> Bounds:
    """Compare bits.

    Args:
        vision: The tokenizer that made the codes.
        examples: Held-out items, the same that were scored.
        training: What the counting models counted.
        found: The decoder's and the counting models' bits of these examples.
        files: Of how many pictures WebP files are made, a tenth of a second each; 0 takes all.
    """
    pictures = [example for example in examples if isinstance(example.media, Image)]
    # Captions are taken in turn over all items, as they were when they were scored.
    pairs = [pair for pair in with_captions(example.tokenized for example in examples) if _is_picture(pair[0])]
    known = [item for item in training if _is_picture(item)]
    code_bits = math.log2(vision.config.codebook_size)
    codes = [_as_bytes(item) for item, _ in pairs]
    captions = [f"{caption}\n".encode() for _, caption in pairs]
    return Bounds(
        pictures=_bound(
            found,
            ("visual", "caption last", "caption first"),
            codes,
            [_as_bytes(item) for item in known],
            plain=code_bits / 16,
        ),
        captions=_bound(
            found,
            ("text", "caption first", "caption last"),
            captions,
            [f"{caption}\n".encode() for item in known for caption in item.captions],
            plain=1.0,
        ),
        files=_file_sizes(vision, even(pictures, files or len(pictures))),
    )


def _bound(
    found: Likelihood, names: tuple[str, str, str], pieces: Sequence[bytes], known: Sequence[bytes], *, plain: float
) -> Bound | None:
    modality, alone, given = names
    bits = {part.order: part.bits for part in found.parts if (part.modality, part.kind) == (modality, "picture")}
    if not pieces or not {alone, given} <= bits.keys():
        return None
    count, first, whole = len(pieces), bits[alone], b"".join(pieces)

    def each(part: BitsPerId, mean: float) -> float:
        return mean * part.ids / count

    return Bound(
        count=count,
        ids=first.ids / count,
        model=each(first, first.model),
        model_given=each(bits[given], bits[given].model),
        unigram=each(first, first.unigram),
        bigram=each(first, first.bigram),
        plain=8 * len(whole) * plain / count,
        gzip=8 * len(zlib.compress(whole, 9)) / count,
        xz_told=8 * (_xz(b"".join([*known, whole])) - _xz(b"".join(known))) / count,
    )


def _is_picture(item: TokenizedItem) -> bool:
    return isinstance(item.media, Image)


def _as_bytes(item: TokenizedItem) -> bytes:
    return item.media.codes.numpy().astype("<u2").tobytes()


def _xz(content: bytes) -> int:
    return len(lzma.compress(content, preset=6 | lzma.PRESET_EXTREME))


def _file_sizes(vision: VisionTokenizer, examples: Sequence[Example]) -> FileSizes | None:
    if not examples:
        return None
    goals, lossy, lossless = [], [], []
    for example in progress(examples, what="WebP files of equal PSNR"):
        picture = example.original
        assert isinstance(picture, PIL.Image.Image), "clips are left out"
        goal = _psnr(pixels_to_image(paint(vision, example)[0].clamp(-1, 1)), picture)
        exact = len(_webp(picture, lossless=True))
        goals.append(goal)
        lossless.append(exact)
        lossy.append(min([exact, *_sizes_as_good(picture, goal)]))
    return FileSizes(
        count=len(examples),
        psnr=statistics.fmean(goals),
        as_good=8 * statistics.fmean(lossy),
        lossless=8 * statistics.fmean(lossless),
    )


def _sizes_as_good(picture: PIL.Image.Image, goal: float) -> Iterator[int]:
    """Sizes of the smallest files of at least this PSNR, for each size at which a picture may be stored."""
    for shrink in _SHRINKS:
        small = resize(picture, max(picture.height // shrink, 1), max(picture.width // shrink, 1))
        low, high = _WEBP_QUALITIES
        if _psnr(_shown(_webp(small, quality=high), picture), picture) < goal:
            continue
        while low < high:
            middle = (low + high) // 2
            if _psnr(_shown(_webp(small, quality=middle), picture), picture) >= goal:
                high = middle
            else:
                low = middle + 1
        yield len(_webp(small, quality=high))


def _webp(picture: PIL.Image.Image, *, quality: int = 100, lossless: bool = False) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "WEBP", quality=quality, lossless=lossless, method=6)
    return buffer.getvalue()


def _shown(file: bytes, picture: PIL.Image.Image) -> PIL.Image.Image:
    return resize(read_image(file), picture.height, picture.width)


def _psnr(shown: PIL.Image.Image, picture: PIL.Image.Image) -> float:
    return float(psnr(*(image_to_pixels(each)[None] for each in (shown, picture))))
