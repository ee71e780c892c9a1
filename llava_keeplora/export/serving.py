"""Commands that serve adapters with vLLM and SGLang, for the card of an export.

vLLM: `vllm/config/lora.py`, `vllm/lora/lora_model.py` and `vllm/entrypoints/serve/lora` of 0.33; SGLang:
https://docs.sglang.io/docs/advanced_features/lora, and `srt/lora/{lora,mem_pool,utils}.py` of 0.5.23.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from llava_keeplora.export.loaded_run import Base

VLLM, SGLANG = "http://localhost:8000/v1", "http://localhost:30000"


def vllm_command(
    base: Base, max_rank: int, adapters: Mapping[str, str], language_only: bool, environment: str = ""
) -> str:
    """Return the command that serves adapters with vLLM.

    Args:
        base: the adapters' base.
        max_rank: the largest rank of an adapter, one of `VLLM_RANKS`.
        adapters: name of an adapter in requests → its folder or Hub id.
        language_only: whether they change the language model alone.
        environment: variables to set, as the shell reads them.
    """
    words = [f"{environment} vllm serve {base.id}".strip()]
    words += [f"--revision {base.revision}"] if base.revision else []
    words += [f"--enable-lora --max-lora-rank {max_rank}"]
    words += [] if language_only else ["--enable-tower-connector-lora"]
    if len(adapters) > 1:
        # Otherwise one adapter is kept, and another one is read from its files at every switch.
        words += [f"--max-cpu-loras {len(adapters)}"]
    words += ["--lora-modules " + " ".join(f"{name}={path}" for name, path in adapters.items())]
    return _wrapped(words) if len(adapters) > 1 else " ".join(words)


def unserved_parts(language_only: bool) -> Iterator[str]:
    """Yield what vLLM does with the parts of an adapter that are no language model, if there are any."""
    if not language_only:
        yield (
            "Adapters of the vision encoder and the connector are experimental in vLLM. It passes over "
            "layers that it does not find under its own names, without a word: 0.33 calls those of a CLIP or "
            "SigLIP tower in LLaVA `vision_tower.vision_model`, transformers 5 does not. SGLang 0.5.23 tells "
            "layers apart by their number and last name alone, so it takes those of such a tower for the "
            "language model's. The safe forms are exports with `--parts language` or `--as merged`."
        )


def run_time_commands(name: str, path: str) -> str:
    """Return the requests that load an adapter into a running vLLM server and take it out again."""
    return "\n".join(
        [
            _post(f"{VLLM}/load_lora_adapter", {"lora_name": name, "lora_path": path}),
            _post(f"{VLLM}/unload_lora_adapter", {"lora_name": name}),
        ]
    )


def sglang_commands(base: Base, max_rank: int, adapters: Mapping[str, str], targets: Sequence[str]) -> str:
    """Return the command that serves adapters with SGLang, and its requests to load and unload one.

    Args:
        base, max_rank, adapters: as for `vllm_command`.
        targets: leaf names of all adapted layers.
    """
    words = [f"python -m sglang.launch_server --model-path {base.id}"]
    words += [f"--revision {base.revision}"] if base.revision else []
    words += [f"--enable-lora --max-lora-rank {max_rank}", f"--lora-target-modules {' '.join(targets)}"]
    words += ["--lora-paths " + " ".join(f"{name}={path}" for name, path in adapters.items())]
    name, path = list(adapters.items())[-1]
    return "\n".join(
        [
            _wrapped(words),
            _post(f"{SGLANG}/load_lora_adapter", {"lora_name": name, "lora_path": path}),
            _post(f"{SGLANG}/unload_lora_adapter", {"lora_name": name}),
        ]
    )


def _post(url: str, body: Mapping[str, str]) -> str:
    return f"curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _wrapped(words: Sequence[str]) -> str:
    return " \\\n  ".join(words)
