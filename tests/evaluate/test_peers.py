"""The nearest training picture is the one that is most alike."""

from __future__ import annotations

import torch

from emulus.data.tokens import TokenizedItem
from emulus.evaluate.peers import nearest
from emulus.pipeline import Emulus
from emulus.sequence import Image, Video


def item(id: str, codes: torch.Tensor) -> TokenizedItem:
    media = Image(codes) if codes.dim() == 2 else Video(codes, fps=8.0)
    return TokenizedItem(id=id, captions=(id,), media=media)


def test_nearest_is_itself_and_survives_a_little_noise(model: Emulus) -> None:
    draw = torch.Generator().manual_seed(0)
    known = [item(f"p{n}", torch.randint(64, (8, 8), generator=draw)) for n in range(20)]
    known += [item(f"c{n}", torch.randint(64, (2, 8, 8), generator=draw)) for n in range(3)]
    shown = []
    for each in known:
        codes = each.media.codes.clone()
        codes[..., 0, :4] = 7
        shown.append(item(each.id, codes))
    found = nearest(model.vision, shown, known)
    assert [peer and peer.id for peer in found] == [each.id for each in known]


def test_there_may_be_none(model: Emulus) -> None:
    picture, clip = item("p", torch.zeros(8, 8, dtype=torch.long)), item("c", torch.zeros(2, 8, 8, dtype=torch.long))
    assert nearest(model.vision, [picture], [clip]) == [None]
    assert nearest(model.vision, [picture], []) == [None]
    assert nearest(model.vision, [], [picture]) == []
