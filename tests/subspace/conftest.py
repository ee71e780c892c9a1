"""Fixtures for the subspace tests: a copy of the package with every annotated shape checked at run time."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

PACKAGE = "llava_keeplora.subspace"


def _modules():
    return {
        name: module
        for name, module in sys.modules.items()
        if name == PACKAGE or name.startswith(PACKAGE + ".")
    }


@pytest.fixture(scope="session")
def sub():
    """The package, imported afresh under jaxtyping and beartype; other tests keep their unchecked copy."""
    plain = _modules()
    for name in plain:
        del sys.modules[name]
    with install_import_hook(PACKAGE, "beartype.beartype"):
        checked = importlib.import_module(PACKAGE)
    for name in _modules():
        del sys.modules[name]
    sys.modules.update(plain)
    return checked


@pytest.fixture(scope="session")
def plain():
    """The package as users import it: its own errors answer misfitting shapes, not the shape checker's."""
    return importlib.import_module(PACKAGE)


@pytest.fixture(scope="session")
def parity():
    """Loader of one parity fixture as a dict of tensors; skips where the fixtures aren't at hand."""
    numpy = pytest.importorskip("numpy")
    beside = Path(__file__).resolve().parents[3] / "shared" / "parity"
    folder = Path(os.environ.get("LLAVA_KEEPLORA_PARITY", beside))

    def load(name):
        path = folder / name
        if not path.exists():
            pytest.skip(f"no parity fixture {name}; set LLAVA_KEEPLORA_PARITY to the folder that holds it")
        with numpy.load(path) as archive:
            return {key: torch.as_tensor(archive[key]) for key in archive.files}

    return load


def random_orthogonal(rows, columns, seed):
    """(rows, columns) float64 with orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


@pytest.fixture(scope="session")
def with_spectrum():
    """Function (out, in, singular values, seed) -> float64 matrix with exactly that spectrum."""

    def build(out_dim, in_dim, singular, seed=0):
        count = len(singular)
        left, right = random_orthogonal(out_dim, count, seed), random_orthogonal(in_dim, count, seed + 1)
        return (left * torch.as_tensor(singular, dtype=torch.float64)) @ right.T

    return build


@pytest.fixture(scope="session")
def random_basis():
    """Function (in, k, seed) -> float32 basis."""
    return lambda dim, rank, seed=0: random_orthogonal(dim, rank, seed).float()
