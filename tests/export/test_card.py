"""A model card needs no editing: it is complete, true to the run, and its code runs."""

import json
import re
import sys

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import forked
from llava_keeplora.config import ModelConfig
from llava_keeplora.errors import ConfigError
from llava_keeplora.export import export_run
from llava_keeplora.export.loaded_run import published_base
from llava_keeplora_eval import EvalError, Matrix
from llava_keeplora_eval.content import model_content
from llava_keeplora_eval.metrics import METRICS


@pytest.fixture
def shelf(tmp_path, tiny_clip, tiny_llava):
    """Function (kind, export's folder) → a folder in which base and export lie under their names, with an image."""

    def arrange(kind, folder):
        (tmp_path / "you").mkdir()
        (tmp_path / "you/tiny-base").symlink_to(tiny_clip if kind == "clip" else tiny_llava)
        (tmp_path / "you" / folder.name).symlink_to(folder)
        Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "image.png")
        return tmp_path

    return arrange


def snippet(folder):
    return re.search(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), flags=re.M | re.S).group(1)


def test_the_code_of_an_adapters_card_runs_in_a_fresh_process(exported, shelf):
    folder, _ = exported("llava")
    code = snippet(folder)
    assert 'PeftModel.from_pretrained(model, "you/llava-adapter")' in code and 'revision="abc123"' in code
    assert "keeplora" not in code, "transformers and PEFT are enough"
    status, out, err = forked.run([sys.executable, "-c", code], cwd=shelf("llava", folder))
    assert status == 0 and out, err[-2000:]


@pytest.mark.slow
def test_the_code_of_a_clip_adapters_card_chooses_one_of_its_captions(exported, shelf, monkeypatch, capsys):
    folder, _ = exported("clip")
    monkeypatch.chdir(shelf("clip", folder))
    exec(snippet(folder), {})
    assert capsys.readouterr().out.strip() in {
        f"a photo of the {name} ." for name in ("north", "east", "south", "west")
    }


@pytest.mark.parametrize("kind", ["llava", "clip"])
def test_the_code_of_a_checkpoints_card_runs(
    kind, finished, shelf, tmp_path_factory, monkeypatch, capsys, quick_reload
):
    folder = tmp_path_factory.mktemp("merged") / f"{kind}-merged"
    export_run(finished(kind), "merged", folder, base_id="you/tiny-base", name=f"you/{kind}-merged")
    assert "peft" not in snippet(folder) and "tiny-base" not in snippet(folder)
    monkeypatch.chdir(shelf(kind, folder))
    capsys.readouterr()
    exec(snippet(folder), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "tag"), [("llava", "image-text-to-text"), ("clip", "zero-shot-image-classification")]
)
def test_the_hub_reads_the_cards_metadata(kind, tag, exported):
    card = ModelCard.load(exported(kind)[0] / "README.md")
    facts = card.data.to_dict()
    assert (
        facts["base_model"] == "you/tiny-base"
        and facts["library_name"] == "peft"
        and facts["pipeline_tag"] == tag
    )
    assert {"keeplora", "continual-learning", "lora", kind, "base_model:adapter:you/tiny-base"} <= set(
        facts["tags"]
    )
    assert set(facts["metrics"]) <= set(METRICS)
    text = (exported(kind)[0] / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]) == facts
    assert "More Information Needed" not in text and "/tmp/" not in text


def test_the_card_tells_base_method_order_scores_metrics_licences_and_seed(exported, finished, mixed_tasks):
    folder, done = exported("llava")
    text = (folder / "README.md").read_text()
    matrix = Matrix.from_json(finished("llava") / "keeplora/matrix.json")
    assert (
        matrix.markdown().strip() in text and "![score of every task after every stage](matrix.png)" in text
    )
    assert Image.open(folder / "matrix.png").width > 400
    assert "at revision `abc123`, taught 3 tasks one after another: questions, captions, corners." in text
    assert "[KeepLoRA" in text and "https://arxiv.org/abs/2601.19659" in text
    assert "| questions | exact_match v2 |" in text and "| captions | caption_rouge_l v1 |" in text
    assert (
        "| questions | 1 | vqa | exact_match | CC0-1.0 |" in text
        and "| corners | 1 | classification | accuracy | CC0-1.0 |" in text
    )
    assert (
        "| seed | 0 |" in text
        and '| part `language` | train "adapter", rank 2, alpha 2.0, energy_weight 0.5, energy_feature 0.9 |'
        in text
    )
    assert f"one LoRA of rank 6 on {len(done.adapter.layers)} layers" in text
    assert "llava-keeplora import you/llava-adapter --into runs/continued" in text


def test_a_card_after_an_earlier_task_has_the_scores_up_to_it(finished, tmp_path, quick_reload):
    export_run(finished("clip"), "adapter", tmp_path / "early", at_task=2, base_id="you/base")
    text, scores = (tmp_path / "early/README.md").read_text(), finished("clip") / "keeplora"
    whole = Matrix.from_json(scores / "matrix.json")
    assert Matrix(whole.tasks, whole.zero_shot, whole.rows[:2]).markdown().strip() in text
    now = json.loads(next(scores.glob("task-02-*/scores.json")).read_text())["colours"]["score"]
    assert re.search(rf"\| colours \| accuracy v1 \| [\d.]+ \| {now:.1f} \|", text)
    assert "taught 2 tasks one after another: colours, stripes." in text


def test_a_base_that_only_this_machine_knows_needs_a_name_on_the_hub(tiny_clip):
    for name in (str(tiny_clip), "tiny-clip", "./nowhere"):
        with pytest.raises(
            ConfigError,
            match="a folder of this machine, which nobody else can load; give its id on the Hub with --base-id user/name",
        ):
            published_base(ModelConfig(name), None)
        assert published_base(ModelConfig(name), "you/clip@v2").revision == "v2"
    found = published_base(ModelConfig(str(tiny_clip)), "you/clip")
    assert (found.id, found.revision, found.local) == ("you/clip", None, tiny_clip.resolve())
    for wrong in ("clip", "/you/clip", "you/clip/x", ""):
        with pytest.raises(ConfigError, match="is no id on the Hub; write user/name, or user/name@revision"):
            published_base(ModelConfig(str(tiny_clip)), wrong)


def test_a_base_from_the_hub_is_named_with_the_commit_that_was_loaded(tmp_path, monkeypatch):
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--you--clip"
    for path, text in {
        f"snapshots/{commit}/config.json": '{"model_type": "clip"}',
        "refs/main": commit,
    }.items():
        (cache / path).parent.mkdir(parents=True)
        (cache / path).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        found = published_base(ModelConfig("you/clip", revision=revision), None)
        assert (found.id, found.revision, found.local) == ("you/clip", commit, None)
        assert model_content("you/clip", revision) == {"commit": commit}
    with pytest.raises(EvalError, match="'you/other' cannot be loaded"):
        published_base(ModelConfig("you/other"), None)
