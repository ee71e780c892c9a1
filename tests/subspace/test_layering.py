"""The mathematics stands on torch, jaxtyping and the standard library alone."""

import subprocess
import sys

FOREIGN = (
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "deepspeed",
    "safetensors",
    "llava_keeplora_recipes",
    "llava_keeplora_eval",
)


def test_importing_the_subspace_imports_no_other_library():
    code = (
        "import sys, torch, jaxtyping; before = set(sys.modules); import llava_keeplora.subspace; "
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & set(FOREIGN)
    assert tops <= {"llava_keeplora"} | set(sys.stdlib_module_names), tops
    ours = [name for name in loaded if name.startswith("llava_keeplora.")]
    assert all(name.startswith("llava_keeplora.subspace") for name in ours), ours
