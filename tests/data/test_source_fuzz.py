"""Damaged data sets of all kinds give items or one line, and nothing else."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emulus.data.source import open_source
from emulus.errors import MAX_MESSAGE, EmulusError
from tests.data.files import tar

ROW: dict[str, Any] = {
    **{"id": "x", "file": "a.png", "caption": "a dot", "split": "train", "kind": "image", "fps": 8, "score": 2.0},
    "questions": [{"question": "q", "answer": "a"}],
}
TALK = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A dot."}]
CSV = 'id,file,caption,questions,fps\n1,a.png,"a, ""b""","[{""question"": ""q"", ""answer"": ""a""}]",8\n2,a.png,b,,\n'
ODD = (
    b"null",
    b"NaN",
    b"1e999",
    b"-3",
    b"9" * 5000,
    b"[" * 3000,
    b'"\\ud83d"',
    b"{}",
    b"x" * 3000,
    b"\x1b[2J",
    b"../../x",
)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(row: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row] * 6), buffer)
    return buffer.getvalue()


def arrow(row: Mapping[str, Any]) -> bytes:
    buffer, table = io.BytesIO(), pa.Table.from_pylist([row] * 6)
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


PICTURE = picture()
LINES = (json.dumps(ROW) + "\n").encode() * 3
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: '*.jsonl'\n---\n"
FILES: dict[str, bytes] = {
    "captions.jsonl": LINES,
    "talk.json": json.dumps([{"image": "a.png", "conversations": TALK}] * 2).encode(),
    "by_id.json": json.dumps({"x": ROW}).encode(),
    "captions.csv": CSV.encode(),
    "t.tsv": CSV.replace(",", "\t").encode(),
    "wide.csv": CSV.encode("utf-16"),
    "p.parquet": parquet({"image": {"bytes": PICTURE, "path": "a.png"}, "text": "a", "conversations": TALK}),
    "t.parquet": parquet({"text": "a" * 50, "url": "x"}),
    "a.arrow": arrow({"image": {"bytes": PICTURE, "path": None}, "text": "a"}),
    "t.tar": tar(
        {"0.png": PICTURE, "0.txt": b"a", "0.json": LINES[: len(LINES) // 3], "1.5.png": PICTURE, "1.5.txt": b"b"}
    ),
    "README.md": CARD,
    "a.json": json.dumps(ROW).encode(),
    "a.txt": b"words",
    "z.jsonl.gz": gzip.compress(LINES),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(found) + 1)
        match draw.randrange(5):
            case 0:
                found[place : place + 1] = draw.randbytes(1)
            case 1:
                found[place : place + draw.randrange(5)] = draw.choice(ODD)
            case 2:
                del found[place : place + draw.randrange(1, 40)]
            case 3:
                found[place:place] = found[: draw.randrange(200)]
            case _:
                del found[place:]
    return bytes(found)


@pytest.mark.parametrize("seed", range(150))
def test_damage_gives_items_or_one_line(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    (tmp_path / "a.png").write_bytes(PICTURE)
    names = draw.sample(sorted(FILES), draw.choice((1, 1, 3)))
    for name in names:
        (tmp_path / name).write_bytes(damaged(FILES[name], draw))
    for path in (tmp_path, tmp_path / names[0]):
        messages = []
        try:
            source = open_source(path)
            messages += source.account.lines()
            for item in source:
                try:
                    _ = item.text if item.kind == "text" else item.media
                except EmulusError as error:
                    messages.append(str(error))
        except EmulusError as error:
            messages.append(str(error))
        assert all(line.isprintable() and len(line) <= MAX_MESSAGE for line in messages)
