"""Settings of a script, one dataclass of knobs: default < YAML (--config) < environment (JEPA_LAMBDA=0.1) < flag (--jepa_lambda 0.1).

The environment name is the field name in capitals. Misspelt keys, flags and JEPA_* variables are refused. load_sections is the
same for a YAML file of sections, without the environment.
"""
import argparse
import dataclasses
import difflib
import math
from pathlib import Path

import yaml

YAML_BYTES = 100_000  # of a file of settings, at most
YAML_STARTS = yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken
YAML_ENDS = yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken


def knob(default, doc, low=None, high=None, truth=False, choices=None):
    """A setting with its one line of documentation, and the range it must lie in, both ends included, or its choices. truth: an
    int that a bool sets too."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "truth": truth, "choices": choices})


def check_ranges(config, name=lambda f: f.name.upper()):
    """Raise ValueError naming the first knob outside its range or choices, or not finite."""
    for f in dataclasses.fields(config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if (choices := f.metadata["choices"]) and value not in choices:
            raise ValueError(f"{name(f)}={value}: must be {', '.join(choices[:-1])} or {choices[-1]}")
        if f.type is float and not math.isfinite(value):
            raise ValueError(f"{name(f)}={value}: must be finite")
        if low is not None and not low <= value <= (math.inf if high is None else high):
            raise ValueError(f"{name(f)}={value}: must be at least {low}" + (f" and at most {high}" if high is not None else ""))


def told(value):
    """A value as a message of one line shows it; Python refuses to print an integer of thousands of digits."""
    try:
        return repr(value)[:200]
    except ValueError:
        return "an integer of too many digits"


def told_key(key):
    """As told, a usual key without quotes."""
    return key[:200] if isinstance(key, str) and key.isprintable() else told(key)


def parse_value(kind, text, where):
    """The value of type `kind` that text (a string, or what YAML made of it) stands for; ValueError naming `where`."""
    try:
        if kind is bool:
            if str(text).lower() in ("0", "1", "true", "false"):
                return str(text).lower() in ("1", "true")
        elif not isinstance(text, bool):
            if kind is str and text is None:
                return ""
            if not (kind is int and isinstance(text, float) or isinstance(text, (list, dict))):
                value = kind(text)
                if not isinstance(value, int) or value.bit_length() <= 64:
                    return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: {told(text)} is not {'0 or 1' if kind is bool else 'a valid ' + kind.__name__}")


def nearest(name, names):
    return "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(name, names, n=1, cutoff=0.5))


def read_yaml(path):
    """The mapping that a YAML file holds; ValueError says why it is none."""
    try:
        with open(path, "rb") as f:
            text = f.read(YAML_BYTES + 1)
        if len(text) > YAML_BYTES:
            raise ValueError(f"longer than {YAML_BYTES:,} bytes")
        depth = 0
        for token in yaml.scan(text):
            depth += isinstance(token, YAML_STARTS) - isinstance(token, YAML_ENDS)
            if depth > 10 or isinstance(token, yaml.AliasToken):  # a few lines of aliases can stand for gigabytes
                raise ValueError("nested too deeply, or with aliases (*name), which are not read")
        loaded = yaml.safe_load(text) or {}
    except Exception as e:  # besides YAMLError, PyYAML lets through whatever its constructors raise
        raise ValueError(f"--config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: must be lines of `key: value`")
    return loaded


def refuse(message):
    raise ValueError(message)


def load_config(Config, argv, environ, description=""):
    """(Config, {field: where its value comes from}, [warnings]); ValueError says what is wrong, where, and what to do.

    Config: a dataclass of knobs, none of which is called config. argv: flags without the program's name; environ: a mapping.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values, origin, warnings = {}, dict.fromkeys(fields, "default"), []

    def put(name, text, where):
        values[name], origin[name] = parse_value(fields[name].type, text, where), where

    parser = argparse.ArgumentParser(allow_abbrev=False, description=description, epilog="Each flag is also an environment variable, "
                                     "in capitals.", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings")
    for name, f in fields.items():
        parser.add_argument(f"--{name}", metavar=f.type.__name__.upper(), help=f"{f.metadata['doc']} (default: {f.default!r})".replace("%", "%%"))
    parser.error = refuse
    flags, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        raise ValueError(f"unknown argument {flag}{nearest(flag.split('=')[0].lstrip('-'), fields)}")
    if flags.config:
        loaded = read_yaml(flags.config)
        for name, value in loaded.items():
            if name not in fields:
                raise ValueError(f"{flags.config}: unknown key {told_key(name)}{nearest(told_key(name), fields)}")
            put(name, value, f"{flags.config}: {name}")
    for variable, text in environ.items():
        name = variable.lower()
        if variable.isupper() and name in fields:
            put(name, text, f"environment variable {variable}")
        elif variable.startswith("JEPA_"):
            raise ValueError(f"unknown environment variable {variable}{nearest(variable, [n.upper() for n in fields])}")
        elif close := difflib.get_close_matches(variable, [n.upper() for n in fields], n=1, cutoff=0.85):
            warnings.append(f"warning: environment variable {variable} is read by nobody here; did you mean {close[0]}?")
    for name in fields:
        if getattr(flags, name) is not None:
            put(name, getattr(flags, name), f"flag --{name}")
    return Config(**values), origin, warnings


def load_sections(Config, argv, aliases, description=""):
    """(Config, {section.key: where its value comes from}) of a dataclass whose fields are dataclasses of knobs; default < YAML < flag.

    A flag is --section.key, --key where no other section has that key, or an alias ({flag name: section.key}); a bool's needs
    no value. null in the YAML file is the default.
    """
    sections = {s.name: s.type for s in dataclasses.fields(Config)}
    fields = {f"{s}.{f.name}": f for s, kind in sections.items() for f in dataclasses.fields(kind)}
    short = [key.split(".")[1] for key in fields]
    flags = {key: key for key in fields} | {s: key for s, key in zip(short, fields) if short.count(s) == 1} | aliases
    values, origin = {}, dict.fromkeys(fields, "default")

    def put(key, text, where):
        if text is not None:
            text = int(text) if fields[key].metadata["truth"] and isinstance(text, bool) else text
            values[key], origin[key] = parse_value(fields[key].type, text, where), where

    parser = argparse.ArgumentParser(allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with the sections {', '.join(sections)}")
    parser.error = refuse
    for key, f in fields.items():
        own = {"nargs": "?", "const": "1"} if f.type is bool or f.metadata["truth"] else {}
        parser.add_argument(*(f"--{flag}" for flag, of in flags.items() if of == key), dest=key, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['doc']} (default: {f.default!r})".replace("%", "%%"), **own)
    given, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        name = flag.split("=")[0].lstrip("-")
        both = [key for key in fields if key.split(".")[1] == name]
        raise ValueError(f"unknown argument {flag}" + (f"; say --{' or --'.join(both)}" if both else nearest(name, flags)))
    for section, keys in (read_yaml(given.config) if given.config else {}).items():
        if section not in sections:
            raise ValueError(f"{given.config}: unknown section {told_key(section)}{nearest(told_key(section), sections)}; there are {', '.join(sections)}")
        if not isinstance(keys, (dict, type(None))):
            raise ValueError(f"{given.config}: section {section} must hold lines of `key: value`")
        for name, value in (keys or {}).items():
            key = f"{section}.{told_key(name)}"
            if key not in fields:
                raise ValueError(f"{given.config}: unknown key {key}{nearest(key, fields)}")
            put(key, value, f"{given.config}: {key}")
    for key in fields:
        put(key, getattr(given, key), f"flag --{key}")
    config = Config(**{s: kind(**{key.split(".")[1]: v for key, v in values.items() if key.split(".")[0] == s}) for s, kind in sections.items()})
    for s in sections:
        check_ranges(getattr(config, s), lambda f: f"{s}.{f.name}")
    return config, origin
