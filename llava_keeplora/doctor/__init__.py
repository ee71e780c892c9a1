"""Checks of the command `llava-keeplora doctor`: of the machine, and of the files of a run."""

from llava_keeplora.doctor.machine import examine_machine
from llava_keeplora.doctor.run import examine_run

__all__ = ["examine_machine", "examine_run"]
