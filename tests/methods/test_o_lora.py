"""The identities of O-LoRA."""

import json

import pytest
import torch
from torch import nn

from llava_keeplora.adapters import AdapterInit, Delta, attach, load_deltas
from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext

OLora = METHODS["o-lora"]
SGD = {"optim": "sgd", "learning_rate": 0.05}
METHODS_RUN = {
    "seq-lora": {},
    "without": {"method": "o-lora", "lambda1": 0.0, "dropout": 0.0},
    "with": {"method": "o-lora", "lambda1": 0.5, "dropout": 0.0},
    "whole": {"method": "o-lora", "dropout": 0.0, "lambda2": 0.1, "training": SGD},
    "halves": {
        "method": "o-lora",
        "dropout": 0.0,
        "lambda2": 0.1,
        "training": {**SGD, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven, tiny_tasks):
    return driven(
        run_config(
            tmp_path_factory.mktemp("o-lora") / "run",
            methods=METHODS_RUN,
            tasks=[str(path) for path in tiny_tasks[:2]],
        )
    )


def delta_files(finished, label):
    return [
        path / "delta.safetensors"
        for path in sorted((finished / label).glob("task-*"))
        if not path.name.startswith("task-00")
    ]


def overlaps(finished, label):
    """Layer → Σ of the absolute entries of A_1 A_2ᵀ, in float64."""
    first, second = (load_deltas(path) for path in delta_files(finished, label))
    return {name: float((first[name].A.double() @ second[name].A.double().T).abs().sum()) for name in first}


@pytest.mark.slow
def test_without_penalties_and_dropout_it_is_sequential_lora_bit_for_bit(finished):
    for ours, theirs in zip(delta_files(finished, "without"), delta_files(finished, "seq-lora"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_first_task_does_not_depend_on_the_penalty_and_the_second_does(finished):
    first, second = (
        [path.read_bytes() for path in delta_files(finished, label)] for label in ("with", "without")
    )
    assert first[0] == second[0] and first[1] != second[1]


def test_the_penalty_makes_the_tasks_overlap_less(finished):
    with_penalty, without = (sum(overlaps(finished, label).values()) for label in ("with", "without"))
    assert with_penalty < 0.8 * without


def test_every_layers_overlap_is_reported(finished):
    reported = json.loads((finished / "with/task-02-stripes/train.json").read_text())["report"]["overlap"]
    assert reported == pytest.approx(overlaps(finished, "with"), rel=1e-5)


def test_the_penalty_counts_once_per_step_however_many_batches_it_came_in(finished):
    for ours, theirs in zip(delta_files(finished, "whole"), delta_files(finished, "halves"), strict=True):
        ours, theirs = load_deltas(ours), load_deltas(theirs)
        for name in ours:
            torch.testing.assert_close(ours[name].A, theirs[name].A, atol=1e-6, rtol=1e-4)


# --- on one layer --------------------------------------------------------------------------------


@pytest.fixture
def penalised():
    """Function (A, earlier A, **options) → the penalty with its gradients by A and B, which alone can be moved."""

    def compute(A, earlier, **options):
        net = nn.ModuleDict({"layer": nn.Linear(6, 4, bias=False)})
        attach(net, {"layer": AdapterInit(len(A), float(len(A)), A=A, B=torch.ones(4, len(A)), train_A=True)})
        old = Delta(earlier, torch.ones(4, len(earlier)), 1.0)
        ctx = TaskContext(
            2,
            "t",
            {"layer": Layer("layer", "vision", net["layer"], 2, 2.0, 0.5, 0.9)},
            None,
            None,
            0,
            0,
            deltas=lambda: [{"layer": old}],
        )
        method = OLora(OLora.Options(**options))
        with method.training_context(ctx, net):
            trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
            assert sorted(trained) == ["layer.lora_A.default.weight", "layer.lora_B.default.weight"]
            loss = method.loss(ctx, {}, {"loss": torch.zeros((), requires_grad=True)})
            loss.backward()
        return float(loss.detach()), *(trained[f"layer.lora_{letter}.default.weight"].grad for letter in "AB")

    return compute


def test_the_penalty_moves_the_new_A_alone_and_by_its_signs(penalised):
    torch.manual_seed(0)
    A, earlier = torch.randn(2, 6), torch.randn(3, 6)
    value, by_A, by_B = penalised(A, earlier, lambda1=0.5)
    assert value == pytest.approx(0.5 * sum(abs(float(old @ new)) for old in earlier for new in A), rel=1e-5)
    torch.testing.assert_close(by_A, 0.5 * torch.sign(A @ earlier.T) @ earlier)
    assert by_B is None


def test_what_an_earlier_task_left_is_bit_for_bit_the_same_after_later_ones(
    finished, run_config, driven, tiny_tasks, tmp_path
):
    alone = driven(
        run_config(tmp_path / "run", methods={"with": METHODS_RUN["with"]}, tasks=[str(tiny_tasks[0])])
    )
    assert delta_files(alone, "with")[0].read_bytes() == delta_files(finished, "with")[0].read_bytes()


def test_the_penalty_is_zero_exactly_for_orthogonal_adapters(penalised):
    rows = torch.eye(6)
    assert penalised(rows[:2], rows[2:5])[0] == 0.0
    assert penalised(rows[:2], rows[1:3])[0] > 0.0


def test_the_second_penalty_is_the_sum_of_the_norms(penalised):
    A = torch.eye(6)[:2]
    value, by_A, by_B = penalised(A, torch.eye(6)[2:4], lambda2=0.1)
    assert value == pytest.approx(0.1 * (2**0.5 + 8**0.5), rel=1e-5)
    torch.testing.assert_close(by_A, 0.1 * A / 2**0.5)
    torch.testing.assert_close(by_B, 0.1 * torch.ones(4, 2) / 8**0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambda1": -1.0}, "lambda1 must not be negative .got -1.0.; set it to 0"),
        ({"lambda2": float("nan")}, "lambda2 must not be negative .got nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\) .got 1.0"),
    ],
)
def test_settings_that_are_none_are_refused(options, words):
    with pytest.raises(MethodError, match=words):
        OLora.Options(**options)
