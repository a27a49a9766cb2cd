"""What a finished run can do: generation accuracy, similarity of matched views, or a text it writes.

    python evaluate.py --run logs/<id> --data test.jsonl                 accuracy: greedy generation of Code from Text
    python evaluate.py --run logs/<id> --data test.jsonl --similarity    cosine between matched and shuffled views
    python evaluate.py --run logs/<id> --prompt "lines with" [--temperature 0.8 --top_k 50 --seed 1 --tokens 100]

The last line is one object of JSON, also saved in the run's folder. Accuracy: exact (the text until the end token is Code)
and startswith (it begins with Code), as fractions, over all examples and over the clean ones, whose Text and Code don't stand
in train. Similarity: view A and view B as JEPA_OBJECTIVE=pair takes them with the run's settings; mean and quantiles of the
cosine of pairs that belong together, and of those shuffled; a run without that term has never trained its [PRED] tokens, so
view A is its Text's last token there (--pred_tokens 0).
Tokenizer and training texts come from the run's DATA_PATH.
"""
import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import jepa
import train_gpt
from config import load_config
from data.pairs import read_jsonl, seen_in_train
from data.shards import progress, saved_encoding
from loader import ExampleSet, PairData, open_data
from model import tree_mask


def open_run(folder, pred_tokens=None):
    """(cfg, data, model) of a finished run, cfg with the settings of view A that apply; ValueError says what is missing."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--run {folder}: no config.yaml in it; give the folder of a finished run, logs/<run>")
    cfg, _, _ = load_config(train_gpt.Config, ["--config", str(folder / "config.yaml"), "--init_from", str(folder)], {})
    trained = cfg.jepa_lambda and cfg.jepa_objective == "pair"
    tokens = pred_tokens if pred_tokens is not None else cfg.jepa_pred_tokens if trained else 0
    cfg = dataclasses.replace(cfg, jepa_pred_tokens=tokens, long_examples="skip" if cfg.long_examples == "stop" else cfg.long_examples)
    _, _, device = train_gpt.start_process()
    data = open_data(cfg)
    return cfg, data, train_gpt.build_model(cfg, data.vocab_size, device).eval()


def in_batches(items, size):
    """Slices of a list, with a progress bar."""
    return progress([items[i:i + size] for i in range(0, len(items), size)], desc="evaluating")


def read_test(data, path, kind=None, bad="stop"):
    """The views of a file's examples, with the system message where the run's data keeps it; ValueError where they are not of
    this kind, by default that of the run's data."""
    if not isinstance(data, PairData):
        raise ValueError(f"the run was trained on text ({data.folder}), not on pairs or groups; choose --prompt")
    examples, kind = read_jsonl(path, bad), kind or data.meta["kind"]
    if examples[0][1] != kind:
        raise ValueError(f"{path} holds {examples[0][1]}, here {kind} are needed: an accuracy is that of pairs, a similarity that of the run's own kind")
    return [[f"{system}\n{views[0]}" if data.meta["keep_system"] and system else views[0], *views[1:]] for _, _, system, views in examples]


def decode(data, tokens):
    """The text of tokens, as bytes."""
    return b"".join(data.token_table[t] for t in tokens if t < len(data.token_table))


def accuracy(data, model, path, batch_size, bad="stop"):
    """{"exact", "startswith", "n", and the same over the clean examples} of greedy generation from the Texts of a file of pairs."""
    test = read_test(data, path, "pairs", bad)
    encode = saved_encoding(data.folder, data.meta).encode_ordinary
    prompts = [[data.doc_token, *encode(text), data.separator] for text, _ in test]
    limit = 2 * max(len(encode(code)) for _, code in test) + 8  # a text may have more tokens than its shortest encoding
    order = sorted(range(len(test)), key=lambda i: len(prompts[i]))  # similar lengths side by side: little padding
    exact, starts = [None] * len(test), [None] * len(test)
    for chosen in in_batches(order, batch_size):
        for i, new in zip(chosen, model.generate([prompts[i] for i in chosen], limit, stop_token=data.doc_token)):
            text, code = decode(data, new), test[i][1].encode()
            exact[i], starts[i] = text == code, text.startswith(code)
    train = ExampleSet(data.train, data.doc_token, data.separator, "train")  # whole, whatever LONG_EXAMPLES did to it
    train = [[decode(data, view).decode() for view in train.views(e)] for e in range(len(train))]
    clean = [not any(hits) for hits in seen_in_train(train, test, data.meta["kind"])]
    mean = lambda hits: sum(hits) / len(hits) if hits else None
    return {"exact": mean(exact), "startswith": mean(starts), "n": len(test), "exact_clean": mean([h for h, c in zip(exact, clean) if c]),
            "startswith_clean": mean([h for h, c in zip(starts, clean) if c]), "n_clean": sum(clean)}


@torch.no_grad()
def similarity(cfg, data, model, path, batch_size, bad="stop"):
    """{"matched", "shuffled": mean and quantiles of the cosine of view A and view B, "pairs", "skipped"} over the examples of a
    file; skipped: examples that fit no row of the run."""
    cfg, test = dataclasses.replace(cfg, jepa_objective="pair"), read_test(data, path, bad=bad)
    encode = saved_encoding(data.folder, data.meta).encode_ordinary
    test = [[encode(view) for view in views] for views in test]
    fits = [all(len(d) <= cfg.train_seq_len for d in data.lay_out(views, True).documents) for views in test]
    skipped, test = len(test) - sum(fits), [views for views, fit in zip(test, fits) if fit]
    if len(test) < 2:
        raise ValueError(f"{path}: {len(test)} of its examples fit a row of TRAIN_SEQ_LEN={cfg.train_seq_len}; a similarity needs two")
    rows = max(len(data.lay_out(views, True).documents) for views in test) + batch_size * max(len(d) for views in test for d in data.lay_out(views, True).documents) // cfg.train_seq_len
    share = train_gpt.Share(0, 1, model.embed.weight.device, rows, rows, 0, rows)
    found, groups = [], []
    random.Random(0).shuffle(test)
    for number, chosen in enumerate(in_batches(test, batch_size)):
        examples = [data.lay_out(views, True) for views in chosen]
        placed = jepa.pack(examples, rows, cfg.train_seq_len)
        batches, _ = data.fill(examples, placed, share)
        for batch, (a, b, weight, group) in zip(batches, data.pair_indices(range(len(chosen)), examples, placed, share)):
            batch = batch.to(share.device)
            _, h = model._run_blocks(batch.idx, cfg.jepa_layer, batch.positions, tree_mask(batch.ends))
            u, v, *_ = train_gpt.jepa_views(model, cfg, h, tuple(t.to(share.device) for t in (a, b, weight, group)))
            found.append(torch.stack((u, v))[:, weight > 0].cpu())
            groups.append(group[weight > 0] + number * batch_size)
    (u, v), group = torch.cat(found, 1), torch.cat(groups)
    shift = len(group) // 2
    other = group != group.roll(shift)  # views of two examples
    def summary(cosines):
        quantiles = cosines.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
        return {"mean": cosines.mean().item(), **dict(zip(("q05", "q25", "q50", "q75", "q95"), quantiles))}
    return {"matched": summary(F.cosine_similarity(u, v)), "shuffled": summary(F.cosine_similarity(u, v.roll(shift, 0))[other]), "pairs": len(group), "skipped": skipped}


def sample(data, model, args):
    """{"prompt", "text"}: what the model writes behind a prompt."""
    if data.token_table is None or not data.meta:
        raise ValueError(f"{data.folder} has no meta.json, so the tokenizer that encodes a prompt is unknown")
    prompt = [data.doc_token, *saved_encoding(data.folder, data.meta).encode_ordinary(args.prompt)]
    generator = torch.Generator().manual_seed(args.seed)
    new = model.generate([prompt], args.tokens, args.temperature, args.top_k, data.doc_token, generator)[0]
    return {"prompt": args.prompt, "text": decode(data, new).decode(errors="replace")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="folder of a finished run, logs/<id>")
    parser.add_argument("--data", help="JSON-lines file of pairs, or of groups with --similarity")
    parser.add_argument("--bad", choices=("stop", "skip"), default="stop", help="what a line of --data that is wrong does (default: stop); either names it")
    parser.add_argument("--similarity", action="store_true", help="cosines of views instead of accuracy")
    parser.add_argument("--pred_tokens", type=int, help="with --similarity: [PRED] tokens of view A (default: those the run trained)")
    parser.add_argument("--prompt", help="sample a text instead")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sample; 0 is greedy (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="of the sample; 0: all tokens (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--tokens", type=int, default=100, help="of the sample, at most (default: 100)")
    parser.add_argument("--batch_size", type=int, default=128, help="examples at a time; more memory (default: 128)")
    args = parser.parse_args(argv)
    try:
        if (args.data is None) == (args.prompt is None) or args.similarity and args.data is None:
            raise ValueError("give either --data, with or without --similarity, or --prompt")
        began = time.perf_counter()
        cfg, data, model = open_run(args.run, args.pred_tokens)
        if args.prompt is not None:
            name, result = "sample", sample(data, model, args)
        elif args.similarity:
            name, result = f"similarity-{Path(args.data).stem}", similarity(cfg, data, model, args.data, args.batch_size, args.bad)
        else:
            name, result = f"accuracy-{Path(args.data).stem}", accuracy(data, model, args.data, args.batch_size, args.bad)
        result["seconds"] = round(time.perf_counter() - began, 1)
        (Path(args.run) / f"{name}.json").write_text(json.dumps(result) + "\n")
        print(json.dumps(result))
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
