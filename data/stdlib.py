"""The embedded corpus: the Python standard library that is running, about 11 MB of real code and prose.

    python data/stdlib.py [--vocab-size 2048] [--train-fraction 1] [--held-out] [--out data/stdlib]

Needs no network. Left out: tests, which many installations lack; encodings/, tables a script generated;
whatever is not UTF-8. One file is one document. train_gpt.py runs this by itself where it finds no data.
"""
import argparse
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import prepare

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


def documents():
    """Every source file of the standard library as str, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not SKIP.intersection(path.relative_to(root).parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                yield text


def prepare_default(out="data/stdlib", vocab_size=2048, **subset):
    """Prepare the corpus in folder `out` with a BPE vocabulary of `vocab_size`, the document marker included; subset: as shards.prepare."""
    return prepare(out, "stdlib", documents, vocab_size=vocab_size, val_fraction=0.05, **subset,
                   source=f"the standard library of Python {platform.python_version()}", licence="PSF-2.0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/stdlib", help="folder to make")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, the document marker included; at most 65536")
    parser.add_argument("--train-fraction", type=float, default=1.0, help="use only this share of the training documents, chosen by hash, e.g. 0.05")
    parser.add_argument("--held-out", action="store_true", help="validate on training documents outside that share: for choosing settings")
    args = parser.parse_args()
    if not 0 < args.train_fraction <= 1:
        raise SystemExit(f"error: --train-fraction {args.train_fraction}: must lie above 0 and at most at 1")
    print("prepared", prepare_default(args.out, args.vocab_size, train_fraction=args.train_fraction, held_out=args.held_out))
