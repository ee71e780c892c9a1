"""A signal stops a command also where a library's compiled code turns the interruption into an error of its own."""

import signal

import pytest

from llava_keeplora_eval.interruption import Interrupted, interruptible


def interrupted_library(number):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_error_that_a_signal_became_is_the_interruption(number, code):
    with pytest.raises(Interrupted) as stop, interruptible():
        interrupted_library(number)
    assert stop.value.exit_code == code and isinstance(stop.value.__cause__, ValueError)


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(ValueError, match="its own"), interruptible():
        raise ValueError("its own")
