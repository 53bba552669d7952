"""The real command in a process of its own, which comes to a standstill at a known place, to be killed there.

A test that watches a running command and kills it in time would depend on who is faster.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CODE = """
import importlib, sys, threading
from pathlib import Path

mark, place, count, *arguments = sys.argv[1:]
module, _, names = place.partition(":")
owner = importlib.import_module(module)
*outer, name = names.split(".")
for each in outer:
    owner = getattr(owner, each)
call, calls = getattr(owner, name), 0

def halting(*given, **named):
    global calls
    result = call(*given, **named)
    calls += 1
    if calls == int(count):
        Path(mark).touch()
        threading.Event().wait()
    return result

setattr(owner, name, halting)
from emulus.cli import main
sys.argv = ["emulus", *arguments]
sys.exit(main())
"""


def halted(mark: Path, place: str, count: int, arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start ``emulus`` and wait until it stands still.

    Args:
        mark: A file that is made then; it must not exist.
        place: What was called then, such as ``emulus.data.tokenize:add_to_manifest``.
        count: How many times.
        arguments: Of the command.
        options: Of the process.
    """
    process = subprocess.Popen([sys.executable, "-c", CODE, str(mark), place, str(count), *arguments], **options)
    try:
        while not mark.exists():
            assert process.poll() is None, f"it ended with {process.returncode} before {place} was called {count} times"
            time.sleep(0.005)
    except BaseException:
        process.kill()
        raise
    return process
