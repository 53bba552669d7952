"""The versions of an item: other backgrounds, other places in the square, mirrored where the meaning allows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from emulus.data.emoji import art
from emulus.data.emoji.names import Emoji

_LEAST_SCALE = 0.7
_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Version:
    """How artwork is laid into its square.

    Attributes:
        number: From 1 on; the first is the art as it is.
        background: Name of the background's colour.
        scale: Side of the art by the side of the square.
        across: Where it lies: 0 is at the left edge, 1 at the right.
        down: Likewise from the top.
        mirrored: Whether left and right are exchanged.
    """

    number: int
    background: str
    scale: float = 1.0
    across: float = 0.5
    down: float = 0.5
    mirrored: bool = False

    def show(self, drawing: Image.Image, size: int) -> Image.Image:
        """Lay RGBA art on the background: ``size`` x ``size`` RGB."""
        return art.composite(
            art.placed(drawing, scale=self.scale, across=self.across, down=self.down, mirrored=self.mirrored),
            self.background,
            size,
        )


def versions_of(emoji: Emoji, style: str, drawing: Image.Image, count: int) -> Iterator[Version]:
    """The versions of one picture, or of a clip of which one frame is given.

    Args:
        emoji: Whose picture.
        style: Its style.
        drawing: RGBA art, for which backgrounds are chosen.
        count: How many; each has another background while there are others on which the art can be seen.

    Yields:
        The versions, which depend on the code point, the style and their number alone.
    """
    backgrounds = art.visible_backgrounds(drawing, number_from("background", emoji.codepoint, style))
    for number in range(1, count + 1):
        background = backgrounds[(number - 1) % len(backgrounds)]
        if number == 1:
            yield Version(number=number, background=background)
            continue
        drawn = number_from("place", emoji.codepoint, style, str(number))
        shares = [drawn // _STEPS**place % _STEPS / (_STEPS - 1) for place in range(4)]
        yield Version(
            number=number,
            background=background,
            scale=_LEAST_SCALE + (1 - _LEAST_SCALE) * shares[0],
            across=shares[1],
            down=shares[2],
            mirrored=shares[3] < 0.5 and may_be_mirrored(emoji),
        )


def number_from(*parts: str) -> int:
    """A number that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8])


def may_be_mirrored(emoji: Emoji) -> bool:
    """Whether the mirrored picture still shows what the label says.

    What may hold letters or digits, points somewhere, tells a time or a phase, or is a hand does not.
    """
    if emoji.group in _FIXED_GROUPS or _FIXED_WORDS.search(emoji.label):
        return False
    return emoji.group != "people & body" or bool(_WHOLE_PEOPLE.search(emoji.label))


_FIXED_GROUPS = frozenset({"symbols", "flags"})
_WHOLE_PEOPLE = re.compile(r"^(baby|child|boy|girl|old|older|person|people|man|men|woman|women|family)\b")
_FIXED_WORDS = re.compile(
    r"left|right|arrow|point|clock|thirty|watch|moon|quarter|increasing|decreasing|chart|globe|map|compass"
    r"|walking|kneeling|running|cane|wheelchair|facing|\bhands?\b|salut|fist|gestur|raising"
    r"|sign|button|symbol|letter|latin|number|calendar|newspaper|page|bookmark|book|ledger|scroll|memo|placard|ticket"
    r"|card|badge|label|mail|banknote|money|coin|dollar|yen|receipt|medal|trophy|8 ball|die|mahjong|joker|slot"
    r"|hundred|points|ZZZ|sleep|SOS|speech|bubble|balloon|musical|note|hotel|hospital|bank|store|post|Japanese|school"
    r"|taxi|police|ambulance|bus|engine|racing|motorway|Liberty|mosque|temple|cinema|dvd|disk|keyboard|phone|pager|fax"
    r"|television|radio|clipboard|calculator|abacus|ruler|thermometer|game|chequered|suit|construction|stop|fuel|oil"
    r"|t-shirt|no |non-|100",
    re.IGNORECASE,
)
