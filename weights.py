"""Weights on disk: model.safetensors, written without the library so that training needs none, and the int8 artifact."""
import json
import zlib
from pathlib import Path

import torch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


def to_safetensors(tensors):
    """The bytes of a safetensors file of {name: tensor}: header length, JSON header, data (huggingface.co/docs/safetensors)."""
    header, chunks, offset = {}, [], 0
    for name, tensor in sorted(tensors.items()):
        chunk = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = next(k for k, v in DTYPES.items() if v == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(chunk)]}
        chunks.append(chunk)
        offset += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def from_safetensors(blob):
    """{name: tensor} of the bytes of a safetensors file."""
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = torch.frombuffer(bytearray(blob[start + first:start + last]), dtype=torch.uint8) if last > first else torch.empty(0, dtype=torch.uint8)
        out[name] = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return out


def quantize(state):
    """The artifact: matrices as int8 with one float16 scale a row, the rest as float16, compressed by zlib."""
    out = {}
    for name, w in state.items():
        if w.dim() == 2 and w.numel() > 1024:
            scale = (w.abs().amax(1, keepdim=True).float() / 127).clamp(min=2**-24).half()  # the smallest float16 above 0
            out[name + ".scale"] = scale
            out[name] = (w.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        else:
            out[name] = w.half()
    return zlib.compress(to_safetensors(out), 9)


def dequantize(blob):
    """The float32 state dict of an artifact."""
    stored = from_safetensors(zlib.decompress(blob))
    return {name: w.float() * stored[name + ".scale"].float() if w.dtype == torch.int8 else w.float()
            for name, w in stored.items() if not name.endswith(".scale")}


def load_weights(model, folder):
    """Load folder/model.safetensors, what an earlier run left, into the model; ValueError says what doesn't fit."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"INIT_FROM={folder}: {path} does not exist; give the folder of a finished run, logs/<run>")
    try:
        state, own = from_safetensors(path.read_bytes()), model.state_dict()
    except (ValueError, KeyError, RuntimeError, AttributeError):
        raise ValueError(f"INIT_FROM={folder}: {path} is damaged or no safetensors file; take another run's") from None
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(s[name].shape) if name in s else "nothing" for s in (state, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"INIT_FROM={folder}: {name} is {shapes[0]} there and {shapes[1]} here; use that run's config.yaml")
    model.load_state_dict(state)
