"""Every method over a stream: the same protocol, and a run that was stopped resumes identically."""

from dataclasses import replace

import architectures
import cnns
import pytest
import torch
import words
from sweeps import some

from moe_rewrite import MoeRewriteError
from moe_rewrite.continual.images import ImageProblem
from moe_rewrite.continual.methods import adapters
from moe_rewrite.continual.registry import METHODS, Setup, make_method
from moe_rewrite.continual.run import run
from moe_rewrite.continual.tasks import Task
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.continual.training import Training

pytestmark = pytest.mark.timeout(900)
TEXT = [m for m in METHODS if m != "ranpac"]
# pmoe-gradient is killed and resumed in test_continual_cli; of the new ones see test_rivals
QUICK = {*TEXT} - {"pmoe-gradient", "anyssr", "osf", "arrow"}
IMAGES = [m for m in METHODS if m not in ("anyssr", "osf", "arrow")]  # of language, of linear maps
SETUP = Setup(split=1, rank=4, replay=0.25, training=Training(epochs=6, lr=5e-2))


@pytest.fixture(scope="module")
def llama():
    return architectures.sharp_llama()


class Stopped(Exception):
    """Stands for a kill, within one process."""


def counted(made, batches):
    """The problem, which stops after so many batches."""
    batch, left = made.batch, [batches]

    def one_less(items):
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return batch(items)

    made.batch = one_less
    return made


def problem(stop_in=None):
    made = TextProblem(words.Letters(), 32)
    return made if stop_in is None else counted(made, stop_in)


def figures(result):
    scores = result.R, result.base, result.before, result.other
    return *scores, result.router_use, result.trainable


@pytest.mark.parametrize("method", some(TEXT, QUICK))
def test_it_learns_and_a_run_that_was_stopped_ends_in_the_same_result(llama, method, tmp_path):
    tasks, base_task = words.stream(), words.task("own", "klmnop", "ok")
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    want = run(method, llama, problem(), tasks, SETUP, base_task, "loss", tmp_path / "whole")
    assert want.R[0][0] > want.before[0] + 1  # each learns the current task
    assert len(want.R) == 3 and all(len(row) == 3 for row in want.R) and want.trainable > 0
    for stop_in in (12, 64):  # in the first task; then in a later one
        with pytest.raises(Stopped):
            run(method, llama, problem(stop_in), tasks, SETUP, base_task, "loss", tmp_path / "cut")
    got = run(method, llama, problem(), tasks, SETUP, base_task, "loss", tmp_path / "cut")
    assert figures(got) == figures(want)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    again = run(method, llama, problem(1), tasks, SETUP, base_task, "loss", tmp_path / "cut")
    assert figures(again) == figures(want)  # nothing is left to do: one batch tells the problem
    other = replace(SETUP, rank=2)
    with pytest.raises(MoeRewriteError, match="another run"):
        run(method, llama, problem(), tasks, other, base_task, "loss", tmp_path / "cut")


def test_what_adapters_add_is_what_the_method_says(llama):
    tasks = words.stream()
    joint = make_method("joint", llama, problem(), SETUP)
    assert {n for n, _ in joint.items(tasks, 0)} == {0, 1, 2}
    replay = make_method("replay", llama, problem(), SETUP)
    replay.learn(tasks, 0)
    assert sum(n == 0 for n, _ in replay.items(tasks, 1)) == 6
    olora = make_method("olora", llama, problem(), SETUP)
    for number in (0, 1):
        olora.learn(tasks, number)
    frozen = [n for n, p in olora.model.named_parameters() if ".task0." in n and p.requires_grad]
    assert not frozen and [n for n, p in olora.model.named_parameters() if p.requires_grad]
    oracle = make_method("oracle", llama, problem(), SETUP)
    for number in (0, 1):
        oracle.learn(tasks, number)
    inputs = oracle.problem.inputs(oracle.problem.batch(tasks[0].test))
    with torch.no_grad():
        first, second = (oracle.model_for(n)(**inputs).logits for n in (0, 1))
        assert not torch.equal(first, second)
        torch.testing.assert_close(oracle.model_for(None)(**inputs).logits, llama(**inputs).logits)


def test_ewc_keeps_important_weights(llama, monkeypatch):
    moved = []
    setup = Setup(split=1, rank=4, training=Training(epochs=10, lr=3e-3))
    for strength in (0.0, 1e3):
        monkeypatch.setattr(adapters.EWC, "strength", strength)
        torch.manual_seed(0)
        method = make_method("ewc", llama, problem(), setup)
        method.learn(words.stream(), 0)
        method.learn(words.stream(), 1)
        held = method._of(method.names[-1])
        before, matters = method.anchor, method.fisher
        method.learn(words.stream(), 2)
        now = method._of(method.names[-1])
        with torch.no_grad():
            steps = zip(matters, now, before, strict=True)
            moved.append(sum(float((f * (a - b).square()).sum()) for f, a, b in steps))
        assert held and all(f.min() >= 0 for f in method.fisher)
    assert moved[1] < 0.2 * moved[0], moved


def test_lwf_stays_near_earlier_outputs(llama, monkeypatch):
    drift = []
    setup = Setup(split=1, rank=4, training=Training(epochs=10, lr=5e-3))
    for strength in (0.0, 10.0):
        monkeypatch.setattr(adapters.LwF, "strength", strength)
        torch.manual_seed(0)
        method = make_method("lwf", llama, problem(), setup)
        batch = method.problem.batch(words.stream()[0].test)
        with torch.no_grad():
            before, _ = method.problem.predict(method.model, batch)
        method.learn(words.stream(), 0)
        with torch.no_grad():
            after, _ = method.problem.predict(method.model, batch)
        drift.append(float((after.softmax(-1) - before.softmax(-1)).abs().sum()))
    assert drift[1] < 0.5 * drift[0]


def images(seed=0):
    """Three tasks of two classes: stripes along one axis, of one width, in one colour."""
    draw = torch.Generator().manual_seed(seed)
    tasks = []
    for number in range(3):
        parts = []
        for count in (24, 10):
            items = []
            for i in range(count):
                label = i % 2
                image = 0.3 * torch.randn(3, 32, 32, generator=draw)
                stripes = torch.arange(32) % (4 + 4 * number) < 2
                image[number] += 3 * (stripes.view(1, -1) if label else stripes.view(-1, 1)).float()
                items.append({"image": image, "label": 10 + 2 * number + label})
            parts.append(items)
        tasks.append(Task(f"stripes {number}", *parts, classes=2))
    return tasks


@pytest.fixture(scope="module")
def resnet():
    return cnns.build("ResNet")


@pytest.mark.parametrize("method", some(IMAGES, {*QUICK, "ranpac"}))
def test_heads_grow_for_every_method_stopped_or_not(resnet, method, tmp_path):
    draw = torch.Generator().manual_seed(1)
    base_task = Task("own", *(
        [{"image": torch.randn(3, 32, 32, generator=draw), "label": i % 10} for i in range(n)]
        for n in (20, 10)
    ))  # fmt: skip
    setup = Setup(split="layer3", rank=4, training=Training(epochs=12, lr=1e-2, batch_size=8))
    tasks = images()
    given = (tasks, setup, base_task, "accuracy")
    with pytest.raises(Stopped):
        stopping = counted(ImageProblem(8), 12 if method == "ranpac" else 118)
        run(method, resnet, stopping, *given, tmp_path)
    result = run(method, resnet, ImageProblem(8), *given, tmp_path)
    if method in ("pmoe", "lora", "ranpac"):
        assert figures(run(method, resnet, ImageProblem(8), *given)) == figures(result)
    assert max(row[number] for number, row in enumerate(result.R)) >= 0.8
    assert result.before == [0.0] * 3  # columns that are not there yet
    assert len(result.other["loss"]) == 4
    if method in ("pmoe", "ranpac", "joint"):
        assert sum(result.R[-1]) / 3 > 0.8


@pytest.mark.parametrize(
    ("method", "said"), [("osf", "linear maps"), ("arrow", "linear maps"), ("anyssr", "language")]
)
def test_methods_that_do_not_fit_a_convolutional_network_are_refused(resnet, method, said):
    setup, problem = Setup(split="layer3", rank=4), ImageProblem(8)
    with pytest.raises(MoeRewriteError, match=f"{method}.*{said}"):
        make_method(method, resnet, problem, setup, torch.zeros(2, 3, 32, 32))


def test_a_text_model_has_no_ridge_head(llama):
    with pytest.raises(MoeRewriteError, match="ranpac"):
        make_method("ranpac", llama, problem(), SETUP)
    with pytest.raises(MoeRewriteError, match="expected one of"):
        make_method("dreams", llama, problem(), SETUP)
    with pytest.raises(MoeRewriteError, match="score="):
        run("lora", llama, problem(), words.stream(), SETUP, None, "beauty")
    with pytest.raises(MoeRewriteError, match="add classes"):
        run(
            "lora",
            llama,
            problem(),
            [replace(words.task("a", "b", "c"), classes=2)],
            SETUP,
            None,
            "loss",
        )
