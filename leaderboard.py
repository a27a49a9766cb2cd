"""Records and studies whose arithmetic anyone can redo: runs of logs/ become folders of records/, with their logs and source.

    python leaderboard.py add logs/RUN ... --track cpu_5min --name NAME --text "what changed"      records/<track>/<date>_<name>/
    python leaderboard.py study ablations/GRID ... --name NAME --question "what is asked"           records/studies/<name>/
    python leaderboard.py restore records/studies/NAME     its stored runs back into logs/, so that ablate.py goes on there
    python leaderboard.py check                            redo all arithmetic out of the stored logs, then the tables
    python leaderboard.py table                            write the tables: every README in records/, and the studies in README.md
    python leaderboard.py submission records/golf_16mb/RECORD --author NAME --github_id ID          parameter-golf's submission.json

The runs of a record differ in their seed alone. At least 3 of them are a record where they are the first on their data (and, where
seconds count, their hardware), or better than the record before at p < 0.01: Welch's t-test, one-sided. All else is a non-record.
A study holds whole grids of ablate.py; a half-finished one may be stored, restored elsewhere, continued and stored again.
A grid's runs differ in what their arms set, and the seed, alone; those of one seed, which are compared, are of one machine.
check compares numbers with a relative tolerance of 1e-9, p-values and intervals, which scipy's version may round otherwise, of 1e-6.
What stands between <!-- text --> marks is kept, to be edited by hand.
"""
import argparse
import ast
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import re
import shlex
import statistics
import sys
import tarfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ablate
from config import parse_value

ROOT = Path(__file__).resolve().parent
MODULES = {file.stem for file in ROOT.glob("*.py")}
NAME, FILE = r"\w[\w.-]*", r"log\.txt|metrics\.jsonl|result\.json|evaluation-[\w.-]+\.json"  # of a run, record or study; what is stored of a run
LEVEL, LEAST = 0.01, 3  # p, and runs, of a record
TEST = "evaluation-135f85e4.json"  # ablate.py's name for an evaluation on the test.jsonl that data/nlregex.py makes by default
LOOSE = ("p", "holm", "wilcoxon", "low", "high", "tests")  # what check compares with 1e-6
BAR = "=" * 40  # before the names of a log's parts
DEVICE = re.compile(r"^[\d,]+ parameters, \S+ on (\d+) x (\w+), ", re.M)  # a log's line about its processes
HEAD = r"^git commit: (.+)\n(python \S+, torch [^,\n]+).*\nCPU: (\d+) threads"  # of a log's environment
FIELDS = ("seed", "val_loss", "val_bpb", "quantized_val_loss", "quantized_val_bpb", "artifact_bytes", "train_seconds", "train_flops", "time_to_target", "steps")


@dataclass(frozen=True)
class Track:
    """A metric and its better direction; rules (key, what it must be in words, test of the value and of all the run's facts); timed: seconds count, so only
    equal hardware compares; margin: (metric, by how much a record must be better); below: (metric, limit of its mean)."""
    about: str
    metric: str
    rules: tuple
    higher: bool = False
    timed: bool = True
    margin: tuple = ()
    below: tuple = ()


def capped(key, limit):
    """A rule. The step that reaches the cap is the last, but for one that a GPU has queued by then; its size is that of those before it, give or take half."""
    over = lambda run: 1.5 + (key == "train_seconds" and run["device"] == "cuda")
    return key, f"at most {limit:,.6g}, but for the last step", lambda x, run: x <= limit + over(run) * run["last_step"][key]


def equal(key, value):
    return key, repr(value), lambda x, run: x == value


SCRATCH = equal("init_from", "")
CPU = ("hardware", "two CPU threads at most", lambda x, run: run["device"] == "cpu" and run["count"] <= 2)
GPU = ("hardware", "eight GPUs at most, shown by nvidia-smi", lambda x, run: run["device"] == "cuda" and run["count"] <= 8 and "unknown" not in x)
HASHED = ("data_sha256", "known, of data with a meta.json", lambda x, run: x)
TRACKS = {
    "cpu_5min": Track("lowest val_bpb on the embedded corpus after 300 s of training on two CPU cores", "val_bpb",
                      (SCRATCH, CPU, equal("data", "data/stdlib"), HASHED, equal("val_tokens", 0), equal("eval_stride", 0), capped("train_seconds", 300))),
    "nlregex": Track("highest accuracy on test.jsonl of the embedded pairs after 8.0e12 FLOPs of training", "startswith",
                     (SCRATCH, equal("data", "data/nlregex"), HASHED, capped("train_flops", 8.0e12),
                      ("evaluation", f"{TEST}, by ablate.py --evaluate data/nlregex/test.jsonl", lambda x, run: x == TEST), equal("n", 1000)), higher=True, timed=False),
    # The test of the mean is modded-nanogpt's own rule, kept though it follows optional stopping: every run ends at its first val_loss below the limit.
    "fineweb_3.28": Track("least training time, s, to val_loss 3.28 over the first 10,485,760 val tokens of FineWeb, of 27 shards as in configs/fineweb_124m.yaml "
                          "(others are other data); the mean val_loss below it at p < 0.01", "time_to_target",
                          (SCRATCH, GPU, equal("data", "data/fineweb10B"), HASHED, equal("val_tokens", 10_485_760), equal("eval_stride", 0), equal("target_val_loss", 3.28),
                           ("time_to_target", "a time: the target reached", lambda x, run: x is not None)), below=("val_loss", 3.28)),
    "golf_16mb": Track("lowest val_bpb of weights and source in 16,000,000 bytes after 600 s of training on eight GPUs; EVAL_STRIDE is free, as in parameter-golf; "
                       "a record is 0.005 nats better at p < 0.01", "quantized_val_bpb",
                       (SCRATCH, GPU, HASHED, equal("val_tokens", 0), capped("train_seconds", 600), ("artifact_bytes", "at most 16,000,000", lambda x, run: x <= 16_000_000)),
                       margin=("quantized_val_loss", 0.005))}

# ---- runs, out of logs/ or of an archive


@dataclass
class Stored:
    """The files {name: bytes} of a run, none where it isn't finished; of a study's run also arm and seed, as ablate.summarise wants them."""
    name: str
    files: dict
    arm: object = None
    seed: int | None = None

    @property
    def folder(self):
        return ROOT / "logs" / self.name

    @property
    def evaluation(self):
        """The name of the evaluation's file, in which is a digest of the test file; None without one."""
        found = [name for name in self.files if name.startswith("evaluation-")]
        if len(found) > 1:
            raise ValueError(f"{self.name} has several evaluations ({', '.join(found)}); leave the one that counts in its folder")
        return found[0] if found else None

    def result(self):
        """Its result.json, with the evaluation's numbers where there is one; None while it isn't finished."""
        return (json.loads(self.files[self.evaluation]) if self.evaluation else {}) | json.loads(self.files["result.json"]) if self.files else None

    @functools.cached_property
    def log(self):
        """(source {file: text}, environment, lines of the run) of log.txt."""
        head, _, lines = self.files["log.txt"].decode().partition(f"\n{BAR} run\n")
        parts = re.split(rf"^{BAR} (.+)\n", head + "\n", flags=re.M)
        sections = {name: text[:-1] for name, text in zip(parts[1::2], parts[2::2])}  # RunLog adds a line's end to each
        return {name: text for name, text in sections.items() if name != "environment"}, sections.get("environment", ""), lines.splitlines()

    @functools.cached_property
    def steps(self):
        """The rows of metrics.jsonl that training steps wrote: the first five, and every TRAIN_LOG_EVERY."""
        return [row for row in map(json.loads, self.files["metrics.jsonl"].splitlines()) if "train_flops" in row]

    @property
    def source_bytes(self):
        return sum(len(text.encode()) for text in self.log[0].values())

    def facts(self):
        """What rules are about: settings, results, and "data" (the last two parts of its path), "evaluation", "device", "processes", "count" of GPUs or CPU threads,
        "hardware", "commit", "versions", "last_step" (its mean seconds and FLOPs since the last one logged)."""
        result, (_, environment, lines) = self.result(), self.log
        processes, device = DEVICE.search("\n".join(lines)).groups()
        (commit, versions, threads), name = re.search(HEAD, environment).groups(), model_name(environment, device)
        count = int(processes) * (int(threads) if device == "cpu" else 1)
        before = ([dict.fromkeys(("step", "train_time", "train_flops"), 0)] + [row for row in self.steps if row["step"] < result["steps"]])[-1]
        last_step = {key: (result[key] - before[name]) / (result["steps"] - before["step"]) for key, name in (("train_seconds", "train_time"), ("train_flops", "train_flops"))}
        return {**result, **result["config"], "train_flops": result["train_flops"], "data": "/".join(Path(result["config"]["data_path"]).parts[-2:]),
                "evaluation": self.evaluation, "device": device, "processes": int(processes), "count": count, "commit": commit, "versions": versions, "last_step": last_step,
                "hardware": f"{count} x {name or f'unknown {device}'}" + (" (threads)" if device == "cpu" else "")}


def model_name(environment, device):
    """The name of the CPU or GPU in a log's environment, by lscpu or nvidia-smi; None without."""
    found = re.search(r"Model name:\s*(.+)" if device == "cpu" else r"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", environment, re.M)
    return found and found[1]


@contextmanager
def whole(where=""):
    """What a malformed file raises, a KeyError and the like, as a ValueError of one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, SyntaxError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{where}malformed, {type(e).__name__}: {e}") from None


@functools.cache
def imported(text):
    """The files of this project that a source imports at its top level."""
    names = [f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
             for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    parts = [name.split(".") for name in names]
    return {f"{first}.py" for first, *_ in parts if first in MODULES} | {f"data/{rest[0]}.py" for first, *rest in parts if first == "data" and rest}


def faults(run):
    """What is wrong with a finished run's files, a list of lines: a log without source, versions or end, or numbers that it doesn't bear out."""
    absent = [name for name in ("log.txt", "metrics.jsonl", "result.json") if name not in run.files]
    if absent:
        return [f"{run.name} has no {', '.join(absent)}: did it finish?"]
    result, (source, environment, lines), found = run.result(), run.log, []
    listed = re.search(r"^SOURCES = (\(.*?\))", source.get("train_gpt.py", ""), re.M | re.S)
    needed = {*(ast.literal_eval(listed[1]) if listed else ["train_gpt.py with its SOURCES"]), *itertools.chain(*map(imported, source.values()))}
    if missing := sorted(name for name in needed if not source.get(name, "").strip()):
        found.append(f"{run.name}/log.txt doesn't hold its source: no {', '.join(missing)}")
    if not re.search(HEAD, environment) or not DEVICE.search("\n".join(lines)):
        found.append(f"{run.name}/log.txt doesn't hold commit, versions and hardware")
    if not lines or not lines[-1].startswith("result: "):
        return found + [f"{run.name}/log.txt doesn't end with a result: the run did not finish"]
    config, said, artifact = result["config"], dict(re.findall(r"(\w+):(\S+)", lines[-1])), lines[-2:][0].removeprefix("artifact: ").rpartition(" (")[0]
    logged = {}  # settings; of a run that was resumed, those of the last time
    for part in re.split(f"^{BAR} run\n", "\n".join(lines), flags=re.M):
        own = itertools.takewhile(lambda line: line.startswith("config "), part.splitlines())
        logged = dict(line.removeprefix("config ").partition(": ")[::2] for line in own) or logged
    last = ([row for row in map(json.loads, run.files["metrics.jsonl"].splitlines()) if "val_loss" in row] or [{}])[-1]
    loss, bpb, seconds, total = (result[key] for key in ("val_loss", "val_bpb", "train_seconds", "artifact_bytes"))
    for key, value, where, other in (
            *((key, None if result[key] is None else f"{result[key]:.4f}", "log", said.get(key)) for key in ("val_loss", "val_bpb", "quantized_val_bpb")),
            *((key, value, "log", said.get(key)) for key, value in (("artifact_bytes", str(total)), ("steps", str(result["steps"])), ("train_time", f"{1000 * seconds:.0f}ms"))),
            *((key, result[key], "metrics.jsonl", last.get(key)) for key in ("val_loss", "val_bpb")),
            ("steps", result["steps"], "metrics.jsonl", last.get("step")), ("train_seconds", seconds, "metrics.jsonl", last.get("train_time")),
            ("artifact", f"{total - run.source_bytes:,} bytes of weights + {run.source_bytes:,} of source = {total:,}", "log", artifact),
            ("seed", result["seed"], "config", config["seed"]),  # below, the log's lines are config KEY: VALUE (where it comes from)
            *((key, text, "log", text if logged.get(key, "").startswith(f"{text} (") else logged.get(key)) for key in config | logged for text in [repr(config.get(key))]),
            ("time_to_target", result["time_to_target"], "val_loss and train_seconds", seconds if loss <= config["target_val_loss"] else None),
            ("quantized_val_bpb", result["quantized_val_bpb"], "quantized_val_loss, at val_loss and val_bpb,", bpb and result["quantized_val_loss"] * bpb / loss)):
        if any(differences(value, other, key)):
            found.append(f"{run.name}: result.json has {key} {value}, its {where} {other}")
    devices = DEVICE.findall("\n".join(lines))
    environments = [environment, *re.findall(f"^{BAR} environment\n(.*?)^{BAR} run$", "\n".join(lines), re.M | re.S)]
    machines = {(*head[1:], model_name(text, device)) for text in environments for head in re.findall(HEAD, text) for _, device in devices}
    if len(machines) > 1 or len(set(devices)) > 1:
        found.append(f"{run.name}: its machine, versions or number of processes changed on the way")
    if changed := [line for line in lines if re.match(r"warning: \S+ is not what it was before step", line)]:
        found.append(f"{run.name}: its source changed on the way: {changed[0]}")
    at, costs = run.steps[-1], [row["step_flops"] for row in run.steps]
    left = result["steps"] - at["step"]
    if not left * min(costs) / 4 <= result["train_flops"] - at["train_flops"] <= left * max(costs) * 4:  # a step with the term costs below four without
        found.append(f"{run.name}: result.json has train_flops {result['train_flops']} at step {result['steps']}, its metrics.jsonl {at['train_flops']} at step {at['step']}")
    return found


def content(file):
    """What is stored of a file: its bytes, without the place of this project on this machine."""
    return file.read_bytes().replace(f"{ROOT}/".encode(), b"")


def read_run(folder):
    """The Stored run of a folder in logs/; ValueError says what is wrong with its files."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give those of finished runs, logs/<run>")
    run = Stored(named(folder.resolve().name), {file.name: content(file) for file in sorted(folder.iterdir()) if re.fullmatch(FILE, file.name)})
    with whole(f"{run.name}: "):
        if found := faults(run):
            raise ValueError(found[0])
        run.facts()
    return run


def write_archive(path, runs):
    """One tar.xz of all files of Stored runs, the same bytes for the same files. Every log repeats the source; xz stores it once."""
    with tarfile.open(path, "w:xz") as archive:
        for run in sorted(runs, key=lambda run: run.name):
            for name, blob in sorted(run.files.items()):
                member = tarfile.TarInfo(f"{run.name}/{name}")  # time, owner and group are 0
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))


def read_archive(path):
    """{name: Stored run} of an archive, in memory; ValueError where a member is not a file of a run."""
    runs = {}
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                parts = re.fullmatch(f"({NAME})/({FILE})", member.name)
                if not parts or not member.isreg() or parts[2] in runs.setdefault(parts[1], Stored(parts[1], {})).files:
                    raise ValueError(f"member {member.name!r} is not one file RUN/log.txt, metrics.jsonl, result.json or evaluation-*.json")
                runs[parts[1]].files[parts[2]] = archive.extractfile(member).read()
    except (ValueError, tarfile.TarError, lzma.LZMAError, EOFError) as e:
        raise ValueError(f"{path.name}: {e}") from None
    return runs


# ---- records


def p_better(new, old, higher, margin=0.0):
    """One-sided p of Welch's t-test that the mean of `new` is better than that of `old`, by more than the margin; None where values or a spread are missing."""
    from scipy import stats
    if min(len(new), len(old)) < 2 or len(set(new)) == len(set(old)) == 1:
        return None
    sign = 1 if higher else -1
    return float(stats.ttest_ind([sign * x - margin for x in new], [sign * x for x in old], equal_var=False, alternative="greater").pvalue)


def p_below(values, limit):
    """One-sided p of Student's t-test that the mean is below the limit; None where values or a spread are missing."""
    from scipy import stats
    return float(stats.ttest_1samp(values, limit, alternative="less").pvalue) if len(set(values)) > 1 else None


def basis(track, record):
    """What two records must share to be compared: data and, where seconds count, hardware."""
    return record["data_sha256"], record["hardware"] if TRACKS[track].timed else None


def judge(track, record):
    """The record with its verdict: "before", the name of the one that it must beat, "tests" {what is shown: p}, "record"."""
    rule, tests, values = TRACKS[track], {}, lambda record, name: [run[name] for run in record["runs"]]
    earlier = [(folder.name, old) for folder, old in records(track) if old["date"] < record["date"] and old["record"] and basis(track, old) == basis(track, record)]
    name, old = earlier[-1] if earlier else (None, None)
    if old:
        tests[f"{rule.metric} better than {name}'s"] = p_better(values(record, rule.metric), values(old, rule.metric), rule.higher)
        if rule.margin:
            metric, margin = rule.margin
            tests[f"{metric} at least {margin} better"] = p_better(values(record, metric), values(old, metric), False, margin)
    if rule.below:
        tests[f"mean {rule.below[0]} below {rule.below[1]}"] = p_below(values(record, rule.below[0]), rule.below[1])
    return record | {"before": name, "tests": tests, "record": record["n"] >= LEAST and all(p is not None and p < LEVEL for p in tests.values())}


def summary(track, date, runs, weights):
    """A record's result.json without its verdict, of Stored runs and {run: {"weights_bytes", "weights_sha256"}}. ValueError names the run and what it breaks."""
    rule, found = TRACKS[track], sorted(((run, run.facts()) for run in runs), key=lambda pair: pair[1]["seed"])
    for run, facts in found:
        for key, words, test in (*rule.rules, (rule.metric, "a number", lambda x, run: isinstance(x, (int, float)))):
            if not test(facts.get(key), facts):
                raise ValueError(f"{run.name}: {key} is {facts.get(key)!r}; {track} wants it {words}")
        if facts["artifact_bytes"] != weights[run.name]["weights_bytes"] + run.source_bytes:
            raise ValueError(f"{run.name}: artifact_bytes is {facts['artifact_bytes']}, but {weights[run.name]['weights_bytes']} of weights "
                             f"+ {run.source_bytes} of source in its log")
    shared = [{**facts["config"], "source": run.log[0], **{key: facts.get(key) for key in ("data_sha256", "compiled", "processes", "commit", "versions")},
               "hardware": rule.timed and facts["hardware"], "seed": None, "run_id": None} for run, facts in found]
    for (run, _), own in zip(found, shared):
        if differ := [key for key in shared[0] | own if own.get(key) != shared[0].get(key)]:
            raise ValueError(f"{run.name} and {found[0][0].name} differ in {', '.join(differ)}; the runs of a record differ in their seed alone")
    if len({facts["seed"] for _, facts in found}) < len(found):
        raise ValueError(f"two runs have one seed (there are {', '.join(str(facts['seed']) for _, facts in found)}); the runs of a record differ in it")
    values = [facts[rule.metric] for _, facts in found]
    return {"date": date, "metric": rule.metric, "n": len(found), "mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            **{key: found[0][1][key] for key in ("data_sha256", "compiled", "processes", "hardware", "commit")},
            "runs": [{"run": run.name, **{key: facts.get(key) for key in dict.fromkeys((*FIELDS, rule.metric))}, "source_bytes": run.source_bytes, **weights[run.name]}
                     for run, facts in found]}


def config_text(run):
    """The run's settings but for seed and run_id, as YAML: that of JSON's scalars."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in run.result()["config"].items() if name not in ("seed", "run_id"))


def records(track):
    """[(folder, its result.json)] of a track, oldest first."""
    return sorted(((file.parent, json.loads(file.read_text())) for file in (ROOT / "records" / track).glob("*/result.json")), key=lambda found: found[1]["date"])


def add(args):
    runs, date = [read_run(Path(folder)) for folder in args.runs], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    blobs = {run.name: (Path(folder) / "model.int8.zlib").read_bytes() for run, folder in zip(runs, args.runs)}
    weights = {name: {"weights_bytes": len(blob), "weights_sha256": hashlib.sha256(blob).hexdigest()} for name, blob in blobs.items()}
    record = judge(args.track, summary(args.track, date, runs, weights))
    from weights import dequantize
    for name, blob in blobs.items():  # of the right length; whether these are the bytes that the run wrote, their checksum says
        try:
            dequantize(blob)
        except ValueError as e:
            raise ValueError(f"{name}: model.int8.zlib: {e}; copy it again, or leave the run out") from None
    folder = ROOT / "records" / args.track / f"{date[:10]}_{named(args.name)}"
    if folder.exists():
        raise ValueError(f"{shown(folder)} exists; choose another --name")
    folder.mkdir(parents=True)
    write_archive(folder / "logs.tar.xz", runs)
    (folder / "config.yaml").write_text(config_text(runs[0]))
    (folder / "README.md").write_text(marked(args.text), encoding="utf-8")
    save(folder / "result.json", record)
    write_tables()
    print(f"result: {shown(folder)}: {verdict(record)}")


def submission(folder, author, github_id):
    """The content of submission.json, as parameter-golf's records have it: means of the quantised model's numbers, the largest artifact."""
    if folder.parent.name != "golf_16mb":
        raise ValueError(f"{shown(folder)}: only a record of golf_16mb has a submission.json")
    record = json.loads((folder / "result.json").read_text())
    mean = lambda name: statistics.fmean(run[name] for run in record["runs"])
    return {"author": author, "github_id": github_id, "name": folder.name[11:], "blurb": " ".join(text_of(folder / "README.md").split()), "date": record["date"],
            "val_loss": mean("quantized_val_loss"), "val_bpb": mean("quantized_val_bpb"), "bytes_total": max(run["artifact_bytes"] for run in record["runs"]),
            "bytes_code": record["runs"][0]["source_bytes"],
            "seed_results": {str(run["seed"]): {"val_loss": run["quantized_val_loss"], "val_bpb": run["quantized_val_bpb"], "artifact_bytes": run["artifact_bytes"],
                                                "steps": run["steps"], "step_avg_ms": 1000 * run["train_seconds"] / run["steps"]} for run in record["runs"]}}


def submit(args):
    save(args.folder / "submission.json", submission(args.folder, args.author, args.github_id))
    print(f"result: {shown(args.folder)}/submission.json")


# ---- studies


@dataclass(frozen=True)
class StoredArm(ablate.Arm):
    """An arm of a result.json, with the one to which it was compared: what makes a twin may change, a study's pairs don't."""
    paired: ablate.Arm | None = None

    def twin(self, script):
        return self.paired or self


def redo_grid(grid, runs):
    """(a grid's part of a study's result.json, its Stored runs), every number computed out of {name: Stored run}. ValueError where runs aren't what the grid says."""
    arms = {}
    for row in sorted(grid["tables"][0]["arms"], key=lambda row: row["twin"] is not None):  # twins first
        arms[row["arm"]] = StoredArm(tuple(map(tuple, row["settings"])), tuple(map(tuple, row["files"])), arms.get(row["twin"]))
    made = [Stored(r["run"], runs[r["run"]].files if r["run"] in runs else {}, arms[r["arm"]], r["seed"]) for r in grid["runs"]]
    everywhere = re.findall(r"--(\w+)[= ](\S*\{seed\}\S*)", " ".join(grid["command"]))  # flags for all arms
    agreed, data, finished = {}, {}, [run for run in made if run.files]
    for run in finished:
        facts, replaced = run.facts(), dict(run.arm.files)
        own = {name: value for name, value in everywhere if name in facts["config"]} | dict(run.arm.settings) | {"seed": run.seed}
        for name, value in own.items():
            if parse_value(type(facts["config"][name]), str(value).replace("{seed}", str(run.seed)), name) != facts["config"][name]:
                raise ValueError(f"{run.name} has {name} {facts['config'][name]}, which is not {run.arm.label}, seed {run.seed}")
        data[facts["data"]] = facts.get("data_sha256")
        shared = {**facts["config"], "data_path": facts["data"], "compiled": facts["compiled"], f"data_sha256 of {facts['data']}": facts.get("data_sha256"),
                  f"hardware or versions of seed {run.seed}": (facts["hardware"], facts["versions"]),  # or times wouldn't compare, nor results at equal seconds
                  **{f"{file} of {replaced[file]}" if file in replaced else file: text for file, text in run.log[0].items()}}
        for name, value in ((name, value) for name, value in shared.items() if name not in own and name != "run_id"):
            first, known = agreed.setdefault(name, (run.name, value))
            if value != known:
                raise ValueError(f"{run.name} and {first} differ in {name}; a grid's runs differ in what their arms set, and the seed, alone")
    for run, (file, path) in ((run, pair) for run in finished for pair in run.arm.files):
        if run.log[0].get(file) in (None, agreed.get(file, ("", None))[1]):
            raise ValueError(f"{run.name}/log.txt doesn't hold the {file} of {path}, but " + ("that of other arms" if file in run.log[0] else "none"))
    tables = []
    for metric in (one["metric"] for one in grid["tables"]):
        rows, line = ablate.summarise([arms[row["arm"]] for row in grid["tables"][0]["arms"]], made, grid["script"], metric, arms.get(grid["baseline"]))
        tables.append({"metric": metric, "summary": line, "arms": rows})
    redone = {**{key: grid[key] for key in ("grid", "command", "script", "baseline")}, "data": dict(sorted(data.items())), "tables": tables,
              "runs": [{"arm": run.arm.label, "seed": run.seed, "run": run.name, "finished": bool(run.files)} for run in made]}
    return json.loads(json.dumps(redone)), made


def study(args):
    folder, runs, redone = ROOT / "records" / "studies" / named(args.name), {}, []
    for path in map(Path, args.grids):
        if not (path / "result.json").is_file():
            raise ValueError(f"{path}: no result.json of ablate.py in it")
        with whole(f"{path}: "):
            grid = json.loads((path / "result.json").read_text().replace(f"{ROOT}/", "")) | {"grid": named(path.resolve().name)}
            if grid.get("script") != "train_gpt.py":
                raise ValueError(f"{path} is a grid of {grid.get('script')}; a study needs logs that hold their source, as train_gpt.py writes them")
            wanted = ("result.json", *(["evaluation-*.json"] if any(flag.startswith("--evaluate") for flag in grid["command"]) else []))
            runs |= {r["run"]: read_run(ROOT / "logs" / r["run"]) for r in grid["runs"] if all(any((ROOT / "logs" / r["run"]).glob(file)) for file in wanted)}
            redone.append(redo_grid(grid, runs))
    if not runs:
        raise ValueError(f"no run of {', '.join(args.grids)} has finished; there is nothing to store")
    if (folder / "logs.tar.xz").exists() and (lost := read_archive(folder / "logs.tar.xz").keys() - runs.keys()):
        raise ValueError(f"{shown(folder)} holds runs that this would lose ({', '.join(sorted(lost))}): restore it and give all its grids, or remove the folder to begin anew")
    text = args.question or ((folder / "README.md").exists() and text_of(folder / "README.md"))
    if not text:
        raise ValueError("a new study needs its --question")
    folder.mkdir(parents=True, exist_ok=True)
    for grid, made in redone:
        ablate.draw(folder / f"{grid['grid']}.png", grid["tables"][0]["arms"], made, grid["tables"][0]["metric"], compared_with(grid))
    write_archive(folder / "logs.tar.xz", runs.values())
    save(folder / "result.json", {"grids": [grid for grid, _ in redone]})
    (folder / "README.md").write_text(marked(text), encoding="utf-8")
    write_tables()
    rest = "" if (folder / "run.sh").exists() else "; write its run.sh, the one command"
    print(f"result: {shown(folder)}: {len(runs)} of {sum(len(grid['runs']) for grid, _ in redone)} runs{rest}")


def restore(args):
    """Unpack a study's runs into logs/. Nothing is overwritten, and a run with another content there is left alone."""
    count = 0
    for run in read_archive(args.folder / "logs.tar.xz").values():
        missing = [name for name in run.files if not (run.folder / name).exists()]
        if other := [name for name in run.files if name not in missing and content(run.folder / name) != run.files[name]]:
            print(f"warning: logs/{run.name} is left as it is: another {', '.join(other)} is there")
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(missing):  # result.json, which says that a run is finished, is the last
            (run.folder / name).write_bytes(run.files[name])
        count += len(missing)
    print(f"result: {count} files restored into logs/")


# ---- tables


def shown(path):
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def named(name):
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{name!r}: a name holds letters, digits, '_', '.' and '-' only, and begins with none of the last two")
    return name


def save(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def marked(text, mark="text"):
    return f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->"


def text_of(readme, mark="text"):
    """What stands between the marks of a README; ValueError where they are missing."""
    found = re.search(marked("(.*?)", mark), readme.read_text(encoding="utf-8"), re.S)
    if not found:
        raise ValueError(f"{shown(readme)} has lost its lines <!-- {mark} --> and <!-- /{mark} -->; put them back")
    return found[1]


def show(x, form):
    return "" if x is None else format(x, form)


def table(names, rows):
    """The lines of a Markdown table."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(names), "|---" * len(names) + "|", *map(line, rows)]


def verdict(record):
    """One line: what it is, its mean, and what that was tested against."""
    return "; ".join([f"{'record' if record['record'] else 'non-record'}, {record['metric']} {mean_sd(record)} over {record['n']} runs",
                      *(f"{what}: p = {show(p, '.2g') or 'not known'}" for what, p in record["tests"].items()),
                      *([] if record["before"] else ["none before it to compare with"]), *([f"fewer than {LEAST} runs: no claim"] if record["n"] < LEAST else [])])


def mean_sd(record):
    return " ± ".join(filter(None, (show(record["mean"], ".5g"), show(record["sd"], ".2g"))))


def record_readme(track, folder, record):
    many = f" --nproc_per_node={record['processes']}" if record["processes"] > 1 else ""
    names = [name for name in record["runs"][0] if name != "weights_sha256"]
    rows = [[show(run[name], ".7g" if isinstance(run[name], float) else "") for name in names] for run in record["runs"]]
    return "\n".join([f"# {folder.name[11:]}", "", f"{record['date'][:10]}, track {track}: {TRACKS[track].about}.", f"Result: {verdict(record)}.", "",
                      marked(text_of(folder / "README.md")), "",
                      f"Command: `torchrun --standalone{many} train_gpt.py --config {shown(folder)}/config.yaml --seed SEED`", "",
                      f"On {record['hardware']}, {'' if record['compiled'] else 'not '}compiled, data {record['data_sha256']}, commit {record['commit']}.",
                      "The whole source and all versions are in logs.tar.xz.", "", *table(names, rows), ""])


def records_readme():
    lines = ["# Records", "", "Made by `python leaderboard.py table`; `python leaderboard.py check` redoes the arithmetic. Ranks and p-values hold among entries of the same data",
             "and, where seconds count, the same hardware; others are not compared, and of each such group the first with 3 runs is a record.", ""]
    for track, rule in TRACKS.items():
        rows, groups = [], {}
        for folder, record in records(track):
            groups.setdefault(basis(track, record), []).append((folder, record))
        for group in groups.values():
            for rank, (folder, record) in enumerate(sorted(group, key=lambda found: found[1]["mean"], reverse=rule.higher), 1):
                p = show(next(iter(record["tests"].values())), ".2g") if record["before"] else "not compared"
                rows.append((rank, "record" if record["record"] else "non-record", record["date"][:10], folder.name[11:], mean_sd(record), record["n"], p,
                             record["data_sha256"][:8], record["hardware"], f"[command]({track}/{folder.name}/README.md)"))
        lines += [f"## {track}", "", f"{rule.about[0].upper()}{rule.about[1:]}. Of each run: {'; '.join(f'{key} {words}' for key, words, _ in rule.rules)}.", "",
                  *table(("rank", "", "date", "name", rule.metric, "n", "p, against the record before", "data", "hardware", ""), rows), ""]
    return "\n".join(lines)


def compared_with(grid):
    return "baseline" if grid["baseline"] else "twin"


def study_readme(folder, grids):
    lines = [f"# {folder.name}", "", marked(text_of(folder / "README.md")), "", f"All of it: `bash {shown(folder)}/run.sh`", ""]
    for grid in grids:
        data = ", ".join(f"{path} (sha256 {sha or 'unknown'})" for path, sha in grid["data"].items())
        lines += [f"## {grid['grid']}", "", f"`python ablate.py {shlex.join(grid['command'])}`", "", f"Data: {data}.",
                  *(line for one in grid["tables"] for line in (f"{one['summary']}.", "", ablate.markdown(one["arms"], one["metric"], compared_with(grid)), "")),
                  f"![{grid['grid']}]({grid['grid']}.png)", ""]
    return "\n".join(lines)


def study_rows(folder, grids):
    """The rows of README.md's table: every arm of a study that was tested against its twin, by its grid's first metric; those of a grid with fewer
    than 3 seeds, made to choose a setting, are not. Its cost is in FLOPs: seconds tell more of a machine that runs several at a time than of an arm."""
    for grid in grids:
        metric, rows = grid["tables"][0]["metric"], {row["arm"]: row for row in grid["tables"][0]["arms"]}
        for arm, found in ((arm, arm["paired"]) for arm in rows.values() if "paired" in arm and arm["paired"]["holm"] is not None):
            flops = arm["flops"] and rows[arm["twin"]]["flops"] and arm["flops"] / rows[arm["twin"]]["flops"]
            interval = " .. ".join(filter(None, (show(found["low"], "+.5f"), show(found["high"], "+.5f"))))
            yield (f"[{folder.name}]({shown(folder)}/README.md)", grid["grid"], arm["arm"], ", ".join(grid["data"]), found["n"], metric,
                   show(found["difference"], "+.5f"), interval, show(found["holm"], ".3g"), f"{flops:.2f}x" if flops else "")


def write_tables():
    """Write what is generated of the READMEs; returns those that were otherwise."""
    studies = [(file.parent, json.loads(file.read_text())["grids"]) for file in sorted((ROOT / "records" / "studies").glob("*/result.json"))]
    names = ("study", "grid", "arm", "data", "n", "metric", "difference", "95% interval", "p (Holm)", "FLOPs")
    block = "\n".join(table(names, [cells for one in studies for cells in study_rows(*one)]))
    top = ROOT / "README.md"
    made = {top: top.read_text(encoding="utf-8").replace(marked(text_of(top, "studies"), "studies"), marked(block, "studies")),
            ROOT / "records" / "README.md": records_readme(),
            **{folder / "README.md": record_readme(track, folder, record) for track in TRACKS for folder, record in records(track)},
            **{folder / "README.md": study_readme(folder, grids) for folder, grids in studies}}
    changed = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(made[path], encoding="utf-8")
    return changed


# ---- check


def differences(found, right, where, near=1e-9):
    """Yield a line for every place where two values of JSON differ, numbers by more than so much of their size."""
    if isinstance(found, dict) and isinstance(right, dict):
        for key in found | right:
            yield from differences(found.get(key), right.get(key), f"{where} {key}", 1e-6 if key in LOOSE else near)
    elif isinstance(found, list) and isinstance(right, list) and len(found) == len(right):
        for i, pair in enumerate(zip(found, right)):
            yield from differences(*pair, f"{where}[{i}]", near)
    elif not (math.isclose(found, right, rel_tol=near) if {type(found), type(right)} <= {int, float} else found == right):
        yield f"{where} is {found!r}, its logs give {right!r}"


def stored(folder):
    """(result.json, {name: Stored run}, the faults of these) of a record or study."""
    if absent := [name for name in ("result.json", "logs.tar.xz") if not (folder / name).is_file()]:
        raise ValueError(f"no {', '.join(absent)}")
    runs, wrong = read_archive(folder / "logs.tar.xz"), []
    for run in runs.values():
        with whole(f"logs.tar.xz: {run.name}: "):
            wrong += [f"logs.tar.xz: {fault}" for fault in faults(run)]
    return json.loads((folder / "result.json").read_text()), runs, wrong


def check_record(folder):
    """Yield the faults of a record: what its archive doesn't bear out."""
    track, (record, runs, wrong) = folder.parent.name, stored(folder)
    if track not in TRACKS or record["date"][:10] != folder.name[:10]:
        raise ValueError(f"must be TRACK/DATE_NAME, with its own date ({record['date'][:10]}) and a track of {', '.join(TRACKS)}")
    if wrong:
        yield from wrong
        return
    weights = {run["run"]: {key: run[key] for key in ("weights_bytes", "weights_sha256")} for run in record["runs"]}
    if weights.keys() != runs.keys():
        raise ValueError(f"result.json and logs.tar.xz hold different runs ({', '.join(sorted(weights.keys() ^ runs.keys()))})")
    yield from differences(record, judge(track, summary(track, record["date"], runs.values(), weights)), "result.json:")
    if (folder / "config.yaml").read_text() != config_text(next(iter(runs.values()))):
        yield "config.yaml is not that of its runs"
    if (folder / "submission.json").exists():
        sent = json.loads((folder / "submission.json").read_text())
        yield from differences(sent, submission(folder, sent["author"], sent["github_id"]), "submission.json:")


def check_study(folder):
    """Yield the faults of a study."""
    result, runs, wrong = stored(folder)
    grids = result["grids"]
    wrong += [f"logs.tar.xz: {name} is a run of none of its grids" for name in runs if name not in {r["run"] for grid in grids for r in grid["runs"]}]
    yield from wrong + [f"no {name}" for name in ("run.sh", *(f"{grid['grid']}.png" for grid in grids)) if not (folder / name).is_file()]
    for grid in grids if not wrong else []:
        yield from differences(grid, redo_grid(grid, runs)[0], f"result.json, grid {grid['grid']}:")


def rewritten():
    """Yield a line for every table that wasn't what the result.json files give; it is now."""
    for path in write_tables():
        yield f"{shown(path)} was not what the result.json files give; rewritten"


def check(args):
    """Redo the arithmetic of all that is in records/, then, where it is right, the tables; one line for each fault, and exit status 1."""
    found, files = [], [file for file in (ROOT / "records").glob("*/*/*") if file.parents[1].name != "studies" or file.name in ("result.json", "logs.tar.xz")]
    folders = sorted({file.parent for file in files})  # a study that wasn't run yet has neither of the two

    def note(where, lines):
        try:
            with whole():
                found.extend(f"{where}: {fault}" for fault in lines)
        except (ValueError, OSError) as e:
            found.append(f"{where}: {e}")
    for folder in folders:
        note(shown(folder), (check_study if folder.parent.name == "studies" else check_record)(folder))
    if not found:
        note("tables", rewritten())
    if found:
        print(*found, f"{len(found)} fault(s)", sep="\n", file=sys.stderr)
        raise SystemExit(1)
    print(f"result: {len(folders)} records and studies, no fault")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    def command(name, do, about):
        p = commands.add_parser(name, help=about, allow_abbrev=False)
        p.set_defaults(do=do)
        return p
    p = command("add", add, "finished runs become a record, or a non-record")
    p.add_argument("runs", nargs="+", metavar="logs/RUN")
    p.add_argument("--track", choices=TRACKS, required=True)
    p.add_argument("--name", required=True, help="of the folder, behind the date")
    p.add_argument("--text", required=True, help="what changed, for its README")
    p = command("study", study, "grids of ablate.py become a study, or update it")
    p.add_argument("grids", nargs="+", metavar="ablations/GRID")
    p.add_argument("--name", required=True, help="of the folder")
    p.add_argument("--question", help="for its README (default: what stands there)")
    command("restore", restore, "a study's runs back into logs/").add_argument("folder", type=lambda text: Path(text).resolve(), metavar="records/studies/NAME")
    p = command("submission", submit, "write a record's submission.json")
    p.add_argument("folder", type=lambda text: Path(text).resolve(), metavar="records/golf_16mb/RECORD")
    p.add_argument("--author", required=True)
    p.add_argument("--github_id", required=True)
    command("check", check, "redo the arithmetic of all that is in records/, then the tables")
    command("table", lambda args: print(f"result: {', '.join(map(shown, write_tables())) or 'nothing'} changed"), "write the tables")
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None
    except ImportError as e:
        raise SystemExit(f'error: needs {e.name}: pip install -e ".[eval]"') from None


if __name__ == "__main__":
    main()
