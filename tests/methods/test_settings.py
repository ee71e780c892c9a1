"""What holds for the settings of every method, however they are given."""

import dataclasses
import math

import pytest

from llava_keeplora.errors import MethodError
from llava_keeplora.methods import METHODS

NUMBERS = [
    (name, field.name)
    for name, cls in sorted(METHODS.items())
    for field in dataclasses.fields(cls.Options)
    if "float" in str(field.type)
]


@pytest.mark.parametrize(("name", "setting"), NUMBERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_setting_that_is_not_finite_is_refused_before_anything_is_computed(name, setting, value):
    cls = METHODS[name]
    with pytest.raises(MethodError, match=setting):
        cls(cls.Options(**{setting: value}))
