"""A compact GPT with one forward pass, GPT._run_blocks, that can tap a layer.

Training, evaluation, generation and every objective go through it. It knows no objective.

Shapes: B rows, T tokens, S keys (cached and new), D width, H query heads, G key/value heads,
K head width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanojepa.packing import tree_mask


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    mlp_mult: int
    tie_embeddings: bool = False
    value_embed: bool = True
    logit_softcap: float = 30.0
    rope_base: float = 10_000.0
    dtype: torch.dtype = torch.float32  # of activations and matmuls; weights stay in float32

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult")
        if min(getattr(self, name) for name in sizes) < 1:
            raise ValueError(f"{', '.join(sizes[1:])} and vocab_size must be at least 1")
        if self.model_dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model_dim={self.model_dim} must be num_heads={self.num_heads} times an even "
                "head width"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self):
        return self.num_kv_heads * self.head_dim


def norm(x):
    """RMSNorm over the last dimension, without a gain: the next matrix can absorb it."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # the default eps would differ with the dtype


class Linear(nn.Linear):
    """A matrix without bias: float32 for the optimizer, cast to the activations' dtype in use."""

    def __init__(self, d_in, d_out, std):
        self.std = std
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self):
        if self.std:
            nn.init.normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864), halves layout.

    x (B, T, heads, K); cos, sin (B or 1, T, 1, K/2).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class KVCache:
    """Keys and values of every block for B rows of S tokens; `length` tokens are filled.

    Attention reads all S of them behind a mask: every new token has the same shapes.
    """

    def __init__(self, model, rows, size):
        c, device = model.config, model.embed.weight.device
        shape = (c.num_layers, rows, c.num_kv_heads, size, c.head_dim)
        self.k = torch.zeros(shape, dtype=c.dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.size, self.length = size, 0

    def append(self, layer, k, v):
        """Store k, v (B, G, T, K) of a block; returns all keys and values (B, G, S, K)."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer], self.v[layer]


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.gqa = layer, c.head_dim, c.num_kv_heads < c.num_heads
        std = 0.5 * c.model_dim**-0.5
        self.q = Linear(c.model_dim, c.model_dim, std)
        self.k = Linear(c.model_dim, c.kv_dim, std)
        self.v = Linear(c.model_dim, c.kv_dim, std)
        self.proj = Linear(c.model_dim, c.model_dim, 0)  # zero: every block begins as the identity
        # QK-norm fixes the length of q and k; the gain sets how sharp a head is.
        self.q_gain = nn.Parameter(torch.full((c.num_heads, 1), 1.5))

    def forward(self, x, v_token, rope, mask, cache):
        B, T, D = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim)
        k = self.k(x).view(B, T, -1, self.head_dim)
        v = self.v(x).view(B, T, -1, self.head_dim)
        if v_token is not None:
            v = v + v_token.view_as(v)
        q = rotate(norm(q) * self.q_gain.to(x.dtype), *rope)
        k = rotate(norm(k), *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, K)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=self.gqa)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.gqa
            )
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn = Attention(c, layer)
        self.fc = Linear(c.model_dim, c.mlp_mult * c.model_dim, 0.5 * c.model_dim**-0.5)
        self.proj = Linear(c.mlp_mult * c.model_dim, c.model_dim, 0)
        # The block's input is a learned mix of the stream and the token's embedding.
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, x0, v_token, rope, mask, cache):
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(norm(x), v_token, rope, mask, cache)
        return x + self.proj(F.relu(self.fc(norm(x))).square())  # relu^2: arXiv 2109.08668


def soft_cap(z, softcap):
    """Logits between -softcap and softcap, in float32 (Gemma 2, arXiv 2408.00118)."""
    return softcap * torch.tanh(z.float() / softcap)


class HeadLoss(torch.autograd.Function):
    """Cross entropies of the head's soft-capped logits, a part of the tokens at a time.

    x (N, D), weight (V, D), targets (N, K), -1 for none, factors (K,). Returns the sum of factor *
    cross entropy, which is differentiated, and the K cross entropies, which aren't; all are sums
    over the tokens. The gradients are computed beside the loss, while a part's logits are there,
    so none are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, factors, softcap):
        w, tokens = weight.to(x.dtype), torch.arange(weight.size(0), device=x.device)
        sums, dw, dx = torch.zeros_like(factors), torch.zeros_like(weight), []
        for part, target in zip(*in_parts(x, targets, weight.size(0)), strict=True):
            z = part @ w.T
            counted, target = target >= 0, target.clamp(min=0)
            y = soft_cap(z, softcap)
            # No logit is above the cap, so the cap serves as the maximum that exp() needs.
            log_sum = softcap + (y - softcap).exp().sum(-1, keepdim=True).log()
            losses = log_sum - soft_cap(z.gather(1, target), softcap)
            sums += (losses * counted).sum(0)
            shares = factors * counted
            dz = (y - log_sum).exp() * shares.sum(1, keepdim=True)
            for k in range(targets.size(1)):
                dz = dz - (tokens == target[:, k, None]) * shares[:, k, None]
            dz = (dz * (1 - (y / softcap).square())).to(x.dtype)
            dx.append(dz @ w)
            dw += dz.T @ part
        ctx.save_for_backward(torch.cat(dx), dw)
        ctx.mark_non_differentiable(sums)
        return (factors * sums).sum(), sums

    @staticmethod
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        return grad.to(dx.dtype) * dx, grad * dw, None, None, None


def in_parts(x, targets, vocab_size):
    """x (N, D) and targets (N, K) in parts whose logits take at most a GiB; in four at least."""
    count = max(4, math.ceil(x.size(0) * vocab_size / 2**28))
    return x.chunk(count), targets.chunk(count)


class GPT(nn.Module):
    """The network. forward(idx, targets) is the summed next-token cross entropy."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.model_dim)
        nn.init.normal_(self.embed.weight, std=0.005 if c.tie_embeddings else 1.0)
        # A second embedding of the token, added to the values of every block, like the value
        # embeddings of modded-nanogpt.
        self.value_embed = nn.Embedding(c.vocab_size, c.kv_dim) if c.value_embed else None
        if c.value_embed:
            nn.init.zeros_(self.value_embed.weight)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.head = None if c.tie_embeddings else Linear(c.model_dim, c.vocab_size, 0)

    def _run_blocks(self, idx, tap, positions=None, mask=None, cache=None, blank=None):
        """The only loop over blocks.

        idx (B, T) int64. tap: -1 for the stream after the last block, before the final norm, or k
        for the stream after block k. positions (B, T): by default 0.. or those after the cache.
        mask (B or 1, 1, T, S), True if a query may see a key, or a BlockMask; by default causal.
        cache: a KVCache, which is advanced by T. blank (B, T): True for tokens that the network
        doesn't read; zeros stand for their embeddings.
        Returns (x, x_tap), both (B, T, D); with tap -1 they are the same tensor.
        """
        if not -1 <= tap < self.config.num_layers:
            raise ValueError(
                f"layer {tap} is out of range: choose -1 (the stream into the final norm), or 0 to "
                f"{self.config.num_layers - 1} (the stream after that block)"
            )
        past = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(past, past + idx.size(1), device=idx.device)[None]
        if mask is None and cache is not None:
            keys = torch.arange(cache.size, device=idx.device)
            mask = (keys <= keys[past : past + idx.size(1), None])[None, None]
        rope = self._rope(positions)
        v_token = None
        if self.value_embed is not None:
            v_token = self.value_embed(idx).to(self.config.dtype)
        x = x0 = norm(self.embed(idx).to(self.config.dtype))
        if blank is not None:
            x = x0 = x.masked_fill(blank[..., None], 0)
            v_token = None if v_token is None else v_token.masked_fill(blank[..., None], 0)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x = block(x, x0, v_token, rope, mask, cache)
            if layer == (last if tap == -1 else tap):
                x_tap = x
        if cache is not None:
            cache.length += idx.size(1)
        return x, x_tap

    def _rope(self, positions):
        """cos, sin (B or 1, T, 1, K/2) of positions (B or 1, T)."""
        width, device = self.config.head_dim, positions.device
        exponent = -torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
        frequency = self.config.rope_base**exponent
        angle = (positions[..., None].float() * frequency)[:, :, None]
        return angle.cos().to(self.config.dtype), angle.sin().to(self.config.dtype)

    def logits(self, x, frozen=False):
        """Next-token logits (..., V) in float32 of the stream x (..., D) after the last block.

        frozen: the head gets no gradient.
        """
        weight = self.head_weight.detach() if frozen else self.head_weight
        z = F.linear(norm(x), weight.to(x.dtype))
        return soft_cap(z, self.config.logit_softcap)

    @property
    def head_weight(self):
        return (self.embed if self.head is None else self.head).weight

    def cross_entropy(self, x, targets):
        """Summed next-token cross entropy in nats of targets (B, T), -1 for none."""
        return self.cross_entropies(x, targets[None], x.new_ones(1, dtype=torch.float32))[0]

    def cross_entropies(self, x, targets, factors):
        """The logits of x (B, T, D) scored on several targets (K, B, T), -1 for none.

        Returns the sum of factors (K,) * cross entropies in nats, a 0-dim tensor, and the cross
        entropies (K,) without gradient. Each is a sum over its targets.
        """
        x, targets, softcap = norm(x).flatten(0, 1), targets.flatten(1).T, self.config.logit_softcap
        return HeadLoss.apply(x, self.head_weight, targets, factors, softcap)

    def token_losses(self, x, targets):
        """The cross entropy of each target (B, T), 0 for -1, without gradients; x (B, T, D)."""
        parts = zip(
            *in_parts(x.flatten(0, 1), targets.flatten(), len(self.head_weight)), strict=True
        )
        losses = [
            F.cross_entropy(self.logits(part), target, ignore_index=-1, reduction="none")
            for part, target in parts
        ]
        return torch.cat(losses).view_as(targets)

    def flops(self, tokens, visible_pairs, passes=1, heads=1):
        """Matrix FLOPs of forward and backward over so many tokens and (query, key) pairs.

        passes, heads: how often the tokens go through the blocks, and through the head. 6 for each
        weight of a matrix and token, 12 for each width and pair (arXiv 2001.08361, appendix B of
        2204.02311).
        """
        weights = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, Linear))
        attention = 12 * len(self.blocks) * self.config.model_dim * visible_pairs
        head = 6 * self.head_weight.numel() * tokens
        return passes * (6 * weights * tokens + attention) + heads * head

    def forward(self, idx, targets):
        x, _ = self._run_blocks(idx, -1)
        return self.cross_entropy(x, targets)

    @torch.no_grad()
    def generate(
        self,
        prompts,
        max_new_tokens,
        temperature=0.0,
        top_k=0,
        stop_token=None,
        generator=None,
        use_cache=True,
    ):
        """Continue a batch of prompts of any lengths; returns the list of new tokens of each.

        prompts: lists of token ids, none empty. temperature 0 is greedy; top_k 0 samples from all
        tokens. stop_token ends a row and is not returned. generator: a CPU torch.Generator.
        use_cache=False runs the whole row anew for every token, the slow reference.
        """
        device = self.embed.weight.device
        longest = max(map(len, prompts))
        missing = [longest - len(p) for p in prompts]  # padding stands on the left
        pad = torch.tensor(missing, device=device)
        rows = [[0] * n + list(p) for n, p in zip(missing, prompts, strict=True)]
        idx = torch.tensor(rows, device=device)
        cache = KVCache(self, len(prompts), longest + max_new_tokens) if use_cache else None
        finished, new = [False] * len(prompts), [[] for _ in prompts]
        for step in range(max_new_tokens):
            first = idx.size(1) - 1 if use_cache and step else 0  # the rest is in the cache
            size = cache.size if use_cache else idx.size(1)
            positions, mask = left_padded(pad, first, idx.size(1), size)
            x, _ = self._run_blocks(idx[:, first:], -1, positions, mask, cache)
            # Sampled on the CPU, so that one generator serves every device.
            token = sample(self.logits(x[:, -1]).cpu(), temperature, top_k, generator)
            for row, t in enumerate(token[:, 0].tolist()):
                finished[row] = finished[row] or t == stop_token
                if not finished[row]:
                    new[row].append(t)
            if all(finished):
                break
            idx = torch.cat((idx, token.to(device)), dim=1)
        return new


def left_padded(pad, first, end, S):
    """Positions (B, T) and mask (B, 1, T, S) of columns first..end of rows padded on the left.

    pad (B,): how many columns of padding each row has.
    """
    keys = torch.arange(S, device=pad.device)
    queries = keys[first:end]
    positions = (queries - pad[:, None]).clamp(min=0)
    visible = (keys <= queries[:, None]) & (keys >= pad[:, None])[:, None]
    # Padding sees itself, or its softmax would be 0/0.
    visible |= keys == queries[:, None]
    return positions, visible[:, None]


def sample(logits, temperature, top_k, generator):
    """The next token (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k:
        kept = logits.topk(min(top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


class LanguageModel(NamedTuple):
    """What an objective may use of a GPT. nanojepa/hf/model.py has the same of other models."""

    model: GPT
    tap: int

    def states(self, idx, positions=None, ends=None, blank=None):
        """The tapped layer (B, T, D) of other tokens; ends: of packed rows, as Batch.ends.

        blank (B, T): True for tokens that aren't read.
        """
        mask = None if ends is None else tree_mask(ends)
        return self.model._run_blocks(idx, self.tap, positions, mask, blank=blank)[1]

    def embed(self, idx):
        """The embeddings (B, T, D) as they enter the first block."""
        return norm(self.model.embed(idx).to(self.model.config.dtype))

    def logits(self, states, frozen=False):
        """Next-token logits (..., V) of states after the last block; frozen: of a fixed head."""
        return self.model.logits(states, frozen)

    def cross_entropies(self, states, targets, factors):
        """As GPT.cross_entropies."""
        return self.model.cross_entropies(states, targets, factors)
