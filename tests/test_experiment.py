"""What all experiments share: finished runs are kept and known again, errors are told at once, nothing outlives a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from filelock import FileLock
from rich.table import Table
from typer.testing import CliRunner

import metaopt as mo
from metaopt import cli
from metaopt.experiments import many_shot_report, noisy_labels_report, rotation, sinusoid
from metaopt.experiments.experiment import Experiment, Method, Run, finished_or_run
from metaopt.experiments.workers import run_all


@dataclass(frozen=True)
class Config:
    rate: float = 0.5
    folder: Path = Path()

    options = "none"


@dataclass(frozen=True, kw_only=True)
class CountedRun(Run):
    values: list[float]


METHODS = (Method("exact", "exact", mo.RMD()), Method("plain", "no estimator", settings={"rate": 0.25}))


def prepare(method, config, seed):
    return method.configured(config)


def run(method, config, seed):
    with (config.folder / "calls").open("a") as calls:
        calls.write(f"{method.key}-{seed}\n")
    rate = method.configured(config).rate
    return CountedRun(method=method.key, seed=seed, seconds=0.0, values=[rate * seed, float("nan")])


def table(methods, runs, config):
    return Table(title="toy")


def draw(methods, runs, config, out):
    return []


TOY = Experiment("toy", METHODS, CountedRun, prepare, run, table, draw)


def calls(config):
    return (config.folder / "calls").read_text().split()


def test_finished_runs_are_read_and_the_others_done(tmp_path):
    config = Config(folder=tmp_path)
    first = TOY.conduct(METHODS[:1], config, 1, tmp_path / "out", workers=1)
    assert calls(config) == ["exact-0"]
    runs = TOY.conduct(METHODS, config, 2, tmp_path / "out", workers=1)
    assert sorted(calls(config)) == ["exact-0", "exact-1", "plain-0", "plain-1"]
    assert repr(runs[0]) == repr(first[0])
    assert [(run.method, run.seed, run.values[0]) for run in runs] == [
        ("exact", 0, 0.0),
        ("exact", 1, 0.5),
        ("plain", 0, 0.0),
        ("plain", 1, 0.25),
    ]
    saved = json.loads((tmp_path / "out" / "runs.json").read_text())  # standard JSON: NaN is null
    assert saved["runs"][3]["values"] == [0.25, None]
    assert saved["config"]["rate"] == 0.5


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("rate", lambda method, config, seed: (method, replace(config, rate=0.7), seed)),
        ("method", lambda method, config, seed: (replace(method, estimator=mo.DrMAD()), config, seed)),
        ("seed", lambda method, config, seed: (method, config, seed + 1)),
    ],
)
def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, what, change):
    config = Config(folder=tmp_path)
    finished_or_run(TOY, tmp_path, METHODS[0], config, 0)
    method, config, seed = change(METHODS[0], config, 0)
    if seed:  # a file copied under another seed's name
        (tmp_path / "exact-0.json").rename(tmp_path / "exact-1.json")
    with pytest.raises(ValueError, match=f"other settings .*{what}: "):
        finished_or_run(TOY, tmp_path, method, config, seed)


@pytest.mark.parametrize("damage", [lambda text: text[:20], lambda text: "[]", lambda text: ""])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, damage):
    config = Config(folder=tmp_path)
    finished_or_run(TOY, tmp_path, METHODS[0], config, 0)
    file = tmp_path / "exact-0.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"exact-0.json is damaged .*remove it"):
        finished_or_run(TOY, tmp_path, METHODS[0], config, 0)


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process is at work"):
        TOY.conduct(METHODS, Config(folder=tmp_path), 1, tmp_path, workers=1)


@pytest.mark.parametrize(
    "experiment",
    [sinusoid.EXPERIMENT, rotation.EXPERIMENT, noisy_labels_report.EXPERIMENT, many_shot_report.EXPERIMENT],
    ids=lambda experiment: experiment.name,
)
def test_methods_have_keys_of_their_own_and_are_known_again_in_another_process(experiment):
    keys = [method.key for method in experiment.methods]
    assert len(keys) == len(set(keys))
    assert not [method.key for method in experiment.methods if " at 0x" in repr(method)]


def stumble(method, config, seed):
    (config / f"{method.key}-{seed}").touch()
    time.sleep(0.05)
    raise ValueError("stumbled")


def test_an_error_is_told_before_the_other_runs(tmp_path):
    with pytest.raises(ValueError, match="stumbled"):
        run_all(stumble, METHODS, tmp_path, seeds=20, workers=1)
    assert 1 <= len(list(tmp_path.iterdir())) < 40


ENDLESS = """
import sys, time
from pathlib import Path
from metaopt.experiments.experiment import Method
from metaopt.experiments.workers import run_all

def endless(method, config, seed):
    import os
    Path(config, f"{seed}.pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)

if __name__ == "__main__":
    run_all(endless, [Method("endless", "endless")], sys.argv[1], seeds=2, workers=2)
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, how):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    until(lambda: len([file for file in tmp_path.glob("*.pid") if file.read_text()]) == 2)
    workers = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does
    else:
        os.kill(parent.pid, how)
    assert parent.wait(30) != 0
    until(lambda: not any(map(alive, workers)), seconds=10)


def test_an_interrupted_comparison_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("metaopt.experiments.experiment.run_all", interrupt)
    monkeypatch.setattr(sys, "argv", ["/bin/metaopt", "compare", "sinusoid", "--out", "my folder"])
    result = CliRunner().invoke(cli.app, ["compare", "sinusoid", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "To go on: metaopt compare sinusoid --out 'my folder'" in result.output
