"""What is imported when first used: public names, so that ``--help`` does not wait for torch, and heavy packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from emulus.errors import EmulusError


def lazy(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package's ``__getattr__``.

    Args:
        package: The package's ``__name__``.
        modules: Each public name and the submodule that defines it.

    Returns:
        A function that imports the submodule of a listed name and gives the name's value.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get


def later(module: str) -> Any:
    """Make a stand-in for a module that is imported when something of it is first used.

    Where a package is large or not on every machine: ``av = later("av")`` in place of ``import av``, which stands under
    ``TYPE_CHECKING``. What needs the package fails with one line if it is not installed; all else runs without it.

    Args:
        module: Its full name, such as ``pyarrow.parquet``.
    """
    return _Later(module)


class _Later:
    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        if self._module is None:
            try:
                self._module = import_module(self._name)
            except ModuleNotFoundError as error:
                raise missing(error) from None
        return getattr(self._module, name)


def missing(error: ModuleNotFoundError) -> EmulusError:
    """What to raise where a package is not installed."""
    package = (error.name or "a package").partition(".")[0]
    return EmulusError(f"this needs the package {package}, which is not installed: pip install {package}")
