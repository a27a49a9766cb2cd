"""Pictures of runs: what arms change against their twin, and loss curves.

A picture's title says the answer. A log is the list of a run's rows in metrics.jsonl.
"""

import textwrap
from pathlib import Path
from statistics import fmean, median_low
from typing import NamedTuple

import pandas
from matplotlib.figure import Figure
from scipy.stats import t as student

from nanojepa.stats import HIGHER_IS_BETTER, differences, smallest_in_grid

WEIGHTS = ("jepa_lambda", "lbd")  # settings that hold the weight of a term
OBJECTIVE = ("jepa_objective", "objective")  # settings that hold its name
VALIDATION, TRAINING = ("val_loss", "eval_loss"), ("train_loss", "ce_loss")
LEAST_POINTS = 3  # of a curve
LEVEL = 0.05  # a corrected p below it counts as a difference
DPI = 130


class Drawn(NamedTuple):
    """An arm in a picture."""

    name: str
    row: dict  # of the stats.Summary
    seeds: list  # its differences to the twin
    color: str
    far: bool  # it would squash the others, so it is marked at the edge

    @property
    def difference(self):
        return self.row["paired"]["difference"]


def draw_grid(path, found, logs, word="twin", objective=""):
    """Draw what a grid found in one metric; returns the picture's title.

    The left panel shows the differences in the end, the right one those over the run.

    found: the stats.Summary. logs: {(arm's label, seed): log}. word: what arms are compared with.
    objective: its name, if the arms don't set it.
    """
    arms = _drawn(found, objective)
    quantity = _quantity(logs, found.metric)
    size = (9 if quantity else 5.5, 3.6 + 0.3 * max(0, len(arms) - 5))
    figure = Figure(figsize=size, layout="constrained")
    title = answer(arms, found.metric, word)
    figure.suptitle(textwrap.fill(title, 75), fontsize=12)
    left, *right = figure.subplots(1, 2 if quantity else 1, squeeze=False)[0]
    _draw_ends(left, arms, found.smallest)
    side = "right" if found.metric in HIGHER_IS_BETTER else "left"
    left.set_xlabel(f"{found.metric}, arm - {word}; {side} is better")
    for axes in right:
        _draw_runs(axes, arms, logs, quantity)
        axes.set(xlabel="step", ylabel=f"{quantity}, arm - {word}")
    figure.savefig(path, dpi=DPI)
    return title


def draw_scores(path, rows, metric, title):
    """Draw the score of every seed of records, in the order of their dates, and their mean.

    rows: (name, date, scores, whether it is a record, which is filled, or a tie).
    """
    figure = Figure(figsize=(max(5.5, 1.2 * len(rows)), 3.6), layout="constrained")
    axes = figure.subplots()
    for x, (_, _, scores, is_record) in enumerate(rows):
        color = "C0" if is_record else "0.6"
        axes.plot([x] * len(scores), scores, "o", color=color, fillstyle="none", alpha=0.7)
        axes.plot([x - 0.25, x + 0.25], [fmean(scores)] * 2, color=color, linewidth=2)
    best = [(x, fmean(scores)) for x, (_, _, scores, is_record) in enumerate(rows) if is_record]
    axes.step(*zip(*best, strict=True), where="post", color="C0", linewidth=0.8)
    names = [f"{textwrap.fill(name, 14)}\n{date}" for name, date, _, _ in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set(ylabel=metric, xlim=(-0.5, len(rows) - 0.5))
    figure.suptitle(textwrap.fill(title, 75), fontsize=10)
    figure.savefig(path, dpi=DPI)


def draw_twin(path, row, logs, metric, objective=""):
    """Draw the training loss of an arm and of its twin, and below it their difference.

    row: of the arm, as in draw_grid.
    """
    arm, twin = (_table(logs, name, "train_loss") for name in (row["arm"], row["twin"]))
    name = readable(row["settings"], row["files"], objective)
    figure = Figure(figsize=(5.5, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.plot(twin.mean(axis=1), color="0.6", linewidth=4, label="without the term")
    above.plot(arm.mean(axis=1), label=name)
    above.set(ylabel="training loss,\nnats per token")
    above.legend()
    gap = arm - twin
    mean, half = gap.mean(axis=1), gap.sem(axis=1) * student.ppf(0.975, gap.shape[1] - 1)
    below.plot(mean)
    below.fill_between(mean.index, mean - half, mean + half, alpha=0.2)
    below.axhline(0, color="0.4", linewidth=1)
    below.set(xlabel="step", ylabel="difference\n(95% band)")
    difference, low, high = (row["paired"][key] for key in ("difference", "low", "high"))
    beyond = "no more" if low < 0 < high else "more"
    title = f"{name}: differs from its twin by {beyond} than chance\n{metric} in the end "
    title += f"{difference:+.4f} (95%: {low:+.4f} to {high:+.4f}), {row['n']} seeds"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)


def curve(log, name):
    """{step: value} of one number in a log."""
    return {row["step"]: row[name] for row in log if row.get(name) is not None}


# ---- words


def readable(settings, files=(), objective=""):
    """An arm's name for a picture, such as "span, 0.02, layer 3", of its settings and files."""
    others = dict(settings)
    own = [others.pop(name) for name in OBJECTIVE if name in others]
    objective = own[0] if own else objective
    weight = next((others.pop(name) for name in WEIGHTS if name in others), None)
    if weight is not None and float(weight) == 0:
        parts = ["without the term"]
    elif weight is not None:
        parts = [objective, weight] if objective else [f"weight {weight}"]
    else:
        parts = own
    for name, value in others.items():
        short, last = name.removeprefix("jepa_").replace("_", " "), Path(value).name
        if value == "true":
            parts.append(short)
        else:
            parts.append(last if last.isalpha() else f"{short} {last}")
    parts += [Path(path).stem for _, path in files]
    return ", ".join(parts)


def answer(arms, metric, word):
    """The picture's title: which arms are better and which are worse than their twin."""
    tested = [arm for arm in arms if arm.row["paired"]["holm"] is not None]
    if not tested:
        return f"{metric}: too few seeds for a claim"
    better, worse = [], []
    for arm in tested:
        if arm.row["paired"]["holm"] < LEVEL:
            higher = arm.difference > 0
            found = better if higher == (metric in HIGHER_IS_BETTER) else worse
            found.append(arm.name)
    other = "the baseline" if word == "baseline" else "its twin"
    if not better and not worse:
        return f"{metric}: no arm differs from {other} by more than chance"
    end = f"; {_who(worse)} worse" if worse else ""
    return f"{metric}: {_who(better)} better than {other}{end}"


def _who(names):
    if len(names) > 2:
        return f"{len(names)} arms are"
    if not names:
        return "no arm is"
    return " and ".join(f'"{name}"' for name in names) + (" is" if len(names) == 1 else " are")


# ---- panels


def _drawn(found, objective):
    """The arms of a Summary that are compared with a twin."""
    twins = {row["arm"]: row for row in found.arms}
    compared = [r for r in found.arms if (r.get("paired") or {}).get("difference") is not None]
    sizes = [abs(row["paired"]["difference"]) for row in compared]
    near = 4 * max(median_low(sizes), found.smallest or 0) if sizes else 0
    drawn = []
    for n, (row, size) in enumerate(zip(compared, sizes, strict=True)):
        name = readable(row["settings"], row["files"], objective)
        seeds = list(differences(row, twins[row["twin"]]).values())
        drawn.append(Drawn(name, row, seeds, f"C{n}", size > near))
    return drawn


def _quantity(logs, metric):
    """What is drawn over the run: the first number that all logs have often enough, or None."""
    for name in (metric, *VALIDATION, *TRAINING):
        if logs and all(len(curve(log, name)) >= LEAST_POINTS for log in logs.values()):
            return name
    return None


def _draw_ends(axes, arms, smallest):
    """The difference in the end: a dot an arm, its interval, and a tick for each seed."""
    near = [0.0]
    for y, arm in enumerate(arms):
        low, high = arm.row["paired"]["low"], arm.row["paired"]["high"]
        if not arm.far:
            interval = [] if low is None else [low, high]
            axes.plot(arm.seeds, [y] * len(arm.seeds), "|", color="grey")
            axes.plot(interval, [y] * len(interval), color=arm.color)
            axes.plot(arm.difference, y, "o", color=arm.color)
            near += arm.seeds + interval
    edges = _edges(near, smallest)
    for y, arm in enumerate(arms):
        if arm.far:
            _mark(axes, arm, arm.difference, (edges[arm.difference > 0], y), sideways=True)
    axes.axvline(0, color="black", linewidth=0.8)
    if smallest:
        axes.axvspan(-smallest, smallest, color="0.92", zorder=0)
    axes.set(xlim=edges, ylim=(max(1, len(arms)) - 0.5, -0.5))
    names = [textwrap.fill(arm.name, 26) for arm in arms]
    axes.set_yticks(range(len(arms)), names)
    for label, arm in zip(axes.get_yticklabels(), arms, strict=True):
        label.set_color(arm.color)
    axes.set_title("line: 95% interval; grey: too small to find", fontsize=9, color="0.4")


def _draw_runs(axes, arms, logs, quantity):
    """The mean difference over the run, in a band of its standard error over the seeds."""
    near, ends, marks = [0.0], [], []
    for arm in arms:
        table = _table(logs, arm.row["arm"], quantity) - _table(logs, arm.row["twin"], quantity)
        table = table.dropna(axis=1, how="all").dropna()  # seeds, then steps, that both have
        if table.empty:
            continue
        mean, error = table.mean(axis=1), table.sem(axis=1)
        axes.plot(mean, color=arm.color)
        axes.fill_between(mean.index, mean - error, mean + error, color=arm.color, alpha=0.15)
        ends.append(list(table.iloc[-1]))
        if arm.far:
            marks.append((arm, float(mean.iloc[-1]), mean.index[-1]))
        else:  # without the first steps, which would squash the others
            near += [*mean[len(mean) // 4 :], *(mean + error).dropna()[len(mean) // 4 :]]
    smallest = smallest_in_grid(ends)
    edges = _edges(near, smallest)
    for n, (arm, difference, step) in enumerate(marks):
        place = (step * (0.95 - 0.2 * n), edges[difference > 0])
        _mark(axes, arm, difference, place, sideways=False)
    axes.axhline(0, color="black", linewidth=0.8)
    if smallest:
        axes.axhspan(-smallest, smallest, color="0.92", zorder=0)
    axes.set_ylim(edges)
    axes.set_title("band: standard error; grey: too small to find", fontsize=9, color="0.4")


def _table(logs, arm, quantity):
    """A table with a row a step and a column a seed."""
    return pandas.DataFrame(
        {seed: curve(log, quantity) for (label, seed), log in logs.items() if label == arm}
    )


def _edges(near, smallest):
    """The limits (low, high) of an axis of differences: what is near, the grey band, a margin."""
    low, high = min(*near, -(smallest or 0)), max(*near, smallest or 0)
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def _mark(axes, arm, difference, place, sideways):
    """An arrow to the edge, with the difference that lies beyond it; place: of its tip."""
    inwards = -40 if difference > 0 else 40  # points
    axes.annotate(
        f"{difference:+.2g}",
        place,
        (inwards, 0) if sideways else (0, inwards),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->", "color": arm.color},
        color=arm.color,
        ha="center",
        va="center",
    )
