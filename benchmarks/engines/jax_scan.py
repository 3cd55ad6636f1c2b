"""JAX: ``jit`` of ``grad`` through ``lax.scan``, on the same net translated layer by layer (optional extra ``bench``).

Compiled on the first call for a problem, which the harness does not time. XLA is held to one
thread.
"""

import os
from weakref import WeakKeyDictionary

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor, nn

import metaopt as mo
from benchmarks.problem import Problem
from benchmarks.problems.transformer import Block

COMPILED: WeakKeyDictionary = WeakKeyDictionary()


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def block(p, name, x):
    q, k, v = jnp.split(linear(p, f"{name}.qkv", layer_norm(p, f"{name}.first", x)), 3, axis=-1)
    attention = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, axis=-1) @ v
    x = x + linear(p, f"{name}.out", attention)
    hidden = jax.nn.gelu(linear(p, f"{name}.mlp.0", layer_norm(p, f"{name}.second", x)), approximate=False)
    return x + linear(p, f"{name}.mlp.2", hidden)


def conv(p, name, x):
    y = lax.conv_general_dilated(x, p[f"{name}.weight"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return y + p[f"{name}.bias"][:, None, None]


def batch_norm(p, name, x):
    mean = x.mean((0, 2, 3), keepdims=True)
    var = x.var((0, 2, 3), keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-5) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def max_pool(p, name, x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


LAYERS = {
    nn.Linear: linear,
    nn.Conv2d: conv,
    nn.BatchNorm2d: batch_norm,
    nn.MaxPool2d: max_pool,
    nn.ReLU: lambda p, name, x: jax.nn.relu(x),
    nn.Flatten: lambda p, name, x: x.reshape(x.shape[0], -1),
    Block: block,
}


def cross_entropy(out, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], axis=1).mean()


CRITERIA = {nn.functional.cross_entropy: cross_entropy, nn.functional.mse_loss: lambda out, y: ((out - y) ** 2).mean()}


def compiled(problem: Problem):
    """``(λ, w, distinct batches, order, outer batch) -> dL_val/dλ``."""
    layers = [(name, LAYERS[type(layer)]) for name, layer in problem.module.named_children()]
    criterion = CRITERIA[problem.criterion]

    def loss(w, lam, batch):
        x = batch[0]
        p = {**w, **lam}
        for name, layer in layers:
            x = layer(p, name, x)
        return criterion(x, batch[1])

    def outer(lam, w, batches, order, outer_batch):
        def step(state, index):
            w, v = state
            g = jax.grad(loss)(w, lam, jax.tree.map(lambda x: x[index], batches))
            v = jax.tree.map(lambda v, g: problem.momentum * v + g, v, g)
            return (jax.tree.map(lambda p, v: p - problem.lr * v, w, v), v), None

        (w, _), _ = lax.scan(step, (w, jax.tree.map(jnp.zeros_like, w)), order)
        return loss(w, lam, outer_batch)

    return jax.jit(jax.grad(outer))


def gradient(problem: Problem) -> list[Tensor]:
    w, lam = mo.partition({name: p.detach() for name, p in problem.module.named_parameters()}, problem.weights)
    distinct = list({id(batch): batch for batch in problem.batches}.values())
    place = {id(batch): i for i, batch in enumerate(distinct)}
    batches = tuple(jnp.asarray(torch.stack(part).numpy()) for part in zip(*distinct, strict=True))
    order = jnp.asarray([place[id(batch)] for batch in problem.batches])
    run = COMPILED.get(problem.module) or COMPILED.setdefault(problem.module, compiled(problem))
    outer_batch = tuple(jnp.asarray(part.numpy()) for part in problem.outer_batch)
    got = run(
        {k: jnp.asarray(v.numpy()) for k, v in lam.items()},
        {k: jnp.asarray(v.numpy()) for k, v in w.items()},
        batches,
        order,
        outer_batch,
    )
    return [torch.from_numpy(np.array(got[name])) for name in lam]
