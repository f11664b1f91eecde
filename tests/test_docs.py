"""Python code in README and docs/ runs as a reader would run it, and prints what the page says."""

import re

import pytest
import torch

pytest.importorskip("transformers")
from pages_code import PAGES, ROOT, blocks, given

import moe_rewrite
from moe_rewrite import continual

# pages whose code takes more than a few seconds of a core, or processes of its own
HEAVY = {"docs/continual.md", "docs/many_gpus.md", "docs/onnx.md"}
NEEDS = {
    "docs/continual.md": "accelerate", "docs/migration.md": "peft", "docs/onnx.md": "onnxruntime",
    "docs/training.md": "accelerate",
}  # fmt: skip
WITH_CODE = [page for page in PAGES if blocks(page)]
REFERENCE = "\n".join((ROOT / page).read_text() for page in PAGES if "/reference/" in page)
# methods of a converted model that its own parts call
PARTS = {
    "adopt", "after_loading", "bound", "expert_sites", "graph_for", "host", "learning_planner",
    "normalized", "restore", "save_only_added", "saved_tensors", "settle_router",
    "activation_checkpointing_disable", "activation_checkpointing_enable",
    "is_activation_checkpointing",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.sweep] if p in HEAVY else []) for p in WITH_CODE],
)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(page, "transformers"))
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)  # as torchrun sets them
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.manual_seed(0)
    names = {"__name__": "__main__", **given(tmp_path)}
    for block in filter(lambda b: b.runs, blocks(page)):
        capsys.readouterr()
        block.execute(names)
        if block.prints is not None:
            assert capsys.readouterr().out.strip() == block.prints.strip(), f"{page}:{block.line}"


def test_all_code_runs():
    """But for those that say in their title why they do not."""
    found = [b for page in PAGES for b in blocks(page)]
    assert len(found) >= 15
    assert [b.page for b in found if not b.runs] == ["docs/serve.md"]  # vLLM


def test_reference_has_every_public_name():
    described = set(re.findall(r"^::: \S+?(\w+)$", REFERENCE, re.M))
    methods = {
        name for cls in moe_rewrite.MoEModel.__mro__ if cls.__module__.startswith("moe_rewrite")
        for name in vars(cls) if not name.startswith("_")
    } - set(dir(torch.nn.Module))  # fmt: skip
    assert set(moe_rewrite.__all__) - {"MoeRewriteError"} <= described  # errors are one block
    assert set(continual.__all__) <= described
    assert methods - PARTS <= described
    assert not described & PARTS
