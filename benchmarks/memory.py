"""How far a call raises the peak of this process's resident set (Linux)."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path


def growth(run: Callable[[], object]) -> tuple[object, float]:
    """``(what run returns, MiB)``: the highest resident set while it runs, less what is resident before."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back, or this one would live in it uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    result = run()
    return result, (_resident("VmHWM") - before) / 1024


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
