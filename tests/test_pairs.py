"""Packed trees against each view alone, the step as a set of examples, and the mistakes of FIELD.md that pairs invite.

The reference knows nothing of layouts: it encodes every view of every example by itself, unpacked, plain causal.
"""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import jepa
import loader
import train_gpt
from conftest import ROOT, TINY, make_set, result_of, run_cli, train_in_process
from model import GPT, GPTConfig, norm, tree_mask

# float32 states of size 1 after three blocks whose sums run in another order
STATES = dict(rtol=1e-5, atol=1e-5)
MARKER, SEPARATOR, FIRST_PRED, VOCAB = 20, 21, 22, 32


def make_config(folder, **changes):
    return train_gpt.Config(**{**TINY, "data_path": folder, "jepa_objective": "pair", "train_batch_tokens": 256, "grad_accum_steps": 4, **changes})


def open_pairs(folder, world_size=1, rank=0, **changes):
    cfg = make_config(folder, **changes)
    data = loader.open_data(cfg)
    return cfg, data, train_gpt.divide_batch(cfg, rank, world_size, torch.device("cpu"), data.least_micro_batches)


def make_model(cfg, data, scale=0.3):
    """A model whose every parameter is random, so that nothing is zero by initialisation."""
    model = train_gpt.build_model(cfg, data.vocab_size, torch.device("cpu"))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p) * (p.size(-1) ** -0.5 if p.dim() > 1 else 0.3))
    return model


# ---- the reference


def alone(model, tokens, layer=-1):
    """(stream after the last block, tapped stream) of one view by itself, unpacked, plain causal: (n, D) each."""
    x, h = model._run_blocks(torch.tensor(np.asarray(tokens, dtype=np.int64))[None], layer)
    return x[0], h[0]


def reference_losses(model, chosen, cfg, data, term=True):
    """(CE, JEPA) of these train examples, every view encoded by itself."""
    preds = data.preds
    front, last = cfg.jepa_pred_position == "front", lambda tokens: alone(model, tokens, cfg.jepa_layer)[1][-1]
    normalise = norm if cfg.jepa_norm else lambda h: h
    nats, views_a, views_b, groups = [], [], [], []
    for number in chosen:
        views = data.sets["train"].views(number)
        if data.paired:
            documents = [([data.doc_token, *views[0], data.separator, *views[1], data.doc_token], len(views[0]) + 2 if cfg.loss_on == "target" else 1)]
        else:
            documents = [([data.doc_token, *v, data.doc_token], 1) for v in views]
        for trunk, first in documents:
            z = model.logits(alone(model, trunk)[0])
            for i in range(first, len(trunk)):
                nats.append(-torch.log_softmax(z[i - 1], -1)[trunk[i]])
        for i in range(len(views) - 1):
            a, b = (views[i + 1], views[i]) if cfg.jepa_reverse else (views[i], views[i + 1])
            views_a.append(last([data.doc_token, *preds, *a] if front else [data.doc_token, *a, *preds]))
            views_b.append(last([data.doc_token, *b]))
            groups.append(number)
    ce = torch.stack(nats).mean()
    if not term:
        return ce, None
    u, v = normalise(torch.stack(views_a)), normalise(torch.stack(views_b))
    if model.predictor is not None:
        u = u @ model.predictor.weight.T
    if cfg.jepa_distance == "cosine":
        d = [1 - p @ q / p.norm() / q.norm() for p, q in zip(u, v)]
    elif cfg.jepa_distance == "l2":
        d = [(p - q).pow(2).sum().sqrt() for p, q in zip(u, v)]
    elif cfg.jepa_distance == "mse":
        d = [((p - q) ** 2).sum() / len(p) for p, q in zip(u, v)]
    else:
        d = []
        for i in range(len(u)):
            scores = [u[i] @ v[j] / u[i].norm() / v[j].norm() / 0.07 for j in range(len(v)) if j == i or groups[j] != groups[i]]
            own = u[i] @ v[i] / u[i].norm() / v[i].norm() / 0.07
            d.append(torch.logsumexp(torch.stack(scores), 0) - own)
    return ce, torch.stack(d).mean()


def step_and_reference(cfg, data, share, step=0, term=True):
    """Losses and gradients of the step really used, and of the reference on the same examples."""
    model = make_model(cfg, data)
    losses, _ = train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, step, 0.7 if term else None)
    ours = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    ce, jepa_loss = reference_losses(model, data.examples_of(step), cfg, data, term)
    (cfg.jepa_gamma * ce + 0.7 * jepa_loss if term else ce).backward()
    return losses.tolist(), [ce.item()] + ([jepa_loss.item()] if term else []), ours, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def check_step(cfg, data, share, step=0, term=True):
    losses, expected, ours, theirs = step_and_reference(cfg, data, share, step, term)
    assert losses == pytest.approx(expected, rel=1e-5)  # float32 sums in another order gave up to 2e-7
    for name in ours:
        assert_gradient(ours[name], theirs[name], name)


def assert_gradient(ours, theirs, name=None):
    """Equal to 1e-5 of 1, or of the parameter's largest gradient where that is more; float32 sums in another order gave up to 1.5e-6."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()), msg=name)


# ---- every view as if it were alone


@pytest.mark.parametrize("kind, changes", [
    ("pairs", {}), ("pairs", dict(jepa_pred_tokens=0)), ("pairs", dict(jepa_pred_tokens=10)), ("pairs", dict(jepa_pred_tokens=3, jepa_pred_position="front")),
    ("pairs", dict(jepa_reverse=True)), ("pairs", dict(jepa_reverse=True, jepa_pred_position="front", jepa_pred_tokens=2)),
    ("pairs", dict(jepa_reverse=True, jepa_pred_tokens=0)), ("pairs", dict(loss_on="target", jepa_layer=0, jepa_norm=0)),
    ("pairs", dict(jepa_predictor="linear", jepa_gamma=0.3)), ("pairs", dict(jepa_distance="mse")), ("pairs", dict(jepa_distance="l2", jepa_norm=0, jepa_layer=1)),
    ("pairs", dict(jepa_distance="infonce")), ("pairs", dict(jepa_distance="infonce", jepa_predictor="linear", jepa_gamma=0.5)),
    ("groups", {}), ("groups", dict(jepa_pred_tokens=0)), ("groups", dict(jepa_reverse=True, jepa_pred_tokens=2)),
    ("groups", dict(jepa_pred_position="front")), ("groups", dict(jepa_distance="infonce", grad_accum_steps=2))])
def test_step_equals_every_view_alone(folders, kind, changes):
    """Loss and gradients of the training step on packed trees are those of separate, unpacked passes, one a view."""
    cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.7, **changes)
    check_step(dataclasses.replace(cfg, jepa_norm=int(cfg.jepa_norm != 0)), data, share, step=1)


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_step_equals_every_view_alone_whatever_the_examples(tmp_path_factory, draw):
    """The same over random lengths (rows filled to the last token included), k, position, direction, kind and micro-batch."""
    kind = draw.draw(st.sampled_from(["pairs", "groups"]))
    T = draw.draw(st.sampled_from([32, 40]))
    extra = 3 if kind == "pairs" else 2
    room = T - extra - 10
    cfg = make_config("unused", train_seq_len=T, train_batch_tokens=8 * T, grad_accum_steps=draw.draw(st.sampled_from([1, 2])) if kind == "pairs" else 1, jepa_lambda=0.7, jepa_norm=1,
                      num_layers=2, jepa_pred_tokens=draw.draw(st.integers(0, 10)), jepa_reverse=draw.draw(st.booleans()),
                      jepa_pred_position=draw.draw(st.sampled_from(["end", "front"])), loss_on=draw.draw(st.sampled_from(["all", "target"])) if kind == "pairs" else "all")
    tokens = []
    for e in range(draw.draw(st.integers(1, 8))):
        views = 2 if kind == "pairs" else draw.draw(st.integers(2, 4))
        lengths = [draw.draw(st.integers(1, room - (1 if kind == "pairs" and v == 0 else 0))) for v in range(views)]
        if kind == "pairs":
            lengths[1] = min(lengths[1], room - lengths[0])  # together up to the whole row
        for v, n in enumerate(lengths):
            tokens += [SEPARATOR if v else MARKER, *np.random.default_rng([e, v]).integers(0, 20, n)]
    data = FakePairs(cfg, kind, np.array(tokens))
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    check_step(cfg, data, share)


class FakePairs(loader.PairData):
    """A PairData of tokens in memory: all of it but the reading of files."""

    def __init__(self, cfg, kind, tokens):
        self.train, self.val, self.folder, self.meta = [tokens], [tokens], "memory", {"kind": kind, "separator": SEPARATOR, "first_pred": FIRST_PRED}
        self.doc_token, self.token_table, self.vocab_size = MARKER, [b""] * VOCAB, VOCAB
        self.read_examples(cfg)


def pieces(cfg, data, share, step=0, term=True):
    """The step's examples, their layouts, places and micro-batches."""
    views = [data.sets["train"].views(e) for e in data.examples_of(step)]
    examples = [data.lay_out(v, term) for v in views]
    placed = jepa.pack(examples, share.micro_rows, cfg.train_seq_len)
    return views, examples, placed, data.fill(examples, placed, share)[0]


@pytest.mark.parametrize("kind", ["pairs", "groups"])
@pytest.mark.parametrize("position", ["end", "front"])
def test_hidden_states_of_a_packed_row_are_those_of_each_view_alone(folders, kind, position):
    cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.1, jepa_pred_tokens=3, jepa_pred_position=position)
    model = make_model(cfg, data)
    _, examples, placed, batches = pieces(cfg, data, share)
    assert sum(b.idx.numel() for b in batches) > sum(len(d) for e in examples for d in e.documents) > 0
    states = [model._run_blocks(b.idx, 1, b.positions, tree_mask(b.ends)) for b in batches]
    several = 0
    for example, (m, places) in zip(examples, placed):
        several += len({row for row, _ in places}) < len(places)
        for d, (row, column) in zip(example.documents, places):
            k, inner = len(d.branch), d.fork + 1
            columns = [column + i + (k if i >= inner else 0) for i in range(len(d.trunk))]
            for packed, single in zip(states[m], alone(model, d.trunk, 1)):
                torch.testing.assert_close(packed[row, columns], single, **STATES)
            if k:
                branch = [*columns[:inner], *range(column + inner, column + inner + k)]
                for packed, single in zip(states[m], alone(model, [*d.trunk[:inner], *d.branch], 1)):
                    torch.testing.assert_close(packed[row, branch], single, **STATES)
    assert several  # rows held more than one document


def test_mask_is_the_tree_and_nothing_else(folders):
    """Written out token by token: a key is seen by itself and by what continues it, in its own document only."""
    cfg, data, share = open_pairs(folders["pairs"], jepa_lambda=0.1, jepa_pred_tokens=2)
    _, examples, placed, batches = pieces(cfg, data, share)
    masks = [tree_mask(b.ends)[:, 0] for b in batches]
    expected = [torch.zeros_like(m) for m in masks]
    filled = {}
    for example, (m, places) in zip(examples, placed):
        for d, (row, column) in zip(example.documents, places):
            k, inner = len(d.branch), d.fork + 1
            for q in range(len(d)):
                on_branch = inner <= q < inner + k
                for key in range(q + 1):
                    key_on_branch = inner <= key < inner + k
                    expected[m][row, column + q, column + key] = key < inner if on_branch and not key_on_branch else on_branch or not key_on_branch
            filled[m, row] = max(filled.get((m, row), 0), column + len(d))
    for m, mask in enumerate(masks):
        for row in range(share.micro_rows):
            start = filled.get((m, row), 0)
            expected[m][row, start:, start:] = torch.ones(cfg.train_seq_len - start, cfg.train_seq_len - start, dtype=torch.bool).tril()
        assert torch.equal(mask, expected[m])


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_a_change_in_one_document_changes_nothing_in_another(folders, kind):
    """FIELD's mistake 4, and trunks that don't see [PRED]: change every token of a document in turn, compare all other states."""
    cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.1, jepa_pred_tokens=2)
    model = make_model(cfg, data)
    _, examples, placed, batches = pieces(cfg, data, share)
    at = [{(m, row) for row, _ in places} for m, places in placed]
    chosen = next(i for i in range(len(at)) if any(at[i] & other for j, other in enumerate(at) if j != i))  # others stand in its rows
    m = placed[chosen][0]
    batch, mask = batches[m], tree_mask(batches[m].ends)
    run = lambda idx: model._run_blocks(idx, -1, batch.positions, mask)[0]
    before = run(batch.idx)
    for d, (row, column) in zip(examples[chosen].documents, placed[chosen][1]):
        idx = batch.idx.clone()
        idx[row, column:column + len(d)] = (idx[row, column:column + len(d)] + 5) % data.doc_token
        changed = (run(idx) != before).any(-1)
        outside = torch.ones_like(changed)
        outside[row, column:column + len(d)] = False
        assert changed[row, column] and not changed[outside].any()
        if d.branch:
            inner, k = d.fork + 1, len(d.branch)
            idx = batch.idx.clone()
            idx[row, column + inner:column + inner + k] = 1
            changed = (run(idx) != before).any(-1)
            assert changed[row, column + inner:column + inner + k].all() and changed.sum() == k


# ---- targets


@pytest.mark.parametrize("kind, loss_on", [("pairs", "all"), ("pairs", "target"), ("groups", "all")])
def test_targets_are_the_trunks_own_and_always_end(folders, kind, loss_on):
    """FIELD's mistakes 2 and 3: nothing but trunk tokens, the end token always, Code by its place and not by a search."""
    cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.1, loss_on=loss_on, jepa_pred_tokens=4)
    views, examples, placed, batches = pieces(cfg, data, share)
    found = sorted(t for b in batches for t in b.targets[b.targets >= 0].tolist())
    if kind == "groups":
        expected = [t for e in views for v in e for t in [*v, data.doc_token]]
    else:
        expected = [t for text, code in views for t in ([] if loss_on == "target" else [*text, data.separator]) + [*code, data.doc_token]]
    assert found == sorted(expected)
    assert not set(found) & set(data.preds)
    assert all(b.num_targets == len(expected) for b in batches)
    for example, (m, places) in zip(examples, placed):
        for d, (row, column) in zip(example.documents, places):
            targets = batches[m].targets[row, column:column + len(d)]
            trained = len(d.loss_on) > 0
            assert (targets[-2 if not d.branch or d.fork < len(d.trunk) - 2 else d.fork] == data.doc_token) == trained
            assert not trained and (targets == -1).all() or trained and targets[-1] == -1


# ---- a step is a set of examples


def test_examples_of_a_step_depend_on_the_seed_alone(folders):
    steps = {}
    arms = [dict(jepa_lambda=0.0), dict(jepa_lambda=0.1), dict(jepa_lambda=0.1, jepa_pred_tokens=10, jepa_pred_position="front"),
            dict(jepa_lambda=0.1, jepa_ratio=0.5), dict(jepa_lambda=0.1, jepa_objective="span"), dict(grad_accum_steps=1)]
    for n, arm in enumerate(arms):
        _, data, _ = open_pairs(folders["pairs"], **arm)
        steps[n] = [data.examples_of(s) for s in range(9)]
    assert all(steps[n] == steps[0] for n in steps)
    trained_on = []  # through the loader: the same targets, whatever the arm and the ranks
    for arm in arms[:5]:
        for ranks in (1, 2):
            _, data, share = open_pairs(folders["pairs"], **arm)
            batches = [b for rank in range(ranks) for b in data.load(4, dataclasses.replace(share, rank=rank, world_size=ranks), arm["jepa_lambda"] > 0)[0]]
            trained_on.append(sorted(t for b in batches for t in b.targets[b.targets >= 0].tolist()))
    assert all(t == trained_on[0] for t in trained_on) and len(trained_on[0]) > 100
    _, other, _ = open_pairs(folders["pairs"], seed=2)
    assert [other.examples_of(s) for s in range(9)] != steps[0]


def test_an_epoch_holds_every_example_once_and_steps_have_their_tokens(folders):
    cfg, data, _ = open_pairs(folders["pairs"], train_batch_tokens=64, grad_accum_steps=1)
    seen, trunks = [], data.trunks("train")
    for step in range(100):
        examples = data.examples_of(step)
        assert examples
        seen += examples
        assert abs(trunks[seen].sum() - (step + 1) * 64) < trunks.max()  # never more than an example ahead
    n = len(data.sets["train"])
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert len(seen) > 2 * n
    assert [data.examples_of(s) for s in (40, 3, 77)] == [loader.open_data(cfg).examples_of(s) for s in (40, 3, 77)]


def test_one_shape_and_one_graph_for_each_kind_of_step(folders):
    torch._dynamo.reset()
    shapes, count = set(), []

    def backend(graph, inputs):
        count.append(graph)
        return graph

    cfg = make_config(folders["pairs"], jepa_lambda=0.1, jepa_ratio=0.5, iterations=16)
    data = loader.open_data(cfg)
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"), 8)
    for step in range(6):
        for term in (False, True):
            for batch in data.load(step, share, term)[0]:
                shapes.add((term, *(tuple(t.shape) for t in (batch.idx, batch.positions, batch.ends, *(batch.views or ())))))
    assert len(shapes) == 2
    _, log = train_in_process(cfg, torch.compile(train_gpt.training_loss, backend=backend, fullgraph=True, dynamic=False), warm_up=True)
    assert len(count) == 2 and 0 < len(log.curve("jepa_loss")) < 16


def test_packing_keeps_an_example_in_one_micro_batch_and_wastes_little(folders):
    for kind in folders:
        cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.1, train_batch_tokens=1024, grad_accum_steps=8)
        _, examples, placed, batches = pieces(cfg, data, share)
        used = {}
        for example, (m, places) in zip(examples, placed):
            assert len(places) == len(example.documents)
            for d, (row, column) in zip(example.documents, places):
                assert row < share.micro_rows and column + len(d) <= cfg.train_seq_len
                for c in range(column, column + len(d)):
                    assert used.setdefault((m, row, c), d) is d  # no two documents in one place
        filled = len(used) / ((len(batches) - 1) * share.micro_rows * cfg.train_seq_len)
        assert filled > 0.8  # all but the last micro-batch; short rows of long documents waste most


def test_flops_are_those_of_the_layout(folders):
    cfg, data, share = open_pairs(folders["pairs"], jepa_lambda=0.1)
    model = make_model(cfg, data)
    for term in (False, True):
        batches, (tokens, visible) = data.load(2, share, term)
        assert tokens == sum(b.idx.numel() for b in batches)
        assert visible == sum(tree_mask(b.ends).sum().item() for b in batches)
    _, two = data.load(2, dataclasses.replace(share, world_size=2), True)
    batches = [b for rank in (0, 1) for b in data.load(2, dataclasses.replace(share, world_size=2, rank=rank), True)[0]]
    assert two == (sum(b.idx.numel() for b in batches), sum(tree_mask(b.ends).sum().item() for b in batches))
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "gain" not in n)
    assert model.flops(100, 1000) == 6 * weights * 100 + 12 * 3 * 32 * 1000


def test_train_flops_stops_the_run(folders):
    _, log = train_in_process(make_config(folders["pairs"], iterations=20))
    cap = 6.5 * log.costs[0]["step_flops"]
    _, capped = train_in_process(make_config(folders["pairs"], iterations=20, train_flops=cap))
    totals = [c["train_flops"] for c in capped.costs if c]
    assert totals[-2] < cap <= totals[-1] and len(totals) < 20
    assert capped.costs[0]["step_flops"] == log.costs[0]["step_flops"]


# ---- the term's own pass


@pytest.mark.parametrize("kind, changes", [("pairs", {}), ("groups", {}), ("pairs", dict(jepa_distance="infonce", jepa_predictor="linear"))])
def test_the_decoupled_term_is_that_of_a_fraction_of_the_examples(folders, kind, changes):
    """Every third example of the step; two micro-batches and more; the plain pass before it is the twin's."""
    cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.7, jepa_update="decoupled", jepa_rows_frac=1 / 3, **changes)
    model = make_model(cfg, data)
    chosen = np.array(data.examples_of(1))
    chosen = chosen[[i for i in range(len(chosen)) if (i + 1) * round(len(chosen) / 3) // len(chosen) > i * round(len(chosen) / 3) // len(chosen)]].tolist()
    losses, flops = train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, 1, 0.7, "term", cfg.jepa_rows_frac)
    ours = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    _, expected = reference_losses(model, chosen, cfg, data, True)
    expected.backward()
    assert losses.tolist() == pytest.approx([expected.item()], rel=1e-5) and flops > 0
    for (name, p), g in zip(model.named_parameters(), ours):
        assert_gradient(g, torch.zeros_like(p) if p.grad is None else p.grad, name)
    off = loader.open_data(dataclasses.replace(cfg, jepa_lambda=0.0)).load(1, share, False)
    on = data.load(1, share, False)
    assert on[1] == off[1] and all(torch.equal(a.idx, b.idx) and torch.equal(a.targets, b.targets) for a, b in zip(on[0], off[0]))


def test_the_next_pass_is_packed_ahead(folders):
    """Coupled, decoupled, and with dropped steps: no step of a run but the first is packed while it is waited for."""
    for changes in ({}, dict(jepa_update="decoupled"), dict(jepa_ratio=0.5), dict(jepa_update="decoupled", jepa_ratio=0.5), dict(jepa_lambda=0.0), dict(diag_every=2)):
        cfg, data, share = open_pairs(folders["pairs"], **{"jepa_lambda": 0.1, **changes})
        model, missed, load = make_model(cfg, data), [], data.load

        def watched(step, share, term, fraction=1.0):
            if data.ahead is None or data.ahead[0] != (step, share, term, fraction):
                missed.append(step)
            return load(step, share, term, fraction)

        data.load, updates = watched, train_gpt.build_updates(model, cfg)
        for step in range(6):
            if cfg.diag_every:
                train_gpt.diagnose(model, train_gpt.training_loss, cfg, data, share, step)  # only looks
            train_gpt.training_step(model, train_gpt.training_loss, updates, cfg, data, share, step, 0.0, train_gpt.jepa_schedule(cfg, 0.0, step))
        assert missed == [0], changes


def test_the_next_pass_is_packed_ahead_outside_the_term_s_window(folders):
    """Its first step is a surprise, and the step after its last."""
    cfg, data, share = open_pairs(folders["pairs"], jepa_lambda=0.1, jepa_update="decoupled", jepa_start_frac=0.4, jepa_end_frac=0.7)
    model, missed, load = make_model(cfg, data), [], data.load

    def watched(step, share, term, fraction=1.0):
        if data.ahead is None or data.ahead[0] != (step, share, term, fraction):
            missed.append((step, term))
        return load(step, share, term, fraction)

    data.load, updates = watched, train_gpt.build_updates(model, cfg)
    for step in range(10):
        train_gpt.training_step(model, train_gpt.training_loss, updates, cfg, data, share, step, 0.0, train_gpt.jepa_schedule(cfg, step / 10, step))
    assert missed == [(0, False), (1, False), (4, True), (8, False)]


@pytest.mark.parametrize("kind, changes", [("pairs", dict(jepa_layer=1)), ("groups", {}), ("groups", dict(jepa_distance="infonce", jepa_update="decoupled")), ("pairs", dict(jepa_objective="span"))])
def test_diagnostics_of_packed_examples(folders, kind, changes):
    """Gradients against the reference's; matched against the first micro-batches' own term."""
    cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.7, diag_every=1, **changes)
    model = make_model(cfg, data)
    found = train_gpt.diagnose(model, train_gpt.training_loss, cfg, data, share, 2)
    assert all(math.isfinite(x) for x in found.values()) and 1 <= found["effective_rank"] <= 32
    if cfg.jepa_objective == "span":
        return
    gradients = []
    for loss in reference_losses(model, data.examples_of(2), cfg, data):
        gradients.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in
                                    zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))]))
    ce, term = gradients
    assert found["grad_ratio"] == pytest.approx((0.7 * term.norm() / ce.norm()).item(), rel=1e-3)
    assert found["grad_cosine"] == pytest.approx(F.cosine_similarity(ce, term, dim=0).item(), abs=1e-3)
    if cfg.jepa_distance == "cosine":
        views = []
        for step in range(2, 10):
            batch = data.read(step, share, True)[0][0]
            h = model._run_blocks(batch.idx, cfg.jepa_layer, batch.positions, tree_mask(batch.ends))[1].flatten(0, 1)
            a, b, weight, _ = batch.views
            views += [1 - F.cosine_similarity(norm(h[i]), norm(h[j]), dim=0).item() for i, j, w in zip(a, b, weight) if w > 0]
        assert found["jepa_matched"] == pytest.approx(sum(views) / len(views), rel=1e-4)


def test_a_decoupled_predictor_learns_at_its_full_rate(folders):
    """No other update trains it: lambda, the size of the term's update relative to the cross entropy's, isn't about it."""
    cfg, data, share = open_pairs(folders["pairs"], jepa_lambda=0.01, jepa_update="decoupled", jepa_predictor="linear")
    model = make_model(cfg, data)
    before = model.predictor.weight.clone()
    train_gpt.training_step(model, train_gpt.training_loss, train_gpt.build_updates(model, cfg), cfg, data, share, 0, 0.0, 0.01)
    size = torch.linalg.matrix_norm(model.predictor.weight - before, 2)  # of an orthogonal matrix 1, of Newton-Schulz' 0.7 to 1.2
    assert 0.6 * cfg.matrix_lr < size < 1.25 * cfg.matrix_lr


# ---- the off switch, dropout, gamma


def test_the_twin_without_the_term_is_a_plain_run(folders):
    _, off = train_in_process(make_config(folders["pairs"], jepa_lambda=0.0))
    _, other = train_in_process(make_config(folders["pairs"], jepa_lambda=0.0, jepa_pred_tokens=7, jepa_reverse=True, jepa_gamma=3.0, jepa_ratio=0.2,
                                            jepa_distance="mse", jepa_predictor="linear", jepa_norm=0))
    assert off.rows == other.rows and off.costs == other.costs and not off.curve("jepa_loss")


def test_ratio_1_is_no_dropout_and_a_dropped_step_is_a_plain_one_bit_for_bit(folders):
    for folder in folders.values():
        cfg = make_config(folder, jepa_lambda=0.1, jepa_ratio=0.4)
        kept = [jepa.keeps_term(cfg.seed, step, 0.4) for step in range(12)]
        assert 0 < sum(kept) < 12
        data, share = loader.open_data(cfg), train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
        plain = loader.open_data(dataclasses.replace(cfg, jepa_lambda=0.0))
        dropped = kept.index(False)
        gradients = []
        for c, d in ((cfg, data), (dataclasses.replace(cfg, jepa_lambda=0.0), plain)):
            model = make_model(c, d)
            weight = train_gpt.jepa_schedule(c, 0.0, dropped)
            losses, flops = train_gpt.accumulate_gradients(model, train_gpt.training_loss, c, d, share, dropped, weight)
            gradients.append([losses, torch.tensor(flops), *(p.grad for p in model.parameters())])
        assert all(torch.equal(x, y) for x, y in zip(*gradients))
    _, always = train_in_process(dataclasses.replace(cfg, jepa_ratio=1.0))
    assert len(always.curve("jepa_loss")) == cfg.iterations
    _, some = train_in_process(dataclasses.replace(cfg, iterations=12))
    assert [n - 1 for n, values in some.rows if "jepa_loss" in values] == [n for n, k in enumerate(kept) if k]


def test_dropout_rate_is_the_ratio():
    kept = [jepa.keeps_term(1, step, 0.25) for step in range(4000)]
    assert abs(sum(kept) / 4000 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)  # five standard errors, and the seed is fixed


def test_span_objective_stays_inside_trunks_and_matches_its_definition(folders):
    for kind in folders:
        cfg, data, share = open_pairs(folders[kind], jepa_lambda=0.7, jepa_objective="span", jepa_spans=2)
        model = make_model(cfg, data)
        views, examples, placed, batches = pieces(cfg, data, share, step=2, term=False)
        batches, _ = data.load(2, share, True)
        trunks = {(m, row, column): d.trunk for e, (m, places) in zip(examples, placed) for d, (row, column) in zip(e.documents, places)}
        distances = []
        for m, batch in enumerate(batches):
            a, b, start, end, weight = batch.views
            for row, s in torch.nonzero(weight):
                i, j, p, q = (int(t[row, s]) for t in (a, b, start, end))
                trunk = trunks[m, int(row), p]
                assert q - p + 1 == len(trunk) and p < i <= j <= q and j - i + 1 <= max(1, len(trunk) * cfg.jepa_max_span_frac)
                h = alone(model, trunk)[1]
                patch, whole = h[j - p] - h[i - 1 - p], h[-1] - h[0]
                distances.append(1 - F.cosine_similarity(whole - patch, patch, dim=0))
        assert len(distances) == 2 * len(trunks)
        losses, _ = train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, 2, 0.7)
        # differences of states lose a digit or two of float32
        assert losses[1].item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


def test_predictor_is_trained_saved_and_in_one_optimizer(folders):
    cfg = make_config(folders["pairs"], jepa_lambda=0.5, jepa_predictor="linear", jepa_ratio=0.5)
    model, _ = train_in_process(cfg)
    assert not torch.equal(model.predictor.weight, torch.eye(32)) and "predictor.weight" in model.state_dict()
    before = model.predictor.weight.clone()  # a step without the term leaves it alone, momentum or not
    optimizers, data = train_gpt.build_optimizers(model, cfg), loader.open_data(cfg)
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    for weight, moved in ((None, False), (0.5, True), (None, False)):
        train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, 0, weight)
        train_gpt.apply_gradients(optimizers, 0.0, cfg)
        assert torch.equal(model.predictor.weight, before) != moved
        before = model.predictor.weight.clone()
    held = [id(p) for o in train_gpt.build_optimizers(model, cfg) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert train_gpt.build_model(dataclasses.replace(cfg, jepa_lambda=0.0), 300, torch.device("cpu")).predictor is None


def test_term_lowers_itself(folders):
    """The gradient points the right way."""
    cfg = make_config(folders["pairs"], jepa_lambda=2.0, iterations=15, jepa_distance="infonce", grad_accum_steps=1)
    _, log = train_in_process(cfg)
    assert log.curve("jepa_loss")[-1] < log.curve("jepa_loss")[0] - 0.2


# ---- ranks


@pytest.mark.parametrize("kind, changes", [("pairs", {}), ("groups", dict(jepa_pred_tokens=2)), ("pairs", dict(jepa_objective="span"))])
def test_two_ranks_share_a_step_as_one_does(folders, kind, changes):
    """Without processes: the parts of two ranks add up to the whole, with unequal pair counts."""
    cfg, data, one = open_pairs(folders[kind], jepa_lambda=0.7, **changes)
    model = make_model(cfg, data)
    whole, _ = train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, one, 1, 0.7)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses, pairs = 0, []
    for rank in (0, 1):
        share = dataclasses.replace(one, rank=rank, world_size=2)
        batches, _ = data.load(1, share, True)
        pairs.append(sum((b.views[2 if cfg.jepa_objective == "pair" else 4] > 0).sum().item() for b in batches))
        for batch in batches:
            loss, *terms = train_gpt.training_loss(model, cfg, batch, torch.tensor(0.7))
            loss.backward()
            losses += torch.stack(terms)
    assert pairs[0] != pairs[1]
    assert losses.tolist() == pytest.approx(whole.tolist(), rel=1e-5)
    for p, theirs in zip(model.parameters(), expected):
        assert_gradient(p.grad, theirs)


def test_two_processes_train_as_one(folders, run_id):
    """With InfoNCE, whose negatives are those of the whole step, however many ranks and micro-batches hold it."""
    flags = ["--jepa_objective=pair", "--jepa_lambda=0.5", "--jepa_distance=infonce", "--iterations=3", "--train_seq_len=64", "--num_layers=2",
             "--train_batch_tokens=512"]
    curves = []
    for name, ranks, accum in ((f"{run_id}-one", 0, 1), (f"{run_id}-two", 2, 2)):
        done = run_cli(folders["pairs"], *flags, f"--grad_accum_steps={accum}", f"--run_id={name}", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in open(ROOT / "logs" / name / "metrics.jsonl")]
        curves.append([(r.get("train_loss"), r.get("jepa_loss"), r.get("val_loss")) for r in rows])
    for step, (x, y) in enumerate(zip(*curves)):
        # sums in another order; from the second step on Adam has divided the rounding of rare tokens' gradients by their own size
        assert [v for v in x if v] == pytest.approx([v for v in y if v], rel=2e-3 if step else 1e-5)
    assert result_of(f"{run_id}-one")["val_loss"] == pytest.approx(result_of(f"{run_id}-two")["val_loss"], rel=2e-3)


# ---- examples that don't fit


def test_long_examples_stop_skip_or_truncate(tmp_path):
    folder = make_set(tmp_path / "long", longest=30)
    with pytest.raises(ValueError, match=r"train examples of .* don't fit a row of TRAIN_SEQ_LEN=32: choose LONG_EXAMPLES=skip or truncate, or TRAIN_SEQ_LEN=\d\d"):
        open_pairs(folder)
    _, skip, _ = open_pairs(folder, long_examples="skip", train_seq_len=48, train_batch_tokens=384)
    assert len(skip.sets["train"]) < 43 and skip.trunks("train").max() <= 38 and "skipped" in skip.warnings[0]
    with pytest.raises(ValueError, match="so none is left: raise TRAIN_SEQ_LEN to"):
        open_pairs(folder, long_examples="skip", train_seq_len=16)
    cfg, cut, share = open_pairs(folder, long_examples="truncate", jepa_lambda=0.1, jepa_pred_tokens=10)
    assert len(cut.sets["train"]) == 43 and cut.trunks("train").max() == 22 and "truncated" in cut.warnings[0]
    _, whole, _ = open_pairs(folder, train_seq_len=128, train_batch_tokens=1024)
    for e in range(43):  # what is left is a beginning of each view, and a short view is left alone
        for left, full in zip(cut.sets["train"].views(e), whole.sets["train"].views(e)):
            assert left == full[:len(left)] and (len(left) == len(full) or len(left) >= 9)
    check_step(dataclasses.replace(cfg, jepa_norm=1), cut, share)
    groups = make_set(tmp_path / "groups", "groups", longest=30)
    _, cut, _ = open_pairs(groups, long_examples="truncate")
    assert cut.sets["train"].length.max() == 32 - 2 - 10


def test_an_example_that_fits_no_micro_batch_is_found_before_the_run_and_in_every_arm(folders):
    documents = [jepa.Document([0] * 20) for _ in range(3)]
    with pytest.raises(ValueError, match="an example of 3 documents does not fit a micro-batch of 2 rows of 32 tokens"):
        jepa.pack([jepa.Example(documents, [])], 2, 32)
    for arm in (dict(jepa_lambda=0.0), dict(jepa_lambda=0.1, jepa_pred_tokens=10, jepa_pred_position="front")):
        for kind in folders:
            _, data, share = open_pairs(folders[kind], **arm)
            data.check_micro_batch(dataclasses.replace(share, micro_rows=8))
            with pytest.raises(ValueError, match=r"a micro-batch of 1 rows of 32 tokens is too small for train example \d+ of .*; lower GRAD_ACCUM_STEPS"):
                data.check_micro_batch(dataclasses.replace(share, micro_rows=1))


@given(st.integers(1, 6), st.sampled_from(["pairs", "groups"]), st.lists(st.integers(1, 20), min_size=2, max_size=8), st.integers(0, 100))
@example(3, "groups", [1, 10, 19], 0)  # fits with JEPA_PRED_POSITION=front, but not with JEPA_REVERSE=1 as well
@settings(max_examples=80, deadline=None)
def test_what_check_micro_batch_passes_always_packs(rows, kind, lengths, seed):
    """The bound by which it skips examples is safe: every layout of an example it passes fits an empty micro-batch."""
    cfg = make_config("unused", train_seq_len=32, train_batch_tokens=32 * rows, grad_accum_steps=1)
    views = [np.random.default_rng([seed, i]).integers(0, 20, n) for i, n in enumerate(lengths[:2] if kind == "pairs" else lengths)]
    data = FakePairs(dataclasses.replace(cfg, long_examples="truncate"), kind, np.concatenate([np.append(SEPARATOR if i else MARKER, v) for i, v in enumerate(views)]))
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    try:
        data.check_micro_batch(share)
    except ValueError:
        return
    for k in (0, 3, 10):
        for front in (False, True):
            for reverse in (False, True):
                example = jepa.lay_out(data.sets["train"].views(0), paired=kind == "pairs", marker=MARKER, separator=SEPARATOR, preds=[FIRST_PRED] * k, front=front, reverse=reverse)
                assert jepa.pack([example], rows, 32)[0][0] == 0


# ---- misuse


@pytest.mark.parametrize("kind, changes, message", [
    ("pairs", dict(jepa_pred_tokens=11), "JEPA_PRED_TOKENS=11: must be at least 0 and at most 10"),
    ("pairs", dict(jepa_ratio=0.0), "JEPA_RATIO=0.0: must be above 0"),
    ("pairs", dict(jepa_objective="pear"), "JEPA_OBJECTIVE=pear: must be span or pair"),
    ("pairs", dict(jepa_objective="span", jepa_lambda=0.1, jepa_predictor="linear"), "JEPA_PREDICTOR=linear: needs JEPA_OBJECTIVE=pair"),
    ("groups", dict(loss_on="target"), "LOSS_ON=target: .* holds groups of paraphrases"),
    ("pairs", dict(vocab_size=265), "VOCAB_SIZE=265: the tokens of .* need 2[67]"),
    ("pairs", dict(train_seq_len=8), "TRAIN_SEQ_LEN=8: pairs data needs rows of at least 16"),
])
def test_misuse_is_one_line(folders, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        open_pairs(folders[kind], **changes)


def test_pair_needs_pairs_and_text_has_no_target(data_path):
    with pytest.raises(ValueError, match="JEPA_OBJECTIVE=pair: .* holds text"):
        loader.open_data(make_config(data_path, jepa_lambda=0.1))
    with pytest.raises(ValueError, match="LOSS_ON=target: .* holds text"):
        loader.open_data(make_config(data_path, loss_on="target"))


# ---- FlexAttention


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_block_mask_gives_the_numbers_of_the_boolean_mask(folders, heads):
    """Forward, which FlexAttention can do on a CPU; the CUDA path only changes which of the two masks is made."""
    cfg, data, share = open_pairs(folders["pairs"], jepa_lambda=0.1, jepa_pred_tokens=2)
    torch.manual_seed(0)
    model = GPT(GPTConfig(data.vocab_size, 2, 64, *heads, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        batch = pieces(cfg, data, share)[3][0]
        boolean = model._run_blocks(batch.idx, -1, batch.positions, tree_mask(batch.ends))[0]
        blocks = model._run_blocks(batch.idx, -1, batch.positions, tree_mask(batch.ends, flex=True))[0]
    torch.testing.assert_close(boolean, blocks, **STATES)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_step_equals_the_cpu_step(folders):
    results = []
    for device in ("cpu", "cuda"):
        cfg = make_config(folders["pairs"], jepa_lambda=0.7, model_dim=128, jepa_pred_tokens=2)
        data = loader.open_data(cfg)
        share = train_gpt.divide_batch(cfg, 0, 1, torch.device(device))
        torch.manual_seed(0)
        model = GPT(GPTConfig(data.vocab_size, 3, 128, 4, 2, 2)).to(device)
        loss_fn = torch.compile(train_gpt.training_loss, fullgraph=True, dynamic=False) if device == "cuda" else train_gpt.training_loss
        losses, _ = train_gpt.accumulate_gradients(model, loss_fn, cfg, data, share, 0, 0.7)
        results.append((losses.cpu(), [p.grad.cpu() for p in model.parameters()]))
    (x, gx), (y, gy) = results
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # TF32 products on the GPU
    for p, q in zip(gx, gy):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3 * p.abs().max().item())
