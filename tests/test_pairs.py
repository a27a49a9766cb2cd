"""Packed trees against each view alone, the step as a set of examples, and pairs' own pitfalls.

The reference knows nothing of layouts: it encodes every view of every example by itself, unpacked
and plainly causal.
"""

import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import (
    CPU,
    MemoryLog,
    add_up,
    keep_gradients,
    make_config,
    make_run,
    make_set,
    metrics_of,
    result_of,
    run_cli,
    shake,
    train_in_process,
    train_run,
    with_loss,
)
from model import GPT, GPTConfig, norm
from nanojepa.batches import PairData, divide_batch, draw_step, open_data
from nanojepa.diagnostics import diagnose
from nanojepa.objectives import OBJECTIVES, Options
from nanojepa.objectives.schedule import keeps_term
from nanojepa.packing import place_examples, tree_mask
from nanojepa.records import Record, prepare_pairs

# float32 states of size 1 after three blocks whose sums run in another order
STATES = dict(rtol=1e-5, atol=1e-5)
MARKER, SEPARATOR, FIRST_PRED, VOCAB = 20, 21, 22, 32
LAMBDA = 0.7
PAIRS = dict(jepa_objective="pair", grad_accum_steps=4)  # micro-batches of two rows


def pair_run(folder, rank=0, world_size=1, **changes):
    """A Run on pairs data whose every weight is random."""
    run = make_run(folder, rank, world_size, **{**PAIRS, **changes})
    return shake_all(run)


def shake_all(run):
    shake(run)
    with torch.no_grad():
        for p in run.parameters()[len(list(run.model.parameters())) :]:  # a predictor
            p.add_(0.05 * torch.randn_like(p))
    return run


@pytest.fixture(scope="session")
def solutions(tmp_path_factory):
    """A data folder of pairs, two thirds of whose answers have two steps or three."""
    rng, records = np.random.default_rng(0), []
    for n in range(40):
        words = ["".join(rng.choice(list("abcdef"), rng.integers(1, 5))) for _ in range(4)]
        answer = "\n\n".join(words[1 : 2 + n % 3])
        records.append(Record(n, "pairs", None, [words[0], answer]))
    folder = tmp_path_factory.mktemp("steps") / "steps"
    prepare_pairs(folder, records, records[:9], source="test_pairs.py", vocab_size=258)
    return str(folder)


@pytest.fixture(scope="session")
def all_folders(folders, solutions):
    return {**folders, "steps": solutions}


class FakePairs(PairData):
    """A PairData of tokens in memory: all of it but the reading of files."""

    def __init__(self, cfg, kind, tokens):
        self.train, self.val, self.folder = [tokens], [tokens], "memory"
        self.cfg, self.warnings = cfg, []
        self.meta = {"kind": kind, "separator": SEPARATOR, "first_pred": FIRST_PRED}
        self.doc_token, self.token_table, self.vocab_size = MARKER, [b""] * VOCAB, VOCAB
        self.read_examples()


def fake_tokens(examples):
    """The shard of these examples, lists of views."""
    tokens = []
    for views in examples:
        for number, view in enumerate(views):
            tokens += [SEPARATOR if number else MARKER, *view]
    return np.array(tokens)


# ---- the reference


class Alone(NamedTuple):
    """The states (n, D) of one view by itself."""

    stream: torch.Tensor
    tapped: torch.Tensor


def alone(run, tokens, layer=None):
    layer = run.cfg.jepa_layer if layer is None else layer
    x, h = run.model._run_blocks(torch.tensor([[int(t) for t in tokens]]), layer)
    return Alone(x[0], h[0])


def trunks_of(run, number, split="train"):
    """The trunks of an example and the index of each one's first target."""
    data, views = run.data, run.data.sets[split].views(number)
    marker = data.doc_token
    if not data.paired:
        return [([marker, *view, marker], 1) for view in views]
    text, code = views
    first = len(text) + 2 if run.cfg.loss_on == "target" else 1
    return [([marker, *text, data.separator, *code, marker], first)]


def compared_texts(run, number):
    """[(prefix of A, A, prefix of B, B)] of an example: what is compared, and what precedes it."""
    data, views, marker = run.data, run.data.sets["train"].views(number), run.data.doc_token
    if run.cfg.jepa_objective == "pair":
        return [([marker], a, [marker], b) for a, b in zip(views, views[1:], strict=False)]
    text, code = views
    said = [data.token_table[token] for token in code]
    steps = b"".join(said).split(b"\n\n")
    if len(steps) < 2:
        return []
    first = second = 0  # tokens up to the end of step 1 and of step 2
    while b"".join(said[:first]) != steps[0] + b"\n\n":
        first += 1
    while b"".join(said[:second]).rstrip() != b"\n\n".join(steps[:2]):
        second += 1
    if len(steps) > 2:
        second += 1  # the blank line, which is one token of this data
    one, two = code[:first], code[first:second]
    return [([marker, *text, data.separator], one, [marker], two)]


def reference_views(run, number):
    """[(view A, view B)] of an example, each the state (D,) of a view by itself."""
    cfg, preds, views = run.cfg, run.data.preds, []
    for a in compared_texts(run, number):
        before_a, own_a, before_b, own_b = (*a[2:], *a[:2]) if cfg.jepa_reverse else a
        middle, last = (preds, ()) if cfg.jepa_pred_position == "front" else ((), preds)
        u = alone(run, [*before_a, *middle, *own_a, *last]).tapped[-1]
        v = alone(run, [*before_b, *own_b]).tapped[-1]
        if cfg.jepa_norm:
            u, v = norm(u), norm(v)
        if run.objective.predictor is not None:
            u = run.objective.predictor.weight @ u
        views.append((u, v))
    return views


def reference_distances(kind, pairs):
    """[distance] of one micro-batch's pairs (u, v, example)."""
    if kind == "cosine":
        return [1 - u @ v / u.norm() / v.norm() for u, v, _ in pairs]
    if kind == "l2":
        return [(u - v).pow(2).sum().sqrt() for u, v, _ in pairs]
    if kind == "mse":
        return [((u - v) ** 2).sum() / len(u) for u, v, _ in pairs]
    distances = []
    for u, own, number in pairs:
        negatives = [v for _, v, other in pairs if other != number]
        scores = [u @ v / u.norm() / v.norm() / 0.07 for v in (own, *negatives)]
        distances.append(torch.logsumexp(torch.stack(scores), 0) - scores[0])
    return distances


def views_of_batch(run, batch):
    """[(view A, view B, example)] of the examples that a micro-batch holds."""
    views = []
    for number, count in Counter(batch.group[batch.weight > 0].tolist()).items():
        own = [(u, v, number) for u, v in reference_views(run, number)]
        views += own * (count // len(own))  # the end of an epoch may hold an example twice
    return views


def reference_losses(run, step):
    """(cross entropy, term) of a step, every view encoded by itself."""
    nats = []
    for number in run.data.examples_of(step):
        for trunk, first in trunks_of(run, number):
            log_p = run.model.logits(alone(run, trunk).stream).log_softmax(-1)
            nats += [-log_p[i - 1, trunk[i]] for i in range(first, len(trunk))]
    ce = torch.stack(nats).mean()
    if run.objective is None:
        return ce, None
    # The negatives of InfoNCE are those of the micro-batch.
    distances = []
    for batch in run.data.read(step, run.share, run.objective).batches:
        distances += reference_distances(run.cfg.jepa_distance, views_of_batch(run, batch))
    return ce, torch.stack(distances).mean()


def gradients_of(run):
    """{name: gradient} of all weights, zeros if there is none; it clears them."""
    gradients = {}
    for module in run.modules().values():
        for name, p in module.named_parameters():
            gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            p.grad = None
    return gradients


def assert_gradients(ours, theirs):
    """Equal to 1e-5 of 1, or of the weight's largest gradient if that is more.

    float32 sums in another order gave up to 1.5e-6.
    """
    assert ours.keys() == theirs.keys()
    for name in ours:
        size = max(1.0, theirs[name].abs().max().item())
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5 * size, msg=name)


def check_step(run, step):
    """Losses and gradients of the step really used are the reference's."""
    keep_gradients(run)
    result = train_gpt.training_step(run, step, 0.0, LAMBDA if run.objective else None)
    ours = gradients_of(run)
    ce, term = reference_losses(run, step)
    # float32 sums in another order gave up to 2e-7
    assert result.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    loss = ce
    if term is not None:
        # A cosine near 1 leaves few digits.
        assert result.term.item() == pytest.approx(term.item(), rel=1e-5, abs=1e-6)
        loss = run.cfg.jepa_gamma * ce + LAMBDA * term
    loss.backward()
    assert_gradients(ours, gradients_of(run))


# ---- every view as if it were alone


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("pairs", dict(jepa_lambda=0.0)),
        ("pairs", {}),
        ("pairs", dict(jepa_pred_tokens=0)),
        ("pairs", dict(jepa_pred_tokens=10)),
        ("pairs", dict(jepa_pred_tokens=3, jepa_pred_position="front")),
        ("pairs", dict(jepa_reverse=True)),
        ("pairs", dict(jepa_reverse=True, jepa_pred_position="front", jepa_pred_tokens=2)),
        ("pairs", dict(jepa_reverse=True, jepa_pred_tokens=0)),
        ("pairs", dict(loss_on="target", jepa_layer=0, jepa_norm=0)),
        ("pairs", dict(jepa_predictor="linear", jepa_gamma=0.3)),
        ("pairs", dict(jepa_distance="mse")),
        ("pairs", dict(jepa_distance="l2", jepa_norm=0, jepa_layer=1)),
        ("pairs", dict(jepa_distance="infonce")),
        ("pairs", dict(jepa_distance="infonce", jepa_predictor="linear", jepa_gamma=0.5)),
        ("groups", dict(jepa_lambda=0.0)),
        ("groups", {}),
        ("groups", dict(jepa_pred_tokens=0)),
        ("groups", dict(jepa_reverse=True, jepa_pred_tokens=2)),
        ("groups", dict(jepa_pred_position="front")),
        ("groups", dict(jepa_distance="infonce", grad_accum_steps=2)),
        ("steps", dict(jepa_objective="step")),
        ("steps", dict(jepa_objective="step", jepa_pred_tokens=0, loss_on="target")),
        ("steps", dict(jepa_objective="step", jepa_pred_position="front", jepa_pred_tokens=2)),
        ("steps", dict(jepa_objective="step", jepa_reverse=True, jepa_predictor="linear")),
        ("steps", dict(jepa_objective="step", jepa_distance="infonce")),
    ],
)
def test_step_equals_every_view_alone(all_folders, kind, changes):
    """Loss and gradients of the training step are those of unpacked passes, one a view."""
    check_step(pair_run(all_folders[kind], **{"jepa_lambda": LAMBDA, **changes}), step=1)


@st.composite
def pair_cases(draw):
    """(settings, kind, examples) of random lengths, rows filled to the last token included."""
    kind = draw(st.sampled_from(["pairs", "groups"]))
    paired, T = kind == "pairs", draw(st.sampled_from([32, 40]))
    room = T - (3 if paired else 2) - 10
    changes = dict(
        train_seq_len=T,
        train_batch_tokens=8 * T,
        grad_accum_steps=draw(st.sampled_from([1, 2])) if paired else 1,
        jepa_pred_tokens=draw(st.integers(0, 10)),
        jepa_reverse=draw(st.booleans()),
        jepa_pred_position=draw(st.sampled_from(["end", "front"])),
        loss_on=draw(st.sampled_from(["all", "target"])) if paired else "all",
    )
    examples = []
    for e in range(draw(st.integers(1, 8))):
        if paired:  # together up to the whole row
            text = draw(st.integers(1, room - 1))
            lengths = [text, draw(st.integers(1, room - text))]
        else:
            lengths = draw(st.lists(st.integers(1, room), min_size=2, max_size=4))
        rngs = [np.random.default_rng([e, v]) for v in range(len(lengths))]
        examples.append([rng.integers(0, 20, n) for rng, n in zip(rngs, lengths, strict=True)])
    return changes, kind, examples


@given(pair_cases())
@settings(max_examples=12, deadline=None)
def test_step_equals_every_view_alone_whatever_the_examples(case):
    changes, kind, examples = case
    changes = {**PAIRS, "jepa_lambda": LAMBDA, "num_layers": 2, **changes}
    cfg = make_config("unused", **changes)
    data = FakePairs(cfg, kind, fake_tokens(examples))
    check_step(shake_all(train_gpt.build_run(cfg, data, divide_batch(cfg, 0, 1, CPU))), step=0)


class Packed(NamedTuple):
    """A step of one process: its Examples, where each is Placed, and the Batches."""

    examples: list
    placed: list
    batches: list


def packed_step(run, step=0):
    chosen = run.data.examples_of(step)
    views = [run.data.sets["train"].views(e) for e in chosen]
    examples = [run.data.layout(v, run.objective) for v in views]
    placed = place_examples(examples, run.share.micro_rows, run.cfg.train_seq_len)
    return Packed(examples, placed, run.data.pack(examples, chosen, run.share).batches)


def packed_states(run, batch, tap=-1):
    return run.model._run_blocks(batch.idx, tap, batch.positions, tree_mask(batch.ends))


@pytest.mark.parametrize("kind", ["pairs", "groups"])
@pytest.mark.parametrize("position", ["end", "front"])
def test_hidden_states_of_a_packed_row_are_those_of_each_view_alone(folders, kind, position):
    run = pair_run(folders[kind], jepa_lambda=0.1, jepa_pred_tokens=3, jepa_pred_position=position)
    examples, placed, batches = packed_step(run)
    states = [packed_states(run, batch, 1) for batch in batches]
    shared = 0
    for packed, (m, places) in zip(examples, placed, strict=True):
        shared += len({row for row, _ in places}) < len(places)
        for d, (row, column) in zip(packed.documents, places, strict=True):
            k, inner = len(d.branch), d.fork + 1
            own = [column + i + (k if i >= inner else 0) for i in range(len(d.trunk))]
            branch = [*own[:inner], *range(column + inner, column + inner + k)]
            paths = {tuple(own): d.trunk, tuple(branch): [*d.trunk[:inner], *d.branch]}
            for columns, tokens in paths.items() if k else [(own, d.trunk)]:
                for found, single in zip(states[m], alone(run, tokens, 1), strict=True):
                    torch.testing.assert_close(found[row, list(columns)], single, **STATES)
    assert shared  # rows held more than one document


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_a_change_in_one_document_changes_nothing_in_another(folders, kind):
    """And trunks don't see [PRED]: every document is changed in turn."""
    run = pair_run(folders[kind], jepa_lambda=0.1, jepa_pred_tokens=2)
    examples, placed, batches = packed_step(run)
    rows = [{(p.micro_batch, row) for row, _ in p.places} for p in placed]
    chosen = next(i for i, own in enumerate(rows) if own & set().union(*rows[:i], *rows[i + 1 :]))
    batch = batches[placed[chosen].micro_batch]
    before = packed_states(run, batch)[0]

    def changed(row, columns, idx):
        again = batch.idx.clone()
        again[row, columns] = idx
        return (packed_states(run, replace(batch, idx=again))[0] != before).any(-1)

    for d, (row, column) in zip(examples[chosen].documents, placed[chosen].places, strict=True):
        own = slice(column, column + len(d))
        other = (batch.idx[row, own] + 5) % run.data.doc_token
        difference = changed(row, own, other)
        outside = torch.ones_like(difference)
        outside[row, own] = False
        assert difference[row, column] and not difference[outside].any()
        if d.branch:
            branch = slice(column + d.fork + 1, column + d.fork + 1 + len(d.branch))
            difference = changed(row, branch, 1)
            assert difference[row, branch].all() and difference.sum() == len(d.branch)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_block_mask_gives_the_numbers_of_the_boolean_mask(folders, heads):
    """Only the forward pass, which FlexAttention has on a CPU; on CUDA only the mask differs."""
    run = pair_run(folders["pairs"], jepa_lambda=0.1, jepa_pred_tokens=2)
    run.model = GPT(GPTConfig(run.data.vocab_size, 2, 64, *heads, 2))
    batch = packed_step(shake(run)).batches[0]
    blocks = tree_mask(batch.ends, flex=True)
    with torch.no_grad():
        boolean = packed_states(run, batch)[0]
        flex = run.model._run_blocks(batch.idx, -1, batch.positions, blocks)[0]
    torch.testing.assert_close(boolean, flex, **STATES)


# ---- targets


def targets_of(batches):
    return sorted(t for b in batches for t in b.targets[b.targets >= 0].tolist())


@pytest.mark.parametrize(
    "kind, loss_on", [("pairs", "all"), ("pairs", "target"), ("groups", "all")]
)
def test_targets_are_the_trunks_own_and_always_end(folders, kind, loss_on):
    """Nothing but trunk tokens, the end token always, Code by its place and not by a search."""
    run = pair_run(folders[kind], jepa_lambda=0.1, loss_on=loss_on, jepa_pred_tokens=4)
    _, placed, batches = packed_step(run)
    expected = []
    for number, (m, places) in zip(run.data.examples_of(0), placed, strict=True):
        trunks = trunks_of(run, number)
        for n, (row, column) in enumerate(places):
            targets = batches[m].targets[row, column:]
            if n < len(trunks):
                trunk, first = trunks[n]
                assert targets[targets >= 0][: len(trunk) - first].tolist() == trunk[first:]
                expected += trunk[first:]
    assert targets_of(batches) == sorted(expected)
    assert not set(expected) & set(run.data.preds)
    assert all(b.num_targets == len(expected) for b in batches)


# ---- a step is a set of examples


def test_examples_of_a_step_depend_on_the_seed_alone(folders):
    arms = [
        dict(jepa_lambda=0.0),
        dict(jepa_lambda=0.1),
        dict(jepa_lambda=0.1, jepa_pred_tokens=10, jepa_pred_position="front"),
        dict(jepa_lambda=0.1, jepa_ratio=0.5),
        dict(jepa_lambda=0.1, jepa_objective="span"),
        dict(grad_accum_steps=1),
    ]
    steps, trained_on = [], []
    for arm in arms:
        run = pair_run(folders["pairs"], **arm)
        steps.append([run.data.examples_of(s) for s in range(9)])
        for ranks in (1, 2):  # through the loader: the same targets, whatever the ranks
            shares = [replace(run.share, rank=r, world_size=ranks) for r in range(ranks)]
            read = [run.data.load(4, share, run.objective) for share in shares]
            trained_on.append(targets_of([b for data in read for b in data.batches]))
    assert all(s == steps[0] for s in steps)
    assert all(t == trained_on[0] for t in trained_on) and len(trained_on[0]) > 100
    other = pair_run(folders["pairs"], seed=2).data
    assert [other.examples_of(s) for s in range(9)] != steps[0]


def test_an_epoch_holds_every_example_once_and_steps_have_their_tokens(folders):
    cfg = make_config(folders["pairs"], train_batch_tokens=64)
    data = open_data(cfg)
    seen, trunks = [], data.sets["train"].trunks()
    for step in range(100):
        chosen = data.examples_of(step)
        assert chosen
        seen += chosen
        # Never more than an example ahead.
        assert abs(trunks[seen].sum() - (step + 1) * 64) < trunks.max()
    n = len(data.sets["train"])
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(seen) > 2 * n
    again = open_data(cfg)
    assert [data.examples_of(s) for s in (40, 3, 77)] == [again.examples_of(s) for s in (40, 3, 77)]


def test_one_shape_and_one_graph_for_each_kind_of_step(folders):
    run = make_run(folders["pairs"], **PAIRS, jepa_lambda=0.1, jepa_ratio=0.5, iterations=16)
    shapes, graphs = set(), []
    for step in range(6):
        for objective in (None, run.objective):
            for batch in run.data.load(step, run.share, objective).batches:
                tensors = batch.idx, batch.positions, batch.ends, batch.pairs, batch.weight
                shapes.add(tuple(tuple(x.shape) for x in tensors))
    assert len(shapes) == 1

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(
        train_gpt.training_loss, backend=backend, fullgraph=True, dynamic=False
    )
    log = train_run(with_loss(run, compiled))
    assert len(graphs) == 2 and 0 < len(log.curve("jepa_loss")) < 16


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_packing_wastes_little(folders, kind):
    run = make_run(
        folders[kind], **{**PAIRS, "grad_accum_steps": 8}, jepa_lambda=0.1, train_batch_tokens=1024
    )
    examples, _, batches = packed_step(run)
    used = sum(len(d) for e in examples for d in e.documents)
    # All but the last micro-batch; short rows of long documents waste most.
    assert used > 0.8 * sum(b.idx.numel() for b in batches[:-1])


def test_flops_are_those_of_the_layout(folders):
    run = make_run(folders["pairs"], **PAIRS, jepa_lambda=0.1)

    def counted(batches):
        tokens = sum(b.idx.numel() for b in batches)
        return tokens, sum(tree_mask(b.ends).sum().item() for b in batches)

    for objective in (None, run.objective):
        batches, *costs = run.data.load(2, run.share, objective)
        assert tuple(costs) == counted(batches)
    shares = [replace(run.share, rank=rank, world_size=2) for rank in (0, 1)]
    halves = [run.data.load(2, share, run.objective) for share in shares]
    for _, *costs in halves:  # each rank knows what all of them spend
        assert tuple(costs) == counted(halves[0].batches + halves[1].batches)


def test_train_flops_stops_the_run(folders):
    log = train_in_process(folders["pairs"], iterations=20)
    cap = 6.5 * log.costs[0]["step_flops"]
    capped = train_in_process(folders["pairs"], iterations=20, train_flops=cap)
    totals = [costs["train_flops"] for costs in capped.costs if "step_flops" in costs]
    assert totals[-2] < cap <= totals[-1] and len(totals) < 20
    assert capped.costs[0]["step_flops"] == log.costs[0]["step_flops"]


# ---- the next step is packed ahead


def missed_steps(run, steps, progress):
    """The steps of a run that had to be packed while they were waited for."""
    data, missed, load = run.data, [], run.data.load

    def watched(step, share, objective=None):
        if data.ahead is None or data.ahead[0] != (step, share, objective):
            missed.append(step)
        return load(step, share, objective)

    data.load = watched
    for step in range(steps):
        if run.cfg.diag_every:
            diagnose(run, step, train_gpt.training_loss)  # only looks
        jepa_lambda = train_gpt.jepa_schedule(run.cfg, progress(step), step)
        train_gpt.training_step(run, step, 0.0, jepa_lambda)
    return missed


@pytest.mark.parametrize(
    "changes", [{}, dict(jepa_ratio=0.5), dict(jepa_lambda=0.0), dict(diag_every=2)]
)
def test_the_next_step_is_packed_ahead(folders, changes):
    """With dropped steps too: only the first step of a run is packed while it is waited for."""
    run = make_run(folders["pairs"], **{**PAIRS, "jepa_lambda": 0.1, **changes})
    assert missed_steps(run, 6, lambda step: 0.0) == [0]


def test_the_next_step_is_packed_ahead_outside_the_term_s_window(folders):
    """The first step of the term is a surprise, and the step after its last."""
    window = dict(jepa_start_frac=0.4, jepa_end_frac=0.7)
    run = make_run(folders["pairs"], **PAIRS, jepa_lambda=0.1, **window)
    assert missed_steps(run, 10, lambda step: step / 10) == [0, 4, 7]


# ---- diagnostics


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("pairs", dict(jepa_layer=1)),
        ("groups", {}),
        ("groups", dict(jepa_distance="infonce")),
        ("steps", dict(jepa_objective="step")),
    ],
)
def test_diagnostics_of_packed_examples(all_folders, kind, changes):
    """Gradients against the reference's; matched views against the micro-batches' own term."""
    run = pair_run(all_folders[kind], jepa_lambda=LAMBDA, diag_every=1, **changes)
    found = diagnose(run, 2, train_gpt.training_loss)
    assert all(math.isfinite(x) for x in found.values()) and 1 <= found["effective_rank"] <= 32
    ce, term = (
        torch.cat([g.flatten() for g in gradients_after(run, loss).values()])
        for loss in reference_losses(run, 2)
    )
    ratio, cosine = LAMBDA * term.norm() / ce.norm(), F.cosine_similarity(ce, term, dim=0)
    assert found["grad_ratio"] == pytest.approx(ratio.item(), rel=1e-3)
    assert found["grad_cosine"] == pytest.approx(cosine.item(), abs=1e-3)
    if run.cfg.jepa_distance == "cosine":
        views = []
        for step in range(2, 10):
            batch = run.data.read(step, run.share, run.objective).batches[0]
            views += views_of_batch(run, batch)
        mean = torch.stack(reference_distances("cosine", views)).mean().item()
        assert found["jepa_matched"] == pytest.approx(mean, rel=1e-4)


def gradients_after(run, loss):
    loss.backward()
    return gradients_of(run)


# ---- the off switch and dropout


def test_the_twin_without_the_term_is_a_plain_run(folders):
    off = train_in_process(folders["pairs"])
    others = dict(
        jepa_objective="pair",
        jepa_pred_tokens=7,
        jepa_reverse=True,
        jepa_gamma=3.0,
        jepa_ratio=0.2,
        jepa_distance="mse",
        jepa_predictor="linear",
        jepa_norm=0,
    )
    other = train_in_process(folders["pairs"], jepa_lambda=0.0, **others)
    assert off.rows == other.rows and off.costs == other.costs and not off.curve("jepa_loss")


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_ratio_1_is_no_dropout_and_a_dropped_step_is_a_plain_one_bit_for_bit(folders, kind):
    with_term = {**PAIRS, "jepa_lambda": 0.1}
    kept = [keeps_term(1337, step, 0.4) for step in range(12)]
    assert 0 < sum(kept) < 12
    dropped, results = kept.index(False), []
    for changes in (dict(with_term, jepa_ratio=0.4), dict(with_term, jepa_lambda=0.0)):
        run = keep_gradients(pair_run(folders[kind], **changes))
        weight = train_gpt.jepa_schedule(run.cfg, 0.0, dropped)
        result = train_gpt.training_step(run, dropped, 0.0, weight)
        assert result.term is None
        numbers = [result.ce, result.grad_norm, torch.tensor(result.flops)]
        results.append(numbers + list(gradients_of(run).values()))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    always = train_in_process(folders[kind], **with_term)
    assert len(always.curve("jepa_loss")) == 8
    some = train_in_process(folders[kind], **with_term, jepa_ratio=0.4, iterations=12)
    found = [step - 1 for step, values in some.rows if "jepa_loss" in values]
    assert found == [step for step, keep in enumerate(kept) if keep]


def test_a_step_without_the_term_leaves_the_predictor_alone(folders):
    """Momentum or not."""
    run = pair_run(folders["pairs"], jepa_lambda=0.5, jepa_predictor="linear")
    weight = run.objective.predictor.weight
    for jepa_lambda, moves in ((None, False), (0.5, True), (None, False)):
        before = weight.clone()
        train_gpt.training_step(run, 0, 0.0, jepa_lambda)
        assert torch.equal(weight, before) != moves


def test_term_lowers_itself(folders):
    """The gradient points the right way."""
    changes = dict(jepa_objective="pair", jepa_lambda=2.0, jepa_distance="infonce", iterations=15)
    curve = train_in_process(folders["pairs"], **changes, grad_accum_steps=1).curve("jepa_loss")
    assert curve[-1] < curve[0] - 0.2


# ---- spans in packed rows


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_span_objective_stays_inside_trunks_and_matches_its_definition(folders, kind):
    run = pair_run(folders[kind], jepa_lambda=LAMBDA, jepa_objective="span", jepa_spans=2)
    T, step = run.cfg.train_seq_len, 2
    examples, placed, batches = packed_step(run, step)
    trunks = {
        (m, row * T + column): d.trunk
        for packed, (m, places) in zip(examples, placed, strict=True)
        for d, (row, column) in zip(packed.documents, places, strict=True)
    }
    draw_step(run.objective, batches, run.cfg.seed, step)
    distances = []
    for m, batch in enumerate(batches):
        counted = batch.drawn["weight"] > 0
        for before, last, first, end in batch.drawn["places"][:, counted].T.tolist():
            trunk = trunks[m, first]  # its spans begin with it, and with nothing else
            longest = max(1, len(trunk) * run.cfg.jepa_max_span_frac)
            assert end - first + 1 == len(trunk) and first <= before < last <= end
            assert last - before <= longest
            h = alone(run, trunk).tapped
            patch = h[last - first] - h[before - first]
            context = h[-1] - h[0] - patch
            distances.append(1 - F.cosine_similarity(context, patch, dim=0))
    assert len(distances) == 2 * sum(len(trunk) >= 3 for trunk in trunks.values())
    result = train_gpt.training_step(keep_gradients(run), step, 0.0, LAMBDA)
    # differences of states lose a digit or two of float32
    assert result.term.item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


# ---- evaluation


@pytest.mark.parametrize(
    "kind, loss_on", [("pairs", "all"), ("pairs", "target"), ("groups", "all")]
)
def test_evaluation_scores_every_trunk_alone(folders, kind, loss_on):
    """The term's views cost nothing there, and ranks share the examples."""
    run = pair_run(folders[kind], jepa_lambda=LAMBDA, loss_on=loss_on)
    nats, count, text_bytes = 0.0, 0, 0
    for number in range(len(run.data.sets["val"])):
        for trunk, first in trunks_of(run, number, "val"):
            log_p = run.model.logits(alone(run, trunk).stream).log_softmax(-1).double()
            nats -= sum(log_p[i - 1, trunk[i]].item() for i in range(first, len(trunk)))
            count += len(trunk) - first
            text_bytes += sum(len(run.data.token_table[t]) for t in trunk[first:])
            text_bytes -= run.data.separator in trunk[first:]  # it stands for no text
    scores = train_gpt.evaluate(run, MemoryLog())
    assert scores.val_loss == pytest.approx(nats / count, rel=1e-5)
    assert scores.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    shared = []
    for rank in (0, 1):
        share = replace(run.share, rank=rank, world_size=2)
        shared += [batch for _, batch in run.data.val_batches(share)]
    assert targets_of(shared) == targets_of([b for _, b in run.data.val_batches(run.share)])


# ---- ranks


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("pairs", dict(jepa_distance="infonce")),
        ("groups", dict(jepa_pred_tokens=2)),
        ("pairs", dict(jepa_objective="span")),
    ],
)
def test_two_ranks_share_a_step_as_one_does(folders, kind, changes):
    """Without processes: the parts of two ranks add up to the whole, with unequal pair counts."""
    run = keep_gradients(pair_run(folders[kind], jepa_lambda=LAMBDA, **changes))
    whole = train_gpt.training_step(run, 1, 0.0, LAMBDA)
    expected = gradients_of(run)
    shares = [replace(run.share, rank=rank, world_size=2) for rank in (0, 1)]
    parts = [run.data.read(1, share, run.objective).batches for share in shares]
    counts = [sum(batch.weight.sum().item() for batch in part) for part in parts]
    assert counts[0] != counts[1]
    batches = parts[0] + parts[1]
    assert {batch.total_items for batch in batches} == {sum(counts)}  # what is drawn for
    draw_step(run.objective, batches, run.cfg.seed, 1)
    found = add_up(run, batches, LAMBDA)
    assert found == pytest.approx([whole.ce.item(), whole.term.item()], rel=1e-5)
    assert_gradients(gradients_of(run), expected)


@pytest.mark.slow
def test_two_processes_train_as_one(folders, run_id):
    """With InfoNCE: its negatives are the micro-batch's, whichever rank holds it."""
    flags = [
        "--jepa_objective=pair",
        "--jepa_lambda=0.5",
        "--jepa_distance=infonce",
        "--iterations=3",
        "--train_seq_len=64",
        "--num_layers=2",
        "--train_batch_tokens=512",
    ]
    curves = []
    for name, ranks, accum in ((f"{run_id}-one", 0, 4), (f"{run_id}-two", 2, 2)):
        more = [f"--grad_accum_steps={accum}", f"--run_id={name}"]
        done = run_cli(folders["pairs"], *flags, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        names = ("train_loss", "jepa_loss", "val_loss")
        curves.append([[row[n] for n in names if n in row] for row in metrics_of(name)])
    for step, (one, two) in enumerate(zip(*curves, strict=True)):
        # Sums in another order. From the second step on, Adam has divided the rounding of rare
        # tokens' gradients by their own size.
        assert one == pytest.approx(two, rel=2e-3 if step else 1e-5)
    losses = [result_of(f"{run_id}-{name}")["val_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


# ---- examples that don't fit


@pytest.fixture(scope="module")
def long_pairs(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("long") / "long", longest=30)


def test_long_examples_stop_or_are_skipped(long_pairs):
    message = (
        r"train examples of .* don't fit a row of TRAIN_SEQ_LEN=32: "
        r"choose LONG_EXAMPLES=skip or truncate, or TRAIN_SEQ_LEN=\d\d"
    )
    with pytest.raises(ValueError, match=message):
        make_run(long_pairs)
    changes = dict(long_examples="skip", train_seq_len=48, train_batch_tokens=384)
    skip = make_run(long_pairs, **changes).data
    assert len(skip.sets["train"]) < 43 and skip.sets["train"].trunks().max() <= 38
    assert "skipped" in skip.warnings[0]
    with pytest.raises(ValueError, match="so none is left: raise TRAIN_SEQ_LEN to"):
        make_run(long_pairs, long_examples="skip", train_seq_len=16)


def test_long_examples_lose_the_tail_of_their_longer_text(long_pairs, tmp_path):
    """A short text is left alone, and the step is that of what is left."""
    run = pair_run(long_pairs, long_examples="truncate", jepa_lambda=LAMBDA, jepa_pred_tokens=10)
    cut = run.data
    assert len(cut.sets["train"]) == 43 and cut.sets["train"].trunks().max() == 22
    assert "truncated" in cut.warnings[0]
    whole = make_run(long_pairs, train_seq_len=128, train_batch_tokens=1024).data
    for e in range(43):
        both = cut.sets["train"].views(e), whole.sets["train"].views(e)
        for left, full in zip(*both, strict=True):
            assert left == full[: len(left)] and (len(left) == len(full) or len(left) >= 9)
    check_step(run, step=0)
    groups = make_set(tmp_path / "groups", "groups", longest=30)
    cut = make_run(groups, long_examples="truncate").data
    assert cut.sets["train"].length.max() == 32 - 2 - 10


@pytest.mark.parametrize("kind", ["pairs", "groups"])
@pytest.mark.parametrize("position", ["", "front"])
def test_an_example_that_fits_no_micro_batch_is_found_before_the_run(folders, kind, position):
    """With the views that the term encodes, if there is one."""
    arm = dict(jepa_lambda=0.1, jepa_pred_tokens=10, jepa_pred_position=position)
    run = make_run(folders[kind], **PAIRS, **(arm if position else {}))
    run.data.check_micro_batch(replace(run.share, micro_rows=8), run.objective)
    message = "does not fit a micro-batch of 1 rows of 32: lower GRAD_ACCUM_STEPS"
    if kind == "groups" or position:
        with pytest.raises(ValueError, match=message):
            run.data.check_micro_batch(replace(run.share, micro_rows=1), run.objective)


@given(
    st.integers(1, 6),
    st.sampled_from(["pairs", "groups"]),
    st.lists(st.integers(1, 186), min_size=2, max_size=8),
    st.builds(
        dict,
        preds=st.sampled_from([(), (22, 23, 24), tuple(range(22, 32))]),
        front=st.booleans(),
        reverse=st.booleans(),
    ),
)
@example(4, "groups", [100] * 3, dict(preds=tuple(range(22, 32)), front=True, reverse=False))
@example(1, "groups", [80] * 2, dict(preds=tuple(range(22, 32)), front=True, reverse=True))
@settings(max_examples=80, deadline=None)
def test_what_check_micro_batch_passes_always_packs(rows, kind, lengths, options):
    """The bound by which it skips examples is safe."""
    T = 200
    changes = dict(train_seq_len=T, train_batch_tokens=rows * T, long_examples="truncate")
    cfg = make_config("unused", grad_accum_steps=1, **changes)
    views = [np.full(n, number) for number, n in enumerate(lengths)]
    data = FakePairs(cfg, kind, fake_tokens([views[:2] if kind == "pairs" else views]))
    objective, share = OBJECTIVES["pair"](Options(32, **options)), divide_batch(cfg, 0, 1, CPU)
    layouts = [data.layout(data.sets["train"].views(0), o) for o in (None, objective)]
    try:
        data.check_micro_batch(share, objective)
    except ValueError:
        with pytest.raises(ValueError, match="does not fit"):
            for laid_out in layouts:
                place_examples([laid_out], rows, T)
    else:
        for laid_out in layouts:
            assert place_examples([laid_out], rows, T)[0].micro_batch == 0


# ---- misuse


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (
            "pairs",
            dict(jepa_pred_tokens=11),
            "JEPA_PRED_TOKENS=11: must be at least 0 and at most 10",
        ),
        ("pairs", dict(jepa_ratio=0.0), "JEPA_RATIO=0.0: must be above 0"),
        ("pairs", dict(jepa_objective="pear"), "JEPA_OBJECTIVE=pear: must be span, pair"),
        ("groups", dict(loss_on="target"), "LOSS_ON=target: .* holds groups"),
        ("pairs", dict(vocab_size=265), "VOCAB_SIZE=265: the tokens of .* need 2[67]"),
        ("pairs", dict(train_seq_len=8), "don't fit a row of TRAIN_SEQ_LEN=8: choose"),
    ],
)
def test_misuse_is_one_line(folders, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(folders[kind], **changes)


@pytest.mark.parametrize("objective", ["pair", "step"])
def test_pairs_are_needed_and_text_has_no_target(data_path, objective):
    with pytest.raises(ValueError, match=f"JEPA_OBJECTIVE={objective}: .* holds text"):
        make_run(data_path, jepa_objective=objective, jepa_lambda=0.1)
    with pytest.raises(ValueError, match="LOSS_ON=target: .* holds text"):
        make_run(data_path, loss_on="target")


@pytest.mark.parametrize("kind, missing", [("steps", 14), ("groups", 43)])
def test_examples_without_two_steps_are_warned_of(all_folders, kind, missing):
    """A group has none: the term would be zero all along."""
    changes = dict(PAIRS, jepa_objective="step", jepa_lambda=0.1, train_seq_len=64)
    run = make_run(all_folders[kind], **changes, train_batch_tokens=1 << 12)
    run.data.examples_of = lambda step: range(len(run.data.sets["train"]))
    lines = list(train_gpt.describe(run))
    assert (
        f"warning: {missing} examples of the first step have no term: fewer than two steps" in lines
    )


# ---- GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_step_equals_the_cpu_step(folders):
    changes = dict(PAIRS, jepa_lambda=LAMBDA, model_dim=128, jepa_pred_tokens=2)
    cfg, results = make_config(folders["pairs"], **changes), []
    data = open_data(cfg)
    for device in ("cpu", "cuda"):
        run = train_gpt.build_run(cfg, data, divide_batch(cfg, 0, 1, torch.device(device)))
        if device == "cuda":
            run.compile = train_gpt.compiled
        result = train_gpt.training_step(keep_gradients(run), 0, 0.0, LAMBDA)
        losses = torch.stack([result.ce, result.term]).cpu()
        results.append((losses, [g.cpu() for g in gradients_of(run).values()]))
    (x, gx), (y, gy) = results
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # TF32 products on the GPU
    for p, q in zip(gx, gy, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3 * p.abs().max().item())
