"""The tokens of shards that others made: by tiktoken, a tokenizer.json, or a SentencePiece model.

What is needed of them is the text that each token stands for, and how many bytes that is.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanojepa.files import one_line
from nanojepa.tokenizer import load_tokenizer, token_bytes

BLANK = "\u2581"  # how SentencePiece writes a blank
BYTE = re.compile("<0x([0-9A-F]{2})>")
MARKERS = ("<s>", "<bos>", "<|endoftext|>", "<|begin_of_text|>", "<|startoftext|>")


class Vocabulary(NamedTuple):
    """encode(text): its tokens. table: the bytes of each token, b"" of one that is no text.

    prefixed (V,) bool: the tokens that begin with a blank, if encode() puts a blank before every
    text; otherwise None. Where a document begins, that blank is no byte of the text. marker: the
    token before a document, or None.
    """

    encode: Callable
    table: list
    prefixed: np.ndarray | None = None
    marker: int | None = None


def load_vocabulary(name):
    """The Vocabulary of a tokenizer.json, a SentencePiece .model, or what load_tokenizer() takes.

    ValueError says why there is none.
    """
    ending = Path(name).suffix if os.path.isfile(name) else ""
    if ending not in (".json", ".model"):
        encoding = load_tokenizer(name)
        return Vocabulary(encoding.encode_ordinary, token_bytes(encoding))
    try:
        return read_sentencepiece(name) if ending == ".model" else read_tokenizer_json(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install {error.name}") from None
    except Exception as error:  # of many kinds, as the libraries' own
        raise ValueError(f"{name}: no tokenizer that can be read ({one_line(error)})") from None


def read_sentencepiece(path):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    table = []
    for token in range(model.vocab_size()):
        is_text = not (model.is_control(token) or model.is_unknown(token) or model.is_unused(token))
        table.append(bytes_of_piece(model.id_to_piece(token)) if is_text else b"")
    marker = model.bos_id() if model.bos_id() >= 0 else None
    return complete(model.encode, table, marker)


def read_tokenizer_json(path):
    """The text of a token depends on its kind: GPT-2's characters for bytes, or SentencePiece's."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    form = tokenizer.to_str()
    if '"type":"ByteLevel"' in form:
        spell = bytes_of_characters
    elif BLANK in form:
        spell = bytes_of_piece
    else:
        raise ValueError("neither byte-level nor SentencePiece's, so the bytes are unknown")
    added, names = tokenizer.get_added_tokens_decoder(), tokenizer.get_vocab()
    table = [b""] * (1 + max(names.values()))
    for name, token in names.items():
        if token not in added:
            table[token] = spell(name)
        elif not added[token].special:
            table[token] = added[token].content.encode()
    marker = next((names[name] for name in MARKERS if name in names), None)
    return complete(
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids, table, marker
    )


def complete(encode, table, marker):
    """The Vocabulary, after a look at what encode() puts before a text."""
    prefixed = None
    if table[encode("a")[0]].startswith(b" "):
        prefixed = np.array([token.startswith(b" ") for token in table])
    return Vocabulary(encode, table, prefixed, marker)


def bytes_of_piece(piece):
    """The bytes of a SentencePiece: a blank is one byte, as in the text."""
    byte = BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(BLANK, " ").encode()


def bytes_of_characters(token):
    """The bytes of a byte-level token, which GPT-2's alphabet writes as a character each."""
    return bytes(BYTES[character] for character in token)


def byte_alphabet():
    """{character: byte} of GPT-2: printable bytes are themselves, the others follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = byte_alphabet()
