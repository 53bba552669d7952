"""``emulus VERB …``: the verbs in pipeline order, each imported only when it is called."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, TextIO, cast

from emulus.errors import EmulusError, did_you_mean, one_line, shown
from emulus.lazy import missing

# verb: (module of emulus.commands, function, what it does)
VERBS = {
    "data": ("data", "data", "build a data set (emoji)"),
    "tokenizer-train": ("train", "tokenizer_train", "train a vision tokenizer by a recipe"),
    "tokenize": ("train", "tokenize", "encode data sets as ids"),
    "pretrain": ("train", "pretrain", "train a decoder by a recipe"),
    "report": ("report", "report", "write a page about a training run: curves, samples, what went wrong"),
    "scaling": ("scaling", "scaling", "train models of several sizes, fit their losses, predict a larger one's"),
    "generate": ("generate", "generate", "draw a picture from words"),
    "animate": ("generate", "animate", "make a clip from words"),
    "continue": ("generate", "continue_", "go on with a clip"),
    "describe": ("generate", "describe", "write a caption for a picture or clip"),
    "ask": ("generate", "ask", "answer a question about pictures or clips"),
    "evaluate": ("evaluate", "evaluate", "measure a model on held-out data"),
    "dual-train": ("dual", "dual_train", "train the small encoder that judges what drawings show"),
    "info": ("info", "info", "say what a model or a recipe is"),
    "convert": ("convert", "convert", "write a model in another layout (released, transformers, emulus)"),
    "quantize": ("quantize", "quantize", "write a model in fewer bits (int8, int4, fp8)"),
    "demo": ("demo", "demo", "show the committed model and train a tiny one; writes a report page"),
}


def usage() -> str:
    """The text of ``emulus --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, _, text) in VERBS.items())
    return f"usage: emulus VERB [options]\n\n{verbs}\n\nemulus VERB --help explains the options of one."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status. User errors print one line and no traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_streams()
    try:
        _check_words(words)
        _check_output()
        with contextlib.redirect_stdout(cast(TextIO, _Output(sys.stdout))) as output:
            status = _run(words[0] if words else "help", words[1:])
            # What is still in the buffer may not find room: better known now than while Python ends.
            output.flush()
        return status
    except EmulusError as error:
        _complain(error, error.status)
        return error.status
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        _drop_output()
        return 0
    except (OSError, MemoryError, RecursionError, UnicodeError) as error:
        _complain(_explained(error), 1)
        return 1
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        _complain(EmulusError(_OUT_OF_MEMORY), 1)
        return 1
    except KeyboardInterrupt:
        print("emulus: interrupted", file=sys.stderr)
        return 130


_OUT_OF_MEMORY = (
    "not enough memory; close other programs, or ask for fewer or smaller images at once or a smaller dtype"
)


def _prepare_streams() -> None:
    """Nothing that is printed may fail for its letters, and no message may land in a file that is opened later."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _check_words(words: Sequence[str]) -> None:
    """Refuse names that libraries and JSON cannot hold: some would fail only after hours, when they are written down.

    Raises:
        EmulusError: A word is not UTF-8.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise EmulusError(
                f"the argument {shown(word)} is not valid UTF-8; rename that file or folder, or make a link to it "
                "(ln -s) whose name is"
            ) from None


def _check_output() -> None:
    """Refuse a closed stdout: the result would be lost, or written into whatever file is opened first.

    Raises:
        EmulusError: It is closed.
    """
    if sys.stdout is None:
        raise EmulusError("could not write to standard output (it is closed); redirect it to a file or to /dev/null")


def _explained(error: Exception) -> EmulusError:
    """What no part of the program expected, and is still the doing of the disk, the memory or the input."""
    if isinstance(error, MemoryError):
        return EmulusError(_OUT_OF_MEMORY)
    if isinstance(error, RecursionError):
        return EmulusError("the input is nested too deeply to be read; restore it from its source")
    if isinstance(error, UnicodeError):
        return EmulusError(f"a text or name is not valid UTF-8 ({error}); rename or save it as UTF-8")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    name = getattr(error, "filename", None)
    where = os.fsdecode(name) if isinstance(name, str | bytes) else "a file"
    return EmulusError(f"{where} cannot be read or written ({reason}); {_REMEDIES.get(error.errno, _LOOK)}")  # type: ignore[attr-defined]


_LOOK = "check that it is there, that its permissions allow it, and that the disk works"
_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "the file system is read-only: name another place",
    errno.ENOENT: "check its name",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of its path is a file, not a folder: name another place",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ELOOP: "links lead in a circle: name another place",
}


class _Output:
    """Standard output, whose errors say that it is what they are about."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._explained():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._explained():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            _drop_output()
            raise EmulusError(
                f"could not write to standard output ({error.strerror or error}); free some space, or redirect it"
            ) from error


def _drop_output() -> None:
    """Let Python's last flush succeed: what is left in the buffer must not complain at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, whose errors say so in words only, found no memory."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _complain(error: EmulusError, status: int) -> None:
    # Of several processes each may have something else to say; that they were asked to stop is said once.
    rank = os.environ.get("RANK", "0")
    if rank == "0" or status == 1:
        process = "" if rank == "0" else f" (process {one_line(rank, 20)})"
        print(f"emulus{process}: {error}", file=sys.stderr)


def _run(verb: str, arguments: list[str]) -> int:
    if verb in ("-h", "--help", "help"):
        print(usage(), flush=True)
        return 0
    if verb == "--version":
        from emulus import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        raise EmulusError(f"there is no verb {shown(verb)}{did_you_mean(verb, VERBS)}")
    module, function, _ = VERBS[verb]
    # Here, not at the top: `emulus --help` must be quick.
    from emulus.log import set_up_logging

    set_up_logging()
    try:
        commands = import_module(f"emulus.commands.{module}")
    except ModuleNotFoundError as error:
        raise missing(error) from None
    getattr(commands, function)(arguments)
    return 0
