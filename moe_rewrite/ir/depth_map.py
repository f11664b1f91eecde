"""The depth of a model: its blocks in order, and where a split cuts them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import SplitError
from ..utils.html_tables import bar, html_table
from ..utils.text_tables import count, table
from .split_curve import SplitCurve

COLUMNS = ["block", "name", "output", "parameters", "FLOPs", "share"]


@dataclass(frozen=True)
class Block:
    """The part of the graph between two cut points.

    name: of the module, or modules, that it holds.
    exit: name of its last mainline node, a cut point (for the head, the output).
    shape: shape of the exit's value, with names for symbolic sizes.
    params: elements of the weights that are first used here.
    flops: for one sample, two per multiply-add.
    first, last: positions of its first and last node in the graph.
    """

    name: str
    exit: str
    shape: tuple[str, ...]
    params: int
    flops: int
    first: int
    last: int


@dataclass(frozen=True)
class DepthMap:
    """The blocks of a model, in order. ``print(depth)`` shows them as a table.

    model: class of the model.
    stem, head: the graph before the first and after the last block, or None.
    blocks: the others, which a split counts.
    points: (graph position, node name) of every cut point.
    starts: graph position where each module's mainline begins.
    stack: dotted name of the stack (encoder, decoder) that was analysed, if there are several.
    must_name: no stack is fed by all others, so a split has to name a module.
    only: there is one mainline, so that a split by name finds the same blocks.
    source: name of the only input if it holds features itself (an image), so that a cut before
        the first block is possible; else None.
    lengths: (name, value) of the symbolic sizes except the batch, at which FLOPs are counted.
    curve: how well tasks are told apart at each cut, where that was measured; else None.
    """

    model: str
    stem: Block | None
    blocks: tuple[Block, ...]
    head: Block | None
    points: tuple[tuple[int, str], ...]
    starts: dict[str, int]
    stack: str | None = None
    source: str | None = None
    lengths: tuple[tuple[str, int], ...] = ()
    must_name: bool = False
    only: bool = False
    curve: SplitCurve | None = None

    def measured(self, curve: SplitCurve | None) -> DepthMap:
        """This map with a curve, from which ``"auto"`` follows. Raises SplitError for the curve of
        other blocks."""
        names = [block.name for block in self.blocks]
        if curve is not None and [point.label for point in curve.points] != names:
            raise SplitError(
                "calibration: these batches have other blocks than the example; pass example_inputs "
                f"in the form of the calibration batches. The example's blocks:\n{self}"
            )
        return replace(self, curve=curve)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        rows = [(*row, f"{100 * share:.1f}%") for *row, share in self._rows()]
        shown = table(COLUMNS, rows, self._title())
        return shown if self.curve is None else f"{shown}\n{self.curve}"

    def _repr_html_(self) -> str:
        """For notebooks: the table, without script."""
        rows = [(*row, bar(share)) for *row, share in self._rows()]
        shown = html_table(COLUMNS, rows, self._title())
        return shown if self.curve is None else shown + self.curve._repr_html_()

    def _rows(self) -> list[tuple[str, str, str, str, str, float]]:
        total = sum(b.flops for b in self.parts) or 1
        indices = {id(b): str(i) for i, b in enumerate(self.blocks)}
        return [
            (indices.get(id(b), ""), b.name, " x ".join(b.shape), count(b.params), count(b.flops),
             b.flops / total)
            for b in self.parts
        ]  # fmt: skip

    def _title(self) -> str:
        title = f"{self.model}: {len(self)} block{'s' if len(self) != 1 else ''}"
        if self.stack:
            title += f" of {self.stack} (to split in another stack, name a module of it)"
        return title + "; FLOPs of one sample" + ", ".join(f" of {w} {n}" for w, n in self.lengths)

    @property
    def parts(self) -> tuple[Block, ...]:
        """Stem, blocks and head, without those that are None."""
        return tuple(b for b in (self.stem, *self.blocks, self.head) if b is not None)

    def resolve(self, split: int | float | str) -> tuple[int, str]:
        """(index of the first deep block, name of the cut node) for a user's `split`.

        split: block index, negative index, fraction of FLOPs between 0 and 1, dotted name of the
        first deep module, or ``"auto"`` (by the curve, else half of the FLOPs). Raises SplitError,
        with this map.
        """
        n = len(self.blocks)
        if isinstance(split, str) and split != "auto":
            return self._resolve_name(split)
        if isinstance(split, bool) or not isinstance(split, (int, float, str)):
            raise self._error(split, "a block index, a fraction of FLOPs, a module name or 'auto'")
        if not n:
            raise self._error(split, "a model with blocks: no cut point lies between its weights")
        if split == "auto" and self.curve is not None:
            split = self.curve.split
        if isinstance(split, int):
            index = split + n if split < 0 else split
            if not 0 <= index < n:
                raise self._error(split, f"an index from {-n} to {n - 1}")
        else:
            fraction = 0.5 if isinstance(split, str) else split
            if not 0 < fraction < 1:
                raise self._error(split, "a fraction between 0 and 1, both excluded")
            index = self._by_flops(fraction)
        return index, self._exit_before(index, split)

    def _by_flops(self, fraction: float) -> int:
        """The block whose beginning is nearest to this fraction of the blocks' FLOPs."""
        goal = fraction * sum(b.flops for b in self.blocks)
        done, ends = 0, []
        for block in self.blocks[:-1]:
            done += block.flops
            ends.append(abs(done - goal))
        return 1 + ends.index(min(ends)) if ends else 0

    def _exit_before(self, index: int, split: object) -> str:
        before = self.blocks[index - 1] if index else self.stem
        if before is None and self.source is not None:
            return self.source
        if before is None or before.exit not in {name for _, name in self.points}:
            raise self._error(split, "a later block: nothing with features lies before this one")
        return before.exit

    def _resolve_name(self, name: str) -> tuple[int, str]:
        start = self.starts.get(name)
        if start is None:
            raise self._error(name, "the dotted name of a module that the graph runs")
        before = [(at, node) for at, node in self.points if at < start]
        if not before and self.source is not None:
            return 0, self.source
        if not before:
            raise self._error(name, "a later module: no cut point lies before this one")
        at, node = before[-1]
        index = sum(b.last <= at for b in self.blocks)
        if index >= len(self.blocks):
            raise self._error(name, "a module inside the blocks: this one comes after them")
        return index, node

    def _error(self, split: object, expected: str) -> SplitError:
        return SplitError(f"split={split!r}: expected {expected}. The model's blocks:\n{self}")
