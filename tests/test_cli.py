"""The command line: what is wrong is told at once and in the user's words; what is asked for without a name is listed."""

import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from metaopt import cli
from metaopt.experiments import diagnose_sinusoid, many_shot, many_shot_settings, sinusoid
from metaopt.experiments.experiment import finished_or_run
from metaopt.experiments.image_data import Source
from metaopt.files import write_text


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def words(result):
    """The output without the box around an error."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds a file, and four and fourteen classes of pictures."""
    root = tmp_path_factory.mktemp("place")
    (root / "file").write_text("not a folder")
    (root / "empty").mkdir()
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    for classes, count in ((4, 30), (14, 30), (2, 1)):
        for c in range(classes):
            folder = root / f"classes{classes}" / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "damaged" / "a").mkdir(parents=True)
    (root / "damaged" / "a" / "0.png").write_text("not a picture")
    return root


# what is typed after "metaopt" ({place}: the folder above), and what the error names
BAD = [
    ("compare nonsense", "nonsense"),
    ("compare sinusoid --nonsense", "--nonsense"),
    ("compare sinusoid --out {place}/file", "--out"),
    ("compare sinusoid --out {place}/file/below", "--out"),
    ("compare sinusoid --out /proc/nowhere", "--out"),
    ("compare sinusoid --out {place}/" + 300 * "x", "--out"),
    ("compare sinusoid --clip-norm inf", "--clip-norm"),
    ("compare sinusoid --clip-norm -inf", "--clip-norm"),
    ("compare sinusoid --clip-norm nan", "--clip-norm"),
    ("compare sinusoid --clip-norm -1", "--clip-norm"),
    ("compare sinusoid --clip-norm one", "--clip-norm"),
    ("compare sinusoid --seeds 0", "--seeds"),
    ("compare sinusoid --seeds 1.5", "--seeds"),
    ("compare sinusoid --seeds nan", "--seeds"),
    ("compare sinusoid --seeds 100000000000", "--seeds"),
    ("compare sinusoid --meta-iterations 0", "--meta-iterations"),
    ("compare sinusoid --meta-iterations 50000", "--meta-iterations"),
    ("compare sinusoid --workers 0", "--workers"),
    ("compare sinusoid --workers", "--workers"),
    ("compare sinusoid --estimators nonsense", "--estimators"),
    ("compare sinusoid --estimators fo,,drmad", "--estimators"),
    ("compare sinusoid --estimators=", "--estimators"),
    ("compare sinusoid --estimators FO", "--estimators"),
    ("compare anil --data nonsense", "--data"),
    ("compare anil --data folder --root {place}/nowhere", "--root"),
    ("compare anil --data folder --root {place}/empty", "--root"),
    ("compare anil --data folder --root {place}/file", "--root"),
    ("compare anil --data folder --root {place}/damaged", "0.png"),
    ("compare anil --data cifar100 --root {place}", "--root"),
    ("compare warpgrad --data tinyimagenet --root {place}", "--root"),
    ("compare anil --size 7", "--size"),
    ("compare anil --size 100000", "--size"),
    ("compare anil --ways 1", "--ways"),
    ("compare anil --shots 0", "--shots"),
    ("compare anil --data folder --root {place}/classes4", "--ways"),
    ("compare anil --data folder --root {place}/classes14", "--shots"),
    ("compare anil --data folder --root {place}/classes2 --ways 2 --shots 1", "--shots"),
    ("compare meta-weight-net --meta-iterations 0", "--meta-iterations"),
    ("compare noisy-labels --root {place}/empty", "--root"),
    ("compare noisy-labels --rate nan", "--rate"),
    ("compare noisy-labels --rate 1.5", "--rate"),
    ("compare noisy-labels --rate -.1", "--rate"),
    ("compare noisy-labels --steps 0", "--steps"),
    ("compare noisy-labels --examples 0", "--examples"),
    ("compare noisy-labels --clean -1", "--clean"),
    ("compare rotation --degrees nan", "--degrees"),
    ("compare rotation --degrees inf", "--degrees"),
    ("compare rotation --degrees 1e9", "--degrees"),
    ("compare rotation --data glyphs", "--data"),
    ("compare rotation --size 8", "--size"),
    ("compare rotation --epochs 0", "--epochs"),
    ("compare rotation --train 0", "--train"),
    ("compare rotation --root {place}", "--root"),
    ("compare rotation --data folder --root {place}/classes4", "--train"),
    ("compare rotation --data folder --root {place}/classes4 --train 50 --validation 1 --test 20", "--validation"),
    ("diagnose nonsense", "nonsense"),
    ("diagnose sinusoid --gamma 2", "--gamma"),
    ("diagnose sinusoid --gamma -0.1", "--gamma"),
    ("diagnose sinusoid --gamma nan", "--gamma"),
    ("diagnose sinusoid --problems 0", "--problems"),
    ("diagnose sinusoid --every 0", "--every"),
    ("diagnose sinusoid --seed -1", "--seed"),
    ("diagnose sinusoid --seed nan", "--seed"),
    ("diagnose sinusoid --out {place}/file", "--out"),
    ("diagnose warpgrad --data nonsense", "--data"),
    ("diagnose warpgrad --finished {place}/nowhere.pt", "--finished"),
    ("diagnose warpgrad --finished {place}/file", "--finished"),
    ("diagnose warpgrad --data folder --root {place}/classes4 --shots 3", "--ways"),
    ("verify nonsense", "NAME"),
]


@pytest.mark.parametrize(("line", "named"), BAD, ids=[line.replace("{place}/", "")[:60] for line, _ in BAD])
def test_a_bad_command_line_names_the_option_and_ends_without_a_traceback(line, named, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the default folders would be
    monkeypatch.setattr("metaopt.experiments.experiment.run_all", lambda *_, **__: pytest.fail("work began"))
    result = invoke(*line.format(place=place).split())
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert named in "".join(line.strip("│ ") for line in result.output.splitlines())
    assert not list(tmp_path.rglob("*.json"))


def test_shots_and_ways_fit_a_small_folder(place, tmp_path):
    data = ["--data", "folder", "--root", place / "classes4", "--size", 8]
    result = invoke("compare", "anil", *data, "--ways", 2, "--shots", 4, "--out", tmp_path)
    assert result.exit_code == 2
    assert "6 are left after the split 50 : 20 : 30" in words(result)
    assert "at most --shots 3 is possible" in words(result)
    result = invoke("compare", "anil", *data, "--ways", 2, "--shots", 3, "--out", tmp_path, "--dry-run")
    assert all(f"  {setting}\n" in result.output for setting in ("ways = 2", "shots = 3", "batch_size = 6"))
    source = Source("folder", place / "classes4", 8)
    config = many_shot_settings.configure("anil", source, small=True, ways=2, shots=3)
    setting, _, _ = many_shot.prepare(many_shot_settings.METHODS[0], config, 0)
    assert setting.task(1).batches(1).x.shape == (4, 6, 3, 8, 8)


@pytest.mark.parametrize("group", ["compare", "diagnose"])
def test_without_a_name_the_experiments_are_listed_a_line_each(group):
    result = invoke(group)
    assert result.exit_code == 0
    commands = {"compare": cli.compare_app, "diagnose": cli.diagnose_app}[group].registered_commands
    assert cli.TIMES[group].keys() == {command.name for command in commands}
    for name, time in cli.TIMES[group].items():
        (line,) = [line for line in result.output.splitlines() if line.split()[:1] == [name]]
        assert line.endswith(time) and len(line) <= 80


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path):
    out = tmp_path / "out"
    arguments = ["--estimators", "fo, rmd", "--seeds", 2, "--dry-run", "--out", out]
    result = invoke("compare", "sinusoid", "--clip-norm", 0.5, *arguments)
    assert result.exit_code == 0, result.output
    assert "clip_norm = 0.5" in result.output
    assert "2 methods, 2 seeds each" in result.output
    assert "fo: FO (0 of 2 finished)" in result.output and "DrMAD" not in result.output
    assert str(out / "runs" / "fo-0.json") in result.output
    assert not out.exists()


def test_a_dry_run_counts_what_is_finished_and_refuses_other_settings(tmp_path):
    arguments = ["--estimators", "fo", "--out", tmp_path]
    fo = sinusoid.METHODS[0]
    finished_or_run(sinusoid.EXPERIMENT, tmp_path / "runs", fo, sinusoid.SinusoidConfig(meta_iterations=1), 0)
    result = invoke("compare", "sinusoid", "--meta-iterations", 1, *arguments, "--dry-run")
    assert "fo: FO (1 of 5 finished)" in result.output
    result = invoke("compare", "sinusoid", "--meta-iterations", 2, *arguments, "--dry-run")
    assert result.exit_code == 2 and "--out" in result.output


def test_the_help_lists_the_estimators():
    found = words(invoke("compare", "anil", "--help"))
    assert "hyperdistill-0.99 (HyperDistill, γ = 0.99)" in found


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("experiment", ["sinusoid", "warpgrad"])
def test_an_interrupted_diagnosis_says_how_to_start_again(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(
        f"metaopt.experiments.diagnose_{'many_shot' if experiment == 'warpgrad' else experiment}.run", interrupted
    )
    monkeypatch.setattr(sys, "argv", ["/bin/metaopt", "diagnose", experiment])
    result = invoke("diagnose", experiment, "--out", tmp_path)
    assert result.exit_code == 130
    assert f"start again: metaopt diagnose {experiment}" in result.output


def test_a_killed_worker_is_told_without_a_traceback(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise BrokenProcessPool

    monkeypatch.setattr("metaopt.experiments.experiment.run_all", killed)
    result = invoke("compare", "sinusoid", "--out", tmp_path)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "a worker was killed" in result.output


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    path = tmp_path / "runs.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error), match="runs.json: No space" if isinstance(error, OSError) else None):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_a_missing_folder_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write .*nowhere/runs.json"):
        write_text(Path(tmp_path, "nowhere", "runs.json"), "text")


def test_a_diagnosis_shows_how_far_it_is(tmp_path, capsys):
    config = sinusoid.SinusoidConfig(meta_iterations=2, horizon=2, meta_batch=2)
    diagnose_sinusoid.run(config, tmp_path, problems=1, every=1)
    shown = capsys.readouterr().err
    assert "meta-training: 100%" in shown and "2/2" in shown
    assert "diagnosis: 100%" in shown
    assert "before meta-training, problem 1" in shown
