"""The training step really used: its graphs, its sums, its schedule, its optimizers."""

import contextlib
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from bench import count_graphs
from conftest import (
    CPU,
    ROOT,
    TINY,
    MemoryLog,
    keep_gradients,
    make_config,
    make_run,
    metrics_of,
    result_of,
    run_cli,
    shake,
    train_in_process,
    train_run,
    with_loss,
)
from model import GPT, Linear
from nanojepa.device import Clock
from nanojepa.diagnostics import diagnose, diagnostic_warnings
from nanojepa.muon import Muon, orthogonalize
from nanojepa.objectives import OBJECTIVES, Objective, StepRandom
from nanojepa.objectives.distance import Views
from nanojepa.objectives.schedule import keeps_term


class GraphRecorder:
    """A torch.compile backend that keeps every captured FX graph and runs it as it is."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, example_inputs):
        # Names follow Python variables, so nodes are numbered: what counts is the structure.
        number = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        graph = []
        for node in graph_module.graph.nodes:
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"n{number[n]}")
            graph.append((node.op, node.op == "placeholder" or node.target, *arguments))
        self.graphs.append(graph)
        return graph_module

    def compile(self, f):
        torch._dynamo.reset()
        return torch.compile(f, backend=self, fullgraph=True, dynamic=False)


def record_graphs(run):
    """Let a Run's training loss be captured; returns the recorder."""
    recorder = GraphRecorder()
    with_loss(run, recorder.compile(train_gpt.training_loss))
    return recorder


# ---- the off switch


def test_with_lambda_0_the_graph_is_that_of_a_model_that_never_heard_of_jepa(data_path):
    run = make_run(data_path)
    idx, targets = run.data.rows(0, run.share.rows, 0, run.share.rows)
    count = run.share.rows * run.cfg.train_seq_len

    def baseline(model: GPT, idx, targets):
        return (model(idx, targets) / count,)

    plain = GraphRecorder()
    plain.compile(baseline)(run.model, idx, targets)[0].backward()
    off = record_graphs(run)
    for step in range(3):
        train_gpt.training_step(run, step, 0.0, train_gpt.jepa_schedule(run.cfg, step / 3, step))
    assert len(plain.graphs) == len(off.graphs) == 1
    assert off.graphs == plain.graphs


def test_with_the_term_there_is_exactly_one_more_graph_however_spans_and_weight_vary(data_path):
    late = dict(jepa_start_frac=0.25, jepa_warmup_frac=0.5, jepa_end_frac=0.9, jepa_spans=2)
    for settings, graphs in (({**late, "iterations": 12}, 2), ({}, 1)):
        run = make_run(data_path, jepa_lambda=0.1, **settings)
        recorder = record_graphs(run)
        train_gpt.warm_up(run)
        train_run(run)
        assert len(recorder.graphs) == graphs


@pytest.mark.slow
def test_blocks_compiled_on_their_own_give_the_same_step_and_the_term_adds_no_graph(data_path):
    """So the graphs of a run without the term and of one with it are the same."""
    results, graphs = [], []
    for scope in (None, "blocks"):
        run = shake(make_run(data_path, jepa_lambda=0.1, compile_scope=scope or "auto"))
        if scope:
            torch._dynamo.reset()
            train_gpt.compile_run(run)
        for weight in (None, 0.1):
            before = count_graphs()
            result = train_gpt.training_step(run, 0, 0.0, weight)
            graphs.append(count_graphs() - before)
            results.append([result.ce, result.grad_norm])
        nats = train_gpt.evaluate(run, MemoryLog()).val_loss
        results.append([torch.tensor(nats)])
        run.model.generate([[1, 2]], 3)
    for found, expected in zip(results[3:], results[:3], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert graphs == [0, 0, 2, 0]  # of a block and of the head


def test_needed_graphs():
    def graphs(**settings):
        return train_gpt.needed_graphs(train_gpt.Config(**settings))

    assert graphs() == [None]
    assert graphs(jepa_lambda=0.1) == graphs(jepa_lambda=0.1, jepa_warmup_frac=0.5) == [0.1]
    for settings in ({"jepa_start_frac": 0.5}, {"jepa_end_frac": 0.5}, {"jepa_ratio": 0.5}):
        assert graphs(jepa_lambda=0.1, **settings) == [None, 0.1]


def test_off_is_bit_identical_whatever_the_other_knobs_say(data_path):
    plain = train_in_process(data_path)
    knobs = dict(jepa_max_span_frac=0.9, jepa_spans=3, jepa_layer=1, jepa_distance="mse")
    off = train_in_process(data_path, jepa_lambda=0.0, jepa_predictor="linear", **knobs)
    assert plain.curve("train_loss") == off.curve("train_loss") and not off.curve("jepa_loss")
    assert plain.curve("val_loss") == off.curve("val_loss")


def test_a_term_that_starts_halfway_leaves_the_first_half_untouched(data_path):
    off = train_in_process(data_path, iterations=10)
    late = train_in_process(data_path, iterations=10, jepa_lambda=0.5, jepa_start_frac=0.5)
    # The loss of step 6 is that of the weights after 5 plain steps; the term shows from step 7 on.
    assert off.curve("train_loss")[:6] == late.curve("train_loss")[:6]
    assert off.curve("train_loss")[6] != late.curve("train_loss")[6]
    assert [n for n, values in late.rows if "jepa_loss" in values] == [6, 7, 8, 9, 10]


def test_ratio_drops_the_term_from_whole_steps(data_path):
    def first_kept_is_the_fourth(seed):
        return [keeps_term(seed, step, 0.5) for step in range(4)] == [False, False, False, True]

    seed = next(filter(first_kept_is_the_fourth, range(100)))
    off = train_in_process(data_path, iterations=10, seed=seed)
    term = dict(jepa_lambda=0.5, iterations=10, seed=seed)
    some = train_in_process(data_path, **term, jepa_ratio=0.5)
    kept = [step for step in range(10) if keeps_term(seed, step, 0.5)]
    assert [n - 1 for n, values in some.rows if "jepa_loss" in values] == kept
    # The loss of the fourth step is that of three plain ones; its own term shows in the fifth.
    assert some.curve("train_loss")[:4] == off.curve("train_loss")[:4]
    assert some.curve("train_loss")[4] != off.curve("train_loss")[4]
    assert len(train_in_process(data_path, **term).curve("jepa_loss")) == 10


def test_warm_up_leaves_no_trace(data_path):
    late = dict(jepa_lambda=0.1, jepa_start_frac=0.5, jepa_predictor="linear", diag_every=5)
    cold = train_in_process(data_path, **late)
    run = make_run(data_path, **late)
    train_gpt.warm_up(run)
    assert train_run(run).rows == cold.rows


def test_a_run_that_reaches_its_target_ends_with_its_own_diagnostics(data_path):
    settings = dict(jepa_lambda=0.1, val_loss_every=3, diag_every=100, target_val_loss=1e9)
    log = train_in_process(data_path, **settings)
    assert [step for step, values in log.rows if "grad_ratio" in values] == [0, 3]


# ---- what a step computes


def drawn_spans(run, step, idx):
    """(a-1, b, start, end, weight) of the rows of a step, places counted through all rows."""
    rng = StepRandom(run.cfg.seed, step, torch.arange(len(idx)), len(idx))
    batch = run.data.read(step, run.share).batches[0]
    document = (idx == run.data.doc_token).cumsum(1)
    drawn = run.objective.draw(replace(batch, idx=idx, document=document), rng)
    return *drawn["places"], drawn["weight"]


def span_distances(h, places, weight, kind):
    """The distance of every span that counts, one at a time."""
    h, distances = h.flatten(0, 1), []
    for before, b, start, end in zip(*(x[weight > 0] for x in places), strict=True):
        context, patch = (h[before] - h[start]) + (h[end] - h[b]), h[b] - h[before]
        difference, floor = context - patch, 1e-3 * h[b].norm()
        cosine = torch.tensor(0.0)
        if min(context.norm(), patch.norm()) > floor:
            cosine = F.cosine_similarity(context, patch, dim=0)
        by_kind = {
            "cosine": 1 - cosine,
            "l2": difference.norm(),
            "mse": difference.square().mean(),
        }
        distances.append(by_kind[kind])
    return torch.stack(distances)


@pytest.mark.parametrize(
    "layer, distance, spans, by_document",
    [(-1, "cosine", 1, True), (0, "mse", 3, True), (1, "l2", 2, False), (2, "cosine", 2, True)],
)
def test_losses_and_gradients_of_a_step_match_one_written_out(
    data_path, layer, distance, spans, by_document
):
    """CE is the mean over all targets, the term over all spans that there are in the step."""
    term = dict(jepa_layer=layer, jepa_distance=distance, jepa_spans=spans, jepa_doc=by_document)
    run = make_run(data_path, jepa_lambda=0.7, **term, grad_accum_steps=2, train_batch_tokens=512)
    keep_gradients(shake(run))
    result = train_gpt.training_step(run, 3, 0.0, 0.7)
    gradients = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()

    idx, targets = run.data.rows(3, run.share.rows, 0, run.share.rows)
    *places, weight = drawn_spans(run, 3, idx)
    x, h = run.model._run_blocks(idx, layer)
    ce = F.cross_entropy(run.model.logits(x).flatten(0, 1), targets.flatten())
    mean = span_distances(h, places, weight, distance).mean()
    (ce + 0.7 * mean).backward()
    # Two micro-batches against one batch: float32 rounding of sums over some hundred targets.
    assert result.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    assert result.term.item() == pytest.approx(mean.item(), rel=1e-5)
    for ours, p in zip(gradients, run.model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-6)


def test_rows_hold_spans_and_documents_without_one(data_path):
    """These tests need rows with several documents, and unequal numbers of spans on two ranks."""
    run = make_run(data_path, train_seq_len=4, train_batch_tokens=256, jepa_lambda=0.1)
    rows, several, unequal = run.share.rows, False, False
    for step in range(6):
        idx, _ = run.data.rows(step, rows, 0, rows)
        several = several or ((idx == run.data.doc_token).sum(1) > 1).any()
        first, second = drawn_spans(run, step, idx)[-1].view(2, -1).sum(1).tolist()
        unequal = unequal or first != second
    assert several and unequal


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_gives_the_same_curve(data_path, accum):
    settings = dict(train_seq_len=8, jepa_lambda=0.1)
    curves = [train_in_process(data_path, **settings, grad_accum_steps=n) for n in (1, accum)]
    for name in ("train_loss", "jepa_loss", "val_loss"):
        # float32 sums in another order, 8 steps of Muon apart
        assert curves[0].curve(name) == pytest.approx(curves[1].curve(name), rel=2e-4)


def compare_runs(run_id, data_path, one_flags, two_flags, rel, abs=1e-12):
    """Train on one process and on two, and compare every number of their metrics."""
    for name, ranks, flags in (("one", 0, one_flags), ("two", 2, two_flags)):
        done = run_cli(data_path, *flags, f"--run_id={run_id}-{name}", ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    curves = metrics_of(f"{run_id}-one"), metrics_of(f"{run_id}-two")
    assert len(curves[0]) == len(curves[1]) > 4
    for x, y in zip(*curves, strict=True):
        for key in x.keys() - {"train_time"}:
            assert x[key] == pytest.approx(y[key], rel=rel, abs=abs), key
    for key in ("val_loss", "val_bpb", "quantized_val_bpb"):
        values = [result_of(f"{run_id}-{name}")[key] for name in ("one", "two")]
        assert values[0] == pytest.approx(values[1], rel=2e-4)


@pytest.mark.slow
def test_two_ranks_with_unequal_span_counts_equal_one_compiled(data_path, run_id):
    flags = ["--train_seq_len=4", "--jepa_lambda=0.1", "--compile=1", "--iterations=6"]
    flags += ["--vocab_size=320", "--num_layers=2"]
    two = [*flags, "--grad_accum_steps=2"]
    compare_runs(run_id, data_path, [*flags, "--grad_accum_steps=1"], two, rel=2e-4)


@pytest.mark.slow
def test_two_ranks_with_diagnostics_equal_one(data_path, run_id):
    """Rank 0 of two has the rows of the first of one's two micro-batches, which are looked at."""
    flags = ["--jepa_lambda=0.3", "--jepa_layer=0", "--iterations=4", "--diag_every=2"]
    one, two = [*flags, "--grad_accum_steps=2"], [*flags, "--grad_accum_steps=1"]
    # Cosines of differences of states lose digits.
    compare_runs(run_id, data_path, one, two, rel=2e-3, abs=1e-4)
    rows = [row for row in metrics_of(f"{run_id}-one") if "grad_ratio" in row]
    assert result_of(f"{run_id}-one")["grad_ratio"] == rows[-1]["grad_ratio"]


@pytest.mark.slow
def test_two_compiled_runs_on_two_threads_are_identical(data_path, run_id):
    """Every embedding row gets many gradients, which atomic adds would shuffle."""
    flags = ["--compile=1", "--jepa_lambda=0.1", "--train_batch_tokens=2048"]
    flags += ["--iterations=6", "--num_layers=1"]
    weights = []
    for name in (f"{run_id}-1", f"{run_id}-2"):
        done = run_cli(data_path, f"--run_id={name}", *flags, env={"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append((ROOT / "logs" / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "kind, term, settings",
    [
        ("text", False, {}),
        ("text", False, {"optimizer": "adamw", "mask_documents": True}),
        ("text", True, {"jepa_spans": 3}),
        ("pairs", True, {"jepa_objective": "pair", "jepa_predictor": "linear"}),
        ("groups", True, {"jepa_objective": "pair", "jepa_distance": "infonce"}),
    ],
)
def test_a_step_never_waits_for_the_device(data_path, folders, monkeypatch, kind, term, settings):
    """Tensors of the meta device hold no numbers: whatever reads one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    settings |= {"grad_accum_steps": 2, "jepa_lambda": 0.1 * term}
    run = make_run(folders.get(kind, data_path), **settings)
    run.share.device = torch.device("meta")
    run = train_gpt.build_run(run.cfg, run.data, run.share)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["fused"] = False  # there is no such kernel for the meta device
    result = train_gpt.training_step(run, 0, 0.0, 0.1 if term else None)
    assert result.ce.is_meta and result.grad_norm.is_meta
    assert result.term.is_meta if term else result.term is None
    with pytest.raises(RuntimeError):
        result.ce.item()


def test_a_cpu_run_calls_nothing_of_cuda(data_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.cuda was called")

    for name in ("synchronize", "set_device", "reset_peak_memory_stats", "Event"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", refuse)
    train_in_process(data_path, jepa_lambda=0.1, iterations=2)


# ---- a new objective is a class and a line in the table


def readme_objective():
    """The class in the README's Python block."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    return names["Later"]


Toy = readme_objective()


class ToySecondPass(Objective):
    """Compare the states with those of the row backwards, and look at lm's other methods."""

    def draw(self, batch, rng):
        return {"weight": torch.ones(batch.idx.shape), "idx": batch.idx.flip(1)}

    def loss(self, lm, batch, states, drawn):
        other = lm.states(drawn["idx"], batch.positions, batch.ends)
        assert lm.embed(batch.idx).shape == states.shape
        assert lm.logits(other).shape[:2] == batch.idx.shape
        return ((states - other).square().mean(-1) * drawn["weight"]).sum()


class ToyNext(Objective):
    """The state and the next token's embedding predict the next state."""

    def draw(self, batch, rng):
        return {"weight": batch.follows(1).float()}

    def views(self, lm, batch, states, drawn):
        return Views(states[:, :-1] + lm.embed(batch.idx[:, 1:]), states[:, 1:].detach())


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy_next", ToyNext)
    monkeypatch.setitem(OBJECTIVES, "toy", Toy)
    monkeypatch.setitem(OBJECTIVES, "second_pass", ToySecondPass)


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("name", ["toy", "second_pass", "toy_next"])
def test_a_toy_objective_trains_with_accumulation_and_diagnostics(
    toys, data_path, folders, kind, name
):
    path = data_path if kind == "text" else folders["pairs"]
    settings = dict(jepa_objective=name, jepa_lambda=0.5, iterations=20, train_seq_len=32)
    runs = [train_in_process(path, **settings, grad_accum_steps=n, diag_every=20) for n in (1, 2)]
    for curve in ("train_loss", "jepa_loss", "grad_ratio"):
        # float32 sums in another order, 20 steps of Muon apart
        expected = pytest.approx(runs[1].curve(curve), rel=2e-3)
        if kind == "text" or name != "second_pass":  # which counts the filler of packed rows
            assert runs[0].curve(curve) == expected
    assert runs[0].curve("jepa_loss")[-1] < runs[0].curve("jepa_loss")[0]
    numbers = [values for _, values in runs[0].rows if "grad_ratio" in values][-1]
    assert numbers["grad_ratio"] > 0
    assert ("jepa_shuffled" in numbers) == (name != "second_pass")


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_the_toy_s_term_is_its_definition(toys, data_path, folders, kind):
    """Of text inside document fragments, of pairs over the trunks, each encoded alone."""
    path = data_path if kind == "text" else folders["pairs"]
    settings = dict(jepa_objective="toy", jepa_lambda=0.5, jepa_predictor="linear")
    run = keep_gradients(shake(make_run(path, **settings, train_seq_len=32, grad_accum_steps=2)))
    distances, data = [], run.data
    if kind == "text":
        idx, _ = data.rows(1, run.share.rows, 0, run.share.rows)
        documents = [row.tolist() for row in idx]
    else:
        views = [data.sets["train"].views(e) for e in data.examples_of(1)]
        documents = [d.trunk for v in views for d in data.layout(v, None).documents]
    for tokens in documents:
        _, h = run.model._run_blocks(torch.tensor([tokens]), -1)
        for t in range(len(tokens) - 4):
            if kind == "pairs" or data.doc_token not in tokens[t + 1 : t + 5]:
                u = run.objective.predictor(h[0, t])
                distances.append(1 - F.cosine_similarity(u, h[0, t + 4], dim=0))
    found = train_gpt.training_step(run, 1, 0.0, 0.5).term.item()
    # float32 sums in another order
    assert found == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


TOY_LAUNCHER = """
import sys

sys.path[:0] = [{root!r}, {tests!r}]
import train_gpt
from nanojepa.objectives import OBJECTIVES
from test_training import Toy

OBJECTIVES["toy"] = Toy
train_gpt.main()
"""


@pytest.mark.slow
def test_a_toy_objective_on_two_ranks_equals_one(toys, data_path, run_id, tmp_path):
    launcher = tmp_path / "launch.py"
    paths = dict(root=str(ROOT), tests=str(ROOT / "tests"))
    launcher.write_text(textwrap.dedent(TOY_LAUNCHER.format(**paths)))
    settings = {**TINY, "data_path": data_path, "compile": 0, "jepa_objective": "toy"}
    settings |= {"jepa_lambda": 0.5, "grad_accum_steps": 2}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(launcher), *flags, f"--run_id={run_id}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    settings = {k: v for k, v in settings.items() if k not in TINY and k != "data_path"}
    one = train_in_process(data_path, **settings)
    two = [row["jepa_loss"] for row in metrics_of(run_id) if "jepa_loss" in row]
    # 1 - cos has an absolute rounding error, and the term falls to 0.005.
    assert two == pytest.approx(one.curve("jepa_loss"), rel=2e-4, abs=1e-5)


# ---- the loop


def test_a_term_lowers_itself(data_path):
    """The gradient points the right way: with a large weight the term falls."""
    curve = train_in_process(data_path, jepa_lambda=2.0, iterations=30).curve("jepa_loss")
    assert curve[-1] < curve[0] - 0.2


def test_training_learns(data_path):
    log = train_in_process(data_path, iterations=60)
    # The zero head begins uniform over the 300 tokens.
    assert log.curve("train_loss")[0] == pytest.approx(math.log(300), abs=0.1)
    assert log.curve("val_loss")[-1] < 3.5


def test_wallclock_cap_stops_and_drives_the_schedule(data_path, monkeypatch):
    """Progress is the larger of steps and seconds; warmdown and the term follow it."""
    clock = Clock(CPU, passed=4.0)
    assert clock.now() == 4.0
    ticks = iter(range(10_000))
    monkeypatch.setattr(Clock, "now", lambda self: 0.11 * next(ticks))
    cap = dict(max_wallclock_seconds=1.0, iterations=10_000)
    log = train_in_process(data_path, **cap, jepa_lambda=0.1, jepa_start_frac=0.5)
    assert 3 <= log.rows[-1][0] <= 10  # two or three looks at the clock a step
    with_term = [n for n, values in log.rows if "jepa_loss" in values]
    assert with_term and min(with_term) > 1


def test_warmdown_is_linear_to_zero(data_path):
    run = make_run(data_path, warmdown_frac=0.4)
    for progress, factor in ((0.0, 1), (0.6, 1), (0.8, 0.5), (0.95, 0.125)):
        assert train_gpt.lr_scale(run.cfg, progress) == pytest.approx(factor)
        train_gpt.training_step(run, 0, progress, None)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
    assert train_gpt.lr_scale(make_config(data_path, warmdown_frac=0.0), 0.99) == 1


def test_target_val_loss_stops(data_path):
    log = train_in_process(data_path, iterations=60, val_loss_every=5, target_val_loss=4.0)
    assert log.rows[-1][0] < 60 and log.curve("val_loss")[-1] <= 4.0 < log.curve("val_loss")[-2]
    assert any("target_val_loss:4.0 reached" in line for line in log.lines)


def test_train_gpt_s_default_objective_is_in_the_table():
    assert train_gpt.Config().jepa_objective in OBJECTIVES


# ---- diagnostics


def flat_gradient(loss, model):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def test_diagnostics_against_gradients_written_out(data_path):
    run = make_run(data_path, jepa_lambda=0.7, jepa_spans=2, grad_accum_steps=2, diag_every=3)
    shake(run)
    before = {name: w.clone() for name, w in run.model.state_dict().items()}
    numbers = diagnose(run, 5, train_gpt.training_loss)
    assert all(torch.equal(w, before[name]) for name, w in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())

    rows = run.share.rows
    idx, targets = run.data.rows(5, rows, 0, rows)
    *places, weight = drawn_spans(run, 5, idx)
    x, h = run.model._run_blocks(idx, -1)
    ce = F.cross_entropy(run.model.logits(x).flatten(0, 1), targets.flatten())
    g = flat_gradient(ce, run.model)
    j = flat_gradient(0.7 * span_distances(h, places, weight, "cosine").mean(), run.model)
    assert numbers["grad_ratio"] == pytest.approx((j.norm() / g.norm()).item(), rel=1e-4)
    cosine = F.cosine_similarity(j, g, dim=0).item()
    assert numbers["grad_cosine"] == pytest.approx(cosine, abs=1e-4)

    distances = []  # of the first micro-batch of eight steps: here half of the rows
    for step in range(5, 13):
        idx, _ = run.data.rows(step, rows, 0, rows)
        *places, weight = drawn_spans(run, step, idx)
        half = [x[: run.share.micro_rows] for x in (*places, weight)]
        h = run.model._run_blocks(idx[: run.share.micro_rows], -1)[1].detach()
        distances.append(span_distances(h, half[:-1], half[-1], "cosine"))
    matched = torch.cat(distances).mean().item()
    assert numbers["jepa_matched"] == pytest.approx(matched, rel=1e-4)
    assert abs(numbers["jepa_shuffled"] - matched) > 0.1
    assert not list(diagnostic_warnings(numbers, run.cfg.model_dim))
    # 1.707 for random states, and 1.5 if a span touches its fragment's end
    assert 1 <= numbers["effective_rank"] <= 32 and 1.45 < numbers["jepa_independent"] < 1.75


def test_a_run_with_diagnostics_is_the_run_without(data_path):
    plain, watched = (
        train_in_process(data_path, jepa_lambda=0.1, iterations=7, diag_every=every)
        for every in (0, 3)
    )
    rows = [(n, values) for n, values in watched.rows if "grad_ratio" in values]
    assert [n for n, _ in rows] == [0, 3, 6, 7]
    assert [row for row in watched.rows if "grad_ratio" not in row[1]] == plain.rows


@pytest.mark.parametrize(
    "term",
    [
        dict(jepa_lambda=0.0),
        dict(jepa_lambda=0.1, jepa_distance="infonce"),
        dict(jepa_lambda=0.1, jepa_layer=0, jepa_norm=1, jepa_predictor="linear"),
    ],
)
def test_diagnostics_of_other_settings(data_path, term):
    log = train_in_process(data_path, diag_every=8, **term)
    rows = [values for _, values in log.rows if "grad_ratio" in values]
    assert len(rows) == 2
    assert all(np.isfinite(list(values.values())).all() for values in rows)
    assert (rows[1]["grad_ratio"] > 0) == (term["jepa_lambda"] > 0)


def test_a_model_of_constant_states_is_warned_of(data_path):
    run = make_run(data_path, jepa_lambda=0.1, diag_every=1)
    with torch.no_grad():
        embedding = run.model.embed.weight
        embedding.copy_(embedding[:1].expand_as(embedding))
    numbers = diagnose(run, 0, train_gpt.training_loss)
    assert numbers["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert numbers["state_cosine"] == pytest.approx(1, abs=1e-4)
    assert numbers["jepa_matched"] == numbers["jepa_shuffled"]
    collapse, same = diagnostic_warnings(numbers, run.cfg.model_dim)
    assert "effective rank 1.0, under 10% of the width 32" in collapse
    assert "doesn't tell them apart" in same
    assert len(list(diagnostic_warnings(numbers, 32, has_term=False))) == 1
    log = train_in_process(data_path, jepa_lambda=0.1, diag_every=4)
    assert not any("effective rank" in line for line in log.lines)


def test_states_that_are_not_finite_stop_the_run_in_one_line(data_path):
    run = make_run(data_path, jepa_lambda=0.1, diag_every=1)
    with torch.no_grad():
        run.model.blocks[0].fc.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="non-finite states at step 7: lower the learning rates"):
        diagnose(run, 7, train_gpt.training_loss)


# ---- optimizers


@pytest.mark.parametrize("tie", [False, True])
def test_optimizers_cover_each_parameter_exactly_once_and_each_gets_a_gradient(data_path, tie):
    settings = dict(tie_embeddings=tie, jepa_lambda=0.1, jepa_predictor="linear")
    run = make_run(data_path, **settings)
    held = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, run.parameters()))
    matrices = {id(m.weight) for m in run.model.blocks.modules() if isinstance(m, Linear)}
    assert {id(p) for p in run.optimizers[0].param_groups[0]["params"]} == matrices
    before = [p.detach().clone() for p in held]
    # The zero-initialised projections and head need a step before the gradient passes them.
    for step in range(3):
        train_gpt.training_step(run, step, 0.0, 0.1)
    assert not any(torch.equal(p, old) for p, old in zip(held, before, strict=True))


def test_adamw_has_every_parameter_once_and_weight_decay_for_the_matrices_alone(data_path):
    settings = dict(optimizer="adamw", adamw_lr=0.002, jepa_predictor="linear", jepa_lambda=0.1)
    run = make_run(data_path, **settings)
    (optimizer,) = run.optimizers
    assert type(optimizer) is torch.optim.AdamW
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, run.parameters()))
    matrices = {id(m.weight) for m in run.model.blocks.modules() if isinstance(m, Linear)}
    (decayed,) = [g for g in optimizer.param_groups if g["weight_decay"]]
    assert {id(p) for p in decayed["params"]} == matrices and decayed["initial_lr"] == 0.002


def test_the_optimizer_and_its_rates_reach_the_weights(data_path):
    settings = [{}, {"optimizer": "adamw"}, {"optimizer": "adamw", "adamw_lr": 0.01}]
    settings += [{"jepa_lambda": 0.1}, {"muon_momentum": 0.8}, {"matrix_lr": 0.01}]
    losses = {train_in_process(data_path, **each).curve("val_loss")[-1] for each in settings}
    assert len(losses) == len(settings)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 8), (2, 8, 32)])
def test_orthogonalize_keeps_singular_vectors_and_sends_values_near_one(shape):
    g = torch.randn(shape, dtype=torch.float64)
    S = torch.linalg.svdvals(orthogonalize(g))
    assert S.min() > 0.6 and S.max() < 1.25  # the band the published coefficients give
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    middle = u.mT @ orthogonalize(g) @ vh.mT  # diagonal if singular vectors are kept
    diagonal = torch.diag_embed(middle.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(middle, diagonal, rtol=0, atol=1e-9)


def test_weight_decay_shrinks_the_blocks_matrices_alone(data_path):
    """Without gradients' part: the difference that it makes is the learning rate times its size."""
    settings = dict(jepa_lambda=0.1, jepa_predictor="linear")
    before = shake(make_run(data_path, **settings))
    kept = {name: p.detach().clone() for name, p in before.model.named_parameters()}
    plain, decayed = (
        shake(make_run(data_path, **settings, muon_weight_decay=d)) for d in (0.0, 0.5)
    )
    for run in (plain, decayed):
        train_gpt.training_step(run, 0, 0.0, 0.1)
    blocks = {id(m.weight) for m in decayed.model.blocks.modules() if isinstance(m, Linear)}
    for (name, p), q in zip(
        decayed.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        shrunk = 0.04 * 0.5 * kept[name] if id(p) in blocks else 0.0
        torch.testing.assert_close(p, q - shrunk, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain.objective.predictor.weight, decayed.objective.predictor.weight)


def test_muon_matches_one_matrix_at_a_time():
    """Stacked by shape, against the definition: Nesterov momentum, orthogonalised, scaled."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 8), (16, 8), (8, 8), (8, 16))]
    slow, momentum = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    muon = Muon(params, lr=0.1, momentum=0.9, dtype=torch.float32)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.9 * momentum[i] + 0.1 * p.grad
            update = orthogonalize((0.1 * p.grad + 0.9 * momentum[i])[None])[0]
            slow[i] -= 0.1 * max(1, p.size(0) / p.size(1)) ** 0.5 * update
        muon.step()
    for p, q in zip(params, slow, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)
