"""Text and ids: parity with the released tokenizer, round trips, and specials that stay text."""

from __future__ import annotations

import base64
import json
import pickle
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.tokenizer.text import TextTokenizer, nfc
from emulus.tokenizer.vocabulary import Vocabulary

TEXTS = [
    "a red apple",
    "a flat drawing of a red apple, 2024",
    "ein roter Apfel",
    "un été à la plage",
    "数字 と 日本語",
] * 3
TRAINED = TextTokenizer.train(TEXTS, size=400)
BYTES_ONLY = [bytes([byte]) for byte in range(256)]
RANKS = TextTokenizer.from_pieces(TRAINED.pieces)


def tiktoken_lines(pieces: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))


@pytest.fixture(scope="session")
def released(official: Path) -> TextTokenizer:
    return TextTokenizer.from_file(official / "emu3.tiktoken")


@pytest.fixture(params=["tokenizers", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    if request.param == "tokenizers":
        return TRAINED
    (tmp_path / "small.tiktoken").write_text(tiktoken_lines([*BYTES_ONLY, b"re", b"red", b" a", b"<|", "é".encode()]))
    return TextTokenizer.from_file(tmp_path / "small.tiktoken")


def test_the_released_texts_have_the_released_ids(official: Path, released: TextTokenizer) -> None:
    names = Vocabulary.emu3().special_names
    entries = json.loads((official / "expected.json").read_text())["text"]
    assert len(entries) > 5
    for entry in entries:
        assert released.encode(entry["text"], allow_special=names) == entry["ids"]
        plain = released.encode(entry["text"])
        assert max(plain, default=0) < released.size == 151_643
        assert released.decode(plain) == unicodedata.normalize("NFC", entry["text"])


def test_size_texts_are_one_id_a_character(released: TextTokenizer) -> None:
    assert [released.id_of_char(c) for c in "0123456789*"] == [*range(15, 25), 9]
    assert released.encode("90*128") == [released.id_of_char(c) for c in "90*128"]


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky_text = st.lists(
    st.sampled_from(
        ["<|image start|>", "<|bos|>", "<|extra_203|>", "<|", "|>", " ", "\n", "e\u0301", "12", "'LL", "é", "한"]
    )
).map("".join)


@settings(max_examples=150, deadline=None)
@given(any_text | tricky_text)
def test_decoding_gives_the_normalised_text_back(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= id < TRAINED.size for id in ids)


def test_both_backends_give_any_text_back(tokenizer: TextTokenizer) -> None:
    for text in ["", "a red été", "e\u0301", "\x00\t\r\n", "👩‍👩‍👧", "<|image start|>", "x" * 5000, "\ufffd"]:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_specials_are_text_unless_they_are_allowed(tokenizer: TextTokenizer) -> None:
    v = Vocabulary.native(text_size=tokenizer.size, visual_size=10)
    text = "<|<|bos|>a<|image start|><|nothing|><|visual token 000003|><|visual token 000010|>"
    assert max(tokenizer.encode(text)) < tokenizer.size
    plain = tokenizer.encode
    assert tokenizer.encode(text, allow_special=v.special_names) == [
        *plain("<|"),
        v.bos,
        *plain("a"),
        v.boi,
        *plain("<|nothing|>"),
        v.visual_start + 3,
        *plain("<|visual token 000010|>"),
    ]


def test_half_a_surrogate_pair_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(EmulusError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud83d")


def test_broken_utf_8_is_shown_not_refused(tokenizer: TextTokenizer) -> None:
    first_byte = tokenizer.encode("字")[0]
    if tokenizer is not TRAINED:
        assert tokenizer.decode([first_byte]) == "\ufffd"
    assert "\ufffd" in tokenizer.decode([*tokenizer.encode("a"), TRAINED.encode("\U00050000")[0]])


@pytest.mark.parametrize("id", [-1, 10**6])
def test_only_text_ids_decode(tokenizer: TextTokenizer, id: int) -> None:
    with pytest.raises(EmulusError, match=f"id {id} at position 1"):
        tokenizer.decode([0, id])


def test_save_and_load(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path / "out")
    for source in (file, tmp_path / "out"):
        again = TextTokenizer.from_file(source)
        assert again.size == tokenizer.size
        assert again.encode("a red apple <|é|> 12") == tokenizer.encode("a red apple <|é|> 12")


def test_travels_to_another_process(tokenizer: TextTokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red été") == tokenizer.encode("a red été")


def test_training_is_deterministic_and_learns() -> None:
    again = TextTokenizer.train(iter(TEXTS), size=400)
    assert again.encode(" ".join(TEXTS)) == TRAINED.encode(" ".join(TEXTS))
    assert 256 < TRAINED.size <= 400
    assert len(TRAINED.encode("a red apple")) <= 5
    assert len(TRAINED.encode("2024")) == 4


def test_without_texts_the_bytes_remain() -> None:
    empty = TextTokenizer.train([], size=300)
    assert empty.size == 256
    assert empty.decode(empty.encode("ü🙂")) == "ü🙂"


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(EmulusError, match="no room for all bytes"):
        TextTokenizer.train(TEXTS, size=255)


def test_specials_that_a_file_adds_are_left_out(tmp_path: Path) -> None:
    file = TRAINED.save(tmp_path)
    values = json.loads(file.read_text())
    special = {"id": TRAINED.size, "content": "<|bos|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file.write_text(json.dumps(values | {"added_tokens": [special | flags]}))
    assert TextTokenizer.from_file(file).encode("<|bos|>") == TRAINED.encode("<|bos|>")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tiktoken", "", "single bytes"),
        ("a.tiktoken", tiktoken_lines(BYTES_ONLY[:-1]), "single bytes"),
        ("a.tiktoken", tiktoken_lines(BYTES_ONLY) + "YWI= 300\n", "once each"),
        ("a.tiktoken", tiktoken_lines(BYTES_ONLY) + "YWI= 255\n", "once each"),
        ("a.tiktoken", tiktoken_lines([*BYTES_ONLY, b"a"]), "once each"),
        ("a.tiktoken", tiktoken_lines(BYTES_ONLY) + "YW", "line 257"),
        ("a.tiktoken", "not*base64 0\n", "line 1"),
        ("a.json", "{}", "no file of the tokenizers library"),
        ("a.json", '{"model": {"type": "BPE"', "not valid JSON"),
        ("a.json", '{"model": {"type": "Nonsense"}}', "cannot read it"),
        ("a.json", '{"model": {"type": "BPE", "vocab": {"€": 0}, "merges": []}}', "not byte-level"),
        ("a.txt", "", r"neither \.json nor \.tiktoken"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(EmulusError, match=rf"{name}.*{says}"):
        TextTokenizer.from_file(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="no text vocabulary at"):
        TextTokenizer.from_file(tmp_path)


def test_pieces_are_the_vocabulary(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    again = TextTokenizer.from_pieces(tokenizer.pieces)
    assert b"".join(again.pieces[id] for id in again.encode("un été <|é|> 12")).decode() == "un été <|é|> 12"
    again.save_tiktoken(tmp_path / "emu3.tiktoken")
    for source in (tmp_path, tmp_path / "emu3.tiktoken"):
        assert list(TextTokenizer.from_file(source).pieces) == list(tokenizer.pieces)
    with pytest.raises(EmulusError, match="the same bytes"):
        TextTokenizer.from_pieces([*tokenizer.pieces, b"a"])
    with pytest.raises(EmulusError, match="single bytes"):
        TextTokenizer.from_pieces([])


@settings(max_examples=100, deadline=None)
@given(any_text | tricky_text)
def test_trained_merges_are_those_of_the_ranks(text: str) -> None:
    assert TextTokenizer.from_pieces(TRAINED.pieces).encode(text) == TRAINED.encode(text)


def test_a_file_of_transformers_is_split_as_released(tmp_path: Path) -> None:
    values = json.loads(TRAINED.save(tmp_path).read_text())
    values |= {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    vocab = values["model"]["vocab"]
    special = {"id": TRAINED.size, "content": "<|endoftext|>"}
    for changed in (
        {"model": {"vocab": {**vocab, "<|endoftext|>": TRAINED.size}}},
        {"model": {"vocab": vocab}, "added_tokens": [special]},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**values, **changed}))
        text = TextTokenizer.from_transformers(tmp_path / "tokenizer.json")
        assert text.size == TRAINED.size
        for sample in ("a red apple 2024", "un e\u0301te\u0301", "数字 と<|endoftext|>"):
            assert text.encode(sample) == TRAINED.encode(sample)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", r"no <\|endoftext\|>"),
        ('{"model": {"vocab": {"a": 0}}}', r"no <\|endoftext\|>"),
        ('{"model": {"vocab": {"a": 0, "<|endoftext|>": 1}}}', "single bytes"),
        ('{"model": {"vocab": {"a": 0, "<|endoftext|>": "1"}}}', "whole numbers"),
        ('{"model": {"vocab": {"a b": 0, "<|endoftext|>": 1}}}', "not byte-level"),
        ("{", "not valid JSON"),
    ],
)
def test_a_damaged_file_of_transformers_is_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(EmulusError, match=rf"tokenizer\.json.*{says}") as caught:
        TextTokenizer.from_transformers(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("character", ["", "ab", "é"])
def test_only_one_ascii_character_is_sure_to_have_an_id(character: str) -> None:
    with pytest.raises(EmulusError, match="one ASCII character"):
        TRAINED.id_of_char(character)


marks = st.text(st.sampled_from("aé가\u0301\u0316\u0327\u0344\u0f71\u0f72\u0f73\u0f75\u3099\u0345\u093c…"), max_size=80)


@given(st.lists(st.text() | marks).map("".join))
def test_nfc_is_that_of_the_standard_library(text: str) -> None:
    assert nfc(text) == unicodedata.normalize("NFC", text)


def test_every_combining_mark_can_be_in_a_long_row() -> None:
    """The rows are looked for by what no letter, blank or ASCII is."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    slow = [
        char
        for char in every
        if unicodedata.combining(char) or unicodedata.combining(unicodedata.normalize("NFD", char)[0])
    ]
    assert all(re.fullmatch(r"[^\w\s\x00-\x7f]", char) for char in slow)
    class_0 = [char for char in slow if not unicodedata.combining(char)]
    assert set(class_0) == set("\u0f73\u0f75\u0f81")


def test_long_rows_of_marks_are_put_in_order_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take the square of their number is not left to the standard library."""
    given: list[str] = []
    normalize = unicodedata.normalize
    monkeypatch.setattr(unicodedata, "normalize", lambda form, text: given.append(text) or normalize(form, text))
    text = nfc("a" + "\u0301\u0316" * 50_000)
    assert text == "\u00e1" + "\u0316" * 50_000 + "\u0301" * 49_999
    classes = [unicodedata.combining(char) for char in given[-1]]
    assert classes == sorted(classes)


# What the pattern splits, and where pieces are cut, in all orders.
tricky = st.text(st.sampled_from("aB7½ \t\n\r\u00a0\u2028.,'s<|你。、か\u0301é\u1d7d\U0001f600"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=8) | tricky, max_size=8).map("".join), st.integers(1, 9))
def test_long_texts_have_the_ids_of_the_whole(text: str, size: int) -> None:
    for each in (TRAINED, RANKS):
        expected = each.encode(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("emulus.tokenizer.text._PIECE", size)
            assert each.encode(text) == expected


def test_long_texts_are_encoded_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    encode = TRAINED._backend.encode
    monkeypatch.setattr(TRAINED._backend, "encode", lambda text: lengths.append(len(text)) or encode(text))
    text = "a red apple, 2024.\n" * 20_000 + "数字、日本語。" * 30_000
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert max(lengths) < 70_000


@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 600_000, "\n" * 600_000, "x" * 100_000 + "\u0301" * 600_000])
def test_what_is_no_text_is_refused_in_one_line(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(EmulusError, match="in a row") as raised:
        tokenizer.encode(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def foreign(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def split_by(pattern: str) -> dict[str, object]:
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, bytes_]}


def test_a_file_neither_cuts_nor_pads_texts(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    for changes in ({"truncation": cut}, {"padding": pad}, {"normalizer": None}):
        read = TextTokenizer.from_file(foreign(tmp_path, **changes))
        assert read.encode(TEXTS[1]) == TRAINED.encode(TEXTS[1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"normalizer": 3}, "3"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "changes texts",
        ),
        ({"pre_tokenizer": None}, "changes texts|gave up"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "changes texts|gave up"),
    ],
)
def test_a_file_that_changes_texts_is_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match=says) as raised:
        TextTokenizer.from_file(foreign(tmp_path, **changes))
    assert "\n" not in str(raised.value)


def test_a_pattern_that_panics_is_one_line(tmp_path: Path) -> None:
    """The libraries' panics are no ``Exception``."""
    read = TextTokenizer.from_file(foreign(tmp_path, pre_tokenizer=split_by(r"^(a|a?)+$")))
    with pytest.raises(EmulusError, match="gave up on a text of 30 characters"):
        read.encode("a" * 29 + "b")


def test_texts_are_not_cut_for_other_patterns(tmp_path: Path) -> None:
    """Where those split is not known."""
    read = TextTokenizer.from_file(foreign(tmp_path, pre_tokenizer=split_by(r"\d{1,3}|\D+")))
    with pytest.MonkeyPatch.context() as patch:
        whole = read.encode("12345 67890 " * 10)
        patch.setattr("emulus.tokenizer.text._PIECE", 8)
        assert read.encode("12345 67890 " * 10) == whole
        patch.setattr("emulus.tokenizer.text.MOST_UNCUT", 100)
        with pytest.raises(EmulusError, match="at most 100"):
            read.encode("12345 67890 " * 10)
