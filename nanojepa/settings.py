"""Settings of a script, from a dataclass: default < YAML < environment < flag.

A setting is a field. Its comment, after it or above it, is its documentation; a comment line
`# ---- name` begins a group. Its type holds the values it may take:

    warmdown_frac: Fraction = 0.5  # the last part of the run, over which learning rates fall to 0

A field of a flat dataclass is set by a YAML key and a flag of its name and by a variable of its
name in capitals. If the fields are dataclasses themselves, the keys are section.key, and the flag
is --section.key, or --key if no other section has that key.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml

FIELD = re.compile(r"    (\w+): [^=]+ = .*?(?:  # (.*))?$")
HELP_COLUMNS = 100
TRUTH = {"0": False, "1": True, "false": False, "true": True}

# ---- what values a setting may take
# These rules are no tuples. Empty tuples are equal, and typing would take one rule for another.


@dataclass(frozen=True)
class Range:
    """The values from low to high; If above is true, low is excluded."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def wrong(self, value):
        """The rule that a value breaks, or ""."""
        if not math.isfinite(value):
            return "must be finite"
        too_low = value <= self.low if self.above else value < self.low
        if not too_low and value <= self.high:
            return ""
        rule = f"must be {'above' if self.above else 'at least'} {self.low}"
        return rule if self.high == math.inf else f"{rule} and at most {self.high}"


@dataclass(frozen=True)
class Choices:
    """The values in a container, which is looked at when a value is checked."""

    container: Any

    def wrong(self, value):
        *others, last = map(str, self.container)
        return "" if value in self.container else f"must be {', '.join(others)} or {last}"


@dataclass(frozen=True)
class OrBool:
    """A number that true and false, or its flag without a value, set to 1 and 0."""

    def wrong(self, value):
        return ""


Natural = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, above=True)]


def OneOf(container):
    """The type of a setting that is one of the container's strings."""
    return Annotated[str, Choices(container)]


class Setting(NamedTuple):
    key: str  # the field's name, or section.name
    kind: type  # bool, int, float or str
    rules: tuple  # Range, Choices, OrBool
    default: Any
    doc: str
    group: str

    @property
    def label(self):
        """The key as messages and the manual show it: of a flat dataclass, its variable."""
        return self.key if "." in self.key else self.key.upper()

    @property
    def shown(self):
        """The default as text."""
        return f"{self.default:g}" if self.kind is float else str(self.default)

    @property
    def choices(self):
        """The values it may take, as text; "" if they are not listed."""
        listed = [rule.container for rule in self.rules if isinstance(rule, Choices)]
        return ", ".join(map(str, *listed)) if listed else ""


class Loaded(NamedTuple):
    config: Any
    origin: dict  # {key: where its value comes from}
    warnings: list


# ---- what settings there are


def parts_of(Config):
    """{prefix: dataclass}: its sections by "name.", or itself by "" if it is flat."""
    fields = dataclasses.fields(Config)
    sections = {f"{f.name}.": f.type for f in fields if dataclasses.is_dataclass(f.type)}
    return sections or {"": Config}


@functools.cache
def settings_of(Config):
    """{key: Setting} of a dataclass, in its order."""
    settings = {}
    for prefix, part in parts_of(Config).items():
        docs = read_comments(part)
        for f in dataclasses.fields(part):
            doc, group = docs[f.name]
            group, key = prefix.removesuffix(".") or group, prefix + f.name
            settings[key] = Setting(key, *read_type(f.type), f.default, doc, group)
    return settings


def read_type(annotation):
    """(bool, int, float or str; the rules) of a field's type."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        return type(choices[0]), (Choices(choices),)
    if typing.get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, (Range(),) if annotation is float else ()


def read_comments(part):
    """{field: (its documentation, its group)} from a dataclass's source."""
    docs, above, group = {}, [], ""
    for line in inspect.getsource(part).splitlines():
        text, field = line.strip(), FIELD.match(line)
        if text.startswith("# ----"):
            group = text.strip("# -")
        elif text.startswith("#"):
            above.append(text[1:].strip())
        else:
            if field and field[1] not in docs:
                docs[field[1]] = " ".join([*above, field[2] or ""]).strip(), group
            above = []
    return docs


def value_of(config, key):
    return functools.reduce(getattr, key.split("."), config)


def check_ranges(config):
    """ValueError names the first setting whose value its type doesn't allow."""
    for setting in settings_of(type(config)).values():
        value = value_of(config, setting.key)
        for rule in setting.rules:
            if wrong := rule.wrong(value):
                raise ValueError(f"{setting.label}={value}: {wrong}")


# ---- reading them


def load_settings(Config, argv, environ=None, aliases=None, description=""):
    """The Loaded config; ValueError says what is wrong, where, and what to do.

    argv: flags without the program's name, None for those of the process. environ: a mapping, None
    if the environment isn't read. aliases: {flag: key} of other names.
    """
    settings = settings_of(Config)
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(settings.values(), description, environ is not None))
        raise SystemExit(0)
    flags = parse_flags(argv, settings, flag_names(settings) | (aliases or {}))
    sources = [from_yaml(flags.pop("config"), settings)]
    if environ is not None:
        sources.append(from_environment(environ, settings))
    sources.append({key: (value, f"flag --{key}") for key, value in flags.items()})
    values, origin = {}, dict.fromkeys(settings, "default")
    for source in sources:
        for key, (given, where) in source.items():
            values[key], origin[key] = parse_value(settings[key], given, where), where
    config = build(Config, values)
    check_ranges(config)
    return Loaded(config, origin, [] if environ is None else near_misses(environ, settings))


def parse_value(setting, given, where):
    """The value that a string, or what YAML made of it, stands for; ValueError names `where`."""
    kind, value = setting.kind, None
    if isinstance(given, bool) and OrBool() in setting.rules:
        given = int(given)
    if kind is bool:
        value = TRUTH.get(str(given).lower())
    elif not isinstance(given, bool | list | dict) and (kind, type(given)) != (int, float):
        try:
            value = kind(given)
        except (TypeError, ValueError, OverflowError):
            value = None
    # No random generator takes an integer of more than 64 bits.
    if value is None or (kind is int and value.bit_length() > 64):
        expected = "0 or 1" if kind is bool else f"a valid {kind.__name__}"
        raise ValueError(f"{where}: {repr(given)[:200]} is not {expected}")
    return value


def build(Config, values):
    """The dataclass with these values, {key: value}, and defaults for the rest."""
    parts = {}
    for prefix, part in parts_of(Config).items():
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        parts[prefix.removesuffix(".")] = part(**own)
    return parts[""] if "" in parts else Config(**parts)


def nearest(name, names):
    """A hint at the most similar of these names, or ""."""
    return "".join(f"; did you mean {n}?" for n in difflib.get_close_matches(name, names, 1, 0.5))


def flag_names(settings):
    """{flag: key}: every key, and its last part if no other key ends so."""
    last_parts = [key.rpartition(".")[2] for key in settings]
    names = {key: key for key in settings}
    return names | {
        s: k for s, k in zip(last_parts, settings, strict=True) if last_parts.count(s) == 1
    }


def parse_flags(argv, settings, flags):
    """{key: text} of the flags that are given, and "config": the YAML file or None."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--config")
    for setting in settings.values():
        own = [f"--{flag}" for flag, key in flags.items() if key == setting.key]
        # A yes-or-no flag needs no value.
        takes_bool = setting.kind is bool or OrBool() in setting.rules
        bare = {"nargs": "?", "const": "1"} if takes_bool else {}
        parser.add_argument(*own, dest=setting.key, default=argparse.SUPPRESS, **bare)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise ValueError(str(e)) from None
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        same = [f"--{key}" for key in settings if key.endswith(f".{name}")]
        hint = f"; say {' or '.join(same)}" if same else nearest(name, flags)
        raise ValueError(f"unknown argument {unknown[0]}{hint}")
    return vars(given)


def read_yaml(path):
    """The mapping that a YAML file holds; ValueError says why it is none."""
    try:
        loaded = yaml.safe_load(Path(path).read_bytes()) or {}
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(f"--config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: must be lines of `key: value`")
    return loaded


def from_yaml(path, settings):
    """{key: (value, where it stands)} of a YAML file; {} without one. null is the default."""
    loaded = read_yaml(path) if path else {}
    sections = sorted({key.partition(".")[0] for key in settings if "." in key})
    if sections:
        found, loaded = loaded, {}
        for section, inside in found.items():
            if section not in sections:
                hint = f"{nearest(str(section), sections)}; there are {', '.join(sections)}"
                raise ValueError(f"{path}: unknown section {section!r}{hint}")
            if not isinstance(inside, dict | None):
                raise ValueError(f"{path}: section {section} must hold lines of `key: value`")
            loaded |= {f"{section}.{key}": value for key, value in (inside or {}).items()}
    for key in loaded:
        if key not in settings:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(str(key), settings)}")
    return {k: (value, f"{path}: {k}") for k, value in loaded.items() if value is not None}


def from_environment(environ, settings):
    """{key: (text, where it stands)} of the variables that are settings.

    An unknown variable that begins with JEPA_ is an error.
    """
    variables = {key.upper(): key for key in settings}
    for name in environ:
        if name.startswith("JEPA_") and name not in variables:
            raise ValueError(f"unknown environment variable {name}{nearest(name, variables)}")
    given = {name: key for name, key in variables.items() if name in environ}
    return {key: (environ[name], f"environment variable {name}") for name, key in given.items()}


def near_misses(environ, settings):
    """Warnings of environment variables that look like a setting and are none."""
    variables, warnings = [key.upper() for key in settings], []
    for name in environ.keys() - set(variables):
        for close in difflib.get_close_matches(name, variables, 1, 0.85):
            warnings.append(
                f"warning: environment variable {name} is read by nobody here; did you mean "
                f"{close}?"
            )
    return warnings


# ---- showing them


def help_text(settings, description, environment):
    """What --help prints: a line for each setting, in groups."""
    others = "in capitals an environment variable, " if environment else ""
    about = (description or "").strip()  # python -OO has no docstrings
    lines = [about, "", f"--config FILE: YAML. Each flag is also {others}a YAML key."]
    width, group = min(44, max(len(f"--{s.key} {s.shown}") for s in settings)), None
    for setting in settings:
        if setting.group != group:
            group = setting.group
            lines.append(group)
        line = f"  {f'--{setting.key} {setting.shown}':{width}}  "
        doc, *others = re.split(r"[.;] ", setting.doc.rstrip("."))
        # What a special default means is worth a second clause: "0: all".
        doc = "; ".join([doc, *(o for o in others if o.startswith(f"{setting.shown}:"))])
        if setting.choices:
            doc = f"{setting.choices}: {doc}"
        room = HELP_COLUMNS - len(line)
        lines.append(line + (doc if len(doc) <= room else doc[: room - 4] + " ..."))
    return "\n".join([*lines, "All of it: docs/settings.md."])


def non_defaults(config, origin):
    """A line for each setting whose value isn't its default."""
    settings = settings_of(type(config)).values()
    changed = [s.key for s in settings if value_of(config, s.key) != s.default]
    return [
        f"{key}: {value_of(config, key)!r} ({origin[key]})"
        for key in changed
        if origin[key] != "default"  # made for the run, like its run_id
    ]


def settings_markdown(Config):
    """The tables of docs/settings.md for a dataclass, one a group."""
    lines, group = [], None
    for setting in settings_of(Config).values():
        if setting.group != group:
            group = setting.group
            lines += [
                "",
                f"### {group}",
                "",
                "| setting | default | what it does |",
                "|---|---|---|",
            ]
        default = f"`{setting.shown}`" if setting.shown else ""
        doc = re.sub(r"([|*])", r"\\\1", setting.doc)
        if setting.choices:
            doc = f"{doc.rstrip('.')}. One of {setting.choices}."
        lines.append(f"| `{setting.label}` | {default} | {doc} |")
    return "\n".join(lines[1:]) + "\n"


def as_dict(config):
    """The settings as a dict for YAML."""
    return dataclasses.asdict(config)
