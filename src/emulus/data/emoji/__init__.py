"""public emoji artwork -> the emoji data set.

``packages`` fetches and reads the packages, ``names`` knows the emoji and their splits, ``art`` makes small
pictures and clips, ``versions`` varies them, ``captions`` and ``questions`` find the words, ``card`` writes the
texts beside the data, and ``build`` puts them together.
"""

from emulus.data.emoji.build import EmojiConfig, build_emoji
from emulus.data.emoji.names import base_of, split_of

__all__ = ["EmojiConfig", "base_of", "build_emoji", "split_of"]
