"""What the benchmarks are given: counts that can be counted to, and files of JSON that are whole or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import accuracy, roofline, tables, throughput
from benchmarks.given import read_json, whole
from dali_pipeline.errors import UserError

COUNTS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "throughput": (throughput.main, ["--repeats"]),
    "accuracy": (accuracy.main, ["configs/quickstart.yaml", "--runs"]),
    "roofline": (roofline.main, ["--epochs"]),
}


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "many", "9" * 5000, ""])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_nothing_is_refused_before_anything_is_measured(
    name: str, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words = COUNTS[name]
    with pytest.raises(SystemExit) as ended:
        main([*words, count])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "expected a whole number from 1 to 1000000" in said and len(said) < 1500


def test_a_count_may_be_allowed_to_be_nothing() -> None:
    assert whole(0)("0") == 0 and whole()("7") == 7


DAMAGED = {
    "cut short": b'{"kind": "throughput", "stages": {',
    "empty": b"",
    "no text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "a list": b"[1]",
    "a kind alone": b'{"kind": "KIND"}',
    "values of other types": b'{"kind": "KIND", "machine": 3, "stages": [], "peers": null, "seconds": "x", "finished": 1}',
}


@pytest.mark.parametrize("kind", ["throughput", "accuracy", "validation", "recipes"])
@pytest.mark.parametrize("name", DAMAGED)
def test_tables_name_the_damaged_file_and_change_no_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    (tmp_path / "b.json").write_bytes(DAMAGED[name].replace(b"KIND", kind.encode()))
    (tmp_path / "a.json").write_text(json.dumps({"kind": "another"}))
    before = {path: (tables.ROOT / path).read_bytes() for path in tables.BLOCKS}
    assert tables.main(["--results", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'b.json'}: ")
    assert before == {path: (tables.ROOT / path).read_bytes() for path in tables.BLOCKS}


def test_a_report_or_plan_that_is_none_is_named_by_the_prediction(tmp_path: Path) -> None:
    for content in ("[]", "3", "{}", '{"machine": {}}', "[1"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises((UserError, RuntimeError), match=r"x\.json: "):
            roofline.read_plans(tmp_path / "x.json")
        with pytest.raises(UserError, match=r"x\.json: "):
            roofline.measured_steps(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_json(tmp_path / "none.json")


def test_a_damaged_line_of_the_finished_runs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for line, said in (("{", "line 2 is damaged"), (accuracy.FIRST_LINE_START + "3}", "not a file of finished runs")):
        first = accuracy.FIRST_LINE_START + "{}}" if line == "{" else line
        path.write_text(f"{first}\n{line}\n")
        with pytest.raises(UserError, match=f"runs.jsonl: .*{said}"):
            accuracy.read_finished(path, {})
