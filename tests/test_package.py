"""The package from outside: import cost, no shadowing, the command line."""

import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import median

from typer.testing import CliRunner

from moe_rewrite.cli.main import app

ROOT = Path(__file__).parent.parent


def run(code, cwd=ROOT, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_help_needs_no_torch():
    for command in ([], ["convert"], ["learn"], ["demo"]):
        code = (
            f"import sys; from moe_rewrite.cli.main import app; app({[*command, '--help']}, "
            "standalone_mode=False); print('torch' in sys.modules)"
        )
        assert run(code).splitlines()[-1] == "False"


def test_names_that_come_later_are_there():
    code = (
        "import moe_rewrite; assert {*moe_rewrite.__all__, 'onnx'} <= {*dir(moe_rewrite)}; "
        "print([getattr(moe_rewrite, name).__name__ for name in moe_rewrite.__all__] == "
        "moe_rewrite.__all__, callable(moe_rewrite.convert), moe_rewrite.onnx.__name__)"
    )
    assert run(code) == "True True moe_rewrite.onnx"


def test_use_is_light():
    """Against PyTorch's own import in the same process, so that no machine's speed decides."""
    code = (
        "import sys, time; t = time.process_time(); import torch; u = time.process_time(); "
        "import moe_rewrite; moe_rewrite.MoEModel; print((time.process_time() - u) / (u - t), 'triton' in sys.modules, "
        "'transformers' in sys.modules, torch.cuda.is_initialized())"
    )
    share, *loaded = run(code).split()
    assert loaded == ["False"] * 3
    shares = [float(share), *(float(run(code).split()[0]) for _ in range(2))]
    assert median(shares) < 0.4


def test_root_links_shadow_nothing(tmp_path):
    """A package `kernels` that is installed wins over the folder link at the root."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("real = True")
    assert run("import kernels; print(kernels.real)", PYTHONPATH=str(tmp_path)) == "True"
    for name in ("kernels", "passes", "models"):
        assert (ROOT / name).resolve() == ROOT / "moe_rewrite" / name
        assert not (ROOT / name / "__init__.py").exists()


def test_every_file_is_linted():
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    seen = {Path(name) for name in shown if name.endswith(".py")}
    for folder in ("moe_rewrite", "tests", "benchmarks"):
        assert set((ROOT / folder).rglob("*.py")) <= seen


def test_files_that_are_no_code_are_installed():
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (patterns,) = facts["tool"]["setuptools"]["package-data"].values()
    package = ROOT / "moe_rewrite"
    installed = {file for pattern in patterns for file in package.glob(pattern)}
    files = {f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert {f for f in files if f.suffix != ".py"} == installed - {f for f in files if f.suffix == ".py"}  # fmt: skip


def test_command_line():
    runner = CliRunner()
    for command in ([], ["inspect"], ["convert"], ["demo"]):
        assert runner.invoke(app, [*command, "--help"]).exit_code == 0
    result = runner.invoke(app, ["inspect", "factories:mlp"])
    assert result.exit_code == 0 and "blocks" in result.output
    done = runner.invoke(app, ["convert", "no.such:thing"])
    assert done.exit_code == 1 and "no.such" in str(done.exception)
