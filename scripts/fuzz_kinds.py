"""What the fuzzer reads: for each kind of file small real samples, and the way Emulus reads them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import emulus
from emulus.bundle import Bundle, save_bundle
from emulus.commands.info import info
from emulus.config import merge, read_yaml, write_yaml
from emulus.data.loader import Loader, ReadingConfig
from emulus.data.mixture import Mixture
from emulus.data.source import open_source
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import Tokens
from emulus.errors import EmulusError
from emulus.evaluate.report import write_report
from emulus.evaluate.run_report import run_report
from emulus.layouts import Layout, convert
from emulus.media import Clip, read_image, read_media, write_video
from emulus.model import Decoder, sized
from emulus.presets import GenerationDefaults
from emulus.recipes import RECIPES, recipe
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.train.config import TrainConfig
from emulus.train.pretrain import PretrainConfig, pretrain

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 230)}


@dataclass(frozen=True)
class Kind:
    """One kind of thing that is read.

    Attributes:
        name: Its name.
        make: Fills a folder with samples, each a folder.
        read: Reads a damaged sample, given its folder and the damaged file's name; gives what was read, and errors that
            concern single items.
        takes: Which of a sample's files are damaged.
        share: Inputs of this kind for each of the slowest kind.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path, str], Iterable[object]]
    takes: Callable[[str], bool] = lambda name: True
    share: int = 1


# Images and clips.


def _picture(number: int = 0, size: tuple[int, int] = (24, 16)) -> PIL.Image.Image:
    image = PIL.Image.new("RGB", size, "white")
    image.paste(list(COLOURS.values())[number % 3], (number % 5, 2, number % 5 + 9, 12))
    return image


def _encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def make_images(folder: Path) -> None:
    """One image of each readable format and of the rarer modes."""
    image = _picture()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    samples = {
        "a.png": _encoded(image, "PNG"),
        "palette.png": _encoded(image.quantize(8), "PNG", transparency=0),
        "deep.png": _encoded(PIL.Image.new("I;16", (9, 7), 999), "PNG"),
        "turned.jpg": _encoded(image, "JPEG", exif=exif),
        "cmyk.jpg": _encoded(image.convert("CMYK"), "JPEG"),
        "a.webp": _encoded(image, "WEBP"),
        "a.gif": _encoded(image, "GIF"),
        "a.bmp": _encoded(image, "BMP"),
        "a.tif": _encoded(image, "TIFF", compression="tiff_lzw"),
        "a.avif": _encoded(image, "AVIF"),
        "a.jp2": _encoded(image, "JPEG2000"),
        "a.ppm": _encoded(image, "PPM"),
    }
    for number, (name, content) in enumerate(samples.items()):
        (folder / str(number)).mkdir()
        (folder / str(number) / name).write_bytes(content)


def read_images(folder: Path, name: str) -> Iterator[object]:
    """The image."""
    yield read_image(folder / name)


def make_clips(folder: Path) -> None:
    """Short clips in every container that can be written here."""
    frames = tuple(_picture(number) for number in range(5))
    for number, name in enumerate(("a.mp4", "a.webm", "a.webp", "a.gif")):
        (folder / str(number)).mkdir()
        write_video(Clip(frames, 8.0), folder / str(number) / name)
    first, *rest = frames
    (folder / "4").mkdir()
    (folder / "4/a.png").write_bytes(_encoded(first, "PNG", save_all=True, append_images=rest, duration=120))
    for number, (name, codec) in enumerate({"a.mkv": "libx264", "a.avi": "mpeg4", "a.mov": "qtrle"}.items(), start=5):
        (folder / str(number)).mkdir()
        _write_film(frames, folder / str(number) / name, codec)


def _write_film(frames: Iterable[PIL.Image.Image], path: Path, codec: str) -> None:
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = 24, 16
        stream.pix_fmt = "argb" if codec == "qtrle" else "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_image(frame)))
        output.mux(stream.encode())


def read_clips(folder: Path, name: str) -> Iterator[object]:
    """The clip, at its own rate and at another."""
    yield read_media(folder / name)
    yield read_media(folder / name, fps=4.0, max_frames=3)


# Data sets.


def make_sources(folder: Path) -> None:
    """A data set of a few items in every layout."""
    for number, make in enumerate((_jsonl, _csv, _parquet, _parquet_texts, _tar, _loose, _texts, _text_files, _array)):
        place = folder / str(number)
        place.mkdir()
        make(place)


def _rows(folder: Path | None, count: int = 6) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number in range(count):
        if folder is not None:
            (folder / f"{number}.png").write_bytes(_encoded(_picture(number), "PNG"))
        row: dict[str, object] = {"file_name": f"{number}.png", "text": f"a block {number}", "split": "train"}
        rows.append(row | {"id": f"x{number}", "fps": 8.0, "score": 1.5})
    return rows


def _jsonl(folder: Path) -> None:
    rows = [{**row, "questions": [{"question": "what?", "answer": "a block"}]} for row in _rows(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _csv(folder: Path) -> None:
    rows = [{**row, "questions": '[{"question": "what?", "answer": "it"}]'} for row in _rows(folder)]
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _parquet(folder: Path) -> None:
    rows = _rows(None)
    images = [{"bytes": _encoded(_picture(number), "PNG"), "path": f"{number}.png"} for number in range(len(rows))]
    table = pa.table({"image": images, "text": [row["text"] for row in rows], "fps": [None] * len(rows)})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=4)


def _parquet_texts(folder: Path) -> None:
    pq.write_table(pa.table({"text": [f"some words {number}" for number in range(9)]}), folder / "a.parquet")


def _tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(4):
            parts = {"png": _encoded(_picture(number), "PNG"), "json": json.dumps({"caption": "a block"}).encode()}
            parts |= {"txt": b"a block"} if number % 2 else {}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"some/{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _loose(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(_encoded(_picture(number), "PNG"))
        (folder / f"{number}.txt").write_text("a block")


def _texts(folder: Path) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"words {number}"}) + "\n" for number in range(6)))


def _text_files(folder: Path) -> None:
    for number in range(3):
        (folder / f"{number}.txt").write_text("words and words")


def _array(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a block"}]
    rows = [{"image": row["file_name"], "id": row["id"], "conversations": turns} for row in _rows(folder, 3)]
    (folder / "data.json").write_text(json.dumps(rows))


def read_sources(folder: Path, name: str) -> Iterator[object]:
    """Every item, with its media or text."""
    for item in open_source(folder):
        try:
            yield (
                item.text
                if item.kind == "text"
                else read_media(item.media, fps=item.fps)
                if item.kind == "video"
                else read_image(item.media)
            )
        except EmulusError as error:
            yield error


# Models.


@cache
def _bundle() -> Bundle:
    torch.manual_seed(0)
    shape = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64)
    text = TextTokenizer.train(["a red block", "a green block"], size=270)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=64)
    config = sized("tiny", vocab_size=vocabulary.size, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config = dataclasses.replace(config, max_position_embeddings=256, pad_token_id=vocabulary.pad)
    defaults = GenerationDefaults(height=16, width=16, num_frames=8, fps=8.0, max_text_tokens=8)
    vision = VisionTokenizer(shape).eval()
    return Bundle(decoder=Decoder(config).eval(), vision=vision, text=text, vocabulary=vocabulary, defaults=defaults)


def make_models(folder: Path) -> None:
    """The same tiny model in our layout, and one like the released in the released and in transformers' layout."""
    save_bundle(_bundle(), folder / "0")
    golden = HOME / "tests/golden"
    layouts: tuple[Layout, ...] = ("released", "transformers")
    for number, to in enumerate(layouts, start=1):
        shutil.copytree(golden / "decoder", folder / f"{number}.tmp")
        shutil.copytree(golden / "vision", folder / f"{number}.tmp/vision")
        convert(folder / f"{number}.tmp", folder / str(number), to=to)
        shutil.rmtree(folder / f"{number}.tmp")


HOME = Path(__file__).parents[1]


def read_models(folder: Path, name: str) -> Iterator[object]:
    """What ``emulus info`` says, and the model."""
    info([str(folder)])
    yield emulus.load(folder, device="cpu")


# Tokens and runs.


def _make_tokens(folder: Path) -> None:
    data = folder.parent / "tokens-data"
    data.mkdir(parents=True)
    rows = [
        {**row, "split": "validation" if number % 4 == 3 else "train"} for number, row in enumerate(_rows(data, 16))
    ]
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = folder.parent / "tokens-model"
    save_bundle(_bundle(), model)
    tokenize(TokenizeConfig(sources=(data,), vocabulary=str(model), out=folder, size=16, shard_items=8, device="cpu"))


def make_tokens(folder: Path) -> None:
    """A tokens folder of two splits and several shards."""
    _make_tokens(folder / "0")
    for other in ("tokens-data", "tokens-model"):
        shutil.rmtree(folder / other)


def read_tokens(folder: Path, name: str) -> Iterator[object]:
    """The items, and a step of training rows."""
    tokens = Tokens.open(folder)
    for split in ("train", "validation"):
        yield tokens.items(split)
    loader = Loader(Mixture.open([str(folder)]), ReadingConfig(), seed=0, row_tokens=256, rows_per_step=1, threads=0)
    yield loader.read(1)


def _run_config(tokens: Path, out: Path) -> PretrainConfig:
    loop = TrainConfig(
        steps=2, learning_rate=1e-3, warmup_steps=0, evaluate_every=0, save_every=1, device="cpu", precision="fp32"
    )
    return PretrainConfig(
        tokens=(str(tokens),), out=out, size="tiny", context=64, row_tokens=64, rows_per_step=1, train=loop,
        evaluation_documents=1, evaluation_pictures=0,
    )  # fmt: skip


def make_runs(folder: Path) -> None:
    """A finished training run of two steps."""
    tokens = folder.parent / "run-tokens"
    _make_tokens(tokens)
    pretrain(_run_config(tokens, folder / "0"))


def read_runs(folder: Path, name: str) -> Iterator[object]:
    """The report of the run, and the run resumed."""
    write_report(run_report(folder), folder / "report.html")
    yield pretrain(_run_config(next(folder.parents[1].glob("run-tokens")), folder))


def make_recipes(folder: Path) -> None:
    """The config of every recipe, as YAML."""
    for number, name in enumerate(RECIPES):
        (folder / str(number)).mkdir()
        write_yaml(folder / str(number) / f"{name}.yaml", recipe(name).decoder)


def read_recipes(folder: Path, name: str) -> Iterator[object]:
    """The config."""
    yield merge(recipe(Path(name).stem).decoder, read_yaml(folder / name), name)


def make_texts(folder: Path) -> None:
    """A text that spells special tokens."""
    (folder / "0").mkdir()
    vocabulary = _bundle().vocabulary
    assert vocabulary is not None
    special = "".join(vocabulary.surface(id) for id in sorted(vocabulary.specials.values()))
    (folder / "0/prompt.txt").write_text(f"a {special} block <|visual token 000001|> ö é 日本 \u0301\u0316 \n\t end")


def read_texts(folder: Path, name: str) -> Iterator[object]:
    """The ids, of which none is special, and the text again."""
    tokenizer = _bundle().text
    assert tokenizer is not None
    text = (folder / name).read_bytes().decode("utf-8", "replace")
    ids = tokenizer.encode(text)
    assert all(0 <= id < tokenizer.size for id in ids), "a text gave an id that is not text's"
    yield tokenizer.decode(ids)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("image", make_images, read_images, share=12),
        Kind("clip", make_clips, read_clips, share=6),
        Kind("source", make_sources, read_sources, share=6),
        Kind("tokens", make_tokens, read_tokens, share=2),
        Kind("run", make_runs, read_runs, takes=lambda name: "model/" not in name),
        Kind("model", make_models, read_models, share=3),
        Kind("recipe", make_recipes, read_recipes, share=4),
        Kind("text", make_texts, read_texts, share=6),
    )
}
