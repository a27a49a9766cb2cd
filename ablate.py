"""Does it help? Arms times seeds, each arm against its twin without the term: a table, a picture, result.json.

    python ablate.py --config configs/cpu_stdlib.yaml --arms JEPA_LAMBDA=0.005,0.02,0.1 --seeds 8 --budget steps=200
    python ablate.py --config FILE --arms JEPA_LAMBDA=0.02 --arms JEPA_LAYER=-1,3 --seeds 5              a grid
    python ablate.py --arms jepa.py:my_jepa.py --jepa_lambda 0.1 --seeds 3                               an edited file
    python ablate.py --script finetune.py --config FILE --arms lbd=0.1,1 --seeds 5 --evaluate test.jsonl --task startswith
    python ablate.py plot logs/RUN ... [--out curves.png]                                                loss curves of any runs

Other flags are the script's, the same for all runs. A twin is an arm without its JEPA settings and with the weight 0; it is added
where it is missing. Runs are interleaved: all arms of a seed, then the next, so drift of the machine hits all alike. The
same command again continues a stopped grid; a run that failed is shown, kept, and tried again. All arms have the same seeds, data
order, batch, compile mode and budget: --budget steps=N, flops=X or seconds=S (a bare name takes the config's own value).

The paired t-test decides, two-sided, Holm-corrected over the arms. Wilcoxon's test stands beside it; below 8 seeds it can't go
under 0.01. The smallest difference that the grid could have found is that of a paired t-test at 5%, not corrected, with 80% power.
"""
import argparse
import hashlib
import itertools
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
WEIGHT = {"train_gpt.py": "jepa_lambda", "finetune.py": "lbd"}
METRIC = {"train_gpt.py": "val_bpb", "finetune.py": "eval_loss"}
HIGHER_IS_BETTER = {"exact", "startswith", "exact_clean", "startswith_clean", "accuracy", "probability"}
# settings of the term: what an arm's twin hasn't
TERM = {"train_gpt.py": ("jepa_",), "finetune.py": ("step_jepa", "span", "predictors", "linear_predictor", "jepa_", "infonce", "front_pred", "reverse_pred", "views", "last_token")}
CODE = {"train_gpt.py": ("train_gpt.py", "model.py", "jepa.py", "loader.py", "config.py", "weights.py"),
        "finetune.py": ("finetune.py", "layouts.py", "chat.py", "jepa.py", "model.py", "loader.py", "config.py")}  # what makes a run's result
BUDGETS = {"steps": "iterations", "flops": "train_flops", "seconds": "max_wallclock_seconds"}


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


def parse_arms(texts, script):
    """The grid of Arms, twins first, of --arms: NAME=v1,v2 or FILE:PATH,PATH. ValueError names the one that is wrong."""
    axes = []
    for text in texts:
        name, mark, values = text.partition("=") if "=" in text else text.partition(":")
        values = values.split(",")
        if not mark or not name or not all(values):
            raise ValueError(f"--arms {text}: must be NAME=value,value or FILE.py:path,path")
        if mark == ":":
            for path in values:
                if not (ROOT / name).is_file() or not Path(path).is_file():
                    raise ValueError(f"--arms {text}: {name if not (ROOT / name).is_file() else path} is no file")
            axes.append([("file", (name, str(Path(path).resolve()))) for path in values])
        else:
            axes.append([("setting", (name.lower(), value)) for value in values])
    arms = []
    for choice in itertools.product(*axes):
        arm = Arm(tuple(x for kind, x in choice if kind == "setting"), tuple(x for kind, x in choice if kind == "file"))
        weight = dict(arm.settings).get(WEIGHT[script])
        arms.append(arm.twin(script) if weight is not None and float(weight) == 0 else arm)
    return list(dict.fromkeys([arm.twin(script) for arm in arms] + arms))


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
        files = [self.folder / "result.json", *([self.evaluation] if self.evaluation else [])]
        if not all(file.is_file() for file in files):
            return None
        found = {}
        for file in files:
            found |= json.loads(file.read_text())
        return found


def source_folder(arm, out):
    """The folder whose scripts an arm runs: the project's, or a copy with the arm's files in it, which its log then holds."""
    if not arm.files:
        return ROOT
    folder = out / ("source-" + digest(*(Path(path).read_bytes() for _, path in arm.files)))
    if not folder.exists():
        folder.mkdir(parents=True)
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)
        for name in ("data", "logs"):
            (ROOT / name).mkdir(exist_ok=True)
            (folder / name).symlink_to(ROOT / name)
        for name, path in arm.files:
            shutil.copy(path, folder / name)
    return folder


def digest(*parts):
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else str(p).encode() for p in parts)).hexdigest()[:8]


def plan(args, flags, out):
    """The Runs of a grid, interleaved over the arms. A run's name holds a digest of everything that makes its result."""
    arms, runs = parse_arms(args.arms, args.script), []
    flags = [*([f"--config={Path(args.config).resolve()}"] if args.config else []), *flags, *(budget_flags(args.budget, args.script) if args.budget else [])]
    config = Path(args.config).read_bytes() if args.config else b""
    evaluation = f"evaluation-{digest(Path(args.evaluate).read_bytes(), args.task)}.json" if args.evaluate else None
    for seed, arm in itertools.product(range(args.first_seed, args.first_seed + args.seeds), arms):
        replaced = dict(arm.files)
        code = [Path(replaced.get(file, ROOT / file)).read_bytes() for file in CODE[args.script]] + [Path(path).read_bytes() for path in replaced.values()]
        name = f"{args.name}-{arms.index(arm)}-{digest(args.script, config, flags, arm.settings, *code)}-seed{seed}"
        source = source_folder(arm, out)
        own = [f"--{key}={value}" for key, value in arm.settings] + [f"--seed={seed}"]
        folder = ROOT / "logs" / name
        where = f"--run_id={name}" if args.script == "train_gpt.py" else f"--output_dir={folder}"
        check_settings([*flags, *own, where], args.script)
        runs.append(Run(arm, seed, folder, [sys.executable, str(source / args.script), *flags, *own, where], out / f"{name}.log", evaluation and folder / evaluation))
    return arms, runs


def check_settings(flags, script):
    """ValueError where the script would refuse these flags: before the first run, not in each of them."""
    if script == "train_gpt.py":
        import train_gpt
        from config import load_config
        load_config(train_gpt.Config, flags, os.environ)
    else:
        import finetune
        from config import load_sections
        load_sections(finetune.Config, flags, finetune.ALIASES)


def execute(run, args, gpus):
    """Train and evaluate one run, output into its log; whether it succeeded."""
    gpu = gpus.get()
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    steps = [run.command] if not (run.folder / "result.json").is_file() else []
    if steps and run.folder.exists():
        run.folder.rename(run.folder.with_name(f"{run.folder.name}.stopped{time.strftime('%Y%m%d-%H%M%S')}"))
    if args.evaluate:
        of = "--run" if args.script == "train_gpt.py" else "--model"
        steps.append([sys.executable, str(ROOT / "evaluate.py"), of, str(run.folder), "--data", args.evaluate, *(["--task", args.task] if args.task else [])])
    try:
        with open(run.log, "ab") as log:
            for command in steps:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment)
                log.write(done.stdout)
                if done.returncode:
                    return False
                if command[1].endswith("evaluate.py"):
                    run.evaluation.write_bytes(done.stdout.strip().splitlines()[-1])
        return True
    finally:
        gpus.put(gpu)


def value_of(result, metric):
    """A number of a result; ValueError where there is none."""
    value = result.get(metric)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        numbers = sorted(name for name, x in result.items() if isinstance(x, (int, float)) and not isinstance(x, bool))
        raise ValueError(f"--metric {metric}: {'no such number in result.json' if metric not in result else f'is {value}'}; there are {', '.join(numbers)}")
    return float(value)


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


def summarise(arms, runs, script, metric):
    """(rows of the table, one per arm; the first line of the result) of the runs that are finished."""
    results = {(run.arm, run.seed): run.result() for run in runs}
    values = {key: value_of(result, metric) for key, result in results.items() if result}
    seeds = sorted({run.seed for run in runs})
    rows, spreads = [], []
    for arm in arms:
        twin = arm.twin(script)
        own = [values[arm, s] for s in seeds if (arm, s) in values]
        row = {"arm": arm.label, "twin": None if arm == twin else twin.label, "n": len(own), "failed": sum(s not in {k[1] for k in values if k[0] == arm} for s in seeds),
               "mean": statistics.fmean(own) if own else None, "sd": statistics.stdev(own) if len(own) > 1 else None, "values": {s: values[arm, s] for s in seeds if (arm, s) in values}}
        both = [s for s in seeds if (arm, s) in values and (twin, s) in values]
        if arm != twin:
            row |= {"paired": compare([values[twin, s] for s in both], [values[arm, s] for s in both])}
            if len(both) > 1:
                spreads.append(statistics.variance([values[arm, s] - values[twin, s] for s in both]))
            per_step = lambda result: result["train_seconds"] / result["steps"]
            row["time_ratio"] = statistics.median(per_step(results[arm, s]) / per_step(results[twin, s]) for s in both) if both else None
        flops = [results[arm, s].get("train_flops") or results[arm, s].get("total_flops") for s in seeds if (arm, s) in values]
        row["flops"] = statistics.fmean(flops) if flops and all(flops) else None
        rows.append(row)
    compared = [row for row in rows if "paired" in row]
    for row, p in zip(compared, holm([row["paired"]["p"] for row in compared])):
        row["paired"]["holm"] = p
    twins = "; ".join(f"{row['arm']}: mean {row['mean']:.5g}, standard deviation {row['sd']:.2g} over {row['n']} seeds" for row in rows if row["twin"] is None and row["sd"] is not None)
    least = min((row["paired"]["n"] for row in compared), default=0)
    line = f"{metric} of the twin, {twins}" if twins else f"{metric}: too few finished runs for a spread"
    if spreads and least > 1:
        line += f"; the smallest difference that this grid could have found (80% power): {detectable(statistics.fmean(spreads) ** 0.5, least):.2g}"
    if least < 3:
        line += ". Fewer than 3 seeds: no claim is possible"
    return rows, line


def markdown(rows, metric):
    """The rows as a Markdown table."""
    show = lambda x, form="{:.5g}": "" if x is None else form.format(x)
    lines = [f"| arm | n | {metric} | sd | difference to the twin | 95% interval | p (t, Holm) | p (t) | p (Wilcoxon) | step time | FLOPs | failed |", "|---" * 12 + "|"]
    for row in rows:
        paired = row.get("paired", {})
        interval = f"{paired['low']:+.5f} .. {paired['high']:+.5f}" if paired.get("low") is not None else ""
        cells = [row["arm"] + ("" if row["twin"] else " (twin)"), row["n"], show(row["mean"]), show(row["sd"], "{:.2g}"), show(paired.get("difference"), "{:+.5f}"), interval,
                 *(show(paired.get(name), "{:.3g}") for name in ("holm", "p", "wilcoxon")), show(row.get("time_ratio"), "{:.3f}x"), show(row["flops"], "{:.3g}"), row["failed"] or ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
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
    axes.legend(fontsize=7)


def draw(path, rows, runs, metric):
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
    left.set(yticks=range(len(compared)), yticklabels=[row["arm"] for row in compared], xlabel=f"{metric}, arm - twin (95% interval; lines: seeds); "
             f"{'right' if metric in HIGHER_IS_BETTER else 'left'} is better")
    first = [run for run in runs if run.seed == min(r.seed for r in runs) and run.result()]
    curves(right, [run.folder for run in first], [f"{run.arm.label}, seed {run.seed}" for run in first])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run_grid(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--arms", action="append", required=True, metavar="NAME=V,V", help="an axis of the grid: a setting's values, or FILE.py:PATH; several make a grid")
    parser.add_argument("--config", help="the script's YAML file")
    parser.add_argument("--script", choices=sorted(WEIGHT), default="train_gpt.py", help="what is run (default: train_gpt.py)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (default: 3)")
    parser.add_argument("--first_seed", type=int, default=1, help="the first of them (default: 1)")
    parser.add_argument("--budget", metavar="KIND[=VALUE]", help="what is equal in all arms: steps, flops or seconds (default: what the config says)")
    parser.add_argument("--metric", help="a number of result.json, or of the evaluation (default: val_bpb; of finetune.py eval_loss, with --evaluate the accuracy)")
    parser.add_argument("--evaluate", metavar="FILE", help="run evaluate.py on this file after each run")
    parser.add_argument("--task", help="its --task")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1; on one machine more of them disturb each other's times)")
    parser.add_argument("--gpus", help="GPUs to use, one run on each at a time, e.g. 0,1")
    parser.add_argument("--name", default="ablation", help="of the grid: its results go to ablations/NAME (default: ablation)")
    args, flags = parser.parse_known_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise ValueError(f"--seeds {args.seeds} --jobs {args.jobs}: must be at least 1")
    if args.config and not Path(args.config).is_file():
        raise ValueError(f"--config {args.config}: no such file")
    if args.evaluate and not Path(args.evaluate).is_file():
        raise ValueError(f"--evaluate {args.evaluate}: no such file")
    metric = args.metric or (METRIC[args.script] if not args.evaluate else "accuracy" if args.script == "finetune.py" else "startswith")
    out = ROOT / "ablations" / args.name
    arms, runs = plan(args, flags, out)
    out.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if run.result() is None]
    print(f"{len(arms)} arms x {args.seeds} seeds, {len(runs) - len(left)} runs finished, {len(left)} to do; {', '.join(arm.label for arm in arms)}", flush=True)
    gpus = queue.Queue()
    for gpu in (args.gpus.split(",") if args.gpus else [""] * args.jobs):
        gpus.put(gpu)
    from tqdm import tqdm
    with ThreadPoolExecutor(gpus.qsize()) as pool, tqdm(total=len(left), desc="runs") as bar:
        def one(run):
            fine = execute(run, args, gpus)
            shown = f"{metric} {value_of(run.result(), metric):.5g}" if fine else f"FAILED, see {run.log}"
            bar.write(f"{run.arm.label}, seed {run.seed}: {shown}")
            bar.update()
        try:
            list(pool.map(one, left))
        except BaseException:  # a metric that isn't there, or Ctrl-C: what is running ends, nothing new begins
            pool.shutdown(cancel_futures=True)
            raise
    rows, line = summarise(arms, runs, args.script, metric)
    table = markdown(rows, metric)
    (out / "table.md").write_text(f"{line}\n\n{table}\n\nCommand: `python ablate.py {' '.join(argv)}`\n")
    (out / "result.json").write_text(json.dumps({"command": argv, "metric": metric, "summary": line, "arms": rows,
                                                 "runs": [{"arm": r.arm.label, "seed": r.seed, "run": r.folder.name, "finished": r.result() is not None} for r in runs]}, indent=1) + "\n")
    draw(out / "ablation.png", rows, runs, metric)
    print(f"{line}\n\n{table}\n\nresult: {out / 'table.md'}, ablation.png and result.json beside it")
    return rows


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
        else:
            run_grid(argv)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    except ImportError as e:
        raise SystemExit(f'error: needs {e.name}: pip install -e ".[eval]"') from None


if __name__ == "__main__":
    main()
