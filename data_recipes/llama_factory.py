"""Datasets that LLaMA-Factory's `dataset_info.json` describes.

Source of the layout: github.com/hiyouga/LLaMA-Factory, data/README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .conversation_turn import Layout, Turn, from_pairs, read_turns, with_system
from .conversations import read_turn_records
from .errors import RecipeError, nearest
from .json_files import read_json, read_rows
from .media import ELSEWHERE, IMAGES, UNREAD, VIDEOS, is_empty, system_text
from .paths import data_root_of, inside, set_folder
from .recipe import Recipe
from .records import Records
from .texts import described, is_blank

INFO = "dataset_info.json"
#: Keys of a description; `file_sha1` is of older releases, which compared it.
KEYS = ("file_name", "formatting", "columns", "tags", "ranking", "split", "file_sha1")
#: Keys that name data outside the folder; they take precedence over `file_name`.
REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
#: Columns of both formats, by the README's names; they have no default.
_SHARED = dict.fromkeys(("system", "tools", "images", "videos", "audios"))
#: Format → the README's name of a column → the default column.
COLUMNS: dict[str, dict[str, str | None]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": None} | _SHARED,
    "sharegpt": {"messages": "conversations"} | _SHARED,
}
#: Columns of preference data, which is not supported.
PREFERENCES = ("chosen", "rejected", "kto_tag")
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def read_llama_factory(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read a dataset of `dataset_info.json` in the task's folder, in the format `alpaca` or `sharegpt`.

    A split is the dataset's name there. A record may have an `id`; without one it is numbered. Paths of
    images are relative to `source.images`, by default the folder itself, as LLaMA-Factory's `media_dir`.

    Raises:
        RecipeError: the folder has no such dataset, its description is not supported, or records are
            incomplete, which the message lists.
    """
    folder = set_folder(recipe, data_root)
    info = _description(folder / INFO, recipe.splits[split])
    what = f"'{recipe.splits[split]}' in {INFO}"
    path = inside(folder, info["file_name"], what, data_root_of(recipe, data_root))
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise RecipeError(
            f"{what} names '{info['file_name']}', and JSON and JSONL files are read",
            "convert it, or for tables use 'format: parquet'",
        )
    formatting = info.get("formatting") or "alpaca"
    columns = COLUMNS[formatting] | _texts(info, "columns", what)
    tags = TAGS | _texts(info, "tags", what)

    def turn(row: dict[str, Any], _answered: bool, what: str) -> Turn:
        row = row["row"]
        _refuse_undeclared(row, columns, what)
        system = system_text({key: row.get(columns[key]) for key in ("system", "tools")}, what)
        if formatting == "alpaca":
            return with_system(_alpaca(row, columns, what), system, what)
        turn = read_turns(row.get(columns["messages"]), _layout(columns, tags), what)
        overridden = turn.history and turn.history[0].role == "system"
        return turn if overridden else with_system(turn, system, what)

    def media(row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        fields = {key: row[key] for key in recipe.source["meta"] if key in row}
        fields |= {key: row.get(columns[key]) for key in ("images", "videos", "audios")}
        return fields | {"id": row.get("id"), "row": row}

    rows = [media(row) for row in read_rows(path, problems)]
    return read_turn_records(recipe, split, data_root, problems, path, rows, turn)


def _alpaca(row: dict[str, Any], columns: dict[str, Any], what: str) -> Turn:
    """Read a record of instruction, input and output; the question is the first two, on a line each."""
    parts = [row.get(columns[key]) for key in ("prompt", "query")]
    if not is_empty(parts[1]) and all(isinstance(part, str) for part in parts):
        parts = ["\n".join(part for part in parts if not is_blank(part))]
    elif not is_empty(parts[1]):
        wrong = next(part for part in parts if not isinstance(part, str))
        raise RecipeError(
            f"{what} has {described(wrong)} as part of its question, and a question is text",
            "correct or remove the record",
        )
    history = row.get(columns["history"]) if columns["history"] else None
    return from_pairs(parts[0], row.get(columns["response"]), history, what)


def _layout(columns: dict[str, Any], tags: dict[str, str]) -> Layout:
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    return Layout(columns["messages"], tags["role_tag"], tags["content_tag"], roles)


def _refuse_undeclared(row: dict[str, Any], columns: dict[str, Any], what: str) -> None:
    """Refuse fields that LLaMA-Factory would ignore because no column names them."""
    declared = set(columns.values())
    for key in (*IMAGES, *VIDEOS, *ELSEWHERE, *UNREAD, "system", "tools", "history"):
        if key not in declared and not is_empty(row.get(key)):
            raise RecipeError(
                f"{what} has {described(row[key])} as '{key}', which {INFO} does not name under 'columns'",
                "name it there, or remove it",
            )


def _description(path: Path, name: Any) -> dict[str, Any]:
    """Return a dataset's description.

    Args:
        path: the file `dataset_info.json`.
        name: the dataset's name in it.

    Raises:
        RecipeError: there is no such file or dataset, or the description has something that is not supported.
    """
    if not path.is_file():
        raise RecipeError(f"the folder '{path.parent}' has no {INFO}", "correct 'source.path' in the recipe")
    datasets = read_json(path, dict)
    if not isinstance(name, str) or name not in datasets:
        raise RecipeError(f"{INFO} has no dataset {name!r}", nearest(str(name), datasets))
    info, what = datasets[name], f"'{name}' in {INFO}"
    if not isinstance(info, dict):
        raise RecipeError(f"{what} is {described(info)}, and not an object", "correct the file")
    if remote := next((key for key in REMOTE if not is_empty(info.get(key))), None):
        raise RecipeError(
            f"{what} is read from '{remote}', and files of its folder are read here",
            "download it and name the file as 'file_name', or use 'format: hub'",
        )
    columns = _texts(info, "columns", what)
    if info.get("ranking") or any(columns.get(key) for key in PREFERENCES):
        raise RecipeError(
            f"{what} holds preferences (ranking or kto), and questions with an answer are learned",
            "use a dataset for supervised fine-tuning",
        )
    formatting = info.get("formatting") or "alpaca"
    if not isinstance(formatting, str) or formatting not in COLUMNS:
        raise RecipeError(f"{what} has the formatting {formatting!r}", nearest(str(formatting), COLUMNS))
    _check_keys(info, (*KEYS, *REMOTE), what)
    _check_keys(columns, (*COLUMNS[formatting], *PREFERENCES), f"'columns' of {what}")
    _check_keys(_texts(info, "tags", what), TAGS, f"'tags' of {what}")
    if not isinstance(info.get("file_name"), str) or is_blank(info["file_name"]):
        raise RecipeError(
            f"{what} has {described(info.get('file_name'))} as its 'file_name'",
            "name the file of its records",
        )
    if info.get("split", "train") not in ("train", None):
        raise RecipeError(
            f"{what} has the split {info['split']!r}, and a file has the split 'train' alone",
            "name another file, or remove 'split'",
        )
    return info


def _texts(info: dict[str, Any], key: str, what: str) -> dict[str, str]:
    """Return the mapping of texts under a key of a description; entries with null are left out."""
    value = info.get(key) or {}
    if not isinstance(value, dict) or not all(v is None or isinstance(v, str) for v in value.values()):
        raise RecipeError(
            f"{what} has {described(value)} as '{key}', which is not an object of texts", "correct the file"
        )
    return {name: text for name, text in value.items() if text is not None}


def _check_keys(given: dict[str, Any], valid: Any, what: str) -> None:
    for key in given:
        if key not in valid:
            raise RecipeError(f"{what} has the key '{key}', which is not read", nearest(key, valid))
