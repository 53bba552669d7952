"""``emulus VERB …``: the verbs in pipeline order, each imported only when it is called."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from emulus.errors import EmulusError, did_you_mean

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


_REMEDIES = {
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "free some space, or send it elsewhere",
    errno.EDQUOT: "free some space, or send it elsewhere",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EROFS: "choose another place: this disk is read-only",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTDIR: "what is above it is no folder: choose another place",
    errno.ENOENT: "check the path",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}


def usage() -> str:
    """The text of ``emulus --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, _, text) in VERBS.items())
    return f"usage: emulus VERB [options]\n\n{verbs}\n\nemulus VERB --help explains the options of one."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status. User errors print one line and no traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words[0] if words else "help", words[1:])
    except EmulusError as error:
        # Of several processes each may have something else to say; that they were asked to stop is said once.
        rank = os.environ.get("RANK", "0")
        if rank == "0" or error.status == 1:
            print(f"emulus{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        _drop_output()
        return 0
    except OSError as error:
        print(f"emulus: {EmulusError(_disk_message(error))}", file=sys.stderr)
        if error.filename is None:
            _drop_output()
        return 1
    except KeyboardInterrupt:
        print("emulus: interrupted", file=sys.stderr)
        return 130


def _drop_output() -> None:
    """What is left in the buffer must not complain at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(verb: str, arguments: list[str]) -> int:
    if verb in ("-h", "--help", "help"):
        print(usage(), flush=True)
        return 0
    if verb == "--version":
        from emulus import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        raise EmulusError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}")
    module, function, _ = VERBS[verb]
    # Here, not at the top: `emulus --help` must be quick.
    from emulus.log import set_up_logging

    set_up_logging()
    getattr(import_module(f"emulus.commands.{module}"), function)(arguments)
    sys.stdout.flush()  # here, where a full disk can still be told of
    return 0


def _disk_message(error: OSError) -> str:
    """What no part of the program expected of the disk, and what to do about it."""
    # Files are written through emulus.files, which names them; so what has no name is the output.
    name = error.filename or "the standard output"
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    remedy = _REMEDIES.get(error.errno or 0, "choose another file, or check the disk")
    return f"{name}: {error.strerror or error}; {remedy}"
