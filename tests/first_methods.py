"""The methods of `table-real` and `table-real-llava`, which stay as they were printed.

Later ones are rows of `table-learned` and of every published benchmark.
"""

from llava_keeplora.methods import METHODS

#: The runs of later methods are behind the slow marker, on every family; each has quick tests of its own.
FIRST = [
    *("seq-lora", "keeplora", "keeplora+", "keeplora++", "o-lora", "inflora", "sd-lora", "zscl"),
    *("moe-adapters", "iap"),
]


def first_of(family: str) -> set[str]:
    """Return the first methods that run on a family."""
    return {name for name in FIRST if family in METHODS[name].info.families}
