"""A file of predictions: a line with all that they depend on, then a line for each question.

A run that was stopped goes on after the lines that are there.
"""

import json
import os

PREDICTION = {"line": int, "prediction": str, "correct": bool, "probability": float}


def is_prediction(line):
    """Whether the JSON of a line is a prediction; one of a task that chooses has a probability."""
    if not isinstance(line, dict) or line.keys() | {"probability"} != PREDICTION.keys():
        return False
    return all(type(value) is PREDICTION[name] for name, value in line.items())


def parse_line(line):
    """The JSON of a line, None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def check_header(path, there, header):
    """ValueError if a file of predictions doesn't begin with this header."""
    if there == header:
        return
    what = "not a file of predictions"
    if isinstance(there, dict):
        what = f"of another {', '.join(k for k in header if there.get(k) != header[k])}"
    raise ValueError(f"{path} is {what}; choose another --output, or remove it")


def open_output(path, header):
    """{line: its prediction} of a file of predictions, which can be appended to then.

    It is begun with the header, or must have the same one. ValueError names a damaged line.
    """
    first = json.dumps(header).encode() + b"\n"
    there = path.read_bytes() if path.exists() else b""
    whole = there[: there.rfind(b"\n") + 1]  # a run that was killed may have torn its last line
    lines = [parse_line(line) for line in whole.split(b"\n")[:-1]]
    is_new = not whole and first.startswith(there)
    if not is_new:
        check_header(path, lines[0] if lines else None, header)
    for number, line in enumerate(lines[1:], 2):
        if not is_prediction(line):
            raise ValueError(
                f"{path}, line {number}: not JSON with line, prediction and correct, true or "
                "false; remove the line, choose another --output, or remove it"
            )
    if is_new:
        path.write_bytes(first)
    else:
        os.truncate(path, len(whole))
    return {line["line"]: line for line in lines[1:]}
