"""What the benchmarks conclude, and the tables that the documents show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

from benchmarks import accuracy, tables, throughput, validation
from benchmarks.measure import Rate


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        (
            (3.1, 0.995, 0.995),
            "compute-bound: the pipeline delivers 3.1x what the network takes, and training does 99.5%",
        ),
        ((500.0, 0.99, 0.99), "compute-bound: the pipeline delivers 500x what"),
        ((0.4, 0.99, 0.396), "input-bound: the pipeline delivers 40% of what the network takes"),
        ((1.5, 0.6, 0.6), "overlap-bound: end to end reaches 60% of the slower stage alone (the step)"),
        ((0.7, 0.5, 0.35), "overlap-bound: end to end reaches 50% of the slower stage alone (the pipeline)"),
    ],
)
def test_verdict(ratios: tuple[float, float, float], words: str) -> None:
    names = ("pipeline_over_step", "overlap", "end_to_end_over_step")
    assert words in throughput.verdict(dict(zip(names, ratios, strict=True)))


def test_ratios_of_made_up_stages() -> None:
    rates = {
        "pipeline": Rate((4000.0, 2000.0)),
        "step": Rate((1000.0, 500.0)),
        "end_to_end": Rate((990.0, 495.0)),
    }
    found = throughput.training_ratios(rates, Rate((1e12, 5e11)), 400_000_000, 0.02)
    assert found == {
        "pipeline_over_step": 4.0,
        "end_to_end_over_step": pytest.approx(0.99),
        "overlap": pytest.approx(0.99),
        "pipeline_share_of_training_thread": 0.02,
        "model_flop_utilisation": pytest.approx(0.4),
    }
    rates["pipeline"] = Rate((500.0, 250.0))
    rates["end_to_end"] = Rate((450.0, 225.0))
    assert throughput.training_ratios(rates, Rate((1.0, 1.0)), 1, 0.0)["overlap"] == pytest.approx(0.9)


@pytest.mark.parametrize("name", tables.BLOCKS)
def test_a_document_holds_the_table_that_the_results_make(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    block = tables.BLOCKS[name](ROOT / "benchmarks" / "results")
    assert block in text
    assert tables.replaced(text, block) == text


def test_check_names_the_document_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    empty = f"before\n{tables.BEGIN}\n{tables.END}\nafter\n"
    for name in tables.BLOCKS:
        (tmp_path / name).write_text(empty)
    (tmp_path / "benchmarks" / "results" / "a.json").write_text(json.dumps(made_up_report()))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert capsys.readouterr().err.splitlines() == ["docs/throughput.md is not what benchmarks/tables.py makes"]
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 0
    assert "| training step alone | 1,000 ± 5% |" in (tmp_path / "docs" / "throughput.md").read_text()
    assert (tmp_path / "README.md").read_text() == empty


def made_up_report() -> dict[str, Any]:
    def rate(median: float) -> dict[str, float]:
        return {"median": median, "spread": median / 10, "repeats": 5}

    return {
        "kind": "throughput",
        "machine": {"cpu": "Processor X", "cpus_usable": 2, "load_average_before": [0.5, 0, 0]},
        "versions": {"torch": "2.11"},
        "command": "python benchmarks/throughput.py",
        "settings": {
            "width": 16,
            "batch_size": 512,
            "precision": "fp32",
            "compile": "default",
            "images": 50_000,
            "data": "synthetic",
        },
        "stages": {"pipeline_dali_cpu": rate(500_000.0), "step": rate(1000.0), "augment_none": rate(1.0)},
        "peers": {"torchvision_pil_2_workers": rate(5000.0)},
        "ratios": {"dali_over_torchvision_pil_2_workers": 100.4, "overlap": 0.993},
        "verdict": "compute-bound: so it is",
    }


def test_throughput_table_has_a_column_a_machine(tmp_path: Path) -> None:
    gpu = made_up_report()
    gpu["machine"]["gpu"] = "GPU Y"
    del gpu["stages"]["pipeline_dali_cpu"]
    gpu["peers"]["torchvision_pil_16_workers"] = gpu["peers"]["torchvision_pil_2_workers"] | {"median": 20_000.0}
    gpu["ratios"] |= {"dali_over_torchvision_pil_16_workers": 25.2, "dali_over_torch_compiled": 1.25}
    (tmp_path / "a.json").write_text(json.dumps(made_up_report()))
    (tmp_path / "b.json").write_text(json.dumps(gpu))
    (tmp_path / "c.json").write_text(json.dumps({"found": []}))  # another benchmark's
    block = tables.throughput_block(tmp_path).splitlines()
    assert block[0] == tables.BEGIN and block[-1] == tables.END
    assert "| images/s, median; ratios: median of paired ratios | 2 cores, Processor X | GPU Y |" in block
    assert "| DALI pipeline, cpu | 500,000 ± 5% |  |" in block
    assert "| training step alone | 1,000 ± 5% | 1,000 ± 5% |" in block
    assert "| DataLoader, torchvision PIL, 2 workers | 5,000 ± 5% | 5,000 ± 5% |" in block
    assert "| DALI over DataLoader, PIL, 2 workers | 100x | 100x |" in block
    assert "| DALI over DataLoader, PIL, the fastest |  | 25x (16 workers) |" in block
    assert "| DALI over torch compiled |  | 1.25x |" in block
    assert not any("torch compiled over DataLoader" in line for line in block), "nobody measured it"
    said = throughput.conclusions(gpu)
    assert "DALI over DataLoader, PIL, the fastest: 25x (16 workers)" in said and "paired ratios" in said[0]
    assert not any("fastest" in line for line in throughput.conclusions(made_up_report()))
    assert not any("augment" in line for line in block)
    assert sum("Compute-bound: so it is." in line for line in block) == 2


def test_accuracy_table_says_what_its_times_leave_out() -> None:
    record = {
        "seed": 0,
        "accuracy": 94.0,
        "tta_accuracy": 94.2,
        "test_loss": 0.3,
        "seconds": {"lr_search": 1.0, "training": 9.0, "evaluation": 1.0, "tta": 0.1},
        "images_per_second": 1.0,
        "seconds_to_94": 8.0,
        "training_seconds_to_94": 7.0,
    }
    never = {"accuracy": 94.2, "seconds_to_94": None, "training_seconds_to_94": None}
    report = accuracy.summarise([record, record | never], {}, {"machine": {"gpu": "GPU Y"}})
    table = tables.accuracy_table([report | {"command": "python benchmarks/accuracy.py c.yaml"}])
    half_width = 12.706 * 0.1 * np.sqrt(2) / np.sqrt(2)
    assert (
        f"| GPU Y | 94.10 ± {half_width:.2f} (2) | 94.20 ± 0.00 (2) |  | 9.0 s | 10.0 s | 8.0 s (1 of 2) |" in table[2]
    )
    assert "compiling" in table[-1]
    assert any("8.0 s with the evaluations" in line for line in accuracy.lines(report))


def test_accuracy_table_gives_no_times_of_a_shared_machine() -> None:
    seconds = {"lr_search": 1.0, "training": 9.0, "evaluation": 1.0, "tta": 0.1}
    record = {"seed": 0, "accuracy": 93.0, "tta_accuracy": 93.2, "seconds": seconds, "images_per_second": 1.0}
    never = {"seconds_to_94": None, "training_seconds_to_94": None}
    found = accuracy.summarise([record | never], {}, {"machine": {"gpu": "GPU Y"}}) | {"command": "c"}
    (_, _, alone, *_), (_, _, shared, *_) = (tables.accuracy_table([found | more]) for more in ({}, {"shared": True}))
    assert alone.endswith("| 9.0 s | 10.0 s | not reached |")
    assert shared.endswith("| 93.00 (1) | 93.20 (1) |  |  |  | not reached |")
    assert alone.count("|") == shared.count("|")


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no <!-- results"):
        tables.replaced("nothing here", "block")


def test_validation_table_of_two_made_up_seeds() -> None:
    runs = [
        {"seed": 0, "epochs": [{"validation": 50.0, "test": 48.0}, {"validation": 80.0, "test": 81.0}]},
        {"seed": 1, "epochs": [{"validation": 54.0, "test": 50.0}, {"validation": 82.0, "test": 81.0}]},
    ]
    recipe = {"train": {"precision": "bf16"}}
    environment = {"machine": {"cpus_usable": 2, "cpu": "a processor"}, "versions": {"torch": "9.9"}}
    report = validation.summarise(runs, recipe, environment) | {"command": "the command"}
    rows = tables.validation_table(report)
    # Student's t for two values: 12.706 / sqrt(2) of a deviation of sqrt(2), which is 12.71
    assert rows[2:4] == ["| 1 | 52.00 | 49.00 | 3.00 ± 12.71 (2) |", "| 2 | 81.00 | 81.00 | 0.00 ± 12.71 (2) |"]
    assert "last epoch 81.00 ± 0.00 (2)" in rows[-1] and "`the command`" in rows[-1]
