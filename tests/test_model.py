"""model.py: the one kernel, its tap, its cache, generation, and what objectives see of it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from model import GPT, GPTConfig, KVCache, LanguageModel, norm
from nanojepa.packing import Document, Example, pack_rows

# The same float32 sums in another order (other matrix shapes): some units of 1.2e-7 on values of
# size 1, through 3 blocks.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
SHAPE = dict(vocab_size=50, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2)


def small_gpt(**settings):
    """A GPT whose every weight is random, so that no path is switched off by initialisation."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **settings}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def random_tokens(*shape):
    return torch.randint(0, 50, shape)


def naive_attention(block, config, y, values):
    """The heads' outputs (B, T, D), head by head. y (B, T, D): the normed stream; values: those
    that the tokens add to their own, (B, T, kv width) or None."""
    T, K = y.size(1), config.model_dim // config.num_heads
    group = config.num_heads // config.num_kv_heads
    angle = torch.arange(T)[:, None] * config.rope_base ** (-torch.arange(0, K, 2) / K)
    future = torch.ones(T, T).triu(1).bool()

    def turn(x):  # each pair (i, i + K/2) is turned by its angle
        x1, x2 = x[..., : K // 2], x[..., K // 2 :]
        turned = x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() - x1 * angle.sin()
        return torch.cat(turned, -1)

    heads = []
    for head in range(config.num_heads):
        own, shared = slice(head * K, (head + 1) * K), head // group
        kv = slice(shared * K, (shared + 1) * K)
        q = block.attn.q_gain[head] * turn(norm(y @ block.attn.q.weight[own].T))
        k = turn(norm(y @ block.attn.k.weight[kv].T))
        v = y @ block.attn.v.weight[kv].T
        if values is not None:
            v = v + values[..., kv]
        scores = (q @ k.mT / K**0.5).masked_fill(future, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1)


def naive_forward(model, idx):
    """The network written out again; returns the stream after every block."""
    x = x0 = norm(model.embed.weight[idx])
    values = None if model.value_embed is None else model.value_embed.weight[idx]
    streams = []
    for block in model.blocks:
        x = block.mix[0] * x + block.mix[1] * x0
        y = naive_attention(block, model.config, norm(x), values)
        x = x + y @ block.attn.proj.weight.T
        x = x + F.relu(norm(x) @ block.fc.weight.T) ** 2 @ block.proj.weight.T
        streams.append(x)
    return streams


# ---- the kernel and its tap


@pytest.mark.parametrize("layers, value_embed", [(1, True), (3, True), (4, False)])
def test_kernel_and_every_tap_match_the_network_written_out(layers, value_embed):
    model, idx = small_gpt(num_layers=layers, value_embed=value_embed), random_tokens(2, 11)
    streams = naive_forward(model, idx)
    for tap, stream in [*enumerate(streams), (-1, streams[-1])]:
        x, tapped = model._run_blocks(idx, tap)
        torch.testing.assert_close(tapped, stream, **TOLERANCE)
        torch.testing.assert_close(x, streams[-1], **TOLERANCE)


def test_tap_minus_one_is_the_tensor_that_goes_into_the_final_norm(monkeypatch):
    model, seen = small_gpt(), []

    def watched(x):
        seen.append(x)
        return norm(x)

    x, tapped = model._run_blocks(random_tokens(2, 7), -1)
    assert x is tapped
    monkeypatch.setattr(model_module, "norm", watched)
    model.logits(tapped)
    assert seen[0] is tapped


@pytest.mark.parametrize("tap", [-2, 3, 99])
def test_tap_out_of_range_names_the_range(tap):
    with pytest.raises(ValueError, match="0 to 2"):
        small_gpt()._run_blocks(random_tokens(1, 4), tap)


def test_no_future_token_leaks():
    model, idx = small_gpt(), random_tokens(1, 12)
    for tap in (-1, 0, 1):
        states = model._run_blocks(idx, tap)[1]
        for t in range(11):
            changed = idx.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % 50
            again = model._run_blocks(changed, tap)[1]
            assert torch.equal(again[:, : t + 1], states[:, : t + 1])
    # And the past does reach: otherwise the lines above could not fail.
    first = idx.clone()
    first[:, 0] = (first[:, 0] + 1) % 50
    difference = model._run_blocks(idx, -1)[0] - model._run_blocks(first, -1)[0]
    assert difference[:, -1].abs().max() > 1e-3


def test_masked_row_with_own_positions_equals_each_document_alone():
    model, one, two = small_gpt(), random_tokens(1, 5), random_tokens(1, 8)
    packed = torch.cat((one, two), 1)
    document = torch.tensor([0] * 5 + [1] * 8)
    mask = (document[:, None] == document) & torch.ones(13, 13).tril().bool()
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    for tap in (-1, 1):
        h = model._run_blocks(packed, tap, positions, mask[None, None])[1]
        torch.testing.assert_close(h[:, :5], model._run_blocks(one, tap)[1], **TOLERANCE)
        torch.testing.assert_close(h[:, 5:], model._run_blocks(two, tap)[1], **TOLERANCE)


# ---- the cache and generation


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_cache_fed_in_pieces_equals_one_pass(pieces):
    model, idx = small_gpt(), random_tokens(2, sum(pieces))
    cache = KVCache(model, 2, idx.size(1) + 3)
    parts = [model._run_blocks(part, 1, cache=cache) for part in idx.split(pieces, dim=1)]
    for whole, out in zip(model._run_blocks(idx, 1), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(out, 1), whole, **TOLERANCE)
    assert cache.length == idx.size(1)


def test_generation_with_cache_equals_without_and_each_row_alone():
    model = small_gpt()
    prompts = [[1, 2, 3, 4, 5], [7], [8, 9, 10]]
    fast = model.generate(prompts, 12)
    assert fast == model.generate(prompts, 12, use_cache=False)
    assert fast == [model.generate([prompt], 12)[0] for prompt in prompts]
    row = list(prompts[2])  # and the plainest loop there is
    for _ in range(12):
        x, _ = model._run_blocks(torch.tensor([row]), -1)
        row.append(model.logits(x[0, -1]).argmax().item())
    assert fast[2] == row[3:]


def test_generation_stops_samples_and_repeats():
    model = small_gpt()
    stop = model.generate([[1, 2]], 5)[0][2]
    stopped = model.generate([[1, 2]], 5, stop_token=stop)[0]
    assert stop not in stopped and len(stopped) <= 2

    def draw(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return model.generate([[1, 2]] * 3, 8, temperature=1.0, generator=generator, **more)

    assert draw(0) == draw(0) != draw(1)
    assert draw(0) == draw(0, use_cache=False)
    assert draw(0, top_k=1) == model.generate([[1, 2]] * 3, 8)


# ---- logits and losses


def test_logits_are_capped_and_float32():
    model = small_gpt(dtype=torch.bfloat16)
    x, _ = model._run_blocks(random_tokens(1, 9), -1)
    assert x.dtype == torch.bfloat16
    z = model.logits(x * 1e3)
    assert z.dtype == torch.float32 and z.abs().max() <= model.config.logit_softcap


def test_cross_entropy_by_hand_and_ignored_targets():
    model, idx, targets = small_gpt(), random_tokens(2, 6), random_tokens(2, 6)
    targets[0, 3] = -1
    x, _ = model._run_blocks(idx, -1)
    log_p = model.logits(x).log_softmax(-1)
    by_hand = torch.zeros(2, 6)
    for i in range(2):
        for t in range(6):
            if targets[i, t] >= 0:
                by_hand[i, t] = -log_p[i, t, targets[i, t]]
    torch.testing.assert_close(model.cross_entropy(x, targets), by_hand.sum(), **TOLERANCE)
    torch.testing.assert_close(model(idx, targets), by_hand.sum(), **TOLERANCE)
    each = model.token_losses(x, targets).flatten()
    torch.testing.assert_close(each, by_hand.flatten(), **TOLERANCE)


def test_blocks_begin_as_the_identity_and_tied_head_is_the_embedding():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, tie_embeddings=True))
    idx = random_tokens(1, 5)
    x, h = model._run_blocks(idx, 0)
    torch.testing.assert_close(h, norm(model.embed(idx)))
    logits = 30 * torch.tanh(norm(x) @ model.embed.weight.T / 30)
    torch.testing.assert_close(model.logits(x), logits, **TOLERANCE)


def test_flops_are_those_of_the_matrices_and_the_attention():
    model = small_gpt()
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".weight"))
    weights -= model.embed.weight.numel() + model.value_embed.weight.numel()  # lookups
    assert model.flops(100, 1000) == 6 * weights * 100 + 12 * 3 * 32 * 1000
    tied = small_gpt(tie_embeddings=True)
    assert tied.flops(100, 1000) == model.flops(100, 1000)


# ---- what an objective sees


@pytest.mark.parametrize("tap", [-1, 1])
def test_an_objective_s_language_model_is_the_kernel(tap):
    model, idx = small_gpt(), random_tokens(2, 7)
    lm = LanguageModel(model, tap)
    x, tapped = model._run_blocks(idx, tap)
    assert torch.equal(lm.states(idx), tapped)
    assert torch.equal(lm.logits(x), model.logits(x))
    assert torch.equal(lm.embed(idx), norm(model.embed(idx)))


def test_an_objective_s_language_model_encodes_packed_rows():
    model, documents = small_gpt(), [[1, 2, 3, 4], [5, 6, 7]]
    batch = pack_rows([Example([Document(tokens) for tokens in documents])], filler=0)
    lm = LanguageModel(model, 1)
    packed = lm.states(batch.idx, batch.positions, batch.ends)
    flat = batch.idx.flatten().tolist()
    for tokens in documents:
        first = next(n for n in range(len(flat)) if flat[n : n + len(tokens)] == tokens)
        own = packed.flatten(0, 1)[first : first + len(tokens)]
        torch.testing.assert_close(own, lm.states(torch.tensor([tokens]))[0], **TOLERANCE)


# ---- misuse


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_heads=5), "num_heads=5"),
        (dict(num_kv_heads=3), "num_kv_heads=3"),
        (dict(num_layers=0), "at least 1"),
        (dict(model_dim=36), "even head width"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_gpt(**changes)
