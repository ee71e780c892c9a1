"""The checks for third parties pass for the examples and catch faulty methods and families."""

from pathlib import Path

import pytest
import torch

from llava_keeplora.adapters import AdapterInit
from llava_keeplora.methods import Holding, Method, MethodInfo
from llava_keeplora.models import ClipFamily
from llava_keeplora.testing import check_family, check_method, methods, small_run

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


class Counting(Method):
    """LoRA whose rank-2 adapters start from a count of the tasks before; the base of the faulty ones."""

    info = MethodInfo("counting", "a method of the tests")

    def __init__(self, options):
        super().__init__(options)
        self.count = 0

    def init_adapters(self, ctx):
        return {
            name: AdapterInit(2, 2, torch.eye(2, layer.module.in_features) * (1 + self.count), train_A=False)
            for name, layer in ctx.layers.items()
        }

    def after_task(self, ctx):
        self.count += 1
        self.added = {"count": torch.ones(1)}

    def state_dict(self):
        return self.added

    def load_state_dicts(self, states):
        self.count = sum("count" in state for state in states)

    def holds(self, ctx, names):
        return {"count": Holding((1,))}


class UpdatesOnlyWhenLoaded(Counting):
    def after_task(self, ctx):
        self.added = {"count": torch.ones(1)}


class ResumesOtherwise(Counting):
    def load_state_dicts(self, states):
        self.count = 0


class BreaksTheBase(Counting):
    def after_task(self, ctx):
        super().after_task(ctx)
        ctx.model.get_parameter("logit_scale").data += 1


class LeavesAHook(Counting):
    def after_task(self, ctx):
        super().after_task(ctx)
        ctx.model.register_forward_hook(_nothing)


class KeepsUndeclared(Counting):
    def state_dict(self):
        return {**self.added, "secret": torch.ones(2)}


class IsNotReproducible(Counting):
    def init_adapters(self, ctx):
        generator = torch.Generator()
        generator.seed()
        return {
            name: AdapterInit(2, 2, torch.randn(2, layer.module.in_features, generator=generator))
            for name, layer in ctx.layers.items()
        }


class UsesTheNumberOfTasks(Counting):
    def init_adapters(self, ctx):
        self.count = ctx.tasks
        return super().init_adapters(ctx)


def _nothing(module, args, output):
    return None


class HidesALayer(ClipFamily):
    """A family that calls a layer unreachable which the loss reaches."""

    def layers_without_gradient(self, part, targets):
        return [
            *super().layers_without_gradient(part, targets),
            next(iter(self.linear_layers(part, targets))),
        ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_a_method_that_keeps_the_contract_passes(small):
    check_method(Counting, run=small)


@pytest.mark.slow
def test_the_example_of_a_method_passes():
    check_method(f"{EXAMPLES / 'quiet_lora.py'}:QuietLora", {"strength": 10.0})


@pytest.mark.parametrize(
    ("method", "check", "sentence"),
    [
        pytest.param(
            *(
                UpdatesOnlyWhenLoaded,
                "resuming_stages",
                "ends otherwise when it is stopped.*load_state_dicts",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(ResumesOtherwise, "resuming_stages", "ends otherwise when it is stopped.*load_state_dicts"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(IsNotReproducible, "resuming_stages", "ends otherwise when it is stopped"),
            marks=pytest.mark.slow,
        ),
        (UsesTheNumberOfTasks, "extending", "when a run of one task is extended"),
        (BreaksTheBase, "base_restored", "changes the base: logit_scale"),
        (LeavesAHook, "base_restored", "leaves forward hooks"),
        (KeepsUndeclared, "declared_state", "does not declare what its tasks keep.*secret"),
    ],
)
def test_a_faulty_method_is_caught(small, method, check, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_method(method, run=small, checks=[getattr(methods, f"check_{check}")])


@pytest.mark.parametrize("family", ["clip", f"{EXAMPLES / 'half_clip.py'}:HalfClip"])
def test_a_family_that_keeps_the_contract_passes(family):
    check_family(family)


def test_llava_passes(tiny_llava, mixed_tasks):
    check_family("llava", tiny_llava, mixed_tasks[0], {"batch_size": 8, "max_new_tokens": 6})


def test_a_faulty_family_is_caught():
    with pytest.raises(AssertionError, match="layers_without_gradient.*differs"):
        check_family(HidesALayer)
