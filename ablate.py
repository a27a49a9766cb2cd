"""Does it help? Arms times seeds, each arm against its twin without the term.

    python ablate.py --config configs/cpu_stdlib.yaml --arms JEPA_LAMBDA=0.005,0.02,0.1 --seeds 8
    python ablate.py --config FILE --arms JEPA_LAMBDA=0.02 --arms JEPA_LAYER=-1,3       a grid
    python ablate.py --arm "JEPA_LAMBDA=0.02 JEPA_LAYER=3" --arm JEPA_LAMBDA=0.1        one by one
    python ablate.py --arms model.py:my_model.py --jepa_lambda 0.1                      edited file
    python ablate.py --baseline "JEPA_LAMBDA=0 ITERATIONS=300" --budget steps \\
        --arm "JEPA_LAMBDA=0.1 ITERATIONS=200"                                          no twins
    python ablate.py --script finetune.py --config FILE --arms lbd=0.1,1 --evaluate test.jsonl
    python ablate.py best ablations/NAME --over JEPA_LAMBDA             arms for a next grid

Other flags are the script's, the same for all runs. A twin is an arm without the settings of its
term and without its files, with the weight 0; it is added if it is missing. {seed} in a setting is
the run's seed, for example INIT_FROM=logs/other-seed{seed}. best prints, of arms that differ in
one setting alone, the one with the best mean.

Runs are interleaved: all arms of a seed, then the next seed, so drift of the machine hits all
alike. The same command again continues a stopped grid, each run from its newest checkpoint, and
tries failed runs again.

The paired t-test decides, two-sided, Holm-corrected over the arms. table.md, ablation.png and
result.json are written to ablations/NAME.
"""

import argparse
import hashlib
import itertools
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import yaml

from nanojepa.corpora import EMBEDDED
from nanojepa.files import link_folder, one_line_errors, script_parser, shown, write_whole

try:
    from nanojepa import plots, stats
except ImportError as error:
    raise SystemExit(f'error: needs {error.name}: pip install -e ".[eval]"') from None

ROOT = Path(__file__).resolve().parent


class Script(NamedTuple):
    """What ablate.py knows of a script that trains."""

    settings: str  # the file of its Config, in which a group is called JEPA
    weight: str  # the setting that is 0 in a twin
    metric: str  # what is compared
    evaluated: str  # what is compared with --evaluate
    seed: str  # a setting that every run gets from here
    place: str  # another one: where it leaves its files
    budgets: dict  # {kind of --budget: the setting that holds it}


SCRIPTS = {
    "train_gpt.py": Script(
        settings="train_gpt.py",
        weight="jepa_lambda",
        metric="val_bpb",
        evaluated="startswith",
        seed="seed",
        place="run_id",
        budgets={
            "steps": "iterations",
            "flops": "train_flops",
            "seconds": "max_wallclock_seconds",
        },
    ),
    "finetune.py": Script(
        settings="nanojepa/hf/settings.py",
        weight="lbd",
        metric="eval_loss",
        evaluated="accuracy",
        seed="finetune_seed",
        place="output_dir",
        budgets={"flops": "same_flop"},
    ),
}

# ------------------------------------------------------------------------------------------- arms


def parse_arms(grid, script, singles=(), baseline=None):
    """The stats.Arms of a grid, first those that others are compared with.

    grid: texts of --arms, each an axis NAME=v,v or FILE:path,path. singles: texts of --arm.
    """
    axes = []
    for text in grid:
        head, values = re.fullmatch(r"([^=:]*[=:]?)(.*)", text, re.DOTALL).groups()
        axes.append([head + value for value in values.split(",")])
    where = " ".join(f"--arms {text}" for text in grid)
    choices = itertools.product(*axes) if axes else []
    arms = [parse_arm(items, script, where) for items in choices]
    arms += [parse_arm(shlex.split(text), script, f"--arm {text}") for text in singles]
    if baseline is not None:
        base = parse_arm(shlex.split(baseline), script, f"--baseline {baseline}")
        arms = [base, *(arm._replace(twin=base.label) for arm in arms if arm != base)]
    else:
        twins = [stats.Arm(without_term(arm.settings, script)) for arm in arms]
        pairs = list(zip(arms, twins, strict=True))
        arms = twins + [arm._replace(twin=twin.label) for arm, twin in pairs if arm != twin]
    return list(dict.fromkeys(arms))


def parse_arm(items, script, where):
    """The stats.Arm of texts NAME=value and FILE:path. ValueError says what is wrong in `where`."""
    settings, files = {}, {}
    for item in items or [""]:
        name, mark, value = re.fullmatch(r"([^=:]*)([=:]?)(.*)", item, re.DOTALL).groups()
        if not (name and value):
            raise ValueError(
                f"{where}: must be NAME=value or FILE:path, with commas between the values of "
                "--arms and blanks between the settings of --arm"
            )
        if mark == "=":  # training.lbd is lbd
            settings[name.lower().rpartition(".")[2]] = value
            continue
        for path, place in ((ROOT / name, "the project"), (Path(value), "this folder")):
            if not path.is_file():
                raise ValueError(f"{where}: {path} is no file; name it from {place}")
        files[name] = value
    weight = SCRIPTS[script].weight
    settings = tuple(sorted(settings.items(), key=lambda pair: (pair[0] != weight, pair[0])))
    if not dict(settings).get(weight, "1").strip("0."):  # its settings mean nothing then
        settings = without_term(settings, script)
    return stats.Arm(settings, tuple(sorted(files.items())))


def without_term(settings, script):
    """The settings of an arm's twin."""
    weight, term = SCRIPTS[script].weight, term_settings(script)
    return ((weight, "0"), *(pair for pair in settings if pair[0] not in term))


def term_settings(script):
    """The names of the settings in a script's group JEPA."""
    groups = re.split(r"\n +# ---- ", (ROOT / SCRIPTS[script].settings).read_text(encoding="utf-8"))
    term = "".join(group for group in groups if group.startswith("JEPA\n"))
    return re.findall(r"^    (\w+): ", term, re.MULTILINE)


def budget_flags(text, script):
    """The script's flags for --budget; text: KIND or KIND=VALUE."""
    kind, _, value = (text or "").partition("=")
    budgets = SCRIPTS[script].budgets
    if text is None:
        return []
    if kind not in budgets:
        raise ValueError(f"--budget {text}: for {script} it must be {' or '.join(budgets)}")
    if script == "finetune.py":
        return ["--same_flop=true"]
    flags = [f"--{budgets[other]}=0" for other in ("flops", "seconds") if other != kind]
    return flags + ([f"--{budgets[kind]}={value}"] if value else [])


# --------------------------------------------------------------------------- source and settings

# It runs in a process of its own, in which Python's path begins with an arm's source.
READ_SETTINGS = """
import importlib, json, os, sys
folder, script, place = sys.argv[1:]
sys.path.insert(0, folder)
from nanojepa.runlog import project_sources
from nanojepa.settings import as_dict, load_settings
importlib.import_module(script)
module = importlib.import_module(place)
more = {"aliases": module.ALIASES} if hasattr(module, "ALIASES") else {"environ": os.environ}
loaded = [load_settings(module.Config, argv, **more) for argv in json.load(sys.stdin)]
print(json.dumps([list(project_sources(folder)), [as_dict(one.config) for one in loaded]]))
"""


def project_files():
    """{name: path} of the files that runs use: the scripts and nanojepa/."""
    names = [*SCRIPTS, "model.py", "evaluate.py", *(ROOT / "nanojepa").rglob("*.py")]
    paths = sorted(ROOT / name for name in names)
    return {path.relative_to(ROOT).as_posix(): path for path in paths}


def digest(*parts):
    """Eight hexadecimal digits of texts and bytes."""
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def copy_source(arm, out):
    """The folder whose scripts an arm runs: a copy of the project with the arm's files in it.

    So the project may be edited while a grid runs. A script imports what lies beside it, not the
    installed package.
    """
    paths = project_files() | {name: Path(path) for name, path in arm.files}
    sources = {name: path.read_bytes() for name, path in paths.items()}
    folder = out / f"source-{digest(*itertools.chain(*sources.items()))}"
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    for name in ("data", "logs"):  # where the scripts look for them
        (ROOT / name).mkdir(exist_ok=True)
        if not (folder / name).exists():
            link_folder(folder / name, ROOT / name)
    return folder


def read_settings(folder, script, flags):
    """(names of the files that a script is made of, [{setting: value}]) by the source in a folder.

    flags: for each run the list of its flags. ValueError if the script would refuse them.
    """
    place = SCRIPTS[script].settings.removesuffix(".py").replace("/", ".")
    command = [sys.executable, "-c", READ_SETTINGS, folder, Path(script).stem, place]
    done = subprocess.run(command, input=json.dumps(flags), capture_output=True, encoding="utf-8")
    if done.returncode:
        kind, _, message = done.stderr.strip().splitlines()[-1].partition(": ")
        wrong = message if kind == "ValueError" else f"{folder / script}: {kind}: {message}"
        raise ValueError(wrong)
    files, found = json.loads(done.stdout.splitlines()[-1])
    return files, [without_sections(settings) for settings in found]


def without_sections(settings):
    """{name: value} of settings that may lie in sections; of two values of a name, the last."""
    flat = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def content(value):
    """What stands for a setting's value in a run's name; if it is a file, that is its content.

    A folder's content is its weights, or its meta.json, in which the sums of its shards are.
    """
    if not isinstance(value, str) or value in EMBEDDED:  # a run makes the latter if it is missing
        return value
    place = Path(value)
    for file in (place, place / "model.safetensors", place / "meta.json"):
        if file.is_file():
            return digest(file.read_bytes())
    return str(place.resolve()) if value and place.is_dir() else value


# ------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """One run of a grid: where it leaves its files, and how it is started."""

    arm: stats.Arm
    seed: int
    folder: Path
    command: list
    log: Path
    evaluation: Path | None = None  # the file of the evaluation's numbers, if there is one

    def result(self):
        """Its result.json, with the evaluation's numbers; None before it is finished."""
        files = [file for file in (self.evaluation, self.folder / "result.json") if file]
        if not all(file.is_file() for file in files):
            return None
        result = {}
        for file in files:
            result |= json.loads(file.read_bytes())
        config = self.folder / "config.yaml"
        if "config" not in result and config.is_file():
            result["config"] = without_sections(yaml.safe_load(config.read_text(encoding="utf-8")))
        return result


def plan(args, flags, out):
    """(the arms of a grid, its runs, interleaved over the arms); flags: the script's, for all."""
    arms = parse_arms(args.arms, args.script, args.arm, args.baseline)
    flags = ([f"--config={args.config}"] if args.config else []) + flags
    flags += budget_flags(args.budget, args.script)
    by_source, runs = {}, {}
    for arm in arms:
        by_source.setdefault(copy_source(arm, out), []).append(arm)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for source, own in by_source.items():
        cells = list(itertools.product(seeds, own))
        given = [flags_of(arm, seed, flags) for seed, arm in cells]
        files, found = read_settings(source, args.script, given)
        for (seed, arm), argv, settings in zip(cells, given, found, strict=True):
            check_metric(args.metric, settings, arm.label)
            name = f"{args.name}-{name_run(arm, args.script, settings, source, files)}-seed{seed}"
            runs[seed, arm] = make_run(args, arm, seed, name, [source / args.script, *argv], out)
    runs = [runs[seed, arm] for seed in seeds for arm in arms]
    check_different(runs)
    return arms, runs


def check_metric(metric, settings, label):
    """ValueError if an arm, by its settings, will not have the metric."""
    if "eval_loss" in metric.split(",") and not (settings["eval_file"] or settings["data_file"]):
        raise ValueError(
            f"{label} has no eval_loss: set eval_file or data_file, or choose --metric"
        )


def flags_of(arm, seed, flags):
    flags = [*flags, *(f"--{name}={value}" for name, value in arm.settings)]
    return [flag.replace("{seed}", str(seed)) for flag in flags]


def name_run(arm, script, settings, source, files):
    """The digest of all that makes a run's result: its settings, its inputs and its source.

    files: names in the folder `source` of what the script is made of.
    """
    own = (SCRIPTS[script].seed, SCRIPTS[script].place, "resume")
    made = {name: content(value) for name, value in settings.items() if name not in own}
    replaced = dict(arm.files)
    code = [(source / name).read_bytes() for name in dict.fromkeys((*files, *replaced))]
    return digest(script, json.dumps(made), *replaced, *code)


def make_run(args, arm, seed, name, command, out):
    script, folder, evaluation = SCRIPTS[args.script], ROOT / "logs" / name, None
    if args.evaluate:
        test = digest(Path(args.evaluate).read_bytes(), args.task)
        evaluation = folder / f"evaluation-{test}.json"
    place = name if script.place == "run_id" else folder
    own = [f"--{script.seed}={seed}", f"--{script.place}={place}", "--resume=auto"]
    command = [sys.executable, *map(str, command), *own]
    return Run(arm, seed, folder, command, out / f"{name}.log", evaluation)


def check_different(runs):
    """ValueError if two arms make the same run."""
    arms = {}
    for run in runs:
        known = arms.setdefault(run.folder, run.arm)
        if known != run.arm:
            raise ValueError(
                f"arm {run.arm.label} is the same run as arm {known.label}; leave one out, or "
                "change it (an arm without a weight has the config's)"
            )


def execute(run, args, gpu):
    """Train and evaluate; what both print goes to the run's log, after that of earlier tries.

    The run has failed if it has no result then. gpu: "" for whatever there is.
    """
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with open(run.log, "ab") as log:

        def call(command, output):
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
            log.flush()
            return subprocess.run(command, stdout=output, stderr=log, env=environment)

        trained = (run.folder / "result.json").is_file()
        if not trained and call(run.command, log).returncode:
            return
        if run.evaluation:
            done = call(evaluate_command(run, args), subprocess.PIPE)
            log.write(done.stdout)
            if not done.returncode:
                write_whole(run.evaluation, done.stdout.strip().splitlines()[-1])


def evaluate_command(run, args):
    """The command that evaluates a run by the arm's own source: its files may change the model."""
    script = str(Path(run.command[1]).with_name("evaluate.py"))
    of = ["--run", str(run.folder)]
    if args.script == "finetune.py":
        of = ["--model", str(run.folder), "--output", str(run.evaluation.with_suffix(".jsonl"))]
    task = ["--task", args.task] if args.task else []
    return [sys.executable, script, "accuracy", *of, "--data", args.evaluate, *task]


def execute_all(runs, args):
    """Execute runs in their order, so many at a time; yields those that have ended."""
    gpus = args.gpus.split(",") if args.gpus else [""] * args.jobs
    free = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def work(run):
        gpu = free.get()
        execute(run, args, gpu)
        free.put(gpu)
        return run

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for ended in as_completed([pool.submit(work, run) for run in runs]):
                yield ended.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------ a grid


def run_grid(argv):
    """Make a grid, or what is missing of it; returns the rows of its first metric."""
    args, flags = parse_flags(argv)
    out = ROOT / "ablations" / args.name
    metrics = args.metric.split(",")
    arms, runs = plan(args, flags, out)
    left = [run for run in runs if run.result() is None]
    print(
        f"{len(arms)} arms x {args.seeds} seeds, {len(runs) - len(left)} runs finished, "
        f"{len(left)} to do; {', '.join(arm.label for arm in arms)}",
        flush=True,
    )
    began = time.perf_counter()
    for n, run in enumerate(execute_all(left, args), 1):
        rest = timedelta(seconds=round((time.perf_counter() - began) / n * (len(left) - n)))
        said = f"{run.arm.label}, seed {run.seed}: {outcome(run, metrics[0])}"
        print(f"{n} of {len(left)} runs, {rest} left: {said}", flush=True)
        # A metric that isn't there is found out now, not after the last run.
        if sum(run.result() is not None for run in runs) >= len(arms):
            report(arms, runs, args, argv, metrics, out)
    first, text = report(arms, runs, args, argv, metrics, out)
    title = draw(runs, first, args, out / "ablation.png")
    print(f"{text}\n\nresult: {title}; see table.md and ablation.png in {shown(out)}")
    return first.arms


def outcome(run, metric):
    """What a run that ended has come to."""
    result = run.result()
    if result is None:
        return f"FAILED, see {run.log}"
    value = stats.number(result, metric)
    return stats.lacking(result, metric) if value is None else f"{metric} {value:.5g}"


def report(arms, runs, args, argv, metrics, out):
    """Write table.md and result.json of the runs so far; returns (the first Summary, the text)."""
    word = compared_with(args)
    trials = [stats.Trial(run.arm.label, run.seed, run.result()) for run in runs]
    found = [stats.summarise(arms, trials, metric, word) for metric in metrics]
    text = "\n\n".join(stats.markdown(one, word) for one in found)
    command = f"Command: `python ablate.py {shlex.join(argv)}`\n"
    (out / "table.md").write_text(f"{text}\n\n{command}", encoding="utf-8")
    result = {
        "command": argv,
        "script": args.script,
        "baseline": arms[0].label if word == "baseline" else None,
        "tables": [one._asdict() for one in found],
        "runs": [
            {"arm": t.arm, "seed": t.seed, "run": run.folder.name, "finished": t.result is not None}
            for run, t in zip(runs, trials, strict=True)
        ],
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return found[0], text


def compared_with(args):
    return "twin" if args.baseline is None else "baseline"


def draw(runs, found, args, path):
    """Draw the picture of a grid's Summary; returns its title."""
    results = [run.result() for run in runs]
    logs = {
        (run.arm.label, run.seed): read_log(run.folder)
        for run, result in zip(runs, results, strict=True)
        if result is not None
    }
    config = next((r.get("config", {}) for r in results if r is not None), {})
    objective = config.get("jepa_objective", "")
    return plots.draw_grid(path, found, logs, compared_with(args), objective)


def read_log(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def parse_flags(argv):
    """(the flags of a grid, the list of the script's own); ValueError says what is wrong."""
    parser = script_parser(__doc__)
    parser.usage = "python ablate.py [--config FILE] --arms NAME=V,V [flags]"
    add, arm = parser.add_argument_group("what is compared").add_argument, '"NAME=V NAME=V"'
    add(
        "--arms", action="append", default=[], metavar="NAME=V,V", help="an axis; or FILE:PATH,PATH"
    )
    add("--arm", action="append", default=[], metavar=arm, help="one arm; FILE:PATH too")
    add("--baseline", metavar=arm, help="the arm that all are compared with, in place of twins")
    add("--metric", metavar="NAME,NAME", help="numbers of result.json or the evaluation to compare")
    add("--evaluate", metavar="FILE", help="evaluate each run on this file")
    add("--task", help="evaluate.py's --task")
    add = parser.add_argument_group("what all arms have").add_argument
    add("--script", choices=SCRIPTS, default="train_gpt.py", help="default: train_gpt.py")
    add("--config", metavar="FILE", help="the script's YAML file")
    add("--budget", metavar="KIND[=V]", help="steps, flops or seconds (default: the config's)")
    add("--seeds", type=int, default=3, metavar="N", help="seeds of each arm (default: 3)")
    add("--first_seed", type=int, default=1, metavar="N", help="the first of them (default: 1)")
    add = parser.add_argument_group("where").add_argument
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--gpus", metavar="0,1", help="GPUs to use, one run on each at a time")
    add("--name", default="ablation", help="of the folder in ablations/ (default: ablation)")
    args, flags = parser.parse_known_args(argv)
    if not args.arms and not args.arm:
        raise ValueError("no arms: give --arms NAME=V,V or --arm NAME=V")
    script = SCRIPTS[args.script]
    args.metric = args.metric or (script.evaluated if args.evaluate else script.metric)
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: must be at least 1")
    for own in ("seed", script.seed, script.place):
        if any(flag.split("=")[0] == f"--{own}" for flag in flags):
            raise ValueError(f"--{own}: every run gets its own; see --seeds, --first_seed, --name")
    return args, flags


# ------------------------------------------------------------------------------------ a next grid


def best(argv):
    parser = argparse.ArgumentParser(prog="ablate.py best", description="arms for a next grid")
    parser.add_argument("grid", help="a folder in ablations/")
    parser.add_argument("--over", required=True, help="the setting to choose")
    args = parser.parse_args(argv)
    grid = json.loads((Path(args.grid) / "result.json").read_text(encoding="utf-8"))
    print(*best_arms(grid["tables"][0], args.over.lower()), sep="\n")


def best_arms(table, over):
    """Of the arms that differ in the setting `over` alone, the one with the best mean, for --arm.

    table: one of a finished grid's result.json.
    """
    known = sorted({name for row in table["arms"] for name, _ in row["settings"]})
    if over not in known:
        raise ValueError(f"--over {over}: no arm sets it; they set {', '.join(known)}")
    better, chosen = max if table["metric"] in stats.HIGHER_IS_BETTER else min, {}
    for row in table["arms"]:
        if row["failed"]:
            raise ValueError(
                f"not all runs of {row['arm']} have a {table['metric']}, so the means don't "
                "compare; run the grid again"
            )
        rest = str([[pair for pair in row["settings"] if pair[0] != over], row["files"]])
        chosen[rest] = better(chosen.get(rest, row), row, key=lambda row: row["mean"])
    return [row["arm"] for row in chosen.values()]


@one_line_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["best"]:
            best(argv[1:])
        else:
            run_grid(argv)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None


if __name__ == "__main__":
    main()
