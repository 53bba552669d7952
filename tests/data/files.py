"""Files of data sets for tests: a clip, tables of JSON lines, tars, and a folder to lay them in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from emulus.media import Clip, write_video


def film(folder: Path) -> bytes:
    """A clip of four frames as MP4; ``folder`` is where it is made."""
    path = folder / "film.mp4"
    write_video(Clip(tuple(Image.new("RGB", (16, 16), (60 * n, 0, 0)) for n in range(4)), 8.0), path)
    content = path.read_bytes()
    path.unlink()
    return content


def lay(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files by their names in a folder, which is given back."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: Mapping[str, Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def tar(files: Mapping[str, bytes]) -> bytes:
    """A tar of files by their names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
