"""Hugging Face causal LMs: loading one, and the losses of a packed batch in its forward pass.

The objective is a submodule of the model, and its loss is computed in the model's own forward, so
that the optimizer, checkpoints, DDP and FSDP2 know its weights.

Shapes: R rows of T tokens, N pairs of views, D width, V vocabulary.
"""

import contextlib
import functools
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM
from torch.utils.checkpoint import checkpoint
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from nanojepa.device import find_device
from nanojepa.files import check_seal
from nanojepa.hf.limits import windows
from nanojepa.hf.lora import add_lora, count_trained
from nanojepa.hf.settings import DTYPES
from nanojepa.objectives import Options, make_objective
from nanojepa.packing import Document, Example, pack_rows, tree_mask
from nanojepa.tokenizer import one_line
from nanojepa.weights import OBJECTIVE_FILE, load_tensors

FLEX = "flex_attention"
LABELS_AT_ONCE = 2048  # of 128,256 tokens, float32 logits take a GB
OBJECTIVE = "jepa_objective"  # its name in the model


class Base(NamedTuple):
    """What is known of a model before its weights are read.

    preds: the ids of the [PRED] tokens. new: those of them that the tokenizer hadn't before.
    """

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    preds: list
    new: list


class Loaded(NamedTuple):
    """A model to be evaluated, and its tokenizer."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase


class Sums(NamedTuple):
    """Of a micro-batch: cross entropy over its labels; the term over its pairs, 0 without."""

    ce: torch.Tensor
    term: torch.Tensor


@contextlib.contextmanager
def loading(what):
    """Turn whatever a library raises about a file or folder into a ValueError that names it.

    Libraries raise many kinds: there is no such name, no network, a file is cut off, an
    architecture is unknown here.
    """
    try:
        yield
    except Exception as e:
        raise ValueError(f"{what}: cannot be loaded ({one_line(e)})") from None


# ---- before the weights


def read_base(cfg):
    """The Base of the model that these settings name; ValueError if it can't be trained."""
    m = cfg.model
    with loading(f"model.name={m.name}"):
        tokenizer = AutoTokenizer.from_pretrained(m.name, **loader_options(m))
        config = AutoConfig.from_pretrained(m.name, **loader_options(m))
    windows(config.get_text_config())  # refuses attention that no mask of ours expresses
    return Base(config, tokenizer, *add_pred_tokens(tokenizer, cfg.dataset.predictors))


def loader_options(m):
    """What every loader of Hugging Face is told; m: the settings of the section model."""
    return {"cache_dir": m.cache_dir or None, "trust_remote_code": m.trust_remote_code}


def add_pred_tokens(tokenizer, count):
    """The ids of <|predictor_1|>.. <|predictor_count|>, and of those that the tokenizer lacked."""
    names, known = pred_names(count), tokenizer.get_vocab()
    new = [name for name in names if name not in known]
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True
    )
    return tokenizer.convert_tokens_to_ids(names), tokenizer.convert_tokens_to_ids(new)


def pred_names(count):
    return [f"<|predictor_{n}|>" for n in range(1, count + 1)]


def build_objective(cfg, config, preds, folder):
    """The Objective that the settings ask for, or None; with the weights that a folder has of it.

    config: the model's. folder: a saved model's.
    """
    if not cfg.objective:
        return None
    t = cfg.training
    options = Options(
        width=config.get_text_config().hidden_size,
        distance=cfg.distance,
        normed=False,  # the states have passed the last norm already
        predictor="linear" if t.linear_predictor else "identity",
        preds=tuple(preds),
        front=t.front_pred,
        reverse=t.reverse_pred,
        last_token=t.last_token,
    )
    objective, file = (
        make_objective(cfg.objective, options),
        Path(folder) / OBJECTIVE_FILE,
    )
    if objective.state_dict() and file.is_file():
        with loading(file):
            objective.load_state_dict(load_tensors(file))
    return objective


# ---- the weights


def load_model(cfg, base, objective, say=print):
    """The model with its objective, ready to be trained."""
    m, t = cfg.model, cfg.training
    kind = AutoModelForCausalLM._model_mapping.get(type(base.config), None)
    dense = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
    flex = m.attn_implementation == FLEX
    if m.attn_implementation == "auto" and torch.cuda.is_available():
        # Short rows waste little on a dense mask.
        flex = getattr(kind, "_supports_flex_attn", False) and cfg.dataset.max_length > 1024
    chosen = m.attn_implementation in ("sdpa", "eager")
    options = {
        # Frozen weights need no more precision than the computation.
        "dtype": DTYPES[t.dtype] if m.use_lora else getattr(torch, t.weights),
        "attn_implementation": m.attn_implementation if chosen else dense,
    }
    with loading(f"model.name={m.name}"):
        if m.pretrain:
            options["trust_remote_code"] = m.trust_remote_code
            model = AutoModelForCausalLM.from_config(base.config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(m.name, **loader_options(m), **options)
    model.config.use_cache = False
    mend_generation(model.generation_config, m.name, say)
    new = embed_new_tokens(model, base, say)
    add_losses(model, objective)
    check_packing(model)
    if flex:
        # After the check, since it is compiled for the device that trains.
        model.set_attn_implementation(FLEX)
    # Under FSDP2 too: accelerate's own keeps no random state, so the recomputation would drop other
    # units, and the gradients would be wrong.
    if cfg.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if m.use_lora:
        model = add_lora(model, m, sorted({*base.preds, *new}), OBJECTIVE, say)
    say(count_trained(model))
    return model


def mend_generation(generation, name, say):
    """Make a model's settings of generation ones that can be saved with it.

    Some ask for a temperature and not for sampling, which is refused when they are saved.
    """
    try:
        generation.validate(strict=True)
        return
    except ValueError:
        generation.do_sample = True
    try:
        generation.validate(strict=True)
    except ValueError as e:
        raise ValueError(
            f"{name}/generation_config.json can't be saved with the model ({one_line(e)}); mend it"
        ) from None
    say("generation_config.json: it sets how to sample, but not do_sample; saved with it")


def embed_new_tokens(model, base, say):
    """Give tokens without a row of the embedding one; returns the ids of all new tokens.

    New are also [PRED] tokens that take a row which the model had kept free. A new row is the mean
    of the others.
    """
    rows = model.get_input_embeddings().num_embeddings
    size = 1 + max(base.tokenizer.get_vocab().values())
    new = sorted({*base.new, *range(rows, size)})
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
        say(f"embedding: {rows:,} rows, resized to the {size:,} tokens of the tokenizer")
    if new:
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                table = layer.weight
                table[new] = table[: min(new)].float().mean(0).to(table.dtype)
    return new


def open_model(name, dtype, trust_remote_code=False):
    """The Loaded model of a folder or a name on the hub, to be evaluated.

    A LoRA adapter is merged into its base. The folder's generation settings are left out: they may
    sample, or punish repetition.
    """
    check_seal(name)
    adapter = (Path(name) / "adapter_config.json").is_file()
    # peft's class resizes the base's embedding to the tokenizer.
    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    with loading(f"--model {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = loader.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        model = model.merge_and_unload() if adapter else model
    model = model.to(find_device()).eval()
    model.generation_config = GenerationConfig()
    return Loaded(model, tokenizer)


# ---- the forward pass


class BodyOutput:
    """What a model's forward reads of its body's output: the states (R, T, D), and nothing else."""

    def __init__(self, states):
        self.last_hidden_state = states

    def __getattr__(self, name):
        return None

    def __getitem__(self, n):
        return (self.last_hidden_state,)[n]


class CausalLM:
    """A Hugging Face model as an objective sees it; our GPT has the same four methods.

    The states are those that the head gets: after the last norm, as hidden_states[-1].
    """

    def __init__(self, model):
        self.model, self.forward = model, model.forward
        self.body = model.get_decoder()

    def states(self, idx, positions=None, ends=None, blank=None):
        """The states (R, T, D) of tokens idx (R, T); positions and ends as in a packed Batch.

        blank (R, T): True for tokens that aren't read; zeros stand for their embeddings.
        """
        mask = None if ends is None else self.mask(positions, ends)
        tokens = {"input_ids": idx}
        if blank is not None:
            tokens = {"inputs_embeds": self.embed(idx).masked_fill(blank[..., None], 0)}
        return self.body(
            **tokens, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def mask(self, positions, ends):
        """What the model takes for packed rows: a mask, or {type of layer: its mask}."""
        masks = {
            kind: self.mask_of(positions, ends, window)
            for kind, window in windows(self.model.config.get_text_config()).items()
        }
        return masks if len(masks) > 1 else masks.popitem()[1]

    def mask_of(self, positions, ends, window):
        """The mask of layers with this window, or None: a BlockMask, or an additive mask.

        The latter is right under sdpa and eager; a boolean one is wrong under eager.
        """
        if self.model.config._attn_implementation == FLEX:
            return tree_mask(ends, True, positions, window)
        kind, dtype = ends.device.type, self.model.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        hidden = ~tree_mask(ends, False, positions, window)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)

    def embed(self, idx):
        """The embeddings (..., D) of tokens idx (...)."""
        return self.model.get_input_embeddings()(idx)

    def logits(self, states, frozen=False):
        """The logits (..., V) of states (..., D), by all that the model's own forward does to them.

        Some models scale or cap them. So its forward is run on a body that returns these states.
        frozen: the head gets no gradient.
        """
        output = BodyOutput(states.reshape(1, -1, states.size(-1)))
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(self.body, "forward", lambda *_, **__: output))
            if frozen:
                head = self.model.get_output_embeddings()
                bias = None if head.bias is None else head.bias.detach()
                fixed = functools.partial(F.linear, weight=head.weight.detach(), bias=bias)
                patches.enter_context(mock.patch.object(head, "forward", fixed))
            return self.forward().logits.view(*states.shape[:-1], -1)

    def cross_entropies(self, states, targets, factors):
        """The logits of states (R, T, D) scored on targets (K, R, T), as GPT.cross_entropies."""
        everywhere = torch.arange(targets[0].numel(), device=targets.device)
        sums = sum_cross_entropies(self, states.flatten(0, 1), targets.flatten(1), everywhere)
        return (factors * sums).sum(), sums.detach()


def sum_cross_entropies(lm, states, targets, labels):
    """The cross entropies (K,) in nats over the places in labels, where alone the head is applied.

    states (N, D), targets (K, N), -1 for none. If there are many labels, the logits of a part of
    them are there at a time, and are computed again in the backward pass.
    """

    def losses(part):
        logits = lm.logits(states[part]).float()
        each = [F.cross_entropy(logits, t[part], reduction="sum", ignore_index=-1) for t in targets]
        return torch.stack(each)

    if len(labels) <= LABELS_AT_ONCE:
        return losses(labels)
    parts = labels.split(LABELS_AT_ONCE)
    return sum(checkpoint(losses, part, use_reentrant=False) for part in parts)


def add_losses(model, objective):
    """Put an objective (or None) into the model, and let model(batch=Batch) return Sums."""
    lm = CausalLM(model)
    setattr(model, OBJECTIVE, objective)

    def forward(self, *args, batch=None, **inputs):
        if batch is None:
            return lm.forward(*args, **inputs)
        states = lm.states(batch.idx, batch.positions, batch.ends)
        targets = batch.targets.flatten()[None]
        (ce,) = sum_cross_entropies(lm, states.flatten(0, 1), targets, batch.labels)
        term = ce.new_zeros(())
        if batch.drawn is not None:
            term = getattr(self, OBJECTIVE).whole_loss(lm, batch, states, batch.drawn)
        return Sums(ce, term)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def check_packing(model):
    """ValueError if a packed document doesn't get the logits that it has alone.

    Whatever the reason is, training would go wrong.
    """
    documents = [Document([*range(7)], branch=[7, 8], fork=3), Document([*range(9, 14)])]
    batch = pack_rows([Example(documents)], filler=0).to(model.device)
    # The row is trunk[:4], the branch, trunk[4:], the second document.
    paths = [0, 1, 2, 3, 6, 7, 8], [0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13]
    kind, lm, was_training = model.config.model_type, CausalLM(model), model.training
    model.eval()
    try:
        packed = lm.logits(lm.states(batch.idx, batch.positions, batch.ends))
    except Exception as e:  # a model of another kind fails in its own way
        raise ValueError(
            f"{kind} doesn't take rows with a mask and positions of their own "
            f"({one_line(e)}); choose another model"
        ) from None
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    for columns in paths:
        alone = model(input_ids=batch.idx[:1, columns], use_cache=False).logits
        # Written so that NaN is refused too.
        if not (packed[:1, columns] - alone).norm() <= tolerance * alone.norm():
            raise ValueError(
                f"{kind} doesn't give a packed document the logits it has alone (its attention or "
                "its positions follow rules of their own); choose another model"
            )
    model.train(was_training)
