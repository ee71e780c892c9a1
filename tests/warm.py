"""What the fork server imports and looks up once for every forked process; see forked.py."""

# ruff: noqa: E402

import gc
from contextlib import suppress

gc.disable()  # Little of what is imported is garbage.

from llava_keeplora.bitsandbytes_import import import_bitsandbytes

import_bitsandbytes()

import deepspeed.runtime.engine  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg  # noqa: F401
import scipy.io  # noqa: F401
import sklearn.utils  # noqa: F401
import torch.utils.cpp_extension  # noqa: F401

from llava_keeplora.export import verify
from shorter_runs import reload_here, shorten_runs

with suppress(ImportError):
    # Most of a second of regular expressions at the first load of a model, kept for the next ones.
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("clip")

shorten_runs()
# Tests of exports load some of them again in a fresh process.
verify.verify_in_fresh_process = reload_here
# A collection in a forked process would touch, and so copy, every object that the server holds.
gc.freeze()
gc.enable()
