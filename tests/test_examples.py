"""The examples run as they are."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "with_trl": "trl",
    "with_lightning": "lightning",
}  # test_tools.py does the same in every run
NAMES = sorted(f.stem for f in EXAMPLES.glob("with_*.py"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.sweep] if n in NEEDS else []) for n in NAMES]
)
def test_example(name, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(name, "accelerate"))
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    if name == "with_trainer":
        assert "['expert0', 'second'] [True, True]" in capsys.readouterr().out
