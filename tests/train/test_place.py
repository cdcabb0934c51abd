"""The variables of a process group: those of a group are taken, leftovers are named, and nobody falls silent by mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from whole_runs import one_line
from zygote import Zygote

from train.machine.place import GroupError, Place, place_from_environment

GROUP = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FAULTS = [
    ({"RANK": "1"}, "RANK"),
    ({"RANK": "0"}, "RANK"),
    ({"RANK": "x"}, "RANK"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
    ({"WORLD_SIZE": "x"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "RANK"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    (GROUP | {"RANK": "4"}, "RANK"),
    (GROUP | {"RANK": "1.0"}, "RANK"),
    (GROUP | {"RANK": "\u0661"}, "RANK"),
    (GROUP | {"RANK": ""}, "RANK"),
    (GROUP | {"LOCAL_RANK": "4"}, "LOCAL_RANK"),
    (GROUP | {"LOCAL_RANK": "x"}, "LOCAL_RANK"),
    (GROUP | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
    (GROUP | {"MASTER_PORT": ""}, "MASTER_PORT"),
    (GROUP | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
    (GROUP | {"MASTER_PORT": "ssh"}, "MASTER_PORT"),
]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        (GROUP, Place(1, 4, 1)),
        ({name: value for name, value in GROUP.items() if name != "LOCAL_RANK"}, Place(1, 4, 1)),
        (GROUP | {"RANK": "3"}, Place(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "3"}, Place()),
        ({"LOCAL_RANK": "3", "MASTER_ADDR": "nowhere"}, Place()),
        (dict.fromkeys(GROUP, ""), Place()),
    ],
)
def test_a_group_is_what_all_its_variables_name(
    clean: pytest.MonkeyPatch, variables: dict[str, str], place: Place
) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    assert place_from_environment() == place


@pytest.mark.parametrize(("variables", "named"), FAULTS)
def test_what_names_no_process_of_a_group_is_refused_by_the_variables_name(
    clean: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    with pytest.raises(GroupError, match=rf"^{named}[=:]") as refused:
        place_from_environment()
    assert "\n" not in str(refused.value) and "unset" in str(refused.value)


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@given(st.dictionaries(st.sampled_from(sorted(GROUP)), st.sampled_from(["", "0", "1", "2", "-1", "1e3"]) | words))
@settings(max_examples=300, deadline=None)
def test_whatever_the_variables_hold_is_a_place_or_one_error(variables: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in GROUP:
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            place = place_from_environment()
        except GroupError as error:
            assert str(error).partition("=")[0].partition(":")[0] in GROUP
        else:
            assert 0 <= place.rank < place.world_size and place.local_rank >= 0
            assert place.world_size == 1 or all(os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))


def test_a_run_under_leftovers_of_another_job_says_so_in_one_line_and_leaves_nothing(
    runs: Zygote, recipe: Path, tmp_path: Path, clean: pytest.MonkeyPatch
) -> None:
    for variables in ({"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}):
        code, out, err = runs.run("--config", recipe, f"run.dir={tmp_path / 'run'}", env=variables)
        assert (code, out) == (2, "")
        assert one_line(err).startswith("error: RANK=")
    code, out, err = runs.run("--config", recipe, "train.epochs=0", env={"LOCAL_RANK": "1"})
    assert code == 2 and "train.epochs" in one_line(err)  # a leftover LOCAL_RANK hides no error
    assert not (tmp_path / "run").exists()


PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
CHILD = """
import os, time
from train.machine.place import end_with_torchrun
parent = os.getppid()
end_with_torchrun()
print("begun", flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
time.sleep(3)
print("alone", flush=True)
"""


@pytest.mark.parametrize(("started_by", "goes_on"), [({"TORCHELASTIC_RUN_ID": "none"}, False), ({}, True)])
def test_a_process_ends_with_the_torchrun_that_started_it_and_outlives_a_shell(
    monkeypatch: pytest.MonkeyPatch, started_by: dict[str, str], goes_on: bool
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **started_by}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None and parent.stdout.readline() == "begun\n"
    parent.kill()
    out, err = parent.communicate(timeout=60)  # ends once its child has closed the pipes too
    assert out == ("alone\n" if goes_on else "")
    assert ("torchrun, which started this process, is gone" in err) == (not goes_on)
