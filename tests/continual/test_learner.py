"""PMoE on a stream: what is learnt, what stays, and how a run resumes."""

import json

import architectures
import pytest
import torch
import words
from conversions import fresh
from reference import added
from sweeps import some

import moe_rewrite
from moe_rewrite import LoRAExperts, MoeRewriteError, TokenRouter
from moe_rewrite.continual.learner import Learner, router_use
from moe_rewrite.continual.registry import Setup
from moe_rewrite.continual.run import run
from moe_rewrite.continual.text import TextProblem
from moe_rewrite.continual.training import Training
from moe_rewrite.converted.saving.checkpoint import META

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
QUICK = Training(epochs=25, lr=5e-2, batch_size=8)


@pytest.fixture(scope="module")
def llama():
    model = architectures.build("Llama", layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # logits as large as a trained model's
    return model


def learner(llama, fit="analytic", training=QUICK, **options):
    router = TokenRouter(fit=fit, granularity="prefix", projection=128)
    moe = fresh(llama, split=1, router=router, experts=LoRAExperts(4), verify=False)
    return Learner(moe, TextProblem(words.Letters(), 32), training, **options)


def expert_tensors(moe, expert):
    """Every parameter of one expert."""
    state = added(moe)
    return {
        k: v.detach().clone()
        for k, v in state.items()
        if ".experts." in k and k.endswith(f".{expert}")
    }


@pytest.mark.parametrize("fit", ["analytic", "gradient"])
def test_a_stream_is_learnt_and_older_experts_stay_bitwise(llama, fit):
    """Then the last expert is taken back, and one of the others is asked alone."""
    torch.manual_seed(0)
    taught, tasks = learner(llama, fit, replay=0.25), words.stream()
    base_task = words.task("own", "klmnop", "ok")
    taught.begin(base_task)
    dense = {k: v.clone() for k, v in llama.state_dict().items()}
    before = [taught.problem.score(taught.model, t, "loss", CPU) for t in tasks]
    inputs = taught.problem.inputs(taught.problem.batch(tasks[0].test))
    kept, said = [], []
    for number in range(len(tasks)):
        taught.learn(tasks, number)
        with torch.no_grad():
            said.append(taught.model(**inputs).logits)
        kept.append(expert_tensors(taught.model, number))
        for expert, tensors in enumerate(kept):
            now = expert_tensors(taught.model, expert)
            assert all(torch.equal(now[k], v) for k, v in tensors.items())
    assert taught.model.names[1:] == ["digits", "high"] and taught.model.num_experts == 3
    after = [taught.problem.score(taught.model, t, "loss", CPU) for t in tasks]
    assert all(b > a + 1.5 for a, b in zip(before, after, strict=True)), (before, after)
    assert all(torch.equal(v, dense[k]) for k, v in llama.state_dict().items())
    assert taught.keeps_data == (fit == "gradient")
    use = router_use(taught, tasks)
    assert [max(range(4), key=row.__getitem__) for row in use] == [1, 2, 3]
    assert all(abs(sum(row) - 1) < 1e-5 for row in use)
    if fit == "analytic":  # whose rows are solved anew
        the_last_is_taken_back(taught.model, inputs, said)
        one_expert_alone_is_a_plan_of_ones(taught.model, inputs)


def the_last_is_taken_back(moe, inputs, said):
    with torch.no_grad():
        assert not torch.equal(said[2], said[1])
        moe.remove_last()
        assert torch.equal(moe(**inputs).logits, said[1])


def one_expert_alone_is_a_plan_of_ones(moe, inputs):
    with torch.no_grad(), moe.use_expert("digits"):
        plan = moe.route(**inputs)
        alone = moe(**inputs).logits
    assert plan.active == (1,) and (plan.weights == 1).all() and (plan.base == 0).all()
    moe.deactivate(0)
    for row in (moe.router.frozen, *moe.router.rows):
        row.data.zero_()
    moe.router.rows[1].data[-1] = 100.0  # the gate of a softmax saturates at one
    with torch.no_grad():
        torch.testing.assert_close(moe(**inputs).logits, alone)


def test_the_routers_optimizer_lives_through_expansion(llama):
    torch.manual_seed(0)
    taught, tasks = learner(llama, "gradient", Training(epochs=1, lr=1e-2)), words.stream()
    taught.learn(tasks, 0)
    row = taught.model.router.rows[0]
    steps = float(taught.router_optimizer.state[row]["step"])
    moment = taught.router_optimizer.state[row]["exp_avg"].clone()
    assert steps > 0 and moment.abs().sum() > 0
    grown = taught._grown_optimizer([*taught.model.router.rows])
    assert grown is taught.router_optimizer and torch.equal(grown.state[row]["exp_avg"], moment)
    taught.learn(tasks, 1)
    assert float(taught.router_optimizer.state[row]["step"]) > steps
    assert taught.router_optimizer.state[taught.model.router.rows[1]]["step"] > 0
    other = learner(llama, "gradient")
    other.model.expand(1)
    other.restore(taught.state(), tasks, 2)
    for a, b in zip(taught.model.router.rows, other.model.router.rows, strict=True):
        for name, value in taught.router_optimizer.state[a].items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(other.router_optimizer.state[b][name])
            )


def test_load_balance_is_the_variation_of_mean_gates_and_evens_them_out(llama):
    torch.manual_seed(0)
    taught, tasks = learner(llama, "gradient"), words.stream()
    rows = taught.model.router.rows
    taught.model.expand(1)
    taught.model.activate(1)
    with torch.no_grad():
        rows[0].normal_(), rows[1].normal_()
    batch, task_ids = taught.problem.batch(tasks[0].test), torch.zeros(8, dtype=torch.long)
    taught.learnt, taught._weights = ["before"], {0: 1.0}
    optimizer, variations = torch.optim.Adam(list(rows), lr=0.1), []
    for _ in range(20):
        taught.balance = 0.0
        without = taught._loss(batch, task_ids, 1).detach()
        taught.balance = 30.0
        loss = taught._loss(batch, task_ids, 1)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            plan = taught.model.route(**taught.problem.inputs(batch))
        load = plan.weights[batch["attention_mask"] == 1].mean(0).double().numpy()
        variations.append(load.std() ** 2 / load.mean() ** 2)
        added = float(loss.detach() - without)
        assert added == pytest.approx(30 * variations[-1], rel=1e-3, abs=1e-4)
        optimizer.step()
    assert variations[-1] < 0.3 * variations[0]


@pytest.mark.parametrize("fit", some(["analytic", "gradient"], ["analytic"]))
def test_a_saved_stream_can_be_continued(llama, fit, tmp_path):
    """With another learner, which has seen no task."""
    torch.manual_seed(0)
    tasks = words.stream()
    taught = learner(llama, fit, replay=0.25)
    taught.learn(tasks[:1], 0)
    taught.model.save_pretrained(tmp_path)
    moe = moe_rewrite.load(tmp_path, llama, verify=False)
    kept = expert_tensors(moe, 0)
    taught = Learner(moe, TextProblem(words.Letters(), 32), QUICK)
    taught.learn(tasks[1:2], 0)
    now = expert_tensors(moe, 0)
    assert moe.num_experts == 2 and kept and all(torch.equal(now[k], v) for k, v in kept.items())
    if fit == "analytic":  # the other has nothing to replay
        use = router_use(taught, tasks[:2])
        assert [max(range(3), key=row.__getitem__) for row in use] == [1, 2]


@pytest.mark.parametrize("init", some([0.0, 0.5], [0.5]))
def test_the_untrained_expert_of_a_conversion_is_the_first_tasks(llama, init, tmp_path):
    """Whatever its row of the router starts from; after a save too."""
    spec = TokenRouter(granularity="prefix", init=init)
    options = {"split": 1, "router": spec, "experts": LoRAExperts(4), "verify": False}
    fresh(llama, **options).save_pretrained(tmp_path)
    quick, tasks = Training(epochs=1, lr=1e-2), words.stream()
    for moe in (fresh(llama, **options), moe_rewrite.load(tmp_path, llama, verify=False)):
        assert moe.trained == [False]
        taught = Learner(moe, TextProblem(words.Letters(), 32), quick)
        taught.learn(tasks, 0)
        assert moe.names == ["expert0"] and moe.trained == [True]
        taught.learn(tasks, 1)
        assert moe.num_experts == 2 and moe.router.active_indices() == (0, 1)
    moe.save_pretrained(tmp_path)
    assert moe_rewrite.load(tmp_path, llama, verify=False).trained == [True, True]


def test_an_expert_that_a_loop_of_ones_own_trained_is_kept(llama):
    moe = fresh(llama, split=1, experts=LoRAExperts(4), verify=False)
    optimizer = torch.optim.SGD(moe.trainable_parameters(), lr=1.0)
    batch = TextProblem(words.Letters(), 32).batch(words.stream()[0].train)
    with torch.no_grad():
        moe(**batch)
    assert moe.trained == [False]
    moe.train()
    moe(**batch).loss.backward()
    optimizer.step()
    kept = expert_tensors(moe, 0)
    Learner(moe, TextProblem(words.Letters(), 32), Training(epochs=1)).learn(words.stream(), 0)
    assert moe.num_experts == 2 and moe.trained == [True, True]
    assert all(torch.equal(expert_tensors(moe, 0)[k], v) for k, v in kept.items())


def test_untrained_experts_take_no_part_in_a_stream(llama):
    spec = TokenRouter(granularity="prefix", init=0.5)
    moe = fresh(llama, split=1, router=spec, num_experts=2, experts=LoRAExperts(4), verify=False)
    Learner(moe, TextProblem(words.Letters(), 32), Training(epochs=1)).learn(words.stream(), 0)
    assert moe.names[2:] == ["low"] and moe.router.active_indices() == (2,)


def test_a_save_of_before_there_was_the_flag_goes_by_the_routers_rows(llama, tmp_path):
    moe = fresh(llama, split=1, experts=LoRAExperts(4), verify=False)
    for rows, trained in ((0.0, [False]), (1.0, [True])):
        moe.router.rows[0].data.fill_(rows)
        moe.save_pretrained(tmp_path)
        meta = tmp_path / META
        facts = json.loads(meta.read_text())
        del facts["trained"], facts["meta_sha256"]
        meta.write_text(json.dumps(facts))
        assert moe_rewrite.load(tmp_path, llama, verify=False).trained == trained
    facts["trained"] = ["yes"]
    meta.write_text(json.dumps(facts))
    with pytest.raises(MoeRewriteError, match="malformed"):
        moe_rewrite.load(tmp_path, llama, verify=False)


def test_a_run_is_scored_by_generated_answers(llama):
    """As in TRACE: answers are generated without the task's number, and compared with the right
    ones."""
    problem = TextProblem(words.Letters(), 32, new_tokens=6)
    llama.generation_config.eos_token_id = 2
    small = Training(epochs=25, lr=1e-2, batch_size=8)  # larger steps end where rounding leads
    setup = Setup(split=1, rank=4, training=small)
    result = run("pmoe", llama, problem, words.stream()[:2], setup, None, "task")
    assert result.before == [0.0, 0.0] and result.R[0][0] > 0.7 > 0.3 > result.R[0][1]
    assert min(result.R[1]) > 0.3 and result.figures()["score"] == "task"


def test_early_stop_goes_back_to_the_best_epoch(llama):
    torch.manual_seed(0)
    task = words.task("noise", "abcdef", "no")
    contrary = [{"prompt": item["prompt"], "answer": "yes!"} for item in task.eval]
    task = type(task)("noise", task.train, task.test, contrary)
    training = Training(epochs=30, lr=2e-2, patience=2)
    taught = learner(llama, training=training)
    held_out = type(task)("held out", task.train, contrary)
    seen = []
    validate = taught.validator(task)
    taught.validator = lambda task: lambda: seen.append(validate()) or seen[-1]
    taught.learn([task], 0)
    assert len(seen) < 30 and min(seen) == seen[-3]
    best = -taught.problem.score(taught.model, held_out, "loss", CPU)
    assert best == pytest.approx(min(seen), rel=1e-5) and best < seen[-1]


def test_training_in_bf16_learns_too(llama):
    torch.manual_seed(0)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        training = Training(epochs=25, lr=5e-2, mixed_precision="bf16")
        taught, tasks = learner(llama, training=training), words.stream()
        before = taught.problem.score(taught.model, tasks[0], "loss", CPU)
        taught.learn(tasks, 0)
        assert taught.problem.score(taught.model, tasks[0], "loss", CPU) > before + 1
        assert all(p.dtype == torch.float32 for p in taught.model.trainable_parameters())
    finally:
        AcceleratorState._reset_state()


def test_bad_options_are_named(llama):
    for wrong in ({"epochs": 0}, {"lr": 0}, {"schedule": "cosine"}, {"mixed_precision": "half"}):
        with pytest.raises(MoeRewriteError, match=next(iter(wrong))):
            Training(**wrong)
    with pytest.raises(MoeRewriteError, match="gates="):
        learner(llama, gates="mine")
    with pytest.raises(MoeRewriteError, match="replay="):
        learner(llama, "gradient", replay=1.5)
