"""Feed-forward experts in int8 and bfloat16 on the CPU: time and perplexity beside float32."""

# python -m benchmarks.speed.int8_experts [--quick]: processor time of one layer's experts at 1 and 64
# tokens, one thread, the forms side by side in one run, their weights not in the cache; then the
# perplexity of stories260K upcycled on texts that it wrote and (not --quick) on TRACE's text after its
# experts were trained on it, so that they differ.

from __future__ import annotations

import copy
import json
import math
from functools import partial
from typing import Any

import torch
from torch import nn

import moe_rewrite
from moe_rewrite.experts.ffn.call import FeedForwardCall
from moe_rewrite.kernels.ffn.low_precision import DTYPES, LowPrecision, sums_exactly
from moe_rewrite.kernels.plan.op import route
from moe_rewrite.routing.dispatch import RowGates
from moe_rewrite.utils.text_tables import table

from ..tools import report
from ..tools.data import data, model_folder
from ..tools.timing import Times, processor, side_by_side
from .cpu import SIZES
from .forms.cpu_experts import CACHE, WIDTH

LENGTH = 192  # tokens of a text


class Gated(nn.Module):
    """A residual feed-forward of the width that benchmarks.speed.cpu has."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(WIDTH, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def experts(count: int, hidden: int) -> tuple[FeedForwardCall, dict[str, list[list[Any]]]]:
    """What runs the experts of one converted layer, and their weights in each form."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH)
    moe: Any = moe_rewrite.convert(
        nn.Sequential(Gated(hidden), Gated(hidden)), mode="upcycle", split=1, num_experts=count,
        example_inputs=x, verify=False,
    )  # fmt: skip
    (site,) = moe.expert_sites()
    with torch.no_grad():
        for kind in site.parameter_lists():
            for weight in kind:
                weight.normal_(0, weight.shape[1] ** -0.5)
    graph, _ = moe.graph_for(moe.normalized((x,), {})[0])
    nodes = (n.target for _, b in graph.steps for n in b.step.code.module.graph.nodes)
    call = next(target for target in nodes if isinstance(target, FeedForwardCall))
    plain = list(zip(*(site.stacked(range(count))[: len(site.site.parts)]), strict=True))
    forms: dict[str, Any] = {"float32": [[w.detach() for w in own] for own in plain]}
    for dtype in DTYPES:
        forms[dtype] = [[LowPrecision.of(w, dtype) for w in own] for own in plain]
    return call, forms


def layer_cells(size: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each form, and each one's distance from float32's output."""
    count, k, hidden = SIZES[size]
    call, weights = experts(count, hidden)
    others, cells = torch.ones(CACHE // 4), []
    for rows in (1, 64):
        gates, chosen = route(torch.randn(rows, count), k)
        given = RowGates(torch.zeros(rows, count).scatter_(1, chosen, gates), k, base=False)
        x = torch.randn(rows, WIDTH)
        runs = {n: partial(call.run, x, given, (rows,), own) for n, own in weights.items()}
        with torch.no_grad():
            found = {name: run() for name, run in runs.items()}
            times: Times = side_by_side(
                runs, rounds, warm=1, seconds=seconds, clock=processor,
                before=lambda _: others.sum(),
            )  # fmt: skip
        exact = found["float32"]
        cells.append({
            "size": size, "tokens": rows, "ms": times.medians(), "quartiles": times.quartiles(),
            "faster": {d: times.ratio("float32", to=d) for d in DTYPES},
            "error": {d: float((found[d] - exact).norm() / exact.norm()) for d in DTYPES},
        })  # fmt: skip
    return cells


@torch.no_grad()
def perplexity(moe: Any, texts: list[torch.Tensor]) -> float:
    moe.eval()
    lost = [(moe(input_ids=t, labels=t).loss.item(), t.numel() - len(t)) for t in texts]
    return math.exp(sum(loss * n for loss, n in lost) / sum(n for _, n in lost))


def in_every_form(moe: Any, texts: list[torch.Tensor]) -> dict[str, float]:
    found = {"float32": perplexity(moe, texts)}
    for dtype in DTYPES:
        low = copy.deepcopy(moe)
        low.quantize_experts(dtype)
        found[dtype] = perplexity(low, texts)
    return found


def trace_texts(tokenizer: Any, part: str, count: int) -> list[torch.Tensor]:
    """Texts of one TRACE task, cut to one length."""
    items = json.loads((data() / "TRACE" / "MeetingBank" / f"{part}.json").read_text())
    ids = (tokenizer(i["prompt"], return_tensors="pt").input_ids[:, :LENGTH] for i in items)
    return [t for t in ids if t.shape[1] == LENGTH][:count]


def stories_cells(quick: bool) -> list[dict[str, Any]]:
    """Perplexities; none where the shared model is missing."""
    folder = model_folder("stories260K")
    if not folder.exists():
        return []
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    length = 48 if quick else LENGTH
    start = torch.full((4 if quick else 16, 1), tokenizer.bos_token_id)
    stories = dense.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_length=length,
        min_length=length, pad_token_id=0,
    )  # fmt: skip
    moe: Any = moe_rewrite.convert(dense, mode="upcycle", split=0, num_experts=8)
    cells = [{"text": "stories that it wrote", "perplexity": in_every_form(moe, [stories])}]
    if quick:
        return cells
    train = trace_texts(tokenizer, "train", 256)
    optimizer = torch.optim.AdamW(moe.trainable_parameters(), lr=1e-3)
    for batch in torch.cat(train).split(8):
        moe.train()
        outputs, plan = moe.with_plan(input_ids=batch, labels=batch)
        (outputs.loss + 0.01 * plan.load_balance_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    test = trace_texts(tokenizer, "test", 64)
    cells.append({"text": "MeetingBank, trained", "perplexity": in_every_form(moe, test)})
    return cells


def main() -> None:
    quick = report.is_quick(__doc__)
    torch.set_num_threads(1)
    how = (0.05, 3) if quick else (4.0, 32)
    layers = [cell for size in SIZES for cell in layer_cells(size, *how)]
    texts = stories_cells(quick)
    figures = {"layers": layers, "texts": texts, "exact_sums": sums_exactly()}
    if not quick:
        report.save("int8_experts", figures)
    rows = [
        (c["size"], str(c["tokens"]), f"{c['ms']['float32']:.2f} ms",
         *(f"{c['faster'][d]:.2f}" for d in DTYPES), *(f"{c['error'][d]:.4f}" for d in DTYPES))
        for c in layers
    ]  # fmt: skip
    columns = ["experts", "tokens", "float32", "int8 faster", "bfloat16 faster", "int8 error",
               "bfloat16 error"]  # fmt: skip
    print(table(columns, rows, "int8_experts: one layer"))
    said = []
    for cell in texts:
        of = cell["perplexity"]
        changes = (f"{of[d]:.4f} ({of[d] / of['float32'] - 1:+.2%})" for d in DTYPES)
        said.append((cell["text"], f"{of['float32']:.4f}", *changes))
    report.finish("int8_experts", ["perplexity", "float32", *DTYPES], said, **figures)


if __name__ == "__main__":
    main()
