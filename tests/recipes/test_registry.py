"""What a name may stand for: built-in, a file, a module, an installed package; and what is said where it stands for nothing."""

import hashlib
import sys

import pytest

from llava_keeplora_recipes.registry import PluginError, Registry

PLUGIN = "class Mine:\n    number = {}\n"


@pytest.fixture
def registry():
    return Registry(
        "thing", "llava_keeplora.things", {"fraction": "fractions:Fraction", "decimal": "decimal:Decimal"}
    )


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Function (path, text) → the file; the folder is the working folder and not on Python's path."""
    monkeypatch.chdir(tmp_path)

    def write(name, text=PLUGIN.format(1)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_built_in_names_are_a_mapping_and_nothing_else_is_listed(registry):
    import fractions

    assert list(registry) == ["fraction", "decimal"] and registry["fraction"] is fractions.Fraction
    assert "decimal" in registry and "nothing" not in registry and registry.get("nothing") is None
    assert registry.source_files("fraction") == {} and registry.source_hash("fraction") is None


def test_a_built_in_object_is_imported_when_it_is_asked_for(plugin, monkeypatch, tmp_path):
    plugin("late_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", "group", {"late": "late_module:Mine"})
    assert list(registry) == ["late"] and "late_module" not in sys.modules
    assert registry["late"].number == 1
    del sys.modules["late_module"]


def test_an_unknown_name_gets_a_hint(registry):
    with pytest.raises(PluginError, match=r"no thing 'fractoin'; did you mean 'fraction'.*module:Object"):
        registry["fractoin"]


def test_a_file_is_found_from_the_configuration_and_from_the_working_folder(
    registry, plugin, tmp_path, monkeypatch
):
    path = plugin("configs/own/thing_file.py")
    for name, folder in (
        ("own/thing_file.py:Mine", tmp_path / "configs"),
        ("configs/own/thing_file.py:Mine", None),
    ):
        assert registry.localize(name, folder) == f"{path}:Mine"
    assert registry[f"{path}:Mine"].number == 1 and registry[f"{path}:Mine"] is registry[f"{path}:Mine"]
    assert registry.portable_name(f"{path}:Mine") == "thing_file:Mine"
    assert not any(str(tmp_path) in entry for entry in sys.path), (
        "folders are on Python's path only while something is imported"
    )


def test_a_module_next_to_the_configuration_is_its_file_and_an_installed_one_stays(
    registry, plugin, tmp_path
):
    assert registry.localize("thing_module:Mine", tmp_path) == "thing_module:Mine"
    path = plugin("thing_module.py")
    assert registry.localize("thing_module:Mine", tmp_path) == f"{path}:Mine"
    installed = "fractions:Fraction"
    assert registry.localize(installed, tmp_path) == registry.portable_name(installed) == installed


def test_a_file_that_was_moved_is_found_as_the_module_of_its_name(registry, plugin, tmp_path):
    path = plugin("here/moved_thing.py")
    assert registry.localize("/nowhere/else/moved_thing.py:Mine", tmp_path / "here") == f"{path}:Mine"


def test_a_changed_file_is_another_object_with_another_hash(registry, plugin):
    name = f"{plugin('changed.py')}:Mine"
    before, files = registry.source_hash(name), registry.source_files(name)
    assert (
        files == {"changed.py": hashlib.sha256(PLUGIN.format(1).encode()).hexdigest()}
        and registry[name].number == 1
    )
    plugin("changed.py", PLUGIN.format(2))
    assert registry.source_hash(name) != before and registry[name].number == 2


def test_a_package_is_hashed_as_a_whole_and_imported_with_its_relative_imports(registry, plugin, tmp_path):
    plugin("things_pkg/__init__.py", "")
    plugin("things_pkg/helper.py", "NUMBER = 7\n")
    path = plugin(
        "things_pkg/inner/mod.py", "from ..helper import NUMBER\nclass Mine:\n    number = NUMBER\n"
    )
    plugin("things_pkg/inner/__init__.py", "")
    name = registry.localize("things_pkg.inner.mod:Mine", tmp_path)
    assert name == f"{path}:Mine" and registry.portable_name(name) == "things_pkg.inner.mod:Mine"
    assert registry[name].number == 7
    inside = ("__init__", "helper", "inner/__init__", "inner/mod")
    assert list(registry.source_files(name)) == [f"things_pkg/{own}.py" for own in inside]
    for own in ("things_pkg", "things_pkg.helper", "things_pkg.inner", "things_pkg.inner.mod"):
        del sys.modules[own]


def test_hashing_executes_nothing(registry, plugin, monkeypatch, tmp_path):
    path = plugin("explosive.py", "raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.source_hash(f"{path}:Mine") == registry.source_hash("explosive:Mine")


def test_an_installed_package_declares_names(registry, plugin, tmp_path, monkeypatch):
    plugin("site/installed_things.py")
    plugin("site/things-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: things\nVersion: 1.0\n")
    plugin(
        "site/things-1.0.dist-info/entry_points.txt",
        "[llava_keeplora.things]\nshiny = installed_things:Mine\n",
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert registry.is_plugin("shiny") and registry["shiny"].number == 1
    assert list(registry.source_files("shiny")) == ["installed_things.py"]
    with pytest.raises(PluginError, match="did you mean 'shiny'"):
        registry["shinny"]
    del sys.modules["installed_things"]


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (None, "not_here:Mine", "the module 'not_here' is not installed; install its package.*PYTHONPATH"),
        (None, "not_here.py:Mine", r"there is no file .*not_here\.py; put the file back"),
        (PLUGIN.format(1), "broken.py:Mein", "is not in .*broken.py; did you mean 'Mine'"),
        (
            "import no_such_module\n",
            "broken.py:Mine",
            "needs the module 'no_such_module', which is not installed",
        ),
        ("1 / 0\n", "broken.py:Mine", r"cannot be imported \(ZeroDivisionError: .*\); correct .*broken.py"),
        ("class Mine(\n", "broken.py:Mine", "cannot be imported .SyntaxError"),
        ("raise SystemExit(3)\n", "broken.py:Mine", "cannot be imported .SystemExit"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(registry, plugin, text, name, sentence):
    if text is not None:
        plugin("broken.py", text)
    with pytest.raises(PluginError, match=sentence):
        registry[name]


def test_an_object_of_another_kind_is_refused(plugin):
    registry = Registry(
        "thing", "group", {}, lambda value: None if hasattr(value, "size") else "it has no size"
    )
    with pytest.raises(PluginError, match="is no thing: it has no size; see docs/extending.md"):
        registry[f"{plugin('sizeless.py')}:Mine"]


@pytest.mark.parametrize("name", [":", "a:", ":b", "", 3, None])
def test_what_is_no_name_is_unknown(registry, name):
    with pytest.raises(PluginError, match="there is no thing"):
        registry[name]
