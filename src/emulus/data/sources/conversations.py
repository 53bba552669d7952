"""Conversations about an image or clip (LLaVA, ShareGPT, OpenAI) -> questions with their answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from emulus.codec import parse_json
from emulus.data.item import Question
from emulus.data.sources.account import LeftOutError
from emulus.data.stored import checked_text
from emulus.errors import EmulusError, shown

_ASKING = frozenset({"human", "user", "question", "instruction"})
_ANSWERING = frozenset({"gpt", "assistant", "model", "bot", "chatgpt", "answer", "output"})
_PASSED = frozenset({"system", "developer"})
# What stands for the medium inside a turn. Only around it are blanks cut.
_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
_SHAPE = (
    'is not a conversation such as [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", "value": "..."}]'
)


@dataclass(kw_only=True)
class Conversation:
    """What a conversation says.

    Attributes:
        questions: Questions with their answers, in order.
        captions: What is said about the medium without being asked.
        media: Names of files that stand inside the turns.
    """

    questions: list[Question] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    media: list[str] = field(default_factory=list)


def read_conversation(value: Any, where: str) -> Conversation:
    """Read a list of turns: ``from`` and ``value``, or ``role`` and ``content`` (a text or a list of parts).

    Args:
        value: The list, or its JSON.
        where: Names the row in messages.

    Raises:
        LeftOutError: It is no conversation, shows several media, or answers nothing.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value, where)
        except EmulusError:
            value = None
    if isinstance(value, Mapping):
        value = value.get("messages") or value.get("conversations")
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise LeftOutError("not a conversation", f"{where} {_SHAPE}; fix that row")
    found, asked, shown_media = Conversation(), list[str](), 0
    for answers, text, media in _turns(value, where):
        shown_media += max(len(_PLACEHOLDER.findall(text)), len(media))
        found.media += [name for name in media if name]
        text = checked_text(_PLACEHOLDER.sub("\n", text).strip(), where)
        if not answers:
            asked += [text] if text else []
        elif text:
            if asked:
                found.questions.append(Question("\n".join(asked), text))
            else:
                found.captions.append(text)
            asked = []
    if shown_media > 1:
        raise LeftOutError(
            "several media in one row",
            f"{where} shows {shown_media} images or clips, and an item holds one; give each its own row",
        )
    if not found.questions and not found.captions:
        raise LeftOutError("a conversation without an answer", f"{where} has no answer; remove that row")
    return found


def _turns(turns: Any, where: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Of each turn: whether it answers, its text, and the media that its parts show."""
    for turn in turns:
        role = str(turn.get("role") or turn.get("from") or "").lower()
        if role in _PASSED:
            continue
        if role not in _ASKING | _ANSWERING:
            raise LeftOutError(
                "a turn of an unknown speaker",
                f"{where}: {shown(role)} is neither a user nor an assistant; fix that row",
            )
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        text, media = _parts(content, where)
        yield role in _ANSWERING, text, media


def _parts(content: Any, where: str) -> tuple[str, list[str]]:
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    texts, media = [], []
    for part in content if isinstance(content, list | tuple) else [None]:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise LeftOutError("not a conversation", f"{where} {_SHAPE}; fix that row")
        kind = str(part.get("type") or ("text" if part.get("text") is not None else "image"))
        if kind in ("text", "input_text", "output_text"):
            texts.append(str(part.get("text") or part.get("content") or ""))
        elif kind in ("image", "video", "image_url", "video_url", "input_image"):
            media.append(_name(part))
        else:
            raise LeftOutError(
                "a turn with parts that are neither texts, images nor clips",
                f"{where}: a part of the type {shown(kind)} cannot be used; remove that row",
            )
    return "\n".join(texts), media


def _name(part: Mapping[str, Any]) -> str:
    """The file that a part names; nothing where the row holds or names it elsewhere."""
    for key in ("image", "video", "image_url", "video_url", "path", "url"):
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("url") or value.get("path")
        if isinstance(value, str):
            return value.removeprefix("file://")
    return ""
