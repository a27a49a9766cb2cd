"""The leaderboard: runs that beat the best of a track, in folders whose numbers anyone can redo.

    python leaderboard.py new logs/RUN ... --track steps --name NAME    a folder of finished runs
    python leaderboard.py add records/TRACK/NAME       judge it, and put it into the table
    python leaderboard.py check                        compute every number of records/ again
    python leaderboard.py table                        write the tables and draw the pictures
    python leaderboard.py rerun records/TRACK/NAME --seed N     train it again from its source
    python leaderboard.py study ablations/GRID ... --name NAME --question TEXT

records/tracks/ holds the rules, docs/leaderboard.md says how to enter. A record has five seeds or
more and beats the best before it at p < 0.01, in Welch's one-sided t-test. Otherwise it is a tie.

A study is grids of ablate.py, stored with their runs. `check` and `table` look after them too.
`check` reads and computes; only `rerun` executes a record's code.
"""

import difflib
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from nanojepa.files import link_folder, one_line_errors, script_parser, shown, whole_folder
from nanojepa.settings import read_yaml

try:
    from nanojepa import plots, stats, studies
except ImportError as error:
    raise SystemExit(f'error: needs {error.name}: pip install -e ".[eval]"') from None
from nanojepa.stored import differences, read_run, with_table

ROOT = Path(__file__).resolve().parent
LEAST_SEEDS = 5
LEVEL = 0.01  # a record needs a p below it
TODO = "TODO: what changed, and why it helps."
PAGE = """# {name}

{todo}

[source/](source) is what ran, [source.diff](source.diff) what differs from the record before, and
[config.yaml](config.yaml) holds the settings. This trains it again:
`python leaderboard.py rerun records/{track}/{name} --seed N`

![scores](scores.png)
"""


# ------------------------------------------------------------------------------------------ tracks


@dataclass(frozen=True)
class Track:
    """What is compared, and which runs may take part; a file of records/tracks/ with these keys."""

    name: str
    about: str
    rules: str
    metric: str
    higher_is_better: bool = False
    data_sha256: str = ""  # of the shards and the tokenizer
    fixed: dict = field(default_factory=dict)  # settings and results that every run has
    at_most: dict = field(default_factory=dict)
    evaluate: str = ""  # the test file of evaluate.py accuracy, if that is the metric
    waiting: str = ""  # for what; nothing can be added until then

    def broken_rules(self, run):
        """Yield each rule that a run breaks."""
        facts = run.settings | run.result
        for key, value in ({"data_sha256": self.data_sha256} | self.fixed).items():
            if facts.get(key) != value:
                yield f"{key} is {facts.get(key)!r}; {self.name} wants {value!r}"
        for key, limit in self.at_most.items():
            if not facts[key] <= limit:
                yield f"{key} is {facts[key]:.6g}; {self.name} wants at most {limit:.6g}"
        if self.evaluate and self.metric in facts:
            hits = round(facts[self.metric] * facts["n"])
            interval = list(stats.wilson(hits, facts["n"]))
            yield from differences(facts[f"{self.metric}_wilson95"], interval, "its interval")


def read_tracks():
    """{name: Track}, first those that anybody can enter."""
    files = sorted((ROOT / "records" / "tracks").glob("*.yaml"))
    tracks = [Track(file.stem, **read_yaml(file)) for file in files]
    return {track.name: track for track in sorted(tracks, key=lambda track: bool(track.waiting))}


# ----------------------------------------------------------------------------------------- records


class Record(NamedTuple):
    """The files of a record."""

    folder: Path
    track: Track
    runs: dict  # {seed: Run}
    sources: dict  # {name: bytes}, of source/

    @property
    def scores(self):
        return {seed: run.result[self.track.metric] for seed, run in self.runs.items()}


def read_record(folder):
    tracks = read_tracks()
    if folder.parent.name not in tracks:
        raise ValueError(f"{folder} is in no folder of a track: {', '.join(tracks)}")
    runs = {run.result["seed"]: run for run in map(read_run, folder.glob("seed*"))}
    files = [file for file in sorted((folder / "source").rglob("*")) if file.is_file()]
    sources = {file.relative_to(folder / "source").as_posix(): file.read_bytes() for file in files}
    return Record(folder, tracks[folder.parent.name], dict(sorted(runs.items())), sources)


def faults(record):
    """Yield why the files of a record can't be what they should be, one line each."""
    if len(record.runs) < LEAST_SEEDS:
        yield f"{len(record.runs)} different seeds; a record has {LEAST_SEEDS} at least"
    config = read_yaml(record.folder / "config.yaml")
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in record.sources.items()}
    for seed, run in record.runs.items():
        wrong = [*run.contradictions(), *record.track.broken_rules(run)]
        wrong += differences(config, run.settings, "config.yaml:")
        for start in run.starts:
            changed = {name for name, _ in hashes.items() ^ start["sources"].items()}
            wrong += [f"source/{name} is not what ran" for name in sorted(changed)]
        yield from (f"seed {seed}: {fault}" for fault in wrong)


def refuse(found):
    """ValueError of the first fault, if there is one."""
    for fault in found:
        raise ValueError(fault)


def entries(track):
    """[(folder, result.json)] of a track's records and ties, oldest first."""
    files = (ROOT / "records" / track.name).glob("*/result.json")
    stored = [(file.parent, json.loads(file.read_bytes())) for file in files]
    return sorted(stored, key=lambda pair: pair[1]["date"])


def best_before(track, date):
    """The newest Record before a date, or None. A tie is none."""
    older = [folder for folder, one in entries(track) if one["date"] < date and one["is_record"]]
    return read_record(older[-1]) if older else None


def judge(record, best, date):
    """The result.json of a record; best: the Record that it must beat, or None."""
    scores, p = list(record.scores.values()), None
    if best is not None:
        p = stats.p_better(scores, list(best.scores.values()), record.track.higher_is_better)
    return {
        "date": date,
        "metric": record.track.metric,
        "mean": statistics.fmean(scores),
        "sd": statistics.stdev(scores),
        "interval": list(stats.prediction_interval(scores)),
        "seeds": {str(seed): score for seed, score in record.scores.items()},
        "best_before": best and best.folder.name,
        "p": p,
        "is_record": best is None or (p is not None and p < LEVEL),
    }


def source_diff(best, record):
    """The source of a record as a diff against that of the record it must beat; "" of a first."""
    lines = []
    for name in sorted(best.sources | record.sources) if best else ():
        old, new = (
            one.sources.get(name, b"").decode().splitlines(keepends=True) for one in (best, record)
        )
        lines += difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return "".join(lines)


def new(args):
    """Make a record's folder of runs in logs/."""
    track = read_tracks()[args.track]
    folder = ROOT / "records" / track.name / args.name
    if track.waiting:
        raise ValueError(f"track {track.name} waits for {track.waiting}")
    if folder.exists():
        raise ValueError(f"{shown(folder)} exists; choose another --name")
    runs = [read_run(place, ROOT) for place in args.runs]
    with whole_folder(folder) as work:
        shutil.copytree(args.runs[0] / "source", work / "source")
        text = yaml.safe_dump(runs[0].settings, sort_keys=False)
        (work / "config.yaml").write_text(text, encoding="utf-8")
        page = PAGE.format(name=args.name, todo=TODO, track=track.name)
        (work / "README.md").write_text(page, encoding="utf-8")
        for run in runs:
            place = work / f"seed{run.result['seed']}"
            place.mkdir(exist_ok=True)
            for name, content in run.files.items():
                (place / name).write_bytes(content)
        refuse(faults(read_record(work)))
    print(f"result: {shown(folder)}; say in its README.md what changed and why, then add it")


def add(args):
    """Judge a record's folder against the best of its track, and put it into the table."""
    folder = args.folder.resolve()
    record = read_record(folder)
    refuse(faults(record))
    if TODO in (folder / "README.md").read_text(encoding="utf-8"):
        raise ValueError(f"{shown(folder)}/README.md: say what changed and why it helps")
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    best = best_before(record.track, date)
    result = judge(record, best, date)
    (folder / "source.diff").write_text(source_diff(best, record), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table(args)
    print(f"result: {shown(folder)}: {verdict(result)}")


def check_record(folder):
    """Yield the faults of a record."""
    record, stored = read_record(folder), json.loads((folder / "result.json").read_bytes())
    if found := list(faults(record)):
        yield from found
        return
    best = best_before(record.track, stored["date"])
    yield from differences(stored, judge(record, best, stored["date"]), "result.json:")
    if (folder / "source.diff").read_text(encoding="utf-8") != source_diff(best, record):
        yield "source.diff is not the difference to the source of the record before"


def rerun(args):
    """Train a record again from its source, and say whether the result lands in its interval."""
    folder = args.folder.resolve()
    record = read_record(folder)
    name = f"rerun-{record.track.name}-{folder.name}-seed{args.seed}"
    flags = [f"--config={folder}/config.yaml", f"--seed={args.seed}", f"--run_id={name}"]
    commands = [["train_gpt.py", *flags, "--resume=auto"]]
    if record.track.evaluate:
        of = ["--run", f"logs/{name}", "--data", record.track.evaluate]
        commands.append(["evaluate.py", "accuracy", *of])
    with tempfile.TemporaryDirectory() as work:
        copy_project(folder / "source", Path(work))
        for command in commands:
            if subprocess.run([sys.executable, *command], cwd=work).returncode:
                raise ValueError(f"{command[0]} of {shown(folder)} failed, as it says above")
    run = read_run(ROOT / "logs" / name)
    refuse(record.track.broken_rules(run))
    value = run.result[record.track.metric]
    low, high = json.loads((folder / "result.json").read_bytes())["interval"]
    lands = "inside" if low <= value <= high else "OUTSIDE"
    print(f"result: {record.track.metric} {value:.6g} lands {lands} {low:.6g} .. {high:.6g}")


def copy_project(source, place):
    """Copy the project's Python files, then a record's source over them, and link data/ and logs/.

    A run's source has only what training loads, and evaluate.py needs more.
    """
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nanojepa", place / "nanojepa", ignore=ignore)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, place)
    shutil.copytree(source, place, dirs_exist_ok=True)
    for shared in ("data", "logs"):
        (ROOT / shared).mkdir(exist_ok=True)
        link_folder(place / shared, ROOT / shared)


def study(args):
    """Store grids of ablate.py, with their runs."""
    folder = ROOT / "records" / "studies" / args.name
    studies.store(args.grids, folder, args.question, ROOT)
    table(args)
    print(f"result: {shown(folder)}; write its run.sh, the one command that makes it")


# ------------------------------------------------------------------------------------------- pages


def mean_sd(result):
    return f"{result['mean']:.5g} ± {result['sd']:.2g}"


def verdict(result):
    """A record in one line: what it is, its mean, and what that was tested against."""
    kind = "record" if result["is_record"] else "tie"
    text = f"{kind}, {result['metric']} {mean_sd(result)} over {len(result['seeds'])} seeds"
    if not result["best_before"]:
        return f"{text}; the first of its track"
    p = stats.show(result["p"], ".2g") or "unknown, as no seed differs from another"
    return f"{text}; better than {result['best_before']}: p = {p}"


def track_lines(track):
    """The lines of records/README.md about a track: its rules, and a table, the newest first."""
    about = f"{track.about[0].upper()}{track.about[1:]}."
    lines = ["", f"## [{track.name}](tracks/{track.name}.yaml)", "", about, "", track.rules]
    if track.waiting:
        return [*lines, f"It waits for {track.waiting}."]
    rows = []
    for folder, one in reversed(entries(track)):
        link = f"[{folder.name}]({track.name}/{folder.name}/README.md)"
        kind = "record" if one["is_record"] else "tie"
        p, interval = stats.show(one["p"], ".2g"), "{:.5g} .. {:.5g}".format(*one["interval"])
        rows.append((one["date"][:10], link, kind, mean_sd(one), len(one["seeds"]), p, interval))
    names = ("date", "name", "", track.metric, "seeds", "p", "one more run (95%)")
    lines += stats.markdown_table(names, rows)
    return [*lines, "", f"![history]({track.name}/history.png)"] if rows else lines


def pages():
    """{page: its text, with the generated part as the result.json files have it}."""
    made = studies.read_studies(ROOT / "records" / "studies")
    lines = {
        ROOT / "records" / "README.md": sum(map(track_lines, read_tracks().values()), []),
        ROOT / "docs" / "studies.md": studies.overview_lines(made),
    }
    for folder, grids in made:
        lines[folder / "README.md"] = studies.study_lines(folder, grids)
    return {page: with_table(page, own) for page, own in lines.items()}


def draw(track):
    """Draw the history of a track, and each of its records beside the one that it had to beat."""
    rows = {}
    for folder, one in entries(track):
        scores = list(one["seeds"].values())
        rows[folder.name] = (folder.name, one["date"][:10], scores, one["is_record"])
        pair = [rows[name] for name in (one["best_before"], folder.name) if name]
        plots.draw_scores(folder / "scores.png", pair, track.metric, verdict(one))
    if rows:
        path = ROOT / "records" / track.name / "history.png"
        plots.draw_scores(path, list(rows.values()), track.metric, f"{track.name}: {track.about}")


def table(args):
    """Write the tables and draw the pictures."""
    for track in read_tracks().values():
        draw(track)
    for folder, grids in studies.read_studies(ROOT / "records" / "studies"):
        studies.draw(folder, grids, ROOT / "docs")
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")


def check(args):
    """Compute all numbers of records/ again, then the tables; exit 1 after a fault."""
    found, folders = [], sorted((ROOT / "records").glob("*/*/"))
    for folder in folders:
        look = studies.check_study if folder.parent.name == "studies" else check_record
        try:
            for fault in look(folder):
                found.append(f"{shown(folder)}: {fault}")
        except Exception as e:  # a file of others may be malformed in any way
            found.append(f"{shown(folder)}: {type(e).__name__}: {e}")
    if not found:
        stale = [page for page, text in pages().items() if page.read_text(encoding="utf-8") != text]
        advice = "is not what the result.json files give: python leaderboard.py table"
        found = [f"{shown(page)} {advice}" for page in stale]
    if found:
        print(*found, f"{len(found)} fault(s)", sep="\n", file=sys.stderr)
        raise SystemExit(1)
    print(f"result: {len(folders)} records and studies, no fault")


# ------------------------------------------------------------------------------------ command line


def parse(argv):
    """The arguments, with the command's function in `command`."""
    commands = (parser := script_parser(__doc__)).add_subparsers(required=True)

    def command(function):
        one = commands.add_parser(function.__name__, help=function.__doc__, allow_abbrev=False)
        one.set_defaults(command=function)
        return one.add_argument

    flag = command(new)
    flag("runs", nargs="+", type=Path, metavar="logs/RUN")
    flag("--track", choices=read_tracks(), required=True)
    flag("--name", required=True, help="of the folder")
    command(add)("folder", type=Path, metavar="records/TRACK/NAME")
    command(check)
    command(table)
    flag = command(rerun)
    flag("folder", type=Path, metavar="records/TRACK/NAME")
    flag("--seed", type=int, required=True)
    flag = command(study)
    flag("grids", nargs="+", type=Path, metavar="ablations/GRID")
    flag("--name", required=True, help="of the folder")
    flag("--question", required=True, help="for its README")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse(argv)
    args.command(args)


if __name__ == "__main__":
    main()
