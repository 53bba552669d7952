"""What runs where few packages are installed, as on a bare machine with a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulus.errors import EmulusError
from emulus.lazy import later

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("accelerate", "array_record", "av", "daft", "docstring_parser", "grain", "hypothesis", "portpicker", "pyarrow")
HEAVY += ("resvg_py", "stlpips_pytorch", "tensorboard", "torchao", "typeguard", "tyro")

BARE = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({HEAVY}))  # None: importing it fails as if it were not installed
import emulus, emulus.bundle, emulus.engine, emulus.pipeline, emulus.train.pretrain, emulus.train.tokenizer, benchmarks
for module in pkgutil.iter_modules(benchmarks.__path__):
    importlib.import_module("benchmarks." + module.name)
"""
TOY = """
sys.argv = ["gpu", "--toy", "--json", "--pairs", "1", "--only", "batch-1-bf16"]
import runpy
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""
COLLECT = """
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]))
"""


def run(code: str) -> str:
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_everything_is_imported_and_a_benchmark_runs_without_heavy_packages() -> None:
    pytest.importorskip("transformers")
    assert '"case": "batch-1-bf16"' in run(BARE + TOY)


def test_the_tests_for_gpus_are_collected_without_heavy_packages() -> None:
    found = run(BARE + COLLECT)
    assert "tests/gpu/test_kernels.py" in found
    assert "tests/model" not in found


def test_a_package_that_is_not_installed_is_named_when_it_is_used() -> None:
    module = later("no_such_package.inside")
    with pytest.raises(EmulusError, match="needs the package no_such_package, which is not installed"):
        module.anything()


def test_a_module_is_imported_when_it_is_used() -> None:
    code = "import sys; from emulus.lazy import later; m = later('wave'); assert 'wave' not in sys.modules; m.open"
    assert run(code + "; assert 'wave' in sys.modules") == ""
