"""One file per engine, each with ``gradient(problem) -> list of tensors``: dL_val/dλ in the module's order, or ``None`` where it does not apply.

A new one is a copy of ``template.py`` and a line here.
"""

from benchmarks.engines import higher_documented, higher_fair, naive, ours, torch_checkpoint

ENGINES = {
    "naive": naive.gradient,
    "naive, torch checkpoint per step": torch_checkpoint.gradient,
    "higher, documented style": higher_documented.gradient,
    "higher, fair style": higher_fair.gradient,
    **ours.ENGINES,
}
