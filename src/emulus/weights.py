"""Safetensors on disk -> a module's tensors: strict, lazy, shard by shard. Pickles are not read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.files import disk_errors, read_json, write_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Shapes = dict[str, tuple[int, ...]]


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
            # The library wraps the system's error in its own; ENOSPC is number 28.
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(28, str(error)) from error
            raise

    with disk_errors(path):
        write_file(path, write)


def find_model(path: Path) -> Path:
    """The folder that holds ``config.json``: ``path`` itself, or the newest model of the run at ``path``.

    Raises:
        EmulusError: There is none.
    """
    if path.is_file():
        raise EmulusError(f"{path} is a file; give the folder of a model")
    if not path.is_dir():
        folders = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, folders, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else "; train a model, or say where one is"
        raise EmulusError(f"there is no folder {path}{hint}")
    if (path / "config.json").exists():
        return path
    steps = sorted(path.glob("checkpoints/step-*/COMPLETE"))
    if not steps:
        raise EmulusError(f"{path} holds no model (no config.json) and no finished checkpoint")
    return steps[-1].parent / "model"


def find_shards(folder: Path) -> dict[Path, Shapes]:
    """The weight files of a model's folder and the shape of every tensor in each, from their headers alone.

    Raises:
        EmulusError: There are none, one is missing or damaged, or there are only pickles.
    """
    if (folder / INDEX).exists():
        names = _indexed(folder / INDEX)
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise EmulusError(
                f"{folder} holds {pickles[0]}, a pickle, which could run code and is not read; "
                "convert it to safetensors first"
            )
        raise EmulusError(f"{folder} holds no {WEIGHTS}; is it a model's folder?")
    return {folder / name: _header(folder / name) for name in names}


def check_shapes(folder: Path, wanted: Shapes, shards: Mapping[Path, Shapes]) -> None:
    """Compare what a config asks for with what the files hold.

    Raises:
        EmulusError: Lists what is missing, unexpected or of another shape.
    """
    found = {name: shape for shapes in shards.values() for name, shape in shapes.items()}
    mis_shaped = [
        f"{name} {found[name]} for {shape}" for name, shape in wanted.items() if name in found and found[name] != shape
    ]
    differences = (
        ("missing", [name for name in wanted if name not in found]),
        ("unexpected", [name for name in found if name not in wanted]),
        ("mis-shaped", mis_shaped),
    )
    parts = [_listing(kind, names) for kind, names in differences if names]
    if parts:
        raise EmulusError(f"{folder}: the shapes of the weights are not those of its {CONFIG}: {'; '.join(parts)}")


def fill(
    model: nn.Module, shards: Mapping[Path, Shapes], *, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Give a module on the meta device its tensors, one at a time.

    Args:
        model: Built under ``torch.device("meta")``; every name in the files is one of its parameters or buffers.
        shards: What :func:`find_shards` found.
        dtype: Of floating-point tensors; ``None`` keeps the file's.
        device: Where they shall lie.

    Raises:
        EmulusError: A file is damaged.
    """
    for path, shapes in shards.items():
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in shapes:
                    _assign(model, name, file.get_tensor(name), dtype)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None


def _assign(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    if tensor.is_floating_point():
        tensor = tensor.to(dtype=dtype)
    # A tensor still backed by the file's mapping is copied: training would otherwise write into shared pages.
    tensor = tensor.clone() if tensor.is_cpu else tensor
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, tensor if leaf in owner._buffers else nn.Parameter(tensor))


def _indexed(path: Path) -> list[str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise EmulusError(f"{path} has no weight_map; restore it from its source")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise EmulusError(f"{path} points at {name!r}, which is not a .safetensors file beside it; it is not read")
        if not (path.parent / name).exists():
            raise EmulusError(f"{path.parent / name} is missing; fetch the shard that {path.name} lists")
    return names


def _header(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> EmulusError:
    reason = " ".join(str(error).split())
    return EmulusError(f"{path} is damaged or truncated ({reason}); restore it from its source")


def _listing(kind: str, names: Sequence[str]) -> str:
    rest = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{rest})"
