"""Records and studies: finished runs become folders of records/ whose numbers anyone can redo.

    python leaderboard.py add logs/RUN ... --track cpu_5min --name NAME --text "what changed"
    python leaderboard.py study ablations/GRID ... --name NAME --question "what is asked"
    python leaderboard.py restore records/studies/NAME    put its runs back into logs/
    python leaderboard.py check                           redo every number, then the tables
    python leaderboard.py table [--draw]                  write the tables [and the pictures]

The runs of a record differ in their seed alone. Three of them or more are a record if they are the
first on their data (and, if the track counts seconds, on their hardware), or if they are better
than the record before at p < 0.01, in Welch's one-sided t-test. All others are a non-record.

A study holds whole grids of ablate.py. The runs of a grid differ in what their arms set, and in
their seed. Runs of one seed are compared, so they must come from one machine. A study that is half
finished can be stored, restored elsewhere, continued, and stored again.

Each folder keeps its runs in logs.tar.xz. Its result.json holds what follows from them, and the
archive's sha256. `check` computes result.json again. It allows a relative difference of 1e-9, and
of 1e-6 for p-values and intervals, which depend on the version of scipy. Pages are written by hand,
but for what stands between their marks <!-- table --> and <!-- /table -->.
"""

import argparse
import functools
import hashlib
import io
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
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from nanojepa.files import one_line_errors, sha256_file
from nanojepa.settings import read_yaml
from nanojepa.weights import dequantize

try:
    from nanojepa import plots, stats
    from nanojepa.stats import LEAST_SEEDS, markdown_table, show
except ImportError as error:
    raise SystemExit(f'error: needs {error.name}: pip install -e ".[eval]"') from None

ROOT = Path(__file__).resolve().parent
NAME = r"\w[\w.-]*"  # of a run, a record or a study
NEEDED = ("environment.json", "log.txt", "metrics.jsonl", "result.json")
FILE = r"environment\.json|log\.txt|metrics\.jsonl|result\.json|evaluation-[\w.-]+\.json"
LEVEL = 0.01  # a record needs a p below it
# what must stay as it is if a run is resumed
MACHINE = ("python", "torch", "cpu", "threads", "gpus", "world_size")
# what check compares with 1e-6
LOOSE = ("p", "holm", "wilcoxon", "low", "high", "smallest", "tests")
# what a record shows of each run
COLUMNS = (
    *("seed", "val_loss", "val_bpb", "quantized_val_loss", "quantized_val_bpb", "artifact_bytes"),
    *("train_seconds", "train_flops", "time_to_target", "steps"),
)
# the grid and the arm that docs/twin.png shows
TWINS = ("span_text", "jepa_lambda=0.02")


# ------------------------------------------------------------------------------------------ tracks


@dataclass(frozen=True)
class Track:
    """What is compared, and which runs may take part. records/tracks.yaml explains the fields."""

    about: str
    metric: str
    equal: dict
    most: dict = field(default_factory=dict)
    cap: dict = field(default_factory=dict)
    device: str = ""
    devices: int = 0
    higher: bool = False
    timed: bool = True
    margin: tuple = ()
    below: tuple = ()


TRACKS = {
    name: Track(**fields) for name, fields in read_yaml(ROOT / "records" / "tracks.yaml").items()
}


def broken_rules(track, facts):
    """Yield (fact, what the track wants it to be) of each rule that a run breaks."""
    for key, value in track.equal.items():
        if facts.get(key) != value:
            yield key, repr(value)
    for key, limit in track.most.items():
        if facts[key] > limit:
            yield key, f"at most {limit:,}"
    for key, limit in track.cap.items():
        # The last step may be half as long again as the mean one. A GPU has queued one more step by
        # the time the clock is read.
        steps = 1.5 + (key == "train_seconds" and facts["device"] == "cuda")
        if facts[key] > limit + steps * facts[key] / facts["steps"]:
            yield key, f"at most {limit:,.6g}, but for the last step"
    if track.device and (facts["device"] != track.device or facts["devices"] > track.devices):
        yield "hardware", f"at most {track.devices} of {track.device}"
    if facts["data_sha256"] is None:
        yield "data_sha256", "known, of data with a meta.json"
    if not isinstance(facts.get(track.metric), (int, float)):
        yield track.metric, "a number"


# ------------------------------------------------------------------------------------- stored runs


@dataclass
class Run:
    """The stored files of a finished run, {name: bytes}."""

    name: str
    files: dict[str, bytes]

    @property
    def folder(self):
        return ROOT / "logs" / self.name

    @property
    def evaluation(self):
        """The name of its evaluation, which has a digest of the test file in it, or None."""
        names = [name for name in self.files if name.startswith("evaluation-")]
        if len(names) > 1:
            raise ValueError(
                f"{self.name} has several evaluations ({', '.join(names)}); "
                "leave the one that counts in its folder"
            )
        return names[0] if names else None

    @functools.cached_property
    def result(self):
        """Its result.json, with the numbers of its evaluation if there is one."""
        evaluated = json.loads(self.files[self.evaluation]) if self.evaluation else {}
        return evaluated | json.loads(self.files["result.json"])

    @functools.cached_property
    def starts(self):
        """Its environment.json: one object for each start of the process."""
        return json.loads(self.files["environment.json"])

    @property
    def sources(self):
        """{file: sha256} of the source that trained it."""
        return self.starts[0]["sources"]

    @functools.cached_property
    def rows(self):
        """The lines of its metrics.jsonl."""
        return [json.loads(line) for line in self.files["metrics.jsonl"].splitlines()]

    @functools.cached_property
    def facts(self):
        """What the rules of a track are about: settings, results, and where it ran."""
        start, config = self.starts[0], self.result["config"]
        if start["gpus"]:
            device, devices, model = "cuda", start["world_size"], start["gpus"][0]
        else:
            device, devices = "cpu", start["world_size"] * start["threads"]
            model = f"{start['cpu'] or 'unknown CPU'} (threads)"
        return {
            **config,
            **self.result,
            "data": "/".join(Path(config["data_path"]).parts[-2:]),
            "evaluation": self.evaluation,
            "device": device,
            "devices": devices,
            "hardware": f"{devices} x {model}",
            "processes": start["world_size"],
            "versions": f"python {start['python']}, torch {start['torch']}",
            "commit": start["git_commit"] + " with uncommitted changes" * start["uncommitted"],
        }


@contextmanager
def well_formed(where=""):
    """Turn what a malformed file raises, a KeyError and the like, into a ValueError of one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, json.JSONDecodeError) as e:
        raise ValueError(f"{where}malformed, {type(e).__name__}: {e}") from None


def faults(run):
    """The faults of a run's own files, one line each."""
    if absent := [name for name in NEEDED if name not in run.files]:
        return [f"{run.name} has no {', '.join(absent)}: did it finish?"]
    with well_formed(f"{run.name}: "):
        return [f"{run.name}: {fault}" for fault in (*changes(run.starts), *contradictions(run))]


def changes(starts):
    """Yield what was another at a later start of a run, which makes it another run."""
    first = starts[0]
    if not first["sources"]:
        yield "environment.json names no sources"
    for start in starts[1:]:
        again = f"resumed at step {start['step']}"
        for name in MACHINE:
            if start[name] != first[name]:
                yield f"{again} with {name} {start[name]!r}, which was {first[name]!r}"
        for file in first["sources"] | start["sources"]:
            if start["sources"].get(file) != first["sources"].get(file):
                yield f"{again} with another {file}"


def contradictions(run):
    """Yield where result.json contradicts metrics.jsonl or itself."""
    facts = run.facts
    end = next(row for row in reversed(run.rows) if "val_loss" in row)
    at_target = facts["val_loss"] <= facts["target_val_loss"]
    bits = facts["val_bpb"] and facts["val_bpb"] / facts["val_loss"] * facts["quantized_val_loss"]
    for key, other, source in (
        ("val_loss", end["val_loss"], "metrics.jsonl"),
        ("val_bpb", end.get("val_bpb"), "metrics.jsonl"),
        ("steps", end["step"], "metrics.jsonl"),
        ("train_seconds", end["train_time"], "metrics.jsonl"),
        ("seed", run.result["config"]["seed"], "config"),
        ("time_to_target", facts["train_seconds"] if at_target else None, "val_loss"),
        ("quantized_val_bpb", bits, "quantized_val_loss"),
    ):
        if any(differences(facts[key], other, key)):
            yield f"result.json has {key} {facts[key]}, its {source} gives {other}"
    steps = [row for row in run.rows if "train_flops" in row]  # not all: what was logged
    last, costs = steps[-1], [row["step_flops"] for row in steps]
    left, flops = facts["steps"] - last["step"], facts["train_flops"] - last["train_flops"]
    # A step with the term costs less than four without.
    if not left * min(costs) / 4 <= flops <= left * max(costs) * 4:
        yield (
            f"result.json has train_flops {facts['train_flops']} at step {facts['steps']}, "
            f"its metrics.jsonl {last['train_flops']} at step {last['step']}"
        )


def content(file):
    """What is stored of a file: its bytes, without the place of this project on this machine."""
    return file.read_bytes().replace(f"{ROOT}/".encode(), b"")


def read_run(folder):
    """The Run in a folder of logs/. ValueError says what is wrong with its files."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give those of finished runs, logs/<run>")
    files = [file for file in sorted(folder.iterdir()) if re.fullmatch(FILE, file.name)]
    run = Run(checked(folder.resolve().name), {file.name: content(file) for file in files})
    if found := faults(run):
        raise ValueError(found[0])
    return run


def write_archive(path, runs):
    """Write the files of runs as one tar.xz, the same bytes for the same files.

    Every log repeats the source; xz stores it once.
    """
    with tarfile.open(path, "w:xz") as archive:
        for run in sorted(runs, key=lambda run: run.name):
            for name, blob in sorted(run.files.items()):
                member = tarfile.TarInfo(f"{run.name}/{name}")  # time, owner and group are 0
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))


def read_archive(path):
    """{name: Run} of an archive, in memory. ValueError if a member is not a file of a run."""
    runs = {}
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                parts = re.fullmatch(f"({NAME})/({FILE})", member.name)
                if not parts or not member.isreg():
                    raise ValueError(f"member {member.name!r} is not a file of a run")
                files = runs.setdefault(parts[1], Run(parts[1], {})).files
                if parts[2] in files:
                    raise ValueError(f"member {member.name!r} is there twice")
                files[parts[2]] = archive.extractfile(member).read()
    except (ValueError, tarfile.TarError, lzma.LZMAError, EOFError) as e:
        raise ValueError(f"{path.name}: {e}") from None
    return runs


# ----------------------------------------------------------------------------------------- records


def records(track):
    """[(folder, its result.json)] of a track, oldest first."""
    files = (ROOT / "records" / track).glob("*/result.json")
    stored = [(file.parent, json.loads(file.read_text())) for file in files]
    return sorted(stored, key=lambda pair: pair[1]["date"])


def basis(track, record):
    """What two records must share to be compared: data and, if seconds count, hardware."""
    return record["data_sha256"], record["hardware"] if TRACKS[track].timed else None


def judge(track, record):
    """The record with its verdict.

    before: the name of the record that it must beat. tests: {what is tested: p}. record: is it one?
    """
    rules, tests = TRACKS[track], {}
    name, old = None, None
    for folder, other in records(track):  # the last one stays
        comparable = other["record"] and basis(track, other) == basis(track, record)
        if comparable and other["date"] < record["date"]:
            name, old = folder.name, other

    def values(of, metric):
        return [run[metric] for run in of["runs"]]

    def better(metric, *how):
        return stats.p_better(values(record, metric), values(old, metric), *how)

    if old:
        tests[f"{rules.metric} better than {name}'s"] = better(rules.metric, rules.higher)
    if old and rules.margin:
        metric, margin = rules.margin
        tests[f"{metric} at least {margin} better"] = better(metric, False, margin)
    if rules.below:
        metric, limit = rules.below
        tests[f"mean {metric} below {limit}"] = stats.p_below(values(record, metric), limit)
    proved = all(p is not None and p < LEVEL for p in tests.values())
    is_record = record["n"] >= LEAST_SEEDS and proved
    return {**record, "before": name, "tests": tests, "record": is_record}


def summary(track, date, runs, weights):
    """A record's result.json without its verdict. ValueError names a run and what it breaks.

    weights: {name of a run: size and sha256 of its artifact}.
    """
    metric = TRACKS[track].metric
    for run in runs:
        for key, words in broken_rules(TRACKS[track], run.facts):
            value = run.facts.get(key)
            raise ValueError(f"{run.name}: {key} is {value!r}; {track} wants it {words}")
    runs = sorted(runs, key=lambda run: run.facts["seed"])
    check_alike(track, runs, weights)
    values = [run.facts[metric] for run in runs]
    shared = ("data_sha256", "compiled", "processes", "hardware", "commit")
    columns = dict.fromkeys((*COLUMNS, metric))
    return {
        "date": date,
        "metric": metric,
        "n": len(runs),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        **{name: runs[0].facts[name] for name in shared},
        "runs": [
            {
                "run": run.name,
                **{name: run.facts.get(name) for name in columns},
                **weights[run.name],
            }
            for run in runs
        ],
    }


def check_alike(track, runs, weights):
    """ValueError if the runs of a record differ in more than their seed."""
    seeds = [run.facts["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two runs have one seed (there are {', '.join(map(str, seeds))})")
    made = {}
    for run in runs:
        size = run.facts["artifact_bytes"] - weights[run.name]["weights_bytes"]
        made[run.name] = {**shared_facts(run), "source": run.sources, "bytes of source": size}
        names = ("processes", "versions", "commit", *(["hardware"] if TRACKS[track].timed else []))
        made[run.name] |= {name: run.facts[name] for name in names}
    agreed(made, "the runs of a record differ in their seed alone")


def shared_facts(run):
    """{fact: value} of the settings, the data and the compilation of a run."""
    facts, data = run.facts, run.facts["data"]
    made = {"data_path": data, f"data_sha256 of {data}": facts["data_sha256"]}
    return settings_of(run) | made | {"compiled": facts["compiled"]}


def agreed(made, rule):
    """{fact: value} of {name of a run: such a dict}. ValueError if two runs differ in one."""
    first = {}
    for name, facts in made.items():
        for fact, value in facts.items():
            other, known = first.setdefault(fact, (name, value))
            if value != known:
                raise ValueError(f"{name} and {other} differ in {fact}; {rule}")
    return {fact: value for fact, (_, value) in first.items()}


def settings_of(run):
    """The settings of a run that another may repeat: all but seed, name and what it resumed."""
    own = ("seed", "run_id", "resume")
    return {name: value for name, value in run.result["config"].items() if name not in own}


def add(args):
    """Make a record, or a non-record, of runs in logs/."""
    runs = [read_run(folder) for folder in args.runs]
    weights = {run.name: artifact(folder) for run, folder in zip(runs, args.runs, strict=True)}
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with well_formed():
        record = judge(args.track, summary(args.track, date, runs, weights))
    folder = ROOT / "records" / args.track / f"{date[:10]}_{checked(args.name)}"
    if folder.exists():
        raise ValueError(f"{shown(folder)} exists; choose another --name")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings_of(runs[0]), sort_keys=False))
    store(folder, runs, record, args.name, args.text)
    print(f"result: {shown(folder)}: {verdict(record)}")


def artifact(folder):
    """Size and sha256 of a run's model.int8.zlib. ValueError if it is damaged."""
    blob = (folder / "model.int8.zlib").read_bytes()
    try:
        dequantize(blob)
    except ValueError as e:
        raise ValueError(
            f"{folder.name}: model.int8.zlib: {e}; copy it again, or leave the run out"
        ) from None
    return {"weights_bytes": len(blob), "weights_sha256": hashlib.sha256(blob).hexdigest()}


def store(folder, runs, result, title, text):
    """Write what a record or study consists of, then all tables. Without a text its page stays."""
    write_archive(folder / "logs.tar.xz", runs)
    result = {"logs_sha256": sha256_file(folder / "logs.tar.xz"), **result}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if text:
        page = f"# {title}\n\n{text}\n\n<!-- table -->\n<!-- /table -->\n"
        (folder / "README.md").write_text(page, encoding="utf-8")
    write_tables()


# ----------------------------------------------------------------------------------------- studies


def studies():
    """[(folder, its grids)] of all studies."""
    files = sorted((ROOT / "records" / "studies").glob("*/result.json"))
    return [(file.parent, json.loads(file.read_text())["grids"]) for file in files]


def redo_grid(grid, runs):
    """A grid's part of a study's result.json, with every number computed from {name: Run}.

    ValueError if the runs are not what the grid says.
    """
    arms = {}
    for row in grid["tables"][0]["arms"]:
        arm = stats.Arm(
            tuple(map(tuple, row["settings"])), tuple(map(tuple, row["files"])), row["twin"]
        )
        arms[arm.label] = arm
    for arm in arms.values():
        if arm.twin is not None and arm.twin not in arms:
            raise ValueError(f"{arm.label} has no twin: {arm.twin} is not in the grid")
    planned = [(arms[one["arm"]], one["seed"], runs.get(one["run"])) for one in grid["runs"]]
    finished = [(arm, seed, run) for arm, seed, run in planned if run]
    check_grid(grid["command"], finished)
    trials = [
        stats.Trial(arm.label, seed, run.result if run else None) for arm, seed, run in planned
    ]
    found = [
        stats.summarise(arms.values(), trials, table["metric"], compared_with(grid))
        for table in grid["tables"]
    ]
    redone = {
        **{key: grid[key] for key in ("grid", "command", "script", "baseline")},
        "data": {run.facts["data"]: run.facts["data_sha256"] for _, _, run in finished},
        "tables": [one._asdict() for one in found],
        "runs": [{**one, "finished": one["run"] in runs} for one in grid["runs"]],
    }
    return json.loads(json.dumps(redone))  # as it is read again: JSON has texts as keys


def check_grid(command, finished):
    """ValueError if runs differ in more than their arms and their seed.

    finished: [(Arm, seed, Run)]. command: the arguments of ablate.py.
    """
    with_seed = re.findall(r"--(\w+)[= ](\S*\{seed\}\S*)", " ".join(command))  # flags for all arms
    made = {}
    for arm, seed, run in finished:
        config, files = run.result["config"], dict(arm.files)
        own = {name: text for name, text in with_seed if name in config}
        own |= {**dict(arm.settings), "seed": "{seed}"}
        for name, text in own.items():
            if not means(text.replace("{seed}", str(seed)), config[name]):
                raise ValueError(
                    f"{run.name} has {name} {config[name]}, which is not {arm.label}, seed {seed}"
                )
        # Otherwise neither times nor results at equal seconds would compare.
        machine = run.facts["hardware"], run.facts["versions"]
        replaced = {f"{file} of {path}": run.sources.get(file) for file, path in files.items()}
        facts = {**shared_facts(run), **run.sources, **replaced}
        facts[f"hardware or versions of seed {seed}"] = machine
        arms_own = own.keys() | files.keys()
        made[run.name] = {name: value for name, value in facts.items() if name not in arms_own}
    rule = "a grid's runs differ in what their arms set, and the seed, alone"
    shared = agreed(made, rule)
    for arm, _, run in finished:
        for file, path in arm.files:
            if run.sources.get(file) in (None, shared.get(file)):
                raise ValueError(f"{run.name} did not train with {path} in place of {file}")


def means(text, value):
    """Whether a setting that is given as text has this value."""
    if isinstance(value, bool):
        return text.lower() in (("1", "true") if value else ("0", "false"))
    return float(text) == value if isinstance(value, (int, float)) else text == value


def compared_with(grid):
    return "baseline" if grid["baseline"] else "twin"


def study(args):
    """Make a study of grids in ablations/, or store one that has gone on."""
    folder = ROOT / "records" / "studies" / checked(args.name)
    runs, grids = {}, []
    for path in args.grids:
        with well_formed(f"{path}: "):
            grid = read_grid(path)
            runs |= {run.name: run for run in finished_runs(grid)}
            grids.append(redo_grid(grid, runs))
    if not runs:
        raise ValueError(f"no run of {', '.join(map(str, args.grids))} has finished")
    if (folder / "logs.tar.xz").exists():
        lost = sorted(read_archive(folder / "logs.tar.xz").keys() - runs.keys())
        if lost:
            raise ValueError(
                f"{shown(folder)} holds runs that this would lose ({', '.join(lost)}): "
                "restore it and give all its grids, or remove the folder to begin anew"
            )
    if not args.question and not (folder / "README.md").exists():
        raise ValueError("a new study needs its --question")
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder, grids, runs)
    store(folder, runs.values(), {"grids": grids}, args.name, args.question)
    planned = sum(len(grid["runs"]) for grid in grids)
    rest = "" if (folder / "run.sh").exists() else "; write its run.sh, the one command"
    print(f"result: {shown(folder)}: {len(runs)} of {planned} runs{rest}")


def read_grid(path):
    """The result.json that ablate.py has left in a folder, with the grid's name."""
    if not (path / "result.json").is_file():
        raise ValueError(f"{path}: no result.json of ablate.py in it")
    grid = json.loads(content(path / "result.json")) | {"grid": checked(path.resolve().name)}
    if grid["script"] != "train_gpt.py":
        raise ValueError(
            f"{path} is a grid of {grid['script']}; a study needs runs with an environment.json, "
            "as train_gpt.py writes it"
        )
    return grid


def finished_runs(grid):
    """The Runs of a grid in logs/ that are finished and, if it evaluates them, evaluated."""
    wanted = ["result.json"]
    if any(flag.startswith("--evaluate") for flag in grid["command"]):
        wanted.append("evaluation-*.json")
    folders = [ROOT / "logs" / one["run"] for one in grid["runs"]]
    return [read_run(f) for f in folders if all(any(f.glob(name)) for name in wanted)]


def restore(args):
    """Unpack a study's runs into logs/. A run with other content there is left alone."""
    count = 0
    for run in read_archive(args.folder / "logs.tar.xz").values():
        there = {name for name in run.files if (run.folder / name).exists()}
        other = [name for name in there if content(run.folder / name) != run.files[name]]
        if other:
            print(f"warning: logs/{run.name} is left as it is: another {', '.join(other)} is there")
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        # result.json, which says that a run is finished, comes last.
        for name in sorted(run.files.keys() - there):
            (run.folder / name).write_bytes(run.files[name])
            count += 1
    print(f"result: {count} files restored into logs/")


def draw(folder, grids, runs):
    """Draw a picture of each grid, and docs/twin.png if the study is the one that it shows."""
    for grid in grids:
        made = {(one["arm"], one["seed"]): runs.get(one["run"]) for one in grid["runs"]}
        logs = {key: run.rows for key, run in made.items() if run}
        objectives = {run.result["config"]["jepa_objective"] for run in made.values() if run}
        name = objectives.pop() if len(objectives) == 1 else ""
        found, path = stats.Summary(**grid["tables"][0]), folder / f"{grid['grid']}.png"
        plots.draw_grid(path, found, logs, compared_with(grid), name)
        for row in found.arms:
            if (grid["grid"], row["arm"]) == TWINS:
                plots.draw_twin(ROOT / "docs" / "twin.png", row, logs, found.metric, name)


# ------------------------------------------------------------------------------------------- pages


def shown(path):
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def checked(name):
    """The name of a folder. ValueError if it could lead elsewhere."""
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"{name!r}: a name has letters, digits, _, . and - in it, and doesn't begin with . or -"
        )
    return name


def mean_sd(record):
    spread = "" if record["sd"] is None else f" ± {record['sd']:.2g}"
    return f"{record['mean']:.5g}{spread}"


def verdict(record):
    """A record in one line: what it is, its mean, and what that was tested against."""
    kind = "record" if record["record"] else "non-record"
    parts = [f"{kind}, {record['metric']} {mean_sd(record)} over {record['n']} runs"]
    parts += [f"{what}: p = {show(p, '.2g') or 'not known'}" for what, p in record["tests"].items()]
    if not record["before"]:
        parts.append("none before it to compare with")
    if record["n"] < LEAST_SEEDS:
        parts.append(f"fewer than {LEAST_SEEDS} runs: no claim")
    return "; ".join(parts)


def record_table(track, folder, record):
    """The lines of a record's page that are generated."""
    names = [name for name in record["runs"][0] if name != "weights_sha256"]
    rows = [
        [show(run[name], ".7g" if isinstance(run[name], float) else "") for name in names]
        for run in record["runs"]
    ]
    command = f"torchrun --standalone --nproc_per_node={record['processes']} train_gpt.py"
    compiled = "compiled" if record["compiled"] else "not compiled"
    return [
        f"{record['date'][:10]}, track {track}: {TRACKS[track].about}.",
        f"Result: {verdict(record)}.",
        "",
        f"Command: `{command} --config {shown(folder)}/config.yaml --seed SEED`",
        f"On {record['hardware']}, {compiled}, data {record['data_sha256']}, "
        f"commit {record['commit']}. The source and all versions are in logs.tar.xz.",
        "",
        *markdown_table(names, rows),
    ]


def records_tables():
    """The lines of records/README.md that are generated: a table a track, the newest first."""
    lines = []
    for track, rules in TRACKS.items():
        rows = [record_row(*pair) for pair in reversed(records(track))]
        names = ("date", "name", "", rules.metric, "n", "p, against the record before", "data")
        about = f"{rules.about[0].upper()}{rules.about[1:]}."
        lines += ["", f"## {track}", "", about, "", *markdown_table((*names, "hardware"), rows)]
    return lines


def record_row(folder, record):
    """The cells of a record in the table of its track."""
    link = f"[{folder.name[11:]}]({folder.parent.name}/{folder.name}/README.md)"
    kind = "record" if record["record"] else "non-record"
    p = "not compared"
    if record["before"]:
        p = show(next(iter(record["tests"].values())), ".2g")
    made = record["data_sha256"][:8], record["hardware"]
    return record["date"][:10], link, kind, mean_sd(record), record["n"], p, *made


def study_table(folder, grids):
    """The lines of a study's page that are generated: its grids."""
    lines = [f"All of it: `bash {shown(folder)}/run.sh`"]
    for grid in grids:
        data = [f"{path} (sha256 {sha256 or 'unknown'})" for path, sha256 in grid["data"].items()]
        lines += ["", f"## {grid['grid']}", "", f"`python ablate.py {shlex.join(grid['command'])}`"]
        lines += ["", f"Data: {', '.join(data)}.", "", f"![{grid['grid']}]({grid['grid']}.png)"]
        for table in grid["tables"]:
            lines += ["", stats.markdown(stats.Summary(**table), compared_with(grid))]
    return lines


def studies_table():
    """The lines of the table in docs/studies.md: each arm that was tested, by its first metric.

    The arms of a grid with fewer than three seeds, which chooses a setting, are not tested.
    """
    rows = []
    for folder, grids in studies():
        for grid in grids:
            arms = {row["arm"]: row for row in grid["tables"][0]["arms"]}
            link = f"[{grid['grid']}](../{shown(folder)}/README.md)"
            for row in arms.values():
                if row["twin"] and row["paired"]["holm"] is not None:
                    made = study_row(row, arms[row["twin"]], grid["tables"][0]["metric"])
                    rows.append((link, *made))
    names = ("grid", "arm", "n", "metric", "difference", "95% interval", "p (Holm)", "FLOPs")
    return markdown_table(names, rows)


def study_row(row, twin, metric):
    """The cells of an arm in the table of all studies.

    Its cost is in FLOPs: seconds say more of a machine that runs several arms at a time.
    """
    paired = row["paired"]
    interval = f"{paired['low']:+.5f} .. {paired['high']:+.5f}"
    cost = f"{row['flops'] / twin['flops']:.2f}x" if row["flops"] and twin["flops"] else ""
    found = f"{paired['difference']:+.5f}", interval, show(paired["holm"], ".3g")
    return row["arm"], paired["n"], metric, *found, cost


def write_tables():
    """Write what is generated of the pages; returns those that were otherwise."""
    tables = {
        ROOT / "records" / "README.md": records_tables(),
        ROOT / "docs" / "studies.md": studies_table(),
    }
    for track in TRACKS:
        for folder, record in records(track):
            tables[folder / "README.md"] = record_table(track, folder, record)
    for folder, grids in studies():
        tables[folder / "README.md"] = study_table(folder, grids)
    return [page for page, lines in tables.items() if write_table(page, lines)]


def write_table(page, lines):
    """Write lines between the marks of a page. Returns whether it was otherwise."""
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- table -->\n", "<!-- /table -->"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(
            f"{shown(page)} has lost its lines {begin.strip()} and {end}; put them back"
        )
    new = before + begin + "".join(f"{line}\n" for line in lines) + end + after
    page.write_text(new, encoding="utf-8")
    return new != text


def table(args):
    """Write the tables and, if asked for, the pictures."""
    if args.draw:
        for folder, grids in studies():
            draw(folder, grids, read_archive(folder / "logs.tar.xz"))
    print(f"result: {', '.join(map(shown, write_tables())) or 'no table'} changed")


# ------------------------------------------------------------------------------------------- check


def differences(stored, computed, where, near=1e-9):
    """Yield a line for every place where two values of JSON differ.

    near: by what part of their size numbers may differ.
    """
    if isinstance(stored, dict) and isinstance(computed, dict):
        for key in stored | computed:
            own = 1e-6 if key in LOOSE else near
            yield from differences(stored.get(key), computed.get(key), f"{where} {key}", own)
    elif isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        for i, pair in enumerate(zip(stored, computed, strict=True)):
            yield from differences(*pair, f"{where}[{i}]", near)
    else:
        same = stored == computed
        if {type(stored), type(computed)} <= {int, float}:
            same = math.isclose(stored, computed, rel_tol=near)
        if not same:
            yield f"{where} is {stored!r}, its runs give {computed!r}"


def read_folder(folder):
    """(result.json, {name: Run}, their faults) of a record or study."""
    absent = [name for name in ("result.json", "logs.tar.xz") if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"no {', '.join(absent)}")
    result = json.loads((folder / "result.json").read_text())
    runs, wrong = read_archive(folder / "logs.tar.xz"), []
    if sha256_file(folder / "logs.tar.xz") != result.pop("logs_sha256"):
        wrong.append("logs.tar.xz is not the archive that result.json was computed from")
    for run in runs.values():
        wrong += [f"logs.tar.xz: {fault}" for fault in faults(run)]
    return result, runs, wrong


def check_record(folder):
    """Yield the faults of a record."""
    track, (record, runs, wrong) = folder.parent.name, read_folder(folder)
    if wrong:
        yield from wrong
        return
    if track not in TRACKS or record["date"][:10] != folder.name[:10]:
        raise ValueError(f"is not TRACK/DATE_NAME of a known track and {record['date'][:10]}")
    weights = {
        run["run"]: {key: run[key] for key in ("weights_bytes", "weights_sha256")}
        for run in record["runs"]
    }
    if weights.keys() != runs.keys():
        odd = ", ".join(sorted(weights.keys() ^ runs.keys()))
        raise ValueError(f"result.json and logs.tar.xz hold different runs ({odd})")
    redone = judge(track, summary(track, record["date"], runs.values(), weights))
    yield from differences(record, redone, "result.json:")
    if read_yaml(folder / "config.yaml") != settings_of(next(iter(runs.values()))):
        yield "config.yaml is not that of its runs"


def check_study(folder):
    """Yield the faults of a study."""
    result, runs, wrong = read_folder(folder)
    planned = {one["run"] for grid in result["grids"] for one in grid["runs"]}
    odd = sorted(runs.keys() - planned)
    wrong += [f"logs.tar.xz: {name} is a run of none of its grids" for name in odd]
    files = ["run.sh", *(f"{grid['grid']}.png" for grid in result["grids"])]
    wrong += [f"no {name}" for name in files if not (folder / name).is_file()]
    if wrong:
        yield from wrong
        return
    for grid in result["grids"]:
        yield from differences(grid, redo_grid(grid, runs), f"result.json, grid {grid['grid']}:")


def check(args):
    """Redo all numbers of records/ and, if they are right, the tables; exit 1 after a fault."""
    found = []
    # A study that hasn't run yet has neither file.
    names = ("result.json", "logs.tar.xz")
    folders = sorted({f.parent for name in names for f in (ROOT / "records").glob(f"*/*/{name}")})
    for folder in folders:
        look = check_study if folder.parent.name == "studies" else check_record
        try:
            with well_formed():
                for fault in look(folder):
                    found.append(f"{shown(folder)}: {fault}")
        except (ValueError, OSError) as e:
            found.append(f"{shown(folder)}: {e}")
    if not found:
        what = "was not what the result.json files give; rewritten"
        found = [f"{shown(page)} {what}" for page in write_tables()]
    if found:
        print(*found, f"{len(found)} fault(s)", sep="\n", file=sys.stderr)
        raise SystemExit(1)
    print(f"result: {len(folders)} records and studies, no fault")


# -------------------------------------------------------------------------------------------- main


def parse(argv):
    """The arguments, with the command's function in `command`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def command(function, about):
        one = commands.add_parser(function.__name__, help=about, allow_abbrev=False)
        one.set_defaults(command=function)
        return one

    one = command(add, "make a record, or a non-record, of finished runs")
    one.add_argument("runs", nargs="+", type=Path, metavar="logs/RUN")
    one.add_argument("--track", choices=TRACKS, required=True)
    one.add_argument("--name", required=True, help="of the folder, after the date")
    one.add_argument("--text", required=True, help="what changed, for its README")
    one = command(study, "make a study of grids of ablate.py, or update it")
    one.add_argument("grids", nargs="+", type=Path, metavar="ablations/GRID")
    one.add_argument("--name", required=True, help="of the folder")
    one.add_argument("--question", help="for its README (default: what stands there)")
    one = command(restore, "put a study's runs back into logs/")
    one.add_argument("folder", type=Path, metavar="records/studies/NAME")
    command(check, "redo every number of records/, then the tables")
    one = command(table, "write the tables")
    one.add_argument("--draw", action="store_true", help="and the pictures")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse(argv)
    args.command(args)


if __name__ == "__main__":
    main()
