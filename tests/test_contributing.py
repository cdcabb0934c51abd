"""The worked examples of docs/contributing.md, carried out on a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = ("net", "dali_pipeline", "train", "analysis", "configs")


def example(heading: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block below a heading of the document."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def carry_out(heading: str, tree: Path) -> Path:
    """Write the files, apply the changes, run the command; gives the run folder."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name)
    folder = None
    for language, text in example(heading):
        if language == "python":
            name = text.splitlines()[0].removeprefix("# ")
            assert not (tree / name).exists()
            (tree / name).write_text(text, encoding="utf-8")
        elif language == "diff":
            # --recount: line numbers in the document may lag behind; the lines themselves must be there
            subprocess.run(["git", "apply", "--recount", "-"], input=text, text=True, cwd=tree, check=True)
        else:
            words = shlex.split(text)
            assert words[0] == "python"
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(tree),
                "GIT_CEILING_DIRECTORIES": str(tree.parent),
            }
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=tree, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            folder = tree / words[-1].removeprefix("run.dir=")
    assert folder is not None
    return folder


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git, to apply the changes of the document")


@needs_git
@pytest.mark.slow
def test_the_example_of_a_data_source_trains_and_is_analysed(tmp_path: Path) -> None:
    run = carry_out("Add a data source", tmp_path)
    assert json.loads((run / "summary.json").read_text())["last_accuracy"] > 90
    assert "stripes_period: 4" in (run / "config.yaml").read_text()
    assert (run / "analysis" / "report.html").exists()


@needs_git
@pytest.mark.slow
def test_the_example_of_an_option_trains_with_it(tmp_path: Path) -> None:
    from train.disk.snapshot import load_snapshot

    run = carry_out("Add an option", tmp_path)
    assert load_snapshot(run / "last.pt").optimizer.keys() == {"adamw"}
    assert json.loads((run / "summary.json").read_text())["last_accuracy"] > 60
