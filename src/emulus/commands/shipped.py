"""The model and the data set that lie in Emulus's repository."""

from __future__ import annotations

from pathlib import Path

import emulus
from emulus.errors import EmulusError

MODEL = Path("checkpoints/emoji")

_REPOSITORY = Path(emulus.__file__).resolve().parents[2]


def shipped(path: Path, flag: str) -> Path:
    """Find what comes with Emulus, from whatever folder a command is run in.

    Args:
        path: Where it lies in the repository.
        flag: What says where something else is, for the message.

    Returns:
        The path as it is if something is there, else that in the repository that the package runs from.

    Raises:
        EmulusError: It is neither here nor there, since the package was installed without its repository.
    """
    found = next((place for place in (path, _REPOSITORY / path) if place.exists()), None)
    if found is None:
        raise EmulusError(f"{path} comes with Emulus and lies in its repository, but not here: give {flag}")
    return found
