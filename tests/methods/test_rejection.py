"""With `rejection` the untouched base answers what resembles no learned task, and nothing else changes."""

import json
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, MethodError
from llava_keeplora.export.loaded_run import load_learned_run
from llava_keeplora.export.run_export import export_run
from llava_keeplora.methods import METHODS
from llava_keeplora.methods.prototypes import left_out_cosines, prototypes
from llava_keeplora.methods.rejection import RejectingPredictor
from llava_keeplora.methods.switching import BASE
from llava_keeplora.models import Prepared
from llava_keeplora.saved_run import run_identity
from llava_keeplora.testing import check_method
from llava_keeplora_eval.predictions import read_predictions
from llava_keeplora_recipes import load_split
from run_answers import assert_predictor_answers_as_the_run

KeepLora = METHODS["keeplora"]


@pytest.fixture(scope="module", params=["keeplora", "eblora"])
def finished(request, tmp_path_factory, run_config, driven, tiny_tasks):
    methods = {"open": {"method": request.param}, "wary": {"method": request.param, "rejection": 0.5}}
    folder = tmp_path_factory.mktemp("rejection") / "run"
    return driven(run_config(folder, methods=methods, tasks=[str(path) for path in tiny_tasks[:2]]))


def test_training_is_the_same_and_a_task_keeps_its_prototypes_and_a_number_more(finished):
    for name in ("delta.safetensors", "adapters.safetensors"):
        first, second = (sorted((finished / label).glob(f"task-*/{name}")) for label in ("open", "wary"))
        assert first and [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for task in (0, 1, 2):
        found = (
            list((finished / label).glob(f"task-{task:02}-*/state.safetensors")) for label in ("open", "wary")
        )
        # EBLoRA keeps nothing of the base.
        open_, wary = (load_file(files[0]) if task or files else {} for files in found)
        own = {"prototypes", "prototypes.least"} if task else set()
        assert set(wary) == set(open_) | own
        assert all(torch.equal(wary[key], tensor) for key, tensor in open_.items())


@pytest.mark.parametrize("after", [1, 2])
def test_the_base_answers_what_is_further_from_every_task_than_half_of_its_own_and_the_merged_model_the_rest(
    finished, after
):
    learned = load_learned_run(finished, "wary")
    base, merged = learned.load(deltas=[]), learned.load(deltas=learned.deltas[:after])
    states = [load_file(next((finished / "wary").glob(f"task-{t:02}-*/state.safetensors"))) for t in (1, 2)]
    seen = set()
    for recipe in learned.recipes:
        data = load_split(recipe, "test")
        predictor = base.predictor(recipe, Prepared(base, data))
        features = predictor.features(list(data)).double()
        cosines = torch.stack(
            [(features @ s["prototypes"].double().T).amax(dim=1) for s in states[:after]], 1
        )
        least = torch.stack([s["prototypes.least"].double() for s in states[:after]])
        nearest = cosines.argmax(dim=1)
        known = (cosines.amax(dim=1) >= least[nearest]).tolist()
        texts = [m.predictor(recipe, Prepared(m, data)).predict(list(data)) for m in (base, merged)]
        folder = next((finished / "wary").glob(f"task-{after:02}-*"))
        found = read_predictions(folder / f"predictions/{recipe.name}.jsonl", data)
        assert [found[key] for key in data.ids] == [texts[own][row] for row, own in enumerate(known)]
        routes = json.loads((folder / "scores.json").read_text())[recipe.name]["routes"]
        assert routes["base"] == known.count(False) == len(data) - sum(routes["tasks"].values())
        tasks = Counter(learned.recipes[task].name for task, own in zip(nearest.tolist(), known) if own)
        assert routes["tasks"] == tasks
        seen |= set(known)
    assert seen == {True, False}


@pytest.mark.parametrize("after", [1, 2])
def test_a_predictor_of_the_finished_run_answers_as_the_run_did(finished, after):
    assert_predictor_answers_as_the_run(finished, "wary", after)


def test_a_share_of_the_training_examples_is_below_the_number_that_is_kept(finished):
    learned = load_learned_run(finished, "wary")
    base = learned.load(deltas=[])
    for task, recipe in enumerate(learned.recipes, 1):
        state = load_file(next((finished / "wary").glob(f"task-{task:02}-*/state.safetensors")))
        data = load_split(recipe, "train")
        predictor = base.predictor(recipe, Prepared(base, data))
        features, prompts = predictor.features(list(data)), predictor.class_features()
        labels = torch.tensor([example.label for example in data])
        own = []
        for row, feature in enumerate(features):
            others = torch.arange(len(data)) != row
            own.append(float((prototypes(features[others], labels[others], prompts) @ feature).max()))
        below = torch.tensor(own) < state["prototypes.least"] - 1e-6
        assert int(below.sum()) == len(data) // 2


@pytest.mark.parametrize("per_class", [1, 2, 8])
@pytest.mark.parametrize("with_prompts", [True, False])
def test_no_more_new_examples_than_the_share_are_below_it_however_few_a_class_has(per_class, with_prompts):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    classes, width, rejected = 12, 32, []
    for _ in range(40):
        centres = draw(classes, width)
        prompts = normalize(centres + draw(classes, width), dim=1) if with_prompts else None
        labels = torch.arange(classes).repeat(per_class)
        seen, new = (normalize(centres[labels] + draw(len(labels), width), dim=1) for _ in range(2))
        least = left_out_cosines(seen, labels, prompts).float().kthvalue(int(0.2 * len(labels)) + 1).values
        nearest = (new @ prototypes(seen, labels, prompts).T).amax(dim=1)
        rejected.append(float((nearest < least).float().mean()))
    assert torch.tensor(rejected).mean() <= 0.2 + 2 * torch.tensor(rejected).std() / 40**0.5


def test_an_example_that_is_all_of_its_kind_is_far_from_what_is_left_without_it():
    features = normalize(torch.tensor([[1.0, 2.0, 0.0]]), dim=1)
    assert left_out_cosines(features, torch.zeros(1, dtype=torch.long), None).tolist() == [0.0]


def test_a_batch_is_answered_in_order_and_nobody_is_asked_for_nothing():
    state = ["merged"]

    @contextmanager
    def off():
        state.append("base")
        yield
        state.pop()

    class Echo:
        def __init__(self, name):
            self.name = name

        def predict(self, examples):
            assert examples and state[-1] == self.name
            return [f"{self.name} {example}" for example in examples]

    def choose(examples):
        assert state[-1] == "base"
        return [BASE if example < 0 else example for example in examples]

    predictor = RejectingPredictor(Echo("base"), Echo("merged"), ["a", "b", "c", "d"], choose, off)
    assert predictor.predict([1, -5, 0, -2]) == ["merged 1", "base -5", "merged 0", "base -2"]
    assert predictor.routed_to == ["b", None, "a", None]
    assert predictor.predict([3]) == ["merged 3"] and predictor.predict([-1]) == ["base -1"]
    assert predictor.predict([]) == []


def test_the_preset_with_rejection_is_the_balanced_one_and_a_share_and_does_not_merge():
    method = KeepLora(KeepLora.Options(preset="balanced-rejection"))
    assert (method.prototypes.rejection, method.distillation, method.mergeable) == (0.05, 10.0, False)
    assert KeepLora(KeepLora.Options(preset="balanced")).mergeable
    other = KeepLora(KeepLora.Options(preset="balanced-rejection", rejection=0.2))
    assert other.prototypes.rejection == 0.2


def test_a_rejection_or_distillation_of_0_is_none_with_every_preset_and_another_run_than_the_presets(
    run_config, tmp_path
):
    off = KeepLora(KeepLora.Options(preset="balanced-rejection", rejection=0.0))
    assert off.mergeable and not off.keeps_prototypes and off.distillation == 10.0

    def recorded(**options):
        config = run_config(tmp_path / "run", methods={"keeplora": options})
        return run_identity(config)["methods"]["keeplora"]["options"]

    assert "rejection" not in recorded() and recorded(rejection=0) == recorded()
    assert "rejection" not in recorded(preset="balanced-rejection")
    assert recorded(preset="balanced-rejection", rejection=0)["rejection"] == 0
    assert "distillation" not in recorded() and recorded(distillation=0) == recorded()
    assert "distillation" not in recorded(preset="balanced")
    assert recorded(preset="balanced", distillation=0)["distillation"] == 0


@pytest.mark.parametrize("name", ["keeplora", "eblora"])
def test_a_method_that_rejects_says_what_it_needs_and_does_not_merge(name):
    Method = METHODS[name]
    with pytest.raises(MethodError, match="rejection must be at least 0 and below 1 .got 1.0"):
        Method(Method.Options(rejection=1.0))
    method, plain = Method(Method.Options(rejection=0.1)), Method(Method.Options())
    assert not (method.mergeable or method.adopts or method.supports_zero3) and method.keeps_prototypes
    assert "does not merge" in method.info.needs and "a pass of the base" in method.info.needs
    assert plain.mergeable and not plain.keeps_prototypes


def test_what_a_method_asks_for_besides_stays_in_its_description():
    cls = METHODS["keeplora+"]
    plain, wary = (cls(cls.Options(rejection=share)).info for share in (0.0, 0.1))
    for own, with_rejection in (
        (plain.inference_cost, wary.inference_cost),
        (plain.extra_parameters, wary.extra_parameters),
    ):
        assert with_rejection.startswith(own) and "base" in with_rejection and "base" not in own
    assert "rejection" in cls.info.variants


def test_what_does_not_go_with_rejection_is_refused(finished, run_tree, tmp_path):
    with pytest.raises(ConfigError, match="does not merge.*export --as state"):
        export_run(finished, "merged", base_id="user/name", label="wary")
    Individual = METHODS["individual"]
    with pytest.raises(MethodError, match="of is 'keeplora' with rejection.*leave rejection out"):
        Individual(Individual.Options(of="keeplora", settings={"rejection": 0.1}))
    zero3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    tree = run_tree(tmp_path / "run", methods={"keeplora": {"rejection": 0.1}})
    tree["training"]["deepspeed"] = zero3
    with pytest.raises(ConfigError, match="stage 3, but 'keeplora'.*answers with the base.*use stage 2"):
        parse_config(tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("keeplora", "clip"),
        ("keeplora", "llava"),
        ("keeplora+", "clip"),
        ("keeplora++", "llava"),
        ("eblora", "clip"),
    ],
)
def test_a_killed_and_an_extended_run_end_as_one_in_one_go(
    request, tiny_tasks, mixed_tasks, tmp_path, name, family
):
    tree = request.getfixturevalue("run_tree" if family == "clip" else "llava_tree")
    tasks = [str(path) for path in (tiny_tasks if family == "clip" else mixed_tasks)[:2]]
    check_method(name, {"rejection": 0.5}, tree(tmp_path / "run", tasks=tasks))
