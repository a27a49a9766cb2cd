"""Tokenise any text: text files, JSON lines, tables, or a Hugging Face dataset.

    python data/prepare_text.py --source book.txt --tokenizer r50k_base --out data/book
    python data/prepare_text.py --source books --vocab-size 4096 --out data/books
    python data/prepare_text.py --source pages.jsonl --field text --vocab-size 4096 --out data/pages
    python data/prepare_text.py --source HuggingFaceFW/fineweb --name sample-10BT \\
        --documents 2000000 --vocab-size 4096 --out data/fineweb_bpe4096

Then train with DATA_PATH=<the --out folder>. A text file is one document, or several with
--separator; so is each .txt file in a folder and the folders in it. Of .jsonl, .ndjson, .jsonlines,
.json, .csv, .tsv and .parquet each row is a document. All but .parquet may end in .gz or .zst.

The tokenizer is a tiktoken name of at most 65,536 tokens, a file of ranks, which is read with
GPT-2's split pattern, or, with --vocab-size, BPE trained on the training documents. The val split
is made of whole documents; of a single document it is the last tenth.
"""

import functools
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import one_line_errors, quoted, script_parser, shown
from nanojepa.readers import Rows, kind_of, open_dataset, open_rows, read_text
from nanojepa.shards import prepare

TABLES = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".parquet")


def file_documents(paths, separator):
    """Yield the documents of text files: each of them, or its parts if there is a separator."""
    for path in paths:
        text = read_text(path)
        parts = text.split(separator) if separator else [text]
        yield from (part for part in parts if part.strip() or (part and not separator))


def row_documents(rows, path, field):
    """Yield the text in a field of every one of these Rows; path: where they are from."""
    for number, raw in rows.items:
        try:
            text = rows.parse(raw)[field]
            if text is None:  # a table's empty cell
                continue
            if not isinstance(text, str):
                raise TypeError("it holds something else")
            text.encode()  # half a surrogate pair has no UTF-8 form
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: no row with a text in the field {field!r} "
                f"({error}); choose --field, or mend the line"
            ) from None
        if text:
            yield text


def texts_in(folder):
    """The .txt files of a folder and the folders in it; none if it holds a data set."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    if any(kind_of(path) in (*TABLES, ".arrow") for path in files):
        return []
    return [path for path in files if kind_of(path) == ".txt"]


def find_documents(args):
    """A function that returns a fresh iterator over the documents of the source."""
    path = Path(args.source)
    if path.is_file() and kind_of(path) in TABLES:
        return lambda: row_documents(open_rows(path), path, args.field)
    if paths := [path] if path.is_file() else texts_in(path):
        if path.is_dir():
            print(f"{path}: {len(paths):,} text files", file=sys.stderr)
        return functools.partial(file_documents, paths, args.separator)
    dataset = open_dataset(args.source, args.name, args.split)
    if args.field not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"--field {args.field}: {args.source} has the columns {columns}")
    rows = dataset.select_columns([args.field])
    return lambda: row_documents(Rows(enumerate(rows, 1), dict), args.source, args.field)


def parse_args(argv):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="a text file, a folder of them, a file of rows, or a Hugging Face dataset",
    )
    add("--out", required=True, help="folder to make")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", help="tiktoken name or file of ranks")
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        help="train BPE of this size, the document marker included; at most 65536",
    )
    add("--field", default="text", help="field or column that holds the text (default: text)")
    add("--separator", help="text between the documents of a text file, e.g. '<|endoftext|>'")
    add("--name", help="configuration of a Hugging Face dataset")
    add("--split", default="", help="split of a Hugging Face dataset (default: train)")
    add("--documents", type=int, help="use only so many documents, the first ones")
    add(
        "--val-fraction",
        type=float,
        default=0.05,
        help="share of the documents in the val split (default: 0.05)",
    )
    add("--licence", default="unknown", help="noted in meta.json")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val-fraction {args.val_fraction}: must lie between 0 and 1")
    documents = find_documents(args)
    out = prepare(
        args.out,
        Path(args.source).stem,
        lambda: itertools.islice(documents(), args.documents),
        source=args.source,
        licence=args.licence,
        val_fraction=args.val_fraction,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
    )
    print(f"prepared {shown(out)}: train on it with DATA_PATH={quoted(out)}")


if __name__ == "__main__":
    main()
