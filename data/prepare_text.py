"""Tokenise any text: a text file, JSON lines, or a Hugging Face dataset.

    python data/prepare_text.py --source book.txt --tokenizer r50k_base --out data/book
    python data/prepare_text.py --source pages.jsonl --field text --vocab-size 4096 --out data/pages
    python data/prepare_text.py --source HuggingFaceFW/fineweb --name sample-10BT \\
        --documents 2000000 --vocab-size 4096 --out data/fineweb_bpe4096

Then train with DATA_PATH=<the --out folder>. A text file is one document, or several with
--separator. The tokenizer is a tiktoken name of at most 65,536 tokens, a file of ranks, which is
read with GPT-2's split pattern, or, with --vocab-size, BPE trained on the training documents. The
val split is made of whole documents; of a single document it is the last tenth.
"""

import functools
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import numbered_lines, one_line_errors, parse_line, script_parser
from nanojepa.records import open_dataset
from nanojepa.shards import prepare


def file_documents(path, separator):
    """Yield the documents of a text file: all of it, or its parts if there is a separator."""
    try:
        # read_text would change line ends, and the bytes with them.
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: not UTF-8; convert it first") from None
    if separator:
        yield from (part for part in text.split(separator) if part.strip())
    elif text:
        yield text


def line_documents(path, field):
    """Yield the text in a field of every line of a JSON-lines file."""
    for number, line in numbered_lines(path):
        try:
            text = parse_line(line)[field]
            if not isinstance(text, str):
                raise TypeError("it holds something else")
            text.encode()  # half a surrogate pair has no UTF-8 form
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: no JSON object with a text in the field {field!r} "
                f"({error}); choose --field, or mend the line"
            ) from None
        if text:
            yield text


def find_documents(args):
    """A function that returns a fresh iterator over the documents of the source."""
    path = Path(args.source)
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return functools.partial(line_documents, path, args.field)
    if path.is_file():
        return functools.partial(file_documents, path, args.separator)
    dataset = open_dataset(args.source, args.name, args.split)
    if args.field not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"--field {args.field}: {args.source} has the columns {columns}")
    rows = dataset.select_columns([args.field])
    return lambda: (row[args.field] for row in rows if row[args.field])


def parse_args(argv):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="a text file, a .jsonl or .json file of one object a line, or a Hugging Face dataset",
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
    add("--split", default="train", help="split of a Hugging Face dataset (default: train)")
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
    print(f"prepared {out}: train on it with DATA_PATH={out}")


if __name__ == "__main__":
    main()
