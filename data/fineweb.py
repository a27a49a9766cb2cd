"""FineWeb as GPT-2 tokens, ready-made shards of 100M tokens each from the hub (kjj0/fineweb10B-gpt2, as modded-nanogpt uses).

    python data/fineweb.py --shards 9 [--out data/fineweb10B]

Fetches the val shard and the first N train shards (103 exist, 200 MB each). A broken download goes on where it
stopped, what is there is kept, and a later call with more shards adds them.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import GPT2_PATTERN, progress, read_meta, sha256_file, token_table, write_meta, write_ranks

REPOSITORY, LAST_SHARD = "kjj0/fineweb10B-gpt2", 103


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=9, help="train shards of 100M tokens, 200 MB each (default: 9)")
    parser.add_argument("--out", default="data/fineweb10B", help="folder to make or to add to")
    args = parser.parse_args(argv)
    if not 1 <= args.shards <= LAST_SHARD:
        raise SystemExit(f"error: --shards {args.shards}: choose 1 to {LAST_SHARD}")
    from huggingface_hub import hf_hub_download
    out = Path(args.out)
    try:
        known = read_meta(out)["shards"] if (out / "meta.json").exists() else {}
    except ValueError as e:
        raise SystemExit(f"error: {str(e).rpartition('; ')[0]}; remove meta.json and run this again, which keeps the shards") from None
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{n:06d}.bin" for n in range(1, args.shards + 1)]
    for name in progress(names, len(names), "shards"):
        if not (out / name).exists():
            try:
                hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=out)
            except Exception as e:  # the hub's client raises many kinds; what is complete is kept
                raise SystemExit(f"error: {name} of {REPOSITORY} cannot be fetched ({' '.join(str(e).split())[:200]}); run this again") from None
    table = token_table("gpt2")
    write_ranks(out / "tokenizer.tiktoken", table)
    shards = {}
    for path in progress(sorted(out.glob("fineweb_*.bin")), desc="sha256"):
        shards[path.name] = known.get(path.name) or {"sha256": sha256_file(path), "tokens": (path.stat().st_size - 1024) // 2}
    write_meta(out, tokenizer={"file": "tokenizer.tiktoken", "name": "gpt2", "pattern": GPT2_PATTERN}, table=table, doc_token=50256, shards=shards,
               source=f"FineWeb sample, huggingface.co/datasets/{REPOSITORY}", licence="ODC-By 1.0")
    print(f"{out}: {len(shards)} shards; train on it with --config configs/fineweb_124m.yaml")


if __name__ == "__main__":
    main()
