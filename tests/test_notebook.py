"""docs/quickstart.ipynb, run as a newcomer runs it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from places import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]  # type: ignore[no-any-return]


def test_the_notebook_has_five_cells_and_keeps_no_outputs() -> None:
    assert [cell["cell_type"] for cell in cells()] == ["markdown", "code", "code", "code", "code"]
    for cell in cells()[1:]:
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_trains_draws_and_predicts_with_readable_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install -e '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install -e '.[test]'")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()

    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    streams = {(out["name"], out["text"]) for of_cell in outputs for out in of_cell if out["output_type"] == "stream"}
    text = "".join(text for _, text in sorted(streams))
    assert "epoch 3/3: lr" in text
    assert not any(name == "stderr" for name, _ in streams), streams
    assert not {"\r", "\x1b", "\b"} & set(text), "a progress bar, which a notebook cannot draw"

    summary = json.loads((tmp_path / "runs" / "notebook" / "summary.json").read_text())
    shown = outputs[1][-1]["data"]["text/plain"]
    assert f"accuracy={summary['last_accuracy']}" in shown and summary["last_accuracy"] > 50

    for place, name in ((2, "curves.png"), (3, "grad_cam.png")):
        shown = base64.b64decode(outputs[place][-1]["data"]["image/png"])
        assert shown == (tmp_path / "runs" / "notebook" / "analysis" / name).read_bytes()
        assert min(Image.open(io.BytesIO(shown)).size) > 300
    assert "with a probability of" in outputs[4][0]["text"] and "image/png" in outputs[4][-1]["data"]
