"""Does it help? Arms times seeds, each arm against its twin without the term.

    python ablate.py --config configs/cpu_stdlib.yaml --arms JEPA_LAMBDA=0.005,0.02,0.1 --seeds 8
    python ablate.py --config FILE --arms JEPA_LAMBDA=0.02 --arms JEPA_LAYER=-1,3       a grid
    python ablate.py --arm "JEPA_LAMBDA=0.02 JEPA_LAYER=3" --arm JEPA_LAMBDA=0.1        one by one
    python ablate.py --arms model.py:my_model.py --jepa_lambda 0.1                      edited file
    python ablate.py --baseline "JEPA_LAMBDA=0 ITERATIONS=300" --budget steps \\
        --arm "JEPA_LAMBDA=0.1 ITERATIONS=200"                                          no twins
    python ablate.py --script finetune.py --config FILE --arms lbd=0.1,1 --evaluate test.jsonl
    python ablate.py plot logs/RUN ... [--out curves.png]               loss curves of any runs
    python ablate.py best ablations/NAME --over JEPA_LAMBDA             arms for a next grid

Other flags are the script's, the same for all runs. A twin is an arm without the settings of its
term and without its files, with the weight 0; it is added if it is missing. All arms have the same
seeds, data, batch, compile mode and budget. {seed} in a setting is the run's seed, for example
INIT_FROM=logs/other-seed{seed}. best prints, of arms that differ in one setting alone, the one with
the best mean.

Runs are interleaved: all arms of a seed, then the next seed, so drift of the machine hits all
alike. The same command again continues a stopped grid and tries failed runs again.

The paired t-test decides, two-sided, Holm-corrected over the arms. Wilcoxon's test stands beside
it; below 8 seeds its p can't go under 0.01. table.md, ablation.png and result.json are written to
ablations/NAME.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import yaml

from nanojepa.files import one_line_errors, write_whole

try:
    from nanojepa import plots, stats
except ImportError as error:
    raise SystemExit(f'error: needs {error.name}: pip install -e ".[eval]"') from None

ROOT = Path(__file__).resolve().parent


class Script(NamedTuple):
    """What ablate.py knows of a script that trains."""

    config: str  # the module of its Config
    weight: str  # the setting that is 0 in a twin
    metric: str  # what is compared
    evaluated: str  # what is compared with --evaluate
    seed: str  # a setting that every run gets from here
    place: str  # another one: where it leaves its files
    budgets: dict  # {kind of --budget: the setting that holds it}


STEPS = "iterations"
SCRIPTS = {
    "train_gpt.py": Script(
        config="train_gpt",
        weight="jepa_lambda",
        metric="val_bpb",
        evaluated="startswith",
        seed="seed",
        place="run_id",
        budgets={"steps": STEPS, "flops": "train_flops", "seconds": "max_wallclock_seconds"},
    ),
    "finetune.py": Script(
        config="nanojepa.hf.settings",
        weight="lbd",
        metric="eval_loss",
        evaluated="accuracy",
        seed="finetune_seed",
        place="output_dir",
        budgets={"flops": "same_flop"},
    ),
}
# Settings of a term, which a twin doesn't have.
TERM = re.compile(
    r"jepa_\w+|objective|span|step_jepa|predictors|linear_predictor|infonce|front_pred|reverse_pred"
    r"|views|last_token|gamma"
)
# What all arms share, so that their results and their step times compare.
SHARED = {
    "program and batch": ("compile", *stats.PROGRAM),
    "data": (
        *("data_path", "tokenizer", "doc_token", "long_examples", "train_file", "eval_file"),
        *("data_file", "eval_split", "split_seed", "max_items", "max_eval_items", "config_name"),
        "train_split",
    ),
    "measurement": ("val_tokens", "eval_stride", "val_loss_every", "target_val_loss"),
}
# Settings that are a file or a folder.
FILES = ("train_file", "eval_file", "data_file", "data_path", "tokenizer", "init_from", "name")

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
            given, name = settings, name.lower().rpartition(".")[2]
        elif name not in project_files():
            raise ValueError(f"{where}: {name} is no file of the project, named from its root")
        elif not Path(value).is_file():
            raise ValueError(f"{where}: {value} is no file")
        else:
            given = files
        if name in given:
            raise ValueError(f"{where}: {name} is there twice")
        given[name] = value
    weight = SCRIPTS[script].weight
    settings = tuple(sorted(settings.items(), key=lambda pair: (pair[0] != weight, pair[0])))
    if is_zero(dict(settings).get(weight, "1")):  # without the term, its settings mean nothing
        settings = without_term(settings, script)
    return stats.Arm(settings, tuple(sorted(files.items())))


def is_zero(text):
    try:
        return float(text) == 0
    except ValueError:  # the script will say what is wrong with it
        return False


def without_term(settings, script):
    """The settings of an arm's twin."""
    weight = SCRIPTS[script].weight
    others = [pair for pair in settings if pair[0] != weight and not TERM.fullmatch(pair[0])]
    return ((weight, "0"), *others)


def check_arms(arms, script, budget):
    """ValueError if an arm sets what all of them share; budget: the text of --budget or None."""
    limits = set(SCRIPTS[script].budgets.values()) if budget else set()
    shared = {**SHARED, "budget": limits - {STEPS} if budget == "steps" else limits}
    settings = [(arm, *pair) for arm in reversed(arms) for pair in arm.settings]  # twins last
    for arm, name, value in settings:
        groups = [group for group, names in shared.items() if name in names]
        if groups:
            advice = f"give it as a flag for all: --{name}={value}"
            if groups == ["budget"]:
                advice = "leave it to --budget"
            raise ValueError(
                f"arm {arm.label}: {name} belongs to the {groups[0]}, which all arms share; "
                f"{advice}"
            )


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
settings = [(as_dict(one.config), one.origin) for one in loaded]
print(json.dumps([list(project_sources(folder)), settings]))
"""


class Settings(NamedTuple):
    """What a script reads: {name: value} and {name: where it is from}, without sections."""

    values: dict
    origin: dict


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
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    return folder


def read_settings(folder, script, flags):
    """(names of the files that a script is made of, its [Settings]) by the source in a folder.

    flags: for each run the list of its flags. ValueError if the script would refuse them.
    """
    command = [sys.executable, "-c", READ_SETTINGS, folder, Path(script).stem]
    command.append(SCRIPTS[script].config)
    settings = []
    done = subprocess.run(command, input=json.dumps(flags), capture_output=True, text=True)
    if done.returncode:
        kind, _, message = done.stderr.strip().splitlines()[-1].partition(": ")
        wrong = message if kind == "ValueError" else f"{folder / script}: {kind}: {message}"
        raise ValueError(wrong)
    files, found = json.loads(done.stdout.splitlines()[-1])
    for values, origin in found:
        origin = {key.rpartition(".")[2]: where for key, where in origin.items()}
        settings.append(Settings(without_sections(values), origin))
    return files, settings


def without_sections(settings):
    """{name: value} of settings that may lie in sections; of two values of a name, the last."""
    flat = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def content(path):
    """What stands for a file or a folder in a run's name.

    That is the text of a file; of a folder its weights, or its meta.json but for what it says of
    the source (there are the sums of its shards), or else its place.
    """
    from nanojepa.batches import EMBEDDED_DATA  # here, since it imports torch

    place = Path(path)
    if path in EMBEDDED_DATA:  # a run makes it if it is missing
        return path
    for file in (place, place / "model.safetensors"):
        if file.is_file():
            return digest(file.read_bytes())
    if (place / "meta.json").is_file():
        meta = json.loads((place / "meta.json").read_text())
        kept = {k: v for k, v in meta.items() if k not in ("source", "licence", "sha256")}
        return digest(json.dumps(kept))
    return str(place.resolve()) if place.is_dir() else path  # or a name on the hub


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
            try:
                result.update(**json.loads(file.read_text()))
            except (ValueError, TypeError, RecursionError) as e:
                again = self.folder if file.name == "result.json" else file
                raise ValueError(
                    f"{file}: not a JSON object ({e}), so it was damaged; remove {again} and run "
                    "the grid again"
                ) from None
        config = self.folder / "config.yaml"
        if "config" not in result and config.is_file():
            result["config"] = without_sections(yaml.safe_load(config.read_text()))
        return result


class Plan(NamedTuple):
    arms: list
    runs: list  # interleaved over the arms
    settings: Settings  # of the first arm, a twin or the baseline


def plan(args, flags, out):
    """The Plan of a grid; flags: the script's own, for all runs."""
    arms = parse_arms(args.arms, args.script, args.arm, args.baseline)
    check_arms(arms, args.script, args.budget)
    flags = ([f"--config={args.config}"] if args.config else []) + flags
    flags += budget_flags(args.budget, args.script)
    by_source, planned = {}, {}
    for arm in arms:
        by_source.setdefault(copy_source(arm, out), []).append(arm)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for source, own in by_source.items():
        cells = list(itertools.product(seeds, own))
        given = [flags_of(arm, seed, flags) for seed, arm in cells]
        files, found = read_settings(source, args.script, given)
        for (seed, arm), argv, settings in zip(cells, given, found, strict=True):
            name = name_run(arm, args.script, settings, source, files)
            run = make_run(args, arm, seed, name, [source / args.script, *argv], out)
            planned[seed, arm] = run, settings
    runs = [planned[seed, arm][0] for seed in seeds for arm in arms]
    check_different(runs)
    return Plan(arms, runs, planned[seeds[0], arms[0]][1])


def flags_of(arm, seed, flags):
    flags = [*flags, *(f"--{name}={value}" for name, value in arm.settings)]
    return [flag.replace("{seed}", str(seed)) for flag in flags]


def name_run(arm, script, settings, source, files):
    """The digest of all that makes a run's result: its settings, its inputs and its source.

    files: names in the folder `source` of what the script is made of.
    """
    made = {}
    for name, value in settings.values.items():
        if name not in (SCRIPTS[script].seed, SCRIPTS[script].place, "resume"):
            made[name] = content(value) if name in FILES and value else value
        elif settings.origin[name].startswith("flag"):
            raise ValueError(
                f"arm {arm.label}: {name} is set here for every run; see --seeds, --first_seed "
                "and --name"
            )
    replaced = dict(arm.files)
    code = [(source / name).read_bytes() for name in dict.fromkeys((*files, *replaced))]
    return digest(script, json.dumps(made), *replaced, *code)


def make_run(args, arm, seed, name, command, out):
    script, name = SCRIPTS[args.script], f"{args.name}-{name}-seed{seed}"
    folder, evaluation = ROOT / "logs" / name, None
    if args.evaluate:
        test = digest(Path(args.evaluate).read_bytes(), args.task)
        evaluation = folder / f"evaluation-{test}.json"
    place = name if script.place == "run_id" else folder
    own = [f"--{script.seed}={seed}", f"--{script.place}={place}"]
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
    trained = (run.folder / "result.json").is_file()
    if run.folder.exists() and not trained:
        stopped = time.strftime("stopped%Y%m%d-%H%M%S")
        run.folder.rename(run.folder.with_name(f"{run.folder.name}.{stopped}"))
    with open(run.log, "ab") as log:

        def call(command, output):
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
            log.flush()
            return subprocess.run(command, stdout=output, stderr=log, env=environment)

        if not trained and call(run.command, log).returncode:
            return
        if run.evaluation:
            done = call(evaluate_command(run, args), subprocess.PIPE)
            log.write(done.stdout)
            if not done.returncode and done.stdout.strip():
                write_whole(run.evaluation, done.stdout.strip().splitlines()[-1])


def evaluate_command(run, args):
    """The command that evaluates a run by the arm's own source: its files may change the model."""
    script = str(Path(run.command[1]).with_name("evaluate.py"))
    of = ["--run", str(run.folder)]
    if args.script == "finetune.py":
        of = ["--model", str(run.folder), "--output", str(run.evaluation.with_suffix(".jsonl"))]
    task = ["--task", args.task] if args.task else []
    return [sys.executable, script, "accuracy", *of, "--data", args.evaluate, *task]


def execute_all(runs, args, gpus):
    """Execute runs in their order, one on each of `gpus` at a time; yields those that have ended.

    The next one starts when the caller goes on.
    """
    waiting = iter(runs)
    with ThreadPoolExecutor(len(gpus)) as pool:
        first = zip(gpus, waiting, strict=False)
        running = {pool.submit(execute, run, args, gpu): (run, gpu) for gpu, run in first}
        while running:
            ended = next(as_completed(running))
            run, gpu = running.pop(ended)
            ended.result()
            yield run
            for run in itertools.islice(waiting, 1):
                running[pool.submit(execute, run, args, gpu)] = run, gpu


# ------------------------------------------------------------------------------------------ a grid


def run_grid(argv):
    """Make a grid, or what is missing of it; returns the rows of its first metric."""
    args, flags = parse_flags(argv)
    script, out = SCRIPTS[args.script], ROOT / "ablations" / args.name
    metrics = (args.metric or (script.evaluated if args.evaluate else script.metric)).split(",")
    grid = plan(args, flags, out)
    left = [run for run in grid.runs if run.result() is None]
    print(
        f"{len(grid.arms)} arms x {args.seeds} seeds, {len(grid.runs) - len(left)} runs finished, "
        f"{len(left)} to do; {', '.join(arm.label for arm in grid.arms)}",
        flush=True,
    )
    values, origin = grid.settings
    given = [f"{name}={values[name]}" for name in origin if "environment" in origin[name]]
    if given:
        print(f"from the environment, for all arms: {', '.join(given)}")
    gpus = args.gpus.split(",") if args.gpus else [""] * args.jobs
    began = time.perf_counter()
    for n, run in enumerate(execute_all(left, args, gpus), 1):
        rest = timedelta(seconds=round((time.perf_counter() - began) / n * (len(left) - n)))
        said = f"{run.arm.label}, seed {run.seed}: {outcome(run, grid.runs, metrics[0])}"
        print(f"{n} of {len(left)} runs, {rest} left: {said}", flush=True)
        # A metric that isn't there is found out now, not after the last run.
        if sum(run.result() is not None for run in grid.runs) >= len(grid.arms):
            report(grid, args, argv, metrics, out)
    first, text = report(grid, args, argv, metrics, out)
    title = draw(grid, first, args, out / "ablation.png")
    print(f"{text}\n\nresult: {title}; see table.md and ablation.png in ablations/{args.name}")
    return first.arms


def outcome(run, runs, metric):
    """What a run that ended has come to, and the mean of its arm's runs so far."""
    result = run.result()
    if result is None:
        return f"FAILED, see {run.log}"
    value = stats.number(result, metric)
    if value is None:
        return stats.lacking(result, metric)
    values = [stats.number(other.result(), metric) for other in runs if other.arm == run.arm]
    values = [other for other in values if other is not None]
    return f"{metric} {value:.5g}, mean of {len(values)}: {fmean(values):.5g}"


def report(grid, args, argv, metrics, out):
    """Write table.md and result.json of the runs so far; returns (the first Summary, the text)."""
    word = compared_with(args)
    trials = [stats.Trial(run.arm.label, run.seed, run.result()) for run in grid.runs]
    found = [stats.summarise(grid.arms, trials, metric, word) for metric in metrics]
    text = "\n\n".join(stats.markdown(one, word) for one in found)
    (out / "table.md").write_text(f"{text}\n\nCommand: `python ablate.py {shlex.join(argv)}`\n")
    result = {
        "command": argv,
        "script": args.script,
        "baseline": grid.arms[0].label if word == "baseline" else None,
        "tables": [one._asdict() for one in found],
        "runs": [
            {"arm": t.arm, "seed": t.seed, "run": run.folder.name, "finished": t.result is not None}
            for run, t in zip(grid.runs, trials, strict=True)
        ],
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return found[0], text


def compared_with(args):
    return "twin" if args.baseline is None else "baseline"


def draw(grid, found, args, path):
    """Draw the picture of a grid's Summary; returns its title."""
    finished = [run for run in grid.runs if run.result() is not None]
    logs = {(run.arm.label, run.seed): read_log(run.folder) for run in finished}
    objective = grid.settings.values.get("jepa_objective", "")
    return plots.draw_grid(path, found, logs, compared_with(args), objective)


def read_log(folder):
    """The rows of a run's metrics.jsonl."""
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl in it")
    return [json.loads(line) for line in file.read_text().splitlines()]


def parse_flags(argv):
    """(the flags of a grid, the list of the script's own); ValueError says what is wrong."""
    parser = argparse.ArgumentParser(
        usage="python ablate.py [--config FILE] --arms NAME=V,V [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, arm = parser.add_argument, '"NAME=V NAME=V"'
    add("--arms", action="append", metavar="NAME=V,V", help="an axis of a grid, or FILE:PATH,PATH")
    add("--arm", action="append", metavar=arm, help="one arm; FILE:PATH too")
    add("--baseline", metavar=arm, help="the arm that all are compared with, in place of twins")
    add("--config", metavar="FILE", help="the script's YAML file")
    add("--script", choices=SCRIPTS, default="train_gpt.py", help="default: train_gpt.py")
    add("--seeds", type=int, default=3, metavar="N", help="seeds of each arm (default: 3)")
    add("--first_seed", type=int, default=1, metavar="N", help="the first of them (default: 1)")
    budget = "what all arms have: steps, flops or seconds; under bare steps they may set ITERATIONS"
    add("--budget", metavar="KIND[=V]", help=f"{budget} (default: the config's)")
    add("--metric", metavar="NAME,NAME", help="numbers of result.json or the evaluation to compare")
    add("--evaluate", metavar="FILE", help="evaluate each run on this file")
    add("--task", help="evaluate.py's --task")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--gpus", metavar="0,1", help="GPUs to use, one run on each at a time")
    add("--name", default="ablation", help="of the folder in ablations/ (default: ablation)")
    args, flags = parser.parse_known_args(argv)
    args.arms, args.arm = args.arms or [], args.arm or []
    if not args.arms and not args.arm:
        raise ValueError("no arms: give --arms NAME=V,V or --arm NAME=V")
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: must be at least 1")
    if args.baseline is not None and not args.budget and args.script == "train_gpt.py":
        raise ValueError("--baseline needs a --budget: its arms may differ in length")
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise ValueError(f"--name {args.name}: may hold letters, digits, '_', '.' and '-' only")
    return args, flags


# ---------------------------------------------------------------------------------- other commands


def plot(argv):
    parser = argparse.ArgumentParser(prog="ablate.py plot", description="loss curves of runs")
    parser.add_argument("runs", nargs="+", help="folders in logs/")
    parser.add_argument("--out", default="curves.png", help="the picture (default: curves.png)")
    args = parser.parse_args(argv)
    plots.draw_curves(args.out, {Path(run).name: read_log(run) for run in args.runs})
    print(f"result: {args.out}")


def best(argv):
    parser = argparse.ArgumentParser(prog="ablate.py best", description="arms for a next grid")
    parser.add_argument("grid", help="a folder in ablations/")
    parser.add_argument("--over", required=True, help="the setting to choose")
    args = parser.parse_args(argv)
    grid = json.loads((Path(args.grid) / "result.json").read_text())
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
    commands = {"plot": plot, "best": best}
    try:
        if argv and argv[0] in commands:
            commands[argv[0]](argv[1:])
        else:
            run_grid(argv)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None


if __name__ == "__main__":
    main()
