"""What several tests of an analysis look at."""

import pytest

from llava_keeplora.config import ModelConfig
from llava_keeplora.models import load_model


@pytest.fixture(scope="session")
def load():
    """Function (checkpoint folder, **model settings) → family with its weights."""
    return lambda folder, **settings: load_model(ModelConfig(str(folder), **settings))
