"""ablate.py: its statistics against slow references, its grids on real runs of a tiny GPT."""
import json
import shutil
import statistics
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ablate
import train_gpt
import hf
from ablate import Arm
from conftest import ROOT, TINY
from data.pairs import prepare_pairs

GPT, HF = "train_gpt.py", "finetune.py"


def test_arms_are_a_grid_with_its_twins_first(tmp_path):
    edited = tmp_path / "mine.py"
    edited.write_text("")
    arms = ablate.parse_arms(["JEPA_LAMBDA=0.005,0.1"], GPT)
    assert [a.label for a in arms] == ["jepa_lambda=0", "jepa_lambda=0.005", "jepa_lambda=0.1"]
    assert ablate.parse_arms(["JEPA_LAMBDA=0.0,0.1"], GPT) == ablate.parse_arms(["JEPA_LAMBDA=0.1"], GPT)  # the twin once, however it is written
    grid = ablate.parse_arms(["jepa_lambda=0,0.1", "JEPA_LAYER=-1,2", "num_layers=3,4"], GPT)
    assert [a.label for a in grid if a == a.twin(GPT)] == ["jepa_lambda=0 num_layers=3", "jepa_lambda=0 num_layers=4"] and len(grid) == 6
    assert all(a.twin(GPT) in grid for a in grid)
    arm = ablate.parse_arms([f"jepa.py:{edited}"], GPT)[1]
    assert arm.files == (("jepa.py", str(edited)),) and arm.twin(GPT) == Arm((("jepa_lambda", "0"),))
    assert [a.label for a in ablate.parse_arms(["lbd=0.1,1", "step_jepa=true"], HF)] == ["lbd=0", "lbd=0.1 step_jepa=true", "lbd=1 step_jepa=true"]
    for text, message in [("JEPA_LAMBDA", "must be NAME=value"), ("JEPA_LAMBDA=", "must be NAME=value"), ("nothing.py:x.py", "nothing.py is no file"), ("jepa.py:x.py", "x.py is no file")]:
        with pytest.raises(ValueError, match=message):
            ablate.parse_arms([text], GPT)


def test_arms_one_by_one_and_a_baseline(tmp_path):
    """Each arm once, however its settings are ordered and called; a baseline takes the place of the twins."""
    edited = tmp_path / "my file.py"
    edited.write_text("")
    labels = lambda *given, **more: [a.label for a in ablate.parse_arms(*given, **more)]
    assert labels([], GPT, ["JEPA_LAYER=2 JEPA_LAMBDA=0.1", "jepa_lambda=0.1 jepa_layer=2"]) == ["jepa_lambda=0", "jepa_lambda=0.1 jepa_layer=2"]
    assert labels(["JEPA_LAYER=2,3", "JEPA_LAMBDA=0.1"], GPT, ["JEPA_LAMBDA=0.1 JEPA_LAYER=3", "JEPA_LAMBDA=1 JEPA_LAYER=-1,2"]) == \
        ["jepa_lambda=0", "jepa_lambda=0.1 jepa_layer=2", "jepa_lambda=0.1 jepa_layer=3", "jepa_lambda=1 jepa_layer=-1,2"]  # a comma belongs to the value
    assert labels([], HF, ["training.lbd=0.1 dataset.predictors=2", "predictors=2 lbd=0.1", "lora=true lbd=1 gamma=0.5"]) == \
        ["lbd=0", "lbd=0 use_lora=true", "lbd=0.1 predictors=2", "lbd=1 gamma=0.5 use_lora=true"]
    assert ablate.parse_arms([], GPT, [f"jepa.py:'{edited}' JEPA_LAMBDA=0 JEPA_LAYER=1"]) == [Arm((("jepa_lambda", "0"),)), Arm((("jepa_lambda", "0"),), (("jepa.py", str(edited)),))]
    assert labels(["JEPA_LAMBDA=0,0.1"], GPT, ["JEPA_LAMBDA=0.1 ITERATIONS=5"], "ITERATIONS=9 JEPA_LAMBDA=0") == \
        ["jepa_lambda=0 iterations=9", "jepa_lambda=0", "jepa_lambda=0.1", "jepa_lambda=0.1 iterations=5"]
    for singles, baseline, message in [(["JEPA_LAMBDA=0.1 JEPA_LAYER"], None, "--arm JEPA_LAMBDA=0.1 JEPA_LAYER: must be NAME"),
                                       (["jepa_layer=1 JEPA_LAYER=2"], None, "jepa_layer is there twice"),
                                       ([f"data/shards.py:{edited}"], None, "data/shards.py is no file of the project's own folder"), (["JEPA_LAMBDA=1"], "", "--baseline : must be NAME")]:
        with pytest.raises(ValueError, match=message):
            ablate.parse_arms([], GPT, singles, baseline)


@pytest.mark.parametrize("script", [GPT, HF])
def test_no_arm_sets_what_all_arms_share(script):
    """Step times of compiled and eager runs, or of two batch sizes, never stand in one table."""
    known = ablate.effective([], script)[0]
    arm = lambda name: [Arm(((ablate.WEIGHT[script], "0.1"), (name, "1")))]
    assert {"compile", "dtype", "train_batch_tokens", "grad_accum_steps"} <= {n for names in ablate.SHARED[GPT].values() for n in names}
    assert {"batch_size", "grad_accum", "dtype"} <= {n for names in ablate.SHARED[HF].values() for n in names}
    for group, names in ablate.SHARED[script].items():
        for name in names:
            assert name in known  # a misspelt one would protect nothing
            with pytest.raises(ValueError, match=f"{name} belongs to the {group}, which all arms share; give it as a flag for all: --{name}=1"):
                ablate.check_arms(arm(name), script, None)
    for name in ablate.OWN[script]:
        assert name in known
        with pytest.raises(ValueError, match=f"{name} is set here for every run"):
            ablate.check_arms(arm(name), script, None)
    limits = {GPT: {"iterations": ("steps=9", "flops=1"), "train_flops": ("steps", "flops", "seconds"), "max_wallclock_seconds": ("steps",)}, HF: {"same_flop": ("flops",)}}
    for name, budgets in limits[script].items():
        ablate.check_arms(arm(name), script, None)
        for budget in budgets:
            with pytest.raises(ValueError, match=f"{name} belongs to the budget, which all arms share; leave it to --budget"):
                ablate.check_arms(arm(name), script, budget)
    ablate.check_arms(arm("iterations" if script == GPT else "num_epochs"), script, "steps" if script == GPT else "flops")


def test_budgets():
    assert ablate.budget_flags("steps=200", GPT) == ["--train_flops=0", "--max_wallclock_seconds=0", "--iterations=200"]
    assert ablate.budget_flags("seconds", GPT) == ["--train_flops=0"] and ablate.budget_flags("flops", HF) == ["--same_flop=true"]
    for text, script in (("epochs=2", GPT), ("seconds=3", HF)):
        with pytest.raises(ValueError, match="must be steps, flops or seconds"):
            ablate.budget_flags(text, script)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=12).filter(lambda x: len({round(b - a, 6) for a, b in x}) > 2))
@settings(deadline=None, max_examples=30)  # Wilcoxon's test of tied values is slow
def test_paired_comparison_is_the_textbook_s(pairs):
    twin, arm = zip(*pairs)
    found, d, n = ablate.compare(twin, arm), np.subtract(arm, twin), len(pairs)
    error = d.std(ddof=1) / n**0.5
    assert found["difference"] == pytest.approx(d.mean(), abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx([d.mean() + s * stats.t.ppf(0.975, n - 1) * error for s in (-1, 1)], rel=1e-6, abs=1e-9)
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(d.mean() / error), n - 1), rel=1e-6, abs=1e-12)


def test_comparison_of_few_or_equal_seeds():
    assert ablate.compare([1.0], [2.0]) == {"n": 1, "difference": 1.0, "low": None, "high": None, "p": None, "wilcoxon": None}
    assert ablate.compare([1.0, 2.0], [1.0, 2.0])["p"] == 1.0 and ablate.compare([1.0, 2.0], [2.0, 3.0])["p"] is None and ablate.compare([], [])["difference"] is None
    assert min(ablate.compare([0.0] * 7, [1.0 + 0.1 * i for i in range(7)])["wilcoxon"] for _ in (0,)) > 0.01  # as the docstring says of 7 seeds
    assert ablate.compare([0.0] * 8, [1.0 + 0.1 * i for i in range(8)])["wilcoxon"] < 0.01


@given(st.lists(st.none() | st.floats(0, 1), max_size=7))
def test_holm_against_its_definition(p_values):
    """Corrected p = the smallest level at which the step-down procedure rejects, found by trying."""
    found, known = ablate.holm(p_values), [p for p in p_values if p is not None]
    for p, corrected in zip(p_values, found):
        if p is None:
            assert corrected is None
            continue
        smaller = sorted(known)
        steps = [(len(known) - i) * q for i, q in enumerate(smaller) if q <= p]
        assert corrected == pytest.approx(min(1.0, max(steps)))


def test_detectable_difference_is_found_that_often():
    rng, n, spread = np.random.default_rng(0), 6, 0.3
    d = ablate.detectable(spread, n)
    trials = rng.normal(d, spread, (20000, n))
    assert np.mean(stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)  # four standard errors of 20,000 trials
    assert ablate.detectable(2 * spread, n) == pytest.approx(2 * d) and ablate.detectable(spread, 3) > d


@pytest.fixture
def grid(data_path, tmp_path):
    """(run a grid of tiny GPTs called `name`, its folder); what it leaves in logs/ and ablations/ goes."""
    name = f"test-{tmp_path.name}"
    settings = {**TINY, "iterations": 4, "num_layers": 1, "data_path": data_path}
    def run(*flags):
        return ablate.run_grid(["--name", name, "--budget", "steps", *(f"--{k}={v}" for k, v in settings.items()), *flags])
    yield run, ROOT / "ablations" / name
    shutil.rmtree(ROOT / "ablations" / name, ignore_errors=True)
    for folder in (ROOT / "logs").glob(f"{name}-*"):
        shutil.rmtree(folder)


def test_a_grid_of_real_runs(grid, tmp_path, capsys, monkeypatch):
    """An edited file, and one that fails; stopped and continued, when what failed succeeds."""
    run, out = grid
    monkeypatch.setenv("MATRIX_LR", "0.03")
    monkeypatch.setenv("SEED", "9")  # which every run has its own of
    mended, broken_file, edited = tmp_path / "mended", tmp_path / "broken.py", tmp_path / "edited.py"
    source = (ROOT / "jepa.py").read_text()
    broken_file.write_text(source + f"\nif not __import__('pathlib').Path({str(mended)!r}).exists():\n    raise RuntimeError('broken')\n")
    edited.write_text(source.replace("d = 1 - (unit", "d = 3 - (unit"))
    arms = ["--arms", f"jepa.py:{ROOT / 'jepa.py'},{broken_file},{edited}", "--arms", "jepa_lambda=0.5", "--arms", "jepa_layer=0", "--seeds", "1", "--metric", "val_bpb,quantized_val_bpb"]
    rows = run(*arms)
    printed = capsys.readouterr().out
    assert "no claim is possible" in printed and printed.count("FAILED, see") == 1 and printed.strip().splitlines()[-1].startswith("result: ")  # live, and below the table
    assert "\nfrom the environment, for all arms: matrix_lr=0.03\n" in printed and "\r" not in printed and "3 of 4 runs, 00:" in printed and "\n  jepa_lambda=0 " in printed
    twin, plain, broken, changed = rows
    assert f"  1/1  mean {plain['mean']:.5g}\n" in printed
    assert twin["twin"] is None and broken["failed"] == 1 and broken["mean"] is None and plain["mean"] == changed["mean"]  # a constant more in the loss: the same gradients
    assert twin["mean"] != plain["mean"] and plain["paired"]["difference"] == plain["mean"] - twin["mean"]
    result = json.loads((out / "result.json").read_text())
    assert (result["script"], result["baseline"], [t["metric"] for t in result["tables"]]) == (GPT, None, ["val_bpb", "quantized_val_bpb"])
    last = result["tables"][0]["arms"][3]
    quantised = result["tables"][1]["arms"]
    assert quantised[0]["mean"] == pytest.approx(twin["mean"], rel=0.01) and quantised[0]["mean"] != twin["mean"]  # of the same run, after rounding to 8 bits
    assert all(f"{table['summary']}\n\n{ablate.markdown(table['arms'], table['metric'])}" in (out / "table.md").read_text() for table in result["tables"])
    assert (last["settings"], last["files"], last["twin"]) == ([["jepa_lambda", "0.5"], ["jepa_layer", "0"]], [["jepa.py", str(edited)]], "jepa_lambda=0")
    folders = {r["arm"]: ROOT / "logs" / r["run"] for r in result["runs"]}
    assert [r["arm"] for r in result["runs"] if not r["finished"]] == [broken["arm"]]
    log = (folders[changed["arm"]] / "log.txt").read_text()
    assert "d = 3 - (unit" in log  # the edited source
    loss = lambda row: json.loads((folders[row["arm"]] / "metrics.jsonl").read_text().splitlines()[0])["jepa_loss"]
    assert loss(changed) == pytest.approx(loss(plain) + 2, rel=1e-5)
    before = {f: (f / "result.json").stat().st_mtime_ns for f in (ROOT / "logs").glob(f"{out.name}-*") if (f / "result.json").exists()}
    (folders[plain["arm"]] / "result.json").unlink()  # as if stopped there
    mended.touch()
    rows = run(*arms)
    assert rows[1]["mean"] == rows[2]["mean"] == plain["mean"] and not any(row["failed"] for row in rows)
    assert [f for f in before if before[f] != (f / "result.json").stat().st_mtime_ns] == [folders[plain["arm"]]] and len(before) == 3
    log = (out / f"{folders[broken['arm']].name}.log").read_text()
    assert log.count("RuntimeError: broken") == 1 and log.count("train_gpt.py --") == 2  # both attempts
    assert len(list((ROOT / "logs").glob(f"{folders[plain['arm']].name}.stopped*"))) == 1
    assert (out / "ablation.png").stat().st_size > 10_000 and "| twin" not in (out / "table.md").read_text()
    picture = tmp_path / "curves.png"
    ablate.main(["plot", str(folders[plain["arm"]]), str(folders[changed["arm"]]), "--out", str(picture)])
    assert picture.stat().st_size > 10_000


def test_runs_share_the_gpus_in_order(grid, monkeypatch, capsys):
    """Each GPU has one run at a time, the next run takes the first that is free; a run that fails doesn't stop the others."""
    run, _ = grid
    lock, busy, started = threading.Lock(), set(), []
    def execute(run, args, gpu):
        with lock:
            assert gpu not in busy
            busy.add(gpu)
            started.append((run.seed, run.arm.label, gpu))
        time.sleep(0.6 if gpu == "3" else 0.05)
        if run.seed != 2:
            run.folder.mkdir(parents=True)
            (run.folder / "metrics.jsonl").write_text("")
            (run.folder / "result.json").write_text(json.dumps({"val_bpb": run.seed + 0.1 * (run.arm.label == "jepa_lambda=0"), "train_seconds": 1.0, "steps": 1}))
        with lock:
            busy.remove(gpu)
    monkeypatch.setattr(ablate, "execute", execute)
    rows = run("--arms", "JEPA_LAMBDA=0.1", "--seeds", "4", "--gpus", "3,5")
    assert [s[:2] for s in started] == [(seed, f"jepa_lambda={weight}") for seed in range(1, 5) for weight in ("0", "0.1")]
    assert [s[2] for s in started[:2]] == ["3", "5"] and sum(s[2] == "5" for s in started) > 5  # the quick one makes the most
    printed = capsys.readouterr().out
    assert "8 of 8 runs, 00:00 left" in printed and printed.count("FAILED, see") == 2 and [row["failed"] for row in rows] == [1, 1]
    assert "  jepa_lambda=0    3/4  mean 2.7667\n  jepa_lambda=0.1  3/4  mean 2.6667\n" in printed


def test_an_edited_model_is_evaluated_by_its_own_source(grid, folders, tmp_path):
    """And a metric that no result has stops the grid after the first seed, its runs kept."""
    run, out = grid
    edited, test = tmp_path / "model.py", tmp_path / "test.jsonl"
    edited.write_text((ROOT / "model.py").read_text().replace("q_gain", "gain_of_q"))  # so the project's own model can't load its weights
    hf.write_messages(test, [(None, "abc", "def"), (None, "fed", "cab")])
    flags = ["--arms", f"model.py:{edited}", "--evaluate", str(test), "--data_path", folders["pairs"], "--grad_accum_steps", "1"]
    with pytest.raises(ValueError, match="--metric nothing: no such number in result.json; there are .*startswith.*; the 2 finished runs are kept"):
        run(*flags, "--metric", "nothing", "--seeds", "2")
    done = {file: file.stat().st_mtime_ns for file in (ROOT / "logs").glob(f"{out.name}-*/result.json")}
    rows = run(*flags, "--metric", "startswith", "--seeds", "1")
    assert [row["n"] for row in rows] == [1, 1] and len(done) == 2 and all(file.stat().st_mtime_ns == then for file, then in done.items())


def test_a_grid_of_fine_tuning_runs(tmp_path, monkeypatch, capsys):
    """Trained to answer B alone, a model has as many of the choices right as there are Bs; all paths seen from another folder."""
    monkeypatch.chdir(tmp_path)
    name = f"test-{tmp_path.name}"
    out = ROOT / "ablations" / name
    hf.make_folder(tmp_path / "model", "llama")
    hf.write_messages(tmp_path / "train.jsonl", [(None, f"What is {n} + 2?", "B") for n in range(8)])
    hf.write_messages(tmp_path / "test.jsonl", [(None, f"What is {n} + 3?", "ABCD"[n % 4]) for n in range(8)])
    (tmp_path / "c.yaml").write_text("model: {name: model}\ndataset: {train_file: train.jsonl}\n"
                                     "training: {dtype: float32, num_epochs: 5, learning_rate: 0.01, batch_size: 2, grad_accum: 2, save_steps: 1000}\n")
    run = lambda *flags: ablate.run_grid(["--script", HF, "--name", name, "--config", "c.yaml", "--evaluate", "test.jsonl", "--task", "choice", "--seeds", "1", *flags])
    try:
        twin, arm = run("--arms", "lbd=0.5", "--arms", "predictors=1")
        result = json.loads((out / "result.json").read_text())
        assert (result["script"], result["tables"][0]["metric"], twin["mean"], arm["mean"], arm["paired"]["difference"]) == (HF, "accuracy", 0.25, 0.25, 0.0)
        assert arm["settings"] == [["lbd", "0.5"], ["predictors", "1"]] and arm["time_ratio"] > 0 and arm["flops"] > twin["flops"] > 0 and arm["refused"] is None
        assert "| lbd=0.5 predictors=1 | 1 | 0.25 |" in (out / "table.md").read_text() and (out / "ablation.png").stat().st_size > 10_000
        folder = ROOT / "logs" / result["runs"][1]["run"]
        assert (folder / "model.safetensors").is_file() and "jepa_loss" in json.loads((folder / "result.json").read_text())
        then = (folder / "result.json").stat().st_mtime_ns
        hf.write_messages(tmp_path / "test.jsonl", [(None, f"What is {n} + 3?", "ABBB"[n % 4]) for n in range(8)])
        capsys.readouterr()
        rows = run("--arm", "predictors=1 lbd=0.5", "--baseline", "lbd=0.5 predictors=1")  # another test, the same run
        assert [row["mean"] for row in rows] == [0.75] and (folder / "result.json").stat().st_mtime_ns == then and "1 of 1 runs" in capsys.readouterr().out
        assert json.loads((out / "result.json").read_text())["baseline"] == "lbd=0.5 predictors=1"
    finally:
        shutil.rmtree(out, ignore_errors=True)
        for folder in (ROOT / "logs").glob(f"{name}-*"):
            shutil.rmtree(folder)


def planned(tmp_path, flags=(), **changes):
    """(Arms, Runs) of plan() with these of ablate.py's flags."""
    given = dict(arms=["jepa_lambda=0.1"], arm=[], baseline=None, script=GPT, config=None, budget="steps=3", seeds=1, first_seed=1, name="n", evaluate=None, task=None)
    return ablate.plan(Namespace(**{**given, **changes}), list(flags), tmp_path)


def test_a_run_is_another_one_where_anything_that_makes_it_is(tmp_path, monkeypatch):
    """Settings, budget, config, environment, inputs, the project's own source; the evaluation by its file and task."""
    config, test, ranks = tmp_path / "c.yaml", tmp_path / "test.jsonl", tmp_path / "ranks"
    config.write_text("seed: 1\n")
    test.write_text("x")
    def names(**changes):
        return [(run.folder.name, run.evaluation.name) for run in planned(tmp_path, **{"config": str(config), "evaluate": str(test), **changes})[1]]
    first = names()
    assert first == names() and len(set(first)) == 2
    runs = lambda found: {run for run, _ in found}
    assert not runs(first) & runs(names(budget="steps=4")) and not runs(first) & runs(names(flags=["--num_layers=3"]))
    assert runs(names(task="exact")) == runs(first) and names(task="exact") != first
    assert names(arms=["jepa_lambda=0.05,0.1"])[::2] == first  # an arm more: the others are done
    config.write_text("# a comment\nnum_layers: 6\n")  # the default
    assert names() == first
    config.write_text("seed: 1\nnum_layers: 2\n")
    assert not runs(first) & runs(names())
    config.write_text("seed: 1\n")
    monkeypatch.setenv("TRAIN_SEQ_LEN", "128")
    assert not runs(first) & runs(names())
    monkeypatch.delenv("TRAIN_SEQ_LEN")
    monkeypatch.setenv("JEPA_LAMBDA", "3")  # every arm, and so the twin, has its own
    assert names() == first
    monkeypatch.delenv("JEPA_LAMBDA")
    ranks.write_text("one")
    monkeypatch.chdir(tmp_path)
    with_file = names(flags=["--tokenizer", "ranks"])
    assert with_file == names(flags=["--tokenizer", "ranks"])
    ranks.write_text("two")
    assert not runs(with_file) & runs(names(flags=["--tokenizer", "ranks"]))
    for folder in ("a", "b"):
        (tmp_path / folder / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        assert names() == first and not runs(with_file) & runs(with_file := names(flags=["--data_path", "data"]))  # another folder of that name
    copy = tmp_path / "project"
    (copy / "data").mkdir(parents=True)
    for file in ablate.CODE[GPT]:
        shutil.copy(ROOT / file, copy / file)
    monkeypatch.setattr(ablate, "ROOT", copy)
    assert runs(names()) == runs(first)
    of_file = planned(tmp_path, arms=[f"jepa.py:{test}"], flags=["--jepa_lambda=1"])[1][1]
    (copy / "model.py").write_text("# edited\n")
    assert not runs(first) & runs(names())
    changed = planned(tmp_path, arms=[f"jepa.py:{test}"], flags=["--jepa_lambda=1"])[1][1]  # an arm's source is that of now, with its file
    source = lambda run, file: (Path(run.command[1]).parent / file).read_text()
    assert of_file.folder != changed.folder and source(changed, "model.py") == "# edited\n" != source(of_file, "model.py") and source(changed, "jepa.py") == "x"


def test_data_made_of_another_place_is_the_same_input(tmp_path):
    made = lambda name, source, code: prepare_pairs(tmp_path / name, *[[(1, "pairs", None, ["a", code])]] * 2, source=source, vocab_size=258)
    made("here", "one/x.jsonl", "b"), made("there", "two/x.jsonl", "b"), made("other", "two/x.jsonl", "c")
    here, there, other = (ablate.content(str(tmp_path / name)) for name in ("here", "there", "other"))
    assert here == there != other


def test_a_run_s_name_covers_all_that_is_counted_as_source():
    assert set(ablate.CODE[GPT]) == set(train_gpt.SOURCES)


def test_runs_are_interleaved_over_the_arms(tmp_path):
    arms, runs = planned(tmp_path, arms=["jepa_lambda=0.1,0.2"], seeds=2, first_seed=4)
    assert [(run.arm.label, run.seed) for run in runs] == [(f"jepa_lambda={weight}", seed) for seed in (4, 5) for weight in ("0", "0.1", "0.2")]
    assert len({run.folder for run in runs}) == 6 and all(f"--seed={run.seed}" in run.command and f"--run_id={run.folder.name}" in run.command for run in runs)
    arms, runs = planned(tmp_path, baseline="jepa_lambda=0 iterations=2", arms=[], arm=["jepa_lambda=0.1 iterations=1"], budget="steps")
    assert [arm.label for arm in arms] == ["jepa_lambda=0 iterations=2", "jepa_lambda=0.1 iterations=1"] == [run.arm.label for run in runs]
    assert "--max_wallclock_seconds=0" in runs[0].command
    deep = planned(tmp_path, flags=["--jepa_layer=8"], arms=[], arm=["num_layers=9 jepa_lambda=1"], baseline="num_layers=12 jepa_lambda=1")
    assert len(deep[1]) == 2  # the flag is valid only together with the arms' settings
    _, chained = planned(tmp_path, flags=["--init_from=logs/a-seed{seed}"], arms=[], arm=["jepa_lambda=1"], seeds=2)
    assert [f"--init_from=logs/a-seed{run.seed}" in run.command for run in chained] == [True] * 4
    for changes, message in [(dict(arms=["jepa_lambda=0.1,0.10"]), "arm jepa_lambda=0.10 is the same run as arm jepa_lambda=0.1"),
                             (dict(arms=["num_layers=3"]), "arm num_layers=3 is the same run as arm jepa_lambda=0 num_layers=3"),
                             (dict(flags=["--seed", "3"]), "--seed is set here"), (dict(flags=["--num_layers=3"], arms=["jepa_layer=4"]), "JEPA_LAYER=4: must be"),
                             (dict(script=HF, arms=["lbd=1"], budget=None, flags=["--general.finetune_seed=3"]), "--finetune_seed is set here")]:
        with pytest.raises(ValueError, match=message):
            planned(tmp_path, **changes)


@pytest.mark.parametrize("content", ["", '{"val_bpb": 1', "[1]", "[]", "3", "\udcff", "[" * 100_000])
def test_a_damaged_result_is_named_with_what_to_do(tmp_path, content):
    run = ablate.Run(Arm(()), 1, tmp_path / "run", [], tmp_path / "log", tmp_path / "run" / "evaluation-1.json")
    run.folder.mkdir()
    for bad, again in (("result.json", run.folder), (run.evaluation.name, run.evaluation)):
        for name in ("result.json", run.evaluation.name):
            (run.folder / name).write_text(content if name == bad else '{"val_bpb": 1}', errors="surrogateescape")
        with pytest.raises(ValueError, match=f"{run.folder / bad}: not a JSON object .*; remove {again} and run the grid again") as e:
            run.result()
        assert "\n" not in str(e.value)


def test_an_evaluation_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    run = ablate.Run(Arm(()), 1, tmp_path / "run", ["train_gpt.py", "train_gpt.py"], tmp_path / "log", tmp_path / "run" / "evaluation-1.json")
    run.folder.mkdir()
    (run.folder / "result.json").write_text("{}")
    monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: Namespace(returncode=0, stdout=b'so\n{"startswith": 1}\n'))
    monkeypatch.setattr(ablate.os, "fsync", lambda _: 1 / 0)  # stopped before it is on the disk
    args = Namespace(evaluate="x.jsonl", script=GPT, task=None)
    with pytest.raises(ZeroDivisionError):
        ablate.execute(run, args, "")
    assert [file.name for file in run.folder.iterdir()] == ["result.json"]
    monkeypatch.undo()
    monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: Namespace(returncode=0, stdout=b'so\n{"startswith": 1}\n'))
    ablate.execute(run, args, "")
    assert run.result() == {"startswith": 1}


def made_up(values, **changes):
    """Runs with these results: {arm: [value or whole result of each seed, or None]}."""
    whole = lambda value: value if isinstance(value, dict) or value is None else {"val_bpb": value, "train_seconds": 2.0, "steps": 10, "train_flops": 1e9, **changes}
    return [Namespace(arm=arm, seed=seed, log=f"{seed}.log", result=lambda result=whole(value): result) for arm, of in values.items() for seed, value in enumerate(of)]


def test_table_and_summary_of_known_values(tmp_path):
    """Twelve runs whose results are made up: what the table says is what a calculation by hand gives."""
    arms = ablate.parse_arms(["jepa_lambda=0.1,0.2"], GPT)
    made = {arms[0]: [1.0, 1.2, 1.1, 0.9], arms[1]: [1.1, 1.25, 1.22, 0.98], arms[2]: [0.5, 0.7, 0.62, 0.41]}
    runs = []
    for arm, values in made.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{arms.index(arm)}-{seed}"
            folder.mkdir()
            (folder / "result.json").write_text(json.dumps({"val_bpb": value, "train_seconds": 2.0 + arms.index(arm), "steps": 10, "train_flops": 1e9}))
            runs.append(ablate.Run(arm, seed, folder, [], tmp_path / "x.log"))
    rows, line = ablate.summarise(arms, runs, GPT, "val_bpb")
    assert line.startswith("val_bpb of the twin, jepa_lambda=0: mean 1.05, standard deviation 0.13 over 4 seeds; the smallest difference") and "no claim" not in line
    assert rows[2]["paired"]["difference"] == pytest.approx(statistics.fmean(made[arms[2]]) - 1.05) and rows[1]["time_ratio"] == pytest.approx(1.5)
    p = [row["paired"]["p"] for row in rows[1:]]
    assert [row["paired"]["holm"] for row in rows[1:]] == [max(p[0], 2 * p[1]), 2 * p[1]]  # the second is the smaller one
    table = ablate.markdown(rows, "val_bpb").splitlines()
    assert len(table) == 5 and table[2].startswith("| jepa_lambda=0 (twin) | 4 | 1.05 | 0.13 |  |") and "-0.49250" in table[4]
    with pytest.raises(ValueError, match="--metric val_loss: no such number in result.json; there are .*val_bpb"):
        ablate.summarise(arms, runs, GPT, "val_loss")
    rows, line = ablate.summarise(arms, runs, GPT, "val_bpb", baseline=arms[1])
    assert line.startswith("val_bpb of the baseline, jepa_lambda=0.1: mean 1.1375,") and [row["twin"] for row in rows] == ["jepa_lambda=0.1", None, "jepa_lambda=0.1"]
    assert rows[0]["paired"]["difference"] == pytest.approx(1.05 - 1.1375) and rows[2]["time_ratio"] == pytest.approx(4 / 3)
    table = ablate.markdown(rows, "val_bpb", "baseline")
    assert "| difference to the baseline |" in table and "| jepa_lambda=0.1 (baseline) | 4 |" in table and "twin" not in table


def test_runs_made_differently_are_not_compared():
    """A machine without a compiler falls back to eager, an edited file may change the batch: no difference and no step time of such a pair."""
    arms = ablate.parse_arms(["jepa_lambda=0.1,0.2,0.3"], GPT)
    result = lambda value, compiled=True, batch=4096, compile=True: {"val_bpb": value, "train_seconds": 2.0, "steps": 10, "compiled": compiled,
                                                                     "config": {"train_batch_tokens": batch, "compile": compile}}
    runs = made_up({arms[0]: [result(v) for v in (1.0, 1.1, 1.3)], arms[1]: [result(0.9), result(0.9), result(0.9, compiled=False)], arms[2]: [result(0.8, batch=8192)] * 3,
                    arms[3]: [result(v, compile=False) for v in (0.7, 0.9, 0.8)]})
    rows, line = ablate.summarise(arms, runs, GPT, "val_bpb")
    assert [row.get("refused") for row in rows] == [None, "compiled is True there, False here (seed 2)", "train_batch_tokens is 4096 there, 8192 here (seed 0)", None]
    assert all(row["paired"]["difference"] is row["time_ratio"] is row["paired"]["holm"] is None for row in rows[1:3]) and rows[1]["mean"] == pytest.approx(0.9)
    assert rows[3]["paired"]["holm"] == rows[3]["paired"]["p"] is not None and "no claim" not in line  # corrected for one comparison
    table = ablate.markdown(rows, "val_bpb")
    assert "| jepa_lambda=0.1 | 3 | 0.9 | 0 |  |  | refused |  |  |  |" in table
    assert table.splitlines()[-3:] == ["jepa_lambda=0.1: refused, not compared with jepa_lambda=0: compiled is True there, False here (seed 2); run both in the same way", "",
                                       "jepa_lambda=0.2: refused, not compared with jepa_lambda=0: train_batch_tokens is 4096 there, 8192 here (seed 0); run both in the same way"]


def test_fine_tuning_runs_of_another_batch_are_not_compared(tmp_path):
    """The batch of a fine-tuning run stands in its config.yaml."""
    arms, runs = ablate.parse_arms(["lbd=1"], HF), []
    for arm, size in zip(arms, (4, 8)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps({"eval_loss": 1.0, "train_seconds": 2.0, "steps": 10}))
        (folder / "config.yaml").write_text(f"model: {{name: x}}\ntraining: {{batch_size: {size}, grad_accum: 1}}\n")
        runs.append(ablate.Run(arm, 1, folder, [], tmp_path / "x.log"))
    assert ablate.summarise(arms, runs, HF, "eval_loss")[0][1]["refused"] == "batch_size is 4 there, 8 here (seed 1)"


def test_a_run_without_the_number_is_shown_and_the_others_count():
    """A target that some runs don't reach, a loss that isn't finite, a run that failed."""
    arms = ablate.parse_arms(["jepa_lambda=0.1,0.2"], GPT)
    result = lambda value: {"time_to_target": value, "train_seconds": 2.0, "steps": 10}
    runs = made_up({arms[0]: [result(v) for v in (5.0, 6.0, 7.0, 8.0)], arms[1]: [result(4.0), result(None), result(5.5), result(6.0)],
                    arms[2]: [None, result(float("nan")), {"steps": 1}, result(3.0)]})
    rows, line = ablate.summarise(arms, runs, GPT, "time_to_target")
    assert [(row["n"], row["failed"]) for row in rows] == [(4, 0), (3, 1), (1, 3)] and rows[1]["paired"]["n"] == 3 and rows[1]["paired"]["p"] is not None
    assert rows[2]["missing"] == {0: "no result", 1: "time_to_target is NaN", 2: "no time_to_target in its result"} and rows[2]["paired"]["holm"] is None
    assert "of the twin, jepa_lambda=0: mean 6.5" in line and line.endswith("Fewer than 3 seeds: no claim is possible on jepa_lambda=0.2")
    table = ablate.markdown(rows, "time_to_target")
    assert "\n\njepa_lambda=0.1, seed 1: time_to_target is null\n\n" in table and "no claim: fewer than 3 seeds" in table.splitlines()[4]
    rows, line = ablate.summarise(arms[:2], made_up({arms[0]: [1.0, 1.1], arms[1]: [0.5, 0.61]}), GPT, "val_bpb")  # two seeds: a small p is no claim
    assert rows[1]["paired"]["p"] < 0.01 and rows[1]["paired"]["holm"] is None and line.endswith("Fewer than 3 seeds: no claim is possible")
    assert ablate.markdown(rows, "val_bpb").splitlines()[3].count("no claim: fewer than 3 seeds |  |  |") == 1
    with pytest.raises(ValueError, match="--metric time_to_target: is null in result.json; there are steps, train_seconds; the 3 finished runs are kept"):
        ablate.summarise(arms, made_up({arm: [result(None)] for arm in arms}), GPT, "time_to_target")
    assert ablate.summarise(arms, made_up({arm: [None] for arm in arms}), GPT, "val_bpb")[1].startswith("val_bpb: too few finished runs")  # all failed: that is the result


def test_a_planted_gain_is_found_and_a_planted_null_is_not():
    """500 simulated grids of four arms and a twin, six seeds: three standard errors of a share of 500 are 0.03 at 5%, 0.054 at 80%."""
    rng, n, trials, noise = np.random.default_rng(0), 6, 500, 0.01
    arms = ablate.parse_arms(["jepa_lambda=0.1,0.2,0.3,0.4"], GPT)
    def corrected_and_plain(arms, gain):
        """p-values of the first arm behind the twin and the least of all, corrected and not; every value has its seed's own level."""
        seeds = rng.normal(2, 0.1, n)
        values = seeds + rng.normal(0, noise, (len(arms), n))
        values[1] -= gain
        paired = [row["paired"] for row in ablate.summarise(arms, made_up(dict(zip(arms, values.tolist()))), GPT, "val_bpb")[0][1:]]
        return paired[0]["holm"], min(p["holm"] for p in paired), min(p["p"] for p in paired)
    _, holm, plain = np.transpose([corrected_and_plain(arms, 0) for _ in range(trials)])
    assert 0.01 < np.mean(holm < 0.05) < 0.05 + 0.03 < np.mean(plain < 0.05)  # at most 5% of the grids claim anything; uncorrected it would be some 14%
    gain = ablate.detectable(noise * 2**0.5, n)  # of differences of two noisy values
    found, *_ = np.transpose([corrected_and_plain(arms[:2], gain) for _ in range(trials)])
    assert np.mean(found < 0.05) == pytest.approx(0.8, abs=0.054)
    assert corrected_and_plain(arms, 5 * gain)[0] < 0.05  # beside three nulls, a gain beyond doubt


def test_the_best_arms_of_a_grid(tmp_path, capsys):
    """One arm for every combination of the other settings; a grid that isn't finished is refused; the better direction is the metric's."""
    means = {"jepa_lambda=0": 3.0, "jepa_lambda=1 jepa_update=decoupled": 2.0, "jepa_lambda=2 jepa_update=decoupled": 1.0, "jepa_lambda=4": 4.0}
    rows = [{"arm": label, "settings": [s.split("=") for s in label.split()], "files": [], "mean": mean, "failed": 0} for label, mean in means.items()]
    for metric, expected in (("val_bpb", ["jepa_lambda=0", "jepa_lambda=2 jepa_update=decoupled"]), ("startswith", ["jepa_lambda=4", "jepa_lambda=1 jepa_update=decoupled"])):
        (tmp_path / "result.json").write_text(json.dumps({"tables": [{"metric": metric, "arms": rows}]}))
        ablate.main(["best", str(tmp_path), "--over", "JEPA_LAMBDA"])
        assert capsys.readouterr().out.split("\n")[:-1] == expected
        assert [arm.label for arm in ablate.parse_arms([], GPT, expected)][-2:] == expected  # what --arm reads
    rows[1]["failed"] = 1
    (tmp_path / "result.json").write_text(json.dumps({"tables": [{"metric": metric, "arms": rows}]}))
    with pytest.raises(SystemExit, match="error: not all runs of jepa_lambda=1 jepa_update=decoupled have a startswith"):
        ablate.main(["best", str(tmp_path), "--over", "JEPA_LAMBDA"])


def test_misuse_is_one_line(tmp_path):
    for flags, message in [(["--arms", "JEPA_LAMBDA=0.1", "--seeds", "0"], "--seeds 0"), (["--arm", "JEPA_LAMBDA=1", "--baseline", "JEPA_LAMBDA=0"], "--baseline needs a --budget"), (["--arms", "JEPA_LAMBDA=0.1", "--config", "no.yaml"], "no.yaml: no such file"),
                           (["--arms", "JEPA_LAYER=9"], "JEPA_LAYER=9: must be -1"), (["--arms", "JEPA_LAMDA=0.1"], "unknown argument --jepa_lamda=0.1; did you mean jepa_lambda"),
                           (["--arms", "JEPA_LAMBDA=0.1", "--num_layer", "3"], "unknown argument --num_layer"), (["--arms", "lbbd=0.1", "--script", "finetune.py"], "did you mean lbd"),
                           (["--seeds", "3"], "no arms: give --arms"), (["--arm", "JEPA_LAMBDA=0.1", "--name", "a b"], "--name a b: may hold"),
                           (["--arm", "JEPA_LAMBDA=x"], "'x' is not a valid float"),
                           (["--arms", "JEPA_LAMBDA=0.1", "--arm", "JEPA_LAMBDA=0.1 COMPILE=0"], "arm jepa_lambda=0.1 compile=0: compile belongs to the program, which all arms share"),
                           (["plot", str(tmp_path)], "no metrics.jsonl in it"), (["best", str(tmp_path), "--over", "x"], "no result.json of a grid in it")]:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            ablate.main(flags)
