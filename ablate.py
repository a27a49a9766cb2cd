"""Does it help? Arms times seeds, each arm against its twin without the term: a table, a picture, result.json.

    python ablate.py --config configs/cpu_stdlib.yaml --arms JEPA_LAMBDA=0.005,0.02,0.1 --seeds 8 --budget steps=200
    python ablate.py --config FILE --arms JEPA_LAMBDA=0.02 --arms JEPA_LAYER=-1,3 --seeds 5              a grid
    python ablate.py --arm "JEPA_LAMBDA=0.02 JEPA_LAYER=3" --arm JEPA_LAMBDA=0.1 --seeds 5               arms one by one
    python ablate.py --arms jepa.py:my_jepa.py --jepa_lambda 0.1 --seeds 3                               an edited file
    python ablate.py --baseline "JEPA_LAMBDA=0 ITERATIONS=300" --arm "JEPA_LAMBDA=0.1 ITERATIONS=200" --budget steps --seeds 5
    python ablate.py --script finetune.py --config FILE --arms lbd=0.1,1 --seeds 5 --evaluate test.jsonl --task startswith
    python ablate.py plot logs/RUN ... [--out curves.png]                                                loss curves of any runs
    python ablate.py best ablations/NAME --over JEPA_LAMBDA          of arms that differ in it alone, the one with the best mean: for a next grid

Other flags are the script's, the same for all runs. A twin is an arm without its JEPA settings and files and with the weight 0; it
is added where it is missing. --baseline names one arm that all are compared with instead. Runs are interleaved: all arms of a seed,
then the next, so drift of the machine hits all alike. The same command again continues a stopped grid; a run that failed is shown,
kept, and tried again. All arms have the same seeds, data, batch, compile mode and --budget, so no arm may set these: steps=N,
flops=X or seconds=S (a bare name takes the config's own value; under bare steps arms may set ITERATIONS). {seed} in a setting is the
run's seed, e.g. INIT_FROM=logs/other-seed{seed}.

The paired t-test decides, two-sided, Holm-corrected over the arms. Wilcoxon's test stands beside it; below 8 seeds it can't go
under 0.01. The smallest difference that the grid could have found is that of a paired t-test at 5%, not corrected, with 80% power.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from config import load_config, load_sections
from data.shards import write_whole

ROOT = Path(__file__).resolve().parent
WEIGHT = {"train_gpt.py": "jepa_lambda", "finetune.py": "lbd"}
METRIC = {"train_gpt.py": "val_bpb", "finetune.py": "eval_loss"}
HIGHER_IS_BETTER = {"exact", "startswith", "exact_clean", "startswith_clean", "accuracy", "probability"}
# settings of the term: what an arm's twin hasn't
TERM = {"train_gpt.py": ("jepa_",), "finetune.py": ("step_jepa", "span", "predictors", "linear_predictor", "jepa_", "infonce", "front_pred", "reverse_pred", "views",
                                                    "last_token", "gamma")}
CODE = {"train_gpt.py": ("train_gpt.py", "model.py", "jepa.py", "loader.py", "config.py", "weights.py", "checkpoint.py", "data/shards.py"),
        "finetune.py": ("finetune.py", "layouts.py", "chat.py", "jepa.py", "model.py", "loader.py", "config.py", "data/pairs.py")}  # what makes a run's result
INPUTS = ("data_path", "tokenizer", "init_from", "name", "train_file", "eval_file", "data_file")  # settings that are files or folders
BUDGETS = {"steps": "iterations", "flops": "train_flops", "seconds": "max_wallclock_seconds"}
OWN = {"train_gpt.py": ("seed", "run_id"), "finetune.py": ("finetune_seed", "output_dir", "resume")}  # what every run gets from here
# What all arms share. A difference in the first two makes step times incomparable, in the others results.
SHARED = {"train_gpt.py": {"program": ("compile", "dtype"), "batch": ("train_batch_tokens", "train_seq_len", "grad_accum_steps"),
                           "data": ("data_path", "tokenizer", "doc_token", "long_examples"), "measurement": ("val_tokens", "eval_stride", "val_loss_every", "target_val_loss")},
          "finetune.py": {"program": ("dtype", "attn_implementation", "gradient_checkpointing", "memory_efficient", "fsdp"), "batch": ("batch_size", "grad_accum"),
                          "data": ("train_file", "eval_file", "data_file", "eval_split", "split_seed", "max_items", "max_eval_items", "config_name", "train_split")}}


@dataclass(frozen=True)
class Arm:
    """Settings (pairs of name and value), and files (pairs of name and path) that stand in for the project's."""
    settings: tuple
    files: tuple = ()

    @property
    def label(self):
        return " ".join([f"{name}={value}" for name, value in self.settings] + [f"{name}:{path}" for name, path in self.files])

    def twin(self, script):
        """The arm without the term, to which this one is compared."""
        weight = WEIGHT[script]
        kept = tuple((name, value) for name, value in self.settings if name != weight and not name.startswith(TERM[script]))
        return Arm(((weight, "0"), *kept))


def parse_arm(items, script, where):
    """The Arm of texts NAME=value or FILE.py:path, in whatever order they are given. ValueError says what is wrong in `where`."""
    found, weight = {"=": {}, ":": {}}, WEIGHT[script]
    for item in items:
        name, mark, value = re.fullmatch(r"([^=:]*)([=:]?)(.*)", item, re.DOTALL).groups()
        if not (name and value):
            raise ValueError(f"{where}: must be NAME=value or FILE.py:path, with commas between the values of --arms, blanks between the settings of --arm")
        if mark == ":" and name not in {file.name for file in ROOT.glob("*.py")}:
            raise ValueError(f"{where}: {name} is no file of the project's own folder")
        if mark == ":" and not Path(value).is_file():
            raise ValueError(f"{where}: {value} is no file")
        name = name if mark == ":" else name.lower()
        if mark == "=" and script == "finetune.py":  # where a key has several names
            import finetune
            name = finetune.ALIASES.get(name, name).rpartition(".")[2]
        if name in found[mark]:
            raise ValueError(f"{where}: {name} is there twice")
        found[mark][name] = value
    arm = Arm(*(tuple(sorted(pairs.items(), key=lambda x: (x[0] != weight, x[0]))) for pairs in found.values()))
    try:
        off = float(found["="].get(weight, 1)) == 0
    except ValueError:  # the script will say so
        off = False
    return Arm(arm.twin(script).settings, arm.files) if off else arm  # without the term its settings mean nothing


def parse_arms(grid, script, singles=(), baseline=None):
    """The Arms of --arms texts (NAME=v,v or FILE.py:PATH,PATH: axes of a grid) and --arm texts, behind the baseline or else their twins."""
    axes = []
    for text in grid:
        head, values = re.fullmatch(r"([^=:]*[=:]?)(.*)", text, re.DOTALL).groups()
        axes.append([(head + value, text) for value in values.split(",")])
    arms = [parse_arm([item for item, _ in choice], script, " ".join(f"--arms {text}" for _, text in choice)) for choice in itertools.product(*axes)] if axes else []
    arms += [parse_arm(shlex.split(text) or [""], script, f"--arm {text}") for text in singles]
    first = [parse_arm(shlex.split(baseline) or [""], script, f"--baseline {baseline}")] if baseline is not None else [arm.twin(script) for arm in arms]
    return list(dict.fromkeys(first + arms))


def check_arms(arms, script, budget):
    """ValueError where an arm sets what all of them share."""
    limits = ("same_flop",) if script == "finetune.py" else [name for name in BUDGETS.values() if (budget, name) != ("steps", "iterations")]
    groups = {**SHARED[script], **({"budget": limits} if budget else {})}
    for arm, (name, value) in ((arm, setting) for arm in reversed(arms) for setting in arm.settings):  # twins last
        if name in OWN[script]:
            raise ValueError(f"arm {arm.label}: {name} is set here for every run; see --seeds, --first_seed and --name")
        for group, names in groups.items():
            if name in names:
                raise ValueError(f"arm {arm.label}: {name} belongs to the {group}, which all arms share; " +
                                 ("leave it to --budget" if group == "budget" else f"give it as a flag for all: --{name}={value}"))


def budget_flags(text, script):
    """The script's flags for --budget."""
    kind, _, value = text.partition("=")
    if kind not in BUDGETS or script == "finetune.py" and kind != "flops":
        raise ValueError(f"--budget {text}: must be steps, flops or seconds, with =VALUE or without; of finetune.py flops, which is its same_flop")
    if script == "finetune.py":
        return ["--same_flop=true"]
    flags = [f"--{BUDGETS[other]}=0" for other in ("flops", "seconds") if other != kind]
    return flags + ([f"--{BUDGETS[kind]}={value}"] if value else [])


@dataclass
class Run:
    """One run of a grid: where it leaves its files, and how it is started."""
    arm: Arm
    seed: int
    folder: Path
    command: list
    log: Path
    evaluation: Path | None = None

    def result(self):
        """Its result.json, with the evaluation's where there is one; None while it isn't finished."""
        files = [*([self.evaluation] if self.evaluation else []), self.folder / "result.json"]
        if not all(file.is_file() for file in files):
            return None
        found = {}
        for file in files:
            try:
                found.update(**json.loads(file.read_text()))
            except (ValueError, TypeError, RecursionError) as e:
                again = self.folder if file.name == "result.json" else file
                raise ValueError(f"{file}: not a JSON object ({e}), so it was damaged; remove {again} and run the grid again") from None
        if "config" not in found and (self.folder / "config.yaml").is_file():  # finetune.py's, of sections
            found["config"] = {name: value for section in yaml.safe_load((self.folder / "config.yaml").read_text()).values() for name, value in section.items()}
        return found


def source_folder(arm, out):
    """The folder whose scripts an arm runs, a copy with the arm's files in it: the project's own may be edited while a grid runs, but for data/."""
    scripts = {file.name: file.read_bytes() for file in sorted(ROOT.glob("*.py"))} | {name: Path(path).read_bytes() for name, path in arm.files}
    folder = out / ("source-" + digest(*itertools.chain(*scripts.items())))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_bytes(text)
    for name in ("data", "logs"):
        (ROOT / name).mkdir(exist_ok=True)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    return folder


def digest(*parts):
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else str(p).encode() for p in parts)).hexdigest()[:8]


def effective(flags, script):
    """({setting: value}, {setting: where it comes from}) of a run with these flags, in this environment; ValueError where the script would refuse them."""
    if script == "train_gpt.py":
        import train_gpt
        config, origin, _ = load_config(train_gpt.Config, flags, os.environ)
        return asdict(config), origin
    import finetune
    config, origin = load_sections(finetune.Config, flags, finetune.ALIASES)
    return ({name: value for section in asdict(config).values() for name, value in section.items()}, {key.rpartition(".")[2]: where for key, where in origin.items()})


def content(path):
    """What a run's name has of an input: the text of a file; of a folder its weights, or meta.json but for what it says of the source (there are the sums
    of its shards), or else its place."""
    from loader import EMBEDDED_DATA
    place = Path(path)
    if path in EMBEDDED_DATA:  # a run makes it where it is missing
        return path
    for file in (place, place / "model.safetensors"):
        if file.is_file():
            return digest(file.read_bytes())
    if (file := place / "meta.json").is_file():
        return digest(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in ("source", "licence", "sha256")}))
    return str(place.resolve()) if place.is_dir() else path  # a hub's name


def plan(args, flags, out):
    """(Arms, their Runs, interleaved). A run's name holds a digest of all that makes its result: settings wherever they come from, inputs, source."""
    arms, named, runs = parse_arms(args.arms, args.script, args.arm, args.baseline), {}, []
    check_arms(arms, args.script, args.budget)
    flags = [*([f"--config={args.config}"] if args.config else []), *flags, *(budget_flags(args.budget, args.script) if args.budget else [])]
    for seed, arm in itertools.product(range(args.first_seed, args.first_seed + args.seeds), arms):
        replaced, given = dict(arm.files), [flag.replace("{seed}", str(seed)) for flag in (*flags, *(f"--{key}={value}" for key, value in arm.settings))]
        settings, origin = effective(given, args.script)
        if taken := [name for name in OWN[args.script] if origin[name].startswith("flag")]:
            raise ValueError(f"--{taken[0]} is set here for every run; see --seeds, --first_seed and --name")
        code = [Path(replaced.get(file, ROOT / file)).read_bytes() for file in dict.fromkeys((*CODE[args.script], *replaced))]
        made = {name: content(value) if name in INPUTS and value else value for name, value in settings.items() if name not in OWN[args.script]}
        folder = ROOT / "logs" / f"{args.name}-{digest(args.script, json.dumps(made), *replaced, *code)}-seed{seed}"
        if folder in named:
            raise ValueError(f"arm {arm.label} is the same run as arm {named[folder].label}; leave one out, or change it (an arm without a weight has the config's)")
        named[folder] = arm
        where = f"--run_id={folder.name}" if args.script == "train_gpt.py" else f"--output_dir={folder}"
        evaluation = folder / f"evaluation-{digest(Path(args.evaluate).read_bytes(), args.task)}.json" if args.evaluate else None
        command = [sys.executable, str(source_folder(arm, out) / args.script), *given, f"--seed={seed}", where]
        runs.append(Run(arm, seed, folder, command, out / f"{folder.name}.log", evaluation))
    return arms, runs


def execute(run, args, gpu):
    """Train and evaluate one run, output into its log, behind that of earlier attempts. It has failed where it has no result then."""
    steps = [run.command] if not (run.folder / "result.json").is_file() else []
    if steps and run.folder.exists():
        run.folder.rename(run.folder.with_name(f"{run.folder.name}.stopped{time.strftime('%Y%m%d-%H%M%S')}"))
    if args.evaluate:  # by the arm's own source, as its files may have changed the model
        of = ["--run", run.folder] if args.script == "train_gpt.py" else ["--model", run.folder, "--output", run.evaluation.with_suffix(".jsonl")]
        evaluate = [sys.executable, Path(run.command[1]).with_name("evaluate.py"), *of, "--data", args.evaluate, *(["--task", args.task] if args.task else [])]
        steps.append([str(part) for part in evaluate])
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with open(run.log, "ab") as log:
        for command in steps:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode())
            log.flush()
            done = subprocess.run(command, stdout=log if command is run.command else subprocess.PIPE, stderr=log, env=environment)
            log.write(done.stdout or b"")
            if done.returncode or done.stdout == b"":
                return
        if args.evaluate:
            write_whole(run.evaluation, done.stdout.strip().splitlines()[-1])


def number(result, metric):
    """A finite number of a result, or None."""
    value = result.get(metric)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def lacking(run, metric):
    """Why a run has no such number."""
    result = run.result()
    return "no result" if result is None else f"{metric} is {json.dumps(result[metric])}" if metric in result else f"no {metric} in its result"


def compare(twin, arm):
    """Paired comparison of two equally long lists, arm - twin: {"n", "difference", "low", "high" (95%), "p" (t-test), "wilcoxon"}; None of what two seeds can't give."""
    from scipy import stats
    differences = [b - a for a, b in zip(twin, arm)]
    found = {"n": len(differences), "difference": statistics.fmean(differences) if differences else None, "low": None, "high": None, "p": None, "wilcoxon": None}
    if len(differences) < 2:
        return found
    if len(set(differences)) == 1:  # no spread: no test either, but no difference is no evidence
        return found | {"low": differences[0], "high": differences[0], "p": 1.0 if differences[0] == 0 else None}
    test = stats.ttest_rel(arm, twin)
    interval = test.confidence_interval(0.95)
    return found | {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue), "wilcoxon": float(stats.wilcoxon(differences).pvalue)}


def holm(p_values):
    """Holm-corrected p-values, None where there is none. Source: Holm 1979."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    corrected, least = [None] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


def detectable(spread, n, power=0.8, alpha=0.05):
    """The difference that a two-sided paired t-test of n pairs, whose differences have this standard deviation, finds with this power."""
    from scipy import optimize, stats
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    found = lambda d: stats.nct.sf(critical, n - 1, d * n**0.5)  # the other tail is below 1e-3 at any power of interest, and NaN far out
    most = next(d for d in (0.5 * 1.5**i for i in range(40)) if found(d) > power)
    return spread * optimize.brentq(lambda d: found(d) - power, 1e-6, most)


def unlike(one, other, script):
    """How two results were made differently, so that neither they nor their times can be compared; None where they weren't."""
    names = [name for group in ("program", "batch") for name in SHARED[script][group] if name != "compile"]  # whether it worked is what counts
    a, b = ({name: result.get(name) for name in ("compiled", "data_sha256")} | {name: result.get("config", {}).get(name) for name in names} for result in (one, other))
    return next((f"{name} is {a[name]} there, {b[name]} here" for name in a if a[name] != b[name]), None)


def summarise(arms, runs, script, metric, baseline=None):
    """(rows of the table, one per arm; the first line of the result) of a grid's runs. baseline: the Arm that all are compared with, in place of twins."""
    results = {(run.arm, run.seed): run.result() for run in runs}
    values = {key: value for key, result in results.items() if result and (value := number(result, metric)) is not None}
    if not values and (finished := [result for result in results.values() if result]):
        why = f"is {json.dumps(next(r[metric] for r in finished if metric in r))}" if any(metric in r for r in finished) else "no such number"
        there = sorted({name for result in finished for name in result if number(result, name) is not None})
        raise ValueError(f"--metric {metric}: {why} in result.json; there are {', '.join(there)}; the {len(finished)} finished runs are kept")
    rows, spreads = [], []
    for arm in arms:
        other, own = baseline or arm.twin(script), {seed: value for (a, seed), value in values.items() if a == arm}
        missing = {run.seed: lacking(run, metric) for run in runs if run.arm == arm and run.seed not in own}
        flops = [results[arm, s].get("train_flops") or results[arm, s].get("total_flops") for s in own]
        row = {"arm": arm.label, "settings": [list(x) for x in arm.settings], "files": [list(x) for x in arm.files], "twin": None if arm == other else other.label,
               "n": len(own), "failed": len(missing), "missing": missing, "mean": statistics.fmean(own.values()) if own else None,
               "sd": statistics.stdev(own.values()) if len(own) > 1 else None, "values": own, "flops": statistics.fmean(flops) if flops and all(flops) else None}
        rows.append(row)
        if arm == other:
            continue
        both = [s for s in own if (other, s) in values]
        row["refused"] = next((f"{found} (seed {s})" for s in both if (found := unlike(results[other, s], results[arm, s], script))), None)
        both = [] if row["refused"] else both
        row["paired"] = compare([values[other, s] for s in both], [values[arm, s] for s in both])
        per_step = lambda result: result["train_seconds"] / result["steps"]
        row["time_ratio"] = statistics.median(per_step(results[arm, s]) / per_step(results[other, s]) for s in both) if both else None
        if len(both) > 1:
            spreads.append((statistics.variance([values[arm, s] - values[other, s] for s in both]), len(both)))
    compared = [row for row in rows if "paired" in row]
    few = [row for row in compared if row["paired"]["n"] < 3 and not row["refused"]]
    for row, p in zip(compared, holm([None if row in few else row["paired"]["p"] for row in compared])):
        row["paired"]["holm"] = p
    known = "; ".join(f"{row['arm']}: mean {row['mean']:.5g}, standard deviation {row['sd']:.2g} over {row['n']} seeds" for row in rows
                      if row["twin"] is None and row["sd"] is not None)
    line = f"{metric} of the {'baseline' if baseline else 'twin'}, {known}" if known else f"{metric}: too few finished runs for a spread"
    if spreads:
        smallest = detectable(statistics.median(v for v, _ in spreads) ** 0.5, min(n for _, n in spreads))  # of a typical arm
        line += f"; the smallest difference that this grid could have found (80% power): {smallest:.2g}"
    if few:
        line += ". Fewer than 3 seeds: no claim is possible" + ("" if len(few) == len(compared) else f" on {', '.join(row['arm'] for row in few)}")
    return rows, line


def markdown(rows, metric, word="twin"):
    """The rows as a Markdown table, and below it why values or comparisons are missing. word: what arms are compared with, a twin or the baseline."""
    show = lambda x, form="{:.5g}": "" if x is None else form.format(x)
    lines = [f"| arm | n | {metric} | sd | difference to the {word} | 95% interval | p (t, Holm) | p (t) | p (Wilcoxon) | step time | FLOPs | failed |", "|---" * 12 + "|"]
    notes = []
    for row in rows:
        paired = row.get("paired", {})
        interval = f"{paired['low']:+.5f} .. {paired['high']:+.5f}" if paired.get("low") is not None else ""
        p = [show(paired.get(name), "{:.3g}") for name in ("holm", "p", "wilcoxon")]
        p = ["refused" if row["refused"] else "no claim: fewer than 3 seeds", "", ""] if paired and paired["n"] < 3 else p
        cells = [row["arm"] + ("" if row["twin"] else f" ({word})"), row["n"], show(row["mean"]), show(row["sd"], "{:.2g}"), show(paired.get("difference"), "{:+.5f}"), interval,
                 *p, show(row.get("time_ratio"), "{:.3f}x"), show(row["flops"], "{:.3g}"), row["failed"] or ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        notes += [f"{row['arm']}: refused, not compared with {row['twin']}: {row['refused']}; run both in the same way"] if row.get("refused") else []
        notes += [f"{row['arm']}, seed {seed}: {why}" for seed, why in row["missing"].items()]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def standing(arms, runs, metric):
    """The table so far: a line an arm with its finished runs and their mean."""
    lines = []
    for arm in arms:
        results = [run.result() for run in runs if run.arm == arm]
        values = [value for result in results if result and (value := number(result, metric)) is not None]
        lines.append(f"  {arm.label:<{max(len(a.label) for a in arms)}}  {sum(map(bool, results))}/{len(results)}" + (f"  mean {statistics.fmean(values):.5g}" if values else ""))
    return "\n".join(lines)


def curves(axes, folders, labels):
    """Draw the losses of metrics.jsonl of some runs: training thin, validation with points."""
    for n, (folder, label) in enumerate(zip(folders, labels)):
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for name, style in (("train_loss", "-"), ("ce_loss", "-"), ("val_loss", "o--"), ("eval_loss", "o--")):
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points), style, color=f"C{n % 10}", linewidth=0.8, markersize=4, label=label)
                label = "_" + label  # one entry a run
    axes.set(xlabel="step", ylabel="loss, nats per token")
    if axes.lines:
        axes.legend(fontsize=7)


def draw(path, rows, runs, metric, word):
    """The difference of each arm with its interval, and the loss curves of the first seed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4 + 0.2 * len(rows)), layout="constrained")
    compared = [row for row in rows if row.get("paired", {}).get("difference") is not None]
    for y, row in enumerate(compared):
        paired, twin = row["paired"], next(r for r in rows if r["arm"] == row["twin"])
        left.plot([row["values"][s] - twin["values"][s] for s in row["values"] if s in twin["values"]], [y] * paired["n"], "|", color="grey")
        if paired["low"] is not None:
            left.plot([paired["low"], paired["high"]], [y, y], color="C0")
        left.plot(paired["difference"], y, "o", color="C0")
    left.axvline(0, color="black", linewidth=0.8)
    left.set(yticks=range(len(compared)), yticklabels=[textwrap.fill(row["arm"], 40) for row in compared], xlabel=f"{metric}, arm - {word} (95% interval; lines: seeds); "
             f"{'right' if metric in HIGHER_IS_BETTER else 'left'} is better")
    first = [run for run in runs if run.seed == min(r.seed for r in runs) and run.result()]
    curves(right, [run.folder for run in first], [f"{run.arm.label}, seed {run.seed}" for run in first])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(arms, runs, script, metrics, baseline, argv, out):
    """Write table.md and result.json of the runs finished so far; returns the rows of the first metric, and the text."""
    found = [{"metric": metric, "summary": line, "arms": rows} for metric in metrics for rows, line in [summarise(arms, runs, script, metric, baseline)]]
    text = "\n\n".join(f"{one['summary']}\n\n{markdown(one['arms'], one['metric'], 'baseline' if baseline else 'twin')}" for one in found)
    made = [{"arm": run.arm.label, "seed": run.seed, "run": run.folder.name, "finished": run.result() is not None} for run in runs]
    (out / "table.md").write_text(f"{text}\n\nCommand: `python ablate.py {shlex.join(argv)}`\n")
    (out / "result.json").write_text(json.dumps({"command": argv, "script": script, "baseline": baseline and baseline.label, "tables": found, "runs": made}, indent=1) + "\n")
    return found[0]["arms"], text


def run_grid(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--arms", action="append", default=[], metavar="NAME=V,V", help="an axis of the grid: a setting's values, or FILE.py:PATH; several make a grid")
    parser.add_argument("--arm", action="append", default=[], metavar='"NAME=V NAME=V"', help="one arm beside the grid: its settings, or FILE.py:PATH")
    parser.add_argument("--baseline", metavar='"NAME=V NAME=V"', help="the arm that all others are compared with (default: each with its own twin)")
    parser.add_argument("--config", help="the script's YAML file")
    parser.add_argument("--script", choices=sorted(WEIGHT), default="train_gpt.py", help="what is run (default: train_gpt.py)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (default: 3)")
    parser.add_argument("--first_seed", type=int, default=1, help="the first of them (default: 1)")
    parser.add_argument("--budget", metavar="KIND[=VALUE]", help="what is equal in all arms: steps, flops or seconds (default: what the config says)")
    parser.add_argument("--metric", help="a number of result.json, or of the evaluation; several, with commas, make a table each (default: val_bpb; of finetune.py eval_loss, with --evaluate the accuracy)")
    parser.add_argument("--evaluate", metavar="FILE", help="run evaluate.py on this file after each run")
    parser.add_argument("--task", help="its --task")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1; on one machine more of them disturb each other's times)")
    parser.add_argument("--gpus", help="GPUs to use, one run on each at a time, e.g. 0,1")
    parser.add_argument("--name", default="ablation", help="of the grid: its results go to ablations/NAME (default: ablation)")
    args, flags = parser.parse_known_args(argv)
    for wrong, message in ((args.seeds < 1 or args.jobs < 1, f"--seeds {args.seeds} --jobs {args.jobs}: must be at least 1"),
                           (args.first_seed < 0, f"--first_seed {args.first_seed}: must be at least 0"),
                           (args.baseline is not None and not args.budget and args.script == "train_gpt.py", "--baseline needs a --budget: arms that aren't twins may differ in length"),
                           (not args.arms and not args.arm, "no arms: give --arms NAME=V,V or --arm NAME=V"),
                           (not re.fullmatch(r"[\w.-]+", args.name), f"--name {args.name}: may hold letters, digits, '_', '.' and '-' only"),
                           (args.config and not Path(args.config).is_file(), f"--config {args.config}: no such file"),
                           (args.evaluate and not Path(args.evaluate).is_file(), f"--evaluate {args.evaluate}: no such file")):
        if wrong:
            raise ValueError(message)
    metrics = (args.metric or (METRIC[args.script] if not args.evaluate else "accuracy" if args.script == "finetune.py" else "startswith")).split(",")
    metric = metrics[0]
    out = ROOT / "ablations" / args.name
    arms, runs = plan(args, flags, out)
    baseline = arms[0] if args.baseline is not None else None
    out.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if run.result() is None]
    print(f"{len(arms)} arms x {args.seeds} seeds, {len(runs) - len(left)} runs finished, {len(left)} to do; {', '.join(arm.label for arm in arms)}", flush=True)
    settings, origin = effective(runs[0].command[2:], args.script)
    if given := [f"{name}={settings[name]}" for name, where in origin.items() if where.startswith("environment")]:
        print(f"from the environment, for all arms: {', '.join(given)}", flush=True)
    from tqdm import tqdm
    workers = args.gpus.split(",") if args.gpus else [""] * args.jobs
    with ThreadPoolExecutor(len(workers)) as pool, tqdm(total=len(left), desc="runs", disable=None) as bar:  # no bar where the output is a file
        began, finished, waiting, running = time.perf_counter(), 0, iter(left), {}
        def start(gpu):
            if run := next(waiting, None):
                running[pool.submit(execute, run, args, gpu)] = run, gpu
        for gpu in workers:
            start(gpu)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, gpu = running.pop(future)
                future.result()
                finished += 1
                value = number(run.result() or {}, metric)
                shown = f"{metric} {value:.5g}" if value is not None else lacking(run, metric) if run.result() else f"FAILED, see {run.log}"
                rest = tqdm.format_interval((time.perf_counter() - began) / finished * (len(left) - finished))
                bar.write(f"{finished} of {len(left)} runs, {rest} left: {run.arm.label}, seed {run.seed}: {shown}\n{standing(arms, runs, metric)}")
                sys.stdout.flush()
                bar.update()
                if sum(run.result() is not None for run in runs) >= len(arms):  # a metric that isn't there: now, not after the last run
                    report(arms, runs, args.script, metrics, baseline, argv, out)
                start(gpu)
    rows, text = report(arms, runs, args.script, metrics, baseline, argv, out)
    draw(out / "ablation.png", rows, runs, metric, "baseline" if baseline else "twin")
    print(f"{text}\n\nresult: {out / 'table.md'}, ablation.png and result.json beside it")
    return rows


def best(grid, over):
    """Of all arms of a finished grid that differ in the setting `over` alone, the one with the best mean of its first metric, as text for --arm."""
    table, chosen = grid["tables"][0], {}
    if not any(name == over for row in table["arms"] for name, _ in row["settings"]):
        raise ValueError(f"--over {over}: no arm sets it; they set {', '.join(sorted({name for row in table['arms'] for name, _ in row['settings']}))}")
    if left := [row["arm"] for row in table["arms"] if row["failed"]]:
        raise ValueError(f"not all runs of {left[0]} have a {table['metric']}, so the means don't compare; run the grid again")
    for row in table["arms"]:
        rest = str([[pair for pair in row["settings"] if pair[0] != over], row["files"]])
        better = max if table["metric"] in HIGHER_IS_BETTER else min
        chosen[rest] = better(chosen.get(rest, row), row, key=lambda row: row["mean"])
    return [row["arm"] for row in chosen.values()]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["plot"]:
            parser = argparse.ArgumentParser(prog="ablate.py plot")
            parser.add_argument("runs", nargs="+", help="folders in logs/")
            parser.add_argument("--out", default="curves.png", help="the picture (default: curves.png)")
            args = parser.parse_args(argv[1:])
            for run in args.runs:
                if not (Path(run) / "metrics.jsonl").is_file():
                    raise ValueError(f"{run}: no metrics.jsonl in it")
            import matplotlib
            matplotlib.use("Agg")
            from matplotlib import pyplot
            figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
            curves(axes, args.runs, [Path(run).name for run in args.runs])
            figure.savefig(args.out, dpi=110)
            print(f"result: {args.out}")
        elif argv[:1] == ["best"]:
            parser = argparse.ArgumentParser(prog="ablate.py best")
            parser.add_argument("grid", help="its folder in ablations/")
            parser.add_argument("--over", required=True, help="the setting to choose")
            args = parser.parse_args(argv[1:])
            if not (Path(args.grid) / "result.json").is_file():
                raise ValueError(f"{args.grid}: no result.json of a grid in it")
            print(*best(json.loads((Path(args.grid) / "result.json").read_text()), args.over.lower()), sep="\n")
        else:
            run_grid(argv)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    except ImportError as e:
        raise SystemExit(f'error: needs {e.name}: pip install -e ".[eval]"') from None


if __name__ == "__main__":
    main()
