"""README.md of a save: what it is, how to load it, and the report of the conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...utils.atomic_files import replace_file

CARD = "README.md"
MARK = "<!-- written by moe_rewrite: delete this line to keep your own text -->"


def write_card(moe: Any, folder: Path) -> None:
    """Write the card, unless a README.md is there that another wrote."""
    path = folder / CARD
    if not path.exists() or MARK in path.read_text(errors="replace"):
        replace_file(path, card(moe).encode())


def card(moe: Any) -> str:
    base = getattr(moe.config, "_name_or_path", "") or ""
    facts = ["library_name: moe_rewrite", "tags: [moe_rewrite, mixture-of-experts]"]
    if base and not Path(base).exists():
        facts.insert(0, f"base_model: {base}")
    flags = zip(moe.names, moe.trained, moe.router.active.tolist(), strict=True)
    rows = [
        f"| {name} | {'yes' if trained else 'no'} | {'yes' if on else 'no'} |"
        for name, trained, on in flags
    ]
    report = str(replace(moe.report, seconds={}))
    return "\n".join([
        "---", *facts, "---", "", MARK, "",
        f"# Experts for {base or moe.report.model}", "",
        "A mixture of experts that moe_rewrite made of a dense model. These files hold what was added; "
        "the dense model comes from its own.", "",
        "```python", "import moe_rewrite", "",
        f"moe = moe_rewrite.load(folder, model)  # model: the dense {moe.report.model}", "```", "",
        "| expert | trained | on |", "| --- | --- | --- |", *rows, "",
        "```", report.strip(), "```", "",
    ])  # fmt: skip
