"""Conversations in the form of chat programs: read whole, or refused with the message's number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulus.errors import EmulusError
from emulus.messages import Said, read_messages


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


HI, HELLO = user("hi"), {"role": "assistant", "content": "hello"}
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what"}, {"type": "text", "text": "is it?"}]


def test_a_conversation() -> None:
    system, turns = read_messages([{"role": "system", "content": "be short"}, HI, HELLO, user(PARTS)])
    assert system == "be short"
    assert turns == [Said("hi", [], "hello"), Said("what is it?", ["a.png"])]
    assert read_messages([HI]) == (None, [Said("hi", [])])
    assert read_messages([{"role": "system", "content": ""}, HI])[0] == ""


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "empty"),
        ([3], "message 1"),
        (["hi"], "message 1"),
        ([{}], "message 1"),
        ([{"role": "user"}], "message 1"),
        ([user(3)], "message 1"),
        ([user({"type": "text"})], "message 1"),
        ([user([3])], "message 1"),
        ([user([{"type": "text"}])], "message 1"),
        ([user([{"type": "text", "text": 3}])], "message 1"),
        ([user([{"type": "sound", "sound": b"x"}])], "message 1"),
        ([user([{"type": np.array([1, 2]), "text": "x"}])], "message 1"),
        ([{"role": np.array([1, 2]), "content": "x"}], "message 1"),
        ([HELLO], "message 1"),
        ([HI, HI], "message 2"),
        ([HI, HELLO, HELLO], "message 3"),
        ([HI, {"role": "system", "content": "x"}], "message 2"),
        ([HI, {"role": "assistant", "content": PARTS}], "message 2"),
        ([{"role": "system", "content": "x"}], "last message"),
        ([HI, HELLO], "last message"),
        ([user("x" * 10**6 + "y"), {"role": "x" * 10**6, "content": "y"}], "message 2"),
    ],
)
def test_what_is_no_conversation_is_one_line(messages: list[Any], says: str) -> None:
    with pytest.raises(EmulusError, match=says) as raised:
        read_messages(messages)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
