"""What models of many architectures take: windows, positions, embedding rows, LoRA's layers.

The reference for a packed row is each document alone, through the model's own forward.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import hf
from nanojepa.hf import limits, lora, model, run, settings
from nanojepa.hf.limits import position_range, windows
from nanojepa.settings import load_settings

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=0,
)
OLD = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4)
NEO = dict(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=256)
# A window of three tokens, which the documents of check_packing() exceed.
MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL_MOE = dict(num_local_experts=4, num_experts_per_tok=2)
DEEPSEEK = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
# name: (type of model, changes of its config)
TAKEN = {
    "llama": ("llama", {}),
    "mistral, full": ("mistral", dict(sliding_window=None)),
    "mistral v0.1, sliding": ("mistral", dict(sliding_window=3)),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "qwen2, a window that is off": ("qwen2", dict(use_sliding_window=False, sliding_window=3)),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", dict(tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(MIXED, query_pre_attn_scalar=8)),
    "gemma3": ("gemma3_text", dict(MIXED, query_pre_attn_scalar=8)),
    "phi3": ("phi3", dict(sliding_window=None)),
    "phi3, sliding": ("phi3", dict(sliding_window=3)),
    "phi": ("phi", {}),
    "starcoder2, sliding": ("starcoder2", dict(sliding_window=3)),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", MIXED),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "gpt_oss": ("gpt_oss", dict(MIXED, **LOCAL_MOE)),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0])),
    "granite": ("granite", {}),
    "exaone4": ("exaone4", MIXED),
    "glm4": ("glm4", {}),
    "stablelm": ("stablelm", {}),
    "nemotron": ("nemotron", {}),
    "mixtral": ("mixtral", LOCAL_MOE),
    "qwen2_moe": (
        "qwen2_moe",
        dict(MOE, shared_expert_intermediate_size=16, sliding_window=0),
    ),
    "qwen3_moe": ("qwen3_moe", MOE),
    "olmoe": ("olmoe", dict(MOE, intermediate_size=16)),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", OLD),
    "gptj": ("gptj", OLD),
    "codegen": ("codegen", OLD),
    "gpt_bigcode": ("gpt_bigcode", OLD),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "biogpt": ("biogpt", {}),
    "falcon": ("falcon", dict(alibi=False, head_dim=None)),
    "gpt_neo, global": ("gpt_neo", dict(NEO, attention_types=[[["global"], 2]])),
}
# Refused by the trial row: their positions are a part of their attention, or they have none.
TRIED = {
    "bloom": dict(n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4),
    "rwkv": dict(attention_hidden_size=32),
}
# What each is refused for.
REFUSED = {
    "gpt_neo": (dict(NEO, attention_types=[[["global", "local"], 1]]), "window_size=256"),
    "llama4_text": ({}, "chunked_attention"),
    "qwen3_next": ({}, "linear_attention"),
    "deepseek_v32": ({}, "indexed_attention"),
    "recurrent_gemma": (dict(head_dim=None), "linear_attention"),
    "mamba": ({}, "linear_attention"),
    "big_bird": ({}, "block_size=64"),
    "doge": ({}, "keep_window_size=2048"),
    "blt": ({}, "local_attention_window_len"),
    "modernbert-decoder": ({}, "local_attention=128"),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), "conv"),
}
FEW = ("llama", "qwen2, sliding", "phi3, sliding", "gemma3", "qwen3_moe", "gpt2", "gpt_oss")
EVERY = [
    pytest.param(name, marks=() if name in FEW else pytest.mark.slow, id=name) for name in TAKEN
]


def make_config(kind, changes):
    changes = {**SHAPE, **changes}
    changes = {key: value for key, value in changes.items() if (key, value) != ("head_dim", None)}
    return AutoConfig.for_model(kind, vocab_size=64, **changes)


def make_network(name, dtype=torch.float32):
    config = make_config(*TAKEN[name])
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    dense = "sdpa" if kind._supports_sdpa else "eager"
    set_seed(0)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=dense, dtype=dtype)
    return network.eval()


# ---- windows


@pytest.mark.parametrize("name", EVERY)
def test_a_packed_document_has_the_logits_that_it_has_alone(name, monkeypatch):
    network = make_network(name)
    model.add_losses(network, None)
    model.check_packing(network)
    if 3 in windows(network.config).values():  # the trial sees a mask that forgets the window
        full = dict.fromkeys(windows(network.config))
        monkeypatch.setattr(model, "windows", lambda config: full)
        with pytest.raises(ValueError, match="logits it has alone"):
            model.check_packing(network)


@pytest.mark.parametrize("kind", REFUSED)
def test_attention_of_other_kinds_is_refused_by_name(kind):
    changes, reason = REFUSED[kind]
    config = make_config(kind, changes).get_text_config()
    with pytest.raises(ValueError, match=f"(?s){config.model_type} has .*{reason}.*choose"):
        windows(config)


@pytest.mark.parametrize("kind", TRIED)
def test_what_no_config_says_is_refused_by_a_trial_row(kind):
    set_seed(0)
    network = AutoModelForCausalLM.from_config(make_config(kind, TRIED[kind])).eval()
    with pytest.raises(ValueError, match=f"{kind} does.*choose another model"):
        model.add_losses(network, None)
        model.check_packing(network)


# ---- positions


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.0}, 512),
        # As Qwen2.5 states it: the limit is that without the scaling.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        # As Llama 3.1 and DeepSeek state it: the limit is that with the scaling.
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 256),
        # As Gemma 3 states it: by type of layer.
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}, 2048),
    ],
)
def test_the_range_of_rotary_positions_is_what_the_config_states(rope, expected):
    config = make_config("llama", {})
    config.rope_parameters = rope
    assert position_range(config) == expected
    assert limits.is_rotary(config)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "codegen", "biogpt", "gpt_neo", "xglm"])
def test_other_positions_are_known_to_end(kind):
    own = {"gpt2": OLD, "gptj": OLD, "codegen": OLD, "gpt_neo": TAKEN["gpt_neo, global"][1]}
    config = make_config(kind, own.get(kind, {}))
    assert position_range(config) == 256
    assert not limits.is_rotary(config)


def test_models_with_alibi_have_no_range():
    for kind in ("bloom", "mpt"):
        assert position_range(AutoConfig.for_model(kind)) == float("inf")


def folder_of(path, kind, changes, tokenizer=None, rows=None):
    """A model's folder with a Llama-like tokenizer, or the given one."""
    tokenizer = tokenizer or hf.make_tokenizer("llama")
    config = make_config(kind, changes)
    config.vocab_size = rows or len(tokenizer)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def configure(folder, data, out, *flags):
    arguments = ["--model_name", folder, "--train_file", data, "--output_dir", str(out)]
    arguments += ["--dtype", "float32", *" ".join(flags).split()]
    return load_settings(settings.Config, arguments, aliases=settings.ALIASES)


def long_messages(path):
    return hf.write_messages(path, [(None, "12345 67890 " * 5, "four " * 20)] * 2)


@pytest.mark.parametrize("flags", ["--regular", "--predictors 2"])
def test_documents_beyond_learned_positions_are_refused_before_the_weights(tmp_path, flags):
    data = long_messages(tmp_path / "long.jsonl")
    folder = folder_of(tmp_path / "gpt2", "gpt2", dict(OLD, max_position_embeddings=64))
    cfg = configure(folder, data, tmp_path / "out", flags).config
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"takes \d+ positions, gpt2 has 64; lower dataset.max"):
        run.prepare_run(cfg, print)
    cfg = configure(folder, data, tmp_path / "out", "--max_length 64 --regular").config
    run.prepare_run(cfg, print)  # exactly as many as there are


def test_documents_beyond_the_range_of_rotary_positions_are_said(tmp_path):
    data = long_messages(tmp_path / "long.jsonl")
    folder = folder_of(tmp_path / "llama", "llama", dict(max_position_embeddings=64))
    said = []
    run.prepare_run(configure(folder, data, tmp_path / "out").config, said.append)
    assert sum("positions, llama was made for 64" in line for line in said) == 1
    said.clear()
    run.prepare_run(
        configure(folder, data, tmp_path / "out", "--max_length 63").config, said.append
    )
    assert not any("positions" in line for line in said)


# ---- rows of the embedding


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", ["", "--lora"], ids=["full", "lora"])
def test_tokens_without_a_row_get_one_that_is_trained_and_saved(tmp_path, tied, lora):
    tokenizer = hf.make_tokenizer("llama")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}"
        "{{ m.content }}<|end|>{% endfor %}"
    )
    changes = dict(tie_word_embeddings=tied)
    folder = folder_of(tmp_path / "m", "llama", changes, tokenizer, rows)
    data = hf.write_messages(tmp_path / "t.jsonl", [(None, "12", "four")] * 4)
    flags = f"--predictors 1 --num_epochs 1 --learning_rate 0.01 {lora}"
    loaded = configure(folder, data, tmp_path / "out", flags)
    said = []
    trainer = run.make_trainer(loaded.config, said.append)
    assert f"embedding: {rows} rows, resized to the {rows + 4} tokens of the tokenizer" in said
    tables = trainer.model.get_input_embeddings(), trainer.model.get_output_embeddings()
    start = [getattr(t, "original_module", t).weight[rows].detach().clone() for t in tables]
    run.run(loaded.config, loaded.origin)
    before = load_file(tmp_path / "m" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    for name, first in zip(names, start, strict=False):
        mean = before[name].mean(0)
        torch.testing.assert_close(first, mean, rtol=1e-5, atol=1e-6)
        old, new = after[name][:rows], after[name][rows:]
        assert len(new) == 4
        assert torch.equal(old, before[name]) == bool(lora)
        trained = (new != mean).any(1).tolist()
        # <|user|>, <|bot|> and <|end|> are read, and [PRED]; as targets only <|end|> counts, but
        # the softmax moves every row of a head.
        assert all(trained), (name, trained)


# ---- LoRA


class Lora:
    lora_rank, lora_targets = 2, ""


@pytest.mark.parametrize("name", EVERY)
def test_every_matrix_of_the_blocks_is_adapted_or_said_not_to_be(name):
    network, said = make_network(name), []
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network = lora.add_lora(network, Lora, [], "jepa_objective", said.append)
    for key, parameter in network.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    after = network.merge_and_unload().state_dict()
    assert before.keys() == after.keys()
    still = {k for k in before if before[k].ndim > 1 and torch.equal(before[k], after[k])}
    head = {"lm_head.weight", "embed_out.weight", "output_projection.weight"}
    frozen = said[0].partition("frozen: ")[2].split(", ")
    names = {key.removesuffix(".weight").rpartition(".")[2] for key in still - head}
    assert names == set(frozen)
    assert not any("proj" in name and "bias" not in name for name in frozen)


def test_named_targets_are_the_only_ones_and_unknown_ones_are_refused():
    class Named(Lora):
        lora_targets = "qkv_proj, mlp.down_proj"

    said = []
    network = lora.add_lora(make_network("phi3"), Named, [], "jepa_objective", said.append)
    adapted = {
        k.split(".lora_")[0].rpartition(".")[2] for k in network.state_dict() if "lora_" in k
    }
    assert adapted == {"qkv_proj", "down_proj"}
    assert "frozen: embed_tokens, o_proj, gate_up_proj" in said[0]
    Named.lora_targets = "q_proj"
    with pytest.raises(ValueError, match="phi3 has no linear layer q_proj; choose.*qkv_proj"):
        lora.add_lora(make_network("phi3"), Named, [], "jepa_objective", print)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt2", "phi3"])
def test_a_run_trains_every_linear_layer_and_says_how_much(tmp_path, kind):
    folder = folder_of(tmp_path / "m", *TAKEN[kind])
    data = hf.write_messages(tmp_path / "t.jsonl", [(None, "12", "four")] * 4)
    flags = "--lora --predictors 1 --num_epochs 1 --learning_rate 0.01"
    loaded = configure(folder, data, tmp_path / "out", flags)
    said = []
    run.make_trainer(loaded.config, said.append)
    (line,) = (line for line in said if line.startswith("trained: "))
    assert line.endswith("%)") and " of " in line
    result = run.run(loaded.config, loaded.origin)
    assert result["steps"] == 1
    before = load_file(tmp_path / "m" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    words = ("proj", "c_attn", "c_fc")
    layers = [k for k in before if any(w in k for w in words) and before[k].ndim > 1]
    still = {k for k in layers if torch.equal(before[k], after[k])}
    assert layers and not {k for k in still if ".experts." not in k}
    # Some experts get no token of so few.
    assert len(still) < sum(".experts." in k for k in layers) or not still
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 1
