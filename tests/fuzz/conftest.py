"""A folder in which files are changed."""

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three images."""
    root = tmp_path_factory.mktemp("fuzz")
    for i in range(3):
        Image.fromarray(np.full((4, 4, 3), 60 * i, np.uint8)).save(root / f"{i}.png")
    datasets.disable_progress_bars()
    return root
