"""Everything that is checked of one seed."""

import copy
import re
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field

import torch

import moe_rewrite
from moe_rewrite import MoeRewriteError
from moe_rewrite.errors import EquivalenceError, InvariantError

from .compare import Snapshot, cloned, differing, lowest
from .experts import randomize, synced, wrong_experts
from .modules import build
from .options import options
from .reference import NotFollowed
from .training import wrong_step, wrong_training

# blocks whose outputs jump where a value passes another
JUMPS = {"depends_on_data", "looked_up", "mixed_positions", "scattered"}


class Wrong(Exception):
    """A result that is not the dense model's or the reference's."""


@dataclass
class Outcome:
    """kind: "right", "refused", "wrong" or "raw". error: the class of a refusal. notes: what was
    refused or not followed on the way to a right result."""

    seed: int
    kind: str = "right"
    error: str = ""
    detail: str = ""
    about: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self):
        return asdict(self)


def check(seed: int) -> Outcome:
    """One module, one set of options, and all that follows; never raises."""
    outcome, start = Outcome(seed), time.perf_counter()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        Run(seed, outcome).all()
    except Wrong as wrong:
        outcome.kind, outcome.detail = "wrong", str(wrong)
    except AssertionError as wrong:
        # an InvariantError is one of these: a bug of the package
        outcome.kind = "raw" if isinstance(wrong, InvariantError) else "wrong"
        outcome.error, outcome.detail = type(wrong).__name__, described(wrong)
    except MoeRewriteError as refused:
        outcome.kind, outcome.error, outcome.detail = (
            "refused",
            type(refused).__name__,
            str(refused),
        )
        if isinstance(refused, EquivalenceError) and not of_rounding(outcome.detail):
            outcome.kind = "wrong"  # found out by the package itself, but a wrong graph
        elif len(outcome.detail) < 40:
            outcome.kind = "raw"
    except Exception as error:
        outcome.kind, outcome.error, outcome.detail = "raw", type(error).__name__, described(error)
    outcome.seconds = time.perf_counter() - start
    return outcome


def of_rounding(text):
    """Whether a difference is one that layers make of rounding in float32."""
    found = re.search(r"differs from the original by ([0-9.e+-]+):", text)
    return found is not None and float(found.group(1)) < 1e-3


def described(error):
    """The error, and where it was raised."""
    at, frames = error.__traceback__, []
    while at is not None:
        code = at.tb_frame.f_code
        frames.append(f"{'/'.join(code.co_filename.split('/')[-2:])}:{at.tb_lineno}")
        at = at.tb_next
    return f"{type(error).__name__}: {str(error)[:1500]} ({' '.join(frames[-6:])})"


def running(seed):
    """The first module of this seed that runs itself on its example."""
    for attempt in range(100):
        made = build(seed + 1_000_000 * attempt)
        try:
            with torch.no_grad():
                copy.deepcopy(made.model)(**cloned(made.example))
        except Exception:  # an operator that a dtype lacks, a map too small for its padding
            continue
        return made
    raise AssertionError("no module of this seed runs")


class Run:
    """One seed, step by step."""

    def __init__(self, seed, outcome):
        self.seed, self.outcome, self.notes = seed, outcome, outcome.notes
        self.made = running(seed)
        self.options, self.wrong_options = options(self.made)
        self.model, self.draw = self.made.model, self.made.draw
        self.jumps = {n.partition(":")[2] for n in self.made.names} & JUMPS
        self.outcome.about = (
            f"{self.made.start} {self.made.names} order={self.model.order} "
            f"{'bridge ' if len(self.model.bridges) else ''}form={self.made.form} "
            f"call={self.made.call} {self.options}"
        )

    def all(self):
        before = Snapshot(self.model)
        try:
            self.converted()
        finally:
            changed = before.changed(self.model)
        if changed:
            raise Wrong(f"the user's model: {changed}")

    def converted(self):
        self.moe = moe_rewrite.convert(self.model, example_inputs=self.example(), **self.options)
        if self.wrong_options:
            raise Wrong(f"wrong options were taken: {self.options}")
        self.moe.eval()
        self.is_equal(self.made.example)
        for _ in range(2):
            self.is_equal(self.made.inputs())
        self.expands()
        if self.draw.random() < 0.5:
            self.trains()
        self.fits()
        for arguments in (self.made.example, self.made.inputs()):
            randomize(self.moe, self.seed)
            self.experts_are_right(arguments)
        if self.draw.random() < 0.5:
            self.steps()
        if self.draw.random() < 0.3:
            self.saves()

    def example(self):
        """The example in one of the forms that convert() takes."""
        given = cloned(self.made.example)
        if len(given) == 1:
            return self.draw.choice((given, given["x"], (given["x"],)))
        return given

    def dense(self, arguments):
        """The dense model's output from the converted one's state, or None where it raises."""
        model = synced(self.model, self.moe)
        try:
            with torch.no_grad():
                return model, model(**cloned(arguments))
        except Exception as error:
            self.notes.append(f"dense model: {type(error).__name__}")
            return None

    def call(self, arguments):
        """The converted model's output, or None where it is refused."""
        try:
            with torch.no_grad():
                return (self.moe(**cloned(arguments)),)
        except EquivalenceError:
            raise
        except MoeRewriteError as refused:
            if isinstance(refused, InvariantError):
                raise
            self.notes.append(f"call refused: {type(refused).__name__}: {str(refused)[:300]}")
            return None

    def is_equal(self, arguments):
        """Fresh experts: the dense model's output and what it writes."""
        known = self.dense(arguments)
        if known is None:
            return
        model, want = known
        with self.moe.dense_plan():
            ours = self.call(arguments)
        if ours is None:
            return
        if error := differing(
            want, ours[0], lowest(self.model), floats_only=lowest(self.model) > 1e-2
        ):
            raise Wrong(f"at {shapes(arguments)}: {error}")
        state = self.moe.state_dict()
        for name, tensor in model.state_dict().items():
            if error := differing(tensor, state[name], lowest(self.model)):
                raise Wrong(f"{name} after a call: {error}")

    def expands(self):
        arguments, state = self.made.example, self.written()
        before = self.call(arguments)
        try:
            self.moe.expand(self.draw.choice((1, 2)))
        except MoeRewriteError as refused:
            self.notes.append(f"expand refused: {refused}")
            return
        self.restore(state)
        after = self.call(arguments)
        if before is not None and (error := differing(before[0], after[0], 0.0, exact=True)):
            raise Wrong(f"expand(): {error}")
        if self.draw.random() < 0.5:
            self.moe.remove_last()
        for e in range(self.moe.num_experts):
            if self.draw.random() < 0.8 or self.moe.recipe.router.policy == "patch":
                self.moe.activate(e)

    def written(self):
        return {
            k: v.clone()
            for k, v in self.moe.state_dict().items()
            if not k.startswith("moe_rewrite.")
        }

    def restore(self, state):
        self.moe.load_state_dict(state, strict=False)

    def trains(self):
        self._in_training(
            "training", lambda: wrong_training(self.model, self.moe, self.made.example)
        )

    def _in_training(self, what, find):
        """find: says what is wrong, or "". A refusal is noted."""
        error = ""
        try:
            error = find()
        except NotFollowed as reason:
            self.notes.append(f"{what} not followed: {reason}")
        except MoeRewriteError as refused:
            if isinstance(refused, (EquivalenceError, InvariantError)):
                raise
            self.notes.append(f"{what} refused: {type(refused).__name__}: {str(refused)[:300]}")
        finally:
            self.moe.eval()
        if error:
            raise Wrong(error)

    def fits(self):
        if getattr(self.moe.recipe.router, "fit", "") != "analytic":
            return
        for expert in (None, 0):
            batch = self.made.inputs(other=False)
            self.moe.fit_router(expert, [batch])

    def experts_are_right(self, arguments):
        if self.dense(arguments) is None or self.call(arguments) is None:
            return
        if self.jumps and lowest(self.model) > 1e-2:
            self.notes.append("experts not followed: rounding decides a branch on values")
            return
        try:
            error = wrong_experts(self.model, self.moe, arguments)
        except NotFollowed as reason:
            self.notes.append(f"experts not followed: {reason}")
            return
        if error:
            raise Wrong(f"at {shapes(arguments)}: {error}")
        self.notes.append("experts followed")

    def steps(self):
        self._in_training("step", lambda: wrong_step(self.model, self.moe, self.made.example))

    def saves(self):
        with tempfile.TemporaryDirectory() as folder:
            self.moe.save_pretrained(folder)
            loaded = moe_rewrite.load(folder, self.model, self.made.example, verify=False).eval()
        if self.moe.recipe.freeze:
            mine, theirs = self.moe.state_dict(), loaded.state_dict()
            if mine.keys() != theirs.keys():
                raise Wrong(f"names after load: {mine.keys() ^ theirs.keys()}")
            odd = [n for n in mine if differing(mine[n], theirs[n], 0.0, exact=True)]
            if odd:
                raise Wrong(f"other tensors after load: {odd}")
        ours = self.call(self.made.example)
        with torch.no_grad():
            again = loaded(**cloned(self.made.example))
        if ours is not None and (error := differing(ours[0], again, 0.0, exact=True)):
            raise Wrong(f"after load: {error}")


def shapes(arguments):
    return {k: tuple(getattr(v, "shape", ())) for k, v in arguments.items()}
