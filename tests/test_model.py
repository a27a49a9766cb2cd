"""model.py: the one kernel, its tap, its cache and generation."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_module
from model import GPT, GPTConfig, KVCache, norm

# The same float32 sums in another order (other matrix shapes): some units of 1.2e-7 on values of size 1, through 3 blocks
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def small_gpt(**settings):
    """A GPT whose every weight is random, the zero-initialised ones too, so that no path is switched off."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=50, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2), **settings}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def naive_forward(model, idx):
    """The network written out again, head by head and block by block; returns the stream after every block."""
    c = model.config
    K, group, T = c.model_dim // c.num_heads, c.num_heads // c.num_kv_heads, idx.size(1)
    angle = torch.arange(T)[:, None] * c.rope_base ** (-torch.arange(0, K, 2) / K)

    def turn(x):  # (B, T, K): each pair (i, i + K/2) is turned by its angle
        x1, x2 = x[..., :K // 2], x[..., K // 2:]
        return torch.cat((x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() - x1 * angle.sin()), -1)

    x = x0 = norm(model.embed.weight[idx])
    streams = []
    for block in model.blocks:
        x = block.mix[0] * x + block.mix[1] * x0
        y, heads = norm(x), []
        for head in range(c.num_heads):
            q = block.attn.q_gain[head] * turn(norm(y @ block.attn.q.weight[head * K:(head + 1) * K].T))
            g = head // group
            k, v = (y @ w.weight[g * K:(g + 1) * K].T for w in (block.attn.k, block.attn.v))
            if model.value_embed is not None:
                v = v + model.value_embed.weight[idx][..., g * K:(g + 1) * K]
            scores = q @ turn(norm(k)).mT / K**0.5
            heads.append(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ block.attn.proj.weight.T
        x = x + F.relu(norm(x) @ block.fc.weight.T) ** 2 @ block.proj.weight.T
        streams.append(x)
    return streams


@pytest.mark.parametrize("layers, value_embed", [(1, True), (3, True), (4, False)])
def test_kernel_and_every_tap_match_the_network_written_out(layers, value_embed):
    model, idx = small_gpt(num_layers=layers, value_embed=value_embed), torch.randint(0, 50, (2, 11))
    streams = naive_forward(model, idx)
    for tap, stream in [*enumerate(streams), (-1, streams[-1])]:
        x, tapped = model._run_blocks(idx, tap)
        torch.testing.assert_close(tapped, stream, **TOLERANCE)
        torch.testing.assert_close(x, streams[-1], **TOLERANCE)


def test_tap_minus_one_is_the_tensor_that_goes_into_the_final_norm(monkeypatch):
    model, idx, seen = small_gpt(), torch.randint(0, 50, (2, 7)), []
    x, tapped = model._run_blocks(idx, -1)
    assert x is tapped
    monkeypatch.setattr(model_module, "norm", lambda t: seen.append(t) or norm(t))
    model.logits(tapped)
    assert seen[0] is tapped


@pytest.mark.parametrize("tap", [-2, 3, 99])
def test_tap_out_of_range_names_the_range(tap):
    with pytest.raises(ValueError, match="0 to 2"):
        small_gpt()._run_blocks(torch.zeros(1, 4, dtype=torch.long), tap)


def test_no_future_token_leaks():
    model, idx = small_gpt(), torch.randint(0, 50, (1, 12))
    for t in range(11):
        for tap in (-1, 0, 1):
            changed = idx.clone()
            changed[:, t + 1:] = (changed[:, t + 1:] + 1) % 50
            torch.testing.assert_close(model._run_blocks(idx, tap)[1][:, :t + 1], model._run_blocks(changed, tap)[1][:, :t + 1], rtol=0, atol=0)
    # and the past does reach: otherwise the line above could not fail
    first = idx.clone()
    first[:, 0] = (first[:, 0] + 1) % 50
    assert (model._run_blocks(idx, -1)[0][:, -1] - model._run_blocks(first, -1)[0][:, -1]).abs().max() > 1e-3


def test_masked_row_with_own_positions_equals_each_document_alone():
    model, one, two = small_gpt(), torch.randint(0, 50, (1, 5)), torch.randint(0, 50, (1, 8))
    packed = torch.cat((one, two), 1)
    document = torch.tensor([0] * 5 + [1] * 8)
    mask = (document[:, None] == document) & torch.ones(13, 13).tril().bool()
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    for tap in (-1, 1):
        h = model._run_blocks(packed, tap, positions, mask[None, None])[1]
        torch.testing.assert_close(h[:, :5], model._run_blocks(one, tap)[1], **TOLERANCE)
        torch.testing.assert_close(h[:, 5:], model._run_blocks(two, tap)[1], **TOLERANCE)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_cache_fed_in_pieces_equals_one_pass(pieces):
    model, idx = small_gpt(), torch.randint(0, 50, (2, sum(pieces)))
    cache = KVCache(model, 2, idx.size(1))
    parts = [model._run_blocks(part, 1, cache=cache) for part in idx.split(pieces, dim=1)]
    for whole, out in zip(model._run_blocks(idx, 1), zip(*parts)):
        torch.testing.assert_close(torch.cat(out, 1), whole, **TOLERANCE)
    assert cache.length == idx.size(1)


def test_generation_with_cache_equals_without_and_each_row_alone():
    model = small_gpt()
    prompts = [[1, 2, 3, 4, 5], [7], [8, 9, 10]]
    fast = model.generate(prompts, 12)
    assert fast == model.generate(prompts, 12, use_cache=False)
    assert fast == [model.generate([p], 12)[0] for p in prompts]
    idx = list(prompts[2])  # and the plainest loop there is
    for _ in range(12):
        idx.append(model.logits(model._run_blocks(torch.tensor([idx]), -1)[0][0, -1]).argmax().item())
    assert fast[2] == idx[3:]


def test_generation_stops_samples_and_repeats():
    model = small_gpt()
    stop = model.generate([[1, 2]], 5)[0][2]
    stopped = model.generate([[1, 2]], 5, stop_token=stop)[0]
    assert stop not in stopped and len(stopped) <= 2
    draw = lambda seed, **k: model.generate([[1, 2]] * 3, 8, temperature=1.0, generator=torch.Generator().manual_seed(seed), **k)
    assert draw(0) == draw(0) != draw(1)
    assert draw(0, top_k=1) == model.generate([[1, 2]] * 3, 8)


def test_logits_are_capped_and_float32():
    model = small_gpt(dtype=torch.bfloat16)
    x, _ = model._run_blocks(torch.randint(0, 50, (1, 9)), -1)
    assert x.dtype == torch.bfloat16
    z = model.logits(x * 1e3)
    assert z.dtype == torch.float32 and z.abs().max() <= model.config.logit_softcap


def test_cross_entropy_by_hand_and_ignored_targets():
    model, idx = small_gpt(), torch.randint(0, 50, (2, 6))
    targets = torch.randint(0, 50, (2, 6))
    targets[0, 3] = -1
    x, _ = model._run_blocks(idx, -1)
    log_p = model.logits(x).log_softmax(-1)
    by_hand = -sum(log_p[i, t, targets[i, t]] for i in range(2) for t in range(6) if targets[i, t] >= 0)
    torch.testing.assert_close(model.cross_entropy(x, targets), by_hand, **TOLERANCE)
    torch.testing.assert_close(model(idx, targets), by_hand, **TOLERANCE)


def test_blocks_begin_as_the_identity_and_tied_head_is_the_embedding():
    torch.manual_seed(0)
    model = GPT(GPTConfig(50, 2, 32, 4, 4, 2, tie_embeddings=True))
    idx = torch.randint(0, 50, (1, 5))
    x, h = model._run_blocks(idx, 0)
    torch.testing.assert_close(h, norm(model.embed(idx)))
    torch.testing.assert_close(model.logits(x), 30 * torch.tanh(norm(x) @ model.embed.weight.T / 30), **TOLERANCE)


@pytest.mark.parametrize("settings, message", [(dict(num_heads=5), "num_heads=5"), (dict(num_kv_heads=3), "num_kv_heads=3"),
                                               (dict(num_layers=0), "at least 1"), (dict(model_dim=36), "even head width")])
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_gpt(**settings)
