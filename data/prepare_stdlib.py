"""Tokenise the Python standard library that is running: about 11 MB of real code and prose.

    python data/prepare_stdlib.py [--vocab-size 2048] [--train-fraction 1] [--held-out] [--out DIR]

It needs no network, and train_gpt.py does it by itself if DATA_PATH is data/stdlib and missing. One
file is one document. Left out are tests, which many installations lack, encodings/, whose tables a
script generated, and what isn't UTF-8.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.corpora import prepare_stdlib
from nanojepa.files import one_line_errors, quoted, script_parser, shown


@one_line_errors()
def main(argv=None):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "--out",
        default=Path(__file__).with_name("stdlib"),
        help="folder to make (default: data/stdlib)",
    )
    add(
        "--vocab-size",
        type=int,
        default=2048,
        help="tokens of the BPE that is trained, the document marker included (default: 2048)",
    )
    add(
        "--train-fraction",
        type=float,
        default=1.0,
        help="use only this share of the training documents, chosen by hash (default: 1)",
    )
    add(
        "--held-out",
        action="store_true",
        help="validate on training documents outside that share: for choosing settings",
    )
    args = parser.parse_args(argv)
    prepare_stdlib(args.out, args.vocab_size, args.train_fraction, args.held_out)
    print(f"prepared {shown(args.out)}: train on it with DATA_PATH={quoted(args.out)}")


if __name__ == "__main__":
    main()
