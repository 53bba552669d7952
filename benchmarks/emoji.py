"""A small tokens folder made of the first items of data/emoji, by a tokenizer that nobody trained.

Its ids mean nothing, but documents are as long and as different as real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.lazy import later
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import save_vision_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
else:
    pa = later("pyarrow")
    pc = later("pyarrow.compute")
    pq = later("pyarrow.parquet")

DATA = Path(__file__).parents[1] / "data/emoji"
VISION = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64)


def small_tokens(out: Path, *, pictures: int = 48, clips: int = 6, size: int = 32) -> Path:
    """Make the folder; the same bytes every time.

    Args:
        out: Where it goes: ``data``, ``vision`` and ``tokens`` in it.
        pictures: Training pictures; a quarter as many are held out.
        clips: Training clips of 8 frames, likewise.
        size: Side in pixels.

    Returns:
        The tokens folder.
    """
    (out / "data").mkdir(parents=True)
    for name, count in (("pictures", pictures), ("clips", clips)):
        table = pq.read_table(DATA / f"{name}.parquet")
        kept = [_first(table, "train", count), _first(table, "validation", max(count // 4, 2))]
        pq.write_table(pa.concat_tables(kept), out / "data" / f"{name}.parquet")
    torch.manual_seed(0)
    vision = VisionTokenizer(VISION).eval()
    # As far apart as its latents are, so that many codes are used.
    vision.quantize.embedding.weight.data.normal_(0, 0.1)
    save_vision_tokenizer(vision, out / "vision")
    return tokenize(
        TokenizeConfig(
            sources=(out / "data",),
            vision=out / "vision",
            out=out / "tokens",
            size=size,
            max_frames=8,
            views=1,
            text_size=400,
            device="cpu",
        )
    )


def _first(table: pa.Table, split: str, count: int) -> pa.Table:
    return table.filter(pc.field("split") == split).slice(0, count)
