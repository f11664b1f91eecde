"""convert(): capture -> depth -> split -> freeze -> route -> insert experts -> emit -> verify."""

from __future__ import annotations

from typing import Any

from torch import nn

from .capture import as_arguments, is_hf, make_host
from .compiler import Compiler
from .config import LoRAExperts, TokenRouter, make_recipe
from .depth import DepthMap
from .errors import ConfigError, ConversionError
from .model import MoEModel
from .passes.emit import emit
from .program import Program, value
from .report import Report
from .verify import is_causal, verify_conversion


def inspect(model: nn.Module, example_inputs: Any = None) -> DepthMap:
    """The blocks of a model, where it can be cut, with parameters and FLOPs. Prints as a table.

    example_inputs: a tensor, tuple or dict; found by itself for Hugging Face models and where the
    first layer tells. Raises InputError where they cannot be inferred, CaptureError where the
    model cannot be captured.
    """
    _require_dense(model)
    arguments = _without_cache(model, as_arguments(model, example_inputs))
    compiler = Compiler(make_host(model), make_recipe())
    from .depth import analyse

    return analyse(compiler.dense(arguments, "eval"), type(model).__name__)


def convert(
    model: nn.Module,
    mode: str = "pmoe",
    split: int | float | str = "auto",
    router: str | TokenRouter = "auto",
    experts: LoRAExperts | None = None,
    num_experts: int | None = None,
    example_inputs: Any = None,
    backend: str = "auto",
    verify: bool = True,
    dry_run: bool = False,
    batch_norm: str = "frozen",
) -> MoEModel | Report:
    """Convert a dense model to a mixture of experts that computes the same until it is trained.

    mode: ``"pmoe"``, progressive experts behind one router at the cut.
    split: block index, negative index, fraction of FLOPs, dotted name of the first deep module, or
        ``"auto"``. Blocks 0..split-1 are frozen and shallow.
    router: ``"auto"`` (prefix gate for causal models, else sequence gate), ``"token"`` or a
        TokenRouter. experts: LoRAExperts. num_experts: experts to begin with; None is one.
    example_inputs: see `inspect`. verify: run the converted graphs against the model.
    dry_run: return the Report only. batch_norm: ``"frozen"`` keeps statistics in training,
        ``"update"`` trains as the original does.

    The model itself is never changed and no weight is copied. Raises ConfigError, InputError,
    CaptureError, SplitError, ConversionError or EquivalenceError; nothing is left half done.
    """
    recipe = make_recipe(mode, split, router, experts, num_experts, backend, batch_norm)
    _require_dense(model)
    arguments = _without_cache(model, as_arguments(model, example_inputs))
    compiler = Compiler(make_host(model), recipe)
    program = compiler.decide(arguments, lambda p: _choose_router(compiler, p, arguments))
    report = Report.of(program, compiler)
    if dry_run:
        return report
    emitted = compiler.timed("emit", emit, program)
    moe = MoEModel(model, compiler, program, emitted, report, checked=verify)
    moe.adopt(arguments, program, emitted)
    if verify:
        report.equivalence = compiler.timed("verify", verify_conversion, moe, arguments)
    return moe


def _require_dense(model: object) -> None:
    if isinstance(model, MoEModel):
        raise ConversionError(
            "this model is converted already: call expand() for more experts, or convert "
            "model.to_dense() anew"
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: expected a torch.nn.Module")


def _without_cache(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The conversion's own graphs keep no key-value cache; those of generate() come when asked."""
    if is_hf(model):
        from .hf import CACHE, is_causal_lm

        if is_causal_lm(model):
            return {k: v for k, v in arguments.items() if k != CACHE} | {"use_cache": False}
    return arguments


def _choose_router(compiler: Compiler, program: Program, arguments: dict[str, Any]) -> TokenRouter:
    """The recipe's router, or the one that fits what the cut carries."""
    spec = compiler.recipe.router
    assert program.cut is not None
    features = value(program.node(program.cut.node))
    sequence = features.ndim == 3
    causal = sequence and is_causal(compiler.host, arguments)
    if spec is None:
        return TokenRouter(granularity="prefix" if causal else "sequence")
    if causal and spec.granularity == "sequence":
        raise ConfigError(
            "TokenRouter granularity='sequence': the model is causal, and a mean over the whole "
            "sequence would look ahead; use 'prefix' or 'token'"
        )
    if features.ndim == 4 and spec.granularity != "sequence":
        raise ConfigError(
            f"TokenRouter granularity={spec.granularity!r}: the cut carries a feature map "
            f"{tuple(map(str, features.shape))}, for which only 'sequence' (one gate per sample) "
            "is there"
        )
    return spec
