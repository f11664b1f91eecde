"""What a user can do about a model that torch.export does not capture."""

from __future__ import annotations

import re

RETURNED = re.compile(r"Found <class '(?:[\w.]*\.)?(\w+)'> in output, which is not a known type")
OF_VALUES = ("data-dependent", "DataDependent", ".item()")


def advice(error: Exception) -> tuple[str, str]:
    """(the reason in one line, what to do)."""
    text = str(error).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if found := RETURNED.search(text):
        kind = found.group(1)
        return f"its forward returns a {kind}, whose tensors torch.export does not find", (
            f"Register the class (torch.export.register_dataclass({kind})), or return tensors, "
            "tuples or dicts"
        )
    if any(word in reason for word in OF_VALUES):
        return reason, (
            "A forward whose sizes or Python control flow depends on tensor values cannot be "
            "captured: use torch.where or a mask"
        )
    return reason, (
        "Check that these inputs run through the model; a forward whose Python control flow depends "
        "on tensor values cannot be captured"
    )
