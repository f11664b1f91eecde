"""Write the page of a dense model, or of a converted one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...config import FFNExperts, LoRAExperts, RegionExperts
from ...errors import ConfigError, InputError
from ...frontend.choose_host import host_of
from ...frontend.host import Host
from ...frontend.weights.structural_copy import structural_copy
from ...ir.depth_map import DepthMap
from ...ir.split_curve import SplitCurve
from ...passes.possible_splits import possible_splits
from ...passes.recipe import make_recipe
from ...utils.atomic_files import replace_file
from ...utils.text_tables import count
from .facts import page_facts
from .routing import routing_facts

HERE = Path(__file__).parent


def write_dense_page(
    path: str | os.PathLike, model: nn.Module, example_inputs: Any, split: int | float | str,
    curve: SplitCurve | None,
) -> DepthMap:  # fmt: skip
    """The page of a model that is not converted: for each split, sites of the three kinds of
    experts. Arguments and errors as for `moe_rewrite.inspect`."""
    target = _target(path)
    host = host_of(structural_copy(model))
    kinds = LoRAExperts(), FFNExperts(), RegionExperts()
    recipes = [make_recipe(split=split, experts=experts) for experts in kinds]
    depth, splits = possible_splits(host, recipes, host.arguments(example_inputs))
    depth = depth.measured(curve)
    start = depth.resolve(split)[0] if splits else 0
    write_page(target, page_facts(depth, splits, start, curve=curve))
    return depth


def write_model_page(
    path: str | os.PathLike, moe: Any, report: Any, inputs: Any, tokens: Sequence[str] | None,
    run: dict[str, Any] | None,
) -> None:  # fmt: skip
    """The page of a converted model. Arguments and errors as for `Report.html`."""
    target = _target(path)
    compiler = moe._compiler
    depth, splits = possible_splits(moe.host, [compiler.recipe], _arguments(moe.host, inputs))
    index, cut = depth.resolve(compiler.decisions.split)
    token_map = next((s.token_map for s in splits if s.token_map), None)
    routing = None if inputs is None else routing_facts(moe, inputs, tokens, token_map)
    converted = {
        "split": index,
        "inside": bool(splits) and splits[index].cut != report.cut,
        "facts": [[k, text] for k, text in report.facts() if k != "seconds"],
        "experts": moe.names,
    }
    facts = page_facts(depth, splits, index, converted, routing, run, report.curve)
    write_page(target, facts)


def write_page(target: Path, facts: dict[str, Any]) -> None:
    """One file that needs no other, replaced atomically. Raises ConfigError if it cannot be
    written."""
    text = render(facts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, text.encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error}): name another file") from None


def render(facts: dict[str, Any]) -> str:
    """The page's HTML. Texts are escaped; the facts stand in it as JSON."""
    import jinja2
    from markupsafe import Markup

    def inlined(name: str) -> Markup:
        return Markup((HERE / name).read_text())

    loader = jinja2.FileSystemLoader(HERE)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template("page.html").render(facts=facts, inlined=inlined, count=count)


def _target(path: str | os.PathLike) -> Path:
    """Asked for before the model is looked at, which can take long."""
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder: expected the name of a file, like page.html")
    return target


def _arguments(host: Host, inputs: Any) -> dict[str, Any]:
    """Of an example call: inferred, or else the inputs whose routing is shown."""
    try:
        return host.arguments(None)
    except InputError as error:
        if inputs is None:
            raise InputError(f"{error}. Here: html(path, inputs=...)") from None
        return host.arguments(inputs)
