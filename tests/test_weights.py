"""Weights on the disk: what is read is what was written, or it is refused in one line."""

import json
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save

import train_gpt
from conftest import CPU, make_config
from mutations import mutations
from nanojepa.files import read_sealed, write_sealed
from nanojepa.weights import dequantize, load_tensors, load_weights, quantize, save_weights


def tiny_model(**settings):
    settings = {"num_layers": 1, "model_dim": 8, "num_heads": 2, "num_kv_heads": 1} | settings
    return train_gpt.build_model(make_config("", **settings), 64, CPU)


def random_state():
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(300, 32),
        "blocks.0.mix": torch.tensor([1.0, 0.0]),
        "proj": torch.randn(64, 32) * torch.logspace(-9, 2, 64)[:, None],
        "zero": torch.zeros(40, 32),
    }


ODD = {
    "half": torch.randn(3, 5).half(),
    "int": torch.tensor([-128, 3, 127], dtype=torch.int8),
    "bf": torch.randn(2).bfloat16(),
    "none": torch.zeros(0, 3),
    "number": torch.tensor(2.5),
    "turned": torch.randn(4, 6).T,
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- safetensors


def test_weights_are_read_back_by_us_and_by_the_library(tmp_path):
    state, path = {**random_state(), **ODD}, tmp_path / "w.safetensors"
    save_weights(path, state)
    assert same(load_tensors(path), state)
    with safe_open(path, "pt") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
    first = path.read_bytes()
    save_weights(path, dict(reversed(state.items())))
    assert path.read_bytes() == first  # equal weights make equal files


def test_every_bit_of_a_sealed_file_and_of_weights_counts(tmp_path):
    sealed, weights = tmp_path / "x.json", tmp_path / "w.safetensors"
    write_sealed(sealed, {"steps": 3, "name": "é", "none": {}})
    state = {"a": torch.randn(2, 3), "b": torch.zeros(2).bfloat16(), "none": torch.zeros(0, 3)}
    save_weights(weights, state)
    for path, read in ((sealed, read_sealed), (weights, load_tensors)):
        content = bytearray(path.read_bytes())
        for n in range(8 * len(content)):
            content[n // 8] ^= 1 << n % 8
            path.write_bytes(content)
            with pytest.raises(ValueError, match=path.name):
                read(path)
            content[n // 8] ^= 1 << n % 8
        path.write_bytes(content)
        read(path)


def test_no_mutation_of_weights_is_silent(tmp_path):
    path, model, seen = tmp_path / "model.safetensors", tiny_model(), set()
    save_weights(path, model.state_dict())
    content = path.read_bytes()

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(mutations(content))
    def refused(changed):
        seen.add(changed)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"model\.safetensors") as e:
            load_weights(model, tmp_path)
        assert "\n" not in str(e.value)

    refused()
    assert len(seen) >= 50


def with_header(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\1",
        (2**63).to_bytes(8, "little") + b"{}",
        with_header([]),
        with_header({"a": 1}),
        with_header({"a": entry(offsets=(0, 2**60))}, bytes(8)),
        with_header({"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}, bytes(8)),
        with_header({"a": entry(), "b": entry()}, bytes(4)),
        with_header({"__metadata__": 5, "a": entry()}, bytes(4)),
        with_header({"__metadata__": {"sha256": "0" * 64}, "a": entry("F64")}, bytes(4)),
        with_header({"__metadata__": {"sha256": "0" * 64}, "a": entry()}, bytes(4)),
    ],
)
def test_hostile_headers_of_weights_are_one_line(tmp_path, blob):
    (tmp_path / "model.safetensors").write_bytes(blob)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"model\.safetensors") as e:
        load_weights(tiny_model(), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(e.value) and peak < 50_000_000


def test_weights_without_a_sum_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save(tiny_model().state_dict()))
    with pytest.raises(ValueError, match=r"model\.safetensors: has no sha256"):
        load_weights(tiny_model(), tmp_path)


def test_init_from_says_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"INIT_FROM=.*model\.safetensors does not exist"):
        load_weights(tiny_model(), tmp_path)
    saved, fresh = tiny_model(seed=1), tiny_model(seed=2)
    save_weights(tmp_path / "model.safetensors", saved.state_dict())
    load_weights(fresh, tmp_path)
    assert same(fresh.state_dict(), saved.state_dict())
    for changes, what in (
        ({"model_dim": 16}, r"\(4, 8\) there and \(8, 16\) here"),
        ({"value_embed": False}, "there and nothing here"),
        ({"num_layers": 2}, "nothing there and"),
    ):
        with pytest.raises(ValueError, match=f"{what}.*use that run's config.yaml"):
            load_weights(tiny_model(**changes), tmp_path)


# ---- the artifact


def test_quantisation_error_is_half_a_step_of_each_row():
    state = random_state()
    back = dequantize(quantize(state))
    assert back.keys() == state.keys()
    for name, w in state.items():
        if w.dim() != 2:
            assert torch.equal(back[name], w)
            continue
        step = (w.abs().amax(1, keepdim=True) / 127).clamp(min=2**-24)
        # Half a step, and what float16 makes of the scale: 2^-11 of it, or 2^-25 if it is
        # subnormal, 127 times.
        allowed = step * (0.5 + 127 * 2**-11) + 127 * 2**-25
        assert ((back[name] - w).abs() <= allowed).all(), name


def test_a_damaged_artifact_is_refused_or_the_same():
    """zlib checks what it gives and not its own padding: what isn't refused is the same tensors."""
    artifact = quantize({"w": torch.randn(40, 64), "g": torch.ones(8)})
    whole, refused = dequantize(artifact), []

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(mutations(artifact))
    def check(changed):
        try:
            assert same(dequantize(changed), whole)
        except ValueError:
            refused.append(changed)

    check()
    assert len(refused) > 60
    for n in (1, 8, len(artifact) // 2, len(artifact) - 1):
        with pytest.raises(ValueError, match="damaged artifact"):
            dequantize(artifact[:n])
    with pytest.raises(ValueError, match="added to"):
        dequantize(artifact + b"x")


@pytest.mark.parametrize(
    "shape, scale", [((4, 6), None), ((4, 6), (3, 1)), ((4, 4), (1, 4)), ((6,), (6, 1)), ((), ())]
)
def test_int8_without_its_scale_is_a_damaged_artifact(shape, scale):
    tensors = {"w": torch.ones(shape).to(torch.int8)}
    if scale is not None:
        tensors["w.scale"] = torch.ones(scale).half()
    with pytest.raises(ValueError, match="a damaged artifact .*'w' is int8") as e:
        dequantize(zlib.compress(save(tensors)))
    assert "\n" not in str(e.value)
