"""Videos as the processors of types take them that do, beside plain transformers; elsewhere as images."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata

from llava_keeplora.config import EvaluationConfig, ModelConfig
from llava_keeplora.models import Prepared, load_model
from llava_keeplora.models.given import GivenModel
from llava_keeplora_eval.chat import Chat, image_inputs
from llava_keeplora_eval.chat_text import render
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.image_inputs import TOKEN_KEYS, joined
from llava_keeplora_eval.predictors import to_dtype
from llava_keeplora_eval.preparation import ChatPreparation
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_eval.video_inputs import LAYOUTS
from llava_keeplora_recipes import RecipeError, load_recipe, load_split
from llava_keeplora_recipes.records import Message
from llava_keeplora_recipes.videos import frame_time

KINDS = [kind for kind in LAYOUTS if kind != "qwen2_vl"]  # as qwen2_5_vl, without the times of frames
FRAMES = 3


def picture(seed, size=(44, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions with a video, with a picture and a video, and with neither."""
    root = tmp_path_factory.mktemp("videos")
    for seed in range(7):
        picture(seed).save(root / f"{seed}.png")
    rows = [
        {"video": ["0.png", "1.png", "2.png"], "said": "Who is it?"},
        {"video": ["3.png", "4.png", "5.png"], "said": "red <video> or blue?"},
        {"said": "yes or no"},
        {"image": "6.png", "said": "What is it?"},
    ]
    for i, row in enumerate(rows):
        said = [row.pop("said"), ["a cat", "no", "yes", "a dog"][i]]
        row["id"] = str(i)
        row["conversations"] = [
            {"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)
        ]
    (root / "v.json").write_text(json.dumps(rows))
    (root / "v.yaml").write_text(
        "{name: v, version: 1, kind: vqa, metric: exact_match, licence: CC0-1.0, source: {format: llava_json,"
        f" path: ., frames: {FRAMES}}}, splits: {{train: v.json, test: v.json}}}}"
    )
    return load_split(load_recipe(root / "v.yaml"), "test")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def family(kind, small_vlm):
    return load_model(ModelConfig(str(small_vlm(kind))), EvaluationConfig(max_new_tokens=5))


def processed(processor, example):
    """What the processor makes of a question whose parts are written as transformers' documentation has it."""
    text = {"type": "text", "text": example.question.replace("<image>" * FRAMES, "").strip()}
    if "<image>" in example.question:
        before, after = example.question.split("<image>" * FRAMES)
        content = [{"type": "text", "text": before}, {"type": "video"}, {"type": "text", "text": after}]
    else:
        ahead = "video" if example.videos else "image"
        content = [{"type": ahead}] * bool(example.images) + [text]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    begun = bool(processor.tokenizer.bos_token) and chat.startswith(processor.tokenizer.bos_token)
    media = {("videos" if example.videos else "images"): [example.images]} if example.images else {}
    return processor(text=[chat], add_special_tokens=not begun, return_tensors="pt", **media)


#: Types whose template writes a video's token bare, so that it may be moved or followed by a line break.
BARE = ("llava_onevision", "internvl")


def test_inputs_are_the_processors_own(kind, family, data):
    chat = Chat(family.processor)
    for example in data:
        if kind in BARE and "<image>" in example.question:
            continue
        expected = processed(family.processor, example)
        sizes = [(image.height, image.width) for image in example.images]
        encoding = chat.prompt(example.question, sizes, (), example.videos)
        assert encoding.prompt == expected["input_ids"][0].tolist()
        made = image_inputs(family.processor, example.images, example.videos)
        made |= {key: torch.tensor([value]) for key, value in encoding.extra.items()}
        assert made.keys() == expected.keys() - {"input_ids", "attention_mask"}
        for key, value in made.items():
            torch.testing.assert_close(value, torch.as_tensor(expected[key]), atol=0, rtol=0)


def test_a_video_stands_where_it_is_marked(kind, family, data):
    example = data[1]
    chat = Chat(family.processor)
    ids = chat.prompt(example.question, [(30, 44)] * FRAMES, (), example.videos).prompt
    shown = "".join("▣" if i in chat.image_ids else chat.tokenizer.decode([i]) for i in ids)
    assert shown.index("red") < shown.index("▣") <= shown.rindex("▣") < shown.index("or blue?")
    parts = "<image> and <image><image>?"
    with pytest.raises(EvalError, match="words between the frames of a video.*<video>"):
        chat.prompt(parts, [(30, 44)] * FRAMES, (), example.videos)
    with pytest.raises(EvalError, match="different sizes.*of one size"):
        chat.prompt("What?", [(30, 44)] * 2 + [(30, 45)], (), ((0, FRAMES),))


def test_frames_are_scaled_as_pictures_are(kind, family):
    """One frame for as long as a patch lasts is what the image processor of transformers makes of a picture."""
    processor, frame = family.processor, picture(1)
    count = getattr(processor.video_processor.settings, "temporal_patch_size", 2)
    made = processor.video_processor([[frame] * count])
    options = {"do_image_splitting": False} if kind == "smolvlm" else {}
    own = processor.image_processor([[frame]], return_tensors="pt", **options)
    if "video_grid_thw" in made:
        assert made["video_grid_thw"].tolist() == own["image_grid_thw"].tolist()
        torch.testing.assert_close(made["pixel_values_videos"], own["pixel_values"], atol=1e-5, rtol=0)
        return
    made = made["pixel_values" if kind == "smolvlm" else "pixel_values_videos"]
    expected = own["pixel_values"].flatten(0, -4)[-1]  # of OneVision's crops, the last is none of the whole
    if kind == "llava_onevision":
        expected = own["pixel_values"][0][0]
    torch.testing.assert_close(made[0], expected.expand(count, -1, -1, -1), atol=1e-5, rtol=0)


def test_the_loss_is_the_models_own_and_a_batch_is_answered_as_plain_generate(family, data):
    inputs = family.inputs(data, Prepared(family, data))
    batch = inputs.collate(range(len(data)))
    own = family.model(**{key: value for key, value in batch.items() if key != "image_rows"}).loss
    task = family.task(data.recipe)
    torch.testing.assert_close(task(**batch)["loss"], own, atol=1e-5, rtol=1e-5)
    for count in (1, 2, 3):
        part, first = inputs.collate(range(count)), task.first(batch, count)
        images = part.keys() - {*TOKEN_KEYS, "labels", "image_rows"}
        assert images == first.keys() - {*TOKEN_KEYS, "labels", "image_rows"}
        # A picture of more tiles than there are frames makes room for them in the whole batch.
        for key in images:
            assert torch.equal(*joined([{key: part[key]}, {key: first[key]}])[key].chunk(2)), (key, count)
    predictor = family.predictor(data.recipe, Prepared(family, data))
    examples = list(data)
    answers = predictor.predict(examples)
    assert answers == [predictor.predict([example])[0] for example in examples]
    stops = sorted({*Chat(family.processor).end_ids})
    asked = processed(family.processor, examples[0])
    out = family.model.generate(
        **asked, max_new_tokens=5, do_sample=False, eos_token_id=stops, pad_token_id=0
    )
    said = family.processor.tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[0] == said.strip()


def test_the_order_of_frames_is_seen(family, data):
    """A video is no set of pictures: its frames in another order have other inputs."""
    example = data[0]
    made = image_inputs(family.processor, example.images, example.videos)
    turned = image_inputs(family.processor, example.images[::-1], example.videos)
    assert any(not torch.equal(made[key], turned[key]) for key in made)


def test_earlier_answers_about_a_video_are_learned(kind, family):
    history = (Message("user", "What is it?"), Message("assistant", "a cat"))
    chat = Chat(family.processor)
    turn = chat.turn("red?", [(30, 44)] * FRAMES, "no", history, ((0, FRAMES),))
    ((start, end),) = turn.earlier
    assert chat.tokenizer.decode(turn.prompt[start:end], skip_special_tokens=True).strip() == "a cat"


#: Types that read the times of frames, and what else they make of them.
TIMED = {"qwen2_5_vl": "second_per_grid_ts", "qwen3_vl": None, "smolvlm": None}


@pytest.mark.parametrize("timed", TIMED)
def test_the_times_of_frames_are_those_of_the_file(timed, small_vlm):
    processor = load_chat_processor(str(small_vlm(timed)))
    images = [picture(seed) for seed in range(4)]
    # Frames 0, 29, 59 and 89 of 90, 10 a second.
    for image, place in zip(images, places := [0, 29, 59, 89], strict=True):
        image.info["frame_time"] = (place / 10, 9.0)
    sizes, times = [(30, 44)] * 4, [frame_time(image) for image in images]
    encoding = Chat(processor).prompt("Who is it?", sizes, (), ((0, 4),), times)
    text = render(processor, "Who is it?", 4, videos=((0, 4),))
    known = VideoMetadata(total_num_frames=90, fps=10.0, duration=9.0, frames_indices=places)
    expected = processor(text=[text], videos=[images], video_metadata=[known], return_tensors="pt")
    assert encoding.prompt == expected["input_ids"][0].tolist()
    assert (
        encoding.prompt != Chat(processor).prompt("Who is it?", sizes, (), ((0, 4),)).prompt or TIMED[timed]
    )
    made = image_inputs(processor, images, ((0, 4),))
    if key := TIMED[timed]:
        torch.testing.assert_close(made[key], torch.tensor([2 / (4 / 9.0)]))
        torch.testing.assert_close(made[key], torch.as_tensor(expected[key]))
        kept = to_dtype(made, torch.bfloat16)
        assert kept[key].dtype == torch.float32 and kept["pixel_values_videos"].dtype == torch.bfloat16


def test_frames_are_images_where_a_type_takes_no_videos_or_the_template_writes_none(small_vlm, data):
    example = data[0]
    for kind in ("llava", "qwen2_5_vl"):
        processor = load_chat_processor(str(small_vlm(kind)))
        if kind == "qwen2_5_vl":
            processor.chat_template = processor.chat_template.replace("video_pad", "image_pad")
        assert image_inputs(processor, example.images, example.videos).keys() == (
            image_inputs(processor, example.images).keys()
        )
        chat, sizes = Chat(processor), [(30, 44)] * FRAMES
        assert chat.prompt("What?", sizes, (), example.videos) == chat.prompt("What?", sizes)
        assert "2 videos as images" in ChatPreparation(processor, 1024).report(data, learns=True).sizes


def test_a_video_of_fewer_frames_than_the_processor_takes_is_an_image_to_it(kind, family, data):
    """Qwen3-VL's own processor refuses a video of one frame; the others take it."""
    image, sizes, chat = picture(1), [(30, 44)], Chat(family.processor)
    asked = chat.prompt("What?", sizes, (), ((0, 1),))
    made = image_inputs(family.processor, [image], ((0, 1),))
    if kind == "qwen3_vl":
        assert asked == chat.prompt("What?", sizes)
        assert torch.equal(made["pixel_values"], image_inputs(family.processor, [image])["pixel_values"])
        return
    assert asked.prompt != chat.prompt("What?", sizes).prompt
    text = render(family.processor, "What?", 1, videos=((0, 1),))
    own = family.processor(text=[text], videos=[[image]], return_tensors="pt")
    assert own["input_ids"][0].tolist() == asked.prompt


class TorchvisionVideos:
    """Stands for a video processor of transformers, which needs torchvision."""

    num_frames = fps = None

    def __init__(self, settings):
        self.settings = settings

    def to_dict(self):
        return {**self.settings, "size": SizeDict(**self.settings["size"]), "do_resize": True, "fps": None}


def test_a_given_processor_takes_videos_by_pillow_with_its_own_settings(family, data):
    given = copy.copy(family.processor)
    given.video_processor = TorchvisionVideos(family.processor.video_processor.settings)
    processor = GivenModel(family.model, given).chat_processor()
    assert isinstance(given.video_processor, TorchvisionVideos)
    example = data[0]
    made = image_inputs(processor, example.images, example.videos)
    expected = image_inputs(family.processor, example.images, example.videos)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in made)
    given.video_processor.settings = {**given.video_processor.settings, "do_center_crop": True}
    odd = GivenModel(family.model, given).chat_processor()
    images = image_inputs(odd, example.images)
    assert image_inputs(odd, example.images, example.videos).keys() == images.keys()


def test_listed_frames_have_the_times_of_the_recipe(small_vlm, data):
    root = Path(data.recipe.folder)
    text = (root / "v.yaml").read_text()
    (root / "timed.yaml").write_text(
        text.replace("frames: 3", "frames: 3, fps: 2").replace("name: v", "name: w")
    )
    timed = load_split(load_recipe(root / "timed.yaml"), "test")
    assert timed.image_times[0] == [(0.0, 1.5), (0.5, 1.5), (1.0, 1.5)] and timed.image_times[2] == []
    assert timed.image_digests[0] != data.image_digests[0] and timed.image_digests[3] == data.image_digests[3]
    assert [frame_time(image) for image in timed[0].images] == timed.image_times[0]
    made = image_inputs(load_chat_processor(str(small_vlm("qwen2_5_vl"))), timed[0].images, timed[0].videos)
    torch.testing.assert_close(made["second_per_grid_ts"], torch.tensor([1.0]))  # two frames to a patch
    (root / "timed.yaml").write_text(text.replace("frames: 3", "fps: 0"))
    with pytest.raises(RecipeError, match="0.* under 'source.fps', and frames of a second are more than 0"):
        load_recipe(root / "timed.yaml")


def test_data_check_says_how_many_videos_are_given_as_such(family, data):
    assert family.preparation.report(data, learns=False).sizes.endswith("2 videos as videos")


def test_smolvlm_is_shown_frames_as_images_next_to_a_picture(small_vlm, data):
    processor = load_chat_processor(str(small_vlm("smolvlm")))
    images = [*data[0].images, picture(9)]
    made = image_inputs(processor, images, ((0, FRAMES),))
    assert torch.equal(made["pixel_values"], image_inputs(processor, images)["pixel_values"])
