"""Loading models by name: what is not a CLIP checkpoint is refused in a sentence."""

import json
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import huggingface_hub
import pytest
import torch

from llava_keeplora_eval import EvalError
from llava_keeplora_eval.checkpoints import check_device, check_place
from llava_keeplora_eval.hub import check_reachable
from llava_keeplora_eval.models import load_clip, model_family, resolve_model


def test_names_that_are_not_embedded_pass_through(tmp_path):
    assert resolve_model("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_an_embedded_model_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("llava_keeplora_eval.models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvalError) as error:
        resolve_model("tiny-clip")
    assert str(error.value) == (
        "the embedded model 'tiny-clip' is not installed; install the llava-keeplora package, or give a folder."
    )


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(EvalError) as error:
        load_clip(str(tmp_path))
    assert f"model '{tmp_path}' cannot be loaded (" in str(error.value)
    assert "give a folder with a whole checkpoint" in str(error.value)


def test_a_model_of_another_family_is_refused(tmp_path, tiny_clip):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        if (tiny_clip / name).exists():
            (tmp_path / name).write_text((tiny_clip / name).read_text())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_vision_model"
    with pytest.raises(EvalError) as error:
        load_clip(str(tmp_path))
    assert f"'{tmp_path}' is a 'clip_vision_model' model" in str(error.value) and "clip, siglip" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clp", None),
        ("./nothing", "no folder './nothing'"),
        ("models/tiny-clp", "did you mean 'models/tiny-clip'"),
        ("tiny-clipp", "did you mean 'tiny-clip'"),
        ("models/tiny-clip/config.json", "is a file.*give models/tiny-clip"),
        ("C:\\models\\clip", "no folder"),
        ("user/name/more", "no folder"),
        ("user/name", None),
    ],
)
def test_a_mistyped_folder_is_no_hub_id(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tiny-clip").mkdir(parents=True)
    (tmp_path / "models/tiny-clip/config.json").write_text("{}")
    if said is None:
        return check_place(name, ("tiny-clip",))
    with pytest.raises(EvalError, match=said):
        check_place(name, ("tiny-clip",))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Function (address) → the Hub is there and its cache is empty."""

    def connect(address):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        huggingface_hub.close_session()

    yield connect
    huggingface_hub.close_session()


def test_a_name_that_no_folder_has_is_refused_after_one_request_to_a_hub_that_does_not_answer(
    hub, monkeypatch
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    hub(address)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it asks again"))
    with pytest.raises(EvalError, match=f"no folder 'nothere/none' .*, and {address} cannot be reached"):
        model_family("nothere/none")


def test_a_model_is_asked_for_where_the_hub_answers_or_the_cache_has_it(hub, tmp_path):
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.handle_request, daemon=True).start()
        hub(f"http://127.0.0.1:{server.server_port}")
        check_reachable("user/name")
    hub("http://127.0.0.1:9")  # discard
    snapshot = tmp_path / "cache/models--user--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (refs := tmp_path / "cache/models--user--name/refs").mkdir()
    (refs / "main").write_text("abc")
    check_reachable("user/name")
    check_reachable(str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "gpu", "meta", "privateuseone", "hpu"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(EvalError, match=f"device '{device}' cannot be used on this machine, which has cpu"):
        check_device(device)
