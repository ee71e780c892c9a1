"""What a run computes again and again without anything new for a test, taken out of every test's runs."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock


def reload_here(folder: Path) -> None:
    """Load an export again in this process: a start of Python with all libraries takes seconds."""
    from llava_keeplora.export import verify_worker

    with contextlib.chdir(folder):
        verify_worker.main()


def draw_nothing(patch: Any) -> None:
    """Write every plot of a report as a picture of one point; `patch` is pytest's `MonkeyPatch`."""
    from importlib import import_module

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    files = {"png": buffer.getvalue(), "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}
    for module in ("figures", "write_report"):
        patch.setattr(
            import_module(f"llava_keeplora.report.{module}"), "encode", lambda figure, kind: files[kind]
        )


def shorten_runs() -> None:
    """Change this process so that its runs take a tenth to a third less; see the comments. May be called more than once."""
    import torch

    from llava_keeplora.sequence import inference_latency, stages
    from llava_keeplora_eval import java

    # The latency is the median of several measurements; its own test measures as often as it is asked to.
    inference_latency.REPEATS = 1
    # Without their device, seeds of accelerators are kept for later, each with the stack of its call as text.
    for module in (torch.cuda, torch.cuda.random, torch.xpu, torch.xpu.random, torch.mtia):
        if not torch.accelerator.is_available() and hasattr(module, "_lazy_call"):
            module._lazy_call = lambda *args, **kwargs: None
    # Every score of captions starts Java's tokenizer; the tests of metrics hold that its tokens are those of Python's.
    if stages.score.__module__ != __name__:
        score, find = stages.score, java.find_jar

        def score_without_java_tokenizer(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(
                java, "find_jar", lambda jar: None if jar == java.TOKENIZER else find(jar)
            ):
                return score(*args, **kwargs)

        stages.score = score_without_java_tokenizer
