"""Safetensors on disk -> a module's tensors: strict, lazy, shard by shard. Pickles are not read."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emulus.codec import check_not_placeholder, decode
from emulus.errors import EmulusError, shown
from emulus.files import disk_errors, read_config, write_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Left by downloads that did not end: those of huggingface_hub into a folder of one's own, of browsers, aria2 and wget.
_UNFINISHED = (".cache/huggingface/download/*.incomplete", "*.incomplete", "*.crdownload", "*.part", "*.aria2")
_MAX_TENSORS = 2**17

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: A safetensors file.
        name: The tensor's name in it.
        shape: Its shape there.
    """

    file: Path
    name: str
    shape: tuple[int, ...]


Tensors = dict[str, Stored]
"""The name that our modules give a tensor, to where it is stored."""

Place = torch.device | str | Callable[[str], torch.device]
"""Where tensors shall lie: all on one device, or each where a function of its name says."""

_Module = TypeVar("_Module", bound=nn.Module)


class _NoDraws(TorchFunctionMode):
    """Leaves out what would draw values that do not exist, for which torch would load its compiler first."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        return (*args, *named.values())[0] if function is nn.init.normal_ else function(*args, **named)


def on_meta(build: Callable[[], _Module]) -> _Module:
    """Build a module without its values: it takes no memory and next to no time, however large."""
    with torch.device("meta"), _NoDraws():
        return build()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically.

    Raises:
        EmulusError: The disk is full or the place may not be written to.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            # The library wraps the system's error in its own.
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise

    with disk_errors(path):
        write_file(path, write)


def find_model(path: Path) -> Path:
    """The folder that holds ``config.json``: ``path`` itself, or the newest model of the run at ``path``.

    Raises:
        EmulusError: There is none.
    """
    try:
        if path.is_file():
            raise EmulusError(f"{path} is a file; give the folder of a model")
        if not path.is_dir():
            folders = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
            close = difflib.get_close_matches(path.name, folders, n=1)
            hint = f"; did you mean {path.parent / close[0]}?" if close else "; train a model, or say where one is"
            raise EmulusError(f"there is no folder {path}{hint}")
        if (path / CONFIG).exists():
            return path
        steps = sorted(path.glob("checkpoints/step-*/COMPLETE"))
    except OSError as error:
        raise EmulusError(f"{path} cannot be opened ({error.strerror}); give the folder of a model") from None
    if not steps:
        raise EmulusError(f"{path} holds no model (no config.json) and no finished checkpoint{_unfinished(path)}")
    return steps[-1].parent / "model"


def find_tensors(folder: Path) -> Tensors:
    """Every tensor of a model's folder and where it lies, from the files' headers alone.

    Raises:
        EmulusError: There are none, a file is missing or damaged, the index is wrong, or there are only pickles.
    """
    if (folder / INDEX).exists():
        weight_map = _indexed(folder / INDEX)
        tensors = _headers(folder / name for name in sorted(set(weight_map.values())))
        wrong = [
            name for name in sorted({*weight_map, *tensors}) if _file_name(tensors.get(name)) != weight_map.get(name)
        ]
        if wrong:
            raise EmulusError(
                f"{folder / INDEX} is not the index of the files beside it: {_listing('misplaced', wrong)}; "
                "restore it from its source"
            )
        return tensors
    if (folder / WEIGHTS).exists():
        return _headers([folder / WEIGHTS])
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise EmulusError(
            f"{folder} holds {pickles[0]}, a pickle, which could run code and is not read; "
            "convert it to safetensors first: transformers writes it with save_pretrained"
        )
    raise EmulusError(f"{folder} holds no {WEIGHTS}{_unfinished(folder) or '; is it the folder of a model?'}")


def rename(tensors: Tensors, new_name: Callable[[str], str | None]) -> Tensors:
    """The same tensors under other names; those whose new name is ``None`` are left out.

    Raises:
        EmulusError: Two tensors would have one name.
    """
    renamed: Tensors = {}
    for name, stored in tensors.items():
        new = new_name(name)
        if new in renamed:
            raise EmulusError(
                f"{stored.file.parent} holds {new} twice, as {renamed[new].name} and as {stored.name}; remove one"
            )
        if new is not None:
            renamed[new] = stored
    return renamed


def check_shapes(folder: Path, wanted: Shapes, tensors: Tensors) -> None:
    """Compare what a config asks for with what the files hold.

    Raises:
        EmulusError: Lists what is missing, unexpected or of another shape.
    """
    mis_shaped = [
        f"{name} {tensors[name].shape} for {shape}"
        for name, shape in wanted.items()
        if name in tensors and _squeezed(tensors[name].shape) != _squeezed(shape)
    ]
    differences = (
        ("missing", [name for name in wanted if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in wanted]),
        ("mis-shaped", mis_shaped),
    )
    parts = [_listing(kind, names) for kind, names in differences if names]
    if parts:
        what = f"the shapes of the weights are not those of its {CONFIG}: {'; '.join(parts)}"
        raise EmulusError(f"{folder}: {what}; fetch both again")


def fill(
    model: nn.Module,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None,
    device: Place,
) -> None:
    """Give a module on the meta device its tensors, each straight in its type and place.

    Args:
        model: Built by :func:`on_meta`; every name is one of its parameters or buffers.
        tensors: What :func:`find_tensors` found, under the module's names.
        dtype: Of floating-point tensors; ``None`` keeps the file's.
        device: Where they shall lie: all in one place, or a tensor's place by its name.

    Raises:
        EmulusError: A file is damaged.
    """
    for name, stored in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        wanted = getattr(owner, leaf)
        tensor = read_tensor(stored, dtype=dtype, device=place(device, name)).view(wanted.shape)
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise EmulusError(
                f"{stored.file}: {stored.name} is of {tensor.dtype}, not {wanted.dtype}; restore the file"
            )
        setattr(owner, leaf, tensor if leaf in owner._buffers else nn.Parameter(tensor, tensor.is_floating_point()))


def place(device: Place, name: str) -> torch.device:
    """The device on which the tensor called ``name`` shall lie."""
    return device(name) if callable(device) else torch.device(device)


def read_tensor(stored: Stored, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
    """One tensor, in memory of its own.

    Args:
        stored: Where it lies.
        dtype: Of a floating-point tensor; ``None`` keeps the file's.
        device: Where it shall be.

    Raises:
        EmulusError: The file is damaged.
    """
    result: Tensor | None = None
    for start, piece in read_pieces(stored):
        if result is None:
            kind = dtype if dtype is not None and piece.is_floating_point() else piece.dtype
            result = torch.empty(stored.shape, dtype=kind, device=device)
        if stored.shape:
            result[start : start + len(piece)].copy_(piece)
        else:
            result.copy_(piece)
    return torch.empty(stored.shape, dtype=dtype, device=device) if result is None else result


def read_pieces(stored: Stored, most_bytes: int = 4 * 2**20) -> Iterator[tuple[int, Tensor]]:
    """A tensor as (first row, rows), as they lie in the file, a few MiB at a time.

    The file is mapped anew for every piece: pages of a mapping count as this process's memory until it ends, and a
    shard is gigabytes.

    Raises:
        EmulusError: The file is damaged.
    """
    try:
        if not stored.shape:
            with safe_open(stored.file, framework="pt") as file:
                yield 0, file.get_tensor(stored.name)
            return
        row = 8 * max(1, torch.Size(stored.shape[1:]).numel())
        step = max(1, most_bytes // row)
        for start in range(0, stored.shape[0], step):
            with safe_open(stored.file, framework="pt") as file:
                yield start, file.get_slice(stored.name)[start : start + step]
    # Of types that torch does not have, or cannot slice.
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(stored.file, error) from None


def _indexed(path: Path) -> dict[str, str]:
    """Tensor to file, as an index says, once every file is there."""
    found = decode(dict[str, str] | None, read_config(path).get("weight_map"), f"{path}: weight_map")
    weight_map: dict[str, str] = found or {}
    if not weight_map:
        raise EmulusError(f"{path} has no weight_map; restore it from its source")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise EmulusError(
                f"{path} points at {shown(name)}, which is not a .safetensors file beside it; it is not read"
            )
        if not (path.parent / name).exists():
            rest = _unfinished(path.parent) or f"; fetch the shard that {path.name} lists"
            raise EmulusError(f"{path.parent / name} is missing{rest}")
    return weight_map


def _headers(paths: Iterable[Path]) -> Tensors:
    tensors: Tensors = {}
    for path in paths:
        _check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                if len(names) > _MAX_TENSORS:
                    raise EmulusError(f"{path} claims {len(names):,} tensors, and {_MAX_TENSORS:,} are read at most")
                for name in names:
                    tensors[name] = Stored(file=path, name=name, shape=tuple(file.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    return tensors


def _check_file(path: Path) -> None:
    """Refuse what is not a file of tensors at all: a pipe never ends, and a pointer or web page deserves its name."""
    try:
        if not path.is_file():
            raise EmulusError(f"{path} is not a regular file; restore it from its source")
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    check_not_placeholder(head, path)


def _unfinished(folder: Path) -> str:
    """Says so if a download into a folder did not end."""
    found = next((path for pattern in _UNFINISHED for path in folder.glob(pattern)), None)
    return "" if found is None else f": its download has not finished ({found.name}); run the same download again"


def _file_name(stored: Stored | None) -> str | None:
    return None if stored is None else stored.file.name


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a kernel's trailing ones: a 1x1 convolution is a matrix, and some layouts store it as one."""
    return shape[:2] if shape[2:] == (1,) * (len(shape) - 2) else shape


def _damaged(path: Path, error: Exception) -> EmulusError:
    return EmulusError(f"{path} is damaged or truncated ({shown(error, quote=False)}); restore it from its source")


def _listing(kind: str, names: Sequence[str]) -> str:
    rest = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{rest})"
