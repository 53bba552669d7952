"""text <-> ids: byte-level BPE, trained here or read from a released file, behind one class."""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from emulus.errors import EmulusError
from emulus.files import MAX_TEXT_VOCABULARY_BYTES, read_bytes, read_json, write_text
from emulus.tokenizer.vocabulary import NAME

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where text is split before merging: Qwen's pattern, every digit by itself.

Source: baaivision/Emu3, emu3/mllm/tokenization_emu3.py.
"""

TOKENIZERS_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tokenizer.tiktoken"
EMU3_FILE = "emu3.tiktoken"
"""What released checkpoints call their text vocabulary."""
_FIRST_SPECIAL = "<|endoftext|>"
_BYTES = 256
_PIECE = 1 << 16
"""Characters, about, that are encoded together: how much memory encoding takes does not depend on the text's length."""
MOST_TOGETHER = 500_000
"""Most characters in a row without a place where a text may be cut. Libraries give up at a million, without an error
that could be caught."""
MOST_UNCUT = 1 << 22
"""Most characters of a text for a tokenizer.json that splits in another way than :data:`PATTERN`: it is not cut."""

# Where PATTERN always has one match end and another begin, and the part before ends in the same matches by itself:
# between what is no blank and a space; after a digit; between a line's end and a character of the next line; between a
# character of Chinese or Japanese and its punctuation.
_CUT = re.compile(
    r"(?<=\S)(?= )|(?<=[0-9])|(?<=\n)(?=[!-~])|(?<=[\u4e00-\u9fa5\u3041-\u3093\u30a1-\u30f4])(?=[。，、；：？！])"
)
# Combining marks are no letters, digits, blanks or ASCII; so a long row of them is in one of these.
_MARKS = re.compile(r"[^\w\s\x00-\x7f]{31,}")
# Marks of class 0 that stand for two others.
_DOUBLE_MARKS = "\u0f73\u0f75\u0f81"
# What a text vocabulary must give back: letters of both cases, blanks, digits, signs, and other alphabets.
_PROBE = "a \n\tAa Zz 0123456789.,'s!?\\<|x|>\r\n\n  \u00e9\u00df\u0416\u65e5\u672c\u0e01\u0e33\U0001f600 \x00\x7f end "

_BYTES_MISSING = "some single bytes have no id, so some texts could not be written; give a byte-level vocabulary"


class TextTokenizer:
    """Byte-level BPE: any text has ids, and any ids are some text.

    Text is NFC-normalised first. No string is special here: ``"<|image start|>"`` in a text is text, unless
    the caller passes the table of specials that this text may hold.

    Make one with :meth:`train` or :meth:`from_file`.

    Attributes:
        size: How many ids there are; they are ``0 .. size - 1``.
    """

    def __init__(self, backend: _TokenizersBackend | _TiktokenBackend) -> None:
        self._backend = backend
        self._pieces = backend.pieces()
        self._ids_of_bytes = {piece: id for id, piece in enumerate(self._pieces) if len(piece) == 1}
        if len(self._ids_of_bytes) < _BYTES:
            raise EmulusError(_BYTES_MISSING)
        self.size = len(self._pieces)

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of every id, in order."""
        return self._pieces

    def encode(self, text: str, *, allow_special: Mapping[str, int] | None = None) -> list[int]:
        """Turn text into ids.

        Args:
            text: Any text.
            allow_special: Surface strings that become one id each, e.g. ``vocabulary.special_names``. Only
                for text that the program itself wrote: whoever writes it can open and close pictures.

        Returns:
            Ids below :attr:`size`, and those of ``allow_special`` where its strings stand.

        Raises:
            EmulusError: The text holds half of a surrogate pair, which no encoding can write; or more than
                :data:`MOST_TOGETHER` characters in a row without a space, line end, digit or the like.
        """
        text = nfc(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EmulusError(
                f"the text holds half of a surrogate pair at character {error.start}; "
                "it was cut inside a character: read it again from its source"
            ) from None
        if allow_special is None:
            return self._encode(text)
        ids: list[int] = []
        plain_start = 0
        for match in NAME.finditer(text):
            special = allow_special.get(match[0])
            if special is not None:
                ids += [*self._encode(text[plain_start : match.start()]), special]
                plain_start = match.end()
        return ids + self._encode(text[plain_start:])

    def _encode(self, text: str) -> list[int]:
        if len(text) <= _PIECE:
            return _guarded(self._backend.encode, text)
        if not self._backend.may_be_cut:
            if len(text) > MOST_UNCUT:
                raise EmulusError(
                    f"a text of {len(text):,} characters is too long for this text tokenizer, which takes at most "
                    f"{MOST_UNCUT:,} at once; split it into several"
                )
            return _guarded(self._backend.encode, text)
        ids: list[int] = []
        for piece in _pieces_of(text):
            ids += _guarded(self._backend.encode, piece)
        return ids

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest piece: a text of more than this many times ``n`` bytes has more than ``n`` ids."""
        return max(map(len, self._pieces))

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text.

        Args:
            ids: Ids below :attr:`size`.

        Returns:
            The text; bytes that are no UTF-8, as in a text cut inside a letter, become U+FFFD.

        Raises:
            EmulusError: An id is not a text id.
        """
        for position, id in enumerate(ids):
            if not 0 <= id < self.size:
                raise EmulusError(
                    f"id {id} at position {position} is not a text id (0 to {self.size - 1}); "
                    "take media out of the ids first with Grammar.parse"
                )
        return b"".join(self._pieces[id] for id in ids).decode("utf-8", errors="replace")

    def id_of_char(self, character: str) -> int:
        """The id of one ASCII character by itself.

        Raises:
            EmulusError: It is not one ASCII character.
        """
        if len(character) != 1 or not character.isascii():
            raise EmulusError(f"{character!r} is not one ASCII character; only those are sure to have an id")
        return self._ids_of_bytes[character.encode()]

    @classmethod
    def train(cls, texts: Iterable[str], *, size: int) -> TextTokenizer:
        """Learn a vocabulary; the same texts in the same order give the same one.

        Args:
            texts: What to learn from.
            size: How many ids, at least 256. Few texts can give fewer: see the result's :attr:`size`.

        Raises:
            EmulusError: The size has no room for all bytes.
        """
        if size < _BYTES:
            raise EmulusError(f"a text vocabulary of {size} ids has no room for all bytes; ask for {_BYTES} or more")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _splitter()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(_TokenizersBackend(tokenizer))

    @classmethod
    def from_file(cls, path: Path) -> TextTokenizer:
        """Read a vocabulary: a ``.json`` file of the `tokenizers` library, or a ``.tiktoken`` file.

        Args:
            path: The file, or a folder that :meth:`save` wrote to, or a released checkpoint's.

        Raises:
            EmulusError: The file is missing, damaged or not byte-level BPE.
        """
        path = Path(path)
        if path.is_dir():
            files = (path / name for name in (TOKENIZERS_FILE, TIKTOKEN_FILE, EMU3_FILE))
            path = next((file for file in files if file.is_file()), path)
        if not path.is_file():
            raise EmulusError(f"no text vocabulary at {path}; give a {TOKENIZERS_FILE} or a .tiktoken file")
        if path.suffix not in (".json", ".tiktoken"):
            raise EmulusError(f"{path} is neither .json nor .tiktoken; give a file of one of these kinds")
        backend = _TokenizersBackend if path.suffix == ".json" else _TiktokenBackend
        try:
            return cls(backend.read(path))
        except EmulusError as error:
            raise EmulusError(f"{path}: {error}") from error

    @classmethod
    def from_pieces(cls, pieces: Sequence[bytes]) -> TextTokenizer:
        """Make a vocabulary of the bytes of its ids: the lowest ids merge first.

        Raises:
            EmulusError: A single byte has no id, or a piece has two.
        """
        if len(set(pieces)) < len(pieces):
            raise EmulusError("two text ids have the same bytes; give a vocabulary that says everything once")
        return cls(_TiktokenBackend(list(pieces)))

    @classmethod
    def from_transformers(cls, path: Path) -> TextTokenizer:
        """Read the ranks of a transformers Emu3's ``tokenizer.json``, without its way of splitting text.

        There, specials follow the text pieces in one table, and text is split by GPT-2's pattern without NFC, which
        gives other ids than the model was trained with. Here it is split as released.

        Args:
            path: The file.

        Raises:
            EmulusError: The file is missing, damaged or not byte-level BPE with Emu3's specials after it.
        """
        ids = transformers_ids(path)
        size = ids[_FIRST_SPECIAL]
        try:
            return cls.from_pieces(_pieces({id: name for name, id in ids.items() if id < size}))
        except EmulusError as error:
            raise EmulusError(f"{path}: {error}") from error

    def save_tiktoken(self, path: Path) -> None:
        """Write the vocabulary as lines of ``base64(piece) rank``, atomically.

        Raises:
            EmulusError: The disk is full or the place may not be written to.
        """
        lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(self._pieces))
        write_text(path, "".join(lines))

    def save(self, folder: Path) -> Path:
        """Write the vocabulary into a folder, atomically.

        Returns:
            The file written: ``tokenizer.json`` or ``tokenizer.tiktoken``, whichever kind this is.
        """
        if isinstance(self._backend, _TokenizersBackend):
            return self._backend.save(Path(folder))
        path = Path(folder) / TIKTOKEN_FILE
        self.save_tiktoken(path)
        return path


class _TokenizersBackend:
    """A vocabulary of the `tokenizers` library. It must have no added tokens: user text could reach those."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        splitter = tokenizer.pre_tokenizer
        self.may_be_cut = splitter is not None and splitter.__getstate__() == _splitter().__getstate__()

    @classmethod
    def read(cls, path: Path) -> _TokenizersBackend:
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise EmulusError("this is no file of the tokenizers library; give its tokenizer.json")
        _check_normalizer(values.get("normalizer"))
        # Text must have its own ids, all of them, and the same ones every time.
        changes: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain = json.dumps(values | changes | {"model": values["model"] | {"dropout": None}})
        try:
            backend = cls(Tokenizer.from_str(plain))
        except Exception as error:  # the library raises nothing more specific
            raise EmulusError(f"the tokenizers library cannot read it ({error}); restore it") from error
        backend._probe()
        return backend

    def _probe(self) -> None:
        """Refuse what does not give a text back as it was, such as one that makes letters small."""
        pieces = self.pieces()
        ids = _guarded(self.encode, _PROBE)
        if b"".join(pieces[id] for id in ids).decode("utf-8", errors="replace") != _PROBE:
            raise EmulusError(
                "it changes texts (in its pre_tokenizer, or byte-level BPE is not its model); give another"
            )

    def pieces(self) -> list[bytes]:
        return _pieces({id: name for name, id in self._tokenizer.get_vocab(with_added_tokens=False).items()})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def save(self, folder: Path) -> Path:
        path = folder / TOKENIZERS_FILE
        write_text(path, self._tokenizer.to_str(pretty=True))
        return path


class _TiktokenBackend:
    """A released vocabulary: lines of ``base64(piece) rank``, the rank being the id."""

    may_be_cut = True

    def __init__(self, pieces: list[bytes]) -> None:
        if len({piece for piece in pieces if len(piece) == 1}) < _BYTES:
            raise EmulusError(_BYTES_MISSING)
        self._pieces = pieces
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self._encoding = tiktoken.Encoding("emulus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def read(cls, path: Path) -> _TiktokenBackend:
        piece_of: dict[int, bytes] = {}
        content = read_bytes(path, most=MAX_TEXT_VOCABULARY_BYTES)
        lines = [entry for entry in enumerate(content.splitlines(), start=1) if entry[1].strip()]
        for number, line in lines:
            try:
                piece, rank = line.split()
                piece_of[int(rank)] = base64.b64decode(piece, validate=True)
            except ValueError:  # binascii.Error is one too
                raise EmulusError(f"line {number} is not 'base64(piece) rank'; restore the file") from None
        pieces = [piece_of.get(rank, b"") for rank in range(len(lines))]
        # A piece merges by its rank, and every id must mean one piece: so no gap, no rank and no piece twice.
        if not all(pieces) or len(set(pieces)) < len(pieces):
            raise EmulusError(f"its {len(lines)} ranks are not 0, 1, 2, ... once each; restore the file")
        return cls(pieces)

    def pieces(self) -> list[bytes]:
        return self._pieces

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)


def nfc(text: str) -> str:
    """Normalise text to Unicode's NFC, in a time that grows as its length.

    The standard library's own takes the square of the number of combining marks in a row, and lets no other thread run
    meanwhile.
    """
    if text.isascii():
        return text
    # Marks of one letter may be put in order first: that is a part of what NFC does, and the slow part.
    return unicodedata.normalize("NFC", _MARKS.sub(lambda match: _in_order(match[0]), text))


def _in_order(marks: str) -> str:
    """Combining marks as NFD has them; what else is there stays as and where it is."""
    result: list[str] = []
    row: list[str] = []
    for character in marks:
        if unicodedata.combining(character) or character in _DOUBLE_MARKS:
            row += unicodedata.normalize("NFD", character)
        else:
            result += [*sorted(row, key=unicodedata.combining), character]
            row = []
    return "".join(result + sorted(row, key=unicodedata.combining))


def _pieces_of(text: str) -> Iterator[str]:
    """A text in pieces that have the same ids by themselves, each as short as may be from some length on."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _PIECE) if start + _PIECE < len(text) else None
        stop = cut.start() if cut else len(text)
        if stop - start > MOST_TOGETHER:
            # All but the first part of such a piece holds no place to cut at.
            raise EmulusError(
                f"the text has {stop - start - _PIECE:,} characters in a row, from character {start + _PIECE:,} on, "
                f"without a space, line end, digit or the like; at most {MOST_TOGETHER:,} can be encoded: is it text?"
            )
        yield text[start:stop]
        start = stop


def _guarded(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text, or one line if the library gives up on it.

    Both libraries are written in Rust, whose panics are not of the kind ``Exception``.
    """
    try:
        return encode(text)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise EmulusError(
            f"the text tokenizer gave up on a text of {len(text):,} characters ({reason}); shorten it, or use another "
            "text vocabulary"
        ) from None


def _splitter() -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _check_normalizer(normalizer: object) -> None:
    """Texts are normalised to NFC before; nothing else may happen to them."""
    parts = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        parts = normalizer.get("normalizers") or []
    for part in parts if isinstance(parts, list) else [parts]:
        if part is not None and not (isinstance(part, dict) and part.get("type") == "NFC"):
            kind = part.get("type") if isinstance(part, dict) else part
            raise EmulusError(f"its normalizer {str(kind)[:40]!r} changes texts; only NFC, or none, can be used")


def transformers_ids(path: Path) -> dict[str, int]:
    """Every token of a transformers Emu3's ``tokenizer.json``, text pieces and specials, as it spells them.

    Raises:
        EmulusError: The file is missing or damaged, or has not Emu3's specials.
    """
    values = read_json(path)
    model = values.get("model") if isinstance(values, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    added = values.get("added_tokens") if isinstance(values, dict) else None
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            ids[token["content"]] = token.get("id")
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids.values()):
        raise EmulusError(f"{path}: its ids are not all whole numbers; restore the file")
    if _FIRST_SPECIAL not in ids:
        raise EmulusError(f"{path}: it has no {_FIRST_SPECIAL}, so it is not Emu3's; restore the file")
    return ids


def _pieces(names: Mapping[int, str]) -> list[bytes]:
    """The bytes of every id of a tokenizer.json, given how it writes them."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    try:
        return [bytes(byte_of[letter] for letter in names[id]) for id in range(len(names))]
    except KeyError as error:
        raise EmulusError(
            f"it is not byte-level with ids 0, 1, 2, ... ({error} is unknown); give a file that is"
        ) from None


def byte_letters() -> list[str]:
    """The letter that writes each byte in a tokenizer.json: itself if printable, else one from U+0100 on.

    Source: GPT-2's ``bytes_to_unicode``.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(_BYTES) if byte not in printable)
    stand_in = {byte: chr(_BYTES + index) for index, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(_BYTES)]
