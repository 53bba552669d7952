"""what a chat's caller gives -> questions with their media and answers, checked before any image is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from emulus.checks import shown
from emulus.errors import EmulusError
from emulus.media import MediaSource

MEDIA = "a file's path, its bytes, an open file, a Pillow image, a uint8 array or tensor, or a Clip"


class Said(NamedTuple):
    """A question, what is shown with it, and its answer unless that is to come."""

    text: str
    media: list[MediaSource]
    answer: str | None = None


def read_messages(messages: Sequence[Any]) -> tuple[str | None, list[Said]]:
    """Read a conversation in the form that chat programs use; see :meth:`emulus.pipeline.Emulus.chat`.

    Returns:
        The system message, None if there is none, and the questions in order; only the last has no answer.

    Raises:
        EmulusError: Messages do not alternate, the last is not the user's, or one is not of a known form.
    """
    if not messages:
        raise EmulusError("the conversation is empty: give at least {'role': 'user', 'content': ...}")
    system: str | None = None
    turns: list[Said] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise EmulusError(f"message {number} of the conversation is not {{'role': ..., 'content': ...}}")
        said = message.get("role")
        role = said if isinstance(said, str) else None
        text, media = _content(message.get("content"), number)
        is_open = bool(turns) and turns[-1].answer is None
        if role == "system" and number == 1 and not media:
            system = text
        elif role == "user" and not is_open:
            turns.append(Said(text, media))
        elif role == "assistant" and is_open and not media:
            turns[-1] = turns[-1]._replace(answer=text)
        else:
            raise EmulusError(
                f"message {number} of the conversation has role {shown(said)}: after a system message in words, if "
                "any, 'user' and 'assistant' (in words) alternate, and the last is the user's"
            )
    if not turns or turns[-1].answer is not None:
        raise EmulusError("the conversation needs a last message of role 'user': the one to be answered")
    return system, turns


def _content(content: Any, message: int) -> tuple[str, list[MediaSource]]:
    """Text and media of a message."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise EmulusError(
            f"the content of message {message} must be text or a list of {{'type': 'text', 'text': ...}} and the like, "
            f"got {shown(content)}"
        )
    texts: list[str] = []
    media: list[MediaSource] = []
    for part in parts:
        said = part.get("type")
        kind = said if isinstance(said, str) else ""
        value = part.get(kind)
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in ("image", "video") and isinstance(value, MediaSource):
            media.append(value)
        else:
            raise EmulusError(
                f"a part of message {message} has type {shown(said)} and {shown(value)} in it; give 'text' with a str, "
                f"or 'image' or 'video' with {MEDIA}"
            )
    return " ".join(texts), media
