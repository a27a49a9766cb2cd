"""Where a setting comes from, what is refused, and that every one is read, documented and shown."""

import ast
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import torch
import yaml

import train_gpt
from conftest import CPU, ROOT
from model import GPTConfig
from nanojepa.batches import divide_batch
from nanojepa.hf import settings as hf
from nanojepa.hf.settings import IsDate
from nanojepa.objectives import IsTerms
from nanojepa.settings import (
    Natural,
    NonNegative,
    OneOf,
    OrBool,
    Positive,
    Range,
    as_dict,
    load_settings,
    non_defaults,
    settings_markdown,
    settings_of,
)
from train_gpt import Config

SETTINGS = settings_of(Config)


def load_yaml(folder, text, Config=Config, **more):
    (folder / "c.yaml").write_text(text)
    return load_settings(Config, [f"--config={folder / 'c.yaml'}"], **more)


def test_precedence_default_yaml_environment_flag(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("jepa_lambda: 0.2\nseed: 5\nnum_layers: 2\n")
    flags = [f"--config={file}", "--jepa_lambda", "0.4"]
    cfg, origin, _ = load_settings(Config, flags, {"JEPA_LAMBDA": "0.3", "SEED": "6"})
    assert (cfg.jepa_lambda, cfg.seed, cfg.num_layers) == (0.4, 6, 2)
    assert cfg.model_dim == Config.model_dim
    assert origin["jepa_lambda"] == "flag --jepa_lambda"
    assert origin["seed"] == "environment variable SEED"
    assert origin["num_layers"] == f"{file}: num_layers"
    assert origin["model_dim"] == "default"


def test_the_environment_sets_every_field():
    values = {bool: "1", int: "7", float: "0.5", str: "x"}
    odd = {"jepa_norm": "1", "run_id": "x", "eval_stride": "7", "jepa_objective": "mtp"}
    also = {"eval_stride": {"TRAIN_SEQ_LEN": "8"}, "jepa_layer": {"NUM_LAYERS": "9"}}
    for name, setting in SETTINGS.items():
        value = odd.get(name) or setting.choices.split(", ")[-1] or values[setting.kind]
        loaded = load_settings(Config, [], {name.upper(): value, **also.get(name, {})})
        assert str(getattr(loaded.config, name)) in (value, "True"), name
        assert loaded.origin[name] == f"environment variable {name.upper()}"
        assert not loaded.warnings


def test_every_field_is_read_and_every_jepa_variable_is_a_field():
    """Every field is an attribute that is read outside of Config itself."""
    read = {f.name for f in dataclasses.fields(GPTConfig)}  # which build_model looks for
    for path in [ROOT / "train_gpt.py", *(ROOT / "nanojepa").rglob("*.py")]:
        parts = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") != "Config"]
        for node in (node for part in parts for node in ast.walk(part)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read |= {node.attr} if owner == "cfg" else set()
    assert set(SETTINGS) <= read
    for page in [ROOT / "README.md", *(ROOT / "configs").glob("*.yaml")]:
        named = {v.lower() for v in re.findall(r"\bJEPA_[A-Z_]+\b", page.read_text())}
        assert named <= set(SETTINGS), page


@pytest.mark.parametrize(
    "argv, environ, message",
    [
        (
            [],
            {"JEPA_LAMDA": "0.1"},
            "unknown environment variable JEPA_LAMDA; did you mean JEPA_LAMBDA?",
        ),
        ([], {"JEPA_LAMBDA": "x"}, "environment variable JEPA_LAMBDA: 'x' is not a valid float"),
        ([], {"ITERATIONS": "1.5"}, "environment variable ITERATIONS: '1.5' is not a valid int"),
        ([], {"COMPILE": "maybe"}, "environment variable COMPILE: 'maybe' is not 0 or 1"),
        (["--jepa_lamda=1"], {}, "unknown argument --jepa_lamda=1; did you mean jepa_lambda?"),
        (["span"], {}, "unknown argument span"),
        (["--jepa_lambda"], {}, "argument --jepa_lambda: expected one argument"),
        (["--config=/nowhere.yaml"], {}, "/nowhere.yaml: .*No such file"),
        ([], {"JEPA_LAMBDA": "-1"}, "JEPA_LAMBDA=-1.0: must be at least 0"),
        ([], {"JEPA_LAMBDA": "nan"}, "JEPA_LAMBDA=nan: must be finite"),
        ([], {"JEPA_LAMBDA": "inf"}, "JEPA_LAMBDA=inf: must be finite"),
        ([], {"JEPA_MAX_SPAN_FRAC": "0"}, "must be above 0 and at most 1"),
        ([], {"JEPA_END_FRAC": "1.1"}, "must be at least 0 and at most 1"),
        ([], {"JEPA_PRED_TOKENS": "11"}, "JEPA_PRED_TOKENS=11: must be at least 0 and at most 10"),
        ([], {"JEPA_SPANS": "0"}, "JEPA_SPANS=0: must be at least 1"),
        ([], {"JEPA_RATIO": "0"}, "JEPA_RATIO=0.0: must be above 0"),
        ([], {"JEPA_DISTANCE": "cos"}, "must be .*cosine"),
        ([], {"JEPA_NORM": "2"}, "JEPA_NORM=2: must be -1, 0 or 1"),
        ([], {"JEPA_OBJECTIVE": "pears"}, "must be span, pair"),
        ([], {"OPTIMIZER": "sgd"}, "OPTIMIZER=sgd: must be muon or adamw"),
        ([], {"JEPA_LAMBDA": "1", "JEPA_START_FRAC": "0.5", "JEPA_END_FRAC": "0.3"}, "never runs"),
        ([], {"JEPA_LAMBDA": "1", "JEPA_START_FRAC": "1"}, "the term never runs"),
        ([], {"JEPA_LAMBDA": "1", "TRAIN_SEQ_LEN": "2"}, "TRAIN_SEQ_LEN=2"),
        (
            [],
            {"JEPA_LAMBDA": "1", "TRAIN_SEQ_LEN": "8", "JEPA_OBJECTIVE": "future"},
            "TRAIN_SEQ_LEN=8: the objective future needs rows of 9 tokens",
        ),
        (
            [],
            {"JEPA_OBJECTIVE": "mtp", "JEPA_LAYER": "0"},
            "JEPA_OBJECTIVE=mtp: it scores the head",
        ),
        ([], {"JEPA_OBJECTIVE": "mtp", "JEPA_NORM": "1"}, "leave JEPA_LAYER and JEPA_NORM out"),
        ([], {"JEPA_LAYER": "6", "NUM_LAYERS": "6"}, "JEPA_LAYER=6: must be -1, or 0 to 5"),
        ([], {"EVAL_STRIDE": "512", "TRAIN_SEQ_LEN": "256"}, "must not exceed"),
        ([], {"RESUME": "auto"}, "needs RUN_ID"),
        ([], {"RUN_ID": "../x"}, "RUN_ID=../x: may hold letters"),
    ],
)
def test_bad_settings_are_one_line_that_says_where(argv, environ, message):
    with pytest.raises(ValueError, match=message) as e:
        load_settings(Config, argv, environ)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_layer: 3", "c.yaml: unknown key 'num_layer'; did you mean num_layers?"),
        ("num_layer: null", "c.yaml: unknown key 'num_layer'"),
        ('"a\\nb": 1', r"c.yaml: unknown key 'a\nb'"),
        ("3: 1", "c.yaml: unknown key 3"),
        ("seed: [1]", "c.yaml: seed: [1] is not a valid int"),
        ("num_layers: 2.5", "num_layers: 2.5 is not a valid int"),
        ("num_layers: true", "num_layers: True is not a valid int"),
        ("run_id: true", "run_id: True is not a valid str"),
        ("compile: 2", "compile: 2 is not 0 or 1"),
        ("- a", "c.yaml: must be lines of `key: value`"),
        ("a: b: c", "c.yaml: mapping values are not allowed here"),
        ("a: \0", "c.yaml: unacceptable character"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        load_yaml(tmp_path, text)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{float}: 0x" + 500 * "f", "[0-9]+ is not a valid float"),
        ("{int}: -0x1" + 16 * "0", "-18446744073709551616 is not a valid int"),
        ("{int}: 1.0", "1.0 is not a valid int"),
        ("{int}: " + 5000 * "9", ".*digits"),
    ],
)
def test_numbers_and_keys_that_cannot_be_are_one_line_with_file_and_key(tmp_path, line, message):
    flat = line.format(float="jepa_lambda", int="seed")
    sections = "training:\n  " + line.format(float="lbd", int="batch_size")
    for Config_, text in ((Config, flat), (hf.Config, sections)):
        with pytest.raises(ValueError, match=rf"c\.yaml: .*{message}") as e:
            load_yaml(tmp_path, text, Config_)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_an_integer_of_a_flag_or_variable_has_at_most_64_bits():
    assert load_settings(Config, [f"--seed={2**64 - 1}"]).config.seed == 2**64 - 1
    for argv, environ, where in (
        (["--seed", str(2**64)], {}, "flag --seed"),
        ([], {"SEED": "9" * 5000}, "environment variable SEED"),
    ):
        with pytest.raises(ValueError, match=f"{where}: '[0-9]+.* is not a valid int"):
            load_settings(Config, argv, environ)


def test_a_near_miss_in_the_environment_is_a_warning():
    environ = {"NUM_LAYER": "3", "PATH": "/bin", "OMP_NUM_THREADS": "2", "RANK": "0"}
    (warning,) = load_settings(Config, [], environ).warnings
    assert "NUM_LAYER " in warning and "NUM_LAYERS?" in warning
    assert load_settings(Config, [], None).warnings == []


def test_null_is_the_default(tmp_path):
    loaded = load_yaml(tmp_path, "jepa_lambda: null\nseed: 3")
    assert loaded.config == Config(seed=3) and loaded.origin["jepa_lambda"] == "default"
    assert load_yaml(tmp_path, "training:\nmodel:\n  name: null", hf.Config).config == hf.Config()
    assert load_yaml(tmp_path, "").config == Config()


@pytest.mark.parametrize(
    "text, value",
    [("true", True), ("yes", True), ("1", True), ("0", False), ("off", False), ("'True'", True)],
)
def test_a_bool_may_be_written_as_yaml_has_it_or_as_0_or_1(tmp_path, text, value):
    assert load_yaml(tmp_path, f"jepa_doc: {text}").config.jepa_doc is value


# ---- sections


@dataclass
class Left:
    size: Positive = 1  # how much
    name: str = "a"  # who


@dataclass
class Right:
    name: str = "b"  # whom
    deep: bool = False  # whether it is
    level: Annotated[int, OrBool(), Range(0)] = 0  # how far


@dataclass
class Both:
    left: Left = field(default_factory=Left)
    right: Right = field(default_factory=Right)


@pytest.mark.parametrize(
    "flags, key, value",
    [
        ("--left.size 3", "left.size", 3),
        ("--size=3", "left.size", 3),
        ("--many=3", "left.size", 3),
        ("--right.name c", "right.name", "c"),
        ("--deep", "right.deep", True),
        ("--right.deep 0", "right.deep", False),
        ("--deep --size 2", "left.size", 2),
        ("--level", "right.level", 1),
        ("--level 5", "right.level", 5),
    ],
)
def test_flags_of_sections_and_their_short_and_other_names(flags, key, value):
    config, origin, _ = load_settings(Both, flags.split(), aliases={"many": "left.size"})
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value and origin[key] == f"flag --{key}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("lift:\n  size: 1", "c.yaml: unknown section 'lift'; did you mean left?; there are left"),
        ("size: 1", "c.yaml: unknown section 'size'"),
        ("left: 1", "c.yaml: section left must hold lines of `key: value`"),
        ("left:\n  sice: 1", "c.yaml: unknown key 'left.sice'; did you mean left.size?"),
        ("left:\n  deep: 1", "c.yaml: unknown key 'left.deep'"),
        ("left:\n  size: 0", "left.size=0: must be at least 1"),
        ("left:\n  size: x", "c.yaml: left.size: 'x' is not a valid int"),
    ],
)
def test_bad_sections(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_yaml(tmp_path, text, Both)


def test_a_name_in_two_sections_needs_its_section():
    with pytest.raises(ValueError, match="--name=x; say --left.name or --right.name"):
        load_settings(Both, ["--name=x"])


def test_true_sets_a_number_only_if_its_type_says_so(tmp_path):
    assert load_yaml(tmp_path, "right:\n  level: true", Both).config.right.level == 1
    with pytest.raises(ValueError, match="True is not a valid int"):
        load_yaml(tmp_path, "left:\n  size: true", Both)


# ---- what is shown


@dataclass
class Small:
    # ---- first
    # Both lines above it
    # and the one after it.
    one: Natural = 1  # More: of it.
    two: NonNegative = 0.5  # a | b; the rest
    # ---- second
    three: Literal["x", "y"] = "x"  # which

    four: OneOf({"p": 1, "q": 2}) = "p"  # what


def test_comments_are_the_documentation_and_types_the_range():
    settings = settings_of(Small)
    assert settings["one"].doc == "Both lines above it and the one after it. More: of it."
    assert [s.group for s in settings.values()] == ["first", "first", "second", "second"]
    assert settings_markdown(Small) == (
        "### first\n\n| setting | default | what it does |\n|---|---|---|\n"
        "| `ONE` | `1` | Both lines above it and the one after it. More: of it. |\n"
        "| `TWO` | `0.5` | a \\| b; the rest |\n"
        "\n### second\n\n| setting | default | what it does |\n|---|---|---|\n"
        "| `THREE` | `x` | which. One of x, y. |\n| `FOUR` | `p` | what. One of p, q. |\n"
    )
    with pytest.raises(ValueError, match="FOUR=r: must be p or q"):
        load_settings(Small, ["--four=r"])


@pytest.mark.parametrize("Config", [Config, hf.Config])
def test_help_shows_every_knob(Config, capsys):
    """On two screens, with each one's default and documentation."""
    with pytest.raises(SystemExit):
        load_settings(Config, ["--help"], description="What it is.\n")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "What it is." and len(lines) < 100 and max(map(len, lines)) <= 100
    for key, setting in settings_of(Config).items():
        (line,) = [line for line in lines if line.startswith(f"  --{key} {setting.shown} ")]
        assert setting.doc and setting.doc.split()[0].rstrip(".;") in line, key
        assert setting.label in settings_markdown(Config)


@pytest.mark.parametrize("script", ["train_gpt.py", "nanojepa/hf/run.py"])
def test_the_scripts_own_introduction_leaves_help_two_screens(script):
    about = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    settings = settings_of(Config if script == "train_gpt.py" else hf.Config)
    groups = {setting.group for setting in settings.values()}
    assert len(about.splitlines()) + len(settings) + len(groups) + 5 <= 100


def test_the_console_shows_what_is_not_the_default_and_where_from(tmp_path):
    cfg, origin, _ = load_settings(Config, ["--seed=4", "--num_layers=6"], {"JEPA_LAMBDA": "0.1"})
    assert non_defaults(cfg, origin) == [
        "jepa_lambda: 0.1 (environment variable JEPA_LAMBDA)",
        "seed: 4 (flag --seed)",
    ]
    cfg, origin, _ = load_settings(Both, ["--size=2"])
    assert non_defaults(cfg, origin) == ["left.size: 2 (flag --left.size)"]


@pytest.mark.parametrize(
    "cfg", [Config(jepa_lambda=0.25, tie_embeddings=True), Both(right=Right(level=2))]
)
def test_values_read_back_from_a_run_s_config_yaml(tmp_path, cfg):
    text = yaml.safe_dump(as_dict(cfg), sort_keys=False)
    assert load_yaml(tmp_path, text, type(cfg)).config == cfg


# ---- presets


def preset(name):
    return load_settings(Config, [f"--config={ROOT / 'configs' / name}.yaml"]).config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_load_and_say_purpose_command_and_expectation(path):
    text = path.read_text()
    if path.stem.startswith("finetune"):
        load_settings(hf.Config, [f"--config={path}"], aliases=hf.ALIASES)
    else:
        for ranks in (1,) if path.stem == "cpu_stdlib" else (1, 2, 4, 8):
            divide_batch(preset(path.stem), 0, ranks, CPU)
    head = text[: re.search(r"^[^#\n]|\Z", text, re.M).start()]
    for word in ("Purpose:", "Command:", "Expect:"):
        assert f"\n# {word}" in f"\n{head}", word


def test_cpu_stdlib_is_the_default():
    assert preset("cpu_stdlib") == Config()


def build(name, **changes):
    """The model of a preset."""
    cfg = dataclasses.replace(preset(name), **changes)
    return train_gpt.build_model(cfg, cfg.vocab_size or 2048, torch.device("meta"))


def test_parameters_of_the_presets_are_as_their_comments_say():
    for name, count in (("cpu_stdlib", "6.3M"), ("fineweb_124m", "123.6M")):
        parameters = sum(p.numel() for p in build(name).parameters())
        assert f"{parameters / 1e6:.1f}M" == count
        assert count in (ROOT / f"configs/{name}.yaml").read_text()


def test_rules_without_fields_differ():
    """As empty tuples they were equal: on Python 3.11.2 one setting got another's rule."""
    types = [Annotated[int, OrBool()], Annotated[int, IsDate()], Annotated[int, IsTerms()]]
    for kind, rule in zip(types, (OrBool, IsDate, IsTerms), strict=True):
        assert [type(each) for each in kind.__metadata__] == [rule]
    with pytest.raises(ValueError, match="--jepa_objective: expected one argument"):
        load_settings(Config, ["--jepa_objective"])
