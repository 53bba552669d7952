"""Shared fixtures: the released code's inputs and outputs, and one tiny model made from nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def official() -> Path:
    """Inputs and outputs of the released code on small random weights; tests of them are skipped where they are not.

    They lie beside the repository, or where ``EMULUS_OFFICIAL_FIXTURES`` says.
    """
    folder = Path(os.environ.get("EMULUS_OFFICIAL_FIXTURES", REPOSITORY.parent / "shared/fixtures/official"))
    if not folder.is_dir():
        pytest.skip("the released code's fixtures are not here")
    return folder


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)
