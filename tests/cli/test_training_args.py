"""Where the words of a command line may stand."""

from __future__ import annotations

import pytest

from llava_keeplora.cli import build_parser, parse_arguments


def test_overrides_may_stand_before_between_and_after_the_options():
    words = ["train", "seed=1", "--config", "run.yaml", "a.b=2", "--data-root", "data", "c=3"]
    args = parse_arguments(build_parser(), words)
    assert (args.config, args.data_root, args.overrides) == ("run.yaml", "data", ["seed=1", "a.b=2", "c=3"])


@pytest.mark.parametrize(
    "words", [["train", "--config", "run.yaml", "--data-rot", "data"], ["list", "seed=1"]]
)
def test_an_unknown_option_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(build_parser(), words)
    assert "unrecognized arguments" in capsys.readouterr().err
