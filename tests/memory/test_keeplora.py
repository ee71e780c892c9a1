"""The memory of protected subspaces around anyone's loop: identities in float64, and refusals."""

import copy

import pytest
import torch
from tests.memory.conftest import (
    make_classifier,
    make_text_model,
    text_batches,
    train,
    vector_batches,
    vector_loss,
)
from torch import nn

from llava_keeplora import KeepLora, freeze_A
from llava_keeplora.adapters import lora_layers
from llava_keeplora.errors import ConfigError, MethodError, RunError


def leading_right(matrix: torch.Tensor, energy: float) -> torch.Tensor:
    """(in, k): the fewest right singular vectors that hold this share of the energy."""
    _, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    return vh[: int((share < energy).sum()) + 1].T


def same_span(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.double(), b.double()
    return a.shape == b.shape and torch.allclose(a @ a.T, b @ b.T, atol=1e-4)


def test_the_base_protects_the_principal_directions_of_each_weight():
    model = make_text_model()
    memory = KeepLora(model, targets=["q_proj", "down_proj"], rank=2, energy_weight=0.6)
    assert set(memory.layers) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name, layer in memory.layers.items():
        assert same_span(memory.method.bases[name], leading_right(layer.module.weight.detach(), 0.6))


def test_A_holds_the_leading_directions_of_the_gradient_of_the_mean_loss_outside_of_the_subspace():
    model, batches = make_text_model(), text_batches(1)
    memory = KeepLora(model, targets=["q_proj"], rank=2, energy_weight=0.6, gradient="dense")
    reference = copy.deepcopy(model).double()
    total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for b in batches:
        (reference(**b).loss * int((b["labels"][:, 1:] != -100).sum()) / total).backward()
    memory.begin_task(batches)
    for name, layer in lora_layers(model).items():
        basis = memory.method.bases[name].double()
        gradient = reference.get_submodule(name).weight.grad
        outside = gradient - gradient @ basis @ basis.T
        naive = torch.linalg.svd(outside).Vh[:2]
        assert same_span(layer.lora_A["default"].weight.T, naive.T)


def test_after_two_tasks_each_update_is_zero_on_what_was_protected_before_it(learned_classifier):
    memory, weights, bases = learned_classifier
    for t in (1, 2):
        for name in memory.layers:
            update, basis = (weights[t][name] - weights[t - 1][name]).double(), bases[t - 1][name].double()
            assert update.norm() > 1e-3
            assert (update @ basis).norm() < 1e-5 * update.norm()
            A = memory.tasks[t - 1].deltas[name].A.double()
            assert torch.allclose(A @ A.T, torch.eye(len(A), dtype=torch.float64), atol=1e-5)


def test_a_task_adds_the_fewest_feature_directions_that_reach_the_energy(learned_classifier):
    memory, _, bases = learned_classifier
    x = torch.cat([x for x, _ in vector_batches(1)]).double()  # The features of the first layer.
    before, after = bases[0]["body.0"].double(), bases[1]["body.0"].double()

    def held(basis: torch.Tensor) -> float:
        return float((x @ basis).square().sum() / x.square().sum())

    assert held(before) < 0.9 <= held(after) + 1e-6
    assert held(after[:, :-1]) < 0.9


def test_padding_is_no_feature():
    model, batches = make_text_model(), text_batches(1, count=1)
    memory = KeepLora(model, targets=["model.layers.0.self_attn.q_proj"], rank=2, energy_weight=0.3)
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    train(memory.begin_task(batches), batches)
    seen.clear()
    memory.end_task(batches)
    tokens = seen[-1][batches[0]["attention_mask"].bool()].double()
    basis = memory.method.bases["model.layers.0.self_attn.q_proj"].double()
    share = float((tokens @ basis).square().sum() / tokens.square().sum())
    report = memory.tasks[0].report["feature_energy"]["model.layers.0.self_attn.q_proj"]
    assert report["after"] == pytest.approx(share, abs=1e-3) and share >= 0.99 - 1e-4


def test_merging_is_the_base_plus_all_updates_rounded_once(learned_classifier):
    memory, weights, _ = learned_classifier
    for name, layer in memory.layers.items():
        total = weights[0][name].double() + sum(task.deltas[name].dense().double() for task in memory.tasks)
        assert torch.allclose(layer.module.weight.double(), total, atol=1e-6)
    assert not lora_layers(memory.model)


def test_the_options_that_bound_or_share_an_update_do_so():
    updates = {}
    for name, options in {
        "whole": {},
        "half": {"interpolation": 0.5},
        "bounded": {"update_bound": 1e-3},
    }.items():
        model, batches = make_classifier(), vector_batches(1)
        start = {
            key: model.get_submodule(key).weight.detach().double().clone() for key in ("body.0", "body.3")
        }
        memory = KeepLora(model, targets=["0", "3"], rank=2, energy_weight=0.5, **options)
        bases = {key: memory.method.bases[key].double().clone() for key in start}
        train(memory.begin_task(batches, vector_loss), batches, vector_loss)
        memory.end_task(batches)
        deltas = memory.tasks[0].deltas
        updates[name] = {key: deltas[key].dense(torch.device("cpu")).double() for key in start}
        for key, weight in start.items():
            change = model.get_submodule(key).weight.detach().double() - weight
            torch.testing.assert_close(change, updates[name][key], atol=1e-6, rtol=1e-5)
            if name == "bounded":
                free = weight - weight @ bases[key] @ bases[key].T
                assert float(change.norm()) == pytest.approx(1e-3 * float(free.norm()), rel=1e-3)
                assert memory.tasks[0].report["update_shares"][key] < 1
    for key, update in updates["whole"].items():
        torch.testing.assert_close(updates["half"][key], 0.5 * update)


def test_a_task_ended_without_data_protects_the_directions_that_its_update_reads():
    model, batches = make_classifier(), vector_batches(1)
    memory = KeepLora(model, targets=["0"], rank=2, energy_weight=0.5, energy_feature=1.0)
    train(memory.begin_task(batches, vector_loss), batches, vector_loss)
    memory.end_task()
    basis, update = memory.method.bases["body.0"].double(), memory.tasks[0].deltas["body.0"].dense().double()
    assert (update - update @ basis @ basis.T).norm() < 1e-5 * update.norm()
    assert memory.tasks[0].report["features_of"] == "update"


def test_the_model_comes_back_as_it_was_given():
    model, batches = make_classifier(), vector_batches(1)
    model.body[0].bias.requires_grad_(False)
    model.train()
    model.head.eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    memory = KeepLora(model, targets=["0"], rank=2, energy_weight=0.5)
    before = copy.deepcopy(model.state_dict())
    memory.begin_task(batches, vector_loss)
    assert memory.cancel_task() is model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    assert model.training and not model.head.training


def test_a_saved_memory_goes_on_as_the_one_that_was_never_saved(learned_classifier, tmp_path):
    memory, weights, _ = learned_classifier
    memory.save(tmp_path / "memory")
    again = KeepLora.load(make_classifier(), tmp_path / "memory")
    assert [task.name for task in again.tasks] == ["task-1", "task-2"]
    batches, results = vector_batches(3), []
    for each in (memory, again):
        for name, layer in each.layers.items():
            assert torch.equal(layer.module.weight, weights[-1][name])
        torch.manual_seed(0)
        train(each.begin_task(batches, vector_loss), batches, vector_loss)
        each.end_task(batches)
        results.append((each.model.state_dict(), each.method.bases))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_saved_memory_is_a_peft_adapter_of_the_base(tmp_path):
    from peft import PeftModel

    model, batches = make_text_model(), text_batches(1)
    memory = KeepLora(model, targets=["q_proj", "v_proj"], rank=2, energy_weight=0.6)
    train(memory.begin_task(batches), batches)
    memory.end_task(batches)
    memory.save(tmp_path / "memory")
    plain = PeftModel.from_pretrained(make_text_model(), str(tmp_path / "memory")).eval()
    with torch.no_grad():
        expected, logits = (m(**batches[0]).logits for m in (model.eval(), plain))
    assert torch.allclose(expected, logits, atol=1e-5)


@pytest.mark.parametrize("again", ["set_adapter", "reload", "save"])
def test_A_stays_frozen_under_what_peft_offers(again, tmp_path):
    from peft import PeftModel

    model, batches = make_text_model(), text_batches(1)
    memory = KeepLora(model, targets=["q_proj"], rank=2, energy_weight=0.6)
    wrapper = memory.begin_task(batches)
    wrapper.save_pretrained(tmp_path)
    if again == "set_adapter":
        wrapper.set_adapter("default")
    elif again == "save":
        wrapper.train()
    else:
        wrapper = PeftModel.from_pretrained(make_text_model(), str(tmp_path), is_trainable=True)
        assert freeze_A(wrapper) == 2
        wrapper.set_adapter("default")
    trained = {name.split(".lora_")[1][0] for name, p in wrapper.named_parameters() if p.requires_grad}
    assert trained == {"B"}


def test_a_quarter_of_the_batches_is_read_for_A_and_all_of_them_for_the_features():
    model, batches = make_classifier(), vector_batches(1, count=8)
    seen = []

    def loss(model, batch):
        seen.append(next(i for i, b in enumerate(batches) if b[0] is batch[0]))
        return vector_loss(model, batch)

    memory = KeepLora(model, targets=["0"], rank=2, energy_weight=0.5, gradient_fraction=0.25)
    wrapper = memory.begin_task(batches, loss)
    assert set(seen) == {0, 4}
    train(wrapper, batches, vector_loss)
    seen.clear()
    memory.end_task(batches)
    assert set(seen) == set(range(8))


def begun():
    model, batches = make_classifier(), vector_batches(1)
    memory = KeepLora(model, targets=["0", "3"], rank=2, energy_weight=0.5)
    return memory, memory.begin_task(batches, vector_loss), batches


def test_a_task_begun_twice_or_ended_without_a_beginning_is_refused():
    memory, wrapper, batches = begun()
    with pytest.raises(MethodError, match="'task-1' has begun"):
        memory.begin_task(batches, vector_loss)
    with pytest.raises(MethodError, match="'task-1' has begun"):
        memory.save("nowhere")
    train(wrapper, batches, vector_loss)
    memory.end_task(batches)
    with pytest.raises(MethodError, match="no task has begun"):
        memory.end_task(batches)
    with pytest.raises(MethodError, match="no task has begun"):
        memory.cancel_task()
    with pytest.raises(MethodError, match="'task-1'"):
        memory.begin_task(batches, vector_loss, name="task-1")


def test_a_loop_that_never_stepped_is_refused_and_can_be_made_good():
    memory, wrapper, batches = begun()
    with pytest.raises(MethodError, match="no adapter of task 'task-1' has changed"):
        memory.end_task(batches)
    train(wrapper, batches, vector_loss)
    memory.end_task(batches)
    assert len(memory.tasks) == 1


@pytest.mark.parametrize(
    ("move", "name"),
    [
        (lambda layer, model: layer.lora_A["default"].weight.data.add_(0.1), "moved A of body.0"),
        (lambda layer, model: layer.base_layer.weight.data.add_(0.1), "1 frozen tensors .*body.0"),
        (lambda layer, model: model.head.bias.data.mul_(1.5), "1 frozen tensors .*head.bias"),
        (lambda layer, model: layer.lora_B["default"].weight.data.fill_(float("nan")), "not finite"),
    ],
    ids=["A", "adapted", "frozen", "nan"],
)
def test_training_that_moved_what_is_frozen_is_refused_and_the_adapters_stay(move, name):
    memory, wrapper, batches = begun()
    train(wrapper, batches, vector_loss)
    move(lora_layers(memory.model)["body.0"], memory.model)
    with pytest.raises(MethodError, match=name):
        memory.end_task(batches)
    assert len(lora_layers(memory.model)) == 2 and not memory.tasks


def test_adapters_that_were_merged_before_the_end_are_missed():
    memory, wrapper, batches = begun()
    train(wrapper, batches, vector_loss)
    wrapper.merge_and_unload()
    with pytest.raises(MethodError, match="2 of 2 layers .* lost their adapters"):
        memory.end_task(batches)


def test_a_failing_feature_pass_loses_nothing():
    memory, wrapper, batches = begun()
    train(wrapper, batches, vector_loss)
    with pytest.raises(RuntimeError):
        memory.end_task([(torch.zeros(2, 3), torch.zeros(2).long())])
    memory.end_task(batches)
    assert len(memory.tasks) == 1 and bool(memory.tasks[0].deltas["body.0"].B.any())


@pytest.mark.parametrize(
    ("batches", "loss", "match"),
    [
        (iter(vector_batches(1)), vector_loss, "read once"),
        ([], vector_loss, "no batch"),
        (vector_batches(1), None, "tuple.*model\\(\\*\\*batch\\)"),
        (vector_batches(1), lambda model, batch: model(batch[0]), r"one number .*\(16, 5\)"),
    ],
)
def test_batches_and_losses_that_give_no_gradient_are_refused_before_anything_changes(batches, loss, match):
    model = make_classifier()
    memory = KeepLora(model, targets=["0"], rank=2, energy_weight=0.5)
    with pytest.raises(MethodError, match=match):
        memory.begin_task(batches, loss)
    assert not lora_layers(model)
    memory.begin_task(vector_batches(1), vector_loss)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"targets": ["q_porj"]}, "'q_porj' .*matches no module"),
        ({"targets": ["1"]}, "body.1.* GELU"),
        ({"targets": {"a": {"targets": ["0"]}, "b": {"targets": "body.*0"}}}, "body.0 .*'a' and 'b'"),
        ({"targets": {"a": {"rank": 3}}}, "'a' names no layers"),
        ({"targets": {"a": {"targets": ["0"], "rnak": 3}}}, "no setting 'rnak'"),
        ({"energy_weight": 1.5}, "energy_weight"),
        ({"energy_weight": "auto"}, "'auto'"),
        ({"rank": 12, "targets": ["0"]}, "rank is 12"),
        ({"gradient_fracton": 0.5}, "no setting 'gradient_fracton'"),
        ({"distillation": 2.0}, "distillation is 2, but .* the training is yours"),
        ({"preset": "balanced"}, "distillation is 10, but .* preset to 'paper'"),
        ({"rejection": 0.05}, "rejection is 0.05, but .* set rejection to 0"),
        ({"preset": "balanced-rejection", "distillation": 0.0}, "rejection is 0.05, but"),
    ],
)
def test_settings_that_the_model_cannot_follow_are_refused(arguments, match):
    with pytest.raises((ConfigError, MethodError), match=match):
        KeepLora(make_classifier(), **arguments)


def test_all_linear_leaves_out_the_output_embeddings():
    assert "lm_head" not in KeepLora(make_text_model(), rank=2, energy_weight=0.5).layers


def test_another_base_is_refused(learned_classifier, tmp_path):
    memory, _, _ = learned_classifier
    memory.save(tmp_path / "memory")
    with pytest.raises(MethodError, match="weights of body.0 are not those"):
        KeepLora.load(make_classifier(seed=1), tmp_path / "memory")
    with pytest.raises(MethodError, match="weights of body.0 .*merged into"):
        KeepLora.load(memory.model, tmp_path / "memory")
    other = make_classifier()
    name, parameter = list(other.named_parameters())[-1]
    parameter.data.add_(1)
    with pytest.raises(MethodError, match=f"weights of {name} are not those"):
        KeepLora.load(other, tmp_path / "memory")
    with pytest.raises(ConfigError, match="matches no module"):
        KeepLora.load(nn.Sequential(nn.Linear(3, 3)), tmp_path / "memory")


def test_the_name_of_a_model_is_refused():
    with pytest.raises(MethodError, match="model is a str.*from_pretrained"):
        KeepLora("some/model", targets=["q_proj"])


def test_a_model_with_adapters_is_refused():
    memory, _, _ = begun()
    with pytest.raises(MethodError, match="has LoRA layers"):
        KeepLora(memory.model, targets=["head"])


@pytest.mark.parametrize("damage", ["record", "tensor", "missing", "format"])
def test_a_damaged_memory_is_refused(learned_classifier, tmp_path, damage):
    memory, _, _ = learned_classifier
    folder = memory.save(tmp_path / "memory")
    record, tensor = folder / "keeplora.json", folder / "task-01" / "delta.safetensors"
    if damage == "record":
        record.write_text("{}")
    elif damage == "format":
        record.write_text(record.read_text().replace('"format": 1', '"format": 7'))
    elif damage == "tensor":
        tensor.write_bytes(tensor.read_bytes()[:-1] + b"\0")
    else:
        tensor.unlink()
    with pytest.raises(RunError):
        KeepLora.load(make_classifier(), folder)


def test_other_files_are_not_overwritten(learned_classifier, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="no memory"):
        learned_classifier[0].save(tmp_path)
    assert (tmp_path / "mine.txt").exists()


def plain_adapter(folder, seed: int = 1, targets=("0", "3"), rank: int = 3):
    """A LoRA adapter that plain PEFT trained on the base."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_classifier(), LoraConfig(r=rank, lora_alpha=6, target_modules=list(targets)))
    train(model, vector_batches(seed), vector_loss)
    model.save_pretrained(folder)
    update = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().double()
        for name, layer in lora_layers(model).items()
    }
    return update


@pytest.mark.parametrize("with_data", [True, False], ids=["data", "no-data"])
def test_an_adapter_of_plain_peft_is_projected_off_the_subspace_and_then_protected(tmp_path, with_data):
    update = plain_adapter(tmp_path)
    model, batches = make_classifier(), vector_batches(1)
    memory = KeepLora(model, targets=["0", "3"], rank=2, energy_weight=0.5, energy_feature=0.99)
    before = {
        n: (layer.module.weight.detach().double(), memory.method.bases[n].double())
        for n, layer in memory.layers.items()
    }
    memory.adopt_task(tmp_path, batches if with_data else None, vector_loss, name="theirs")
    kept = lost = 0.0
    for name, (weight, basis) in before.items():
        expected = update[name] - update[name] @ basis @ basis.T
        taken = model.get_submodule(name).weight.double() - weight
        assert torch.allclose(taken, expected, atol=1e-5)
        kept, lost = kept + update[name].norm() ** 2, lost + (update[name] - expected).norm() ** 2
        after = memory.method.bases[name].double()
        assert after.shape[1] > basis.shape[1]
        if not with_data:
            assert (taken - taken @ after @ after.T).norm() ** 2 < 0.011 * taken.norm() ** 2
    report = memory.tasks[0].report
    assert report["adopted"]["removed"] == pytest.approx(float(lost / kept), rel=1e-4)
    assert report["adopted"]["form"] == "adapter" and report["features_of"] == (
        "data" if with_data else "update"
    )


def test_what_a_memory_began_and_another_loop_trained_is_adopted_exactly(tmp_path):
    memory, wrapper, batches = begun()
    train(wrapper, batches, vector_loss)
    wrapper.save_pretrained(tmp_path)
    memory.end_task(batches)
    again = KeepLora(make_classifier(), targets=["0", "3"], rank=2, energy_weight=0.5)
    again.adopt_task(tmp_path, batches, vector_loss)
    assert again.tasks[0].report["adopted"]["removed"] < 1e-10
    for name, delta in memory.tasks[0].deltas.items():
        assert torch.allclose(delta.dense(), again.tasks[0].deltas[name].dense(), atol=1e-6)


def test_an_adapter_that_does_not_fit_is_refused_and_the_memory_stays(tmp_path):
    plain_adapter(tmp_path / "wide", targets=("0", "head"))
    plain_adapter(tmp_path / "fits")
    memory = KeepLora(make_classifier(), targets=["0", "3"], rank=2, energy_weight=0.5)
    weight = memory.model.body[0].weight.detach().clone()
    with pytest.raises(MethodError, match="1 layers that this memory does not protect, first head"):
        memory.adopt_task(tmp_path / "wide")
    with pytest.raises(RunError, match="no linear layer"):
        KeepLora(make_text_model(), targets=["q_proj"], rank=2, energy_weight=0.5).adopt_task(
            tmp_path / "fits"
        )
    with pytest.raises(RuntimeError):
        memory.adopt_task(tmp_path / "fits", [(torch.zeros(2, 3), torch.zeros(2).long())], vector_loss)
    assert torch.equal(memory.model.body[0].weight, weight) and not memory.tasks
    memory.adopt_task(tmp_path / "fits")
    assert len(memory.tasks) == 1
