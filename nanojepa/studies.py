"""Studies: whole grids of ablate.py, with the runs that they were made of.

A study is a folder of records/studies/: README.md, run.sh (what made it), logs.tar.xz (its runs),
result.json (every number that follows from them), and a picture of each grid.
"""

import io
import json
import shlex
import tarfile

from nanojepa import plots, stats
from nanojepa.files import sha256_file
from nanojepa.stored import Run, differences, read_run

# the grid and the arm that docs/twin.png shows
TWINS = ("span_text", "jepa_lambda=0.02")


# ---- runs


def write_archive(path, runs):
    """Write the files of Runs as one tar.xz, the same bytes for the same files.

    Every log repeats the source; xz stores it once.
    """
    with tarfile.open(path, "w:xz") as archive:
        for run in sorted(runs, key=lambda run: run.name):
            for name, blob in sorted(run.files.items()):
                member = tarfile.TarInfo(f"{run.name}/{name}")  # time, owner and group are 0
                member.size = len(blob)
                archive.addfile(member, io.BytesIO(blob))


def read_archive(path):
    """{name: Run} of an archive. It is read in memory: nothing of it gets onto the disk."""
    files = {}
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            run, _, name = member.name.partition("/")
            files.setdefault(run, {})[name] = archive.extractfile(member).read()
    return {run: Run(run, own) for run, own in files.items()}


# ---- grids


def redo_grid(grid, runs):
    """A grid as result.json has it, with every number computed from {name: Run}.

    ValueError if the runs are not what the grid says.
    """
    arms = {}
    for row in grid["tables"][0]["arms"]:
        settings, files = (tuple(map(tuple, row[name])) for name in ("settings", "files"))
        arms[row["arm"]] = stats.Arm(settings, files, row["twin"])
    for arm in arms.values():
        if arm.twin is not None and arm.twin not in arms:
            raise ValueError(f"{arm.label} has no twin: {arm.twin} is not in the grid")
    planned = [(arms[one["arm"]], one["seed"], runs[one["run"]]) for one in grid["runs"]]
    check_alike(planned)
    trials = [stats.Trial(arm.label, seed, run.result) for arm, seed, run in planned]
    found = [
        stats.summarise(arms.values(), trials, table["metric"], compared_with(grid))
        for table in grid["tables"]
    ]
    data = {data_name(run): run.result["data_sha256"] for _, _, run in planned}
    redone = {**grid, "data": data, "tables": [one._asdict() for one in found]}
    return json.loads(json.dumps(redone))  # as it is read again: JSON has texts as keys


def check_alike(planned):
    """ValueError if runs differ in more than what their arms set, and the seed.

    planned: [(Arm, seed, Run)].
    """
    first = {}
    for arm, seed, run in planned:
        own = {**dict(arm.settings), "seed": str(seed)}
        for name, text in own.items():
            value = run.result["config"][name]
            if not means(text.replace("{seed}", str(seed)), value):
                raise ValueError(
                    f"{run.name} has {name} {value}, which is not {arm.label}, seed {seed}"
                )
        facts = {**run.settings, **run.starts[0]["sources"], "data_path": data_name(run)}
        facts |= {name: run.result[name] for name in ("data_sha256", "compiled")}
        for name in facts.keys() - own.keys() - dict(arm.files).keys():
            other, value = first.setdefault(name, (run.name, facts[name]))
            if value != facts[name]:
                raise ValueError(
                    f"{run.name} and {other} differ in {name}; a grid's runs differ in what their "
                    "arms set, and the seed, alone"
                )


def data_name(run):
    """The folder of a run's data, wherever the project lay."""
    return "/".join(run.result["config"]["data_path"].split("/")[-2:])


def means(text, value):
    """Whether a setting that is given as text has this value."""
    if isinstance(value, bool):
        return text.lower() in (("1", "true") if value else ("0", "false"))
    return float(text) == value if isinstance(value, (int, float)) else text == value


def compared_with(grid):
    return "baseline" if grid["baseline"] else "twin"


# ---- studies


def read_studies(place):
    """[(folder, its grids)] of all studies."""
    files = sorted(place.glob("*/result.json"))
    return [(file.parent, json.loads(file.read_bytes())["grids"]) for file in files]


def check_study(folder):
    """Yield the faults of a study."""
    result = json.loads((folder / "result.json").read_bytes())
    if sha256_file(folder / "logs.tar.xz") != result["logs_sha256"]:
        yield "logs.tar.xz is not the archive that result.json was computed from"
    runs = read_archive(folder / "logs.tar.xz")
    for run in runs.values():
        yield from (f"{run.name}: {fault}" for fault in run.contradictions())
    planned = {one["run"] for grid in result["grids"] for one in grid["runs"]}
    yield from (f"{name} is a run of none of its grids" for name in sorted(runs.keys() - planned))
    files = ["run.sh", *(f"{grid['grid']}.png" for grid in result["grids"])]
    yield from (f"no {name}" for name in files if not (folder / name).is_file())
    for grid in result["grids"]:
        yield from differences(grid, redo_grid(grid, runs), f"result.json, grid {grid['grid']}:")


def store(paths, folder, question, root):
    """Make a study in a folder of the grids that ablate.py left in ablations/."""
    runs, grids = {}, []
    for path in paths:
        text = (path / "result.json").read_text(encoding="utf-8").replace(f"{root}/", "")
        grid = json.loads(text) | {"grid": path.resolve().name}
        for one in grid["runs"]:
            place = root / "logs" / one["run"]
            runs[one["run"]] = read_run(place, root, more=("log.txt",))
        grids.append(redo_grid(grid, runs))
    folder.mkdir(parents=True)
    write_archive(folder / "logs.tar.xz", runs.values())
    result = {"logs_sha256": sha256_file(folder / "logs.tar.xz"), "grids": grids}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page = f"# {folder.name}\n\n{question}\n\n<!-- table -->\n<!-- /table -->\n"
    (folder / "README.md").write_text(page, encoding="utf-8")


def draw(folder, grids, docs):
    """Draw a picture of each grid, and docs/twin.png if the study is the one that it shows."""
    runs = read_archive(folder / "logs.tar.xz")
    for grid in grids:
        made = {(one["arm"], one["seed"]): runs[one["run"]] for one in grid["runs"]}
        logs = {key: run.rows for key, run in made.items()}
        objectives = {run.settings["jepa_objective"] for run in made.values()}
        name = objectives.pop() if len(objectives) == 1 else ""
        found, path = stats.Summary(**grid["tables"][0]), folder / f"{grid['grid']}.png"
        plots.draw_grid(path, found, logs, compared_with(grid), name)
        for row in found.arms:
            if (grid["grid"], row["arm"]) == TWINS:
                plots.draw_twin(docs / "twin.png", row, logs, found.metric, name)


# ---- pages


def study_lines(folder, grids):
    """The lines of a study's page that are generated: its grids."""
    lines = [f"All of it: `bash records/studies/{folder.name}/run.sh`"]
    for grid in grids:
        data = [f"{path} (sha256 {sha256 or 'unknown'})" for path, sha256 in grid["data"].items()]
        lines += ["", f"## {grid['grid']}", "", f"`python ablate.py {shlex.join(grid['command'])}`"]
        lines += ["", f"Data: {', '.join(data)}.", "", f"![{grid['grid']}]({grid['grid']}.png)"]
        for table in grid["tables"]:
            text = stats.markdown(stats.Summary(**table), compared_with(grid))
            lines += ["", *text.splitlines()]
    return lines


def overview_lines(studies):
    """The lines of the table in docs/studies.md: each arm that was tested, by its first metric.

    The arms of a grid with fewer than three seeds, which chooses a setting, are not tested.
    """
    rows = []
    for folder, grids in studies:
        for grid in grids:
            arms = {row["arm"]: row for row in grid["tables"][0]["arms"]}
            link = f"[{grid['grid']}](../records/studies/{folder.name}/README.md)"
            for row in arms.values():
                if row["twin"] and row["paired"]["holm"] is not None:
                    made = overview_row(row, arms[row["twin"]], grid["tables"][0]["metric"])
                    rows.append((link, *made))
    names = ("grid", "arm", "n", "metric", "difference", "95% interval", "p (Holm)", "FLOPs")
    return stats.markdown_table(names, rows)


def overview_row(row, twin, metric):
    """The cells of an arm in the table of all studies.

    Its cost is in FLOPs: seconds say more of a machine that runs several arms at a time.
    """
    paired = row["paired"]
    interval = f"{paired['low']:+.5f} .. {paired['high']:+.5f}"
    cost = f"{row['flops'] / twin['flops']:.2f}x" if row["flops"] and twin["flops"] else ""
    found = f"{paired['difference']:+.5f}", interval, stats.show(paired["holm"], ".3g")
    return row["arm"], paired["n"], metric, *found, cost
