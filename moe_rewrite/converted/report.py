"""The report of a conversion: what was converted, what was not and why."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError, InputError
from ..ir.conditions import conditions_of
from ..ir.sites import Macs
from ..passes.kinds import kind_of
from ..utils.html_tables import folded, html_table
from ..utils.text_tables import table
from ..utils.warn import warn
from . import low_precision, offloading

if TYPE_CHECKING:
    from ..ir.equivalence import EquivalenceReport
    from ..ir.program import Numerics, Program
    from ..ir.split_curve import SplitCurve
    from ..passes.pipeline import Compiler


@dataclass
class Report:
    """The report of one conversion. ``print(report)`` shows it as tables.

    model: class of the original.
    mode: ``"pmoe"``, ``"upcycle"`` or ``"carve"``.
    split: the first deep block, by index and name.
    cut: graph node whose value the router reads.
    router: the router that was chosen, with its options.
    sites: (name, input features, output features) of the converted sites.
    rejected: (name, reason) of the others.
    conditions: on the sizes of a call, for the first graph; other calls get other graphs.
    numerics: (pass, ``"exact"``, ``"reordered"`` or ``"approximate"``).
    seconds: time spent, by pass.
    notes: what the user should know.
    macs_of: multiply-adds of each region and of the experts that replace it, by site; of kinds
        that count them.
    experts: the experts at a site, as text.
    precision: of experts after `quantize_experts`, as text; empty before.
    placement: where experts lie after `offload_experts`, as text; empty before.
    lowered: (site, how it is computed).
    equivalence: the comparison with the original; None where there was none.
    curve: how well tasks are told apart at each possible cut; None where that was not measured.
    """

    model: str
    mode: str
    split: str
    cut: str
    router: str
    sites: list[tuple[str, Any, Any]]
    rejected: list[tuple[str, str]]
    conditions: list[str]
    numerics: list[tuple[str, Numerics]]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    macs_of: dict[str, Macs] = field(default_factory=dict)
    experts: str = ""
    precision: str = ""
    placement: str = ""
    lowered: list[tuple[str, str]] = field(default_factory=list)
    equivalence: EquivalenceReport | None = None
    curve: SplitCurve | None = None
    _model: weakref.ref | None = field(default=None, init=False, repr=False, compare=False)

    @staticmethod
    def of(program: Program, compiler: Compiler, curve: SplitCurve | None = None) -> Report:
        """Raises ConversionError where the cut is before another block than the one that the curve
        chose."""
        assert program.cut is not None
        if curve is not None and curve.chosen.label != program.cut.label:
            raise ConversionError(
                f"calibration chose block {curve.split} ({curve.chosen.label}), which is "
                f"{program.cut.label} in the graph of the example: pass example_inputs in the form of "
                "the calibration batches"
            )
        recipe, decisions = compiler.recipe, compiler.decisions
        kind = kind_of(recipe.experts)
        macs = {s.name: kind.macs(s, recipe, decisions.chosen) for s in program.sites}
        compiler.notes += _of_quantized(program)
        compiler.notes += kind.notes(program.sites)
        return Report(
            model=program.model,
            mode=recipe.mode,
            split=f"block {program.cut.index} ({program.cut.label})",
            cut=program.cut.node,
            router=kind.router_words(recipe, decisions.chosen),
            sites=[(s.name, s.in_features, s.out_features) for s in program.sites],
            rejected=[(r.name, r.reason) for r in decisions.rejected],
            conditions=conditions_of(program.leaves(), program.relations, program.values).texts,
            numerics=list(program.numerics),
            seconds=compiler.timed.seconds,
            notes=compiler.notes,
            macs_of={name: m for name, m in macs.items() if m is not None},
            experts=kind.words(recipe),
            lowered=list(program.lowered),
            curve=curve,
        )

    @property
    def macs(self) -> Macs | None:
        """The sum of `macs_of`; None without a region."""
        each = list(self.macs_of.values())
        return sum(each[1:], each[0]) if each else None

    def warn_of_costs(self, advice: str) -> None:
        """Warn where the experts take more multiply-adds than the region that they replace, unless a
        kind, which gives no advice then, always does."""
        if not advice or self.macs is None or self.macs.routed <= self.macs.dense:
            return
        note = f"the experts take {self.macs}: {advice}"
        self.notes.append(note)
        warn(note)

    def _how(self) -> list[tuple[str, ...]]:
        """Rows of the table: sites that are computed in the same way share one."""
        same: dict[str, list[str]] = {}
        for name, how in self.lowered:
            same.setdefault(how, []).append(name)
        return [
            (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", how)
            for how, names in same.items()
        ]

    def _done(self, site: str) -> str:
        macs = self.macs_of.get(site)
        return self.experts if macs is None else f"{self.experts}: {macs}"

    def facts(self) -> list[tuple[str, ...]]:
        """(name, text) of what holds for the whole conversion."""
        return [
            ("model", self.model), ("mode", self.mode), ("deep from", self.split),
            ("router", self.router),
            *(("experts", text) for text in (self.precision, self.placement) if text),
            *(("condition", c) for c in self.conditions),
            ("equivalence", str(self.equivalence or "not checked")),
            ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items())),
            *(("note", n) for n in self.notes),
        ]  # fmt: skip

    def _tables(self) -> list[tuple[list[str], list[tuple[str, ...]]]]:
        """(columns, rows) of each."""
        rows: list[tuple[str, ...]] = [(n, f"{i} -> {o}", self._done(n)) for n, i, o in self.sites]
        rows += [(n, "", f"rejected: {r}") for n, r in self.rejected]
        how = [(["sites", "how they are computed"], self._how())] if self.lowered else []
        first = (["conversion", ""], self.facts())
        return [first, (["site", "size", "what was done"], rows), *how]

    def __str__(self) -> str:
        tables = [table(columns, rows) for columns, rows in self._tables()]
        return "\n".join([*tables, *([] if self.curve is None else [str(self.curve)])])

    def _repr_html_(self) -> str:
        """For notebooks: tables without script, the long one folded."""
        first, *others = (html_table(columns, rows) for columns, rows in self._tables())
        title = f"{len(self.sites)} sites converted, {len(self.rejected)} not"
        curve = "" if self.curve is None else self.curve._repr_html_()
        return first + curve + folded(title, "".join(others))

    def html(
        self, path: str | os.PathLike, inputs: Any = None, tokens: Sequence[str] | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a page to look at: one file that needs no network. It shows the blocks along the
        depth and, for every split at a block, what lands on each side, what crosses the cut, and
        which sites take experts or why not.

        path: of the file, which is replaced atomically.
        inputs: a tensor, tuple or dict of tensors with a batch dimension first; the page then shows
            the routing of the first sample. It serves as an example call too where none can be
            inferred.
        tokens: texts of the rows of the first sample; None: their numbers.
        run: the shares of experts over a run, from `continual.expert_shares`.

        Raises ConfigError for a path that cannot be written, InputError for a report whose model
        is gone (a dry run has none), inputs that the model does not take, or another number of
        texts than of rows.
        """
        from .page.write import write_model_page

        moe = self._model and self._model()
        if moe is None:
            raise InputError(
                f"the page of {self.model}: the converted model of this report is gone, or it was a "
                "dry run; use moe_rewrite.inspect(model, html=path), or moe.report.html(path)"
            )
        write_model_page(path, moe, self, inputs, tokens, run)

    def of_model(self, moe: Any) -> Report:
        """This report, which from now on knows its model, but does not keep it alive."""
        self._model = weakref.ref(moe)
        self.precision = low_precision.described(moe.expert_sites())
        self.placement = offloading.described(moe)
        numerics: tuple[str, Numerics] = ("quantize experts", "approximate")
        if self.precision and numerics not in self.numerics:
            self.numerics.append(numerics)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}


def _of_quantized(program: Program) -> list[str]:
    schemes = [i.scheme.partition("(")[0] for i in program.inputs.values() if i.scheme]
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(schemes).items())
    said = "frozen; experts are added to the products that their library computes"
    return [f"quantised weights ({counts}): {said}"] if schemes else []
