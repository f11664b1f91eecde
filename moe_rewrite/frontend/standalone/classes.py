"""The modelling file of a folder, and the classes in it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.models.auto import modeling_auto

from ...errors import ConversionError
from . import modeling

FILE = "modeling_moe_rewrite.py"
CONFIG = "RoutedConfig"


def file_text(model: Any) -> str:
    """The text of `modeling`, and the classes that belong to a dense model's."""
    base, head = _base(model), type(model)
    config = type(model.config)
    lines = [
        f"from {kind.__module__} import {kind.__name__}  # noqa: E402"
        for kind in dict.fromkeys((config, base, head))
    ]
    lines += [
        f"\n\nclass {CONFIG}({config.__name__}):",
        f'    model_type = "moe_rewrite_{config.model_type}"',
        f"\n\nclass Routed{base.__name__}(RoutedModel, {base.__name__}):",
        f"    config_class = {CONFIG}",
        f"\n\nAutoModel.register({CONFIG}, Routed{base.__name__}, exist_ok=True)  # heads ask for it",
    ]
    if head is not base:
        lines += [
            f"\n\nclass Routed{head.__name__}(RoutedHead, {head.__name__}):",
            f"    config_class = {CONFIG}",
            f"    routed = Routed{base.__name__}",
        ]
    return inspect.getsource(modeling) + "\n\n" + "\n".join(lines) + "\n"


def _base(model: Any) -> type:
    return type(model.base_model)


def auto_map(model: Any) -> dict[str, str]:
    """transformers' auto classes -> the classes of the file that they load. Raises ConversionError
    for a model of a class that none of them loads."""
    at = Path(FILE).stem
    kind, found = type(model).__name__, {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        of_type = getattr(mapping, "_model_mapping", {}).get(model.config.model_type, ())
        if kind == of_type or kind in of_type and not isinstance(of_type, str):
            found[name] = f"{at}.Routed{kind}"
    if not found:
        raise ConversionError(
            f"save_pretrained(standalone=True): no auto class of transformers loads {kind}, so none "
            "would load the folder: convert a model of one of transformers' own classes"
        )
    base = f"{at}.Routed{_base(model).__name__}"
    return {"AutoConfig": f"{at}.{CONFIG}", **found, "AutoModel": base}


@contextmanager
def imported(text: str) -> Iterator[ModuleType]:
    """The file as a module while within; transformers reads its classes' source."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / FILE
        path.write_text(text)
        name = f"{path.stem}_{id(path)}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[name]
            modeling_auto.MODEL_MAPPING._extra_content.pop(vars(module).get(CONFIG), None)
