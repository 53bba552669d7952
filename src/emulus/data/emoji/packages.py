"""The public packages that the emoji data set is made of: fetching, and reading without unpacking."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emulus.errors import EmulusError
from emulus.files import disk_errors

# The largest real member is noto's icons.json (25 MB) and the largest tarball unpacks to 200 MB.
MAX_MEMBER_BYTES = 128 << 20
MAX_TARBALL_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Package:
    """One npm package and where its content comes from."""

    name: str
    version: str
    licence: str
    authors: str
    upstream: str
    """Name of the project whose work the package carries, for the NOTICE."""

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it, such as ``iconify-json-noto-1.2.9.tgz``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


_MICROSOFT = "Microsoft Corporation (artwork), LobeHub (packaging)"

WORDS = Package(
    name="emojibase-data",
    version="17.0.0",
    licence="MIT; label data from the Unicode CLDR under the Unicode licence",
    authors="Miles Johnson; Unicode, Inc.",
    upstream="milesj/emojibase",
)
PICTURES_3D = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    licence="MIT",
    authors=_MICROSOFT,
    upstream="microsoft/fluentui-emoji",
)
FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    licence="MIT",
    authors="Microsoft Corporation (artwork), Iconify (packaging)",
    upstream="microsoft/fluentui-emoji",
)
NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    licence="Apache-2.0",
    authors="Google Inc (artwork), Iconify (packaging)",
    upstream="googlefonts/noto-emoji",
)
TWEMOJI = Package(
    name="@iconify-json/twemoji",
    version="1.2.5",
    licence="CC-BY-4.0",
    authors="Twitter, Inc. and other contributors (artwork), Iconify (packaging)",
    upstream="jdecked/twemoji",
)
CLIPS = tuple(
    Package(
        name=f"@lobehub/fluent-emoji-anim-{part}",
        version="1.0.0",
        licence="MIT",
        authors=_MICROSOFT,
        upstream="microsoft/fluentui-emoji-animated",
    )
    for part in (1, 2, 3, 4)
)
PACKAGES = (WORDS, PICTURES_3D, FLAT, NOTO, TWEMOJI, *CLIPS)


def fetch_packages(folder: Path, *, report: Callable[[str], object] = print) -> None:
    """Make sure that every package's tarball lies in a folder; fetch those that do not with ``npm pack``.

    Args:
        folder: Where the tarballs are or shall be. Made when missing.
        report: Told one line per package that is fetched.

    Raises:
        EmulusError: npm is missing or failed; names the packages, since tarballs may be put there by hand.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES if not (folder / package.tarball).is_file()]
    if not missing:
        return
    npm = shutil.which("npm")
    if npm is None:
        names = ", ".join(f"{package.name}@{package.version}" for package in missing)
        raise EmulusError(
            f"npm is not installed and {folder} lacks {names}; install npm, or put the tarballs there "
            f"(named as 'npm pack' names them, such as {missing[0].tarball})"
        )
    for package in missing:
        report(f"fetching {package.name} {package.version}")
        _fetch(npm, package, folder)


def _fetch(npm: str, package: Package, folder: Path) -> None:
    # npm writes into a folder of its own, so that a cut download is never taken for a tarball.
    with disk_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        command = [
            npm,
            "pack",
            "--silent",
            f"{package.name}@{package.version}",
            "--pack-destination",
            temporary,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(temporary) / package.tarball
        if done.returncode != 0 or not fetched.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = lines[-1] if lines else "no message"
            raise EmulusError(
                f"npm could not fetch {package.name}@{package.version} ({reason}); "
                f"check the network, or put {package.tarball} into {folder}"
            )
        fetched.replace(folder / package.tarball)


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Read files out of a tarball, in its order, without writing anything to the disk.

    Args:
        tarball: A gzipped tar file.
        wanted: Says by a member's name (``package/assets/1f34e.webp``) whether it is read.

    Yields:
        Name and content of each wanted regular file.

    Raises:
        EmulusError: The file is missing, cut, no tarball, or holds more than the limits allow.
    """
    total = 0
    try:
        with tarfile.open(tarball, "r|gz") as archive:
            for member in archive:
                total += member.size
                if member.size > MAX_MEMBER_BYTES or total > MAX_TARBALL_BYTES:
                    raise EmulusError(f"{tarball} holds more than expected (at {member.name}); fetch it again")
                if member.isfile() and wanted(member.name):
                    file = archive.extractfile(member)
                    assert file is not None, "a regular file can be read"
                    yield member.name, file.read()
    except FileNotFoundError:
        raise EmulusError(f"{tarball} is missing; fetch it with 'npm pack'") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise EmulusError(f"{tarball} is cut or no tarball ({error}); delete it so that it is fetched again") from error


def read_member(tarball: Path, name: str) -> bytes:
    """Read one file of a tarball (see :func:`read_members`).

    Raises:
        EmulusError: The tarball is broken or has no such file.
    """
    for _, content in read_members(tarball, lambda member: member == name):
        return content
    raise EmulusError(f"{tarball} has no {name}; fetch the package again")
