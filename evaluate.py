"""What a trained model can do: accuracy, similarity of matched views, or a text it writes.

    python evaluate.py accuracy --run logs/<id> --data test.jsonl
    python evaluate.py accuracy --model DIR --data test.jsonl --task gsm8k
    python evaluate.py score --task nq_open --predictions FILE [--data test.jsonl]
    python evaluate.py similarity --run logs/<id> --data test.jsonl [--plot views.png]
    python evaluate.py sample --run logs/<id> --prompt "lines with"

--run is a run of train_gpt.py. --model is a Hugging Face model or LoRA adapter: a folder, as
finetune.py leaves it, or a name on the hub. score needs no model: it judges what another program
has generated. The last line is one JSON object. It is also saved in the folder of the run, the
model or the predictions; of a model on the hub, in this one. Every accuracy has its 95% Wilson
interval.
"""

import argparse
import hashlib
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_gpt
from model import GPT, LanguageModel
from nanojepa.batches import PairData, open_data
from nanojepa.device import start_process
from nanojepa.eval.generation import predict
from nanojepa.eval.predictions import open_output, read_predictions
from nanojepa.eval.tasks import TASKS, answer_of, judge, read_questions
from nanojepa.examples import ExampleSet
from nanojepa.files import one_line_errors, progress, sha256_file
from nanojepa.objectives import OBJECTIVES, kinds
from nanojepa.records import full_views, read_examples, seen_in_train
from nanojepa.settings import load_settings, read_yaml
from nanojepa.stats import wilson
from nanojepa.texts import remove_thinking
from nanojepa.weights import OBJECTIVE_FILE, load_weights

ACCURACY = """Greedy generation, compared with what is right.

--run: exact (the text until the end token is Code) and startswith (it begins with Code), as
fractions of all examples, and of the clean ones: their Text and Code don't stand in train.

--model: each line of messages has a task, --task or its key "task". What is right stands in the
assistant's text:
  exact, startswith  the generated text is it, or begins with it; whitespace at the ends is ignored
  gsm8k              the number after the first #### generated is the one after its last ####
  nq_open            one of the answers (the line's "answers" or "answer" and its "aliases", or
                     the text cut at "; ") stands in the generated text, as whole words, without
                     regard to case, punctuation, articles and how a number is written
  choice             of A, B, C and D, the likeliest first token is its letter
  spider             the SQL has the result of its SQL on --databases/<db_id>/<db_id>.sqlite, in
                     order if there is an ORDER BY in its SQL; "db_id" is a key of the line
Where the scoring of LLM-JEPA's own evaluate.py says something else, its accuracy stands beside, as
upstream_accuracy. docs/evaluation.md has the rules and their sources.
--output gets a header and a line for each example. The same command goes on after these lines."""

SCORE = """Judge texts that another program has generated, by the same rules as accuracy.

A line of --predictions is a JSON object with "prediction", a text, and the test record itself:
messages, or another form that is recognised. With --data the records are those of that file; the
predictions then have their "line" in it, or are as many and in the same order."""

SIMILARITY = """Mean and quantiles of the cosine of matched views, and of shuffled ones.

The views are those that the run's own term compares. If it compares no two texts, view A ends with
the first text's last token, since its [PRED] tokens have never been trained. linear_map_error is
||U W - V|| / ||V|| of the matrix W that maps view A to view B best, on the random half of the pairs
that W was fitted to, and on the other half. singular_values are the 100 largest of view A - view B.
--plot draws them, and both views by t-SNE."""

SAMPLE = "A text that a run writes after a prompt."
ONLY_MODEL = ("plain", "trust_remote_code", "task", "databases", "output", "dtype")


# ----------------------------------------------------------------------------- a run


class TrainedRun(NamedTuple):
    cfg: train_gpt.Config
    data: Any
    model: GPT
    encode: Any  # str -> tokens

    def decode(self, tokens):
        """The text of tokens, as bytes."""
        table = self.data.token_table
        return b"".join(table[t] for t in tokens if t < len(table))


def open_run(folder, change=None):
    """The TrainedRun of a finished run; change: what is done to its settings first."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"--run {folder}: no config.yaml in it; give the folder of a finished run, logs/<run>"
        )
    flags = ["--config", str(folder / "config.yaml"), "--init_from", str(folder)]
    cfg = load_settings(train_gpt.Config, flags).config
    cfg = change(cfg) if change else cfg
    _, _, device = start_process()
    data = open_data(cfg)
    if not data.meta:
        raise ValueError(
            f"{data.folder} has no meta.json, so the tokenizer that encodes a text is unknown"
        )
    encode = data.encode
    model = train_gpt.build_model(cfg, data.vocab_size, device).eval()
    return TrainedRun(cfg, data, model, encode)


def read_test(run, path, kind, bad, columns=None):
    """The views of a file's examples, texts, as the run's data has them.

    kind: pairs or groups; None: that of the data.
    """
    data = run.data
    if not isinstance(data, PairData):
        raise ValueError(
            f"the run was trained on text ({data.folder}), not on pairs or groups; choose sample"
        )
    records, kind = read_examples(path, bad, columns=columns), kind or data.meta["kind"]
    if records[0].kind != kind:
        raise ValueError(
            f"{path} holds {records[0].kind}, here {kind} are needed: an accuracy is of pairs, a "
            "similarity of the run's own kind"
        )
    return [full_views(record, data.meta["keep_system"]) for record in records]


def accuracy_of_run(args):
    run = open_run(args.run)
    data, encode = run.data, run.encode
    test = read_test(run, args.data, "pairs", args.bad, args.columns)
    prompts = [[data.doc_token, *encode(text), data.separator] for text, _ in test]
    # A text may have more tokens than its shortest encoding.
    limit = args.tokens or 2 * max(len(encode(code)) for _, code in test) + 8
    exact, starts = [False] * len(test), [False] * len(test)
    # Prompts of similar length side by side need little padding.
    order = sorted(range(len(test)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    for batch in progress(batches, "evaluating"):
        new = run.model.generate([prompts[i] for i in batch], limit, stop_token=data.doc_token)
        for i, tokens in zip(batch, new, strict=True):
            text, code = run.decode(tokens), test[i][1].encode()
            exact[i], starts[i] = text == code, text.startswith(code)
    # The train set is taken whole, whatever LONG_EXAMPLES did to it.
    train = ExampleSet(data.train, data.doc_token, data.separator, "train", data.paired)
    train = [[run.decode(v).decode() for v in train.views(e)] for e in range(len(train))]
    clean = [not any(seen) for seen in seen_in_train(train, test, "pairs")]
    result = {"n": len(test), "n_clean": sum(clean), "test_sha256": sha256_file(args.data)}
    for name, hits in (("exact", exact), ("startswith", starts)):
        clean_hits = [hit for hit, is_clean in zip(hits, clean, strict=True) if is_clean]
        result[name] = sum(hits) / len(hits)
        result[f"{name}_wilson95"] = wilson(sum(hits), len(hits))
        result[f"{name}_clean"] = sum(clean_hits) / len(clean_hits) if clean_hits else None
    return result, Path(args.run) / f"accuracy-{Path(args.data).stem}.json"


def view_settings(cfg):
    """The settings that say which views are compared: the run's, if its term compares two texts.

    If it doesn't, the first objective of the table that does, with no weights of its own and
    without [PRED] tokens.
    """
    if cfg.jepa_lambda and any(kind.needs_pairs for kind in kinds(cfg.jepa_objective)):
        return cfg
    paired = next(name for name, kind in OBJECTIVES.items() if kind.needs_pairs)
    cfg = replace(cfg, jepa_lambda=0.0, diag_every=0, jepa_predictor="identity")
    return replace(cfg, jepa_objective=paired, jepa_pred_tokens=0)


def views_of_run(args):
    """(how many examples a file has, what states_of_views() needs of those that fit a row)."""
    run = open_run(args.run, view_settings)
    cfg, data = run.cfg, run.data
    test = read_test(run, args.data, None, args.bad, args.columns)
    objective = train_gpt.build_objective(cfg, data, run.model.embed.weight.device)
    if cfg.jepa_lambda and objective.state_dict():
        load_weights(objective, args.run, OBJECTIVE_FILE)
    objective = objective.paired()
    random.Random(0).shuffle(test)
    examples = [data.layout([run.encode(view) for view in views], objective) for views in test]
    # Of an example without a pair, there is nothing to compare.
    fit = [e for e in examples if e.pairs and max(map(len, e.documents)) <= cfg.train_seq_len]
    if len(fit) < 2:
        raise ValueError(
            f"{args.data}: {len(fit)} of its examples have views that fit a row of TRAIN_SEQ_LEN="
            f"{cfg.train_seq_len}; a similarity needs two"
        )
    lm = LanguageModel(run.model, cfg.jepa_layer)
    return len(test), (lm, objective, fit, data.doc_token)


def similarity(args):
    # slow to import
    from nanojepa.eval.similarity import compare_views, draw_views, states_of_views

    count, views = views_of_run(args) if args.run else views_of_model(args)
    u, v, group = states_of_views(*views, args.batch_size)
    result = compare_views(u, v, group) | {"skipped": count - len(group.unique())}
    if args.plot:
        draw_views(args.plot, u, v, result)
    return result, folder_of(args) / f"similarity-{Path(args.data).stem}.json"


def sample(args):
    run = open_run(args.run)
    prompt = [run.data.doc_token, *run.encode(args.prompt)]
    generator = torch.Generator().manual_seed(args.seed)
    (new,) = run.model.generate(
        [prompt], args.tokens, args.temperature, args.top_k, run.data.doc_token, generator
    )
    text = run.decode(new).decode(errors="replace")
    return {"prompt": args.prompt, "text": text}, Path(args.run) / "sample.json"


# ----------------------------------------------------------------------------- a Hugging Face model


def folder_of(args):
    """The folder of the run or model; this one for a model on the hub."""
    folder = Path(args.run or args.model)
    return folder if folder.is_dir() else Path()


def text_settings(folder):
    """(dataset.plain, remove_thinking, date) of finetune.py's config.yaml in a model's folder.

    Its defaults, if there is none or another program's.
    """
    from nanojepa.hf.chat import DATE  # transformers, which a run doesn't need

    try:
        data = read_yaml(Path(folder) / "config.yaml")["dataset"]
        return bool(data["plain"]), bool(data["remove_thinking"]), str(data.get("date", DATE))
    except (ValueError, TypeError, KeyError):
        return False, True, DATE


def open_chat(args, dtype, plain):
    """(model, Chat) of --model."""
    from nanojepa.hf.chat import Chat
    from nanojepa.hf.model import open_model  # slow to import

    loaded = open_model(args.model, dtype, args.trust_remote_code)
    return loaded.model, Chat(loaded.tokenizer, plain, text_settings(args.model)[2])


def views_of_model(args):
    """(how many examples a file has, what states_of_views() needs of them)."""
    from nanojepa.hf.run import views_of

    records = read_examples(args.data, args.bad, columns=args.columns)
    random.Random(0).shuffle(records)
    plain = args.plain or text_settings(args.model)[0]
    model, chat = open_chat(args, torch.float32, plain)
    return len(records), views_of(model, chat, args.model, records)


def accuracy_of_model(args):
    questions = read_questions(args.data, args.task, args.bad, args.columns)
    name = task_name(questions)
    stem, header = Path(args.data).stem, describe(args, name)
    output = Path(args.output or folder_of(args) / f"predictions-{stem}-{name}.jsonl")
    done = open_output(output, header)
    if any(question.line not in done for question in questions):
        with open(output, "ab") as file:
            predict_rest(args, header, questions, done, file)
    return count_tasks(questions, done), output.parent / f"accuracy-{stem}-{name}.json"


def task_name(questions):
    """The task of all questions, or "mixed"."""
    names = {question.task for question in questions}
    return names.pop() if len(names) == 1 else "mixed"


def count_tasks(questions, done):
    """The accuracy over all questions, and of each task if there are several."""
    result = {"task": task_name(questions)} | count_right([done[q.line] for q in questions])
    if result["task"] == "mixed":
        names = sorted({question.task for question in questions})
        result["tasks"] = {
            task: count_right([done[q.line] for q in questions if q.task == task]) for task in names
        }
    return result


def score(args):
    clean = str if args.keep_thinking else remove_thinking
    options = {"task": args.task, "bad": args.bad, "columns": args.columns}
    questions, texts = read_predictions(args.predictions, args.data, **options)
    questions = [q._replace(target=clean(q.target)) for q in questions]
    done = {}
    for question, text in zip(questions, map(clean, texts), strict=True):
        answer = answer_to(question, args)
        done[question.line] = judge(question, text, answer)
    path = Path(args.predictions)
    name = f"score-{path.name.split('.')[0]}-{task_name(questions)}.json"
    return count_tasks(questions, done), path.parent / name


def answer_to(question, args):
    """answer_of(), whose errors name the file and the line."""
    try:
        return answer_of(question, args.databases)
    except ValueError as e:
        raise ValueError(f"{args.data or args.predictions}, line {question.line}: {e}") from None


def describe(args, task):
    """The header of a file of predictions: all that they depend on."""
    folder = Path(args.model)
    plain, removes_thinking, date = text_settings(folder)
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin")]
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "model": args.model,
        "weights": hashlib.sha256(repr(weights).encode()).hexdigest()[:16],
        "data_sha256": sha256_file(args.data),
        "task": task,
        "dtype": args.dtype or ("bf16" if torch.cuda.is_available() else "float32"),
        "plain": args.plain or plain,
        "remove_thinking": removes_thinking,
        "date": date,
        "tokens": args.tokens,
        "databases": args.databases,
    }


def predict_rest(args, header, questions, done, file):
    """Predict the questions that aren't done; add each to `done` and to the file, by batches."""
    clean = remove_thinking if header["remove_thinking"] else str
    questions = [q._replace(target=clean(q.target)) for q in questions]
    rest = [q for q in questions if q.line not in done]
    answers = {question.line: answer_to(question, args) for question in rest}
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[header["dtype"]]
    model, chat = open_chat(args, dtype, header["plain"])
    # The number is that of all lines, whatever is done.
    tokens = args.tokens or 2 * max(len(chat.encode(q.target)) for q in questions) + 8
    for asked, texts in predict(model, chat, rest, tokens, args.batch_size):
        for question, text in zip(asked, map(clean, texts), strict=True):
            done[question.line] = judged = judge(question, text, answers[question.line])
            file.write(json.dumps(judged).encode() + b"\n")
        file.flush()


def count_right(predictions):
    """Accuracy, its interval and "n"; and by upstream's scoring, if that differs anywhere."""
    hits, n = sum(p["correct"] for p in predictions), len(predictions)
    result = {"accuracy": hits / n, "wilson95": wilson(hits, n), "n": n}
    if any("upstream" in p for p in predictions):
        upstream = sum(p.get("upstream", p["correct"]) for p in predictions)
        result["upstream_accuracy"] = upstream / n
    return result


# ----------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def error(self, message):
        raise ValueError(message)


def positive(text):
    """An argparse type: a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return int(text)


def make_parser():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="accuracy|score|similarity|sample")
    one = commands.add_parser("score", description=SCORE)
    one.set_defaults(function=score, run=None, model="")
    add_score_flags(one.add_argument)
    for function, about in ((accuracy, ACCURACY), (similarity, SIMILARITY), (sample, SAMPLE)):
        one = commands.add_parser(function.__name__, description=about)
        one.set_defaults(function=function)
        of = one.add_mutually_exclusive_group(required=True)
        of.add_argument("--run", help="folder of a finished run, logs/<id>")
        if function is sample:
            add_sample_flags(one.add_argument)
            continue
        of.add_argument("--model", help="folder or name on the hub, of a model or LoRA adapter")
        add = one.add_argument
        add("--data", required=True, help="JSON lines of pairs; for similarity, of groups too")
        add_reading_flags(add)
        add("--batch_size", type=positive, default=128, help="examples at a time (128)")
        if function is similarity:
            add("--plot", metavar="FILE.png", help="draw the views")
        else:
            add(
                "--tokens",
                type=positive,
                help="generated at most (twice the longest answer, and 8)",
            )
        add = one.add_argument_group("of a model").add_argument
        add("--plain", action="store_true", help="without its chat template")
        add("--trust_remote_code", action="store_true", help="run Python code of the model")
        if function is accuracy:
            add_task_flags(add)
    return parser


def add_reading_flags(add):
    bad = "what a line that is wrong does; either names it (stop)"
    add("--bad", choices=("stop", "skip"), default="stop", help=bad)
    add("--columns", nargs=2, metavar=("USER", "ASSISTANT"), help="columns of the two texts")


def add_judging_flags(add):
    add("--task", choices=TASKS, help="what is right (each line's key task)")
    add("--databases", metavar="DIR", help="of spider: holds <db_id>/<db_id>.sqlite")


def add_score_flags(add):
    add("--predictions", required=True, metavar="FILE", help="lines with the key prediction")
    add("--data", metavar="FILE", help="the test records, if the predictions lack them")
    add_reading_flags(add)
    add_judging_flags(add)
    add("--keep_thinking", action="store_true", help="judge <think> passages too")


def add_task_flags(add):
    add_judging_flags(add)
    place = "predictions (predictions-<data>-<task>.jsonl in the model's folder)"
    add("--output", metavar="FILE", help=place)
    add("--dtype", choices=("float32", "bf16"), help="of the computation (bf16 on CUDA)")


def add_sample_flags(add):
    add("--prompt", required=True, help="what the text goes on from")
    add("--tokens", type=positive, default=100, help="generated at most (100)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    add("--top_k", type=int, default=50, help="tokens to choose from; 0: all (50)")
    add("--seed", type=int, default=1, help="of the draws (1)")


def check_arguments(args):
    """ValueError if flags of a model are given for a run, or if its folder isn't there."""
    for name in ONLY_MODEL:
        if args.run and getattr(args, name, None):
            raise ValueError(f"--{name} belongs to --model")
    if not args.run and args.model.startswith((".", "/", "~")) and not Path(args.model).is_dir():
        raise ValueError(f"--model {args.model}: no such folder")


def accuracy(args):
    return accuracy_of_run(args) if args.run else accuracy_of_model(args)


@one_line_errors()
def main(argv=None):
    args = make_parser().parse_args(argv)
    check_arguments(args)
    began = time.perf_counter()
    try:
        result, file = args.function(args)
    except torch.OutOfMemoryError:
        raise ValueError("out of GPU memory; lower --batch_size, finished lines are kept") from None
    except ModuleNotFoundError as e:
        raise ValueError(f'{e.name} is missing: pip install -e ".[finetune,eval]"') from None
    result["seconds"] = round(time.perf_counter() - began, 1)
    file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
