"""What a model can be fed, as its config says: positions and windows.

Everything here is known before the weights are read. check_packing() in model.py tries the rest,
on documents too short to show a window.
"""

import math
import re

# Keys of attention that doesn't see the whole document, other than sliding_window.
LOCAL = re.compile(r"window|attention_chunk|local_att|index_topk|(^|_)block_size$")
# The window of layers that slide becomes a part of the mask; the others say which layers do.
SLIDING = re.compile("^_?(sliding_window(_pattern)?|max_window_layers|use_sliding_window)$")


def windows(config):
    """{type of layer: how many positions back it sees, or None for all}; a text model's config.

    ValueError if there are layers that mix tokens in another way.
    """
    kinds = getattr(config, "layer_types", None)
    if other := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.model_type} has layers of {', '.join(sorted(other))}: they mix tokens of a "
            "row without the tree mask; choose a model of full or sliding attention"
        )
    if local := local_attention(config):
        raise ValueError(
            f"{config.model_type} has attention of its own ({local}), which the tree mask would "
            "replace; choose a model of full or sliding attention"
        )
    window = getattr(config, "sliding_window", None) or None
    if not kinds:  # one mask for all layers
        return {"": window if getattr(config, "use_sliding_window", True) else None}
    if "sliding_attention" not in kinds:
        return {"full_attention": None}
    return {"full_attention": None, "sliding_attention": window}


def local_attention(config):
    """The key and value, as text, by which attention sees only a part of a document; or ""."""
    if config.model_type == "gpt_neo" and "local" not in config.attention_layers:
        return ""
    for key, value in vars(config).items():
        if LOCAL.search(key) and not SLIDING.search(key) and isinstance(value, int) and value > 0:
            return f"{key}={value}"
    return ""


def position_range(config):
    """How many positions a model was made for, stretched as its config says; inf if unknown."""
    # Some configs keep it under an older name; XLNet's raises if it is asked.
    key = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    limit = vars(config).get(key) or math.inf
    rope = rope_of(config)
    factor = rope.get("factor") or 1
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(limit * factor)
    return max(limit, int((rope.get("original_max_position_embeddings") or 0) * factor))


def rope_of(config):
    """The rotary parameters of a config: of its full attention, if layers differ; {} if none."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def is_rotary(config):
    """Whether positions are rotary, which go on beyond the range, if badly."""
    return any(key.startswith(("rope_", "partial_rotary")) for key in vars(config))


def check_positions(config, name, examples):
    """A line on documents that are longer than the range of a rotary model, or "".

    ValueError if another model has no positions for them. name: of the examples' source.
    """
    longest = max(d.positions() for example in examples for d in example.documents)
    limit = position_range(config)
    if longest <= limit:
        return ""
    what = f"{name}: its longest document takes {longest:,} positions"
    if is_rotary(config):
        return f"warning: {what}, {config.model_type} was made for {limit:,}"
    raise ValueError(f"{what}, {config.model_type} has {limit:,}; lower dataset.max_length")
