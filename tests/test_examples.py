"""The examples run as they are."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "with_trl": "trl", "with_lightning": "lightning", "with_deepspeed": "deepspeed",
    "with_torchao": "torchao",
}  # fmt: skip
IN_PROCESSES = ["with_ddp", "with_deepspeed", "with_fsdp2", "with_pipeline_stages",
                "with_tensor_parallel"]  # fmt: skip
ALONE = sorted({f.stem for f in EXAMPLES.glob("with_*.py")} - {*IN_PROCESSES})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",  # tests/frontend/test_tools.py does in every run what the others do
    [pytest.param(n, marks=[] if n == "with_trainer" else [pytest.mark.sweep]) for n in ALONE],
)
def test_example(name, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(name, "accelerate"))
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    if name == "with_trainer":
        assert "['expert0', 'second'] [True, True]" in capsys.readouterr().out


@pytest.mark.sweep
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_example_in_two_processes(name):
    pytest.importorskip(NEEDS.get(name, "accelerate"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", EXAMPLES / f"{name}.py"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss" in done.stdout


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALONE)
def test_example_as_a_notebook(name, monkeypatch):
    pytest.importorskip(NEEDS.get(name, "accelerate"))
    jupytext, nbclient = map(pytest.importorskip, ("jupytext", "nbclient"))
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]))
    notebook = jupytext.read(EXAMPLES / f"{name}.py")
    assert sum(cell.cell_type == "code" for cell in notebook.cells) > 1
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
