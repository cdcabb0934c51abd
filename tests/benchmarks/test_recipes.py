"""The comparison of recipes: paired differences by hand, the table and picture of them, and a campaign that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import recipes, tables
from benchmarks.recipes import OPTIONS, STAGES, Candidate
from train.config import load_config

RECIPE = {
    "net": {"width": 8},
    "train": {"batch_size": 512, "precision": "bf16", "epochs": 8},
    "data": {"validation": 10000},
}


def report_of(accuracies: list[float], epochs: int = 8) -> dict[str, Any]:
    """As benchmarks/accuracy.py gives it, six views one point better than plain."""
    from benchmarks.accuracy import summarise

    runs = [
        {
            "seed": seed,
            "accuracy": value,
            "tta_accuracy": value + 0.5,
            "shift_accuracy": value + 1,
            "seconds": {"training": 9.0},
            "images_per_second": 1.0,
            "seconds_to_94": None,
            "training_seconds_to_94": None,
        }
        for seed, value in enumerate(accuracies)
    ]
    recipe = RECIPE | {"train": {**RECIPE["train"], "epochs": epochs}}
    return summarise(runs, recipe, {"machine": {"cpu": "X", "cpus_usable": 2}, "versions": {"torch": "1"}})


def made_up() -> dict[str, Any]:
    reports = {
        Candidate("base", (), 8): report_of([80.0, 81.0, 80.2]),
        Candidate("all", ("a.b=1",), 8): report_of([83.0, 83.1, 82.3]),
        Candidate("base", (), 24): report_of([84.0, 84.2, 84.4], epochs=24),
        Candidate("all", ("a.b=1",), 24): report_of([86.0, 86.3, 86.6], epochs=24),
    }
    return recipes.summarise("epochs", reports) | {"command": "the command"}


def test_differences_are_paired_by_seed_to_the_base_that_trains_longest() -> None:
    rows = made_up()["rows"]
    differences = np.array([83.0 - 84.0, 83.1 - 84.2, 82.3 - 84.4])
    found = rows[1]["differences"]["accuracy"]
    assert found["mean"] == pytest.approx(differences.mean()) and found["n"] == 3
    # the 97.5% point of Student's t with two degrees of freedom
    assert found["interval95"] == pytest.approx(4.3027 * differences.std(ddof=1) / np.sqrt(3), rel=1e-4)
    assert rows[3]["differences"]["shift_accuracy"]["mean"] == pytest.approx(2.1)
    assert rows[2]["differences"]["accuracy"]["mean"] == 0


def test_the_base_of_most_runs_is_what_others_are_compared_to() -> None:
    reports = {
        Candidate("base", (), 8): report_of([80.0, 81.0, 80.2]),
        Candidate("base", (), 24): report_of([84.0], epochs=24),
        Candidate("all", (), 8): report_of([83.0, 83.1, 82.3]),
    }
    report = recipes.summarise("epochs", reports)
    assert report["base_epochs"] == 8 and report["rows"][2]["differences"]["accuracy"]["n"] == 3


def test_a_base_of_three_runs_is_preferred_where_it_trains_longer() -> None:
    reports = {
        Candidate("base", (), 8): report_of([80.0, 81.0, 80.2, 80.3]),
        Candidate("base", (), 24): report_of([84.0, 84.2, 84.4], epochs=24),
        Candidate("all", (), 8): report_of([83.0, 83.1, 82.3, 82.0]),
    }
    report = recipes.summarise("epochs", reports)
    assert report["base_epochs"] == 24 and report["rows"][2]["differences"]["accuracy"]["n"] == 3


def test_rows_name_their_machine_where_there_are_several() -> None:
    here, there = report_of([80.0, 81.0, 80.2]), report_of([83.0, 83.1])
    there |= {"machine": {"gpu": "NVIDIA G1"}, "versions": {"torch": "2"}}
    report = recipes.summarise("epochs", {Candidate("base", (), 8): here, Candidate("all", (), 8): there})
    header, _, base, everything, _, caption = recipes.table(report | {"command": "the command"})
    assert header.endswith("| on |")
    assert base.endswith("| 2 cores, X, torch 1 |") and everything.endswith("| NVIDIA G1, torch 2 |")
    assert header.count("|") == base.count("|") == everything.count("|")
    assert "2 cores, X, torch 1; NVIDIA G1, torch 2" in caption
    assert "| on |" not in recipes.table(made_up())[0]
    there = report_of([83.0, 83.1]) | {"precision": "fp32"}
    report = recipes.summarise("epochs", {Candidate("base", (), 8): here, Candidate("all", (), 8): there})
    _, _, base, everything, _, caption = recipes.table(report | {"command": "the command"})
    assert base.endswith("| bf16 |") and everything.endswith("| fp32 |") and ", bf16 and fp32," in caption


def test_what_is_left_out_is_compared_to_all_over_the_seeds_that_both_have() -> None:
    reports = {
        Candidate("base", (), 8): report_of([80.0, 81.0, 80.2]),
        Candidate("all", (), 8): report_of([83.0, 83.1, 82.3]),
        Candidate("without flip", (), 8): report_of([82.5, 82.8]),
    }
    report = recipes.summarise("left-out", reports) | {"command": "the command"}
    without = report["rows"][2]
    assert without["against_all"]["mean"] == pytest.approx((82.5 - 83.0 + 82.8 - 83.1) / 2)
    assert without["differences"]["accuracy"]["n"] == without["against_all"]["n"] == 2
    found = next(line for line in recipes.table(report) if line.startswith("| without flip | 8 | 2 |"))
    assert found.endswith("| -0.40 ± 1.27 |")  # 12.706 * 0.1414 / sqrt(2)


def test_the_table_gives_intervals_and_the_picture_is_drawn(tmp_path: Path) -> None:
    report = made_up()
    text = recipes.table(report)
    half = 4.3027 * np.std([-1.0, -1.1, -2.1], ddof=1) / np.sqrt(3)
    assert any(line.startswith("| all | 8 | 3 | 82.80 ± ") and f"| -1.40 ± {half:.2f} |" in line for line in text)
    assert "over n seeds" in text[-1] and "`the command`" in text[-1]
    (tmp_path / "recipes.json").write_text(json.dumps(report))
    assert tables.recipes_block(tmp_path).count("\n| all |") == 2
    recipes.draw(report, tmp_path / "epochs.png")
    with Image.open(tmp_path / "epochs.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20


@pytest.mark.parametrize("stage", STAGES)
def test_every_candidate_is_a_recipe_with_a_file_of_its_own_and_the_base_trains_as_long(stage: str) -> None:
    candidates = STAGES[stage][1]()
    assert len({candidate.file for candidate in candidates}) == len(candidates)
    bases = [
        candidate.epochs for candidate in candidates if candidate.name == ("all" if stage == "further" else "base")
    ]
    assert max(bases) == max(candidate.epochs for candidate in candidates)
    for candidate in candidates:
        load_config(recipes.RECIPE, [*recipes.COMMON, *candidate.words])
    everything = next(candidate for candidate in candidates if candidate.name == "all")
    assert everything.words == recipes.having(*OPTIONS)
    if stage != "further":  # which has more than all
        assert everything.words == max((candidate.words for candidate in candidates), key=len)


def test_a_campaign_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [Candidate("base", (), 1), Candidate("all", ("optim.label_smoothing=0.2",), 1)]
    monkeypatch.setitem(STAGES, "kinds", (2, lambda: few))
    words = [
        "kinds",
        "--work",
        str(tmp_path / "work"),
        "data.name=digits",
        "data.validation=300",
        "train.batch_size=256",
    ]
    words += ["schedule.peak_epoch=0.5", "train.compile=off", "train.eval_batch_size=300", "data.backend=torch"]
    assert recipes.main([*words, "--runs", "1"]) == 0
    capsys.readouterr()
    before = (tmp_path / "work" / "base-1.jsonl").read_text()
    # the other candidate by itself, both runs, and no report
    assert recipes.main([*words, "--runs", "2", "--only", "all"]) == 0
    assert '"kind"' not in capsys.readouterr().out
    assert (tmp_path / "work" / "all-1.jsonl").read_text().count("\n") == 3
    assert (tmp_path / "work" / "base-1.jsonl").read_text() == before
    assert recipes.main([*words, "--runs", "2", "--only", "all", "--as-is"]) == 2
    assert "--only reports nothing: leave out --as-is" in capsys.readouterr().err
    assert recipes.main([*words, "--runs", "2", "--only", "al"]) == 2
    assert "no candidate of kinds, which has base, all" in capsys.readouterr().err
    assert recipes.main([*words, "--runs", "2", "--json", str(tmp_path / "found.json")]) == 0
    after = (tmp_path / "work" / "base-1.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 1
    report = json.loads((tmp_path / "found.json").read_text())
    assert report == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["accuracies"]["shift_accuracy"]["n"] for row in report["rows"]] == [2, 2]
    # as it is: the same report, though a third run is asked for; none of a folder without runs
    assert recipes.main([*words, "--runs", "3", "--as-is"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["rows"] == report["rows"] and again["machines"] == report["machines"]
    assert (tmp_path / "work" / "base-1.jsonl").read_text() == after
    # other rounding is no other recipe there, and other epochs are
    assert recipes.main([*words, "train.precision=fp32", "train.device=cuda", "--runs", "2", "--as-is"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == report["rows"]
    assert recipes.main([*words, "optim.momentum=0.8", "--runs", "2", "--as-is"]) == 2
    assert "optim.momentum: 0.9 -> 0.8" in capsys.readouterr().err
    assert recipes.main([*words, "--runs", "2", "--as-is", "--work", str(tmp_path / "none")]) == 2
    assert "no finished run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        recipes.main([*words, "--runs", "0"])
    assert refused.value.code == 2
