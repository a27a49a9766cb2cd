"""Weights on the disk: safetensors files that hold their own sha256, and the int8 artifact."""

import hashlib
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from nanojepa.files import one_line, write_whole

OBJECTIVE_FILE = "objective.safetensors"  # its weights, beside those of the model


def digest(tensors):
    """The sha256 of {name: tensor}: names, dtypes, shapes and numbers."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def save_weights(path, tensors):
    """Write {name: tensor} as a safetensors file that holds its sha256, whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # With one key in the metadata, equal weights make equal files: the library shuffles keys.
    write_whole(path, save(tensors, {"sha256": digest(tensors)}))


def load_tensors(path):
    """{name: tensor} of a file by save_weights; ValueError names it if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: cut off, or no safetensors file ({one_line(e)})") from None
    if expected is None:
        raise ValueError(f"{path}: has no sha256, so it wasn't written by this project")
    if digest(tensors) != expected:
        raise ValueError(f"{path}: its sha256 is not that of its content")
    return tensors


def load_weights(model, folder, name="model.safetensors"):
    """Load what an earlier run left into the model; ValueError says what doesn't fit."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(
            f"INIT_FROM={folder}: {path} does not exist; give the folder of a finished run, "
            "logs/<run>"
        )
    try:
        state, own = load_tensors(path), model.state_dict()
    except ValueError as e:
        raise ValueError(f"INIT_FROM={folder}: {e}; take another run's") from None
    for key in sorted(own.keys() | state.keys()):
        there, here = (tuple(s[key].shape) if key in s else "nothing" for s in (state, own))
        if there != here:
            raise ValueError(
                f"INIT_FROM={folder}: {key} is {there} there and {here} here; use that run's "
                "config.yaml"
            )
    model.load_state_dict(state)


# ---- the artifact


def quantize(state):
    """The artifact: matrices as int8 with a float16 scale a row, the rest as float16; zlib."""
    out = {}
    for name, w in state.items():
        if w.dim() == 2 and w.numel() > 1024:
            smallest = 2**-24  # of float16 above 0
            scale = (w.abs().amax(1, keepdim=True).float() / 127).clamp(min=smallest).half()
            out[name] = (w.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            out[name + ".scale"] = scale
        else:
            out[name] = w.half()
    return zlib.compress(save({name: w.cpu().contiguous() for name, w in out.items()}), 9)


def dequantize(blob):
    """The float32 state dict of an artifact; ValueError if it is damaged."""
    stream = zlib.decompressobj()  # zlib has a checksum of its own
    try:
        stored = load(stream.decompress(blob))
    except (zlib.error, SafetensorError) as e:
        raise ValueError(f"a damaged artifact ({one_line(e)})") from None
    if stream.unused_data or not stream.eof:
        raise ValueError("a damaged artifact (cut off, or added to)")
    state = {}
    for name, w in stored.items():
        if w.dtype != torch.int8:
            state[name] = w.float()
            continue
        scale = stored.get(f"{name}.scale")
        if w.dim() != 2 or scale is None or scale.shape != (len(w), 1):
            raise ValueError(
                f"a damaged artifact ({name[:100]!r} is int8, and no matrix with a scale for "
                "each row)"
            )
        state[name] = w.float() * scale.float()
    return {name: w for name, w in state.items() if not name.endswith(".scale")}
