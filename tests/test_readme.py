"""README's headline figures are those of benchmarks/results, and what it links to is there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def trace():
    methods = results("trace")["methods"]
    return [f"{methods[m]['loss']['mean']:.3f}" for m in ("pmoe", "replay", "lora", "oracle")]


def split_digits():
    methods = results("split_digits")["methods"]
    ours = methods["pmoe"]
    found = ours["last"], methods["ranpac"]["last"], ours["base"], ours["base_before"]
    return [f"{figure['mean']:.3f}" for figure in found]


def regions():
    (cell,) = (m for m in results("regions")["maps"] if (m["size"], m["share"]) == (32, "1/4"))
    return [f"{cell['forward']:.2f}", f"{cell['masked']:.2f}"]


def gpu():
    ms = {(c["shape"], c["form"]): c["ms"] for c in results("gpu")["ffn"]}
    shapes = "T32768 d4096 n2048 E64 k4", "T32768 d4096 n256 E256 k16"
    return [
        f"{ms[shape, 'ours'][part] / ms[shape, 'F.grouped_mm'][part]:.2f}"
        for part in ("forward", "both")
        for shape in shapes
    ]


def onnx_memory():
    cells = results("onnx_memory")["cells"]
    ours, torch = cells["LoRA, 400MB"], cells["dense, torch.onnx.export, 400MB"]
    return [f"{ours['weights_mb']:.0f} MB", f"{ours['ratio']:.2f}", f"{torch['ratio']:.2f}"]


FIGURES = {
    "papers.trace": trace, "papers.split_digits": split_digits, "speed.regions": regions,
    "speed.gpu": gpu, "speed.onnx_memory": onnx_memory,
}  # fmt: skip


@pytest.mark.parametrize("command", FIGURES)
def test_a_figure_is_that_of_its_results(command):
    (row,) = re.findall(
        rf"^\| (.*) \| `python -m benchmarks\.{re.escape(command)}` \|", README, re.M
    )
    at = 0
    for figure in FIGURES[command]():
        assert figure in row[at:], f"{command}: expected {figure} in {row[at:]!r}"
        at = row.index(figure, at) + len(figure)


def test_every_figure_is_tested():
    table = README.partition("## Five figures")[2].partition("\n## ")[0]
    assert set(re.findall(r"python -m benchmarks\.([\w.]+)", table)) == set(FIGURES)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])  # fmt: skip
def test_links_lead_somewhere(file):
    """Files, and headings in them as GitHub names these."""
    path = ROOT / file
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        to = (path.parent / name) if name else path
        assert to.exists(), f"{file}: {target}"
        if heading:
            lines = re.findall(r"^#+ (.*)$", to.read_text(), re.M)
            known = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
            assert heading in known, f"{file}: {target}, of {sorted(known)}"
