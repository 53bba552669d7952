"""``emulus tokenize`` beside the bare encoder: what decoding, batching and writing cost on top of it.

``python -m benchmarks.tokenize --json``: the bare encoder gets the same pictures as ready tensors in the same batches;
ours is the whole call, from files to a finished tokens folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from benchmarks.harness import Case, Options, case, interleave_measured, main, require
from emulus.bundle import Bundle, save_bundle
from emulus.data.media_dataset import decode_item, to_pixels, whole_codes
from emulus.data.source import Item, Kind, even, open_source
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import Tokens
from emulus.lazy import later
from emulus.model import Decoder, sized
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa = later("pyarrow")
    pq = later("pyarrow.parquet")

HOME = Path(__file__).parents[1]
SETTINGS = {
    "pictures": (1024, "pictures that are encoded; clips are a sixteenth of that"),
    "batch": (32, "pictures, or frames of clips, in a batch"),
}
TOY = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64)


def square(kind: Kind, options: Options) -> Case:
    """Emoji, or moving emoji, at 64 pixels by the committed vision tokenizer."""
    count = options.settings["pictures"] // (16 if kind == "video" else 1)
    items = even(open_source(HOME / "data/emoji").select(split="train", kind=kind), 2 if options.toy else count)
    return _compare("clips" if kind == "video" else "pictures", items, options, size=64, max_frames=16)


def aspect(options: Options) -> Case:
    """Emoji stretched to sizes of many aspects, each of which is kept: batches of many sizes."""
    source = open_source(HOME / "data/emoji").select(split="train", kind="image")
    items = even(source, 4 if options.toy else options.settings["pictures"])
    return _compare("pictures-of-many-sizes", items, options, stretch=True, area=64 * 64)


def _compare(
    name: str, items: list[Item], options: Options, *, stretch: bool = False, size: int = 64, area: int = 0,
    max_frames: int = 0,
) -> Case:  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = _model(folder) if options.toy else HOME / "checkpoints/emoji"
        _write(items, folder / "data.parquet", stretch=stretch)
        config = TokenizeConfig(
            sources=(folder / "data.parquet",),
            vocabulary=str(model),
            out=folder / "tokens",
            size=size,
            area=area,
            max_frames=max_frames,
            batch=options.settings["batch"],
            readers=max(options.threads, 1),
            device="cpu",
        )
        vision = load_vision_tokenizer(model)
        batches = _batches(config, vision)
        _check(config, [codes for batch in batches for codes in vision.encode(batch)])
        walls: dict[str, list[float]] = {"bare": [], "ours": []}

        def bare() -> None:
            for batch in batches:
                vision.encode(batch)

        def ours() -> None:
            tokenize(config)

        def measured(which: str, way: Callable[[], None]) -> float:
            shutil.rmtree(config.out, ignore_errors=True)
            read = time.process_time if options.clock == "cpu" else time.perf_counter
            start, wall = read(), time.perf_counter()
            way()
            walls[which].append(time.perf_counter() - wall)
            return max(read() - start, 1e-9)

        timings = interleave_measured(
            partial(measured, "bare", bare), partial(measured, "ours", ours), pairs=options.pairs
        )
        seconds = {which: sorted(found)[len(found) // 2] for which, found in walls.items()}
        return case(
            name,
            timings,
            options,
            items=len(items),
            batch=config.batch,
            batches=len(batches),
            sizes=len({tuple(batch.shape[1:]) for batch in batches}),
            items_per_s_bare=round(len(items) / sorted(timings.baseline)[len(walls["bare"]) // 2], 1),
            items_per_s_ours=round(len(items) / sorted(timings.ours)[len(walls["ours"]) // 2], 1),
            wall_s_bare=round(seconds["bare"], 4),
            wall_s_ours=round(seconds["ours"], 4),
        )


def _batches(config: TokenizeConfig, vision: VisionTokenizer) -> list[Tensor]:
    """What the encoder is given, ready: as many of one size as make a batch, and at last what is left of each."""
    waiting: dict[tuple[int, ...], list[Tensor]] = {}
    batches = []
    for item in open_source(config.sources[0]):
        frames, _ = decode_item(
            item, size=config.size, area=config.area, factor=vision.config.spatial_factor,
            max_frames=config.max_frames or None,
        )  # fmt: skip
        is_clip = item.kind == "video"
        frames = whole_codes(frames, vision.config.temporal_factor) if is_clip else frames[0]
        same = waiting.setdefault(tuple(frames.shape), [])
        same.append(frames)
        if len(same) * (len(frames) if is_clip else 1) >= config.batch:
            batches.append(to_pixels(torch.stack(same)))
            same.clear()
    return [*batches, *(to_pixels(torch.stack(same)) for same in waiting.values() if same)]


def _check(config: TokenizeConfig, expected: list[Tensor]) -> None:
    """The shards hold the bare encoder's codes: the same grids, whatever their order."""
    found = [item.media.codes for item in Tokens.open(tokenize(config)).items("train")]
    grids = [sorted((tuple(grid.shape), grid.flatten().tolist()) for grid in each) for each in (found, expected)]
    require(grids[0] == grids[1], "the shards do not hold the codes that the bare encoder gives")


def _write(items: list[Item], path: Path, *, stretch: bool) -> None:
    """The items in a file of their own."""
    draw = np.random.default_rng(0)
    rows = []
    for item in items:
        media = item.media
        assert isinstance(media, bytes)
        if stretch:
            media = _stretched(media, *(int(side) for side in draw.integers(5, 13, size=2) * 8))
        rows.append({"id": item.id, "kind": item.kind, "media": media, "caption": item.captions[0], "split": "train"})
    pq.write_table(pa.Table.from_pylist(rows), path)


def _stretched(media: bytes, width: int, height: int) -> bytes:
    content = BytesIO()
    PIL.Image.open(BytesIO(media)).convert("RGB").resize((width, height)).save(content, "PNG")
    return content.getvalue()


def _model(folder: Path) -> Path:
    """A whole model of random weights, small."""
    torch.manual_seed(0)
    vision = VisionTokenizer(TOY).eval()
    vision.quantize.embedding.weight.data.normal_()
    text = TextTokenizer.train(["a red apple"], size=300)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=TOY.codebook_size)
    decoder = Decoder(sized("tiny", vocab_size=vocabulary.size, pad_token_id=vocabulary.pad)).eval()
    save_bundle(Bundle(decoder=decoder, vision=vision, text=text, vocabulary=vocabulary), folder / "model")
    return folder / "model"


CASES: dict[str, Callable[[Options], Case]] = {
    "pictures": partial(square, "image"),
    "pictures-of-many-sizes": aspect,
    "clips": partial(square, "video"),
}

if __name__ == "__main__":
    sys.exit(main(CASES, settings=SETTINGS))
