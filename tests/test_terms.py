"""The terms of rows and documents against slow references: each document alone, token by token."""

import copy
import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import add_up, keep_gradients, make_run, metrics_of, run_cli, shake, train_in_process
from model import LanguageModel, norm
from nanojepa.batches import draw_step
from nanojepa.objectives import OBJECTIVES, Options, StepRandom
from nanojepa.objectives.masked import behind_blanks, draw_blanks
from nanojepa.packing import Batch

ENCODE_ONCE = ["future", "next", "mtp"]
TERMS = [*ENCODE_ONCE, "masked", "masked_ce", "masked,mtp:0.5"]
WEIGHT = 0.5


class Piece(NamedTuple):
    """A document of packed rows, or a fragment of one in a row of text."""

    tokens: list
    targets: list  # of each token, -1 for none
    holes: list  # whether a token can't be read


def pieces(run, step=1):
    """The Pieces of a step as the objective draws it."""
    batches = run.data.read(step, run.share, run.objective).batches
    draw_step(run.objective, batches, run.cfg.seed, step)
    for batch in batches:
        blank = next((x for n, x in batch.drawn.items() if n.endswith("blank")), None)
        blank = torch.zeros_like(batch.idx) if blank is None else blank
        columns = (x.tolist() for x in (batch.document, batch.idx, batch.targets, blank))
        for rows in zip(*columns, strict=True):
            for number, group in itertools.groupby(zip(*rows, strict=True), lambda each: each[0]):
                if number >= 0:
                    yield Piece(*map(list, list(zip(*group, strict=True))[1:]))


def stream(run, tokens, holes=None):
    """The states (T, D) of one document; a hole is a token that embeds as zeros."""
    model, idx = run.model, torch.tensor([tokens])
    if holes and any(holes):
        model = copy.deepcopy(model)
        for table in (model.embed, model.value_embed):
            table.weight = torch.nn.Parameter(F.pad(table.weight, (0, 0, 0, 1)))
        idx = torch.where(torch.tensor([holes], dtype=torch.bool), len(table.weight) - 1, idx)
    return model._run_blocks(idx, -1)[0][0]


def by_mlp(objective, x):
    """What its MLP makes of one vector."""
    *others, last = objective.mlp.matrices
    for matrix in others:
        x = F.relu(matrix @ x).square()
    return last @ x


def log_p(run, states):
    return run.model.logits(states).log_softmax(-1)


def mean(terms):
    return torch.stack(list(terms)).mean().item()


def future(run, objective):
    """1 - cos(h + MLP(h), the mean of the next eight h)."""
    for piece in pieces(run):
        h = norm(stream(run, piece.tokens))
        for t in range(len(h) - 8):
            u = h[t] + by_mlp(objective, h[t])
            yield 1 - F.cosine_similarity(u, h[t + 1 : t + 9].mean(0), dim=0)


def next_latent(run, objective):
    """SmoothL1 and the divergence of the predictions, of the next state and the predicted one."""
    for piece in pieces(run):
        h = norm(stream(run, piece.tokens))
        e = norm(run.model.embed(torch.tensor(piece.tokens)))
        for t in range(len(h) - 1):
            seen = norm(torch.cat((norm(e[t + 1]), norm(h[t]))))
            u = h[t] + by_mlp(objective, seen)
            gap = (u - h[t + 1]).abs()
            latent = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
            p, q = log_p(run, h[t + 1]), log_p(run, u)
            yield latent + (p.exp() * (p - q)).sum()


def masked(run, objective):
    """1 - cos(g + MLP(g), h) from the first hole of a document on."""
    for piece in pieces(run):
        h, g = (norm(stream(run, piece.tokens, holes)) for holes in (None, piece.holes))
        for t in range(len(h)):
            if any(piece.holes[: t + 1]):
                yield 1 - F.cosine_similarity(g[t] + by_mlp(objective, g[t]), h[t], dim=0)


def masked_ce(run, objective):
    """The cross entropy of every target, from a text with holes."""
    for piece in pieces(run):
        z = log_p(run, stream(run, piece.tokens, piece.holes))
        for t, target in enumerate(piece.targets):
            if target >= 0:
                yield -z[t, target]


def mtp(run, objective):
    """CE(t+2) + CE(t+3) / 2 where there is a t+2, divided by the number of those."""
    for piece in pieces(run):
        z, targets = log_p(run, stream(run, piece.tokens)), piece.targets
        for t in range(len(z) - 1):
            if targets[t + 1] >= 0:
                later = -z[t, targets[t + 2]] / 2 if t + 2 < len(z) and targets[t + 2] >= 0 else 0
                yield later - z[t, targets[t + 1]]


REFERENCES = {
    "future": future,
    "next": next_latent,
    "masked": masked,
    "masked_ce": masked_ce,
    "mtp": mtp,
}


def path_of(kind, data_path, folders):
    return data_path if kind == "text" else folders["pairs"]


def term_run(path, name, **changes):
    """A Run whose weights, the objective's too, are far from their beginning."""
    changes = {"jepa_objective": name, "jepa_lambda": WEIGHT, "mask_documents": True} | changes
    run = keep_gradients(shake(make_run(path, **changes)))
    with torch.no_grad():
        for p in run.objective.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return run


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_its_definition(data_path, folders, kind, accum, name):
    run = term_run(path_of(kind, data_path, folders), name, grad_accum_steps=accum)
    found = train_gpt.training_step(run, 1, 0.0, WEIGHT).term.item()
    expected = 0.0
    for part in name.split(","):
        own, _, factor = part.partition(":")
        objective = run.objective.terms[own] if "," in name else run.objective
        expected += float(factor or 1) * mean(REFERENCES[own](run, objective))
    # float32 sums in another order
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_the_step_s_gradient_is_that_of_the_whole_loss(data_path, name):
    """Though one pass of the head scores the next token and what the term adds."""
    run = term_run(data_path, name, grad_accum_steps=1)
    result = train_gpt.training_step(run, 1, 0.0, WEIGHT)
    found = [p.grad.clone() for p in run.parameters()]
    run.model.zero_grad(), run.objective.zero_grad()
    (batch,) = run.data.read(1, run.share, run.objective).batches
    draw_step(run.objective, [batch], run.cfg.seed, 1)
    states = run.lm.states(batch.idx, batch.positions, batch.ends)
    logits = run.model.logits(states).flatten(0, 1)
    ce = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=-1)
    term = run.objective.whole_loss(run.lm, batch, states, batch.drawn)
    (ce + WEIGHT * term).backward()
    assert [result.ce.item(), result.term.item()] == pytest.approx(
        [ce.item(), term.item()], rel=1e-5
    )
    for p, g in zip(run.parameters(), found, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item())


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("name", TERMS)
def test_two_ranks_share_a_step_as_one_does(data_path, folders, kind, name):
    """Without processes: the parts of two ranks add up to the whole."""
    run = term_run(path_of(kind, data_path, folders), name, grad_accum_steps=2)
    whole = train_gpt.training_step(run, 1, 0.0, WEIGHT)
    expected = [p.grad.clone() for p in run.parameters()]
    run.model.zero_grad(), run.objective.zero_grad()
    shares = [
        replace(run.share, rank=rank, world_size=2, micro_rows=run.share.micro_rows // 2)
        for rank in (0, 1)
    ]
    batches = [
        batch for share in shares for batch in run.data.read(1, share, run.objective).batches
    ]
    draw_step(run.objective, batches, run.cfg.seed, 1)
    found = add_up(run, batches, WEIGHT)
    # float32 sums in another order
    assert found == pytest.approx([whole.ce.item(), whole.term.item()], rel=1e-5)
    for p, g in zip(run.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5 * g.abs().max().item())


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_falls_while_it_trains(data_path, folders, kind, name):
    log = train_in_process(
        path_of(kind, data_path, folders),
        jepa_objective=name,
        jepa_lambda=WEIGHT,
        iterations=20,
        diag_every=20,
    )
    curve = log.curve("jepa_loss")
    assert curve[-1] < curve[0]
    numbers = [values for _, values in log.rows if "grad_ratio" in values][-1]
    assert numbers["grad_ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_two_processes_train_compiled_as_one(data_path, run_id, name):
    flags = [f"--jepa_objective={name}", f"--jepa_lambda={WEIGHT}", "--iterations=3"]
    flags += ["--compile_scope=whole", "--mask_documents"]
    curves = []
    for number, (ranks, accum) in enumerate([(0, 4), (2, 2)]):
        more = [f"--grad_accum_steps={accum}", f"--run_id={run_id}-{number}"]
        done = run_cli(data_path, *flags, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = metrics_of(f"{run_id}-{number}")
        names = ("train_loss", "jepa_loss", "val_loss")
        curves.append([[row[n] for n in names if n in row] for row in rows])
    for step, (one, two) in enumerate(zip(*curves, strict=True)):
        # Sums in another order. From the second step on, Adam has divided the rounding of rare
        # tokens' gradients by their own size.
        assert one == pytest.approx(two, rel=2e-3 if step else 1e-5)


# ---- what predicts doesn't see what it predicts


@given(st.integers(0, 1000), st.integers(0, 22))
@settings(max_examples=30, deadline=None)
def test_what_predicts_sees_no_later_token(data_path_of_run, seed, t):
    """Other tokens after t, or after t + 1 where it is known, change nothing at t."""
    run = data_path_of_run
    generator = torch.Generator().manual_seed(seed)
    idx, other = torch.randint(0, 100, (2, 1, 24), generator=generator)
    lm = LanguageModel(run.model, -1)

    def predictions(name, idx, at):
        objective = run.objective.terms[name]
        batch = Batch(idx, idx, document=torch.zeros_like(idx), items=torch.arange(1))
        batch.total_items = 1
        drawn = objective.draw(batch, StepRandom(seed, 0, batch.items, 1))
        if name == "next":
            return objective.predict(lm, idx, norm(lm.states(idx)))[0][: at + 1]
        if name == "masked_ce":
            return lm.states(idx, blank=drawn["blank"])[0][: at + 1]
        return objective.views(lm, batch, lm.states(idx), drawn).u[0][: at + 1]

    for name, known in (("future", t), ("masked", t), ("masked_ce", t), ("next", t + 1)):
        changed = torch.cat((idx[:, : known + 1], other[:, known + 1 :]), 1)
        assert torch.equal(predictions(name, idx, t), predictions(name, changed, t)), name


@pytest.fixture(scope="module")
def data_path_of_run(data_path):
    torch.set_num_threads(1)
    return term_run(data_path, "future,masked,masked_ce,next")


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_hole_is_not_read(data_path_of_run, seed):
    """Not by the states after it, and not by its own."""
    generator = torch.Generator().manual_seed(seed)
    idx, other = torch.randint(0, 100, (2, 2, 24), generator=generator)
    batch = Batch(idx, idx, items=torch.arange(2), total_items=2)
    blank = draw_blanks(batch, StepRandom(seed, 0, batch.items, 2))
    lm = LanguageModel(data_path_of_run.model, -1)
    states = [lm.states(x, blank=blank) for x in (idx, torch.where(blank, other, idx))]
    assert torch.equal(*states)
    assert not blank[:, 0].any()


def test_future_s_target_gets_no_gradient():
    objective = OBJECTIVES["future"](Options(width=4))
    states = torch.randn(2, 20, 4, requires_grad=True)
    batch = Batch(torch.zeros(2, 20), torch.zeros(2, 20), document=torch.zeros(2, 20))
    drawn = objective.draw(batch, None)
    u, v, *_ = objective.views(None, batch, states, drawn)
    assert u.shape == v.shape == (2, 12, 4) and drawn["weight"].shape == (2, 12)
    assert not v.requires_grad
    for t in range(12):
        gradient = torch.autograd.grad(u[:, t].sum(), states, retain_graph=True)[0]
        assert gradient[:, [n for n in range(20) if n != t]].abs().max() == 0


def test_neither_the_clean_states_nor_the_next_s_head_get_a_gradient(data_path_of_run):
    run = data_path_of_run
    idx = torch.randint(0, 100, (2, 24))
    batch = Batch(idx, idx, document=torch.zeros_like(idx), items=torch.arange(2), total_items=2)
    states = run.lm.states(idx).detach().requires_grad_()
    objective = run.objective.terms["masked"]
    drawn = objective.draw(batch, StepRandom(0, 0, batch.items, 2))
    assert not objective.views(run.lm, batch, states, drawn).v.requires_grad
    run.model.zero_grad()
    objective = run.objective.terms["next"]
    objective.loss(run.lm, batch, states, objective.draw(batch, None)).backward()
    assert run.model.head.weight.grad is None
    # The last state is a target and never predicts.
    assert states.grad[:, :-1].abs().sum() > 0 and states.grad[:, -1].abs().sum() == 0


# ---- what is drawn


def test_the_share_of_holes_is_uniform_up_to_a_half():
    batch = Batch(torch.zeros(4000, 64), None, items=torch.arange(4000), total_items=4000)
    blank = draw_blanks(batch, StepRandom(0, 0, batch.items, 4000))
    shares = blank[:, 1:].float().mean(1)
    # The standard deviation of a uniform number up to a half is 0.144; 4,000 rows make 0.0023.
    assert shares.mean().item() == pytest.approx(0.25, abs=0.012)
    assert shares.std().item() == pytest.approx(0.151, abs=0.01)  # and 63 tokens add theirs


def test_what_counts_begins_at_the_first_hole_that_is_seen():
    idx = torch.zeros(1, 8, dtype=torch.int64)
    blank = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    seen = behind_blanks(Batch(idx, None, document=document), blank)
    assert seen.int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    ends = torch.tensor([[4, 4, 4, 4, 8, 8, 8, 8]])
    seen = behind_blanks(Batch(idx, None, document=document, ends=ends), blank)
    assert seen.int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


def test_two_that_lay_out_are_refused_in_packed_rows(folders):
    with pytest.raises(ValueError, match="the objectives span and masked both lay out packed rows"):
        run = make_run(folders["pairs"], jepa_objective="span,masked", jepa_lambda=1.0)
        run.data.read(0, run.share, run.objective)
