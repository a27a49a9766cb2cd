"""What a trained model can do: generation accuracy, similarity of matched views, or a text it writes.

    python evaluate.py --run logs/<id> --data test.jsonl                 accuracy: greedy generation of Code from Text
    python evaluate.py --run logs/<id> --data test.jsonl --similarity    cosine between matched and shuffled views
    python evaluate.py --run logs/<id> --prompt "lines with" [--temperature 0.8 --top_k 50 --seed 1 --tokens 100]
    python evaluate.py --model DIR --data test.jsonl --task gsm8k        accuracy of a Hugging Face model or LoRA adapter
    python evaluate.py --model DIR --data test.jsonl --similarity [--plot views.png]

The last line is one object of JSON, also saved in the folder of the run or model (of a model on the hub, in this one; accuracy
of a model: beside --output). Every accuracy has its 95% Wilson interval, [low, high].

--run: of a run of train_gpt.py, whose DATA_PATH gives the tokenizer and the training texts. Accuracy: exact (the text until the
end token is Code) and startswith (it begins with Code), as fractions, over all examples and over the clean ones, whose Text and
Code don't stand in train. Similarity: view A and view B as JEPA_OBJECTIVE=pair takes them with the run's settings; a run
without that term has never trained its [PRED] tokens, so view A is its Text's last token there (--pred_tokens 0).

--model: --data has lines of messages; the task is --task or the line's key "task", what is right stands in the assistant's text:
    exact, startswith  the generated text is it, or begins with it; whitespace at the ends doesn't count
    gsm8k              the number behind the first #### generated is the one behind its last ####
    nq_open            one of the answers (the line's list "answers" or "answer", or the text cut at "; ") is the text generated or
                       stands in it as whole words, without regard to case, punctuation and articles
    choice             of A, B, C and D the likeliest first token is its letter; nothing is generated
    spider             the SQL has the result of its SQL on --databases/<db_id>/<db_id>.sqlite, "db_id" a key of the line; rows
                       in order only where its SQL orders them
Generation is greedy, without the folder's generation settings. --output gets a header and a line an example; the same command
goes on behind the lines that are there.

--similarity: mean and quantiles of the cosine of pairs of views that belong together, and of those shuffled; linear_map_error,
||U W - V|| / ||V|| of the matrix W that maps view A to view B best, on the random half of the pairs that W was fitted to (with
fewer of them than dimensions it is 0, whatever the views) and on the other half; the 100 largest singular_values of
view A - view B. --plot draws these values, and both views by t-SNE.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import random
import reprlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import jepa
import train_gpt
from config import load_config, read_yaml
from data.pairs import read_jsonl, seen_in_train
from data.shards import json_lines, progress, saved_encoding, sha256_file
from loader import ExampleSet, PairData, open_data
from model import tree_mask
from scoring import TASKS, answer_of, is_right



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


def wilson(hits, n):
    """The 95% Wilson interval of a share, [low, high]."""
    z, p = 1.959963984540054, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return [max(0.0, (middle - half) / (1 + z * z / n)) if hits else 0.0, min(1.0, (middle + half) / (1 + z * z / n)) if hits < n else 1.0]


def accuracy(data, model, path, batch_size, bad="stop"):
    """{"exact", "startswith", their intervals, "n", and the same over the clean examples} of greedy generation from the Texts of a file of pairs."""
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
    return {"exact": mean(exact), "startswith": mean(starts), "n": len(test), "exact_wilson95": wilson(sum(exact), len(test)),
            "startswith_wilson95": wilson(sum(starts), len(test)), "exact_clean": mean([h for h, c in zip(exact, clean) if c]),
            "startswith_clean": mean([h for h, c in zip(starts, clean) if c]), "n_clean": sum(clean)}


@torch.no_grad()
def views_of_run(cfg, data, model, path, batch_size, bad="stop"):
    """(view A, view B, group, skipped) of a file's examples in random order; skipped: how many fit no row of the run."""
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
    return *torch.cat(found, 1), torch.cat(groups), skipped


def view_statistics(u, v, group):
    """{"matched", "shuffled": mean and quantiles of cosines, "pairs", "dimensions", "linear_map_error", "singular_values"} of N views
    A and N views B, both (N, D) and in random order; those of one group (N,) belong to one example."""
    if len(group.unique()) < 2:
        raise ValueError(f"{len(group)} pairs of views from {len(group.unique())} examples: a similarity needs two examples")
    u, v = u.cpu().double(), v.cpu().double()
    if not (u.isfinite().all() and v.isfinite().all()):
        raise ValueError("the views hold infinities or NaN; the model has diverged, or needs --dtype float32")
    shift, group = len(group) // 2, group.cpu()
    other = group != group.roll(shift)  # views of two examples

    def summary(cosines):
        quantiles = cosines.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=cosines.dtype)).tolist()
        return {"mean": cosines.mean().item(), **dict(zip(("q05", "q25", "q50", "q75", "q95"), quantiles))}

    ids = group.unique()
    chosen = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:len(ids) // 2]]
    held_out = torch.isin(group, chosen)  # whole examples: of paraphrases, one half must not know the other's
    matrix = torch.linalg.lstsq(u[~held_out], v[~held_out], driver="gelsd").solution  # gelsd: views may be linearly dependent
    error = lambda half: ((u[half] @ matrix - v[half]).norm() / v[half].norm().clamp(min=1e-300)).item()
    return {"matched": summary(F.cosine_similarity(u, v)), "shuffled": summary(F.cosine_similarity(u, v.roll(shift, 0))[other]),
            "pairs": len(group), "dimensions": u.size(1), "linear_map_error": {"fit": error(~held_out), "held_out": error(held_out), "fit_pairs": int((~held_out).sum())},
            "singular_values": torch.linalg.svdvals(u - v)[:100].tolist()}


def plotting():
    """(pyplot, TSNE)."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        from sklearn.manifold import TSNE
    except ImportError as e:
        raise ValueError(f'--plot needs {e.name}: pip install -e ".[eval]"') from None
    return pyplot, TSNE


def plot(path, u, v, singular_values):
    """A PNG: both views of up to 1,000 pairs by t-SNE, and the singular values of their difference."""
    pyplot, TSNE = plotting()
    n = min(1000, len(u))
    points = torch.cat((u[:n], v[:n])).float().cpu().numpy()
    spread = points.std(0).any()  # views that have all become one vector have no principal components
    points = TSNE(perplexity=max(1, min(30, n / 4)), init="pca" if spread else "random", random_state=0).fit_transform(points)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for (ax, ay), (bx, by) in zip(points[:min(n, 100)], points[n:]):
        left.plot((ax, bx), (ay, by), color="0.7", linewidth=0.6, zorder=1)
    for side, colour, name in ((points[:n], "tab:blue", "view A (Text)"), (points[n:], "tab:orange", "view B (Code)")):
        left.scatter(*side.T, s=10, color=colour, label=name, zorder=2)
    left.set(title=f"t-SNE of {n} pairs; lines join {min(n, 100)} of them", xticks=[], yticks=[])
    left.legend()
    right.semilogy(range(1, len(singular_values) + 1), singular_values, marker=".")
    right.set(title="singular values of view A - view B", xlabel="index", ylabel="singular value")
    right.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def sample(data, model, args):
    """{"prompt", "text"}: what the model writes behind a prompt."""
    if data.token_table is None or not data.meta:
        raise ValueError(f"{data.folder} has no meta.json, so the tokenizer that encodes a prompt is unknown")
    prompt = [data.doc_token, *saved_encoding(data.folder, data.meta).encode_ordinary(args.prompt)]
    generator = torch.Generator().manual_seed(args.seed)
    new = model.generate([prompt], 100 if args.tokens is None else args.tokens, args.temperature, args.top_k, data.doc_token, generator)[0]
    return {"prompt": args.prompt, "text": decode(data, new).decode(errors="replace")}


# ---- Hugging Face models


def read_tasks(path, task=None, bad="stop"):
    """[{"line", "task", "system", "user", "target", "record": the line's whole JSON}] of a file of messages."""
    examples = read_jsonl(path, bad)
    if examples[0][1] != "pairs":
        raise ValueError(f"{path} holds groups of paraphrases, here messages are needed; choose --similarity")
    numbers, found = {number for number, *_ in examples}, []
    records = {number: load() for number, load in json_lines(path) if number in numbers}
    for number, _, system, (user, target) in examples:
        record = records[number]
        name = task or record.get("task")
        if name not in TASKS:
            raise ValueError(f"{path}, line {number}: " + ("no task" if name is None else f"unknown task {reprlib.repr(name)}") + f'; give --task or a key "task", one of {", ".join(TASKS)}')
        found.append({"line": number, "task": name, "system": system, "user": user, "target": target, "record": record})
    return found


def open_model(name, dtype, plain, trust_remote_code):
    """(model, Chat) of a folder or a name on the hub; a LoRA adapter is merged into its base."""
    adapter = (Path(name) / "adapter_config.json").is_file()
    try:
        import transformers
        from chat import Chat
        if adapter:
            from peft import AutoPeftModelForCausalLM as loader  # it resizes the base's embedding to the tokenizer
        else:
            loader = transformers.AutoModelForCausalLM
    except ImportError as e:
        raise ValueError(f'--model needs {e.name}: pip install -e ".[finetune]"') from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = loader.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as e:  # many kinds: no such name, no network, files cut off, an architecture unknown here
        raise ValueError(f"--model {name}: cannot be loaded ({' '.join(str(e).split())[:300]}); give the folder or the hub's name of a model or LoRA adapter") from None
    model = (model.merge_and_unload() if adapter else model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.generation_config = transformers.GenerationConfig()  # the folder's may sample, or punish repetition
    return model, Chat(tokenizer, plain)


def generate(model, chat, prompts, limit, **options):
    """generate()'s output for prompts of token ids, greedy, padded on the left."""
    pad = chat.tokenizer.pad_token_id
    pad, longest = chat.stop_tokens[0] if pad is None else pad, max(map(len, prompts))
    rows = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    return model.generate(input_ids=rows, attention_mask=mask, do_sample=False, max_new_tokens=limit, use_cache=True,
                          eos_token_id=chat.stop_tokens, pad_token_id=pad, **options)


def letter_probabilities(model, chat, prompts):
    """(N, 4): how likely A, B, C and D go on behind each prompt, relative to one another."""
    letters = [chat.encode(letter)[0] for letter in "ABCD"]
    if len(set(letters)) < 4:
        raise ValueError(f"the tokenizer begins two of the letters A to D with one token ({letters}), so it can't choose; use another task, as exact")
    logits = generate(model, chat, prompts, 1, output_logits=True, return_dict_in_generate=True).logits[0]
    return logits[:, letters].float().softmax(-1).cpu()


def written(chat, tokens):
    """The text of generated tokens up to the first that stops."""
    end = next((n for n, token in enumerate(tokens) if token in chat.stop_tokens), len(tokens))
    return chat.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)  # True would rewrite " ."


@torch.no_grad()
def predict(model, chat, examples, tokens, batch_size):
    """Yield [(example, prediction, {"probability": of the right letter} or {})], a batch at a time, the longest prompts first."""
    prompts = {e["line"]: chat.prompt(e["system"], e["user"]) for e in examples}
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for e in examples:
        if len(prompts[e["line"]]) >= window:
            raise ValueError(f"line {e['line']} of --data: its prompt has {len(prompts[e['line']])} tokens, the model takes {window}; shorten or remove it")
    order = sorted(examples, key=lambda e: (e["task"] == "choice", -len(prompts[e["line"]])))
    generated = sum(e["task"] != "choice" for e in examples)
    batches = [part[i:i + batch_size] for part in (order[:generated], order[generated:]) for i in range(0, len(part), batch_size)]
    for batch in progress(batches, desc="evaluating"):
        inputs = [prompts[e["line"]] for e in batch]
        if batch[0]["task"] == "choice":
            likely = letter_probabilities(model, chat, inputs)
            yield [(e, "ABCD"[p.argmax()], {"probability": p["ABCD".index(e["answer"])].item()}) for e, p in zip(batch, likely)]
        else:
            new = generate(model, chat, inputs, min(tokens, window - max(map(len, inputs))))[:, max(map(len, inputs)):]
            yield [(e, written(chat, row), {}) for e, row in zip(batch, new.tolist())]


def is_prediction(record):
    """Whether a line of an output file is one that score() writes."""
    if not isinstance(record, dict) or record.keys() - {"probability"} != {"line", "prediction", "correct"}:
        return False
    return (type(record["line"]) is int and isinstance(record["prediction"], str) and isinstance(record["correct"], bool)
            and isinstance(record.get("probability", 0.0), float))


def open_output(path, header):
    """({line: what is known of it}, the file to write on) of an output file, begun anew or with the lines that are there."""
    first, known = json.dumps(header).encode() + b"\n", path.read_bytes() if path.exists() else b""
    whole = known[:known.rfind(b"\n") + 1]  # a run that was killed may have torn its last line
    try:
        there = json.loads(whole[:whole.find(b"\n")]) if whole else header if first.startswith(known) else None
    except (ValueError, RecursionError):
        there = None
    if there != header:
        differs = f"of another {', '.join(k for k in header if there.get(k) != header[k])}" if isinstance(there, dict) else "not a file of predictions"
        raise ValueError(f"{path} is {differs}; choose another --output, or remove it")
    done = {}
    for number, line in enumerate(whole.split(b"\n")[1:-1], 2):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not is_prediction(record):
            raise ValueError(f"{path}, line {number}: not JSON with line, prediction and correct, true or false; remove the line, "
                             "choose another --output, or remove it")
        done[record["line"]] = record
    file = open(path, "ab")
    file.truncate(len(whole))
    if not whole:
        file.write(first)
        file.flush()
    return done, file


def text_settings(folder):
    """(dataset.plain, dataset.remove_thinking) of finetune.py's config.yaml in a folder, its defaults without one."""
    try:
        saved = read_yaml(folder / "config.yaml")["dataset"]
        return bool(saved["plain"]), bool(saved["remove_thinking"])
    except (ValueError, TypeError, KeyError):  # none, or another program's
        return False, True


def model_accuracy(args):
    """({"task", "accuracy", "wilson95", "n", ...}, where to save it) of a model on a file; of several tasks all, and each in "tasks"."""
    folder, examples = Path(args.model), read_tasks(args.data, args.task, args.bad)
    names = sorted({e["task"] for e in examples})
    name, (plain, thoughtless) = names[0] if len(names) == 1 else "mixed", text_settings(folder)
    dtype = args.dtype if args.dtype != "auto" else "bf16" if torch.cuda.is_available() else "float32"
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*")) if p.suffix in (".safetensors", ".bin")]
    header = {"model": args.model, "weights": hashlib.sha256(repr(weights).encode()).hexdigest()[:16], "data_sha256": sha256_file(args.data), "task": name, "dtype": dtype,
              "plain": args.plain or plain, "remove_thinking": thoughtless, "tokens": args.tokens, "databases": args.databases, "sql_timeout": args.sql_timeout}
    output = Path(args.output or (folder if folder.is_dir() else Path()) / f"predictions-{Path(args.data).stem}-{name}.jsonl")
    done, file = open_output(output, header)
    with file:
        if any(e["line"] not in done for e in examples):
            score(args, header, examples, done, file)

    def figures(task=None):
        records = [done[e["line"]] for e in examples if task in (None, e["task"])]
        hits, likely = sum(r["correct"] for r in records), [r["probability"] for r in records if "probability" in r]
        return {"accuracy": hits / len(records), "wilson95": wilson(hits, len(records)), "n": len(records), **({"probability": sum(likely) / len(likely)} if likely else {})}
    each = {"tasks": {task: figures(task) for task in names}} if len(names) > 1 else {}
    return {"task": name, **figures(), **each}, output.parent / f"accuracy-{Path(args.data).stem}-{name}.json"


def score(args, settings, examples, done, file):
    """Predict the examples that aren't done, and note each in `done` and the file, a batch at a time."""
    from chat import remove_thinking
    clean = remove_thinking if settings["remove_thinking"] else str
    for e in examples:
        e["target"] = clean(e["target"])
        try:
            e["answer"] = None if e["line"] in done else answer_of(e, args.databases, args.sql_timeout)
        except ValueError as error:
            raise ValueError(f"{args.data}, line {e['line']}: {error}") from None
    model, chat = open_model(args.model, {"bf16": torch.bfloat16, "float32": torch.float32}[settings["dtype"]], settings["plain"], args.trust_remote_code)
    tokens = args.tokens or 2 * max(len(chat.encode(e["target"])) for e in examples) + 8  # of all, whatever is done
    for batch in predict(model, chat, [e for e in examples if e["line"] not in done], tokens, args.batch_size):
        for e, text, more in batch:
            text = clean(text)
            done[e["line"]] = {"line": e["line"], "prediction": text, "correct": is_right(e["task"], text, e["answer"], args.sql_timeout), **more}
            file.write(json.dumps(done[e["line"]]).encode() + b"\n")
        file.flush()


def views_of_model(args):
    """(view A, view B, group, skipped) of a model's views of a file's examples, in random order."""
    from finetune import views_of
    records = read_jsonl(args.data, args.bad)
    random.Random(0).shuffle(records)
    model, chat = open_model(args.model, torch.float32, args.plain or text_settings(Path(args.model))[0], args.trust_remote_code)
    u, v, group = views_of(model, chat, args.model, records, args.batch_size)
    return u, v, group, len(records) - len(group.unique())


def check_arguments(args, default):
    """ValueError where flags don't go together. default: a function from a flag's name to its default."""
    if (args.run is None) == (args.model is None):
        raise ValueError("give either --run or --model")
    if (args.data is None) == (args.prompt is None) or (args.similarity or args.model) and args.data is None:
        raise ValueError("give either --data, with or without --similarity, or --prompt, which needs --run")
    if args.plot and not args.similarity:
        raise ValueError("--plot draws the views of --similarity; give both")
    generates, loads = ("task", "databases", "sql_timeout", "output", "dtype"), ("plain", "trust_remote_code")
    for name in (*(generates if args.run or args.similarity else ()), *(loads if args.run else ()), *(("pred_tokens",) if args.model else ())):
        if getattr(args, name) != default(name):
            raise ValueError(f"--{name} belongs to " + ("--run" if name == "pred_tokens" else "a --model" if name in loads else "the accuracy of a --model"))
    for name in ("batch_size", "sql_timeout", *(("tokens",) if args.model and args.tokens is not None else ())):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must lie above 0")
    if args.model is not None and (not args.model or args.model[0] in "./~") and not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model}: no such folder")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", help="folder of a finished run of train_gpt.py, logs/<id>")
    parser.add_argument("--model", help="Hugging Face model or LoRA adapter: a folder, as finetune.py writes it, or a name on the hub")
    parser.add_argument("--data", help="JSON-lines file of pairs, or of groups with --similarity")
    parser.add_argument("--bad", choices=("stop", "skip"), default="stop", help="what a line of --data that is wrong does (default: stop); either names it")
    parser.add_argument("--batch_size", type=int, default=128, help="examples at a time; more memory (default: 128)")
    parser.add_argument("--tokens", type=int, help="generated at most (default: 100 with --prompt; of a model twice the longest answer's, and 8)")
    parser.add_argument("--similarity", action="store_true", help="cosines of views instead of accuracy")
    parser.add_argument("--plot", metavar="FILE.png", help="with --similarity: t-SNE of the views, and the singular values")
    parser.add_argument("--pred_tokens", type=int, help="with --run --similarity: [PRED] tokens of view A (default: those the run trained)")
    parser.add_argument("--prompt", help="with --run: sample a text instead")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sample; 0 is greedy (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="of the sample; 0: all tokens (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--task", choices=TASKS, help="of a model: what counts as right (default: the key \"task\" of each line)")
    parser.add_argument("--databases", metavar="DIR", help="of spider: folder with <db_id>/<db_id>.sqlite")
    parser.add_argument("--sql_timeout", type=float, default=10.0, help="of spider: seconds a query may take (default: 10)")
    parser.add_argument("--output", metavar="FILE", help="of a model: where predictions go (default: predictions-<data>-<task>.jsonl in its folder)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bf16"), default="auto", help="of a model; auto: bf16 on CUDA, else float32")
    parser.add_argument("--plain", action="store_true", help="of a model without finetune.py's config.yaml: trained on texts without a chat template")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    try:
        check_arguments(args, parser.get_default)
        if args.plot:
            plotting()  # what it needs should be missed now, not in the end
        began = time.perf_counter()
        folder = Path(args.run or args.model)
        folder = folder if folder.is_dir() else Path()
        if args.model and (Path(args.model) / "sha256.json").exists():  # finetune.py's; its config.yaml is read before the model is
            try:
                from finetune import check_seal
            except ImportError as e:
                raise ValueError(f'--model needs {e.name}: pip install -e ".[finetune]"') from None
            check_seal(args.model)
        if args.run:
            cfg, data, model = open_run(args.run, args.pred_tokens)
        if args.prompt is not None:
            file, result = folder / "sample.json", sample(data, model, args)
        elif args.similarity:
            u, v, group, skipped = views_of_run(cfg, data, model, args.data, args.batch_size, args.bad) if args.run else views_of_model(args)
            file, result = folder / f"similarity-{Path(args.data).stem}.json", {**view_statistics(u, v, group), "skipped": skipped}
        elif args.run:
            file, result = folder / f"accuracy-{Path(args.data).stem}.json", accuracy(data, model, args.data, args.batch_size, args.bad)
        else:
            result, file = model_accuracy(args)
        result["seconds"] = round(time.perf_counter() - began, 1)
        file.write_text(json.dumps(result) + "\n")
        if args.plot:
            plot(args.plot, u, v, result["singular_values"])
        print(json.dumps(result))
    except torch.OutOfMemoryError:
        raise SystemExit("error: out of GPU memory; lower --batch_size, finished lines are kept") from None
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
