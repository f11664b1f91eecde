"""The examples run as they are."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"with_trl": "trl", "with_lightning": "lightning"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",  # tests/frontend/test_tools.py does in every run what the others do
    [
        pytest.param(f.stem, marks=[] if f.stem == "with_trainer" else [pytest.mark.sweep])
        for f in sorted(EXAMPLES.glob("with_*.py"))
    ],
)
def test_example(name, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(name, "accelerate"))
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    if name == "with_trainer":
        assert "['expert0', 'second'] [True, True]" in capsys.readouterr().out
