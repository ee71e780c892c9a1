"""The commands that a configuration or data come in by: what each of them refuses, and where it would begin."""

import copy

from llava_keeplora.config import parse_config
from llava_keeplora.errors import UserError


class Begun(Exception):
    """Stands for the first stage of a run, or the first answer."""


def refused(door, tree):
    """Return the sentence that a command refuses a configuration with; None if it accepts it."""
    try:
        door(parse_config(copy.deepcopy(tree)))
    except UserError as error:
        return str(error)
    except Begun:
        pass
    return None
