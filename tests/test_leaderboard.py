"""leaderboard.py on made-up runs in a folder of their own: what it refuses, what check finds."""

import io
import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import leaderboard
from conftest import ROOT, run_cli
from nanojepa.files import sha256_file
from nanojepa.stats import Summary, markdown
from nanojepa.weights import quantize

ARTIFACT = quantize({"w": torch.zeros(8, 8)})
PAGE = "by hand\n<!-- table -->\n<!-- /table -->\nby hand\n"
CONFIG = {
    "data_path": "data/stdlib",
    "init_from": "",
    "val_tokens": 0,
    "eval_stride": 0,
    "target_val_loss": 0.0,
    "train_flops": 0.0,
    "num_layers": 3,
    "matrix_lr": 0.04,
    "jepa_lambda": 0.0,
    "jepa_objective": "span",
    "checkpoint_every": 0,
}
RESULT = {
    "val_loss": 2.5,
    "val_bpb": 1.9,
    "quantized_val_loss": 2.6,
    "train_seconds": 290.0,
    "train_flops": 1e13,
    "steps": 1000,
    "compiled": True,
    "data_sha256": "ab" * 32,
    "artifact_bytes": len(ARTIFACT) + 500,
}
START = {
    "step": 0,
    "started": "2026-01-01T10:00:00Z",
    "git_commit": "1234abcd",
    "uncommitted": False,
    "python": "3.12.1",
    "torch": "2.13.0",
    "numpy": "2.4",
    "platform": "Linux",
    "cpu": "Some CPU @ 2.5GHz",
    "threads": 2,
    "cpu_capability": "AVX2",
    "gpus": [],
    "world_size": 1,
    "sources": {"train_gpt.py": "11" * 32, "model.py": "22" * 32},
    "origin": {},
}
GPUS = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "world_size": 8}
# a run that may take part in each track
FIT = {
    "cpu_5min": {},
    "nlregex": {
        "data_path": "data/nlregex",
        "train_flops": 7.9e12,
        "evaluation": {"startswith": 0.9, "n": 1000},
    },
    "fineweb_3.28": {
        **GPUS,
        "data_path": "/disk/data/fineweb10B",
        "val_tokens": 10_485_760,
        "target_val_loss": 3.28,
        "val_loss": 3.27,
    },
    "golf_16mb": {**GPUS, "data_path": "data/x", "train_seconds": 600.01, "eval_stride": 16},
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    return project(tmp_path, monkeypatch)


def project(folder, monkeypatch):
    """The folder, as a project of its own, in which every record is a day younger than the last."""
    for page in ("records/README.md", "docs/studies.md"):
        (folder / page).parent.mkdir(exist_ok=True)
        (folder / page).write_text(PAGE)
    monkeypatch.setattr(leaderboard, "ROOT", folder)
    days = iter(range(1, 28))
    clock = SimpleNamespace(
        strftime=lambda *_: f"2026-01-{next(days):02}T10:00:00Z", gmtime=lambda: None
    )
    monkeypatch.setattr(leaderboard, "time", clock)
    return folder


def make_run(root, name, seed=1, evaluation=None, test_file="135f85e4", restart=None, **values):
    """logs/<name> as train_gpt.py leaves it; its path as text.

    values: settings, results and facts of environment.json that aren't the defaults.
    restart: what was different when the run was resumed.
    """
    results = {key: value for key, value in values.items() if key in RESULT}
    settings = {k: v for k, v in values.items() if k in CONFIG and k not in results}
    start = START | {key: value for key, value in values.items() if key in START}
    config = CONFIG | settings | {"seed": seed, "run_id": name}
    result = RESULT | results | {"seed": seed, "config": config}
    bits = result["val_bpb"] / result["val_loss"]
    result["quantized_val_bpb"] = result["quantized_val_loss"] * bits
    reached = result["val_loss"] <= config["target_val_loss"]
    result["time_to_target"] = result["train_seconds"] if reached else None
    folder = root / "logs" / name
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("# the source\n")
    starts = [start] if restart is None else [start, start | {"step": 9} | restart]
    (folder / "environment.json").write_text(json.dumps(starts))
    (folder / "metrics.jsonl").write_text(metrics_of(result))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "model.int8.zlib").write_bytes(ARTIFACT)
    if evaluation:
        (folder / f"evaluation-{test_file}.json").write_text(json.dumps(evaluation))
    return str(folder)


def metrics_of(result):
    """The metrics.jsonl of a run with this result: its first steps and its validation."""
    seconds, flops = (result[key] / result["steps"] for key in ("train_seconds", "train_flops"))
    rows = [
        {
            "step": n,
            "train_loss": 3.0 - n / 10,
            "step_flops": flops,
            "train_flops": n * flops,
            "train_time": n * seconds,
        }
        for n in (1, 2, 3)
    ]
    end = {key: result[key] for key in ("val_loss", "val_bpb")}
    rows.append({"step": result["steps"], **end, "train_time": result["train_seconds"]})
    return "".join(json.dumps(row) + "\n" for row in rows)


def add(root, name, values, track="cpu_5min", metric="val_bpb", **more):
    """A record of runs with these values of a metric and seeds 1, 2, ...; its result.json."""
    runs = []
    for seed, value in enumerate(values, 1):
        own = {metric: value}
        if metric == "startswith":
            own = {"evaluation": {"startswith": value, "n": 1000}}
        runs.append(make_run(root, f"{name}-{seed}", seed, **{**FIT[track], **more, **own}))
    submit(*runs, track=track, name=name)
    return json.loads(next((root / "records" / track).glob(f"*_{name}/result.json")).read_text())


def submit(*runs, track="cpu_5min", name="n"):
    text = f"what {name} changed"
    leaderboard.main(["add", *runs, "--track", track, "--name", name, "--text", text])


def check(capsys):
    """(whether check found no fault, the lines it printed)."""
    capsys.readouterr()
    try:
        leaderboard.main(["check"])
    except SystemExit as e:
        assert e.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert not lines or lines[-1] == f"{len(lines) - 1} fault(s)"
    return not lines, lines[:-1]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_archive(folder, change, seal=True):
    """Rewrite an archive with change(name, bytes) as the members' bytes; None drops a member.

    seal: give result.json the new sha256, as somebody would who doesn't want it to be seen.
    """
    path = folder / "logs.tar.xz"
    with tarfile.open(path, "r:xz") as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w:xz") as archive:
        for name, blob in files:
            blob = change(name, blob)
            if blob is not None:
                member = tarfile.TarInfo(name)
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))
    if seal:
        edit_json(folder / "result.json", lambda r: r.update(logs_sha256=sha256_file(path)))


def edit_file(folder, name, change, seal=True):
    """Rewrite one file of JSON in an archive."""

    def edit(member, blob):
        if member != name:
            return blob
        content = json.loads(blob)
        change(content)
        return json.dumps(content).encode()

    edit_archive(folder, edit, seal)


def edit_text(folder, run, old, new):
    """Replace bytes in all files of a stored run."""

    def edit(member, blob):
        return blob.replace(old, new) if member.startswith(f"{run}/") else blob

    edit_archive(folder, edit)


# ----------------------------------------------------------------------------------------- records


def test_records_and_non_records(root, capsys):
    """The first of three runs, a better one, one that isn't, one of two runs, other data or CPU."""
    first = add(root, "first", [1.90, 1.91, 1.89])
    assert first["record"] and first["before"] is None and first["tests"] == {}
    assert (first["mean"], first["sd"]) == pytest.approx((1.90, 0.01))
    assert [run["seed"] for run in first["runs"]] == [1, 2, 3]
    assert first["hardware"] == "2 x Some CPU @ 2.5GHz (threads)"
    assert first["commit"] == "1234abcd"
    assert all(run["weights_bytes"] == len(ARTIFACT) for run in first["runs"])
    better = add(root, "better", [1.80, 1.81, 1.79])
    ((test, p),) = better["tests"].items()
    right = stats.ttest_ind([1.80, 1.81, 1.79], [1.90, 1.91, 1.89], equal_var=False).pvalue / 2
    assert better["record"] and test == "val_bpb better than 2026-01-01_first's"
    assert p == pytest.approx(right)
    worse = add(root, "worse", [1.79, 1.81, 1.79])  # a lower mean, but no evidence
    assert not worse["record"] and worse["before"] == "2026-01-02_better"
    assert 0.01 < worse["tests"]["val_bpb better than 2026-01-02_better's"] < 0.5
    pair = add(root, "pair", [1.60, 1.61])
    assert not pair["record"] and "non-record" in capsys.readouterr().out
    last = add(root, "last", [1.70, 1.71, 1.69])  # a non-record in between is none to beat
    assert last["record"] and last["before"] == "2026-01-02_better"
    other = add(root, "other", [2.0, 2.1, 2.2], data_sha256="cd" * 32)
    assert other["record"] and other["before"] is None
    elsewhere = add(root, "elsewhere", [1.5, 1.6, 1.7], cpu="Another CPU")
    assert elsewhere["record"] and elsewhere["before"] is None
    page = (root / "records" / "README.md").read_text()
    rows = re.findall(
        r"^\| 2026\S+ \| \[(\w+)\]\S+ \| (\S+) \| (.*?) \| \d \| (.*?) \|", page, re.M
    )
    assert rows[2:] == [
        ("last", "record", "1.7 ± 0.01", f"{last['tests'][next(iter(last['tests']))]:.2g}"),
        ("pair", "non-record", "1.605 ± 0.0071", rows[3][3]),
        ("worse", "non-record", "1.7967 ± 0.012", rows[4][3]),
        ("better", "record", "1.8 ± 0.01", f"{p:.2g}"),
        ("first", "record", "1.9 ± 0.01", "not compared"),
    ]
    assert page.startswith("by hand\n<!-- table -->") and page.endswith(
        "<!-- /table -->\nby hand\n"
    )
    folder = root / "records" / "cpu_5min" / "2026-01-02_better"
    text = (folder / "README.md").read_text()
    assert "# better\n\nwhat better changed\n" in text and "1.81" in text
    assert "--config records/cpu_5min/2026-01-02_better/config.yaml" in text
    assert "num_layers: 3" in (folder / "config.yaml").read_text()
    assert check(capsys) == (True, [])


def test_what_other_tracks_must_show(root, capsys):
    """nlregex: higher is better, anywhere. fineweb: the mean is below. golf: 0.005 nats better."""
    add(root, "a", [0.80, 0.81, 0.79], "nlregex", "startswith")
    higher = add(root, "b", [0.90, 0.91, 0.89], "nlregex", "startswith", cpu="Another CPU")
    assert higher["record"] and higher["before"] == "2026-01-01_a"
    assert not add(root, "c", [0.70, 0.71, 0.69], "nlregex", "startswith")["record"]
    losses = [3.270, 3.271, 3.272]
    below = add(root, "d", losses, "fineweb_3.28", "val_loss")
    right = stats.ttest_1samp(losses, 3.28, alternative="less").pvalue
    assert below["tests"] == {"mean val_loss below 3.28": pytest.approx(right)}
    assert below["record"] and below["hardware"] == "8 x NVIDIA H100 80GB HBM3"
    loose = add(root, "e", [3.27, 3.2799, 3.2795], "fineweb_3.28", "val_loss")
    assert not loose["record"] and loose["before"] == "2026-01-04_d"
    assert loose["tests"]["mean val_loss below 3.28"] > 0.01
    assert loose["tests"]["time_to_target better than 2026-01-04_d's"] is None
    for name, start, record in (("f", 2.0, True), ("g", 1.996, False), ("h", 1.994, True)):
        bits = 1.2 if name == "f" else 1.19  # what is compared is clearly better both times
        runs = []
        for i in range(3):
            loss = start + i / 10_000
            own = {"quantized_val_loss": loss, "val_bpb": (bits + i / 10_000) * 2.5 / loss}
            runs.append(make_run(root, f"{name}{i}", i, **FIT["golf_16mb"], **own))
        submit(*runs, track="golf_16mb", name=name)
        (path,) = (root / "records" / "golf_16mb").glob(f"*_{name}/result.json")
        assert json.loads(path.read_text())["record"] is record, name
    assert check(capsys) == (True, [])


@pytest.mark.parametrize(
    "track, change, message",
    [
        (
            "cpu_5min",
            {"train_seconds": 300.5},
            "train_seconds is 300.5; cpu_5min wants it at most 300",
        ),
        ("cpu_5min", {"data_path": "data/x"}, "data is 'data/x'"),
        ("cpu_5min", {"world_size": 2}, "hardware is '4 x Some CPU .* wants it at most 2 of cpu"),
        ("cpu_5min", GPUS, "hardware is '8 x NVIDIA H100"),
        ("cpu_5min", {"data_sha256": None}, "data_sha256 is None; .* meta.json"),
        ("cpu_5min", {"val_tokens": 1000}, "val_tokens is 1000; .* wants it 0"),
        ("cpu_5min", {"init_from": "logs/x"}, "init_from is 'logs/x'"),
        ("cpu_5min", {"eval_stride": 16}, "eval_stride is 16; .* wants it 0"),
        ("nlregex", {"evaluation": {"startswith": 0.9, "n": 999}}, "n is 999; .* wants it 1000"),
        (
            "nlregex",
            {"test_file": "12345678"},
            "evaluation is 'evaluation-12345678.json'; .* wants",
        ),
        ("nlregex", {"evaluation": None}, "evaluation is None"),
        (
            "nlregex",
            {"train_flops": 8.1e12},
            r"train_flops is 8.*; nlregex wants it at most 8e\+12",
        ),
        ("fineweb_3.28", {"val_loss": 3.29}, "time_to_target is None"),
        ("fineweb_3.28", {"target_val_loss": 3.3}, "target_val_loss is 3.3"),
        ("fineweb_3.28", {"val_tokens": 0}, "val_tokens is 0; .* 10485760"),
        ("golf_16mb", {"artifact_bytes": 16_000_001}, "artifact_bytes is 16000001; .* at most"),
        ("golf_16mb", {"train_seconds": 601.6}, "train_seconds is 601.6"),
        ("golf_16mb", {"world_size": 16}, "hardware is '16 x NVIDIA"),
        ("cpu_5min", {"sources": {}}, "names no sources"),
    ],
)
def test_conditions_of_a_track(root, track, change, message):
    """Each is one line that names the run; the same run without the change is taken."""
    run = make_run(root, "bad", **{**FIT[track], **change})
    with pytest.raises(SystemExit, match=f"^error: bad.*{message}") as e:
        submit(run, track=track)
    assert "\n" not in str(e.value) and not list((root / "records").glob("*/*"))
    submit(make_run(root, "good", **FIT[track]), track=track)


def test_the_last_step_may_go_over_a_cap(root):
    """By a step and a half; in seconds on a GPU, which has one more queued, by two and a half."""
    for track, seconds, fits in (
        ("cpu_5min", 300.44, True),
        ("cpu_5min", 300.46, False),
        ("golf_16mb", 601.4, True),
        ("golf_16mb", 601.6, False),
    ):
        values = {**FIT[track], "train_seconds": seconds}
        run = leaderboard.read_run(root / make_run(root, f"{track}-{seconds}", **values))
        broken = [key for key, _ in leaderboard.broken_rules(leaderboard.TRACKS[track], run.facts)]
        assert broken == ([] if fits else ["train_seconds"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "two runs have one seed"),
        ({"num_layers": 1}, "odd and one differ in num_layers"),
        ({"compiled": False}, "differ in compiled"),
        ({"data_sha256": "cd"}, "differ in data_sha256"),
        ({"sources": {"train_gpt.py": "33" * 32}}, "differ in source"),
        ({"artifact_bytes": len(ARTIFACT) + 400}, "differ in bytes of source"),
        ({"torch": "2.12.0"}, "differ in versions"),
        ({"uncommitted": True}, "differ in commit"),
        ({"cpu": "Another CPU"}, "differ in hardware"),
    ],
)
def test_runs_of_a_record_differ_in_their_seed_alone(root, change, message):
    runs = [make_run(root, "one", 1), make_run(root, "odd", **{"seed": 2, **change})]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        submit(*runs)


def test_misuse_of_add_is_one_line(root):
    run = make_run(root, "one")
    submit(run)
    with pytest.raises(SystemExit, match="^error: .*2026-01-02_n exists|^error: .*_n exists") as e:
        leaderboard.time.strftime = lambda *_: "2026-01-01T10:00:00Z"
        submit(run)
    blob = bytearray(ARTIFACT)
    blob[len(blob) // 2] ^= 1
    (root / "logs" / "one" / "model.int8.zlib").write_bytes(blob)
    with pytest.raises(SystemExit, match="^error: one: model.int8.zlib: .*; copy it again") as e:
        submit(run, name="m")
    assert "\n" not in str(e.value)
    assert len(list((root / "records" / "cpu_5min").iterdir())) == 1
    for text, message in (
        ("{}", "one: malformed, KeyError: '"),
        ("[]", "one: malformed, TypeError"),
        ("{", "one: malformed, JSONDecodeError"),
    ):
        (root / "logs" / "one" / "result.json").write_text(text)
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            submit(run, name="m")
    (root / "logs" / "one" / "result.json").unlink()
    with pytest.raises(SystemExit, match="^error: one has no result.json: did it finish?"):
        submit(run, name="m")
    shutil.rmtree(root / "logs" / "one")
    with pytest.raises(SystemExit, match="^error: .*no such folder"):
        submit(run, name="m")
    with pytest.raises(SystemExit, match="^error: .*a name has letters"):
        submit(make_run(root, "two"), name="../n")


@pytest.mark.parametrize(
    "restart, message",
    [
        ({}, None),
        ({"git_commit": "5678"}, None),  # the same source at another commit
        ({"torch": "2.12.0"}, "resumed at step 9 with torch '2.12.0', which was '2.13.0'"),
        ({"threads": 4}, "with threads 4, which was 2"),
        ({"cpu": "Another CPU"}, "with cpu 'Another CPU'"),
        ({"world_size": 2}, "with world_size 2"),
        ({"gpus": ["H100"]}, r"with gpus \['H100'\]"),
        ({"sources": {**START["sources"], "model.py": "33" * 32}}, "with another model.py"),
        ({"sources": {**START["sources"], "new.py": "33" * 32}}, "with another new.py"),
    ],
)
def test_a_run_may_be_resumed_with_other_checkpoints_but_not_on_another_machine(
    root, restart, message
):
    """Nor with another source."""
    run = make_run(root, "a", checkpoint_every=5, restart=restart)
    if message is None:
        submit(run)
    else:
        with pytest.raises(SystemExit, match=f"^error: a: .*{message}"):
            submit(run)


def replace_in(member, old, new):
    """An edit of an archive: replace bytes in one member."""
    return lambda name, blob: blob.replace(old, new) if name == member else blob


def drop(member):
    return lambda name, blob: None if name == member else blob


def edit_result(**values):
    return lambda folder: edit_json(folder / "result.json", lambda r: r.update(values))


def edit_stored(run, **values):
    return lambda folder: edit_file(folder, f"{run}/result.json", lambda r: r.update(values))


FAULTS = {  # what is done to a record -> what check says of it
    "mean": (edit_result(mean=1.7), "result.json: mean is 1.7, its runs give 1.8"),
    "a run's number": (
        lambda f: edit_json(f / "result.json", lambda r: r["runs"][1].update(val_bpb=1.7)),
        r"result.json: runs\[1\] val_bpb is 1.7, its runs give 1.81",
    ),
    "p": (
        edit_result(tests={"val_bpb better than 2026-01-01_first's": 1e-9}),
        "better than 2026-01-01_first's is 1e-09, its runs give 0.000",
    ),
    "verdict": (edit_result(record=False), "result.json: record is False, its runs give True"),
    "weights": (
        lambda f: edit_json(f / "result.json", lambda r: r["runs"][0].update(weights_bytes=9)),
        "better-2 and better-1 differ in bytes of source",
    ),
    "a run left out": (
        lambda f: edit_json(f / "result.json", lambda r: r["runs"].pop()),
        r"hold different runs \(better-3\)",
    ),
    "a key": (
        lambda f: edit_json(f / "result.json", lambda r: r.pop("runs")),
        "malformed, KeyError: 'runs'",
    ),
    "config": (
        lambda f: (f / "config.yaml").write_text("num_layers: 9\n"),
        "config.yaml is not that of its runs",
    ),
    "archive, not sealed again": (
        lambda f: edit_file(
            f, "better-2/result.json", lambda r: r.update(peak_memory_bytes=9), seal=False
        ),
        "logs.tar.xz is not the archive that result.json was computed from",
    ),
    "run in the archive": (
        edit_stored("better-2", val_bpb=1.71),
        "better-2: result.json has val_bpb 1.71, its metrics.jsonl gives 1.81",
    ),
    "run and metrics": (
        lambda f: edit_archive(
            f,
            lambda n, b: (
                b.replace(b'val_bpb": 1.81', b'val_bpb": 1.71') if n[:8] == "better-2" else b
            ),
        ),
        "better-2: result.json has quantized_val_bpb 1.88.*, its quantized_val_loss gives 1.77",
    ),
    "run, metrics and quantised": (
        lambda f: (
            edit_text(f, "better-2", b'val_bpb": 1.81', b'val_bpb": 1.71'),
            edit_stored("better-2", quantized_val_bpb=2.6 * 1.71 / 2.5)(f),
        ),
        r"result.json: runs\[1\] val_bpb is 1.81, its runs give 1.71",
    ),
    "time to target": (
        edit_stored("better-1", time_to_target=200.0),
        "better-1: result.json has time_to_target 200.0, its val_loss gives None",
    ),
    "seconds": (
        edit_stored("better-1", train_seconds=200.0),
        "has train_seconds 200.0, its metrics",
    ),
    "steps": (edit_stored("better-1", steps=900), "has steps 900, its metrics.jsonl gives 1000"),
    "seed": (
        edit_stored("better-1", seed=4),
        "better-1: result.json has seed 4, its config gives 1",
    ),
    "a setting": (
        lambda f: edit_file(
            f, "better-2/result.json", lambda r: r["config"].update(matrix_lr=0.05)
        ),
        "better-2 and better-1 differ in matrix_lr",
    ),
    "too few FLOPs": (edit_stored("better-1", train_flops=2e12), "better-1: .* train_flops 20"),
    "too many FLOPs": (edit_stored("better-1", train_flops=5e13), "better-1: .* train_flops 50"),
    "no step logged": (
        lambda f: edit_text(f, "better-1", b'"step_flops"', b'"x"'),
        "better-1: malformed",
    ),
    "another source": (
        lambda f: edit_text(f, "better-1", b"2222", b"3333"),
        "better-2 and better-1 differ in source",
    ),
    "no result": (lambda f: (f / "result.json").unlink(), "better: no result.json"),
    "no log": (
        lambda f: edit_archive(f, drop("better-1/log.txt")),
        "better-1 has no log.txt",
    ),
    "no environment": (
        lambda f: edit_archive(f, drop("better-1/environment.json")),
        "better-1 has no environment.json",
    ),
    "environment without versions": (
        lambda f: edit_file(f, "better-1/environment.json", lambda e: e[0].pop("torch")),
        "better-1: malformed, KeyError: 'torch'",
    ),
    "archive": (
        lambda f: (f / "logs.tar.xz").write_bytes((f / "logs.tar.xz").read_bytes()[:-200]),
        "logs.tar.xz: ",
    ),
    "folder": (lambda f: f.rename(f.with_name("2026-01-09_better")), "is not TRACK/DATE_NAME"),
    "its README": (
        lambda f: (f / "README.md").write_text(
            (f / "README.md").read_text().replace("1.81", "1.71")
        ),
        "better/README.md was not what the result.json files give; rewritten",
    ),
    "the table": (
        lambda f: (f.parents[1] / "README.md").write_text(PAGE),
        "records/README.md was not what the result.json files give; rewritten",
    ),
}


@pytest.fixture(scope="module")
def two_records(tmp_path_factory):
    """Two records, in a folder to be copied."""
    made = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        project(made, patch)
        add(made, "first", [1.90, 1.91, 1.89])
        add(made, "better", [1.80, 1.81, 1.79])
    return made


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(two_records, root, capsys, fault):
    """Each edit is a fault that names file and place. Tables that alone are wrong are mended."""
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    edit, message = FAULTS[fault]
    edit(root / "records" / "cpu_5min" / "2026-01-02_better")
    fine, lines = check(capsys)
    assert not fine and re.search(message, "\n".join(lines)), lines
    assert all("better" in line for line in lines) or fault == "the table"
    assert check(capsys)[0] is (fault in ("its README", "the table"))


def test_p_values_may_differ_by_what_versions_of_scipy_do(two_records, root, capsys):
    """By 1e-6 of their size; other numbers by 1e-9."""
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    file = root / "records" / "cpu_5min" / "2026-01-02_better" / "result.json"
    test = "val_bpb better than 2026-01-01_first's"
    edit_json(file, lambda r: r["tests"].update({test: r["tests"][test] * (1 + 1e-7)}))
    assert check(capsys) == (True, [])
    edit_json(file, lambda r: r.update(mean=r["mean"] * (1 + 1e-7)))
    assert not check(capsys)[0]


def test_a_page_that_lost_its_marks_is_named(two_records, root):
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    (root / "records" / "cpu_5min" / "2026-01-02_better" / "README.md").write_text("x")
    with pytest.raises(SystemExit, match="better/README.md has lost its lines <!-- table -->"):
        leaderboard.main(["check"])


def test_check_finds_a_record_that_lost_its_base(two_records, root, capsys):
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    shutil.rmtree(root / "records" / "cpu_5min" / "2026-01-01_first")
    message = "before is '2026-01-01_first', its runs give None"
    assert any(message in line for line in check(capsys)[1])


# ----------------------------------------------------------------------------------------- studies

# {(number of the arm, seed): val_bpb}
VALUES = {
    **{(0, 1): 1.90, (1, 1): 1.88, (2, 1): 1.93},
    **{(0, 2): 1.91, (1, 2): 1.88, (2, 2): 1.92},
    **{(0, 3): 1.89, (1, 3): 1.885, (2, 3): 1.95},
}


def make_grid(root, name="lambda", seeds=(1, 2, 3), finished=VALUES, weights=(0.1, 0.2), **values):
    """ablations/<name> of two weights and their twin, with the runs that are finished; its path.

    Its numbers are missing: a study's come out of the runs.
    """
    arms = [f"jepa_lambda={weight}" for weight in (0, *weights)]
    runs = []
    for seed in seeds:
        for n, arm in enumerate(arms):
            run = f"{name}-{n}-seed{seed}"
            runs.append({"arm": arm, "seed": seed, "run": run, "finished": False})
            if (n, seed) in finished and not (root / "logs" / run).exists():
                weight, value = float(arm.split("=")[1]), finished[n, seed]
                make_run(root, run, seed, jepa_lambda=weight, val_bpb=value, **values)
    rows = [
        {
            "arm": arm,
            "settings": [arm.split("=")],
            "files": [],
            "twin": arms[0] if n else None,
        }
        for n, arm in enumerate(arms)
    ]
    grid = {
        "command": ["--arms", "jepa_lambda=0.1,0.2", "--config", f"{root}/configs/x.yaml"],
        "script": "train_gpt.py",
        "baseline": None,
        "tables": [{"metric": "val_bpb", "arms": rows}],
        "runs": runs,
    }
    folder = root / "ablations" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(grid))
    return str(folder)


def make_study(root, *grids, question="?"):
    more = ["--question", question] if question else []
    leaderboard.main(["study", *grids, "--name", "S", *more])
    folder = root / "records" / "studies" / "S"
    (folder / "run.sh").write_text("python ablate.py ...\n")
    return folder


def grids_of(folder):
    return json.loads((folder / "result.json").read_text())["grids"]


def test_a_study_of_a_grid(root, capsys):
    folder = make_study(root, make_grid(root), question="Does it help?")
    assert "9 of 9 runs; write its run.sh" in capsys.readouterr().out
    (grid,) = grids_of(folder)
    test = stats.ttest_rel([1.88, 1.88, 1.885], [1.90, 1.91, 1.89])
    table = grid["tables"][0]
    row, other = table["arms"][1:]
    assert row["arm"] == "jepa_lambda=0.1" and row["twin"] == "jepa_lambda=0"
    assert row["paired"]["p"] == pytest.approx(test.pvalue)
    assert all(run["finished"] for run in grid["runs"])
    assert grid["data"] == {"data/stdlib": "ab" * 32}
    assert grid["command"][-1] == "configs/x.yaml"  # no place of this machine
    page, top = (folder / "README.md").read_text(), (root / "docs" / "studies.md").read_text()
    assert "Does it help?" in page and "![lambda](lambda.png)" in page
    assert markdown(Summary(**table)) in page
    assert (folder / "lambda.png").stat().st_size > 10_000
    low, high = (f"{x:+.5f}" for x in test.confidence_interval(0.95))
    assert row["paired"]["holm"] in (row["paired"]["p"] * 2, other["paired"]["p"])
    assert (
        "| [lambda](../records/studies/S/README.md) | jepa_lambda=0.1 | 3 | val_bpb | -0.01833 | "
        f"{low} .. {high} | {row['paired']['holm']:.3g} | 1.00x |" in top
    )
    assert top.count("[lambda]") == 2 and top.endswith("<!-- /table -->\nby hand\n")
    assert check(capsys) == (True, [])
    (folder / "README.md").write_text(page.replace("Does it help?", "Does it, though?"))
    assert check(capsys)[0]  # words are free
    (folder / "lambda.png").write_bytes(b"")
    leaderboard.main(["table", "--draw"])
    assert (folder / "lambda.png").stat().st_size > 10_000


def test_a_grid_that_chooses_a_setting_stays_in_its_study(root):
    """Two seeds claim nothing: its table is in the study's README, and not in docs/studies.md."""
    few = {(arm, seed + 100): value for (arm, seed), value in VALUES.items() if seed < 3}
    choice = make_grid(root, "choice", (101, 102), few, weights=(0.3, 0.4))
    folder = make_study(root, make_grid(root), choice)
    assert "## choice" in (folder / "README.md").read_text()
    top = (root / "docs" / "studies.md").read_text()
    assert "[choice]" not in top and top.count("[lambda]") == 2


def test_a_half_finished_study_continues_elsewhere(root, capsys):
    half = {key: value for key, value in VALUES.items() if key[1] == 1 or key == (0, 2)}
    grid = make_grid(root, "lambda", (1, 2), half)
    folder = make_study(root, grid)
    assert "4 of 6 runs" in capsys.readouterr().out and check(capsys)[0]
    assert [run["finished"] for run in grids_of(folder)[0]["runs"]] == [True] * 4 + [False] * 2
    files = [path for path in (root / "logs").rglob("*.*") if path.name != "model.int8.zlib"]
    before = {path: path.read_bytes() for path in files}
    (root / "logs").rename(root / "old")
    with pytest.raises(SystemExit, match="error: no run of .* has finished"):
        make_study(root, grid)
    leaderboard.main(["restore", str(folder)])
    after = {path: path.read_bytes() for path in (root / "logs").rglob("*.*")}
    assert before == after
    begun, lost = root / "logs" / "lambda-0-seed1", root / "logs" / "lambda-1-seed1"
    for file in (begun / "result.json", lost / "result.json"):
        file.unlink()
    (begun / "log.txt").write_text("begun again here")
    leaderboard.main(["restore", str(folder)])
    assert "lambda-0-seed1 is left as it is: another log.txt is there" in capsys.readouterr().out
    assert not (begun / "result.json").exists()
    assert (lost / "result.json").read_bytes() == before[lost / "result.json"]
    shutil.rmtree(begun)
    with pytest.raises(SystemExit, match=r"error: .*S holds runs .* lose \(lambda-0-seed1\)"):
        make_study(root, grid)
    leaderboard.main(["restore", str(folder)])
    make_study(root, make_grid(root), question="")
    assert [row["n"] for row in grids_of(folder)[0]["tables"][0]["arms"]] == [3, 3, 3]
    assert "# S\n\n?\n" in (folder / "README.md").read_text() and check(capsys)[0]


def test_a_baseline_stands_for_the_twin(root, capsys):
    """Every arm is compared with the one that the grid's rows name."""
    grid = make_grid(root)

    def compare_with_the_last(g):
        g["baseline"] = "jepa_lambda=0.2"
        for row in g["tables"][0]["arms"]:
            row["twin"] = None if row["arm"] == g["baseline"] else g["baseline"]

    edit_json(root / "ablations" / "lambda" / "result.json", compare_with_the_last)
    table = grids_of(make_study(root, grid))[0]["tables"][0]
    differences = [row.get("paired", {}).get("difference") for row in table["arms"]]
    assert differences == [pytest.approx(-0.1 / 3), pytest.approx(-0.155 / 3), None]
    assert "difference to the baseline" in (root / "records/studies/S/README.md").read_text()
    assert check(capsys) == (True, [])


def swap(grid):
    """Exchange the arms of two runs of one seed, as one who would like the other sign would do."""
    one, other = (
        run for run in grid["runs"] if run["seed"] == 1 and run["arm"] != "jepa_lambda=0.2"
    )
    one["run"], other["run"] = other["run"], one["run"]


def edit_grid(change):
    return lambda folder: edit_json(folder / "result.json", lambda r: change(r["grids"][0]))


STUDY_FAULTS = {
    "a row": (
        edit_grid(lambda g: g["tables"][0]["arms"][1]["paired"].update(p=0.001)),
        r"grid lambda: tables\[0\] arms\[1\] paired p is 0.001, its runs give 0.12",
    ),
    "summary": (edit_grid(lambda g: g["tables"][0].update(summary="good")), "summary is 'good'"),
    "data": (edit_grid(lambda g: g["data"].update({"data/stdlib": "00"})), "data/stdlib is '00'"),
    "runs swapped": (
        edit_grid(swap),
        "lambda-1-seed1 has jepa_lambda 0.1, which is not jepa_lambda=0, seed 1",
    ),
    "no twin": (
        edit_grid(lambda g: g["tables"][0]["arms"].pop(0)),
        "jepa_lambda=0.1 has no twin: jepa_lambda=0 is not in the grid",
    ),
    "a run left out": (
        edit_grid(lambda g: g["runs"].pop()),
        "lambda-2-seed3 is a run of none of its grids",
    ),
    "a run gone": (
        lambda f: edit_archive(f, lambda n, b: None if n.startswith("lambda-2-seed3/") else b),
        r"runs\[8\] finished is True, its runs give False",
    ),
    "a run's number": (
        edit_stored("lambda-2-seed1", val_bpb=1.83),
        "lambda-2-seed1: result.json has val_bpb 1.83, its metrics.jsonl gives 1.93",
    ),
    "another setting": (
        lambda f: edit_text(f, "lambda-1-seed2", b'"matrix_lr": 0.04', b'"matrix_lr": 0.05'),
        "lambda-1-seed2 and lambda-0-seed1 differ in matrix_lr; a grid's",
    ),
    "another source": (
        lambda f: edit_text(f, "lambda-1-seed2", b"2222", b"3333"),
        "lambda-1-seed2 and lambda-0-seed1 differ in model.py",
    ),
    "another machine": (
        lambda f: edit_text(f, "lambda-2-seed3", b"Some CPU", b"A faster CPU"),
        "lambda-2-seed3 and lambda-0-seed3 differ in hardware or versions of seed 3",
    ),
    "another torch": (
        lambda f: edit_text(f, "lambda-2-seed3", b"2.13.0", b"2.12.0"),
        "lambda-2-seed3 and lambda-0-seed3 differ in hardware or versions of seed 3",
    ),
    "no result": (lambda f: (f / "result.json").unlink(), "studies/S: no result.json"),
    "a run that didn't end": (
        lambda f: edit_archive(f, drop("lambda-2-seed1/result.json")),
        "lambda-2-seed1 has no result.json",
    ),
    "no command": (lambda f: (f / "run.sh").unlink(), "no run.sh"),
    "no picture": (lambda f: (f / "lambda.png").unlink(), "no lambda.png"),
    "top table": (
        lambda f: (f.parents[2] / "docs" / "studies.md").write_text(PAGE),
        "docs/studies.md was not what",
    ),
}


@pytest.fixture(scope="module")
def one_study(tmp_path_factory):
    made = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        project(made, patch)
        make_study(made, make_grid(made))
    return made


@pytest.mark.parametrize("fault", STUDY_FAULTS)
def test_check_finds_in_a_study(one_study, root, capsys, fault):
    shutil.copytree(one_study, root, dirs_exist_ok=True)
    edit, message = STUDY_FAULTS[fault]
    edit(root / "records" / "studies" / "S")
    fine, lines = check(capsys)
    assert not fine and re.search(message, "\n".join(lines)), lines
    assert check(capsys)[0] is (fault == "top table")


def test_runs_of_a_study_must_compare(root):
    """Other data for the later seeds; a grid of another script; a new study without a question."""
    first = {key: value for key, value in VALUES.items() if key[1] == 1}
    grid = make_grid(root, "lambda", (1,), first)
    file = root / "ablations" / "lambda" / "result.json"
    with pytest.raises(SystemExit, match="error: a new study needs its --question"):
        make_study(root, grid, question="")
    make_grid(root, data_sha256="cd" * 32)
    with pytest.raises(SystemExit, match="lambda-0-seed2 and lambda-0-seed1 differ in data_sha256"):
        make_study(root, grid)
    edit_json(file, lambda g: g.update(script="finetune.py"))
    with pytest.raises(SystemExit, match="error: .* is a grid of finetune.py; a study needs runs"):
        make_study(root, grid)
    edit_json(file, lambda g: (g.update(script="train_gpt.py"), g.pop("runs")))
    with pytest.raises(SystemExit, match="error: .*lambda: malformed, KeyError: 'runs'"):
        make_study(root, grid)
    assert not (root / "records" / "studies").exists()


def test_seeds_of_a_study_may_be_of_two_machines_and_flags_may_hold_the_seed(root):
    make_grid(root, "lambda", (1,), init_from="logs/x-1")
    grid = make_grid(root, "lambda", (1, 2), cpu="Another CPU", init_from="logs/x-2")
    file = root / "ablations" / "lambda" / "result.json"
    with pytest.raises(SystemExit, match="lambda-0-seed2 and lambda-0-seed1 differ in init_from"):
        make_study(root, grid)
    edit_json(file, lambda g: g["command"].append("--init_from=logs/x-{seed}"))
    make_study(root, grid)
    edit_json(file, lambda g: g["command"].append("--init_from=logs/y-{seed}"))
    with pytest.raises(SystemExit, match="lambda-0-seed1 has init_from logs/x-1, which is not"):
        make_study(root, grid)


def test_files_of_an_arm(root):
    """An arm has its own file in all its runs, the same in each; the others have none of it."""
    grid = make_grid(root)
    file = root / "ablations" / "lambda" / "result.json"

    def replaced(g):
        arm = "jepa_lambda=0.1 model.py:my.py"
        g["tables"][0]["arms"][1].update(arm=arm, files=[["model.py", "my.py"]])
        for run in g["runs"]:
            if run["arm"] == "jepa_lambda=0.1":
                run["arm"] = arm

    edit_json(file, replaced)
    with pytest.raises(SystemExit, match="lambda-1-seed1 did not train with my.py in place of mod"):
        make_study(root, grid)
    for seed in (1, 2, 3):
        if seed == 3:
            message = "lambda-1-seed3 and lambda-1-seed1 differ in model.py of my.py"
            with pytest.raises(SystemExit, match=message):
                make_study(root, grid)
        environment = root / "logs" / f"lambda-1-seed{seed}" / "environment.json"
        edit_json(environment, lambda e: e[0]["sources"].update({"model.py": "33" * 32}))
    make_study(root, grid)
    more = [["model.py", "my.py"], ["bench.py", "x.py"]]
    edit_json(
        file,
        lambda g: (
            g["tables"][0]["arms"][1].update(files=more),
            [r.update(arm=r["arm"] + " bench.py:x.py") for r in g["runs"] if "my.py" in r["arm"]],
        ),
    )
    with pytest.raises(
        SystemExit, match="lambda-1-seed1 did not train with x.py in place of bench"
    ):
        make_study(root, grid)


def test_evaluated_grids(root):
    """A test file's metric is that of the evaluation; a run needs one, and not two."""
    grid = make_grid(root, seeds=(1, 2), evaluation={"startswith": 0.5})

    def evaluated(g):
        g["tables"][0]["metric"] = "startswith"
        g["command"].append("--evaluate=test.jsonl")

    edit_json(root / "ablations" / "lambda" / "result.json", evaluated)
    (root / "logs" / "lambda-2-seed2" / "evaluation-135f85e4.json").unlink()
    table = grids_of(make_study(root, grid))[0]["tables"][0]
    assert [(row["n"], row["mean"]) for row in table["arms"]] == [(2, 0.5), (2, 0.5), (1, 0.5)]
    (root / "logs" / "lambda-0-seed1" / "evaluation-00000000.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: lambda-0-seed1 has several evaluations"):
        make_study(root, grid)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("../logs/x/log.txt", tarfile.REGTYPE),
        ("/etc/log.txt", tarfile.REGTYPE),
        ("../log.txt", tarfile.REGTYPE),
        ("run/../log.txt", tarfile.REGTYPE),
        ("run/model.py", tarfile.REGTYPE),
        ("..run/log.txt", tarfile.REGTYPE),
        ("run/log.txt", tarfile.SYMTYPE),
        ("run/log.txt", tarfile.LNKTYPE),
        ("run/metrics.jsonl", tarfile.REGTYPE),
        ("run/log.txt\n", tarfile.REGTYPE),
    ],
)
def test_hostile_archives_are_refused(root, capsys, name, kind):
    """Names that lead elsewhere, links, other files, a file twice: nothing is written."""
    folder = root / "records" / "studies" / "S"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"grids": []}')
    with tarfile.open(folder / "logs.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("run/metrics.jsonl"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    before = sorted(root.rglob("*"))
    message = "logs.tar.xz: member .* is (not a file of a run|there twice)"
    with pytest.raises(SystemExit, match=f"error: {message}"):
        leaderboard.main(["restore", str(folder)])
    assert sorted(root.rglob("*")) == before and re.search(message, check(capsys)[1][0])


def test_archives_are_the_same_bytes_for_the_same_files_and_store_the_source_once(root):
    runs = [leaderboard.read_run(root / make_run(root, f"r{n}", n)) for n in range(3)]
    for run in runs:
        run.files["log.txt"] = np.random.default_rng(0).bytes(100_000)
    sizes = []
    for name, some in (("one", runs[:1]), ("three", runs), ("again", runs[::-1])):
        leaderboard.write_archive(root / f"{name}.tar.xz", some)
        sizes.append((root / f"{name}.tar.xz").stat().st_size)
    assert (root / "three.tar.xz").read_bytes() == (root / "again.tar.xz").read_bytes()
    assert sizes[0] > 100_000 and sizes[1] < sizes[0] + 5_000
    stored = leaderboard.read_archive(root / "three.tar.xz")
    assert {name: run.files for name, run in stored.items()} == {r.name: r.files for r in runs}


# -------------------------------------------------------------------------------------------- real


def test_the_files_of_a_real_run(data_path, run_id):
    """What train_gpt.py writes is read as it is meant, and contradictions in it are found."""
    assert run_cli(data_path, f"--run_id={run_id}").returncode == 0
    run = leaderboard.read_run(ROOT / "logs" / run_id)
    assert run.sources["train_gpt.py"] == sha256_file(ROOT / "train_gpt.py")
    facts = run.facts
    assert facts["devices"] >= facts["processes"] == 1 and facts["commit"] and facts["versions"]
    size = (run.folder / "model.int8.zlib").stat().st_size
    assert size < facts["artifact_bytes"] < size + 1_000_000
    for old, new in ((b'"val_loss": ', b'"val_loss": 1'), (b'"steps": 8', b'"steps": 9')):
        changed = run.files["result.json"].replace(old, new)
        assert changed != run.files["result.json"]
        assert leaderboard.faults(leaderboard.Run(run_id, {**run.files, "result.json": changed}))


def test_what_is_committed(tmp_path, monkeypatch, capsys):
    """Every number of the studies comes out of their runs; in a copy, as check writes tables."""
    shutil.copytree(ROOT / "records", tmp_path / "records")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "studies.md", tmp_path / "docs" / "studies.md")
    monkeypatch.setattr(leaderboard, "ROOT", tmp_path)
    assert check(capsys) == (True, [])
