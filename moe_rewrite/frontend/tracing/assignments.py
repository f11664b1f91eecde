"""Tensors in attributes that forward() replaces while it is traced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import CaptureError

# torch.export restores such attributes, and says which there were only in this warning
ASSIGNED = re.compile("assigned during export")


@contextmanager
def recorded_assignments() -> Iterator[set[str]]:
    """Yields a set that then holds the dotted names of these attributes; other warnings pass."""
    names: set[str] = set()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield names
    for warning in said:
        text = str(warning.message)
        if ASSIGNED.search(text):
            names.update(re.findall(r"self\.([\w.]*\w)", text.partition("https:")[0]))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def require_no_state(exported: Any, assigned: set[str]) -> None:
    """Raise CaptureError if the graph reads a tensor that its own run puts another in place of."""
    by_name = {n.name: n for n in exported.graph.find_nodes(op="placeholder")}
    specs = exported.graph_signature.input_specs
    read = {s.target for s in specs if s.target in assigned and by_name[s.arg.name].users}
    if read:
        raise CaptureError(
            f"forward() reads the tensors {', '.join(sorted(read))} and replaces them: register "
            "them as buffers (register_buffer), so that they are part of the model's state"
        )
