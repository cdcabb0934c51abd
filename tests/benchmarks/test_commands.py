"""The scripts as commands: where they start, how they name themselves, how they end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import CONFIGS, ROOT

from benchmarks import accuracy, footprint, lr_finder, machine, precision, smoke, throughput
from benchmarks.outcome import write_report
from dali_pipeline.errors import UserError
from train.config import Config, load_config
from train.step.range_test import Suggestion


def test_a_recorded_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    words = ["--json", str(tmp_path / "r.json"), f"--picture={tmp_path}/p.png", f"data.root={tmp_path}", "net.width=2"]
    assert machine.command("throughput", [*words, "--data-root", "~/data", "--quick"]) == (
        "python benchmarks/throughput.py --json FILE --picture=FILE data.root=DIR net.width=2 --data-root DIR --quick"
    )
    words = [
        str(ROOT / "configs" / "onecycle.yaml"),
        "--runs",
        "2",
        "--json",
        "benchmarks/results/a.json",
        "data.root=data",
    ]
    assert machine.command("accuracy", words) == (
        "python benchmarks/accuracy.py configs/onecycle.yaml --runs 2 --json benchmarks/results/a.json data.root=data"
    )
    assert machine.shareable([f"{ROOT}/a.yaml", "../elsewhere/b.yaml"])[0] == "a.yaml"
    assert machine.shareable(["--work", f"{ROOT}/../elsewhere"]) == ["--work", "DIR"]


@pytest.mark.parametrize(
    "script",
    [
        "throughput",
        "accuracy",
        "smoke",
        "tables",
        "footprint",
        "lr_finder",
        "roofline",
        "precision",
        "waiting",
        "dali_candidates",
    ],
)
def test_scripts_start_anywhere_without_being_installed(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if script == "dali_candidates":  # it needs torch for its --help; -S still hides an installed project
        environment["PYTHONPATH"] = str(Path(torch.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "benchmarks" / f"{script}.py"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and f"benchmarks/{script}.py" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (accuracy, [str(CONFIGS / "quickstart.yaml"), "--runs", "1"]),
        (precision, [str(CONFIGS / "quickstart.yaml"), "--runs", "1"]),
        (throughput, []),
        (smoke, []),
        (footprint, []),
        (lr_finder, []),
    ],
)
def test_a_wrong_key_ends_every_command_in_one_line(
    script: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *words, "net.widht=8"])
    assert script.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: net.widht: unknown key, did you mean net.width") and said.count("\n") == 1


def test_a_report_is_whole_or_the_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(path, {"a": [1]})
    assert json.loads(path.read_text()) == {"a": [1]} and [*path.parent.iterdir()] == [path]
    with pytest.raises(UserError, match=f"--json {path}/r.json: cannot be written: ") as raised:
        write_report(path / "r.json", {})
    assert raised.value.exit_code == 2


def gpu_session(folder: Path, data: str = "-") -> tuple[list[list[str]], str]:
    """The words with which a session calls Python, and what it prints: a stand-in for Python notes its words, writes the
    file of --json, and fails in the recipe."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(
        '#!/bin/sh\nprintf "%s\\t" "$@" >> "$CALLS"; echo >> "$CALLS"\ncase "$*" in *accuracy*) exit 3 ;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = --json ] && : > "$2"; shift; done\n'
    )
    python.chmod(0o755)
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_session.sh"), str(folder / "out"), data, str(python)],
        env={**os.environ, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    words = [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]
    return [called for called in words if called != ["-c", "import xdist"]], done.stdout


PARTS = ["smoke", "throughput", "fast94", "onecycle", "tests", "ablations"]


def test_gpu_session_starts_every_part_goes_on_after_a_failure_and_sums_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    calls, said = gpu_session(tmp_path, str(tmp_path / "data"))
    assert re.findall(r"^== (\w+): ", said, re.MULTILINE) == PARTS
    smoke_words, rates, fast, recipe, tests, ablations, summary, predicted = calls
    assert tests[:4] == ["-m", "pytest", "-m", "gpu"] and summary[0] == "-" and predicted[0] == "benchmarks/roofline.py"
    parts = ((smoke, smoke_words), (throughput, rates), (accuracy, fast), (accuracy, recipe), (throughput, ablations))
    for module, words in parts:
        assert words[0] == f"benchmarks/{Path(module.__file__ or '').name}"
        module.parser().parse_intermixed_args(words[1:])  # ends the test where it takes no such words
    for called in (fast, recipe):
        assert f"data.root={tmp_path / 'data'}" in called
        options = accuracy.parser().parse_intermixed_args(called[1:])
        load_config(ROOT / options.config, options.overrides)
    assert throughput.parser().parse_intermixed_args(ablations[1:]).ablate == (
        ["step_graph", "graph", "strips", "prefetch", "pipelines", "batch", "compile"]
    )
    assert "onecycle: exit code 3" in said and "tests: done" in said
    assert (ROOT / predicted[predicted.index("--plan") + 1]).exists()


def test_gpu_session_started_again_does_what_is_left_and_replaces_other_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    old = ["smoke.json", "throughput.json", "trace.json", "trace.json.gz", "onecycle.jsonl", "ablations.png", "old.log"]
    for name in old:
        (out / name).write_text("of another day")
    first, _ = gpu_session(tmp_path)
    assert len(first) == 8
    kept = {path.name for path in out.iterdir()}
    assert kept == {"gpu.csv", "smoke.json", "throughput.json", "ablations.json", "roofline.json", "old.log"} | {
        f"{name}.{kind}" for name in PARTS for kind in ("log", "state")
    }, "only its own outputs are removed"

    (out / "onecycle.jsonl").write_text("a run that was finished")
    again, said = gpu_session(tmp_path)
    assert [words[0] for words in again] == [*["benchmarks/accuracy.py"] * 2, "-", "benchmarks/roofline.py"]
    assert said.count("done before") == 4
    assert (out / "onecycle.jsonl").read_text() == "a run that was finished"

    (tmp_path / "data").mkdir()
    gpu_session(tmp_path, str(tmp_path / "data"))
    assert not (out / "onecycle.jsonl").exists()  # of other data


def test_gpu_recipes_measures_twenty_seeds_of_each_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        '#!/bin/sh\nprintf "%s\\t" "$@" >> "$CALLS"; echo >> "$CALLS"\necho "of $2"\n[ "$2" != configs/fast95.yaml ]\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_recipes.sh"), "out", str(tmp_path), str(python)],
        env={**os.environ, "CALLS": str(calls)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    recipes = ["fast94", "fast95", "onecycle", "accurate96"]
    words = [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]
    assert done.returncode == 1 and re.findall(r"^== (\w+)", done.stdout, re.MULTILINE) == recipes
    for recipe, called in zip(recipes, words, strict=True):
        assert called[0] == "benchmarks/accuracy.py" and f"of configs/{recipe}.yaml" in done.stdout
        options = accuracy.parser().parse_intermixed_args(called[1:])
        assert options.runs == 20 and options.finished == tmp_path / "out" / f"{recipe}.jsonl"
        load_config(ROOT / options.config, options.overrides)


def test_gpu_session_ends_within_the_time_that_it_promises() -> None:
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", script, re.MULTILINE)]
    grace = re.findall(r"timeout --signal=INT --kill-after=(\d+) ", script)
    promised = re.findall(r"at most (\d+)\.", script)
    assert len(limits) == len(PARTS) and len(grace) == len(promised) == 1
    assert sum(limits) + len(limits) * int(grace[0]) < int(promised[0]) * 60


def test_smoke_ends_with_a_line_for_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.device=cpu", "net.width=2", "train.batch_size=32", "train.eval_batch_size=32"]
    words += ["data.synthetic_count=320", "--modes", "off", "--json", str(tmp_path / "smoke.json")]
    code = smoke.main(words)
    checks = {check["name"]: check for check in json.loads((tmp_path / "smoke.json").read_text())["checks"]}
    assert list(checks) == ["device", "DALI's probe", "DALI's pixels", "compile off"]
    assert checks["device"]["ok"] and checks["compile off"]["ok"]
    assert "10 steps" in checks["compile off"]["said"]
    dali = checks["DALI's probe"]["ok"]
    assert checks["DALI's pixels"]["ok"] == dali and code == (not dali)
    assert capsys.readouterr().out.count("ok ") == sum(check["ok"] for check in checks.values())


def test_smoke_makes_images_enough_for_a_large_batch_and_says_where_they_are_too_few(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("probe", "pixels"):
        monkeypatch.setattr(smoke, name, lambda *arguments: "fine")
    words = ["--modes", "off", "--config", str(CONFIGS / "onecycle.yaml")]
    words += ["train.device=cpu", "net.width=1", "train.batch_size=1100"]
    assert smoke.main(words) == 0
    assert "ok      compile off: 10 steps" in capsys.readouterr().out
    assert smoke.main([*words, "data.synthetic_count=2200"]) == 1
    assert "2 batches of 1100, for 10 steps the data are too few" in capsys.readouterr().out


def test_the_grid_of_rates_may_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train.run
    import train.step.range_test

    def trained(config: Config, folder: Path, **_: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"last_accuracy": 80.0}')

    monkeypatch.setattr(train.run, "find_rates_only", lambda *_, **__: None)
    monkeypatch.setattr(train.run, "fit", trained)
    monkeypatch.setattr(train.step.range_test.RangeTest, "read_csv", lambda path: None)
    monkeypatch.setattr(train.step.range_test, "suggest", lambda _: Suggestion(lr_max=0.4, lr_min=0.002, lowest=1.2))
    out = tmp_path / "found.json"
    words = ["--seeds", "2", "--grid-seeds", "0", "--work", str(tmp_path / "work"), "--json", str(out)]
    assert lr_finder.main(words) == 0
    report = json.loads(out.read_text())
    assert report["mean_accuracy_found"] == 80 and report["grid"] == [] and report["best_of_grid"] is None


def test_smoke_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> str:
        raise ValueError("wrong\nin detail")

    for name in ("probe", "pixels", "ten_steps"):
        monkeypatch.setattr(smoke, name, fails if name == "pixels" else lambda *arguments: "fine")
    assert smoke.main(["train.device=cpu", "data.synthetic_count=600", "--modes", "off"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  DALI's pixels: ValueError: wrong (" in said and "ok      compile off: fine (" in said
