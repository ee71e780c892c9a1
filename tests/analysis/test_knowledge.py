"""A model cut down to the principal or the residual part of its weights: what is left of them, what is scored, what is written."""

import csv
import json
import statistics

import pytest
import torch
from transformers import CLIPModel

from llava_keeplora import cli
from llava_keeplora.adapters import dense_weight
from llava_keeplora.analysis import analyze_model, write_knowledge
from llava_keeplora.analysis.results import ALL, Knowledge, Point
from llava_keeplora.analysis.svd_split import SvdSplit, every_layer
from llava_keeplora.config import ModelConfig
from llava_keeplora_eval import predict_to_file, score
from llava_keeplora_eval.models import load_predictor
from llava_keeplora_recipes import load_recipe, load_split

ENERGY = 0.6


def sides(weight):
    """The two sides of a weight by the SVD and the definition of the energy rule."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = next(k for k in range(1, len(s) + 1) if s[:k].square().sum() >= ENERGY * s.square().sum())
    return {"principal": (u[:, :k] * s[:k]) @ vh[:k], "residual": (u[:, k:] * s[k:]) @ vh[k:]}, k


def test_each_side_of_a_weight_is_that_of_its_svd_and_the_whole_comes_back_bit_for_bit(tiny_clip, load):
    layers = every_layer(load(tiny_clip))["vision"]
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    cuts = SvdSplit(layers, ENERGY)
    ranks = []
    for side in ("principal", "residual"):
        with cuts.only(side):
            for name, layer in layers.items():
                expected, k = sides(before[name])
                torch.testing.assert_close(layer.weight.double(), expected[side], atol=1e-6, rtol=1e-5)
                ranks.append((k, layer.in_features))
        assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    assert cuts.directions == pytest.approx(sum(k for k, _ in ranks) / sum(width for _, width in ranks))


def test_the_whole_comes_back_after_an_error_too(tiny_clip, load):
    layers = every_layer(load(tiny_clip))["text"]
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    with pytest.raises(RuntimeError), SvdSplit(layers, ENERGY).only("residual"):
        raise RuntimeError
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def test_a_quantised_weight_is_cut_next_to_what_is_stored(tiny_llava, load):
    layers = every_layer(load(tiny_llava, quantization="nf4"))["language"]
    name, layer = next(iter(layers.items()))
    stored, x = layer.weight.data.clone(), torch.randn(3, layer.in_features)
    expected, _ = sides(dense_weight(layer))
    with SvdSplit({name: layer}, ENERGY).only("residual"):
        torch.testing.assert_close(
            layer(x).double(), x.double() @ expected["residual"].T, atol=1e-5, rtol=1e-4
        )
    assert torch.equal(layer.weight.data, stored)


def test_every_linear_layer_that_feeds_the_output_is_cut(tiny_clip, tiny_llava, load):
    clip, llava = every_layer(load(tiny_clip)), every_layer(load(tiny_llava))
    assert {part: len(layers) for part, layers in clip.items()} == {"vision": 2 * 6, "text": 2 * 6}
    # LLaVA takes its features before the last of two vision blocks.
    assert {part: len(layers) for part, layers in llava.items()} == {
        "vision": 6,
        "connector": 2,
        "language": 2 * 7,
    }


@pytest.fixture(scope="module")
def analysed(tiny_clip, tiny_tasks, tmp_path_factory):
    """A folder and what was found: two energies, one general and two specific tasks."""
    folder = tmp_path_factory.mktemp("analysis") / "out"
    groups = {"general": [str(tiny_tasks[0])], "specific": [str(path) for path in tiny_tasks[1:]]}
    knowledge = analyze_model(ModelConfig(str(tiny_clip)), groups, energies=[0.9, ENERGY])
    write_knowledge(knowledge, folder)
    return folder, knowledge


@pytest.mark.parametrize("side", ["principal", "residual"])
def test_a_score_is_that_of_a_checkpoint_with_the_cut_weights(
    analysed, tiny_clip, tiny_tasks, tmp_path, side
):
    """The cut checkpoint is written with transformers alone and scored by the evaluation alone."""
    model = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        for name, module in model.vision_model.encoder.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(sides(module.weight)[0][side])
    model.save_pretrained(tmp_path / "cut")
    for file in tiny_clip.iterdir():
        if not (tmp_path / "cut" / file.name).exists():
            (tmp_path / "cut" / file.name).write_bytes(file.read_bytes())
    (found,) = [p for p in analysed[1].points if (p.part, p.energy, p.side) == ("vision", ENERGY, side)]
    for path in tiny_tasks:
        data = load_split(load_recipe(str(path)), "test")
        predict_to_file(
            load_predictor(str(tmp_path / "cut"), data.recipe, "cpu"),
            data,
            tmp_path / f"{data.recipe.name}.jsonl",
        )
        assert found.scores[data.recipe.name] == score(data, tmp_path / f"{data.recipe.name}.jsonl").score


def test_the_folder_holds_numbers_table_and_image_that_say_the_same(analysed):
    folder, found = analysed
    assert {path.name for path in folder.iterdir()} == {
        f"knowledge.{kind}" for kind in ("json", "csv", "md", "png", "svg")
    }
    rows = list(csv.DictReader(open(folder / "knowledge.csv")))
    assert (
        len(rows) == 3 * 2 * 2 * 3 == len(json.loads((folder / "knowledge.json").read_text())["points"]) * 3
    )
    own = [
        float(r["score"])
        for r in rows
        if (r["part"], r["energy"], r["side"], r["group"]) == ("text", "0.9", "residual", "specific")
    ]
    line = next(
        line
        for line in (folder / "knowledge.md").read_text().splitlines()
        if line.startswith("| text | 90 |")
    )
    assert len(own) == 2 and line.split("|")[-2].strip() == f"{statistics.mean(own):.1f}"
    whole = next(
        line
        for line in (folder / "knowledge.md").read_text().splitlines()
        if line.startswith("| the whole model |")
    )
    assert (
        whole.split("|")[-2].strip()
        == f"{statistics.mean(found.whole[task] for task in ('stripes', 'corners')):.1f}"
    )


def knowledge(*values):
    """Made up: a whole model with 80 %, and what its principal parts alone have at energies 0.2, 0.4, ..."""
    points = [
        Point("vision", 0.2 * i, "principal", 0.1 * i, {"a": value, "b": 0.0})
        for i, value in enumerate(values, start=1)
    ]
    return Knowledge(
        {},
        {"general": {"a": {}}, "specific": {"b": {}}},
        {"a": 80.0, "b": 50.0},
        [*points, Point(ALL, 0.2, "principal", 0.1, {"a": 80.0, "b": 0.0})],
    )


@pytest.mark.parametrize(
    ("scores", "energy"),
    [
        ((10.0, 76.0, 79.0, 80.0), 0.4),
        ((78.0, 70.0, 77.0, 80.0), 0.6000000000000001),
        ((10.0, 20.0, 75.0), None),
        ((80.0,), 0.2),
    ],
)
def test_the_proposed_energy_is_the_smallest_from_which_on_95_percent_of_the_general_score_are_kept(
    scores, energy
):
    assert knowledge(*scores).proposals == {"vision": energy}


def test_the_examples_are_evenly_spaced_over_the_test_split(tiny_clip, tiny_tasks, tmp_path, capfd):
    tasks = ["--general", str(tiny_tasks[0]), "--specific", str(tiny_tasks[1])]
    assert (
        cli.main(
            [
                "analyze",
                str(tiny_clip),
                *tasks,
                "--energies",
                "0.5",
                "--examples",
                "4",
                "--into",
                str(tmp_path),
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    assert (
        out.startswith("| part | energy (%) |") and f"folder: {tmp_path}" in out and "general: colours" in out
    )
    record = json.loads((tmp_path / "knowledge.json").read_text())["tasks"]["general"]["colours"]
    whole = load_split(load_recipe(str(tiny_tasks[0])), "test")
    assert record["n"] == 4 and record["fingerprint"] == whole.take([0, 2, 4, 6]).fingerprint


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--specific", "{1}"], "there are no general tasks; name at least one with --general."),
        (["--general", "{0}"], "there are no specific tasks; name at least one with --specific."),
        (
            ["--general", "{0}", "--specific", "{0},{1}"],
            "task 'colours' is named 2 times; name each task once, as general or as specific.",
        ),
        (
            ["--general", "{0}", "--specific", "{1}", "--energies", "0.5,1"],
            "--energies has 1.0, but a weight is cut at a share of its energy between 0 and 1; give shares such as 0.5,0.9.",
        ),
        (
            ["--general", "{0}", "--specific", "{1}", "--examples", "0"],
            "--examples is 0, but a score is taken on something; give 1 or more.",
        ),
        (
            ["--general", "{0}", "--specific", "scene-colour"],
            "task 'scene-colour' is vqa, and this model does classification only; leave the task out.",
        ),
    ],
)
def test_what_cannot_be_analysed_is_refused_in_a_sentence(
    tiny_clip, tiny_tasks, tmp_path, capfd, options, sentence
):
    words = [option.format(*tiny_tasks) for option in options]
    assert cli.main(["analyze", str(tiny_clip), *words, "--into", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {sentence}"
    assert not (tmp_path / "out").exists()
