"""Pushing and fetching through huggingface_hub's own client, against a stand-in for the Hub on this machine."""

import importlib.util
import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
from tests.memory.conftest import make_classifier, train, vector_batches, vector_loss

from llava_keeplora import KeepLora, cli
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.export import hub, import_state
from llava_keeplora_eval.files import file_hash

# Tests are imported by path, without packages.
spec = importlib.util.spec_from_file_location("hub_stand_in", Path(__file__).with_name("hub_stand_in.py"))
stand_in = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = stand_in
spec.loader.exec_module(stand_in)


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Function (address, token) → the client talks to that address as that user."""

    def connect(url, token=stand_in.TOKEN):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
        monkeypatch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()

    yield connect
    huggingface_hub.close_session()


@pytest.fixture
def server():
    with stand_in.running() as running:
        yield running


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_is_pushed_is_the_export_and_import_makes_a_run_of_it_elsewhere(
    exported, finished, server, online, tmp_path, tiny_llava
):
    folder, _ = exported("llava")
    online(server.url)
    assert hub.push(folder, "you/learned") == f"{server.url}/you/learned"
    assert server.repositories["you/learned"] == files_of(folder)
    # Somebody else's code in the repository isn't even fetched.
    server.repositories["you/learned"] |= {
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04",
    }
    import_state("you/learned", tmp_path / "run", base=str(tiny_llava))
    assert not [path for _, path in server.requests if path.endswith((".py", ".bin"))]
    for path in (finished("llava") / "keeplora").glob("*/delta.safetensors"):
        assert file_hash(tmp_path / "run" / path.relative_to(finished("llava"))) == file_hash(path)


def test_a_memory_is_pushed_and_loaded_by_its_name(server, online):
    model, batches = make_classifier(), vector_batches(1)
    memory = KeepLora(model, targets=["0"], rank=2, energy_weight=0.5)
    train(memory.begin_task(batches, vector_loss), batches, vector_loss)
    memory.end_task(batches)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE.*memory.save"):
        memory.push_to_hub("you/memory")
    online(server.url)
    assert memory.push_to_hub("you/memory") == f"{server.url}/you/memory"
    assert {"keeplora.json", "adapter_model.safetensors", "README.md"} <= set(
        server.repositories["you/memory"]
    )
    again = KeepLora.load(make_classifier(), "you/memory")
    assert again.model.body[0].weight.equal(model.body[0].weight)


def test_without_yes_a_push_lists_files_and_sizes_and_sends_nothing(
    finished, server, online, tmp_path, capsys, quick_reload
):
    online(server.url)
    arguments = [
        "export",
        str(finished("clip")),
        "--as",
        "adapter",
        "--into",
        str(tmp_path / "out"),
        "--base-id",
        "you/tiny-base",
        "--push",
        "you/learned",
    ]
    assert cli.main(arguments) == 0
    out, folder = capsys.readouterr().out, tmp_path / "out"
    assert (
        f"you/learned would get {len(files_of(folder))} files, " in out
        and "nothing is pushed without --yes" in out
    )
    assert (
        f"{(folder / 'adapter_model.safetensors').stat().st_size / 1e6:10.3f} MB  adapter_model.safetensors\n"
        in out
    )
    assert server.requests == [] and server.repositories == {}
    assert 'PeftModel.from_pretrained(model, "you/learned")' in (folder / "README.md").read_text()
    # The same command with --yes replaces the export and sends it.
    assert cli.main([*arguments, "--yes"]) == 0
    assert f"pushed to {server.url}/you/learned" in capsys.readouterr().out
    assert server.repositories["you/learned"] == files_of(folder)


def test_a_push_offline_or_to_where_nobody_listens_says_so_and_how_to_push_later(
    tmp_path, online, monkeypatch
):
    (tmp_path / "README.md").write_text("# card")
    later = f"the export in {tmp_path} is complete; push it later with `hf upload you/learned {tmp_path}`"
    with pytest.raises(RunError) as error:
        hub.push(tmp_path, "you/learned")
    assert (
        str(error.value)
        == f"pushing to 'you/learned' needs a network, and HF_HUB_OFFLINE is set; unset it, or {later}."
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    online(url)
    with pytest.raises(RunError) as error:
        hub.push(tmp_path, "you/learned")
    assert (
        str(error.value)
        == f"pushing to 'you/learned' failed, because {url} cannot be reached (ConnectError); {later}."
    )


def test_a_push_that_the_hub_refuses_says_how_to_log_in(tmp_path, online, server):
    (tmp_path / "README.md").write_text("# card")
    online(server.url, token="hf_wrong")
    with pytest.raises(
        RunError,
        match="pushing to 'you/learned' is not allowed .the Hub answered 401.; log in with `hf auth login`",
    ):
        hub.push(tmp_path, "you/learned")


def test_importing_what_is_not_there_or_cannot_be_reached_is_one_sentence(tmp_path, online, server):
    with pytest.raises(
        RunError, match="fetching 'you/gone' (needs a network|failed).*give a folder of this machine"
    ):
        import_state("you/gone", tmp_path / "run")
    online(server.url)
    with pytest.raises(RunError, match="fetching 'you/gone' found no such repository; check its name"):
        import_state("you/gone", tmp_path / "run")
    server.repositories["you/foreign"] = {"README.md": b"# another model"}
    with pytest.raises(RunError, match="'you/foreign' holds no state to continue from"):
        import_state("you/foreign", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["learned", "a/b/c", "you/", "../you", "you/a--b", "you/.hidden"])
def test_a_name_that_cannot_be_a_repositorys_is_refused_before_any_work(name, finished, capsys):
    with pytest.raises(ConfigError, match="is no name on the Hub.*write user/name"):
        hub.check_repo_id(name)
    assert cli.main(["export", str(finished("clip")), "--as", "adapter", "--push", name]) == 2
    assert "is no name on the Hub" in capsys.readouterr().err
