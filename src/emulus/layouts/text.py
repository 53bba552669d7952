"""text pieces and special names -> the tokenizer files of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emulus.errors import EmulusError
from emulus.files import write_json
from emulus.layouts.vocabulary import PLACEHOLDER, ROLE_NAMES, whole_map
from emulus.tokenizer.text import PATTERN, TOKENIZERS_FILE, byte_letters

# What Emu3Processor asks its tokenizer for.
_PROCESSOR_TOKENS = {
    "image_token": PLACEHOLDER,
    "boi_token": ROLE_NAMES["boi"],
    "eoi_token": ROLE_NAMES["eoi"],
    "image_wrapper_token": ROLE_NAMES["img"],
    "eof_token": ROLE_NAMES["eof"],
}


def spelling(pieces: Sequence[bytes]) -> list[str]:
    """Text pieces as a tokenizer.json spells them."""
    letters = byte_letters()
    return ["".join(letters[byte] for byte in piece) for piece in pieces]


def write_tokenizer(pieces: Sequence[bytes], names: Sequence[str], folder: Path) -> None:
    """Write ``tokenizer.json`` and the small files about it.

    Its class is the plain one, which does as the file says: NFC and Qwen's pattern, so that transformers gives the
    released ids. (The class that the port asks for, GPT-2's, would put its own splitting in their place.)

    Args:
        pieces: The bytes of every text id.
        names: Those of the ids after them.
        folder: Where.

    Raises:
        EmulusError: A text piece is not made of two earlier ones, or is spelt like a special token.
    """
    ids = whole_map(spelling(pieces), names)
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in ids.items() if id >= len(pieces)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_letters]},
        "post_processor": None,
        "decoder": to_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [spelling(pair) for pair in merges(pieces)],
        },
    }
    ends: dict[str, Any] = {f"{role}_token": ROLE_NAMES[role] for role in ("bos", "eos", "pad")}
    ends["unk_token"] = ROLE_NAMES["pad"]
    write_json(folder / TOKENIZERS_FILE, tokenizer)
    write_json(folder / "special_tokens_map.json", {**ends, **_PROCESSOR_TOKENS})
    write_json(
        folder / "tokenizer_config.json",
        {
            **ends,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": _PROCESSOR_TOKENS,
            "model_max_length": int(1e30),
            "padding_side": "left",
            "processor_class": "Emu3Processor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def merges(pieces: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The two pieces that make each piece of more than one byte, in the order in which they are merged.

    Raises:
        EmulusError: A piece is not made so.
    """
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    pairs = []
    for rank, piece in enumerate(pieces):
        if len(piece) == 1:
            continue
        parts = [piece[place : place + 1] for place in range(len(piece))]
        while len(parts) > 2:
            options = [(ranks.get(parts[place] + parts[place + 1], rank), place) for place in range(len(parts) - 1)]
            best, place = min(options)
            if best >= rank:
                raise EmulusError(f"its text piece {rank} is not made of two earlier ones, as merges must be")
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs
