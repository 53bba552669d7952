"""picture -> the most alike training picture, as the vision tokenizer sees them: what needs no decoder at all.

Its caption and its answers are what the decoder's have to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emulus.data.tokens import TokenizedItem
from emulus.sequence import Image, Video
from emulus.tokenizer.vision import VisionTokenizer

_AT_ONCE = 256


def nearest(
    vision: VisionTokenizer, shown: Sequence[TokenizedItem], training: Sequence[TokenizedItem]
) -> list[TokenizedItem | None]:
    """For each picture or clip the training item that is most alike.

    What is compared are the codebook's vectors of all cells, end to end, less their mean over the training items, by
    the angle between them. Of a clip that is the mean over its frames; clips are compared with clips.

    Args:
        vision: The tokenizer that made the codes.
        shown: What to look for.
        training: Where to look; of two that are equally near the first counts.

    Returns:
        An item of ``training`` each; None where it has none of that kind and size.
    """
    found: list[TokenizedItem | None] = [None] * len(shown)
    codebook = vision.quantize.embedding.weight.detach().float().cpu()
    for kind in {_kind(item) for item in shown}:
        places = [place for place, item in enumerate(shown) if _kind(item) == kind]
        known = [item for item in training if _kind(item) == kind]
        if not known:
            continue
        features = _features(codebook, known)
        mean = features.mean(0)
        features = F.normalize(features - mean, dim=1)
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            asked = F.normalize(_features(codebook, [shown[place] for place in some]) - mean, dim=1)
            for place, best in zip(some, (asked @ features.T).argmax(1).tolist(), strict=True):
                found[place] = known[best]
    return found


def _kind(item: TokenizedItem) -> tuple[type[Image | Video], int, int]:
    *_, h, w = item.media.codes.shape
    return type(item.media), h, w


def _features(codebook: Float[Tensor, "k d"], items: Sequence[TokenizedItem]) -> Float[Tensor, "n cells"]:
    return torch.stack([_feature(codebook, item) for item in items])


def _feature(codebook: Float[Tensor, "k d"], item: TokenizedItem) -> Float[Tensor, " cells"]:
    vectors = codebook[item.media.codes]
    return (vectors.mean(0) if isinstance(item.media, Video) else vectors).flatten()
