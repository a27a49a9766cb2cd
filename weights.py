"""Weights on disk: model.safetensors, written without the library so that training needs none, and the int8 artifact."""
import hashlib
import json
import math
import zlib
from pathlib import Path

import torch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


def header_of(entries, chunks, seal):
    """Length and JSON header of a safetensors file with these entries and data. seal: with the sha256 of both."""
    text = json.dumps(entries)
    if seal:
        digest = hashlib.sha256(text.encode())
        for chunk in chunks:
            digest.update(chunk)
        text = json.dumps({"__metadata__": {"sha256": digest.hexdigest()}, **entries})
    text = text.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_safetensors(tensors, seal=True):
    """The bytes of a safetensors file of {name: tensor}: header length, JSON header, data (huggingface.co/docs/safetensors).
    seal: with a sha256 of all of it, without which from_safetensors(sealed=True) refuses it."""
    entries, chunks, offset = {}, [], 0
    for name, tensor in sorted(tensors.items()):
        chunk = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        kind = next(k for k, v in DTYPES.items() if v == tensor.dtype)
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(chunk)]}
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join([header_of(entries, chunks, seal), *chunks])


def from_safetensors(blob, sealed=False):
    """{name: tensor} of the bytes of a safetensors file; ValueError says what is wrong with it. sealed: every byte must be as
    to_safetensors has written it."""
    size, blob = int.from_bytes(blob[:8], "little"), memoryview(blob)
    if not 2 <= size <= len(blob) - 8:
        raise ValueError("cut off, or no safetensors file")
    try:
        header = json.loads(bytes(blob[8:8 + size]))
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    metadata, data = header.pop("__metadata__", None) if isinstance(header, dict) else None, blob[8 + size:]
    if not isinstance(header, dict) or not all(map(is_entry, header.values())):
        raise ValueError("its header has something else than dtype, shape and data_offsets of float32, float16, bfloat16 or int8 tensors")
    ends = [0] + sorted(e["data_offsets"][1] for e in header.values())
    if sorted(e["data_offsets"] for e in header.values()) != [list(pair) for pair in zip(ends, ends[1:])] or ends[-1] != len(data):
        raise ValueError("its tensors overlap, or are not all of its data")
    if sealed and not (isinstance(metadata, dict) and "sha256" in metadata):
        raise ValueError("has no sha256, as files of older versions and other programs")
    if sealed and blob[:8 + size] != header_of(header, [data], True):
        raise ValueError("its sha256 is not that of its content")
    out = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(data[first:last]), dtype=torch.uint8) if last > first else torch.empty(0, dtype=torch.uint8)
        out[name] = flat.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return out


def is_entry(entry):
    """Whether an entry of a header describes a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (all(isinstance(x, list) and all(type(n) is int and 0 <= n < 2**48 for n in x) for x in (shape, offsets)) and len(shape) <= 8 and len(offsets) == 2):
        return False
    if math.prod(max(n, 1) for n in shape) > 2**48:  # strides of an empty tensor overflow too
        return False
    return entry["dtype"] in DTYPES and math.prod(shape) * DTYPES[entry["dtype"]].itemsize == offsets[1] - offsets[0]


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
    return zlib.compress(to_safetensors(out, seal=False), 9)  # zlib has a checksum of its own


def dequantize(blob):
    """The float32 state dict of an artifact; ValueError where it is damaged."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(blob)
    except zlib.error as e:
        raise ValueError(f"a damaged artifact ({e})") from None
    if stream.unused_data or not stream.eof:
        raise ValueError("a damaged artifact (cut off, or added to)")
    stored = from_safetensors(content)
    for name, w in stored.items():
        if w.dtype == torch.int8 and (w.dim() != 2 or (scale := stored.get(name + ".scale")) is None or scale.shape != (len(w), 1)):
            raise ValueError(f"a damaged artifact ({name[:100]!r} is int8, and no matrix with a scale for each row)")
    return {name: w.float() * stored[name + ".scale"].float() if w.dtype == torch.int8 else w.float()
            for name, w in stored.items() if not name.endswith(".scale")}


def load_weights(model, folder):
    """Load folder/model.safetensors, what an earlier run left, into the model; ValueError says what doesn't fit."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"INIT_FROM={folder}: {path} does not exist; give the folder of a finished run, logs/<run>")
    try:
        state, own = from_safetensors(path.read_bytes(), sealed=True), model.state_dict()
    except ValueError as e:
        raise ValueError(f"INIT_FROM={folder}: {path}: {e}; take another run's") from None
    for name in sorted(own.keys() | state.keys()):
        shapes = [tuple(s[name].shape) if name in s else "nothing" for s in (state, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"INIT_FROM={folder}: {name} is {shapes[0]} there and {shapes[1]} here; use that run's config.yaml")
    model.load_state_dict(state)
