"""The scripts as commands: where they start, how they name themselves, how they end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from places import CONFIGS, ROOT

from benchmarks import accuracy, footprint, lr_finder, machine, throughput
from benchmarks.outcome import write_report
from dali_pipeline.errors import UserError


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


@pytest.mark.parametrize("script", ["throughput", "accuracy", "tables", "footprint", "lr_finder", "dali_candidates"])
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
        (throughput, []),
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


def test_gpu_session_goes_on_after_a_failure_and_sums_up(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\ncase "$*" in *accuracy*) exit 3 ;; esac\n')
    python.chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    old = ["throughput.json", "throughput.png", "trace.json", "trace.json.gz", "recipe.json", "recipe.jsonl", "old.log"]
    for name in old:
        (tmp_path / "out" / name).write_text("of another day")
    done = subprocess.run(
        [
            "bash",
            str(ROOT / "benchmarks" / "gpu_session.sh"),
            str(tmp_path / "out"),
            str(tmp_path / "data"),
            str(python),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = ("-m pytest", "benchmarks/throughput.py", "benchmarks/accuracy.py", "- ")
    assert len(calls) == 4 and all(call.startswith(start) for call, start in zip(calls, starts, strict=True))
    assert f"data.root={tmp_path / 'data'}" in calls[2] and "-m gpu -v --tb=short --durations=10" in calls[0]
    assert re.findall("--ablate ([a-z]+)", calls[1]) == ["graph", "prefetch", "pipelines", "batch", "compile"]
    assert "recipe: exit code 3" in done.stdout and "tests: done" in done.stdout
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"gpu.csv", "tests.log", "throughput.log", "recipe.log", "old.log"}, (
        "only its own outputs are removed"
    )
    script = (ROOT / "benchmarks" / "gpu_session.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", script, re.MULTILINE)]
    grace = re.findall(r"timeout --signal=INT --kill-after=(\d+) ", script)
    assert len(limits) == 3 and len(grace) == 1
    assert sum(limits) + len(limits) * int(grace[0]) < 8 * 60
