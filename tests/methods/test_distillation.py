"""The identities of LwF and self-distillation: the divergence, the model at the task's start, and what is refused."""

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import AdapterInit, attach, detach, lora_layers
from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.methods import METHODS, TaskContext
from llava_keeplora.methods.task_start import TaskStart, divergence
from llava_keeplora.steps import Budget

Lwf, SelfDistillation = METHODS["lwf"], METHODS["self-distillation"]


class Net(nn.Module):
    """An adapted layer and one that is trained in full; a batch is x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.adapted, self.full = nn.Linear(6, 5), nn.Linear(5, 7)
        self.requires_grad_(False)

    def forward(self, x, labels=None):
        logits = self.full(self.adapted(x).tanh())
        return {"logits": logits, "loss": logits.square().mean()}


@pytest.fixture
def net():
    model = Net().double()
    torch.manual_seed(1)
    start = AdapterInit(2, 3.0, train_A=True)
    wrapper = attach(model, {"adapted": start}, dropout=0.5)
    model.double().train()
    model.full.requires_grad_(True)
    yield model
    detach(wrapper)


def move(model):
    """Train: everything that can be trained is somewhere else."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def softmax(z):
    return z.exp() / z.exp().sum(1, keepdim=True)


def test_the_divergence_is_kullback_leiblers_with_a_temperature_and_zero_for_equal_outputs():
    torch.manual_seed(0)
    P, Q = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    p, q = softmax(P / 2), softmax(Q / 2)
    naive = (p * (p.log() - q.log())).sum(1).mean()
    ours = divergence(P, Q, 2.0)
    torch.testing.assert_close(ours, naive)
    (by_Q,) = torch.autograd.grad(ours, Q)
    torch.testing.assert_close(by_Q, (q - p).detach() / (2 * len(Q)))
    assert float(divergence(P, P, 2.0)) == 0.0
    assert divergence(P.bfloat16(), Q.detach().bfloat16()).dtype == torch.float32


def test_the_loss_of_lwf_is_the_tasks_own_and_lambda_times_the_divergence_from_the_start(net):
    x, method = torch.randn(3, 6, dtype=torch.float64), Lwf(Lwf.Options(strength=3.0))
    net.eval()
    before = net(x)["logits"].detach()
    net.train()
    ctx = TaskContext(1, "t", {}, None, None, 0, 0, model=net, forward=net)
    with method.training_context(ctx, net):
        first = net(x)
        torch.testing.assert_close(method.loss(ctx, {"x": x}, first), first["loss"])
        move(net)
        net.eval()
        out = net(x)
        loss = method.loss(ctx, {"x": x}, out)
    p, q = softmax(before / 2), softmax(out["logits"] / 2)
    torch.testing.assert_close(loss, out["loss"] + 3.0 * (p * (p.log() - q.log())).sum(1).mean())


def test_the_start_is_the_model_before_the_first_step_and_afterwards_all_is_as_it_was(net):
    x = torch.randn(3, 6, dtype=torch.float64)
    net.eval()
    before = net(x)["logits"]
    net.train()
    start = TaskStart(net)
    move(net)
    now, random = {name: p.detach().clone() for name, p in net.named_parameters()}, torch.get_rng_state()
    out = net(x)["loss"]
    modes, drawn = {name: m.training for name, m in net.named_modules()}, torch.get_rng_state()
    with start.restored():
        again = net(x)["logits"]
        assert not again.requires_grad and not net.training
    assert torch.equal(again, before), "bit for bit, without dropout"
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(drawn, random)
    assert all(torch.equal(p, now[name]) for name, p in net.named_parameters())
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert lora_layers(net)["adapted"].scaling["default"] == 1.5
    out.backward()  # Its graph was made before, with weights that were changed and put back.
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_with_strength_zero_nothing_is_asked_of_the_model(net):
    method = SelfDistillation(SelfDistillation.Options(strength=0.0))
    ctx = TaskContext(1, "t", {}, None, None, 0, 0, model=net)
    with method.training_context(ctx, net):
        out = {"loss": torch.ones(())}
        assert method.init_adapters(ctx) == {} and method.loss(ctx, {}, out) is out["loss"]


def test_self_distillation_takes_the_tasks_steps_with_twice_as_many_examples():
    budgets = [
        Budget.of({"num_train_epochs": 1.5, "per_device_train_batch_size": 8}, count, 1) for count in (21, 24)
    ]
    method = SelfDistillation(SelfDistillation.Options())
    taken = [method.budget(index, budgets) for index in (1, 2)]
    assert [(one.steps, one.seen, one.batch) for one in taken] == [(5, 74, 16), (5, 80, 16)]
    assert SelfDistillation(SelfDistillation.Options(strength=0.0)).budget(1, budgets) == budgets[0]


class Answers:
    """Questions with answers of one's own: as many rows of x."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __len__(self):
        return len(self.rows)

    def collate(self, indices):
        self.asked.append(indices)
        return {"x": self.rows[indices]}


def test_self_distillation_compares_on_the_models_own_answers_drawn_anew_for_every_batch(net):
    own, method = (
        Answers(torch.randn(9, 6, dtype=torch.float64)),
        SelfDistillation(SelfDistillation.Options(2.0)),
    )
    net.eval()
    before = net(own.rows)["logits"].detach()
    ctx = TaskContext(1, "t", {}, None, None, 5, 0, model=net, forward=net, own_answers=lambda: own)
    batch = {"labels": torch.zeros(4)}
    with method.training_context(ctx, net):
        move(net)
        now = net(own.rows)["logits"].detach()
        losses = [method.loss(ctx, batch, {"loss": torch.ones(())}).detach() for _ in range(3)]
        assert int(method.progress()["batches"]) == 3
        method.progress()["batches"].fill_(1)  # A run that is resumed after the first batch.
        assert torch.equal(method.loss(ctx, batch, {"loss": torch.ones(())}).detach(), losses[1])
    assert [len(set(indices)) for indices in own.asked] == [4] * 4 and own.asked[0] != own.asked[1]
    p, q = softmax(before[own.asked[2]]), softmax(now[own.asked[2]])
    torch.testing.assert_close(
        losses[2], 1 + 2.0 * (p * (p.log() - q.log())).sum(1).mean(), check_dtype=False
    )


def test_self_distillation_is_refused_on_two_encoders_in_a_sentence(run_tree, tmp_path, driven):
    with pytest.raises(
        ConfigError, match="'self-distillation' runs on the family llava, but .* is a clip.*leave 'self-dist"
    ):
        driven(parse_config(run_tree(tmp_path / "run", methods={"self-distillation": {}})))


@pytest.mark.parametrize("cls", [Lwf, SelfDistillation])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -1.0}, "strength must not be negative .got -1.0.; set it to 0"),
        ({"temperature": 0.0}, "temperature must be above 0 .got 0.0.; set it to 1"),
    ],
)
def test_settings_that_are_none_are_refused(cls, options, words):
    with pytest.raises(MethodError, match=words):
        cls.Options(**options)
