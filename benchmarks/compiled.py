"""``python -m benchmarks.compiled``.

Exact RMD over full trajectories, eager and compiled, against the hand-written eager loop, one
thread.

The forms: single steps; chunks of them (`mo.inner.chunked`), which compute what their steps share
once, where they share a batch, or where each step has its own (*a batch each*); and, on the
sinusoid net, *hoisted*: λ does not move in the inner run and its one batch repeats, so what λ and
the data make (the features) is computed once, the run learns the head on them, and `mo.unroll`
hands their gradient on. They take turns; a figure is the median over rounds of (its time / naive's
in the same round). Compiling is not timed, but printed. Memory: growth of the resident set's peak,
each in a process of its own after a run on the same shapes, whose memory has been given back.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch.func import functional_call

import metaopt as mo
from benchmarks import measure
from benchmarks.engines.naive import gradient as naive
from benchmarks.engines.naive import plain as by_hand
from benchmarks.engines.ours import parts, trained
from benchmarks.problem import Problem
from benchmarks.problems import PROBLEMS


class Form:
    """One way to take the exact hypergradient; what it compiles is kept from call to call."""

    def __init__(self, problem: Problem, *, compile: bool, chunk: int = 1, hoist: bool = False, own: bool = False):
        if own:
            problem = problem._replace(batches=[tuple(part.clone() for part in batch) for batch in problem.batches])
        self.problem = problem
        self.chunk = chunk
        self.hoist = hoist
        self.batches = problem.batches
        step, self.loss, self.w, self.lam = parts(problem)
        if hoist:
            body = problem.module[: problem.tail]
            head = problem.module[problem.tail :]
            self.features = lambda lam, x: functional_call(body, lam, (x,))
            model = mo.functional(head)
            self.w = {name.split(".", 1)[1]: leaf for name, leaf in self.w.items()}
            names = dict(zip(model.params, self.w, strict=True))
            self.head_loss = lambda w, z, y: problem.criterion(
                model({name: w[names[name]] for name in model.params}, z), y
            )
            self.batches = [y for _, y in problem.batches]
        loss = self.head_loss if hoist else self.loss
        step = mo.inner_step(loss, step.optimizer)
        at_once = None if chunk == 1 else chunk
        if compile:
            step = mo.compiled(step, steps_at_once=at_once)
        elif chunk > 1:
            step = mo.inner.chunked(step, chunk)
        self.step = step

    def __call__(self):
        if not self.hoist:
            return mo.hypergradient(
                self.step, self.loss, self.w, self.lam, self.batches, self.problem.outer_batch, estimator=mo.RMD()
            ).total
        lam = {name: leaf.detach().requires_grad_() for name, leaf in self.lam.items()}
        w = mo.unroll(self.step, self.w, self.features(lam, self.problem.batches[0][0]), self.batches).w
        x, y = self.problem.outer_batch
        gradients = torch.autograd.grad(self.head_loss(w, self.features(lam, x), y), list(lam.values()))
        return dict(zip(lam, gradients, strict=True))


def plain(problem: Problem, whole: bool = False):
    """Training; ``whole``: of all parameters, λ too."""
    step, _, w, lam = parts(problem)
    if whole:
        w = mo.merge(w, lam)
        lam = {}
    return trained(step, w, lam, problem.batches)


FORMS = {
    "naive": lambda problem, chunk: partial(naive, problem),
    "plain training": lambda problem, chunk: partial(plain, problem),
    "plain training, by hand": lambda problem, chunk: partial(by_hand, problem),
    "plain training, whole net": lambda problem, chunk: partial(plain, problem, whole=True),
    "eager": lambda problem, chunk: Form(problem, compile=False),
    "eager, hoisted": lambda problem, chunk: Form(problem, compile=False, hoist=True),
    "compiled": lambda problem, chunk: Form(problem, compile=True),
    "compiled in chunks": lambda problem, chunk: Form(problem, compile=True, chunk=chunk),
    "compiled in chunks, a batch each": lambda problem, chunk: Form(problem, compile=True, chunk=chunk, own=True),
    "compiled in chunks, hoisted": lambda problem, chunk: Form(problem, compile=True, chunk=chunk, hoist=True),
}
ALWAYS = ("naive", "plain training", "plain training, by hand", "plain training, whole net")
# problem: (T, steps of a chunk, forms besides); a chunk of the bigger nets would take many minutes
# to compile
SIZES = {
    "sinusoid": (
        100,
        20,
        (
            "eager",
            "eager, hoisted",
            "compiled",
            "compiled in chunks",
            "compiled in chunks, a batch each",
            "compiled in chunks, hoisted",
        ),
    ),
    "conv_anil": (5, 1, ("eager", "compiled")),
    "conv_warpgrad": (5, 1, ("eager", "compiled")),
    "transformer": (10, 1, ("eager", "compiled")),
}


def seconds(problem: Problem, chunk: int, names: list[str], rounds: int) -> measure.Times:
    forms = {name: FORMS[name](problem, chunk) for name in names}
    for name, form in forms.items():
        start = time.perf_counter()
        form()  # λ's unused leaves are found out eagerly in the first call, so the second may compile, too
        form()
        print(f"  {name}: first two calls {time.perf_counter() - start:.1f} s", flush=True)
        if isinstance(form, Form) and form.step.compilation is not None:
            assert form.step.compilation.refused is None, form.step.compilation.refused
    return measure.seconds(forms, rounds)


def growth(problem: str, T: int, chunk: int, name: str) -> float | None:
    torch.manual_seed(0)
    form = FORMS[name](PROBLEMS[problem].make(T, torch.float32), chunk)
    form()
    form()
    return measure.growth(form)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--problems", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--horizon", type=int, help="T, where it differs")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for problem in arguments.problems.split(","):
        T, chunk, forms = SIZES[problem]
        T = arguments.horizon or T
        names = [*ALWAYS, *forms]
        if not arguments.no_time:
            torch.manual_seed(0)
            times = seconds(PROBLEMS[problem].make(T, torch.float32), chunk, names, arguments.rounds)
            for name, own in times.items():
                ratio = measure.ratio(times, name, "naive")
                print(
                    f"{problem:14} T={T:<4} {name:33} {ratio:5.2f} x naive   {statistics.median(own):8.4f} s",
                    flush=True,
                )
        for name in () if arguments.no_memory else names:
            print(
                f"{problem:14} T={T:<4} {name:33} {measure.alone(growth, problem, T, chunk, name):6.0f} MiB", flush=True
            )


if __name__ == "__main__":
    main()
