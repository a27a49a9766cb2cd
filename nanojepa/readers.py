"""Rows of files and data sets, as people have them.

A file holds JSON lines (.jsonl, .ndjson, .jsonlines, or any other name), a JSON array, a table with
named columns (.csv, .tsv, .parquet), or text (.txt); each but .parquet also as .gz or .zst. A data
set is one of Hugging Face, on the hub or in a folder.
"""

import csv
import gzip
import io
import itertools
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanojepa.files import one_line

LINE_BYTES = 100_000_000  # the longest line that is read
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
# Which split of a data set is taken if none is named: the first of these, or the only one.
TRAIN = ("train",)
TEST = ("test", "validation", "valid", "val", "dev", "eval")


class Rows(NamedTuple):
    """items: pairs (number, raw row). The number is the line's, or the row's in a Parquet file.

    parse(raw): the row, whose columns are the keys of a dict; ValueError if it is none.
    """

    items: Iterator
    parse: Callable


def open_rows(path):
    """The Rows of a file; ValueError names the file and the line that can't be read."""
    kind = kind_of(path)
    if kind == ".parquet":
        return Rows(parquet_rows(path), dict)
    if kind in (".csv", ".tsv"):
        return Rows(table_rows(path, "\t" if kind == ".tsv" else ","), dict)
    if first_byte(path) == b"[":
        return Rows(array_items(path), dict_of)
    return Rows(numbered_lines(path), lambda line: dict_of(parse_line(line)))


def kind_of(path):
    """The ending of a file's name in lower case, without .gz or .zst."""
    path = Path(path)
    if path.suffix.lower() in (".gz", ".zst"):
        path = path.with_suffix("")
    return path.suffix.lower()


def dict_of(row):
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return row


# ---- bytes and text


def open_bytes(path):
    """A file, decompressed, as a buffered binary stream."""
    ending = Path(path).suffix.lower()
    if ending == ".gz":
        return io.BufferedReader(gzip.open(path))
    if ending == ".zst":
        import pyarrow  # comes with datasets

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def first_byte(path):
    """The first character of a file that is no white space, in UTF-8; b"" if there is none."""
    for _, line in numbered_lines(path):
        if text := line.decode("utf-8-sig", errors="replace").strip():
            return text[0].encode()
    return b""


def byte_lines(path):
    """Yield the lines of a file as UTF-8 with their ends; no more than LINE_BYTES and one of each.

    ValueError if the file is damaged, or not the text that its byte order mark promises.
    """
    number = 1
    try:
        with open_bytes(path) as file:
            if file.peek(2)[:2] in BYTE_ORDER_MARKS:
                text = io.TextIOWrapper(file, encoding="utf-16", newline="\n")
                file = io.BufferedReader(Recoded(text))
            for number in itertools.count(1):  # noqa: B007, the errors name it
                line = rest = file.readline(LINE_BYTES + 1)
                if not line:
                    return
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(2**16)
                yield line
    except UnicodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-16 ({one_line(error)})") from None
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.filename:
            raise  # there is no such file, or it may not be read
        raise ValueError(f"{path}, line {number}: damaged ({one_line(error)})") from None


class Recoded(io.RawIOBase):
    """A text stream as UTF-8."""

    def __init__(self, text):
        self.text, self.rest = text, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        self.rest = self.rest or self.text.read(2**16).encode()
        part, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def decode_line(line, encoding="utf-8-sig"):
    """The text of a line; ValueError if it is too long or not UTF-8."""
    if len(line.removesuffix(b"\n")) > LINE_BYTES:
        raise ValueError(f"longer than {LINE_BYTES:,} bytes")
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 at its byte {error.start + 1}; convert the file first"
        ) from None


def text_lines(path):
    """Yield the lines of a file as text, with their ends."""
    for number, line in enumerate(byte_lines(path), 1):
        try:
            yield decode_line(line, "utf-8" if number > 1 else "utf-8-sig")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def read_text(path):
    """All of a text file; its line ends stay as they are."""
    return "".join(text_lines(path))


# ---- JSON


def numbered_lines(path):
    """Yield (number, bytes) of every line of a file that isn't blank, for parse_line()."""
    for number, line in enumerate(byte_lines(path), 1):
        if line.strip() or len(line) > LINE_BYTES:
            yield number, line


def parse_line(line):
    """The JSON of a line; ValueError if it is none, or too long."""
    text = decode_line(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None


def array_items(path):
    """Yield (line on which it begins, value) of every item of a JSON array."""
    text, decoder = read_text(path), json.JSONDecoder()
    at, end = text.index("["), False
    line = 1 + text.count("\n", 0, at)
    while not end:
        begin = skip_blanks(text, at + 1)
        line += text.count("\n", at, begin)
        if text[begin : begin + 1] == "]" and text[at] == "[":
            return
        try:
            item, stop = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {line}: not JSON ({one_line(error)})") from None
        yield line, item
        at = skip_blanks(text, stop)
        line += text.count("\n", begin, at)
        end = text[at : at + 1] == "]"
        if not end and text[at : at + 1] != ",":
            raise ValueError(f"{path}, line {line}: no comma or ] after an item of the array")


def skip_blanks(text, at):
    while text[at : at + 1].isspace():
        at += 1
    return at


# ---- tables


def table_rows(path, delimiter):
    """Yield (line on which it ends, {column: text}) of every row of a table with named columns."""
    csv.field_size_limit(LINE_BYTES)
    reader = csv.reader(text_lines(path), delimiter=delimiter, strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns) or not all(columns):
            raise ValueError(f"{path}, line 1: columns need names that differ, not {columns}")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells under {len(columns)} "
                    "columns; mend it"
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; mend it") from None


def parquet_rows(path):
    """Yield (number, row) of every row of a Parquet file."""
    import pyarrow.parquet  # slow to import

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: no Parquet file ({one_line(error)})") from None


# ---- data sets


def open_dataset(source, config=None, split="", order=TRAIN, cache_dir=None, key="--split"):
    """A split of a Hugging Face dataset: from the hub, downloaded once, or from a folder.

    order: which split is taken if none is named. key: the flag that names one.
    """
    import datasets  # slow to import

    options = {"cache_dir": cache_dir or find_cache(datasets.config.HF_DATASETS_CACHE)}
    try:
        if is_saved(source):
            loaded = datasets.load_from_disk(str(source))
            if isinstance(loaded, datasets.Dataset):
                return loaded
            return loaded[choose_split(source, list(loaded), split, order, key)]
        names = datasets.get_dataset_split_names(str(source), config or None, **options)
        split = choose_split(source, names, split, order, key)
        return datasets.load_dataset(str(source), config or None, split=split, **options)
    except SplitError:
        raise
    except Exception as error:  # of many kinds: no such dataset, configuration, network
        raise ValueError(
            f"{source}: neither a file nor a dataset that can be loaded ({one_line(error)}); "
            "check its name and its configuration"
        ) from None


def find_cache(usual):
    """The folder for downloaded datasets, or a temporary one, as where the home is read-only."""
    try:
        Path(usual).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            return usual
    except OSError as error:
        place = tempfile.mkdtemp(prefix="datasets-")
        print(f"{usual}: {error.strerror}; datasets are kept in {place}", file=sys.stderr)
        return place


def is_saved(source):
    """Whether a folder is what save_to_disk() of datasets leaves."""
    return any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))


class SplitError(ValueError):
    """A data set has no such split, or leaves a choice."""


def choose_split(source, names, split, order, key):
    """The name of the split that is meant; it is said if there was a choice."""
    if split:
        base = split.partition("[")[0]  # datasets takes train[:10%] and a+b too
        if base in names or "+" in split:
            return split
        raise SplitError(f"{source} has no split {split}; {key}: one of {', '.join(names)}")
    found = [name for name in order if name in names] or (names if len(names) == 1 else [])
    if not found:
        raise SplitError(f"{source} has the splits {', '.join(names)}; choose one with {key}")
    if len(names) > 1:
        print(f"{source}: split {found[0]} of {', '.join(names)} ({key})", file=sys.stderr)
    return found[0]
