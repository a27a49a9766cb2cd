"""leaderboard.py on made-up runs in a folder of their own: its tests against slow references, what it refuses, what check finds; and what is committed."""
import io
import json
import math
import re
import shutil
import tarfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import ablate
import leaderboard
import train_gpt
from conftest import ROOT, make_config, run_cli
from data.nlregex import generate
from data.pairs import record_of
from test_ablate import GPT

BAR = "=" * 40
SOURCE = {"train_gpt.py": 'import x\nfrom jepa import y\nSOURCES = ("train_gpt.py", "jepa.py")  # both\n', "jepa.py": "# säh\n"}
SOURCE_BYTES = sum(len(text.encode()) for text in SOURCE.values())
SMI = "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |"
TRACK = {"cpu_5min": dict(data_path="data/stdlib"), "nlregex": dict(data_path="data/nlregex", train_flops=7.9e12, evaluation={"startswith": 0.9, "n": 1000}),
         "fineweb_3.28": dict(device="8 x cuda", data_path="/disk/data/fineweb10B", val_tokens=10_485_760, target_val_loss=3.28, val_loss=3.27),
         "golf_16mb": dict(device="8 x cuda", data_path="data/fineweb_bpe1024", train_seconds=600.01, eval_stride=16)}
RESULTS = dict(val_loss=2.5, val_bpb=1.9, quantized_val_loss=2.6, quantized_val_bpb=None, train_seconds=290.0, train_flops=1e13, time_to_target=None, steps=1000, compiled=True, data_sha256="ab" * 32)


def project(folder, monkeypatch):
    """The folder, as a project of its own for leaderboard.py, whose clock advances a day with each record."""
    (folder / "README.md").write_text("before\n<!-- studies -->\n\n<!-- /studies -->\nafter\n")
    (folder / "records").mkdir()
    monkeypatch.setattr(leaderboard, "ROOT", folder)
    days = iter(range(1, 28))
    monkeypatch.setattr(leaderboard, "time", SimpleNamespace(strftime=lambda *_: f"2026-01-{next(days):02}T10:00:00Z", gmtime=lambda: None))
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    return project(tmp_path, monkeypatch)


def artifact_of(size):
    """An artifact of so many bytes: stored without compression, no tensors and a header of spaces."""
    blocks = -(-(size - 6) // 65540)
    content = (size - 6 - 5 * blocks - 8).to_bytes(8, "little") + b"{}".ljust(size - 6 - 5 * blocks - 8)
    pieces = [content[i:i + 65535] for i in range(0, len(content), 65535)]
    stored = [bytes([n == len(pieces)]) + len(piece).to_bytes(2, "little") + (65535 - len(piece)).to_bytes(2, "little") + piece for n, piece in enumerate(pieces, 1)]
    return b"\x78\x01" + b"".join(stored) + zlib.adler32(content).to_bytes(4, "big")


def make_run(root, name, seed=1, device="1 x cpu", cpu="Some CPU @ 2.5GHz", source=SOURCE, weights=1000, evaluation=None, test_file="135f85e4", finished=True, smi=SMI + "\n", commit="1234abcd",
             torch="2.13.0", logged=(), **values):
    """logs/<name> as train_gpt.py leaves it; values: settings and results that are not the defaults; logged: (step, seconds) beside step 1. Returns the folder's path as text."""
    settings = {key: value for key, value in values.items() if key in train_gpt.Config.__dataclass_fields__ and key != "train_flops"}
    config = {**vars(make_config("data/stdlib", iterations=9999)), **settings, "seed": seed, "run_id": name}
    result = {**RESULTS, **{key: value for key, value in values.items() if key in RESULTS}, "seed": seed, "config": config}
    result["artifact_bytes"] = weights + sum(len(text.encode()) for text in source.values())
    if result["quantized_val_bpb"]:  # bytes a token are the same with and without quantisation
        result["val_bpb"] = result["val_loss"] * result["quantized_val_bpb"] / result["quantized_val_loss"]
    result["quantized_val_bpb"] = result["quantized_val_loss"] * result["val_bpb"] / result["val_loss"]
    result["time_to_target"] = result["train_seconds"] if result["val_loss"] <= config["target_val_loss"] else None
    folder = root / "logs" / name
    folder.mkdir(parents=True)
    environment = f"git commit: {commit}\npython 3.12.1, torch {torch}, numpy 2.0, Linux\nCPU: 2 threads, AVX512, Model name:   " + cpu + "\n" + (smi if "cuda" in device else "")
    said = " ".join(f"{key}:{result[key]:.4f}" for key in ("val_loss", "val_bpb", "quantized_val_bpb"))
    settings = "".join(f"config {key}: {value!r} (default)\n" for key, value in config.items())
    artifact = f"artifact: {weights:,} bytes of weights + {result['artifact_bytes'] - weights:,} of source = {result['artifact_bytes']:,} (within 16,000,000)\n"
    (folder / "log.txt").write_text("".join(f"{BAR} {file}\n{text}\n" for file, text in source.items()) + f"{BAR} environment\n{environment}{BAR} run\n{settings}1,000 parameters, torch.float32 on "
                                    f"{device}, 256 tokens a step\n{BAR} a sample\nconfig data_path: 'x' (y)\n" + artifact + finished * f"result: {said} artifact_bytes:{result['artifact_bytes']} "
                                    f"steps:{result['steps']} train_time:{1000 * result['train_seconds']:.0f}ms -> logs/{name}/result.json\n")
    step = {key: result[key] / result["steps"] for key in ("train_seconds", "train_flops")}
    rows = [{"step": n, "train_loss": 3.0, "step_flops": step["train_flops"], "train_flops": n * step["train_flops"], "train_time": seconds} for n, seconds in ((1, step["train_seconds"]), *logged)]
    rows.append({"step": result["steps"], "val_loss": result["val_loss"], "val_bpb": result["val_bpb"], "train_time": result["train_seconds"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "model.int8.zlib").write_bytes(artifact_of(weights))
    if evaluation:
        (folder / f"evaluation-{test_file}.json").write_text(json.dumps(evaluation))
    return str(folder)


def add(root, name, metrics, track="cpu_5min", metric="val_bpb", **values):
    """A record of runs with these values of a metric, seeds 1, 2, ...; its result.json."""
    runs = [make_run(root, f"{name}-{seed}", seed, **{**TRACK[track], **values, **({metric: x} if metric != "startswith" else {"evaluation": {"startswith": x, "n": 1000}})}) for seed, x in enumerate(metrics, 1)]
    leaderboard.main(["add", *runs, "--track", track, "--name", name, "--text", f"what {name} changed"])
    return json.loads(next((root / "records" / track).glob(f"*_{name}/result.json")).read_text())


def check(capsys):
    """(whether check found no fault, the lines it printed)."""
    capsys.readouterr()
    try:
        leaderboard.main(["check"])
    except SystemExit as e:
        assert e.code == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not lines or lines[-1] == f"{len(lines) - 1} fault(s)"
    return not lines, lines[:-1]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_archive(path, change):
    """Rewrite an archive with change(name, bytes) for its members' bytes; None drops the member."""
    with tarfile.open(path, "r:xz") as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w:xz") as archive:
        for name, blob in files:
            if (blob := change(name, blob)) is not None:
                member = tarfile.TarInfo(name)
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))


def edit_run(folder, name, change):
    """Rewrite result.json of a stored run."""
    def edit(file, blob):
        content = json.loads(blob) if file == f"{name}/result.json" else None
        return blob if content is None else json.dumps(change(content) or content).encode()
    edit_archive(folder / "logs.tar.xz", edit)


def edit_log(folder, name, *pairs):
    """Replace bytes in all files of a stored run."""
    def edit(file, blob):
        for old, new in pairs if file.startswith(f"{name}/") else ():
            blob = blob.replace(old, new)
        return blob
    edit_archive(folder / "logs.tar.xz", edit)


# ---- statistics


def test_p_values_are_the_textbook_s():
    new, old = [1.80, 1.83, 1.79, 1.81], [1.90, 1.88, 1.93]
    a, b = np.var(new, ddof=1) / 4, np.var(old, ddof=1) / 3
    for margin in (0.0, 0.05):
        t, freedom = (np.mean(old) - np.mean(new) - margin) / math.sqrt(a + b), (a + b) ** 2 / (a**2 / 3 + b**2 / 2)
        assert leaderboard.p_better(new, old, False, margin) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)
        assert leaderboard.p_better(new, old, True, -margin) == pytest.approx(1 - stats.t.sf(t, freedom), rel=1e-9)
    values = [3.271, 3.279, 3.275]
    assert leaderboard.p_below(values, 3.28) == pytest.approx(stats.t.cdf((np.mean(values) - 3.28) / (np.std(values, ddof=1) / math.sqrt(3)), 2), rel=1e-9) and leaderboard.p_below(values, 3.27) > 0.5
    assert leaderboard.p_better([1.0], old, False) is None and leaderboard.p_better([1.0, 1.0], [2.0, 2.0], False) is None and leaderboard.p_below([3.0, 3.0], 3.28) is None


# ---- records


def test_records_and_non_records(root, capsys):
    """The first of three runs, a better one, one that isn't, one of two runs, one on another corpus and one on another machine."""
    first = add(root, "first", [1.90, 1.91, 1.89])
    assert first["record"] and first["before"] is None and first["mean"] == pytest.approx(1.90) and first["sd"] == pytest.approx(0.01) and first["tests"] == {}
    assert [run["seed"] for run in first["runs"]] == [1, 2, 3] and first["hardware"] == "2 x Some CPU @ 2.5GHz (threads)" and first["commit"] == "1234abcd"
    assert all(run["artifact_bytes"] == 1000 + SOURCE_BYTES and run["weights_bytes"] == 1000 and len(run["weights_sha256"]) == 64 for run in first["runs"])
    better = add(root, "better", [1.80, 1.81, 1.79])
    (test, p), = better["tests"].items()
    assert better["record"] and test == "val_bpb better than 2026-01-01_first's" and p == pytest.approx(stats.ttest_ind([1.80, 1.81, 1.79], [1.90, 1.91, 1.89], equal_var=False).pvalue / 2)
    worse = add(root, "worse", [1.79, 1.81, 1.79])  # a lower mean, but no evidence
    assert not worse["record"] and worse["before"] == "2026-01-02_better" and 0.01 < worse["tests"]["val_bpb better than 2026-01-02_better's"] < 0.5
    pair = add(root, "pair", [1.60, 1.61])
    assert not pair["record"] and pair["before"] == "2026-01-02_better" and "non-record" in capsys.readouterr().out
    last = add(root, "last", [1.70, 1.71, 1.69])  # a non-record between is none to beat
    assert last["record"] and last["before"] == "2026-01-02_better"
    other = add(root, "other", [2.0, 2.1, 2.2], data_sha256="cd" * 32)
    assert other["record"] and other["before"] is None
    elsewhere = add(root, "elsewhere", [1.5, 1.6, 1.7], cpu="Another CPU")
    assert elsewhere["record"] and elsewhere["before"] is None
    table = (root / "records" / "README.md").read_text()
    rows = [line.split(" | ")[:7] for line in table.split("## cpu_5min")[1].split("## ")[0].splitlines() if line.startswith("| ") and "rank" not in line]
    assert [(r[0], r[1], r[3]) for r in rows] == [("| 1", "non-record", "pair"), ("| 2", "record", "last"), ("| 3", "non-record", "worse"), ("| 4", "record", "better"), ("| 5", "record", "first"),
                                                     ("| 1", "record", "other"), ("| 1", "record", "elsewhere")]
    assert rows[3][4] == "1.8 ± 0.01" and rows[3][6] == f"{p:.2g}" and rows[4][6] == rows[5][6] == "not compared"
    folder = root / "records" / "cpu_5min" / "2026-01-02_better"
    readme = (folder / "README.md").read_text()
    assert "<!-- text -->\nwhat better changed\n<!-- /text -->" in readme and "--config records/cpu_5min/2026-01-02_better/config.yaml" in readme and "1.81" in readme
    cfg, _, _ = train_gpt.load_config(train_gpt.Config, ["--config", str(folder / "config.yaml")], {})
    assert (cfg.iterations, cfg.run_id, cfg.seed) == (9999, "", train_gpt.Config.seed)
    assert check(capsys) == (True, [])


def test_what_other_tracks_must_show(root, capsys):
    """nlregex: higher is better, whatever the machine. fineweb: the mean loss significantly below. golf: 0.005 nats better."""
    add(root, "a", [0.80, 0.81, 0.79], "nlregex", "startswith")
    higher = add(root, "b", [0.90, 0.91, 0.89], "nlregex", "startswith", device="2 x cpu")
    assert higher["record"] and higher["before"] == "2026-01-01_a" and not add(root, "c", [0.70, 0.71, 0.69], "nlregex", "startswith")["record"]
    other = add(root, "z", [0.50, 0.51, 0.49], "nlregex", "startswith", data_sha256="cd" * 32)
    assert other["record"] and other["before"] is None
    table = (root / "records" / "README.md").read_text().split("## nlregex")[1].split("## ")[0]
    assert re.findall(r"^\| (\d) \| \S+ \| \S+ \| (\w) ", table, re.M) == [("1", "b"), ("2", "a"), ("3", "c"), ("1", "z")]
    assert add(root, "d", [3.270, 3.271, 3.272], "fineweb_3.28", "val_loss")["tests"] == {"mean val_loss below 3.28": leaderboard.p_below([3.270, 3.271, 3.272], 3.28)}
    loose = add(root, "e", [3.27, 3.2799, 3.2795], "fineweb_3.28", "val_loss")
    assert not loose["record"] and loose["before"] == "2026-01-05_d" and loose["tests"]["mean val_loss below 3.28"] > 0.01 and loose["tests"]["time_to_target better than 2026-01-05_d's"] is None
    golf = lambda name, start, bpb: [make_run(root, f"{name}{i}", i, **TRACK["golf_16mb"], quantized_val_loss=start + i / 10_000, quantized_val_bpb=bpb + i / 10_000) for i in range(3)]
    for name, loss, bpb, record in (("f", 2.0, 1.2, True), ("g", 1.996, 1.19, False), ("h", 1.994, 1.19, True)):
        leaderboard.main(["add", *golf(name, loss, bpb), "--track", "golf_16mb", "--name", name, "--text", "x"])
        result = json.loads(next((root / "records" / "golf_16mb").glob(f"*_{name}/result.json")).read_text())
        assert result["record"] is record, name
        assert (record or result["tests"]["quantized_val_bpb better than 2026-01-07_f's"] < 0.01) and result["hardware"] == "8 x NVIDIA H100 80GB HBM3"
    assert check(capsys) == (True, [])


@pytest.mark.parametrize("track, change, message", [
    ("cpu_5min", dict(train_seconds=300.5), "train_seconds is 300.5; cpu_5min wants it at most 300, but for the last step"), ("cpu_5min", dict(data_path="data/x"), "data is 'data/x'"),
    ("cpu_5min", dict(train_seconds=300.4, logged=[(990, 299.5)]), "train_seconds is 300.4"),  # its last steps take 0.09 s
    ("cpu_5min", dict(device="2 x cpu"), "hardware is '4 x Some CPU .* wants it two CPU threads"), ("cpu_5min", dict(device="1 x cuda"), "hardware is '1 x NVIDIA H100"),
    ("cpu_5min", dict(data_sha256=None), "data_sha256 is None; .* meta.json"), ("cpu_5min", dict(val_tokens=1000), "val_tokens is 1000; .* wants it 0"), ("cpu_5min", dict(init_from="logs/x"), "init_from is 'logs/x'"),
    ("cpu_5min", dict(eval_stride=16), "eval_stride is 16; .* wants it 0"), ("fineweb_3.28", dict(eval_stride=16), "eval_stride is 16"), ("fineweb_3.28", dict(data_sha256=None), "data_sha256 is None"),
    ("golf_16mb", dict(data_sha256=None), "data_sha256 is None"), ("nlregex", dict(evaluation={"startswith": 0.9, "n": 999}), "n is 999; nlregex wants it 1000"),
    ("nlregex", dict(test_file="12345678"), "evaluation is 'evaluation-12345678.json'; nlregex wants it evaluation-135f85e4.json, by ablate.py --evaluate data/nlregex/test.jsonl"),
    ("nlregex", dict(train_flops=8.1e12), r"train_flops is 8.*; nlregex wants it at most 8e\+12"), ("nlregex", dict(evaluation=None), "evaluation is None; .* by ablate.py --evaluate"),
    ("fineweb_3.28", dict(val_loss=3.29), "time_to_target is None"), ("fineweb_3.28", dict(target_val_loss=3.3), "target_val_loss is 3.3"), ("fineweb_3.28", dict(val_tokens=0), "val_tokens is 0; .* 10485760"),
    ("golf_16mb", dict(weights=16_000_000), "artifact_bytes is 160.*; golf_16mb wants it at most 16,000,000"), ("golf_16mb", dict(train_seconds=601.6), "train_seconds is 601.6"),
    ("golf_16mb", dict(device="16 x cuda"), "hardware is '16 x NVIDIA"), ("golf_16mb", dict(smi=""), "hardware is '8 x unknown cuda'; .* shown by nvidia-smi"),
    ("cpu_5min", dict(finished=False), "log.txt doesn't end with a result"), ("cpu_5min", dict(source={"jepa.py": "x"}), "doesn't hold its source: no train_gpt.py")])
def test_conditions_of_a_track(root, track, change, message):
    """Each is one line that names the run; the same run without the change is taken."""
    run = make_run(root, "bad", **{**TRACK[track], **change})
    with pytest.raises(SystemExit, match=f"^error: bad.*{message}") as e:
        leaderboard.main(["add", run, "--track", track, "--name", "n", "--text", "x"])
    assert "\n" not in str(e.value) and not list((root / "records").glob("*/*"))
    leaderboard.main(["add", make_run(root, "good", **TRACK[track]), "--track", track, "--name", "n", "--text", "x"])


def test_the_last_step_may_go_over_a_cap(root):
    """By a step and a half of the last ones' size; in seconds on a GPU, where one more is queued, by two and a half."""
    for track, seconds in (("cpu_5min", 300.44), ("cpu_5min", 300.46), ("golf_16mb", 601.4), ("golf_16mb", 601.6)):
        run = leaderboard.read_run(root / make_run(root, f"{track}-{seconds}", **{**TRACK[track], "train_seconds": seconds}))
        key, _, test = next(rule for rule in leaderboard.TRACKS[track].rules if rule[0] == "train_seconds")
        assert test(run.facts()[key], run.facts()) is (seconds in (300.44, 601.4))


def test_the_test_file_of_nlregex():
    """What the track wants is the name that ablate.py gives to an evaluation on the file that data/nlregex.py writes."""
    lines = [json.dumps(record_of("pairs", None, [texts[0], regex])) + "\n" for texts, regex in generate(9000, 1, 1)[8000:]]
    assert f"evaluation-{ablate.digest(''.join(lines).encode(), None)}.json" == leaderboard.TEST and len(lines) == 1000


@pytest.mark.parametrize("change, message", [
    (dict(seed=1), "two runs have one seed"), (dict(num_layers=1), "odd and one differ in num_layers"), (dict(compiled=False), "differ in compiled"), (dict(data_sha256="cd"), "differ in data_sha256"),
    (dict(source={**SOURCE, "jepa.py": "# sáh\n"}), "differ in source"), (dict(torch="2.12.0"), "differ in versions"), (dict(commit="1234abcd with uncommitted changes"), "differ in commit")])
def test_runs_of_a_record_differ_in_their_seed_alone(root, change, message):
    runs = [make_run(root, "one", 1, **TRACK["cpu_5min"]), make_run(root, "odd", **{"seed": 2, **TRACK["cpu_5min"], **change})]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        leaderboard.main(["add", *runs, "--track", "cpu_5min", "--name", "n", "--text", "x"])


def test_misuse_of_add_is_one_line(root):
    run = make_run(root, "one", **TRACK["cpu_5min"])
    argv = ["add", run, "--track", "cpu_5min", "--text", "x", "--name"]
    leaderboard.main([*argv, "n"])
    blob = bytearray((root / "logs" / "one" / "model.int8.zlib").read_bytes())
    blob[500] ^= 1
    (root / "logs" / "one" / "model.int8.zlib").write_bytes(blob)
    with pytest.raises(SystemExit, match="^error: one: model.int8.zlib: a damaged artifact .*; copy it again") as e:
        leaderboard.main([*argv, "m"])
    assert "\n" not in str(e.value) and len(list((root / "records" / "cpu_5min").iterdir())) == 1
    (root / "logs" / "one" / "model.int8.zlib").write_bytes(b"")
    with pytest.raises(SystemExit, match="^error: one: artifact_bytes is .*, but 0 of weights"):
        leaderboard.main([*argv, "n"])
    for text, message in (("{}", "one: malformed, KeyError: '"), ("[]", "one: malformed, TypeError"), ("{", "one: malformed, JSONDecodeError")):
        (root / "logs" / "one" / "result.json").write_text(text)
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            leaderboard.main([*argv, "n"])
    shutil.rmtree(root / "logs" / "one")
    for folder, name, message in ((run, "n", "no such folder"), (make_run(root, "two", **TRACK["cpu_5min"]), "../n", "a name holds letters")):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            leaderboard.main(["add", folder, *argv[2:], name])


REPLACED = (rb'"val_bpb": 1.81', rb'"val_bpb": 1.71')
FAULTS = {  # a record's file and what becomes of it -> what check says of it
    "mean": (lambda f: edit_json(f / "result.json", lambda r: r.update(mean=1.7)), r"result.json: mean is 1.7, its logs give 1.8"),
    "a run's number": (lambda f: edit_json(f / "result.json", lambda r: r["runs"][1].update(val_bpb=1.7)), r"result.json: runs\[1\] val_bpb is 1.7, its logs give 1.81"),
    "p": (lambda f: edit_json(f / "result.json", lambda r: r["tests"].update({"val_bpb better than 2026-01-01_first's": 1e-9})), r"better than 2026-01-01_first's is 1e-09, its logs give 0.000"),
    "verdict": (lambda f: edit_json(f / "result.json", lambda r: r.update(record=False)), "result.json: record is False, its logs give True"),
    "weights": (lambda f: edit_json(f / "result.json", lambda r: r["runs"][0].update(weights_bytes=999)), "better-1: artifact_bytes is .*, but 999 of weights"),
    "a run left out": (lambda f: edit_json(f / "result.json", lambda r: r["runs"].pop()), r"hold different runs \(better-3\)"),
    "a key": (lambda f: edit_json(f / "result.json", lambda r: r.pop("runs")), "malformed, KeyError: 'runs'"),
    "config": (lambda f: (f / "config.yaml").write_text("num_layers: 9\n"), "config.yaml is not that of its runs"),
    "run in the archive": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b.replace(*REPLACED) if n == "better-2/result.json" else b), "logs.tar.xz: better-2: result.json has val_bpb 1.7100, its log 1.8100"),
    "run and log": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b.replace(b"val_bpb:1.8100", b"val_bpb:1.7100").replace(*REPLACED) if n in ("better-2/result.json", "better-2/log.txt") else b),
                    "better-2: result.json has val_bpb 1.71, its metrics.jsonl 1.81"),
    "run, log and metrics": (lambda f: edit_log(f, "better-2", (b":1.8100", b":1.7100"), (b'"val_bpb": 1.81', b'"val_bpb": 1.71'), (b"1.8824", b"1.7784")),
                             r"result.json: runs\[1\] val_bpb is 1.81, its logs give 1.71"),
    "quantised": (lambda f: edit_run(f, "better-2", lambda r: r.update(quantized_val_loss=2.5)), "better-2: result.json has quantized_val_bpb 1.88.*, its quantized_val_loss, at val_loss and val_bpb, 1.81"),
    "time to target": (lambda f: edit_run(f, "better-1", lambda r: r.update(time_to_target=200.0)), "better-1: result.json has time_to_target 200.0, its val_loss and train_seconds None"),
    "seed": (lambda f: edit_run(f, "better-1", lambda r: r.update(seed=4)), "better-1: result.json has seed 4, its config 1"),
    "a setting": (lambda f: edit_run(f, "better-1", lambda r: r["config"].update(matrix_lr=0.05)), r"better-1: result.json has matrix_lr 0.05, its log 0.04 \(default\)"),
    "a setting left out": (lambda f: edit_run(f, "better-1", lambda r: r["config"].pop("matrix_lr") and None), r"better-1: result.json has matrix_lr None, its log 0.04 \(default\)"),
    "FLOPs": (lambda f: edit_run(f, "better-1", lambda r: r.update(train_flops=9e9)), "better-1: result.json has train_flops 9000000000.0 at step 1000, its metrics.jsonl 10000000000.0 at step 1"),
    "too few FLOPs": (lambda f: edit_run(f, "better-1", lambda r: r.update(train_flops=2e12)), "better-1: result.json has train_flops 20"),
    "too many FLOPs": (lambda f: edit_run(f, "better-1", lambda r: r.update(train_flops=5e13)), "better-1: result.json has train_flops 50"),
    "no step logged": (lambda f: edit_log(f, "better-1", (b'"train_flops": 10000000000.0', b'"x": 0')), "better-1: malformed, IndexError"),
    "artifact": (lambda f: edit_log(f, "better-1", (b"s:%d" % (1000 + SOURCE_BYTES), b"s:99"), (b'"artifact_bytes": %d' % (1000 + SOURCE_BYTES), b'"artifact_bytes": 99')),
                 "better-1: result.json has artifact .* = 99, its log 1,000 bytes"),
    "weights and source": (lambda f: edit_log(f, "better-1", (b": 1,000 bytes", b": 1,001 bytes")), "better-1: result.json has artifact .*, its log 1,001 bytes"),
    "source that changed": (lambda f: edit_log(f, "better-1", (b"\nartifact: ", b"\nwarning: jepa.py is not what it was before step 9: from here on this is another run\nartifact: ")),
                            "better-1: its source changed on the way: warning: jepa.py"),
    "a result of one letter": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b[:b.index(b"result: ")] + b"result: x" if n == "better-1/log.txt" else b), "better-1: result.json has steps 1000, its log None"),
    "log without an imported file": (lambda f: edit_log(f, "better-1", (b"from jepa import", b"from data import")), "better-1/log.txt doesn't hold its source: no data/y.py"),
    "no result": (lambda f: (f / "result.json").unlink(), "better: no result.json"),
    "log without source": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b.replace("# säh\n".encode(), b"") if n == "better-3/log.txt" else b), "better-3/log.txt doesn't hold its source: no jepa.py"),
    "log without versions": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b.replace(b"git commit", b"commit")), "better-1/log.txt doesn't hold commit, versions"),
    "log cut off": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b[:b.index(b"result: ")] if n == "better-1/log.txt" else b), "better-1/log.txt doesn't end with a result: the run did not finish"),
    "no log": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: None if n == "better-1/log.txt" else b), "better-1 has no log.txt"),
    "archive": (lambda f: (f / "logs.tar.xz").write_bytes((f / "logs.tar.xz").read_bytes()[:-200]), "logs.tar.xz: "),
    "folder": (lambda f: f.rename(f.with_name("2026-01-09_better")), "must be TRACK/DATE_NAME"),
    "its README": (lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("1.81", "1.71")), "better/README.md was not what the result.json files give; rewritten"),
    "the table": (lambda f: (f.parents[1] / "README.md").write_text((f.parents[1] / "README.md").read_text().replace("| 1.8 ±", "| 1.7 ±")), "records/README.md was not what the result.json files give; rewritten")}


@pytest.fixture(scope="module")
def two_records(tmp_path_factory):
    """Two records, as a folder to be copied."""
    made = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        project(made, patch)
        add(made, "first", [1.90, 1.91, 1.89])
        add(made, "better", [1.80, 1.81, 1.79])
    return made


def test_a_run_may_be_resumed_with_other_checkpoints_but_not_on_another_machine(root):
    make_run(root, "a", checkpoint_every=5)
    folder = root / "logs" / "a"
    text = (folder / "log.txt").read_text()
    again = text[text.index(f"{BAR} environment"):text.index(f"{BAR} a sample")]
    first = again.replace("config checkpoint_every: 5", "config checkpoint_every: 0")
    for change in (("", ""), ("torch 2.13.0", "torch 2.12.0"), ("CPU: 2 threads", "CPU: 4 threads"), ("Some CPU", "Another CPU"), ("1 x cpu", "2 x cpu")):
        (folder / "log.txt").write_text(text.replace(again, first + again.replace(*change)))
        if change[0]:
            with pytest.raises(ValueError, match="a: its machine, versions or number of processes changed on the way"):
                leaderboard.read_run(folder)
        else:
            assert leaderboard.read_run(folder).facts()["checkpoint_every"] == 5
    (folder / "log.txt").write_text(text.replace(again, again + first))
    with pytest.raises(ValueError, match="a: result.json has checkpoint_every 5, its log 0"):
        leaderboard.read_run(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(two_records, root, capsys, fault):
    """Each kind of edit is a fault of the record that names file and place; nothing else is, and tables that alone are wrong are right again."""
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    assert check(capsys) == (True, [])
    edit, message = FAULTS[fault]
    edit(root / "records" / "cpu_5min" / "2026-01-02_better")
    fine, lines = check(capsys)
    assert not fine and re.search(message, "\n".join(lines)) and all("better" in line or fault == "the table" for line in lines), lines
    assert check(capsys)[0] is (fault in ("its README", "the table"))


def test_p_values_may_differ_by_what_versions_of_scipy_do(two_records, root, capsys):
    """By 1e-6 of their size; other numbers by 1e-9."""
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    file, test = root / "records" / "cpu_5min" / "2026-01-02_better" / "result.json", "val_bpb better than 2026-01-01_first's"
    edit_json(file, lambda r: r["tests"].update({test: r["tests"][test] * (1 + 1e-7)}))
    assert check(capsys) == (True, [])
    edit_json(file, lambda r: r.update(mean=r["mean"] * (1 + 1e-7)))
    assert not check(capsys)[0]


def test_check_finds_a_record_that_lost_its_base(two_records, root, capsys):
    shutil.copytree(two_records, root, dirs_exist_ok=True)
    shutil.rmtree(root / "records" / "cpu_5min" / "2026-01-01_first")
    assert any("before is '2026-01-01_first', its logs give None" in line for line in check(capsys)[1])


def test_submission(root, capsys):
    """The keys of parameter-golf's records, values of the quantised model; check holds it against the logs."""
    runs = [make_run(root, f"golf{n}", n, **TRACK["golf_16mb"], quantized_val_bpb=bpb, weights=1000 + n) for n, bpb in ((1, 1.20), (2, 1.22), (3, 1.24))]
    leaderboard.main(["add", *runs, "--track", "golf_16mb", "--name", "golfer", "--text", "what golfer changed"])
    folder = root / "records" / "golf_16mb" / "2026-01-01_golfer"
    leaderboard.main(["submission", str(folder), "--author", "A Name", "--github_id", "aname"])
    sent = json.loads((folder / "submission.json").read_text())
    assert {key: sent[key] for key in ("author", "github_id", "name", "blurb", "date", "bytes_total", "bytes_code")} == {
        "author": "A Name", "github_id": "aname", "name": "golfer", "blurb": "what golfer changed", "date": "2026-01-01T10:00:00Z", "bytes_total": 1003 + SOURCE_BYTES, "bytes_code": SOURCE_BYTES}
    assert sent["val_bpb"] == pytest.approx(1.22) and sent["val_loss"] == 2.6 and sent["seed_results"]["2"] == {
        "val_loss": 2.6, "val_bpb": 1.22, "artifact_bytes": 1002 + SOURCE_BYTES, "steps": 1000, "step_avg_ms": pytest.approx(600.01)}
    assert check(capsys)[0]
    edit_json(folder / "submission.json", lambda s: s.update(val_bpb=1.1))
    assert "submission.json: val_bpb is 1.1, its logs give 1.22" in check(capsys)[1][0]
    add(root, "other", [1.9])
    with pytest.raises(SystemExit, match="error: .*only a record of golf_16mb"):
        leaderboard.main(["submission", str(root / "records" / "cpu_5min" / "2026-01-02_other"), "--author", "a", "--github_id", "b"])


# ---- studies


def make_grid(root, name, seeds, finished, lambdas="0.1,0.2", **values):
    """ablations/<name> of arms of jepa_lambda and their twin, with the runs that are finished: {(arm's number, seed): val_bpb}; its path as text."""
    arms = ablate.parse_arms([f"jepa_lambda={lambdas}"], GPT)
    runs = [leaderboard.Stored(f"{name}-{n}-seed{seed}", {}, arm, seed) for seed in seeds for n, arm in enumerate(arms)]
    for run in runs:
        if (value := finished.get((arms.index(run.arm), run.seed))) and not (root / "logs" / run.name).exists():
            make_run(root, run.name, run.seed, jepa_lambda=float(run.arm.settings[0][1]), val_bpb=value, **values)
    rows, line = ablate.summarise(arms, [], GPT, "val_bpb")  # of an old state: a study's numbers come out of the runs
    (root / "ablations" / name).mkdir(parents=True, exist_ok=True)
    (root / "ablations" / name / "result.json").write_text(json.dumps({
        "command": ["--arms", f"jepa_lambda={lambdas}", "--config", f"{root}/configs/x.yaml"], "script": GPT, "baseline": None, "tables": [{"metric": "val_bpb", "summary": line, "arms": rows}],
        "runs": [{"arm": run.arm.label, "seed": run.seed, "run": run.name, "finished": False} for run in runs]}))
    return str(root / "ablations" / name)


VALUES = {(0, 1): 1.90, (1, 1): 1.88, (2, 1): 1.93, (0, 2): 1.91, (1, 2): 1.88, (2, 2): 1.92, (0, 3): 1.89, (1, 3): 1.885, (2, 3): 1.95}


def make_study(root, name="lambda", **values):
    grid = make_grid(root, name, (1, 2, 3), VALUES, **values)
    leaderboard.main(["study", grid, "--name", "S", "--question", "Does it help?"])
    (root / "records" / "studies" / "S" / "run.sh").write_text("python ablate.py ...\n")
    return root / "records" / "studies" / "S"


def test_a_study_of_a_grid(root, capsys):
    folder = make_study(root)
    assert "9 of 9 runs; write its run.sh" in capsys.readouterr().out
    (grid,) = json.loads((folder / "result.json").read_text())["grids"]
    test = stats.ttest_rel([1.88, 1.88, 1.885], [1.90, 1.91, 1.89])
    table = grid["tables"][0]
    found = table["arms"][1]
    assert found["arm"] == "jepa_lambda=0.1" and found["paired"]["p"] == pytest.approx(test.pvalue) and found["twin"] == "jepa_lambda=0" and all(run["finished"] for run in grid["runs"])
    assert grid["data"] == {"data/stdlib": "ab" * 32} and grid["command"][-1] == "configs/x.yaml"  # no path of this machine
    readme, top = (folder / "README.md").read_text(), (root / "README.md").read_text()
    assert "Does it help?" in readme and ablate.markdown(table["arms"], "val_bpb") in readme and table["summary"] in readme and "![lambda](lambda.png)" in readme
    assert (folder / "lambda.png").stat().st_size > 10_000
    holm = max(2 * found["paired"]["p"], 0) if found["paired"]["p"] < table["arms"][2]["paired"]["p"] else max(found["paired"]["p"], 2 * table["arms"][2]["paired"]["p"])
    low, high = (f"{x:+.5f}" for x in test.confidence_interval(0.95))
    assert f"| [S](records/studies/S/README.md) | lambda | jepa_lambda=0.1 | data/stdlib | 3 | val_bpb | -0.01833 | {low} .. {high} | {holm:.3g} | 1.00x |" in top
    assert top.startswith("before\n<!-- studies -->\n| study") and top.endswith("<!-- /studies -->\nafter\n") and top.count("[S]") == 2
    assert check(capsys) == (True, [])
    (folder / "README.md").write_text(readme.replace("Does it help?", "Does it, though?"))
    assert check(capsys)[0]  # words are free


def test_a_grid_that_chooses_a_setting_stays_in_its_study(root):
    """Two seeds claim nothing: its table is in the study's README, and not in the first one."""
    folder = make_study(root)
    choice = make_grid(root, "choice", (101, 102), {(arm, seed + 100): value for (arm, seed), value in VALUES.items() if seed < 3}, lambdas="0.3,0.4")
    leaderboard.main(["study", str(root / "ablations" / "lambda"), choice, "--name", "S"])
    assert "## choice" in (folder / "README.md").read_text() and "| choice |" not in (root / "README.md").read_text()
    assert (root / "README.md").read_text().count("| lambda |") == 2


def test_a_half_finished_study_continues_elsewhere(root, capsys):
    half = {key: value for key, value in VALUES.items() if key[1] == 1 or key == (0, 2)}
    grid = make_grid(root, "lambda", (1, 2), half)
    leaderboard.main(["study", grid, "--name", "S", "--question", "?"])
    folder = root / "records" / "studies" / "S"
    (folder / "run.sh").write_text("x\n")
    stored = json.loads((folder / "result.json").read_text())["grids"][0]
    assert "4 of 6 runs" in capsys.readouterr().out and [run["finished"] for run in stored["runs"]] == [True] * 4 + [False] * 2 and check(capsys)[0]
    before = {path.relative_to(root): path.read_bytes() for path in (root / "logs").rglob("*") if path.is_file() and path.name != "model.int8.zlib"}
    (root / "logs").rename(root / "old")
    with pytest.raises(SystemExit, match="error: no run of .* has finished"):
        leaderboard.main(["study", grid, "--name", "S"])
    leaderboard.main(["restore", str(folder)])
    assert before == {path.relative_to(root): path.read_bytes() for path in (root / "logs").rglob("*") if path.is_file()}
    shutil.rmtree(root / "logs" / "lambda-0-seed1")
    make_run(root, "lambda-0-seed1", finished=False)  # stopped here
    (root / "logs" / "lambda-1-seed1" / "result.json").unlink()
    leaderboard.main(["restore", str(folder)])
    assert "lambda-0-seed1 is left as it is" in capsys.readouterr().out and "result: " not in (root / "logs" / "lambda-0-seed1" / "log.txt").read_text()
    assert (root / "logs" / "lambda-1-seed1" / "result.json").read_bytes() == before[(root / "logs" / "lambda-1-seed1" / "result.json").relative_to(root)]
    shutil.rmtree(root / "logs" / "lambda-0-seed1")
    with pytest.raises(SystemExit, match=r"error: records/studies/S holds runs that this would lose \(lambda-0-seed1\)"):
        leaderboard.main(["study", grid, "--name", "S"])
    leaderboard.main(["restore", str(folder)])
    make_grid(root, "lambda", (1, 2, 3), VALUES)
    leaderboard.main(["study", grid, "--name", "S"])
    stored = json.loads((folder / "result.json").read_text())["grids"][0]
    assert [row["n"] for row in stored["tables"][0]["arms"]] == [3, 3, 3] and "<!-- text -->\n?\n" in (folder / "README.md").read_text() and check(capsys)[0]


def test_a_baseline_stands_for_the_twin(root, capsys):
    """Every arm is compared with the one that the grid's rows name, also where the script's rule of twins says another."""
    grid = make_grid(root, "lambda", (1, 2, 3), VALUES)
    def compare_to_last(g):
        g["baseline"] = "jepa_lambda=0.2"
        for row in g["tables"][0]["arms"]:
            row["twin"] = None if row["arm"] == g["baseline"] else g["baseline"]
    edit_json(root / "ablations" / "lambda" / "result.json", compare_to_last)
    leaderboard.main(["study", grid, "--name", "S", "--question", "?"])
    rows = json.loads((root / "records" / "studies" / "S" / "result.json").read_text())["grids"][0]["tables"][0]["arms"]
    assert [row.get("paired", {}).get("difference") for row in rows] == [pytest.approx(-0.1 / 3), pytest.approx(-0.155 / 3), None] and check(capsys)[1] == ["records/studies/S: no run.sh"]


def swap(grids):
    """The arms' labels of two runs of one seed, as one who would like the other sign would do."""
    one, other = (run for run in grids[0]["runs"] if run["seed"] == 1 and run["arm"] != "jepa_lambda=0.2")
    one["run"], other["run"] = other["run"], one["run"]


STUDY_FAULTS = {
    "a row": (lambda f: edit_json(f / "result.json", lambda s: s["grids"][0]["tables"][0]["arms"][1]["paired"].update(p=0.001)), r"grid lambda: tables\[0\] arms\[1\] paired p is 0.001, its logs give 0.12"),
    "summary": (lambda f: edit_json(f / "result.json", lambda s: s["grids"][0]["tables"][0].update(summary="good")), "summary is 'good'"),
    "data": (lambda f: edit_json(f / "result.json", lambda s: s["grids"][0]["data"].update({"data/stdlib": "00"})), "data data/stdlib is '00'"),
    "runs swapped": (lambda f: edit_json(f / "result.json", lambda s: swap(s["grids"])), "lambda-1-seed1 has jepa_lambda 0.1, which is not jepa_lambda=0, seed 1"),
    "a run left out": (lambda f: edit_json(f / "result.json", lambda s: s["grids"][0]["runs"].pop()), "lambda-2-seed3 is a run of none of its grids"),
    "a run gone": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: None if n.startswith("lambda-2-seed3/") else b), r"runs\[8\] finished is True, its logs give False"),
    "a run's number": (lambda f: edit_run(f, "lambda-2-seed1", lambda r: r.update(val_bpb=1.83)), "lambda-2-seed1: result.json has val_bpb 1.8300, its log 1.9300"),
    "another setting": (lambda f: edit_log(f, "lambda-1-seed2", (b'"matrix_lr": 0.04', b'"matrix_lr": 0.05'), (b"matrix_lr: 0.04", b"matrix_lr: 0.05")), "lambda-1-seed2 and lambda-0-seed1 differ in matrix_lr; a grid's"),
    "another source": (lambda f: edit_log(f, "lambda-1-seed2", ("# säh".encode(), "# söh".encode())), "lambda-1-seed2 and lambda-0-seed1 differ in jepa.py"),
    "another machine": (lambda f: edit_log(f, "lambda-2-seed3", (b"Some CPU", b"A faster CPU")), "lambda-2-seed3 and lambda-0-seed3 differ in hardware or versions of seed 3"),
    "another torch": (lambda f: edit_log(f, "lambda-2-seed3", (b"torch 2.13.0", b"torch 2.12.0")), "lambda-2-seed3 and lambda-0-seed3 differ in hardware or versions of seed 3"),
    "no result": (lambda f: (f / "result.json").unlink(), "studies/S: no result.json"),
    "a run that didn't end": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b[:b.index(b"result: ")] if n == "lambda-2-seed1/log.txt" else b), "lambda-2-seed1/log.txt doesn't end"),
    "a log without source": (lambda f: edit_archive(f / "logs.tar.xz", lambda n, b: b.replace(b"SOURCES", b"X") if n == "lambda-0-seed1/log.txt" else b), "lambda-0-seed1/log.txt doesn't hold its source"),
    "no command": (lambda f: (f / "run.sh").unlink(), "no run.sh"), "no picture": (lambda f: (f / "lambda.png").unlink(), "no lambda.png"),
    "marks": (lambda f: (f / "README.md").write_text("x"), "has lost its lines <!-- text -->"),
    "top table": (lambda f: (f.parents[2] / "README.md").write_text((f.parents[2] / "README.md").read_text().replace("-0.01", "-0.11")), "README.md was not what")}


@pytest.fixture(scope="module")
def one_study(tmp_path_factory):
    made = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        make_study(project(made, patch))
    return made


@pytest.mark.parametrize("fault", STUDY_FAULTS)
def test_check_finds_in_a_study(one_study, root, capsys, fault):
    shutil.copytree(one_study, root, dirs_exist_ok=True)
    assert check(capsys) == (True, [])
    edit, message = STUDY_FAULTS[fault]
    edit(root / "records" / "studies" / "S")
    fine, lines = check(capsys)
    assert not fine and re.search(message, "\n".join(lines)), lines
    assert check(capsys)[0] is (fault == "top table")


def test_runs_of_a_study_must_compare(root):
    """Runs that went on where Python, and so the corpus, is another one; a grid without logs that hold a source; a new study without a question."""
    half = {key: value for key, value in VALUES.items() if key[1] == 1}
    grid = make_grid(root, "lambda", (1,), half)
    argv = ["study", grid, "--name", "S", "--question", "?"]
    with pytest.raises(SystemExit, match="error: a new study needs its --question"):
        leaderboard.main(argv[:-2])
    make_grid(root, "lambda", (1, 2, 3), VALUES, data_sha256="cd" * 32)
    with pytest.raises(SystemExit, match="error: lambda-0-seed2 and lambda-0-seed1 differ in data_sha256 of data/stdlib"):
        leaderboard.main(argv)
    edit_json(root / "ablations" / "lambda" / "result.json", lambda g: g.update(script="finetune.py"))
    with pytest.raises(SystemExit, match="error: .* is a grid of finetune.py; a study needs logs that hold their source"):
        leaderboard.main(argv)
    edit_json(root / "ablations" / "lambda" / "result.json", lambda g: (g.update(script=GPT), g.pop("runs")))
    with pytest.raises(SystemExit, match="error: .*lambda: malformed, KeyError: 'runs'"):
        leaderboard.main(argv)
    assert not (root / "records" / "studies").exists()


def test_seeds_of_a_study_may_be_of_two_machines_and_flags_may_hold_the_seed(root):
    seeds = [{key: value for key, value in VALUES.items() if key[1] <= last} for last in (1, 3)]
    make_grid(root, "lambda", (1,), seeds[0], init_from="logs/x-1")
    grid = make_grid(root, "lambda", (1, 2), {key: value for key, value in seeds[1].items() if key[1] == 2}, cpu="Another CPU", init_from="logs/x-2")
    argv = ["study", grid, "--name", "S", "--question", "?"]
    with pytest.raises(SystemExit, match="error: lambda-0-seed2 and lambda-0-seed1 differ in init_from"):
        leaderboard.main(argv)
    edit_json(root / "ablations" / "lambda" / "result.json", lambda g: g["command"].append("--init_from=logs/x-{seed}"))
    leaderboard.main(argv)
    edit_json(root / "ablations" / "lambda" / "result.json", lambda g: g["command"].append("--init_from=logs/y-{seed}"))
    with pytest.raises(SystemExit, match="error: lambda-0-seed1 has init_from logs/x-1, which is not"):
        leaderboard.main(argv)


def test_files_of_an_arm(root):
    """Its own in all its logs, the same in each, and of the others only their own."""
    grid = make_grid(root, "lambda", (1, 2, 3), VALUES)
    file = root / "ablations" / "lambda" / "result.json"
    def replaced(g):
        g["tables"][0]["arms"][1].update(arm="jepa_lambda=0.1 jepa.py:my.py", files=[["jepa.py", "my.py"]])
        for run in g["runs"]:
            run["arm"] += " jepa.py:my.py" * (run["arm"] == "jepa_lambda=0.1")
    edit_json(file, replaced)
    argv = ["study", grid, "--name", "S", "--question", "?"]
    with pytest.raises(SystemExit, match="error: lambda-1-seed1/log.txt doesn't hold the jepa.py of my.py, but that of other arms"):
        leaderboard.main(argv)
    logs = [root / "logs" / f"lambda-1-seed{seed}" / "log.txt" for seed in (1, 2, 3)]
    for n, log in enumerate(logs):
        if n == 2:
            with pytest.raises(SystemExit, match="error: lambda-1-seed3 and lambda-1-seed1 differ in jepa.py of my.py"):
                leaderboard.main(argv)
        log.write_text(log.read_text().replace("# säh", "# söh"))
    leaderboard.main(argv)
    edit_json(file, lambda g: g["tables"][0]["arms"][1].update(files=[["jepa.py", "my.py"], ["scoring.py", "x.py"]]))
    with pytest.raises(SystemExit, match="error: lambda-1-seed1/log.txt doesn't hold the scoring.py of x.py, but none"):
        leaderboard.main(argv)


def test_evaluated_grids(root, capsys):
    """The metric of a test file comes out of its evaluation; a run without it isn't finished, one with two is refused."""
    grid = make_grid(root, "lambda", (1, 2), {key: value for key, value in VALUES.items() if key[1] < 3}, evaluation={"startswith": 0.5})
    edit_json(root / "ablations" / "lambda" / "result.json", lambda g: (g["tables"][0].update(metric="startswith"), g.update(command=[*g["command"], "--evaluate=test.jsonl"])))
    (root / "logs" / "lambda-2-seed2" / "evaluation-135f85e4.json").unlink()
    leaderboard.main(["study", grid, "--name", "S", "--question", "?"])
    (stored,) = json.loads((root / "records" / "studies" / "S" / "result.json").read_text())["grids"]
    assert [(row["n"], row["mean"]) for row in stored["tables"][0]["arms"]] == [(2, 0.5), (2, 0.5), (1, 0.5)]
    (root / "logs" / "lambda-0-seed1" / "evaluation-00000000.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: lambda-0-seed1 has several evaluations"):
        leaderboard.main(["study", grid, "--name", "S"])


@pytest.mark.parametrize("name, kind", [("../logs/x/log.txt", tarfile.REGTYPE), ("/etc/log.txt", tarfile.REGTYPE), ("../log.txt", tarfile.REGTYPE), ("run/../log.txt", tarfile.REGTYPE), ("run/model.py", tarfile.REGTYPE),
                                        ("..run/log.txt", tarfile.REGTYPE), ("run/log.txt", tarfile.SYMTYPE), ("run/log.txt", tarfile.LNKTYPE), ("run/metrics.jsonl", tarfile.REGTYPE), ("run/log.txt\n", tarfile.REGTYPE)])
def test_hostile_archives_are_refused(root, capsys, name, kind):
    """Names that lead elsewhere, links, other files, a file twice: nothing is written, and check says so."""
    folder = root / "records" / "studies" / "S"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"grids": []}')
    with tarfile.open(folder / "logs.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("run/metrics.jsonl"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit, match="error: logs.tar.xz: member .* is not one file RUN/log.txt"):
        leaderboard.main(["restore", str(folder)])
    assert sorted(root.rglob("*")) == before and "is not one file RUN/log.txt" in check(capsys)[1][0]


def test_archives_are_the_same_bytes_for_the_same_files_and_store_the_source_once(root):
    source = {**SOURCE, "jepa.py": "# " + np.random.default_rng(0).bytes(100_000).hex()}
    runs = [leaderboard.read_run(root / make_run(root, f"r{n}", n, source=source)) for n in range(3)]
    sizes = []
    for count, order in ((1, 1), (3, 1), (3, -1)):
        leaderboard.write_archive(root / f"{count}{order}.tar.xz", runs[:count][::order])
        sizes.append((root / f"{count}{order}.tar.xz").stat().st_size)
    assert (root / "31.tar.xz").read_bytes() == (root / "3-1.tar.xz").read_bytes() and sizes[1] < sizes[0] + 5_000 and sizes[0] > 100_000
    assert {name: run.files for name, run in leaderboard.read_archive(root / "31.tar.xz").items()} == {run.name: run.files for run in runs}


# ---- real ones


def test_the_files_of_a_real_run(data_path, run_id):
    """What train_gpt.py writes is read as it is meant: source, versions, hardware, numbers."""
    assert run_cli(data_path, f"--run_id={run_id}").returncode == 0
    run = leaderboard.read_run(ROOT / "logs" / run_id)
    facts = run.facts()
    assert run.log[0] == {name: (ROOT / name).read_text() for name in train_gpt.SOURCES} and facts["device"] == ("cuda" if "cuda" in "".join(run.log[2][:60]) else "cpu")
    assert facts["artifact_bytes"] == run.source_bytes + (run.folder / "model.int8.zlib").stat().st_size and facts["count"] >= facts["processes"] == 1 and facts["hardware"]
    for old, new in ((b'"val_loss": ', b'"val_loss": 1'), (b'"steps": 8', b'"steps": 9')):
        files = {**run.files, "result.json": run.files["result.json"].replace(old, new)}
        assert files != run.files and leaderboard.faults(leaderboard.Stored(run_id, files))


def test_what_is_committed(tmp_path, monkeypatch, capsys):
    """In a copy, as check rewrites tables."""
    for name in ("records", "README.md"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    monkeypatch.setattr(leaderboard, "ROOT", tmp_path)
    assert check(capsys) == (True, [])
