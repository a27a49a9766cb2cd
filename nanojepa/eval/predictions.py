"""Files of predictions: evaluate.py's own, and those of other programs.

Its own is a line with all that they depend on, then a line for each question. A run that was
stopped goes on after the lines that are there.
"""

import json
import os

from nanojepa.eval.tasks import make_question, read_questions
from nanojepa.readers import open_rows
from nanojepa.records import read_rows, recorder


def open_output(path, header):
    """{line: its prediction} of a file of predictions, which can be appended to then.

    It is begun with the header, or must have the same one. ValueError names a damaged line.
    """
    first = json.dumps(header).encode() + b"\n"
    there = path.read_bytes() if path.exists() else b""
    whole = there[: there.rfind(b"\n") + 1]  # a run that was killed may have torn its last line
    if not whole and first.startswith(there):
        path.write_bytes(first)
        return {}
    if not whole.startswith(first):
        raise ValueError(
            f"{path} isn't of this model, data, task and flags; choose another --output, or remove "
            "it"
        )
    done = {}
    for number, line in enumerate(whole.split(b"\n")[1:-1], 2):
        try:
            prediction = json.loads(line)
            done[prediction["line"]] = prediction
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: no prediction; remove the line, choose another --output, "
                "or remove it"
            ) from None
    os.truncate(path, len(whole))
    return done


def read_predictions(path, data=None, task=None, bad="stop", columns=None):
    """(Questions, the text predicted for each) of a file whose lines have the key "prediction".

    data: the file of the test records, None if they stand in the predictions' own lines. The others
    are as for read_questions().
    """
    rows = open_rows(path)

    def make(number, raw):
        row = rows.parse(raw)
        if "data_sha256" in row:  # the first line of evaluate.py's own
            return number, None
        if not isinstance(row.get("prediction"), str):
            raise ValueError('no text in the key "prediction"')
        key = row.get("line", number) if data else number
        if not isinstance(key, int):
            raise ValueError('its "line" is no number')
        return key, row

    made = [(key, row) for key, row in read_rows(rows.items, make, path, bad) if row is not None]
    given = dict(made)
    if len(given) < len(made):
        raise ValueError(f'{path}: two predictions for one "line"')
    if data:
        questions = read_questions(data, task, bad, columns)
        return questions, match_predictions(questions, given, path)
    record = recorder(path, columns)
    questions = read_rows(made, lambda n, row: make_question(n, row, record, task), path, bad)
    return questions, [given[q.line]["prediction"] for q in questions]


def match_predictions(questions, given, path):
    """The text predicted for each question, by "line" or by their order."""
    if not all("line" in row for row in given.values()):
        if len(given) != len(questions):
            raise ValueError(
                f"{path} has {len(given)} predictions for {len(questions)} records of --data; "
                'give as many, or each its "line" in --data'
            )
        return [row["prediction"] for row in given.values()]
    missing = [q.line for q in questions if q.line not in given]
    if missing:
        raise ValueError(f"{path}: no prediction for line {missing[0]} of --data")
    return [given[q.line]["prediction"] for q in questions]
