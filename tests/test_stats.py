"""The statistics of a grid against slow references and simulated grids, and its pictures."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from nanojepa import plots
from nanojepa.stats import (
    Arm,
    Paired,
    Trial,
    compare,
    holm,
    markdown,
    p_better,
    prediction_interval,
    smallest_in_grid,
    smallest_visible,
    summarise,
    wilson,
)


def make_arms(*weights):
    """A twin and its arms."""
    twin = Arm((("jepa_lambda", "0"),))
    return [twin, *(Arm((("jepa_lambda", weight),), (), twin.label) for weight in weights)]


def make_trials(values):
    """Trials with these results: {arm: [a value, a whole result or None for each seed]}."""
    trials = []
    for arm, of_seeds in values.items():
        for seed, result in enumerate(of_seeds):
            if isinstance(result, float):
                result = dict(val_bpb=result, train_seconds=2.0, steps=10, train_flops=1e9)
            trials.append(Trial(arm.label, seed, result))
    return trials


def summarise_values(values, metric="val_bpb", word="twin"):
    return summarise(list(values), make_trials(values), metric, word)


# ---- tests


PAIRS = st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=12)


@given(PAIRS.filter(lambda pairs: len({round(b - a, 6) for a, b in pairs}) > 2))
@settings(deadline=None, max_examples=40)
def test_paired_comparison_is_the_textbook_s(pairs):
    twin, arm = zip(*pairs, strict=True)
    found, d, n = compare(twin, arm), np.subtract(arm, twin), len(pairs)
    error = d.std(ddof=1) / n**0.5
    half = scipy_stats.t.ppf(0.975, n - 1) * error
    p = 2 * scipy_stats.t.sf(abs(d.mean() / error), n - 1)
    assert found.difference == pytest.approx(d.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (d.mean() - half, d.mean() + half), rel=1e-6, abs=1e-9
    )
    assert found.p == pytest.approx(p, rel=1e-6, abs=1e-12)


def test_comparison_of_few_or_equal_seeds():
    assert compare([], []) == Paired(0)
    assert compare([1.0], [2.0]) == Paired(1, 1.0)
    assert compare([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert compare([1.0, 2.0], [2.0, 3.0]).p is None


@pytest.fixture(scope="module", autouse=True)
def no_collection():
    """statsmodels collects garbage at each correction, which takes long after importing torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)
        yield


@given(st.lists(st.none() | st.floats(0, 1), max_size=7))
@settings(deadline=None, max_examples=40)
def test_holm_against_its_definition(p_values):
    """Corrected p = the smallest level at which the step-down procedure rejects, by trying."""
    known = sorted(p for p in p_values if p is not None)
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        if p is None:
            assert corrected is None
        else:
            steps = [(len(known) - i) * q for i, q in enumerate(known) if q <= p]
            assert corrected == pytest.approx(min(1.0, max(steps)))


def test_the_smallest_visible_difference_is_found_that_often():
    rng, n, spread = np.random.default_rng(0), 6, 0.3
    smallest = smallest_visible(spread, n)
    p = scipy_stats.ttest_1samp(rng.normal(smallest, spread, (20000, n)), 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.01)  # four standard errors of the share
    assert smallest_visible(2 * spread, n) == pytest.approx(2 * smallest)
    assert smallest_visible(spread, 3) > smallest
    groups = [[1.0, 1.1, 1.3], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 9.0], [5.0]]
    assert smallest_in_grid(groups) == smallest_visible(statistics.stdev(groups[1]), 3)
    assert smallest_in_grid([[1.0], []]) is None


def test_wilson_s_interval_holds_its_share():
    for hits, n in ((0, 10), (3, 10), (10, 10), (517, 1000)):
        low, high = wilson(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        for bound in (low, high):  # its definition: a share whose test statistic is 1.96, or 0 or 1
            z = abs(hits / n - bound) / max(1e-12, bound * (1 - bound) / n) ** 0.5
            assert bound in (0, 1) or z == pytest.approx(scipy_stats.norm.ppf(0.975))


def test_a_one_sided_test_asks_for_the_better_direction():
    low, high = [1.0, 1.1, 1.2], [2.0, 2.1, 2.3]
    assert p_better(low, high, higher=False) < 0.01 < 0.99 < p_better(low, high, higher=True)
    assert p_better([1.0, 1.0], [2.0, 2.0], higher=False) is None


def test_one_more_value_lies_in_the_interval_19_times_in_20():
    draws = np.random.default_rng(0).normal(3, 0.5, (4000, 6))
    inside = 0
    for *values, one_more in draws.tolist():
        low, high = prediction_interval(values)
        inside += low <= one_more <= high
    assert inside / len(draws) == pytest.approx(0.95, abs=0.014)  # four standard errors


def test_a_planted_gain_is_found_and_a_planted_null_is_not():
    """Simulated grids of a twin and four arms, six seeds; a grid errs if any arm claims a gain.

    Three standard errors of a share of 200 are 0.046 at 5%.
    """
    rng, n, arms = np.random.default_rng(0), 6, make_arms(*"1234")

    def simulate(gain):
        values = rng.normal(2, 0.1, n) + rng.normal(0, 0.01, (5, n))  # every seed has its level
        values[1] -= gain
        return values

    nulls = np.stack([simulate(0) for _ in range(200)])
    p = scipy_stats.ttest_rel(nulls[:, 1:], nulls[:, :1], axis=-1).pvalue
    corrected = np.array([holm(of_grid) for of_grid in p])
    assert np.mean(corrected.min(1) < 0.05) < 0.096 < np.mean(p.min(1) < 0.05)
    gain = 5 * smallest_visible(0.01 * 2**0.5, n)  # of differences of two noisy values
    rows = summarise_values(dict(zip(arms, simulate(gain).tolist(), strict=True))).arms
    assert [row["paired"]["holm"] < 0.05 for row in rows[1:]] == [True, False, False, False]


# ---- a grid's table


def test_table_and_summary_of_known_values():
    """What the table says of twelve made-up runs is what a calculation by hand gives."""
    arms = make_arms("0.1", "0.2")
    values = dict(
        zip(
            arms,
            ([1.0, 1.2, 1.1, 0.9], [1.1, 1.25, 1.22, 0.98], [0.5, 0.7, 0.62, 0.41]),
            strict=True,
        )
    )
    trials = make_trials(values)
    for trial in trials:
        trial.result["train_seconds"] += [arm.label for arm in arms].index(trial.arm)
    found = summarise(arms, trials, "val_bpb")
    line, rows = found.summary, found.arms
    start = "val_bpb of the twin, jepa_lambda=0: mean 1.05, standard deviation 0.13 over 4 seeds"
    assert line.startswith(f"{start}; the smallest difference") and "no claim" not in line
    assert line.endswith(f": {found.smallest:.2g}")
    difference = statistics.fmean(values[arms[2]]) - 1.05
    assert rows[2]["paired"]["difference"] == pytest.approx(difference)
    assert rows[1]["time_ratio"] == pytest.approx(1.5)
    p = [row["paired"]["p"] for row in rows[1:]]
    assert p[0] > p[1]
    assert [row["paired"]["holm"] for row in rows[1:]] == [max(p[0], 2 * p[1]), 2 * p[1]]
    table = markdown(found).splitlines()[2:]
    assert len(table) == 5 and "-0.49250" in table[4]
    assert table[2].startswith("| jepa_lambda=0 (twin) | 4 | 1.05 | 0.13 |  |")
    with pytest.raises(ValueError, match="--metric x: no such number in .*; there are .*val_bpb"):
        summarise(arms, trials, "x")


def test_a_baseline_takes_the_place_of_the_twins():
    arms = make_arms("0.1")
    arms = [arms[0]._replace(twin=arms[1].label), arms[1]._replace(twin=None)]
    values = dict(zip(arms, ([1.0, 1.2, 1.1], [1.1, 1.25, 1.22]), strict=True))
    found = summarise_values(values, word="baseline")
    line, rows = found.summary, found.arms
    assert line.startswith("val_bpb of the baseline, jepa_lambda=0.1: mean 1.19,")
    assert [row["twin"] for row in rows] == ["jepa_lambda=0.1", None]
    assert rows[0]["paired"]["difference"] == pytest.approx(1.1 - 1.19)
    table = markdown(found, "baseline")
    assert "| difference to the baseline |" in table and "twin" not in table
    assert "| jepa_lambda=0.1 (baseline) | 3 |" in table


def test_runs_made_differently_are_not_compared():
    """A machine without a compiler falls back to eager, an edited file may change the batch."""

    def result(value, compiled=True, batch=4096, compile=True):
        config = {"train_batch_tokens": batch, "compile": compile}
        return dict(val_bpb=value, train_seconds=2.0, steps=10, compiled=compiled, config=config)

    arms = make_arms("0.1", "0.2", "0.3")
    values = {
        arms[0]: [result(x) for x in (1.0, 1.1, 1.3)],
        arms[1]: [result(0.9), result(0.9), result(0.9, compiled=False)],
        arms[2]: [result(0.8, batch=8192)] * 3,
        arms[3]: [result(x, compile=False) for x in (0.7, 0.9, 0.8)],  # that it worked counts
    }
    found = summarise_values(values)
    line, rows = found.summary, found.arms
    why = [
        "compiled is True there, False here (seed 2)",
        "train_batch_tokens is 4096 there, 8192 here (seed 0)",
    ]
    assert [row.get("refused") for row in rows] == [None, *why, None]
    for row in rows[1:3]:
        assert row["paired"]["difference"] is row["time_ratio"] is row["paired"]["holm"] is None
    assert rows[1]["mean"] == pytest.approx(0.9) and "no claim" not in line
    assert rows[3]["paired"]["holm"] == rows[3]["paired"]["p"]  # corrected for one comparison
    table = markdown(found)
    assert "| jepa_lambda=0.1 | 3 | 0.9 | 0 |  |  | refused |  |  |" in table
    for weight, reason in zip(("0.1", "0.2"), why, strict=True):
        note = f"jepa_lambda={weight}: refused, not compared with jepa_lambda=0: {reason};"
        assert note in table


def test_a_run_without_the_number_is_shown_and_the_others_count():
    """A target that some runs don't reach, a loss that isn't finite, a run that failed."""
    arms = make_arms("0.1", "0.2")

    def result(value):
        return {"time_to_target": value, "train_seconds": 2.0, "steps": 10}

    values = {
        arms[0]: [result(x) for x in (5.0, 6.0, 7.0, 8.0)],
        arms[1]: [result(4.0), result(None), result(5.5), result(6.0)],
        arms[2]: [None, result(float("nan")), {"steps": 1}, result(3.0)],
    }
    found = summarise_values(values, "time_to_target")
    line, rows = found.summary, found.arms
    assert [(row["n"], row["failed"]) for row in rows] == [(4, 0), (3, 1), (1, 3)]
    assert rows[1]["paired"]["n"] == 3 and rows[1]["paired"]["p"] is not None
    assert rows[2]["paired"]["holm"] is None and rows[2]["missing"] == {
        0: "no result",
        1: "time_to_target is NaN",
        2: "no time_to_target in its result",
    }
    assert line.endswith("Fewer than 3 seeds: no claim is possible on jepa_lambda=0.2")
    table = markdown(found)
    assert "\n\njepa_lambda=0.1, seed 1: time_to_target is null\n\n" in table
    assert "no claim: fewer than 3 seeds" in table.splitlines()[6]
    with pytest.raises(ValueError, match="is null in result.json; .* the 3 finished runs are kept"):
        summarise_values({arm: [result(None)] for arm in arms}, "time_to_target")


def test_two_seeds_are_no_claim_and_none_is_a_result_too():
    arms = make_arms("0.1")
    _, line, _, rows = summarise_values({arms[0]: [1.0, 1.1], arms[1]: [0.5, 0.61]})
    assert rows[1]["paired"]["p"] < 0.01 and rows[1]["paired"]["holm"] is None
    assert line.endswith("Fewer than 3 seeds: no claim is possible")
    line = summarise_values({arm: [None] for arm in arms}).summary
    assert line.startswith("val_bpb: too few finished runs")


# ---- pictures


@pytest.mark.parametrize(
    "settings, files, name",
    [
        ("jepa_lambda=0", [], "without the term"),
        ("jepa_lambda=0.0 optimizer=adamw", [], "without the term, adamw"),
        ("jepa_lambda=0.02 jepa_layer=3", [], "toy, 0.02, layer 3"),
        ("jepa_objective=other jepa_lambda=0.1", [], "other, 0.1"),
        ("iterations=150", [["a.py", "x/mine.py"]], "iterations 150, mine"),
        ("lbd=1 step_jepa=true init_from=logs/big", [], "toy, 1, step jepa, big"),
    ],
)
def test_a_picture_names_arms_as_a_reader_would(settings, files, name):
    pairs = [setting.split("=") for setting in settings.split()]
    assert plots.readable(pairs, files, "toy") == name
    assert plots.readable([["lbd", "0.1"]]) == "weight 0.1"


def draw(tmp_path, values, metric="val_bpb"):
    """The title of a grid's picture, whose runs have logs."""
    summary = summarise_values(values, metric)
    logs = {
        (arm.label, seed): [{"step": s, "train_loss": 9 / s + value / s} for s in range(1, 6)]
        for arm, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    }
    path = tmp_path / "grid.png"
    title = plots.draw_grid(path, summary, logs)
    assert path.stat().st_size > 10_000
    return title


def test_a_picture_s_title_is_the_answer(tmp_path):
    noise, arms = [0.0, 0.011, -0.012, 0.003], make_arms("0.1", "0.2")

    def title(*differences):
        values = {arm: [1.0, 1.2, 1.1, 0.9] for arm in arms}
        for arm, difference in zip(arms[1:], differences, strict=True):
            values[arm] = [x + difference + e for x, e in zip(values[arm], noise, strict=True)]
        return draw(tmp_path, values)

    assert title(0.0, 0.001) == "val_bpb: no arm differs from its twin by more than chance"
    assert title(-0.5, 0.0) == 'val_bpb: "weight 0.1" is better than its twin'
    worse = title(0.5, 0.6)
    assert worse == (
        'val_bpb: no arm is better than its twin; "weight 0.1" and "weight 0.2" are worse'
    )
    values = {arm: [1.0 + n] for n, arm in enumerate(arms)}
    assert draw(tmp_path, values) == "val_bpb: too few seeds for a claim"


def test_an_arm_that_is_far_off_doesn_t_squash_the_others():
    arms, noise = make_arms("1", "2", "3"), [0.0, 0.01, -0.01]
    values = {arm: [1 + e * n for e in noise] for n, arm in enumerate(arms)}
    values[arms[3]] = [9.0, 9.1, 9.2]
    found = summarise_values(values)
    smallest, drawn = found.smallest, plots._drawn(found, "toy")
    axes = Figure().subplots()
    plots._draw_ends(axes, drawn, smallest)
    low, high = axes.get_xlim()
    assert [arm.far for arm in drawn] == [False, False, True]
    assert low < -smallest < smallest < high < 1
    assert [text.get_text() for text in axes.texts] == ["+8.1"]
