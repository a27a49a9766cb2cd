"""Token shards from any text: a text file, JSON lines, or a Hugging Face dataset.

    python data/text.py --source book.txt --tokenizer r50k_base --out data/book
    python data/text.py --source pages.jsonl --field text --vocab-size 4096 --out data/pages
    python data/text.py --source HuggingFaceFW/fineweb --name sample-10BT --documents 2000000 --vocab-size 4096 --out data/fineweb_bpe4096

Then train with DATA_PATH=<the --out folder>. A text file is one document, or several with --separator. The tokenizer
is a tiktoken name of at most 65,536 tokens, a file of ranks (read with GPT-2's split pattern), or, with --vocab-size,
BPE trained on the training documents. The val split is made of whole documents; of a single document it is the last tenth.
"""
import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import json_lines, prepare


def text_file(path, separator):
    """A function that returns an iterator over the documents of a text file, split at separator where one is given."""
    try:
        text = Path(path).read_bytes().decode("utf-8")  # not read_text: it would change line ends, and the bytes with them
    except UnicodeDecodeError as e:
        raise SystemExit(f"error: {path}, byte {e.start}: not UTF-8; convert it first") from None
    parts = [part for part in text.split(separator) if part.strip()] if separator else [text] if text else []
    return lambda: iter(parts)


def field_of(path, field):
    """A function that returns an iterator over one field of a JSON-lines file; SystemExit names the line that is wrong."""
    def documents():
        for number, load in json_lines(path):
            try:
                text = load()[field]
                if isinstance(text, str):
                    text.encode()  # half a surrogate pair has no UTF-8 form
            except (ValueError, KeyError, TypeError) as e:
                raise SystemExit(f"error: {path}, line {number}: no JSON object with the field {field!r} ({e}); choose --field") from None
            if not isinstance(text, str):
                raise SystemExit(f"error: {path}, line {number}: field {field!r} is not a text; choose --field")
            if text:
                yield text
    return documents


def hub_dataset(source, name, split, field):
    """A function that returns an iterator over one column of a Hugging Face dataset, downloaded once into its cache."""
    from datasets import load_dataset
    try:
        dataset = load_dataset(source, name, split=split)
    except Exception as e:  # datasets raises many kinds: no such repository, configuration, split, network
        raise SystemExit(f"error: --source {source}: neither a file nor a dataset that can be loaded ({' '.join(str(e).split())[:300]})") from None
    if field not in dataset.column_names:
        raise SystemExit(f"error: --field {field}: {source} has the columns {', '.join(dataset.column_names)}")
    dataset = dataset.select_columns([field])
    return lambda: (row[field] for row in dataset if row[field])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a text file, a .jsonl or .json file of one object a line, or a Hugging Face dataset")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--tokenizer", help="tiktoken name or file of ranks")
    parser.add_argument("--vocab-size", type=int, help="train BPE of this size instead, the document marker included; at most 65536")
    parser.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--separator", help="text between the documents of a text file, e.g. '<|endoftext|>'")
    parser.add_argument("--name", help="configuration of a Hugging Face dataset")
    parser.add_argument("--split", default="train", help="split of a Hugging Face dataset (default: train)")
    parser.add_argument("--documents", type=int, help="use only so many documents, the first ones")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of the documents in the val split (default: 0.05)")
    parser.add_argument("--licence", default="unknown", help="noted in meta.json")
    args = parser.parse_args(argv)
    if (args.tokenizer is None) == (args.vocab_size is None):
        raise SystemExit("error: give either --tokenizer or --vocab-size")
    if not 0 < args.val_fraction < 1:
        raise SystemExit(f"error: --val-fraction {args.val_fraction}: must lie between 0 and 1")
    if not Path(args.source).is_file():
        documents = hub_dataset(args.source, args.name, args.split, args.field)
    elif Path(args.source).suffix in (".jsonl", ".json"):
        documents = field_of(args.source, args.field)
    else:
        documents = text_file(args.source, args.separator)
    chosen = documents if args.documents is None else lambda: itertools.islice(documents(), args.documents)
    out = prepare(args.out, Path(args.source).stem, chosen, source=args.source, licence=args.licence,
                  val_fraction=args.val_fraction, vocab_size=args.vocab_size, tokenizer=args.tokenizer)
    print(f"prepared {out}: train on it with DATA_PATH={out}")


if __name__ == "__main__":
    main()
