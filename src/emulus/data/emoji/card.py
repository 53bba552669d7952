"""The two texts that lie beside the emoji data set: the NOTICE of its sources, and its data card."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from emulus.data.emoji.art import BACKGROUNDS, FPS
from emulus.data.emoji.packages import Package
from emulus.data.source import SPLITS, Split

Counts = Mapping[tuple[str, Split], int]
"""Number of items by style and split."""

_STYLE_SOURCES = {
    "3d": "pictures, Fluent Emoji, soft 3-D renders",
    "flat": "pictures, Fluent Emoji, flat drawings",
    "noto": "pictures, Noto Emoji",
    "twemoji": "pictures, Twemoji",
    "anim": f"clips, animated Fluent Emoji, {FPS} frames per second",
}


def notice(packages: Sequence[Package]) -> str:
    """Say where everything in the data set comes from, under which licences, and what was changed.

    Args:
        packages: What it is made of.
    """
    sources = "\n".join(
        f"- {package.name} {package.version}\n"
        f"  from the project {package.upstream}; by {package.authors}\n"
        f"  licence: {package.licence}"
        for package in packages
    )
    return _NOTICE.replace("@SOURCES@", sources)


def card(counts: Counts, *, size: int, variants: str, command: str) -> str:
    """Describe the data set.

    Args:
        counts: What is in it.
        size: Side of its pictures in pixels.
        variants: Which of the skin-tone variants are in it, in words.
        command: What built it.

    Returns:
        Markdown.
    """
    rows = []
    for style, source in _STYLE_SOURCES.items():
        numbers = [counts.get((style, split), 0) for split in SPLITS]
        if any(numbers):
            rows.append(f"| {style} | {source} | {' | '.join(map(str, numbers))} | {sum(numbers)} |")
    totals = [sum(counts.get((style, split), 0) for style in _STYLE_SOURCES) for split in SPLITS]
    rows.append(f"| all | | {' | '.join(map(str, totals))} | {sum(totals)} |")
    begin = _BEGIN.format(size=f"{size}x{size}", variants=variants, command=command)
    return (
        _CARD.replace("@BEGIN@", textwrap.fill(" ".join(begin.split()), 112, break_on_hyphens=False))
        .replace("@ROWS@", "\n".join(rows))
        .replace("@BACKGROUNDS@", textwrap.fill(", ".join(BACKGROUNDS), 100))
    )


_BEGIN = """
Colour emoji of {size} pixels, {variants}, each with several captions and questions. Artists drew them; nothing here is
generated. Built by `{command}`; the same command and versions of its libraries give the same bytes. Sources and
licences are in [NOTICE](NOTICE).
"""

_CARD = """\
# Emoji: pictures and clips with captions and questions

@BEGIN@

| style | what | train | validation | test | all |
|---|---|---|---|---|---|
@ROWS@

The Parquet files, one of pictures and one of clips, have one row per item:

| column | content |
|---|---|
| `id` | style and code points, such as `3d/1f34e` |
| `split` | `train`, `validation` or `test` |
| `kind` | `image` or `video` |
| `media` | lossy WebP; a clip is an animated WebP of 8, 12, 16, 20 or 24 frames |
| `captions` | the canonical English one first, then other wordings, keywords, and two of de, fr, es, zh, ja |
| `questions` | and answers: style, name, group, background; for some how many, skin tone, what moves |
| `label` | the emoji's English name |
| `style`, `group`, `background` | as in the captions; the group is Unicode's |

**Splits.** An emoji's split is a hash of its code points without skin tones, so every style, skin tone
and clip of one emoji is in the same split. Emoji that differ in more than the skin tone are different
emoji here: a woman running may be in `train` and a man running in `test`.

**Backgrounds.** The art is transparent; it lies on a plain colour that is chosen by a hash, or on the
next one on which it can be seen: @BACKGROUNDS@.

**Versions.** `--versions 4` makes three more of each training item: on another background, smaller and
elsewhere in the square, mirrored where that changes no meaning, in other words. `3d/1f34e+2` is a second
version. What is held out always has one.

**Limits.** Captions are made from names and keywords by rules, and say no more than these: an emoji's
name tells what it means, not all that it shows. They are icons, not photographs.
"""

_NOTICE = """\
The pictures, clips and captions in this folder are made from the works below.

@SOURCES@

What was changed: artwork was laid on plain backgrounds, scaled, for clips resampled in time, and encoded
anew as lossy WebP; labels and keywords were worked into captions and questions.

The pictures of style "twemoji" are Copyright Twitter, Inc and other contributors, licensed under the
Creative Commons Attribution 4.0 International licence, https://creativecommons.org/licenses/by/4.0/

The pictures of style "noto" are Copyright Google Inc, licensed under the Apache License, Version 2.0,
https://www.apache.org/licenses/LICENSE-2.0

The pictures of styles "3d" and "flat" and the clips are Copyright (c) Microsoft Corporation; keywords
are Copyright (c) 2017-2019 Miles Johnson. Both are under the MIT License:

  Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
  associated documentation files (the "Software"), to deal in the Software without restriction, including
  without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
  copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to
  the following conditions:

  The above copyright notice and this permission notice shall be included in all copies or substantial
  portions of the Software.

  THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
  LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN
  NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,
  WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
  SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

Labels and keywords derive from the Unicode Common Locale Data Repository, Copyright (c) Unicode, Inc.,
under the Unicode License v3:

  Permission is hereby granted, free of charge, to any person obtaining a copy of data files and any
  associated documentation (the "Data Files") or software and any associated documentation (the
  "Software") to deal in the Data Files or Software without restriction, including without limitation the
  rights to use, copy, modify, merge, publish, distribute, and/or sell copies of the Data Files or
  Software, and to permit persons to whom the Data Files or Software are furnished to do so, provided
  that either (a) this copyright and permission notice appear with all copies of the Data Files or
  Software, or (b) this copyright and permission notice appear in associated Documentation.

  THE DATA FILES AND SOFTWARE ARE PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
  INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
  NONINFRINGEMENT OF THIRD PARTY RIGHTS. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR HOLDERS INCLUDED IN
  THIS NOTICE BE LIABLE FOR ANY CLAIM, OR ANY SPECIAL INDIRECT OR CONSEQUENTIAL DAMAGES, OR ANY DAMAGES
  WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR
  OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF THE DATA FILES OR
  SOFTWARE.

  Except as contained in this notice, the name of a copyright holder shall not be used in advertising or
  otherwise to promote the sale, use or other dealings in these Data Files or Software without prior
  written authorization of the copyright holder.
"""
