"""What a grid of runs says: each arm against its twin over the seeds, tested and corrected.

ablate.py makes the grids, nanojepa/studies.py computes them again from stored runs. p-values are
two-sided unless a function says otherwise; intervals hold 95%.
"""

import json
import math
from statistics import fmean, median, stdev, variance
from typing import NamedTuple

from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

LEAST_SEEDS = 3  # with fewer, no claim is made
# Settings of either trainer in which two runs must agree. Otherwise their step times don't compare.
PROGRAM = (
    *("dtype", "attn_implementation", "gradient_checkpointing", "memory_efficient", "fsdp"),
    *("train_batch_tokens", "train_seq_len", "grad_accum_steps", "batch_size", "grad_accum"),
)
HIGHER_IS_BETTER = {*("exact", "startswith", "exact_clean", "startswith_clean", "accuracy")}


class Paired(NamedTuple):
    """The differences arm - twin of n seeds. What so few seeds can't give is None."""

    n: int
    difference: float | None = None  # their mean
    low: float | None = None  # its 95% interval, of the t-test
    high: float | None = None
    p: float | None = None  # of the paired t-test
    holm: float | None = None  # p of the t-test, corrected for the number of arms


class Arm(NamedTuple):
    """One of the things that a grid compares: settings, and files that replace the project's own.

    settings: pairs (name, value as text). files: pairs (file of the project, path).
    twin: the label of the arm that it is compared with; None for one that others are compared with.
    """

    settings: tuple
    files: tuple = ()
    twin: str | None = None

    @property
    def label(self):
        settings = [f"{name}={value}" for name, value in self.settings]
        return " ".join(settings + [f"{name}:{path}" for name, path in self.files])


class Trial(NamedTuple):
    """One run of a grid: an arm's label, a seed, and the result.json; None before it is there."""

    arm: str
    seed: int
    result: dict | None


class Summary(NamedTuple):
    """One metric of a grid, as result.json has it."""

    metric: str
    summary: str  # a line: the spread of what arms are compared with, and what is to be seen
    smallest: float | None  # the difference that the grid finds with 80% power; None: no spread
    arms: list  # one dict an arm


# ---- tests


def compare(twin, arm):
    """The Paired comparison of two lists with a value a seed."""
    gains = [b - a for a, b in zip(twin, arm, strict=True)]
    if len(gains) < 2:
        return Paired(len(gains), gains[0] if gains else None)
    mean = fmean(gains)
    if len(set(gains)) == 1:  # no spread, so no test; equal results are no evidence
        return Paired(len(gains), mean, gains[0], gains[0], 1.0 if mean == 0 else None)
    test = stats.ttest_rel(arm, twin)
    low, high = test.confidence_interval(0.95)
    return Paired(len(gains), mean, float(low), float(high), float(test.pvalue))


def holm(p_values):
    """The p-values after Holm's correction; None stays None and isn't counted. Holm 1979."""
    known = [p for p in p_values if p is not None]
    corrected = iter(multipletests(known, method="holm")[1] if known else [])
    return [None if p is None else float(next(corrected)) for p in p_values]


def smallest_visible(spread, n, power=0.8, level=0.05):
    """The difference that a paired t-test of n seeds finds with this power.

    spread: the standard deviation of the differences between two arms of one seed.
    """
    return spread * TTestPower().solve_power(nobs=n, alpha=level, power=power)


def smallest_in_grid(groups):
    """The difference that a grid finds with 80% power, or None.

    groups: for each arm the list of its differences to the twin. An arm with the median spread and
    as few seeds as the least stands for all.
    """
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    spread = median(variance(group) for group in groups) ** 0.5
    return smallest_visible(spread, min(map(len, groups)))


def wilson(hits, n):
    """Wilson's 95% interval (low, high) of a share: hits of n, which is at least 1."""
    return stats.binomtest(hits, n).proportion_ci(method="wilson")


def p_better(new, old, higher):
    """One-sided p of Welch's t-test: the mean of `new` is better than that of `old`.

    higher: whether higher is better. None if neither has a spread.
    """
    if len(set(new)) == len(set(old)) == 1:
        return None
    direction = "greater" if higher else "less"
    return float(stats.ttest_ind(new, old, equal_var=False, alternative=direction).pvalue)


def prediction_interval(values):
    """The 95% interval (low, high) of one more value from where these came from."""
    center, spread, n = fmean(values), stdev(values), len(values)
    half = stats.t.ppf(0.975, n - 1) * spread * (1 + 1 / n) ** 0.5
    return float(center - half), float(center + half)


# ---- a grid


def number(result, metric):
    """The finite number that a result has under this name, or None."""
    value = (result or {}).get(metric)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def lacking(result, metric):
    """Why a result has no such number."""
    if result is None:
        return "no result"
    if metric in result:
        return f"{metric} is {json.dumps(result[metric])}"
    return f"no {metric} in its result"


def unlike(one, other):
    """How two results were made differently, so that they can't be compared, or None."""
    there, here = ({**result.get("config", {}), **result} for result in (one, other))
    for name in ("compiled", "data_sha256", *PROGRAM):
        if there.get(name) != here.get(name):
            return f"{name} is {there.get(name)} there, {here.get(name)} here"
    return None


def differences(row, twin):
    """{seed: arm - twin} of the rows of an arm and its twin."""
    shared = [seed for seed in row["values"] if seed in twin["values"]]
    return {seed: row["values"][seed] - twin["values"][seed] for seed in shared}


def summarise(arms, trials, metric, word="twin"):
    """The Summary of a grid's Trials in one metric; word: what arms are compared with.

    ValueError if trials have finished and none of them has such a number.
    """
    finished = {(t.arm, t.seed): t.result for t in trials if t.result is not None}
    _check_metric(finished.values(), metric)
    rows = {arm.label: _arm_row(arm, trials, metric) for arm in arms}
    compared = [row for row in rows.values() if row["twin"] is not None]
    for row in compared:
        row.update(_comparison(row, rows[row["twin"]], finished))
    claims = [row["paired"] for row in compared if row["paired"]["n"] >= LEAST_SEEDS]
    for paired, p in zip(claims, holm([paired["p"] for paired in claims]), strict=True):
        paired["holm"] = p
    smallest = smallest_in_grid(
        list(differences(row, rows[row["twin"]]).values()) for row in compared if not row["refused"]
    )
    line = f"{metric}{_spread_words(rows.values(), word, smallest)}{_few_words(compared)}"
    return Summary(metric, line, smallest, list(rows.values()))


def _check_metric(results, metric):
    """ValueError if there are results and none has a number of this name."""
    if not results or any(number(result, metric) is not None for result in results):
        return
    there = {name for result in results for name in result if number(result, name) is not None}
    said = [json.dumps(result[metric]) for result in results if metric in result]
    why = f"is {said[0]}" if said else "no such number"
    raise ValueError(
        f"--metric {metric}: {why} in result.json; there are {', '.join(sorted(there))}; "
        f"the {len(results)} finished runs are kept"
    )


def _arm_row(arm, trials, metric):
    """An arm's own part of its row: values, mean, spread, and why values are missing."""
    own = {trial.seed: trial.result for trial in trials if trial.arm == arm.label}
    values = {seed: number(result, metric) for seed, result in own.items()}
    missing = {seed: lacking(own[seed], metric) for seed in own if values[seed] is None}
    values = {seed: value for seed, value in values.items() if value is not None}
    flops = [own[seed].get("train_flops") or own[seed].get("total_flops") for seed in values]
    return {
        "arm": arm.label,
        "settings": [list(pair) for pair in arm.settings],
        "files": [list(pair) for pair in arm.files],
        "twin": arm.twin,
        "n": len(values),
        "failed": len(missing),
        "missing": missing,
        "mean": fmean(values.values()) if values else None,
        "sd": stdev(values.values()) if len(values) > 1 else None,
        "values": values,
        "flops": fmean(flops) if flops and all(flops) else None,
    }


def _comparison(row, twin, finished):
    """The part of a row about its twin: "refused" (why they aren't compared), or the numbers."""
    seeds = list(differences(row, twin))
    refused, ratios = None, []
    for seed in seeds:
        other, arm = finished[twin["arm"], seed], finished[row["arm"], seed]
        if refused is None and (how := unlike(other, arm)):
            refused = f"{how} (seed {seed})"
        seconds = [result["train_seconds"] / result["steps"] for result in (other, arm)]
        ratios.append(seconds[1] / seconds[0])
    if refused:
        seeds, ratios = [], []
    paired = compare([twin["values"][s] for s in seeds], [row["values"][s] for s in seeds])
    return {
        "refused": refused,
        "paired": paired._asdict(),
        "time_ratio": median(ratios) if ratios else None,
    }


def _spread_words(rows, word, smallest):
    """The part of a summary's line about those that others are compared with."""
    known = [
        f"{row['arm']}: mean {row['mean']:.5g}, standard deviation {row['sd']:.2g} "
        f"over {row['n']} seeds"
        for row in rows
        if row["twin"] is None and row["sd"] is not None
    ]
    text = f" of the {word}, {'; '.join(known)}" if known else ": too few finished runs"
    if smallest is not None:
        text += "; the smallest difference that this grid could have found (80% power): "
        text += f"{smallest:.2g}"
    return text


def _few_words(compared):
    """The part of a summary's line about arms with too few seeds."""
    few = [r["arm"] for r in compared if r["paired"]["n"] < LEAST_SEEDS and not r["refused"]]
    if not few:
        return ""
    of = "" if len(few) == len(compared) else f" on {', '.join(few)}"
    return f". Fewer than {LEAST_SEEDS} seeds: no claim is possible{of}"


# ---- tables


def show(value, form=".5g"):
    """A number as text; "" for None."""
    return "" if value is None else format(value, form)


def markdown_table(names, rows):
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (names, *rows)]
    return [lines[0], "|---" * len(names) + "|", *lines[1:]]


def markdown(found, word="twin"):
    """A Summary as text: its line, a Markdown table, and a line for each value that isn't there."""
    names = ["arm", "n", found.metric, "sd", f"difference to the {word}", "95% interval"]
    names += ["p (t, Holm)", "p (t)", "step time", "FLOPs", "failed"]
    parts = [f"{found.summary}."]
    parts.append("\n".join(markdown_table(names, [_cells(row, word) for row in found.arms])))
    for row in found.arms:
        if row.get("refused"):
            parts.append(
                f"{row['arm']}: refused, not compared with {row['twin']}: {row['refused']}; "
                "run both in the same way"
            )
        parts += [f"{row['arm']}, seed {seed}: {why}" for seed, why in row["missing"].items()]
    return "\n\n".join(parts)


def _cells(row, word):
    """The cells of a row's line."""
    paired = row.get("paired") or {}
    interval = ""
    if paired.get("low") is not None:
        interval = f"{paired['low']:+.5f} .. {paired['high']:+.5f}"
    p_values = [show(paired.get(name), ".3g") for name in ("holm", "p")]
    if row.get("refused"):
        p_values = ["refused", ""]
    elif paired and paired["n"] < LEAST_SEEDS:
        p_values = [f"no claim: fewer than {LEAST_SEEDS} seeds", ""]
    ratio = row.get("time_ratio")
    return [
        row["arm"] if row["twin"] else f"{row['arm']} ({word})",
        row["n"],
        show(row["mean"]),
        show(row["sd"], ".2g"),
        show(paired.get("difference"), "+.5f"),
        interval,
        *p_values,
        "" if ratio is None else f"{ratio:.3f}x",
        show(row["flops"], ".3g"),
        row["failed"] or "",
    ]
