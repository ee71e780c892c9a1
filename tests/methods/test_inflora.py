"""The identities of InfLoRA, on a run and against DualGPM written out."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llava_keeplora.adapters import load_deltas
from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS, Layer, TaskContext

InfLora = METHODS["inflora"]


# --- on a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_config, driven):
    return (
        driven(
            run_config(tmp_path_factory.mktemp("inflora") / "run", methods={"inflora": {"energy_step": 0.02}})
        )
        / "inflora"
    )


def tasks(finished):
    """Each task's folder with M of every layer as it was before the task."""
    method, states = InfLora(InfLora.Options()), []
    for folder in sorted(finished.glob("task-*")):
        if not folder.name.startswith("task-00"):
            method.load_state_dicts(states)
            yield folder, dict(method.bases)
            states = [*states, load_file(folder / "state.safetensors")]


def test_A_has_orthogonal_rows_of_squared_length_a_third_and_reads_nothing_that_is_protected(finished):
    for number, (folder, bases) in enumerate(tasks(finished)):
        for name, delta in load_deltas(folder / "delta.safetensors").items():
            torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(len(delta.A)) / 3, atol=1e-6, rtol=0)
            assert torch.equal(delta.A, load_file(folder / "adapters.safetensors")[f"{name}.A"]), (
                "A is frozen"
            )
            if number:
                assert bases[name].shape[1] > 0 and float((delta.A @ bases[name]).abs().max()) < 1e-6


def test_an_input_inside_the_protected_subspace_gives_the_same_output_after_the_task(finished):
    for number, (folder, bases) in enumerate(tasks(finished)):
        for name, delta in load_deltas(folder / "delta.safetensors").items():
            assert float(delta.dense().norm()) > 0
            if number:
                assert float((delta.dense() @ bases[name]).norm()) < 1e-5 * float(delta.dense().norm())


def test_layers_that_read_the_same_tensor_share_A_and_M_which_is_kept_once(finished):
    for folder, bases in tasks(finished):
        deltas = load_deltas(folder / "delta.safetensors")
        keys = load_file(folder / "state.safetensors").keys()
        groups = {frozenset(name.rsplit(".", 1)[1] for name in key.split("|")) for key in keys}
        assert (
            groups == {frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"out_proj"})}
            and len(keys) == len(deltas) / 2
        )
        for name in deltas:
            if name.endswith("k_proj"):
                other = name.replace("k_proj", "v_proj")
                assert torch.equal(deltas[name].A, deltas[other].A) and not torch.equal(
                    deltas[name].B, deltas[other].B
                )


def test_M_stays_orthonormal_and_the_share_that_it_holds_rises_with_every_task(finished):
    for number, (folder, bases) in enumerate(tasks(finished)):
        report = json.loads((folder / "consolidated.json").read_text())
        for name, energy in report["feature_energy"].items():
            before = bases[name].shape[1] if name in bases else 0
            assert energy["after"] >= 0.9 + 0.02 * number - 1e-9
            assert report["capacity"][name]["k"] == before + energy["new"] <= report["capacity"][name]["in"]
        for basis in bases.values():
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=5e-6, rtol=0)


# --- on one layer --------------------------------------------------------------------------------

WIDTH, RANK = 12, 2


def context(x, index=1, budget=10**9, energy=0.8):
    """A task whose layer reads the rows of x; a second layer reads the same tensor."""
    layers = {
        name: Layer(name, "vision", nn.Linear(WIDTH, 6), RANK, float(RANK), 0.5, energy)
        for name in ("k", "v")
    }

    def features(make):
        made = make([["k", "v"]])
        assert made["k"] is made["v"], "what is read once is summed once"
        made["k"].add(x, None)
        return made

    return TaskContext(index, "t", layers, None, features, seed=0, statistics_bytes=budget)


def draw(count, seed):
    """Features with a falling spectrum in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return torch.randn(count, WIDTH, generator=generator) * 1.7 ** -torch.arange(WIDTH) @ directions


class DualGpm:
    """DualGPM as its authors describe it, in float64: what is protected, or from half of the space on what is free."""

    def __init__(self):
        self.M, self.mode = torch.zeros(WIDTH, 0).double(), "remove"

    @property
    def protected(self):
        """The projector onto the protected subspace."""
        inside = self.M @ self.M.T
        return inside if self.mode == "remove" else torch.eye(WIDTH).double() - inside

    def outside(self, x):
        """U and the energies of Φ outside the protected subspace, and all of Φ's energy."""
        moment = x.double().T @ x.double()
        U, S, _ = torch.linalg.svd((torch.eye(WIDTH).double() - self.protected) @ moment)
        return U, S.square(), torch.linalg.svdvals(moment).square().sum()

    def grow(self, x, energy):
        U, squares, total = self.outside(x)
        held = total - squares.sum()
        count = 0
        while held + squares[:count].sum() < energy * total:
            count += 1
        if self.mode == "remove":
            self.M = torch.cat([self.M, U[:, :count]], dim=1)
        else:
            left = self.M @ self.M.T - U[:, :count] @ U[:, :count].T
            self.M = torch.linalg.eigh(left).eigenvectors[:, count - self.M.shape[1] :]
        if self.mode == "remove" and self.M.shape[1] > WIDTH / 2:
            before = self.protected
            self.M, self.mode = torch.linalg.qr(self.M, mode="complete").Q[:, self.M.shape[1] :], "retain"
            (
                torch.testing.assert_close(before + self.M @ self.M.T, torch.eye(WIDTH).double()),
                "together they are everything",
            )


def test_it_protects_what_DualGPM_protects_in_both_of_its_forms_and_reads_what_that_leaves():
    method, reference, modes, states = InfLora(InfLora.Options(energy_step=0.005)), DualGpm(), [], []
    for index in range(1, 5):
        x = draw(200, index)
        A = method.init_adapters(context(x, index, energy=0.97))["k"].A.double() * math.sqrt(3)
        U = reference.outside(x)[0][:, :RANK]
        torch.testing.assert_close(A.T @ A, U @ U.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            A @ reference.protected, torch.zeros(RANK, WIDTH).double(), atol=1e-6, rtol=0
        )
        method.after_task(context(x, index, energy=0.97))
        states.append(method.state_dict())
        reference.grow(x, 0.97 + 0.005 * (index - 1))
        modes.append(reference.mode)
        basis = method.bases["k"].double()
        torch.testing.assert_close(basis @ basis.T, reference.protected, atol=1e-5, rtol=0)
    assert set(modes) == {"remove", "retain"}, "the sequence goes through both forms"
    again = InfLora(InfLora.Options())
    again.load_state_dicts(states)
    assert (
        all(torch.equal(again.bases[name], method.bases[name]) for name in ("k", "v"))
        and again.capacity() == method.capacity()
    )


def test_inputs_of_fewer_directions_give_a_smaller_adapter_at_the_same_scale():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(50, 1, generator=generator) @ torch.randn(1, WIDTH, generator=generator)
    init = InfLora(InfLora.Options()).init_adapters(context(thin))["k"]
    assert init.rank == len(init.A) == 1 and init.scale == 1.0


def test_when_all_that_a_task_reads_is_protected_it_is_refused():
    method, x = InfLora(InfLora.Options()), torch.eye(WIDTH).repeat(5, 1)
    method.after_task(context(x, energy=1.0))
    with pytest.raises(
        MethodError,
        match="no adapted layer has a direction left for task 't'; lower energy_feature or energy_step",
    ):
        method.init_adapters(context(x, 2))


def test_the_base_alone_protects_nothing():
    method = InfLora(InfLora.Options())
    ctx = context(draw(50, 0), index=0)
    method.after_task(ctx)
    assert (
        not method.bases
        and not method.state_dict()
        and {one["k"] for one in ctx.report["capacity"].values()} == {0}
    )


def test_second_moments_that_do_not_fit_are_refused_with_the_cure():
    with pytest.raises(
        MethodError,
        match=r"second moments for task 't' take 5.8e-07 GB, but memory.statistics_gb is 1e-07; raise memory.statistics_gb, or adapt k_proj",
    ):
        InfLora(InfLora.Options()).init_adapters(context(draw(50, 0), budget=100))


def test_a_rise_that_is_none_is_refused():
    with pytest.raises(MethodError, match=r"energy_step must be in \[0, 1\) .got 1.0.; set it to 0"):
        InfLora.Options(energy_step=1.0)
