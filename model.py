"""A compact GPT with one forward kernel, GPT._run_blocks, that can tap a layer.

Training, evaluation, generation and every objective go through that kernel. It knows no objective.
Shapes: B rows, T tokens, S keys (cached and new), D width, H query heads, G key/value heads, K head width, V vocabulary.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


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
    predictor: bool = False  # a D x D matrix for an objective to use; the network doesn't
    logit_softcap: float = 30.0
    rope_base: float = 10_000.0
    dtype: torch.dtype = torch.float32  # of activations and matmuls; weights are kept in float32

    def __post_init__(self):
        if min(self.vocab_size, self.num_layers, self.model_dim, self.num_heads, self.num_kv_heads, self.mlp_mult) < 1:
            raise ValueError("num_layers, model_dim, num_heads, num_kv_heads, mlp_mult and vocab_size must be at least 1")
        if self.model_dim % self.num_heads or (self.model_dim // self.num_heads) % 2:
            raise ValueError(f"model_dim={self.model_dim} must be num_heads={self.num_heads} times an even head width")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")


def norm(x):
    """RMSNorm over the last dimension, without a gain: the next matrix can hold one. The default eps would differ with the dtype."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


class Linear(nn.Linear):
    """A matrix without bias, kept in float32 for the optimizer and cast to the activations' dtype where it is used."""

    def __init__(self, d_in, d_out, std):
        self.std = std
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std) if self.std else nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864), halves layout. x (B, T, heads, K); cos, sin (B or 1, T, 1, K/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def tree_mask(ends, flex=None):
    """Which key a query sees in rows of trees laid out depth first: those before it in whose subtree it lies.

    ends (B, T): the index behind the last descendant of each token. flex: a BlockMask for FlexAttention, by default on
    CUDA; otherwise a boolean (B, 1, T, T) for scaled_dot_product_attention (FlexAttention has no backward on a CPU).
    """
    B, T = ends.shape
    if ends.is_cuda if flex is None else flex:
        return create_block_mask(lambda b, h, q, k: (k <= q) & (q < ends[b, k]), B, None, T, T, device=ends.device)
    token = torch.arange(T, device=ends.device)
    return ((token <= token[:, None]) & (token[:, None] < ends[:, None, :]))[:, None]


class KVCache:
    """Keys and values of every block for B rows of at most S tokens; `length` of them are filled."""

    def __init__(self, model, rows, size):
        c, device = model.config, model.embed.weight.device
        shape = (c.num_layers, rows, c.num_kv_heads, size, c.model_dim // c.num_heads)
        self.k = torch.empty(shape, dtype=c.dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def append(self, layer, k, v):
        """Store k, v (B, G, T, K) of a block behind what is there; returns all keys and values (B, G, S, K) so far."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length:end] = k
        self.v[layer][:, :, self.length:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim, self.gqa = layer, c.model_dim // c.num_heads, c.num_kv_heads < c.num_heads
        std = 0.5 * c.model_dim**-0.5
        self.q = Linear(c.model_dim, c.model_dim, std)
        self.k = Linear(c.model_dim, c.num_kv_heads * self.head_dim, std)
        self.v = Linear(c.model_dim, c.num_kv_heads * self.head_dim, std)
        self.proj = Linear(c.model_dim, c.model_dim, 0)  # zero: every block begins as the identity
        self.q_gain = nn.Parameter(torch.full((c.num_heads, 1), 1.5))  # QK-norm fixes the length of q and k; this sets how sharp a head is

    def forward(self, x, v_token, rope, mask, cache):
        B, T, D = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim) for project in (self.q, self.k, self.v))
        if v_token is not None:
            v = v + v_token.view_as(v)
        q = rotate(norm(q), *rope) * self.q_gain.to(x.dtype)
        k = rotate(norm(k), *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, K)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=self.gqa)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.gqa)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn = Attention(c, layer)
        self.fc = Linear(c.model_dim, c.mlp_mult * c.model_dim, 0.5 * c.model_dim**-0.5)
        self.proj = Linear(c.mlp_mult * c.model_dim, c.model_dim, 0)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # weights of the stream and of the embedding on entry

    def forward(self, x, x0, v_token, rope, mask, cache):
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(norm(x), v_token, rope, mask, cache)
        return x + self.proj(F.relu(self.fc(norm(x))).square())  # relu^2: arXiv 2109.08668


class GPT(nn.Module):
    """The network. Its forward(idx, targets) is the summed next-token cross entropy; see also logits() and generate()."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.model_dim)
        nn.init.normal_(self.embed.weight, std=0.005 if c.tie_embeddings else 1.0)
        # What a token says of itself to whoever attends to it, added to the values of every block (as modded-nanogpt's value embeddings)
        self.value_embed = nn.Embedding(c.vocab_size, c.num_kv_heads * c.model_dim // c.num_heads) if c.value_embed else None
        if c.value_embed:
            nn.init.zeros_(self.value_embed.weight)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.head = None if c.tie_embeddings else Linear(c.model_dim, c.vocab_size, 0)
        self.predictor = Linear(c.model_dim, c.model_dim, 0) if c.predictor else None
        if c.predictor:
            nn.init.eye_(self.predictor.weight)

    def check_tap(self, tap):
        """Raise ValueError unless tap names a layer."""
        if not -1 <= tap < self.config.num_layers:
            raise ValueError(f"layer {tap} is out of range: choose -1 (the stream into the final norm), "
                             f"or 0 to {self.config.num_layers - 1} (the stream after that block)")

    def _run_blocks(self, idx, tap, positions=None, mask=None, cache=None):
        """The only loop over blocks.

        idx (B, T) int64; tap: -1 for the stream after the last block, before the final norm, or k for the stream after
        block k; positions (B, T), 0.. or continuing the cache by default; mask (B or 1, 1, T, S), True where a query may
        see a key, or a BlockMask, causal by default; cache: a KVCache, which is advanced by T.
        Returns (x, x_tap), both (B, T, D); with tap -1 they are the same tensor.
        """
        self.check_tap(tap)
        past = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(past, past + idx.size(1), device=idx.device)[None]
        if mask is None and past:
            keys = torch.arange(past + idx.size(1), device=idx.device)
            mask = (keys <= keys[past:, None])[None, None]
        rope = self._rope(positions)
        v_token = None if self.value_embed is None else self.value_embed(idx).to(self.config.dtype)
        x = x0 = norm(self.embed(idx).to(self.config.dtype))
        tapped = None
        for layer, block in enumerate(self.blocks):
            x = block(x, x0, v_token, rope, mask, cache)
            if layer == tap:
                tapped = x
        if cache is not None:
            cache.length += idx.size(1)
        return x, x if tap == -1 else tapped

    def _rope(self, positions):
        """cos, sin (B or 1, T, 1, K/2) of positions (B or 1, T)."""
        width = self.config.model_dim // self.config.num_heads
        frequency = self.config.rope_base ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
        angle = (positions[..., None].float() * frequency)[:, :, None]
        return angle.cos().to(self.config.dtype), angle.sin().to(self.config.dtype)

    def logits(self, x):
        """Next-token logits (..., V) in float32 of the stream x (..., D) after the last block."""
        head = self.embed if self.head is None else self.head
        z = F.linear(norm(x), head.weight.to(x.dtype)).float()
        return self.config.logit_softcap * torch.tanh(z / self.config.logit_softcap)  # Gemma 2, arXiv 2408.00118

    def cross_entropy(self, x, targets, reduction="sum"):
        """Next-token cross entropy in nats of targets (B, T), -1 where there is none, summed (or "none": (B*T,))."""
        return F.cross_entropy(self.logits(x).flatten(0, -2), targets.flatten(), ignore_index=-1, reduction=reduction)

    def flops(self, tokens, visible_pairs, tap=None):
        """Matrix FLOPs of forward and backward over so many tokens, of which queries see so many keys in all: 6 for each
        weight of a matrix and token, 12 for each width and pair (arXiv 2001.08361, appendix B of 2204.02311). Not counted:
        the predictor, which meets two tokens of an example. tap: only up to the states of this layer, as _run_blocks counts;
        what lies behind them is not in a compiled graph."""
        blocks = self.blocks if tap in (None, -1) else self.blocks[:tap + 1]
        weights = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, Linear))
        weights += (self.embed if self.head is None else self.head).weight.numel() if tap is None else 0
        return 6 * weights * tokens + 12 * len(blocks) * self.config.model_dim * visible_pairs

    def forward(self, idx, targets):
        x, _ = self._run_blocks(idx, -1)
        return self.cross_entropy(x, targets)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, stop_token=None, generator=None, use_cache=True):
        """Continue a batch of prompts of any lengths.

        prompts: list of lists of token ids, none empty; temperature 0 is greedy; top_k 0 samples from all tokens;
        stop_token ends a row (and is not returned); generator: a CPU torch.Generator. use_cache=False runs the whole
        row anew for every token, the slow reference. Returns the list of new tokens per row.
        """
        device = self.embed.weight.device
        B, longest = len(prompts), max(map(len, prompts))
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)  # padding stands on the left
        idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        cache = KVCache(self, B, longest + max_new_tokens) if use_cache else None
        finished, new = [False] * B, [[] for _ in prompts]
        for step in range(max_new_tokens):
            first = idx.size(1) - 1 if use_cache and step else 0  # what lies before is in the cache
            columns = torch.arange(idx.size(1), device=device)
            positions = (columns[None, first:] - pad[:, None]).clamp(min=0)
            visible = (columns[None, None, :] <= columns[first:, None]) & (columns >= pad[:, None])[:, None]  # (B, T, S)
            visible |= columns[None, None, :] == columns[first:, None]  # padding sees itself, or its softmax would be 0/0
            x, _ = self._run_blocks(idx[:, first:], -1, positions, visible[:, None], cache)
            z = self.logits(x[:, -1]).cpu()  # sampled on the CPU: one generator serves every device
            if temperature > 0:
                if top_k:
                    z = z.masked_fill(z < z.topk(min(top_k, z.size(-1))).values[:, -1:], -torch.inf)
                token = torch.multinomial((z / temperature).softmax(-1), 1, generator=generator)
            else:
                token = z.argmax(-1, keepdim=True)
            for row, t in enumerate(token[:, 0].tolist()):
                finished[row] = finished[row] or t == stop_token
                if not finished[row]:
                    new[row].append(t)
            if all(finished):
                break
            idx = torch.cat((idx, token.to(device)), dim=1)
        return new
