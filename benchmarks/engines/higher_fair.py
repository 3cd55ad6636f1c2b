"""`higher` with only the adapted weights patched; for modules whose weights are at the end."""

import higher
import torch
from torch import Tensor

from benchmarks.problem import Problem


def gradient(problem: Problem) -> list[Tensor] | None:
    if problem.tail is None:
        return None
    body = problem.module[: problem.tail]
    head = problem.module[problem.tail :]
    optimizer = torch.optim.SGD(head.parameters(), lr=problem.lr, momentum=problem.momentum)
    with higher.innerloop_ctx(head, optimizer, copy_initial_weights=False) as (net, inner):
        for x, y in problem.batches:
            inner.step(problem.criterion(net(body(x)), y))
        x, y = problem.outer_batch
        return list(torch.autograd.grad(problem.criterion(net(body(x)), y), list(body.parameters())))
