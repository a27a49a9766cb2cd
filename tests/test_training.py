"""The training step really used: its graphs, its sums over micro-batches and ranks, its schedule, its optimizers."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jepa
import loader
import train_gpt
from conftest import make_config, result_of, run_cli, train_in_process
from model import GPT, Linear


def setup(data_path, **settings):
    cfg = make_config(data_path, **settings)
    data = loader.TokenData(cfg)
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    return cfg, data, share, train_gpt.build_model(cfg, data.vocab_size, share.device)


class GraphRecorder:
    """A torch.compile backend that keeps every captured FX graph and runs it as it is."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, example_inputs):
        number = {node: i for i, node in enumerate(graph_module.graph.nodes)}  # names follow Python variables: compare structure
        self.graphs.append([(n.op, n.op == "placeholder" or n.target, *torch.fx.node.map_arg((n.args, n.kwargs), lambda m: f"node {number[m]}"))
                            for n in graph_module.graph.nodes])
        return graph_module

    def compile(self, f):
        torch._dynamo.reset()
        return torch.compile(f, backend=self, fullgraph=True, dynamic=False)


# ---- the off switch


def test_with_lambda_0_the_graph_is_that_of_a_model_that_never_heard_of_jepa(data_path):
    cfg, data, share, model = setup(data_path)
    idx, targets = data.batch(0, share.rows, 0, share.rows)
    count = share.rows * cfg.train_seq_len

    def baseline(model: GPT, idx, targets):
        return (model(idx, targets) / count,)

    plain, off = GraphRecorder(), GraphRecorder()
    plain.compile(baseline)(model, idx, targets)[0].backward()
    loss_fn = off.compile(train_gpt.training_loss)
    for step in range(3):
        train_gpt.accumulate_gradients(model, loss_fn, cfg, data, share, step, train_gpt.jepa_schedule(cfg, step / 3, step))
    assert len(plain.graphs) == len(off.graphs) == 1
    assert off.graphs == plain.graphs


def test_with_the_term_there_is_exactly_one_more_graph_however_spans_and_weight_vary(data_path):
    recorder = GraphRecorder()
    cfg = make_config(data_path, jepa_lambda=0.1, jepa_start_frac=0.25, jepa_warmup_frac=0.5, jepa_end_frac=0.9, jepa_spans=2, iterations=12)
    train_in_process(cfg, recorder.compile(train_gpt.training_loss), warm_up=True)
    assert len(recorder.graphs) == 2
    recorder = GraphRecorder()
    train_in_process(make_config(data_path, jepa_lambda=0.1), recorder.compile(train_gpt.training_loss), warm_up=True)
    assert len(recorder.graphs) == 1


def test_needed_graphs():
    graphs = lambda **k: train_gpt.needed_graphs(train_gpt.Config(**k))
    assert graphs() == [None]
    assert graphs(jepa_lambda=0.1) == graphs(jepa_lambda=0.1, jepa_warmup_frac=0.5) == [0.1]
    assert graphs(jepa_lambda=0.1, jepa_update="decoupled") == [None, 0.1] and graphs(jepa_update="decoupled") == [None]
    assert graphs(jepa_lambda=0.1, jepa_start_frac=0.5) == graphs(jepa_lambda=0.1, jepa_end_frac=0.5) == [None, 0.1]


def test_off_is_bit_identical_whatever_the_other_knobs_say(data_path):
    _, plain = train_in_process(make_config(data_path))
    _, off = train_in_process(make_config(data_path, jepa_lambda=0.0, jepa_max_span_frac=0.9, jepa_spans=3, jepa_layer=1, jepa_distance="mse"))
    assert plain.curve("train_loss") == off.curve("train_loss") and not off.curve("jepa_loss")
    assert plain.curve("val_loss") == off.curve("val_loss")


def test_a_term_that_starts_halfway_leaves_the_first_half_untouched(data_path):
    _, off = train_in_process(make_config(data_path, iterations=10))
    _, late = train_in_process(make_config(data_path, iterations=10, jepa_lambda=0.5, jepa_start_frac=0.5))
    # the loss of step 6 is that of the weights after 5 plain steps; the term's gradient shows from step 7 on
    assert off.curve("train_loss")[:6] == late.curve("train_loss")[:6]
    assert off.curve("train_loss")[6] != late.curve("train_loss")[6]
    assert [n for n, values in late.rows if "jepa_loss" in values] == [6, 7, 8, 9, 10]


def test_ratio_drops_the_term_from_whole_steps(data_path):
    seed = next(n for n in range(100) if [jepa.keeps_term(n, step, 0.5) for step in range(4)] == [False, False, False, True])
    _, off = train_in_process(make_config(data_path, iterations=10, seed=seed))
    _, some = train_in_process(make_config(data_path, iterations=10, seed=seed, jepa_lambda=0.5, jepa_ratio=0.5))
    assert [n - 1 for n, values in some.rows if "jepa_loss" in values] == [step for step in range(10) if jepa.keeps_term(seed, step, 0.5)]
    # the loss of the fourth step is that of three plain ones; its own term shows in the fifth
    assert some.curve("train_loss")[:4] == off.curve("train_loss")[:4] and some.curve("train_loss")[4] != off.curve("train_loss")[4]
    _, whole = train_in_process(make_config(data_path, iterations=10, seed=seed, jepa_lambda=0.5))
    assert len(whole.curve("jepa_loss")) == 10


@pytest.mark.parametrize("late", [dict(jepa_lambda=0.1, jepa_start_frac=0.5), dict(jepa_lambda=0.1, jepa_update="decoupled", diag_every=3)])
def test_warm_up_leaves_no_trace(data_path, late):
    _, cold = train_in_process(make_config(data_path, **late))
    _, warm = train_in_process(make_config(data_path, **late), train_gpt.training_loss, warm_up=True)
    assert cold.rows == warm.rows


# ---- what a step computes


@pytest.mark.parametrize("layer, distance, spans, by_document", [(-1, "cosine", 1, True), (0, "mse", 3, True), (1, "l2", 2, False), (2, "cosine", 2, True)])
def test_losses_and_gradients_of_a_step_match_one_written_out(data_path, layer, distance, spans, by_document):
    """CE is the mean over all targets, JEPA over all spans of the global batch; documents without a span do not count."""
    cfg, data, share, model = setup(data_path, jepa_lambda=0.7, jepa_layer=layer, jepa_distance=distance, jepa_spans=spans,
                                     jepa_doc=by_document, grad_accum_steps=2, train_batch_tokens=512)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    losses, _ = train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, 3, 0.7)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    idx, targets = data.batch(3, share.rows, 0, share.rows)
    a, b, start, end, weight = loader.draw_spans(cfg, data, share, 3, idx)
    x, h = model._run_blocks(idx, layer)
    ce = torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten())
    distances = []
    for row in range(share.rows):
        for s in range(spans):
            if weight[row, s] > 0:
                i, j, p, q = (t[row, s] for t in (a, b, start, end))
                context, patch = (h[row, i - 1] - h[row, p]) + (h[row, q] - h[row, j]), h[row, j] - h[row, i - 1]
                difference = context - patch
                cosine = torch.nn.functional.cosine_similarity(context, patch, dim=0) if min(context.norm(), patch.norm()) > 1e-3 * h[row, j].norm() else torch.tensor(0.0)
                distances.append({"cosine": 1 - cosine, "l2": difference.norm(),
                                  "mse": difference.square().mean()}[distance])
    term = torch.stack(distances).mean()
    (ce + 0.7 * term).backward()
    # two micro-batches against one batch: float32 rounding of sums over some hundred targets
    assert losses.tolist() == pytest.approx([ce.item(), term.item()], rel=1e-5)
    for ours, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-6)


def test_rows_hold_spans_and_documents_without_one(data_path):
    """The data of these tests must contain what they are about: rows with several documents, and unequal span counts."""
    cfg, data, share, _ = setup(data_path, train_seq_len=4, train_batch_tokens=256, jepa_lambda=0.1)
    idx, _ = data.batch(0, share.rows, 0, share.rows)
    assert ((idx == data.doc_token).sum(1) > 1).any()
    halves = [loader.draw_spans(cfg, data, share, step, data.batch(step, share.rows, 0, share.rows)[0])[4].gt(0).view(2, -1).sum(1)
              for step in range(6)]  # those of the run on two ranks below
    assert any(x[0] != x[1] for x in halves)


@pytest.mark.parametrize("accum, distance", [(2, "cosine"), (4, "cosine"), (4, "infonce")])
def test_accumulation_gives_the_same_curve(data_path, accum, distance):
    """InfoNCE too: its negatives are the step's, not the micro-batch's."""
    curves = [train_in_process(make_config(data_path, train_seq_len=8, jepa_lambda=0.1, grad_accum_steps=n, jepa_distance=distance))[1] for n in (1, accum)]
    for name in ("train_loss", "jepa_loss", "val_loss"):
        # float32 sums in another order, 8 steps of Muon apart
        assert curves[0].curve(name) == pytest.approx(curves[1].curve(name), rel=2e-4)


@pytest.mark.parametrize("accum", [2])
def test_two_ranks_with_unequal_span_counts_equal_one_compiled(data_path, run_id, accum):
    flags = ["--train_seq_len=4", "--jepa_lambda=0.1", "--compile=1", "--iterations=6", "--vocab_size=320", "--num_layers=2"]
    one, two = f"{run_id}-one", f"{run_id}-two"
    for name, ranks, accum_flag in ((one, 0, 1), (two, 2, accum)):
        done = run_cli(data_path, *flags, f"--grad_accum_steps={accum_flag}", f"--run_id={name}", ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    curves = [[json.loads(line) for line in open(train_gpt.ROOT / "logs" / name / "metrics.jsonl")] for name in (one, two)]
    assert len(curves[0]) == len(curves[1]) == 7
    for x, y in zip(*curves):
        for key in x.keys() - {"train_time"}:
            assert x[key] == pytest.approx(y[key], rel=2e-4)
    for key in ("val_loss", "val_bpb", "quantized_val_bpb"):
        assert result_of(one)[key] == pytest.approx(result_of(two)[key], rel=2e-4)


@pytest.mark.parametrize("flags", [["--jepa_update=decoupled"], ["--jepa_update=decoupled", "--optimizer=adamw", "--jepa_layer=0"]])
def test_two_ranks_with_an_update_of_the_term_s_own_and_diagnostics_equal_one(data_path, run_id, flags):
    """Rank 0 of two has the rows of the first of one's two micro-batches, on which the diagnostics of states are."""
    one, two = f"{run_id}-one", f"{run_id}-two"
    for name, ranks, accum in ((one, 0, 2), (two, 2, 1)):
        done = run_cli(data_path, *flags, "--jepa_lambda=0.3", "--iterations=4", "--diag_every=2", f"--grad_accum_steps={accum}", f"--run_id={name}", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    curves = [[json.loads(line) for line in open(train_gpt.ROOT / "logs" / name / "metrics.jsonl")] for name in (one, two)]
    assert len(curves[0]) == len(curves[1]) == 4 + 3 + 1
    for x, y in zip(*curves):
        for key in x.keys() - {"train_time"}:
            assert x[key] == pytest.approx(y[key], rel=2e-3, abs=1e-4), key  # cosines of differences of states lose digits
    assert result_of(one)["grad_ratio"] == pytest.approx(curves[0][-1]["grad_ratio"])  # the last ones


def test_two_compiled_runs_on_two_threads_are_identical(data_path, run_id):
    # 2,048 tokens a step over a vocabulary of 300: every embedding row gets many gradients, which atomic adds would shuffle
    flags = ["--compile=1", "--jepa_lambda=0.1", "--train_batch_tokens=2048", "--iterations=6", "--num_layers=1"]
    for name in ("1", "2"):
        done = run_cli(data_path, f"--run_id={run_id}-{name}", *flags, env={"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0 and "CPU: 2 threads" in (train_gpt.ROOT / "logs" / f"{run_id}-{name}" / "log.txt").read_text(), done.stderr
    first, second = ((train_gpt.ROOT / "logs" / f"{run_id}-{name}" / "model.safetensors").read_bytes() for name in ("1", "2"))
    assert first == second


def test_a_cpu_run_calls_nothing_of_cuda(data_path, monkeypatch):
    """FIELD's mistake 7."""
    def refuse(*args, **kwargs):
        raise AssertionError("torch.cuda was called")
    for name in ("synchronize", "set_device", "reset_peak_memory_stats", "max_memory_allocated", "Event"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    train_in_process(make_config(data_path, jepa_lambda=0.1, iterations=2))


# ---- the loop


def test_a_term_lowers_itself(data_path):
    """The JEPA gradient points the right way: with a large weight the term falls."""
    _, with_term = train_in_process(make_config(data_path, jepa_lambda=2.0, iterations=30))
    assert with_term.curve("jepa_loss")[-1] < with_term.curve("jepa_loss")[0] - 0.2


def test_training_learns(data_path):
    _, log = train_in_process(make_config(data_path, iterations=60))
    assert log.curve("train_loss")[0] == pytest.approx(math.log(300), abs=0.1)  # the zero head begins uniform
    assert log.curve("val_loss")[-1] < 3.5


def test_wallclock_cap_stops_and_drives_the_schedule(data_path, monkeypatch):
    """Progress is the larger of steps and seconds; warm-down and the term follow it."""
    cfg, _, share, _ = setup(data_path, max_wallclock_seconds=10.0, iterations=100)
    clock = train_gpt.Clock(share.device)
    clock.passed = 4.0
    assert train_gpt.run_progress(cfg, 20, 0, clock, share) == (0.4, 0, False)
    assert train_gpt.run_progress(cfg, 70, 0, clock, share) == (0.7, 0, False)
    monkeypatch.setattr(train_gpt.Clock, "now", lambda self: 0.11 * next(self.ticks))
    monkeypatch.setattr(train_gpt.Clock, "ticks", iter(range(10_000)), raising=False)
    _, log = train_in_process(make_config(data_path, max_wallclock_seconds=1.0, iterations=10_000, jepa_lambda=0.1, jepa_start_frac=0.5))
    assert 3 <= log.rows[-1][0] <= 10  # two or three looks at the clock a step
    with_term = [n for n, values in log.rows if "jepa_loss" in values]
    assert with_term and min(with_term) > 1


def test_warmdown_is_linear_to_zero(data_path):
    cfg, data, share, model = setup(data_path, warmdown_frac=0.4)
    optimizers = train_gpt.build_optimizers(model, cfg)
    for progress, factor in ((0.0, 1), (0.6, 1), (0.8, 0.5), (0.95, 0.125)):
        train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, 0, None)
        train_gpt.apply_gradients(optimizers, progress, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["initial_lr"] * factor)


def test_target_val_loss_stops(data_path):
    cfg = make_config(data_path, iterations=60, val_loss_every=5, target_val_loss=4.0)
    _, log = train_in_process(cfg)
    assert log.rows[-1][0] < 60 and log.curve("val_loss")[-1] <= 4.0 < log.curve("val_loss")[-2]
    assert any("target_val_loss:4.0 reached" in line for line in log.lines)


# ---- the decoupled update


def shaken(model):
    """The model with every weight moved: at its zero-initialised projections many gradients are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("optimizer, layer", [("muon", -1), ("muon", 0), ("adamw", -1)])
def test_a_decoupled_step_is_the_plain_step_and_then_one_of_the_term(data_path, optimizer, layer):
    """Against two models and two sets of optimizers written out: the cross entropy's on all rows, the term's on every fourth."""
    shared = dict(optimizer=optimizer, jepa_layer=layer, train_batch_tokens=512, warmdown_frac=0.0)
    cfg, data, share, model = setup(data_path, jepa_lambda=0.3, jepa_update="decoupled", jepa_rows_frac=0.25, **shared)
    plain_cfg, _, _, slow = setup(data_path, **shared)
    for m in (model, slow):
        shaken(m)
    updates, (ce, term) = train_gpt.build_updates(model, cfg), [train_gpt.build_optimizers(slow, plain_cfg) for _ in range(2)]
    for step in range(3):
        losses, _ = train_gpt.training_step(model, train_gpt.training_loss, updates, cfg, data, share, step, 0.0, 0.3)
        expected, _ = train_gpt.accumulate_gradients(slow, train_gpt.training_loss, plain_cfg, data, share, step, None)
        train_gpt.apply_gradients(ce, 0.0, plain_cfg)
        idx, _ = data.batch(step, share.rows, 0, share.rows)
        a, b, start, end, weight = loader.draw_spans(cfg, data, share, step, idx)
        rows = torch.arange(3, share.rows, 4)  # 16 rows: 3, 7, 11, 15
        _, h = slow._run_blocks(idx[rows], layer)
        u, v = jepa.span_views(h, *(x[rows] for x in (a, b, start, end)))
        value = jepa.distance(u, v, "cosine", weight[rows] / weight[rows].sum(), jepa.noise_floor(h, b[rows]))
        value.backward()
        for o in term:
            for group in o.param_groups:
                group["lr"], group["weight_decay"] = 0.3 * group["initial_lr"], 0.0
            o.step()
            o.zero_grad()
        torch.testing.assert_close(losses[:2], torch.stack((expected[0], value.detach())), rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), slow.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)  # float32 sums in another order, three steps


def test_a_term_without_a_gradient_moves_nothing_however_large_its_weight(data_path):
    """Its AdamW has no weight decay of its own: the cross entropy's has done that."""
    cfg, data, share, model = setup(data_path, optimizer="adamw", jepa_lambda=5.0, jepa_update="decoupled")
    _, updates = shaken(model), train_gpt.build_updates(model, cfg)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    train_gpt.apply_gradients(updates[1], 0.0, cfg, 5.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert [group["weight_decay"] for group in updates[0][0].param_groups].count(0.1) == 1


def test_decoupled_with_next_to_no_weight_is_the_plain_run_and_its_plain_graph(data_path):
    _, off = train_in_process(make_config(data_path))
    recorder = GraphRecorder()
    _, on = train_in_process(make_config(data_path, jepa_lambda=1e-12, jepa_update="decoupled"), recorder.compile(train_gpt.training_loss), warm_up=True)
    assert on.curve("train_loss") == pytest.approx(off.curve("train_loss"), rel=1e-5) and len(on.curve("jepa_loss")) == 8
    plain = GraphRecorder()
    train_in_process(make_config(data_path), plain.compile(train_gpt.training_loss))
    assert len(recorder.graphs) == 2 and recorder.graphs[0] == plain.graphs[0]
    _, coupled = train_in_process(make_config(data_path, jepa_lambda=1e-12))
    assert coupled.curve("train_loss") == pytest.approx(off.curve("train_loss"), rel=1e-2)  # what orthogonalising makes of 1e-12 is more than rounding


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.floats(0.01, 1))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_rows_of_the_term_depend_on_neither_ranks_nor_accumulation(data_path, ranks, accum, micro_rows, fraction):
    rows = ranks * accum * micro_rows
    cfg = make_config(data_path, train_batch_tokens=rows * 32, jepa_lambda=0.1, jepa_update="decoupled", jepa_rows_frac=fraction, jepa_doc=False)
    data = loader.open_data(cfg)

    def weighted_rows(ranks, accum):
        found, shapes = [], set()
        for rank in range(ranks):
            share = train_gpt.Share(rank, 1, torch.device("cpu"), rows, rows // ranks, rank * rows // ranks, rows // ranks // accum)  # no process group: one rank's loader at a time
            for batch in data.load(2, share, True, fraction)[0]:
                shapes.add(batch.idx.shape)
                found += [(tuple(i.tolist()), tuple(map(int, at))) for i, *at, w in zip(batch.idx, *(x[:, 0] for x in batch.views)) if w > 0]
        return found, shapes

    (one, _), (many, shapes) = weighted_rows(1, 1), weighted_rows(ranks, accum)
    assert one == many and len(one) == max(1, round(fraction * rows)) and len(shapes) == 1


def test_adamw_has_every_parameter_once_and_weight_decay_for_the_matrices_alone(data_path):
    cfg, data, share, model = setup(data_path, optimizer="adamw", adamw_lr=0.002, jepa_predictor="linear", jepa_objective="pair", jepa_lambda=0.1)
    assert model.predictor is not None
    (optimizer,) = train_gpt.build_optimizers(model, cfg)
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, model.parameters()))
    matrices = {id(m.weight) for m in model.blocks.modules() if isinstance(m, Linear)}
    decayed = [g for g in optimizer.param_groups if g["weight_decay"]]
    assert len(decayed) == 1 and {id(p) for p in decayed[0]["params"]} == matrices and decayed[0]["initial_lr"] == 0.002 and type(optimizer) is torch.optim.AdamW
    _, muon = train_in_process(make_config(data_path))
    _, adamw = train_in_process(make_config(data_path, optimizer="adamw"))
    _, faster = train_in_process(make_config(data_path, optimizer="adamw", adamw_lr=0.01))
    assert len({log.curve("val_loss")[-1] for log in (muon, adamw, faster)}) == 3


# ---- diagnostics


def test_diagnostics_against_gradients_written_out_and_the_run_is_untouched(data_path):
    cfg, data, share, model = setup(data_path, jepa_lambda=0.7, jepa_spans=2, grad_accum_steps=2, diag_every=3)
    shaken(model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    found = train_gpt.diagnose(model, train_gpt.training_loss, cfg, data, share, 5)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    idx, targets = data.batch(5, share.rows, 0, share.rows)
    *places, weight = loader.draw_spans(cfg, data, share, 5, idx)
    x, h = model._run_blocks(idx, -1)
    ce = torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), targets.flatten())
    term = 0.7 * jepa.distance(*jepa.span_views(h, *places), "cosine", weight, jepa.noise_floor(h, places[1]))
    g, j = (torch.cat([torch.zeros_like(p).flatten() if t is None else t.flatten() for p, t in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True))])
            for loss in (ce, term))
    assert found["grad_ratio"] == pytest.approx((j.norm() / g.norm()).item(), rel=1e-4)
    assert found["grad_cosine"] == pytest.approx((j @ g / j.norm() / g.norm()).item(), abs=1e-4)
    views = []  # of the first micro-batch of eight steps: here half of the rows
    for step in range(5, 13):
        rows = data.batch(step, share.rows, 0, share.rows)[0][:share.micro_rows]
        *at, weight = loader.draw_spans(cfg, data, share, step, data.batch(step, share.rows, 0, share.rows)[0])
        h = model._run_blocks(rows, -1)[1].detach()
        u, v = jepa.span_views(h, *(x[:share.micro_rows] for x in at))
        floor = jepa.noise_floor(h, at[1][:share.micro_rows])
        views += [(u[i, s], v[i, s], floor[i, s]) for i in range(len(rows)) for s in range(2) if weight[i, s] > 0]
    cosine = lambda u, v, least: float(u @ v / u.norm() / v.norm()) if u.norm() > least and v.norm() > least else 0.0
    matched = [1 - cosine(u, v, least) for u, v, least in views]
    shuffled = [1 - cosine(u, views[i - len(views) // 2][1], least) for i, (u, _, least) in enumerate(views)]
    assert found["jepa_matched"] == pytest.approx(sum(matched) / len(views), rel=1e-4)
    assert found["jepa_shuffled"] == pytest.approx(sum(shuffled) / len(views), rel=1e-4) and abs(found["jepa_shuffled"] - found["jepa_matched"]) > 0.1
    assert not list(jepa.diagnostic_warnings(found, cfg.model_dim))
    assert 1 <= found["effective_rank"] <= 32 and 1.45 < found["jepa_independent"] < 1.75  # 1.707, and 1.5 where a span touches its fragment's end
    plain, watched = (train_in_process(make_config(data_path, jepa_lambda=0.1, iterations=7, diag_every=every)) for every in (0, 3))
    names = set(found)
    assert [n for n, values in watched[1].rows if names <= values.keys()] == [0, 3, 6, 7]
    assert [row for row in watched[1].rows if not names <= row[1].keys()] == plain[1].rows


@pytest.mark.parametrize("term", [dict(jepa_lambda=0.0), dict(jepa_lambda=0.1, jepa_update="decoupled"), dict(jepa_lambda=0.1, jepa_distance="infonce"), dict(jepa_lambda=0.1, jepa_layer=0, jepa_norm=1)])
def test_diagnostics_of_other_settings(data_path, term):
    _, log = train_in_process(make_config(data_path, diag_every=8, **term), warm_up=True, loss_fn=train_gpt.training_loss)
    rows = [values for _, values in log.rows if "grad_ratio" in values]
    assert len(rows) == 2 and all(np.isfinite(list(values.values())).all() for values in rows)
    assert (rows[1]["grad_ratio"] > 0) == (term["jepa_lambda"] > 0)


def test_a_model_of_constant_states_is_warned_of(data_path):
    cfg, data, share, model = setup(data_path, jepa_lambda=0.1, diag_every=1)
    with torch.no_grad():
        model.embed.weight.copy_(model.embed.weight[:1].expand_as(model.embed.weight))
    found = train_gpt.diagnose(model, train_gpt.training_loss, cfg, data, share, 0)
    warnings = list(jepa.diagnostic_warnings(found, cfg.model_dim))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-4) and found["state_cosine"] == pytest.approx(1, abs=1e-4) and found["jepa_matched"] == found["jepa_shuffled"]
    assert len(warnings) == 2 and "effective rank 1.0, under 10% of the width 32" in warnings[0] and "doesn't tell them apart" in warnings[1]
    _, log = train_in_process(make_config(data_path, jepa_lambda=0.1, diag_every=4))
    assert not any("effective rank" in line for line in log.lines)
    _, off = train_in_process(make_config(data_path, jepa_lambda=0.0, diag_every=4, embed_lr=0.0))
    assert not any("tell them apart" in line for line in off.lines)  # there is no term


def test_states_that_are_not_finite_stop_the_run_in_one_line(data_path):
    cfg, data, share, model = setup(data_path, jepa_lambda=0.1, diag_every=1)
    with torch.no_grad():
        model.blocks[0].fc.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="non-finite states at step 7: lower the learning rates"):
        train_gpt.diagnose(model, train_gpt.training_loss, cfg, data, share, 7)


# ---- optimizers


@pytest.mark.parametrize("tie", [False, True])
def test_optimizers_cover_each_parameter_exactly_once_and_each_gets_a_gradient(data_path, tie):
    cfg, data, share, model = setup(data_path, tie_embeddings=tie, jepa_lambda=0.1)
    optimizers = train_gpt.build_optimizers(model, cfg)
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    matrices = {id(m.weight) for m in model.blocks.modules() if isinstance(m, Linear)}
    assert {id(p) for p in optimizers[0].param_groups[0]["params"]} == matrices
    before = {n: p.clone() for n, p in model.named_parameters()}
    for step in range(3):  # the zero-initialised projections and head need a step before the gradient passes them
        train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, step, 0.1)
        if step == 2:
            assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
        train_gpt.apply_gradients(optimizers, 0.0, cfg)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 32, 8), (2, 8, 32)])
def test_orthogonalize_keeps_singular_vectors_and_sends_values_near_one(shape):
    g = torch.randn(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(train_gpt.orthogonalize(g), full_matrices=False)
    assert 0.6 < S.min() and S.max() < 1.25  # the band the published coefficients give
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    middle = u.mT @ train_gpt.orthogonalize(g) @ vh.mT  # diagonal where the singular vectors are kept
    torch.testing.assert_close(middle, torch.diag_embed(middle.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-9)


def test_muon_matches_one_matrix_at_a_time():
    """Stacked by shape, against the definition: Nesterov momentum, orthogonalised, scaled, per matrix."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 8), (16, 8), (8, 8), (8, 16))]
    slow, momentum = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    muon = train_gpt.Muon(params, lr=0.1, momentum=0.9, dtype=torch.float32)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.9 * momentum[i] + 0.1 * p.grad
            update = train_gpt.orthogonalize((0.1 * p.grad + 0.9 * momentum[i])[None])[0]
            slow[i] -= 0.1 * max(1, p.size(0) / p.size(1)) ** 0.5 * update
        muon.step()
    for p, q in zip(params, slow):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)


def test_jepa_lambda_reaches_the_optimizer_through_the_step(data_path):
    _, off = train_in_process(make_config(data_path))
    _, on = train_in_process(make_config(data_path, jepa_lambda=0.1))
    assert off.curve("val_loss") != on.curve("val_loss")
    assert jepa.DISTANCES[0] == train_gpt.Config.jepa_distance
