"""One file per engine, each with ``gradient(problem) -> list of tensors``.

DL_val/dλ in the module's order, or ``None`` where it does not apply.

A new one is a copy of ``template.py`` and a line here. TorchOpt and JAX are there if they are
installed (``pip install metaopt[bench]``).
"""

from importlib.util import find_spec

from benchmarks.engines import higher_documented, higher_fair, naive, ours, torch_checkpoint

ENGINES = {
    "naive": naive.gradient,
    "naive, torch checkpoint per step": torch_checkpoint.gradient,
    "higher, documented style": higher_documented.gradient,
    "higher, fair style": higher_fair.gradient,
}
if find_spec("torchopt"):
    from benchmarks.engines import torchopt_functional

    ENGINES["TorchOpt, functional"] = torchopt_functional.gradient
if find_spec("jax"):
    from benchmarks.engines import jax_scan

    ENGINES["JAX, jit + scan"] = jax_scan.gradient
ENGINES |= ours.ENGINES
