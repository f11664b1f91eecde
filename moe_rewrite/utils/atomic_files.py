"""Write files atomically."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Write to a temporary file in the same folder, flush it to the disk, and rename it."""
    descriptor, fresh = tempfile.mkstemp(prefix=".moe_rewrite-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(fresh, 0o644)
        os.replace(fresh, path)
    except BaseException:
        Path(fresh).unlink(missing_ok=True)
        raise


def link_file(path: Path, name: Path) -> None:
    """Give a file a second name, atomically; a copy where the file system has no hard links."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        os.link(path, fresh)
    except OSError:
        replace_file(name, path.read_bytes())
        return
    try:
        os.replace(fresh, name)
    finally:
        fresh.unlink(missing_ok=True)  # which replacing leaves, where both are one file already


def write_json(path: Path, facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(facts, indent=1) + "\n").encode())


def write_figure(path: Path, figure: Any, dpi: int = 110) -> None:
    """Save a matplotlib figure in the format of the file's ending, and close it."""
    import io

    from matplotlib import pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:] or "png", dpi=dpi)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, drawn.getvalue())
