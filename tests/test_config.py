"""Where a setting comes from, what is refused, and that every one is read, documented and shown."""
import ast
import dataclasses
import re
import sys
import zlib

import pytest
import torch
import yaml

import finetune
import train_gpt
import weights
from config import load_config, load_sections, parse_value
from model import GPT, GPTConfig
from train_gpt import Config

FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def test_precedence_default_yaml_environment_flag(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("jepa_lambda: 0.2\nseed: 5\nnum_layers: 2\n")
    cfg, origin, _ = load_config(Config, [f"--config={file}", "--jepa_lambda", "0.4"], {"JEPA_LAMBDA": "0.3", "SEED": "6"})
    assert (cfg.jepa_lambda, cfg.seed, cfg.num_layers, cfg.model_dim) == (0.4, 6, 2, Config.model_dim)
    assert origin["jepa_lambda"] == "flag --jepa_lambda" and origin["seed"] == "environment variable SEED"
    assert origin["num_layers"] == f"{file}: num_layers" and origin["model_dim"] == "default"


def test_the_environment_sets_every_field():
    for name, f in FIELDS.items():
        value = "1" if name == "jepa_norm" else {bool: "1", int: "7", float: "0.5", str: (f.metadata["choices"] or ["x"])[-1]}[f.type]
        settings = {name.upper(): value, **({"TRAIN_SEQ_LEN": "8"} if name == "eval_stride" else {}), **({"NUM_LAYERS": "9"} if name == "jepa_layer" else {})}
        cfg, origin, warnings = load_config(Config, [], settings)
        assert str(getattr(cfg, name)) in (value, "True") and not warnings and name.upper() in origin[name]


def test_every_field_is_read_and_every_jepa_variable_is_a_field():
    """FIELD's mistake 10: a knob that no code reads. Every field is an attribute read outside of Config itself."""
    body = [node for name in ("train_gpt.py", "loader.py") for node in ast.parse((train_gpt.ROOT / name).read_text()).body]
    outside = [n for top in body if getattr(top, "name", None) != "Config" for n in ast.walk(top)]
    is_cfg = lambda n: isinstance(n, ast.Name) and n.id == "cfg" or isinstance(n, ast.Attribute) and n.attr == "cfg"
    read = {n.attr for n in outside if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and is_cfg(n.value)}
    assert set(FIELDS) <= read
    readme = (train_gpt.ROOT / "README.md").read_text()
    assert {v.lower() for v in re.findall(r"\bJEPA_[A-Z_]+\b", readme)} <= set(FIELDS)


@pytest.mark.parametrize("argv, environ, message", [
    ([], {"JEPA_LAMDA": "0.1"}, "unknown environment variable JEPA_LAMDA; did you mean JEPA_LAMBDA?"),
    ([], {"JEPA_LAMBDA": "much"}, "environment variable JEPA_LAMBDA: 'much' is not a valid float"),
    ([], {"ITERATIONS": "1.5"}, "environment variable ITERATIONS: '1.5' is not a valid int"),
    ([], {"COMPILE": "maybe"}, "environment variable COMPILE: 'maybe' is not 0 or 1"),
    (["--jepa_lamda=1"], {}, "unknown argument --jepa_lamda=1; did you mean jepa_lambda?"),
    ([], {"JEPA_LAMBDA": "-1"}, "JEPA_LAMBDA=-1.0: must be at least 0"),
    ([], {"JEPA_LAMBDA": "nan"}, "JEPA_LAMBDA=nan: must be finite"),
    ([], {"JEPA_LAMBDA": "inf"}, "JEPA_LAMBDA=inf: must be finite"),
    (["--jepa_lambda"], {}, "argument --jepa_lambda: expected one argument"),
    ([], {"JEPA_LAMBDA": "1", "JEPA_START_FRAC": "0.5", "JEPA_END_FRAC": "0.3"}, "the term never runs"),
    ([], {"JEPA_LAMBDA": "1", "JEPA_START_FRAC": "1"}, "the term never runs"),
    ([], {"RUN_ID": "../x"}, "RUN_ID=../x: may hold letters"),
    ([], {"JEPA_MAX_SPAN_FRAC": "0"}, "must be above 0"),
    ([], {"JEPA_MAX_SPAN_FRAC": "1.1"}, "must be at least 0 and at most 1"),
    ([], {"JEPA_LAYER": "6", "NUM_LAYERS": "6"}, "must be -1, or a block from 0 to 5"),
    ([], {"JEPA_LAYER": "-2"}, "must be -1, or a block"),
    ([], {"JEPA_DISTANCE": "cos"}, "must be cosine, l2, mse or infonce"),
    ([], {"JEPA_PRED_TOKENS": "11"}, "JEPA_PRED_TOKENS=11: must be at least 0 and at most 10"),
    ([], {"JEPA_PRED_POSITION": "back"}, "must be end or front"),
    ([], {"JEPA_OBJECTIVE": "pears"}, "must be span or pair"),
    ([], {"JEPA_RATIO": "0"}, "JEPA_RATIO=0.0: must be above 0"),
    ([], {"LOSS_ON": "code"}, "must be all or target"),
    ([], {"LONG_EXAMPLES": "cut"}, "must be stop, skip or truncate"),
    ([], {"JEPA_SPANS": "0"}, "JEPA_SPANS=0: must be at least 1"),
    ([], {"OPTIMIZER": "sgd"}, "OPTIMIZER=sgd: must be muon or adamw"),
    ([], {"JEPA_UPDATE": "both"}, "must be coupled or decoupled"),
    ([], {"JEPA_ROWS_FRAC": "0"}, "JEPA_ROWS_FRAC=0.0: must be above 0"),
    ([], {"DTYPE": "fp16"}, "auto, bfloat16 or float32"),
    ([], {"EVAL_STRIDE": "512", "TRAIN_SEQ_LEN": "256"}, "must not exceed"),
    ([], {"JEPA_LAMBDA": "1", "TRAIN_SEQ_LEN": "2"}, "at least 3 tokens"),
    (["--config=/nowhere.yaml"], {}, "/nowhere.yaml"),
])
def test_bad_settings_are_one_line_that_says_where(argv, environ, message):
    with pytest.raises(ValueError, match=message) as e:
        load_config(Config, argv, environ)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, message", [("num_layer: 3", "unknown key num_layer; did you mean num_layers?"), ("seed: [1]", "seed"),
                                           ("- a", "lines of `key: value`"), ("a: b: c", "c.yaml"), ("num_layers: 2.5", "not a valid int"),
                                           ("num_layers: true", "not a valid int"), ("jepa_lambda: null", "not a valid float")])
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        load_config(Config, [f"--config={tmp_path / 'c.yaml'}"], {})
    assert "\n" not in str(e.value)


def test_a_near_miss_in_the_environment_is_a_warning():
    _, _, warnings = load_config(Config, [], {"NUM_LAYER": "3", "PATH": "/bin", "HOME": "/x", "OMP_NUM_THREADS": "2", "RANK": "0"})
    assert len(warnings) == 1 and "NUM_LAYER " in warnings[0] and "NUM_LAYERS" in warnings[0]


@pytest.mark.parametrize("line, message", [
    ("jepa_lambda: 0x" + 500 * "f", "jepa_lambda: [0-9]+ is not a valid float"), ("seed: 0x" + 5000 * "f", "seed: an integer of too many digits is not a valid int"),
    ("seed: -0x1" + 16 * "0", "seed: -18446744073709551616 is not a valid int"), ("compile: 0x" + 5000 * "f", "compile: an integer of too many digits is not 0 or 1"),
    ("run_id: 0x" + 5000 * "f", "run_id: an integer of too many digits is not a valid str"), ("seed: [0x" + 5000 * "f" + "]", "seed: an integer of too many digits is not"),
    ('"a\\nb": 1', r"unknown key 'a\\nb'"), ("? 0x" + 5000 * "f" + "\n: 1", "unknown key an integer of too many digits"), ("jepa_lamda: 1", "unknown key jepa_lamda; did you mean jepa_lambda?")])
def test_numbers_and_keys_that_cannot_be_are_one_line_with_file_and_key(tmp_path, line, message):
    (tmp_path / "x.yaml").write_text(line)
    with pytest.raises(ValueError, match=f"x.yaml: {message}") as e:
        load_config(Config, ["--config", str(tmp_path / "x.yaml")], {})
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    (tmp_path / "y.yaml").write_text(f"training:\n  {line.replace(chr(10), chr(10) + '  ').replace('seed', 'batch_size').replace('jepa_lambda', 'lbd')}\n")
    with pytest.raises(ValueError, match=r"y\.yaml: (unknown key )?training\.") as e:
        load_sections(finetune.Config, ["--config", str(tmp_path / "y.yaml")], {})
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    (tmp_path / "z.yaml").write_text(line)
    with pytest.raises(ValueError, match=r"z\.yaml: unknown section") as e:
        load_sections(finetune.Config, ["--config", str(tmp_path / "z.yaml")], {})
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_an_integer_of_a_flag_or_variable_has_at_most_64_bits():
    assert parse_value(int, str(2**64 - 1), "x") == 2**64 - 1
    for argv, environ, where in (["--seed", str(2**64)], {}, "flag --seed"), ([], {"SEED": "9" * 5000}, "environment variable SEED"):
        with pytest.raises(ValueError, match=f"{where}: '[0-9]+.* is not a valid int"):
            load_config(Config, argv, environ)


def test_help_shows_every_knob(capsys):
    with pytest.raises(SystemExit):
        load_config(Config, ["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    for name, f in FIELDS.items():
        assert f"--{name} " in text and f.metadata["doc"].split()[0] in text


def test_readme_table_is_the_config():
    """One row a knob: name, default and description as they stand in Config."""
    rows = {}
    for line in (train_gpt.ROOT / "README.md").read_text().splitlines():
        if match := re.match(r"\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", line):
            rows[match[1].lower()] = match[2], match[3]
    assert set(rows) == set(FIELDS)
    for name, f in FIELDS.items():
        default = str(int(f.default)) if f.type is bool else str(f.default)
        assert rows[name] == (f"`{default}`" if default else "", f.metadata["doc"]), name


# ---- presets


def presets():
    return sorted((train_gpt.ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", presets(), ids=lambda p: p.stem)
def test_presets_load_and_say_purpose_command_and_expectation(path):
    if path.stem.startswith("finetune"):
        load_sections(finetune.Config, [f"--config={path}"], finetune.ALIASES)
    else:
        cfg, _, _ = load_config(Config, [f"--config={path}"], {})
        for ranks in (1,) if path.stem == "cpu_stdlib" else (1, 2, 4, 8):
            train_gpt.divide_batch(cfg, 0, ranks, None)
    head = path.read_text().splitlines()[:4]
    for word in ("Purpose:", "Command:", "Expect:"):
        assert any(line.startswith(f"# {word}") for line in head), word


def test_cpu_stdlib_is_the_default():
    assert load_config(Config, [f"--config={train_gpt.ROOT / 'configs/cpu_stdlib.yaml'}"], {})[0] == Config()


def test_parameters_of_the_presets_are_as_their_comments_say():
    for name, count in (("cpu_stdlib", "6.3M"), ("fineweb_124m", "123.6M"), ("golf_16mb", "15.5M")):
        path = train_gpt.ROOT / f"configs/{name}.yaml"
        cfg, _, _ = load_config(Config, [f"--config={path}"], {})
        with torch.device("meta"):
            model = GPT(GPTConfig(cfg.vocab_size or 2048, cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.mlp_mult, cfg.tie_embeddings, cfg.value_embed))
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M" == count and count in path.read_text()


def test_golf_fits_its_artifact_without_any_compression():
    cfg, _, _ = load_config(Config, [f"--config={train_gpt.ROOT / 'configs/golf_16mb.yaml'}"], {})
    model = GPT(GPTConfig(cfg.vocab_size, cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.mlp_mult, cfg.tie_embeddings, cfg.value_embed))
    source = sum((train_gpt.ROOT / name).stat().st_size for name in train_gpt.SOURCES)
    assert len(zlib.decompress(weights.quantize(model.state_dict()))) + source <= 16_000_000


def test_values_read_back_from_a_run_s_config_yaml(tmp_path):
    cfg = Config(jepa_lambda=0.25, run_id="x", tie_embeddings=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(cfg)))
    assert load_config(Config, [f"--config={tmp_path / 'config.yaml'}"], {})[0] == cfg  # test_run.py: a run's own config.yaml


def test_package_needs_nothing_but_torch_numpy_and_yaml_to_import():
    third_party = set()
    for name in train_gpt.SOURCES:
        for node in ast.parse((train_gpt.ROOT / name).read_text()).body:  # top level: the rest is imported where it is used
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            third_party |= {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"jepa", "model", "loader", "data", "weights", "config", "checkpoint"}
    assert third_party == {"torch", "numpy", "yaml"}
