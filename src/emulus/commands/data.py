"""Building data sets."""

from __future__ import annotations

from collections.abc import Sequence

from emulus.config import from_flags
from emulus.errors import EmulusError, did_you_mean
from emulus.log import logger

BUILDERS = ("emoji",)


def data(arguments: Sequence[str]) -> None:
    """``emulus data emoji [--size N] [--packages DIR] [--out DIR]``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: emulus data emoji [options]\n\nemulus data emoji --help explains the options.")
        return
    if arguments[0] not in BUILDERS:
        raise EmulusError(f"there is no data set {arguments[0]!r}{did_you_mean(arguments[0], BUILDERS)}")
    from emulus.commands.out import check_out
    from emulus.data.emoji import EmojiConfig, build_emoji

    config = from_flags(EmojiConfig(), arguments[1:], program="emulus data emoji")
    check_out(config.out, "folder")
    build_emoji(config, report=logger.info)
    print(config.out)
