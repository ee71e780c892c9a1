"""Videos as frames: which of them are shown, where they stand in a text, and their pixels."""

import hashlib
import importlib.util
import io
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split, videos
from llava_keeplora_recipes.media import video_names
from llava_keeplora_recipes.placeholders import place_videos
from llava_keeplora_recipes.videos import decode_frames, frame_time, sample

NAMES = [f"{i}.png" for i in range(5)]


@pytest.fixture
def task(tmp_path, make):
    """A recipe over `tmp_path/q`, where five images lie and a file that stands for a video."""
    (tmp_path / "q").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "q" / name).write_bytes(make.encoded(i))
    (tmp_path / "q" / "a.mp4").write_bytes(b"12 frames")

    def build(rows, form="messages", **source):
        make.json(tmp_path / "q" / "q.json", rows)
        facts = make.facts(
            kind="vqa", prompt=None, classes=None, splits={"train": "q.json", "test": "q.json"}
        )
        facts["source"] = {"format": form, "path": "q"} | source
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    return build


@pytest.fixture
def decoder(monkeypatch):
    """A decoder in PyAV's place, which counts its calls: frame i of a file is a picture of grey i."""
    calls = []

    def decode(data, count):
        calls.append(data)
        if not data.endswith(b"frames"):
            raise RuntimeError("Invalid data\nfound")
        total = int(data.split()[0])
        return [Image.new("RGB", (4, 3), (i, i, i)) for i in sample(total, count)]

    videos._decoded.cache_clear()
    monkeypatch.setattr(videos, "decode_frames", decode)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    yield calls
    videos._decoded.cache_clear()


def chat(*texts, **more):
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]} | more


def pixels(names, make):
    return [Image.open(io.BytesIO(make.encoded(NAMES.index(name)))).tobytes() for name in names]


@pytest.mark.parametrize(
    ("count", "frames"), [(1, 1), (5, 1), (1, 4), (3, 8), (8, 8), (9, 8), (100, 8), (7, 3), (10**6, 33)]
)
def test_frames_are_those_of_numpys_linspace_in_exact_arithmetic(count, frames):
    steps = [int(i * (count - 1) // (frames - 1)) if frames > 1 else 0 for i in range(frames)]
    assert sample(count, frames) == steps
    if count < 1000:
        assert sample(count, frames) == np.linspace(0, count - 1, frames).astype(int).tolist()


def test_a_list_of_frames_is_shown_as_evenly_spaced_images(task, make):
    rows = [chat("What?", "x", video=NAMES), chat("<video> What?", "x", videos=[NAMES[:2], NAMES[2:]])]
    data = load_split(
        task([rows[0], rows[1] | {"messages": chat("<video> or <video>?", "x")["messages"]}], frames=3),
        "train",
    )
    assert [[i.tobytes() for i in e.images] for e in data] == [
        pixels(["0.png", "2.png", "4.png"], make),
        pixels(["0.png", "0.png", "1.png", "2.png", "3.png", "4.png"], make),
    ]
    assert data.questions == ["What?", "<image><image><image> or <image><image><image>?"]
    assert data.videos == [((0, 3),), ((0, 3), (3, 6))] == [e.videos for e in data]
    assert len(load_split(task(rows[:1]), "train")[0].images) == 8
    with pytest.raises(RecipeError, match="record 1 of q.json marks 1 video in its question and names 2"):
        load_split(task(rows), "train")


def test_a_video_file_is_decoded_once_for_its_frames_and_hashed_by_its_bytes(task, decoder):
    data = load_split(
        task([chat("<video>What?", "x", video="a.mp4"), chat("Where?", "y", videos=["a.mp4"])], frames=4),
        "train",
    )
    assert [[i.getpixel((0, 0))[0] for i in e.images] for e in data] == [[0, 3, 7, 11]] * 2 and len(
        decoder
    ) == 1
    assert data.questions == ["What?", "Where?"] and data.videos == [((0, 4),)] * 2
    file = hashlib.sha256(b"12 frames").hexdigest()
    assert data.image_digests[0][1] == hashlib.sha256(f"{file} frame 1 of 4".encode()).hexdigest()
    data[0].images[0].putpixel((0, 0), (9, 9, 9))
    assert pickle.loads(pickle.dumps(data))[0].images[0].getpixel((0, 0)) == (0, 0, 0)


def test_the_number_of_frames_is_part_of_what_a_task_is_only_where_there_are_videos(task):
    plain, shown = [chat("q", "x", id="a")], [chat("q", "x", video=NAMES)]
    assert load_split(task(plain), "train").fingerprint == load_split(task(plain), "test").fingerprint
    eight = load_split(task(shown, frames=8), "train")
    assert eight.fingerprint != load_split(task(shown, frames=4), "train").fingerprint
    listed = load_split(task([chat("q", "x", images=[NAMES[i] for i in sample(5, 8)])], frames=8), "train")
    assert listed.image_digests == eight.image_digests and listed.fingerprint != eight.fingerprint


def test_each_turn_of_a_conversation_shows_the_videos_up_to_it(task):
    rows = [
        chat(
            "<video>a",
            "b",
            "And <image>, <video>?",
            "d",
            videos=[NAMES[:2], NAMES[2:]],
            images=["0.png"],
            id="r",
        )
    ]
    recipe = task(rows, frames=2)
    data = load_split(recipe, "test")
    assert data.questions == ["And <image>, <image><image>?"] and data.videos == [((0, 2), (3, 5))]
    assert data.histories[0][0].text == "<image><image>a"
    each = load_split(replace(recipe, evaluate="each"), "test")
    assert (
        each.videos == [((0, 2),), ((0, 2), (3, 5))]
        and each.image_counts == [2, 5]
        and each.questions[0] == "a"
    )


@pytest.mark.parametrize(
    ("questions", "images", "videos", "expected"),
    [
        (["q"], "a", [], (["q"], "a", ())),
        (["q"], "", ["xy"], (["<image><image>\nq"], "xy", ((0, 2),))),
        (["q"], "a", ["xy"], (["<image><image><image>\nq"], "axy", ((1, 3),))),
        (["<video> or <image>?"], "a", ["xy"], (["<image><image> or <image>?"], "xya", ((0, 2),))),
        (["<video>?"], "a", ["xy"], (["<image>\n<image><image>?"], "axy", ((1, 3),))),
        (["<image>?"], "a", ["xy"], (["<image><image>\n<image>?"], "xya", ((0, 2),))),
        (["What? <video>"], "", ["xy"], (["<image><image>\nWhat?"], "xy", ((0, 2),))),
        (["q", "<video>r"], "", ["xy"], (["q", "<image><image>r"], "xy", ((0, 2),))),
        (["<image>\nWhat?"], "", ["xy"], (["<image><image>\nWhat?"], "xy", ((0, 2),))),
        (["<image><image>\nWhat?"], "", ["xy"], (["<image><image>\nWhat?"], "xy", ((0, 2),))),
        (["<image><image>\nWhat?"], "", ["x", "yz"], (["<image><image><image>\nWhat?"], "xyz", ((0, 1), (1, 3)))),
    ],
)  # fmt: skip
def test_the_place_of_a_video_is_that_of_its_frames(questions, images, videos, expected):
    texts, shown, spans = place_videos(questions, list(images), [list(video) for video in videos], "r")
    assert (texts, "".join(shown), spans) == expected


@pytest.mark.parametrize(
    ("text", "images", "videos", "reason"),
    [
        ("<video>q", "", [], "r marks 1 video in its question and names 0"),
        ("<video><video>q", "", ["xy"], "marks 2 videos in its question and names 1"),
        ("<image><image><image>q", "", ["xy"], "marks 3 images in its question and names 0"),
        ("<image><image><video>q", "a", ["xy"], "marks 2 images in its question and names 1"),
    ],
)
def test_other_numbers_of_places_than_of_videos_are_refused(text, images, videos, reason):
    with pytest.raises(RecipeError, match=reason):
        place_videos([text], list(images), [list(video) for video in videos], "r")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"video": "a.mp4"}, ["a.mp4"]),
        ({"video": "a.bin", "videos": []}, ["a.bin"]),
        ({"video": ["a.MP4"]}, ["a.MP4"]),
        ({"video": ["1.jpg", "2.jpg"]}, [["1.jpg", "2.jpg"]]),
        ({"videos": [["1.jpg"], "b.webm"]}, [["1.jpg"], "b.webm"]),
        ({"video": [["1.jpg"], ["2.jpg"]], "videos": None}, [["1.jpg"], ["2.jpg"]]),
        ({"video": "a.mp4", "videos": ["a.mp4"]}, ["a.mp4"]),
        ({"video": ["", None], "videos": {}}, []),
        ({"video_name": "v_1"}, ["v_1"]),
        ({"video_name": "v_1", "video": "a.mp4"}, ["a.mp4"]),
    ],
)
def test_a_video_is_a_file_or_a_list_of_frames(row, expected):
    assert video_names(row, "r") == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": 3}, "the number 3 as its video"),
        ({"video": "1.jpg"}, "the text '1.jpg' as its video"),
        ({"video": {"path": "a.mp4"}}, "the object .* as its video"),
        ({"video": ["1.jpg", None]}, "the list .* as its video"),
        ({"videos": [["1.jpg", ""]]}, "the list .* as its videos"),
        ({"videos": [["1.jpg", 3]]}, "the list .* as its videos"),
        ({"videos": ["1.jpg", "2.jpg"]}, "'1.jpg' among the videos; list the frames of each video in a list"),
        ({"video": ["1.jpg", "a.mp4"]}, "'1.jpg' among the video"),
        ({"videos": [["a.mp4"]]}, "'a.mp4' among the frames of a video"),
        ({"video": "a.mp4", "videos": ["b.mp4"]}, "'a.mp4' as 'video' and the list .* as 'videos'"),
    ],
)
def test_anything_else_than_a_video_is_refused(row, reason):
    with pytest.raises(RecipeError, match=reason):
        video_names(row, "r")


def test_without_pyav_a_video_file_is_refused_and_frames_are_read(task, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert len(load_split(task([chat("q", "x", video=NAMES[:2])]), "train")[0].images) == 8
    with pytest.raises(
        RecipeError, match="record 0 of q.json has the video file 'a.mp4'.*pip install"
    ) as caught:
        load_split(task([chat("q", "x", video="a.mp4")]), "train")
    assert "PyAV" in str(caught.value)


def test_a_video_that_is_not_there_or_broken_is_named_by_record(task, decoder, tmp_path):
    (tmp_path / "q" / "b.mp4").write_bytes(b"0")
    rows = [chat("q", "x", video=name, id=name[0]) for name in ("a.mp4", "b.mp4", "A.mp4")]
    data, problems = inspect_split(task(rows, frames=2), "train")
    assert data.ids == ["a"] and data.dropped == ["b", "A"]
    first, second = map(str, problems)  # once for each video, not for each of its frames
    assert first.startswith("a video of 'b'") and second.startswith("a video of 'A'")
    assert "b.mp4': Invalid data found" in first
    assert "no such file" in second and "a.mp4' is there, in another letter case" in second
    with pytest.raises(RecipeError, match="leads out of its data folder"):
        load_split(task([chat("q", "x", video="../a.mp4")]), "train")


VISTA = {
    "counting": (
        "Counting",
        "json_row/train_data_20k",
        "json_row/test_questions_2k",
        "json_row/test_answers_2k",
    ),
    "traffic": (
        "Traffic",
        "json_row/train_data_30k",
        "json_row/test_questions_2k",
        "json_row/test_answers_2k",
    ),
    "movie": (
        "Movie",
        "train_json_row/movie_train_subtitle_30k",
        "test_json_row/test_question_2k",
        "test_json_row/test_answer_2k",
    ),
    "gui": ("GUI", "json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k"),
    "science": (
        "Science",
        "json_row/train_data_30k",
        "json_row/test_questions_2k",
        "json_row/test_answers_2k",
    ),
    "sports": ("Sports", "json_row/train_data_30k", "json_row/test_questions_2k", "json_row/test_answers_2k"),
    "star": ("STAR", "json_row/train_data_25k", "json_row/test_questions_2k", "json_row/test_answers_2k"),
}


@pytest.mark.parametrize("name", VISTA)
def test_cl_vista_loads_from_its_official_layout(name, decoder, tmp_path, make):
    """Training records name a file, test records a file without its ending; answers are a list of their own."""
    folder, train, questions, answers = VISTA[name]
    root = tmp_path / "CL-VISTA"
    turns = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": "two"}]
    make.json(
        root / folder / f"{train}.json", [{"id": 0, "video": f"{folder}/v/a.mp4", "conversations": turns}] * 2
    )
    asked = [
        {"question_id": f"q{i}", "question": "How many?", "video_name": f"{folder}/v/{n}"}
        for i, n in enumerate("ab")
    ]
    make.json(root / folder / f"{questions}.json", asked)
    make.json(
        root / folder / f"{answers}.json", [{"question_id": f"q{i}", "answer": i, "type": 3} for i in (1, 0)]
    )
    (root / folder / "v").mkdir()
    (root / folder / "v" / "a.mp4").write_bytes(b"12 frames")
    (root / folder / "v" / "b.mkv").write_bytes(b"20 frames")
    recipe = load_recipe(f"cl_vista/{name}")
    learned, tested = (load_split(recipe, split, tmp_path) for split in ("train", "test"))
    assert learned.ids == ["train-0", "train-1"] and learned.answers == [["two"]] * 2
    assert learned.questions == tested.questions == ["How many?"] * 2 and tested.ids == ["q0", "q1"]
    assert tested.answers == [["0"], ["1"]] and tested.videos == [((0, 8),)] * 2
    assert [image.getpixel((0, 0))[0] for image in tested[1].images] == sample(20, 8)


def test_cl_vistas_eighth_task_is_told_its_files(tmp_path, make):
    """Where ScanNet's videos are needed, and the names of the annotation files are not published."""
    with pytest.raises(RecipeError, match="cl_vista/space"):
        load_split(load_recipe("cl_vista/space"), "train", tmp_path)
    turns = [{"from": "human", "value": "<video>\nWhere?"}, {"from": "gpt", "value": "left"}]
    make.json(tmp_path / "CL-VISTA/Space/mine.json", [{"id": 7, "video": ["a.png"], "conversations": turns}])
    (tmp_path / "CL-VISTA" / "a.png").write_bytes(make.encoded(0))
    (tmp_path / "space.yaml").write_text(
        "extends: cl_vista/space\n"
        "source: {format: llava_json, path: CL-VISTA, frames: 2, positional_ids: [train]}\n"
        "splits: {train: Space/mine.json, test: Space/mine.json}\n"
    )
    data = load_split(load_recipe(tmp_path / "space.yaml"), "train", tmp_path)
    assert data.ids == ["train-0"] and data.answers == [["left"]] and data.videos == [((0, 2),)]


def test_a_list_of_answers_is_paired_by_question_and_named_where_it_is_not(task, tmp_path, make):
    rows = [{"question_id": 1, "question": "q"}, {"question_id": "2", "question": "r"}]
    recipe = task(rows, "llava_json", references={"train": "a.json"})
    make.json(
        tmp_path / "q" / "a.json",
        [{"question_id": "2", "answer": ["x", "y"]}, {"question_id": 1, "answer": 3}],
    )
    assert load_split(recipe, "train").answers == [["3"], ["x", "y"]]
    for entries, reason in (
        ([{"question_id": 1, "answer": "x"}, 3], "record '2' of q.json has no answer in a.json"),
        (
            [{"question_id": 1, "answer": "x"}, {"question_id": 1, "answer": "y"}],
            "other answers for the question '1'",
        ),
        ("x", "a.json holds a str, not a"),
        ({"answers": []}, "neither COCO's captions nor TextVQA's or Video-ChatGPT's answers"),
    ):
        make.json(tmp_path / "q" / "a.json", entries)
        with pytest.raises(RecipeError, match=reason):
            load_split(recipe, "train")
    with pytest.raises(RecipeError, match="the number 3 as its question"):
        load_split(task([{"question_id": 1, "question": 3, "answer": "x"}], "llava_json"), "train")


def test_a_recipe_shows_at_least_one_frame(task):
    with pytest.raises(RecipeError, match="0 under 'source.frames', and a video has at least one frame"):
        task([], frames=0)
    with pytest.raises(RecipeError, match="True under 'source.frames'"):
        task([], frames=True)
    with pytest.raises(RecipeError, match="unknown key 'source.frames'"):
        task([], "parquet", frames=4)


def encoded_video(count, codec="mpeg4", form="mp4", picture=None):
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(count):
            frame = np.full((16, 32, 3), 20 * i, np.uint8) if picture is None else picture
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(
    ("codec", "form"), [("mpeg4", "mp4"), ("mpeg4", "avi"), ("mpeg2video", "mpegts"), ("mpeg4", "matroska")]
)
def test_pyav_gives_the_frames_of_a_file(codec, form):
    data = encoded_video(11, codec, form)
    frames = decode_frames(data, 4)
    assert [frame.size for frame in frames] == [(32, 16)] * 4
    for frame, position in zip(frames, sample(11, 4), strict=True):
        assert abs(np.asarray(frame, float).mean() - 20 * position) < 6
        # Ten frames a second; a file counts them by its own clock, Matroska's in milliseconds.
        assert frame_time(frame) == pytest.approx((position / 10, 1.1), abs=2e-3)
    assert frame_time(decode_frames(encoded_video(1, codec, form), 1)[0]) is None, "a length needs two"


@pytest.mark.parametrize("counted", [0, 7, 20])
def test_frames_are_chosen_by_the_number_that_decoding_gives(counted, monkeypatch):
    data = encoded_video(11)
    monkeypatch.setattr(videos, "_packets", lambda data: iter(range(counted)))
    means = [np.asarray(frame, float).mean() for frame in decode_frames(data, 4)]
    assert np.abs(np.subtract(means, [20 * position for position in sample(11, 4)])).max() < 6


def test_a_file_without_a_frame_is_refused(monkeypatch):
    monkeypatch.setattr(videos, "_packets", lambda data: iter(()))
    monkeypatch.setattr(videos, "_frames", lambda data: iter(()))
    with pytest.raises(ValueError, match="no frame"):
        decode_frames(b"", 4)


def test_a_turned_video_is_shown_as_players_show_it():
    """The matrix of a portrait recording turns its frames clockwise: what is left becomes the top."""
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, :16] = 255
    upright, one = encoded_video(3, picture=half), 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    track = upright.index(identity, upright.index(b"tkhd"))
    turned = upright[:track] + clockwise + upright[track + len(clockwise) :]
    frame = np.asarray(decode_frames(turned, 1)[0], float)
    assert frame.shape == (32, 16, 3) and frame[:16].mean() > 250 and frame[16:].mean() < 5


def test_a_file_without_a_video_is_refused_by_pyav():
    with pytest.raises(Exception, match="(?i)invalid data"):
        pytest.importorskip("av") and decode_frames(b"no video at all", 2)
    with pytest.raises(Exception, match="(?i)invalid|no video"):
        decode_frames(encoded_video(3)[:200], 2)


def test_the_times_of_frames_are_known_without_decoding_them_again(task, tmp_path):
    (tmp_path / "q" / "c.mp4").write_bytes(encoded_video(11))
    data = load_split(
        task([chat("q", "x", video="c.mp4"), chat("r", "y", video=NAMES[:2])], frames=2), "train"
    )
    assert data.image_times == [[pytest.approx((0, 1.1)), pytest.approx((1.0, 1.1))], [None, None]]
    assert [frame_time(image) for image in data[0].images] == data.image_times[0]
    kept = pickle.loads(pickle.dumps(data))
    assert (
        kept.image_times == data.image_times
        and [frame_time(i) for i in kept[0].images] == data.image_times[0]
    )
