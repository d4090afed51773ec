"""The JAX side of jax_jit.py: `python jax_worker.py FOLDER` with a Python that has JAX; torch is not needed.

It reads its data from FOLDER, compiles, writes the results, prints one line of JSON, and then for every line "SECONDS"
on standard input the milliseconds of the calls that fill that time.
"""

import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
OPTIONS = json.loads((FOLDER / "options.json").read_text())
THREADS, DEVICE = OPTIONS["threads"], OPTIONS["device"]
# XLA makes as many threads as there are processors to run on
if DEVICE == "cpu" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

NORM_EPS = 1e-5
# calls between two readings of the clock: on a device a single one would be timed with the way there and back
GROUP = 1 if DEVICE == "cpu" else 10
if DEVICE != "cpu":
    # float32 as it is meant: its default there is tf32
    jax.config.update("jax_default_matmul_precision", "highest")


def main() -> None:
    params = [load(f"param.{i}") for i in range(OPTIONS["params"])]
    support, query = ({p.name.split(".")[1]: load(p.stem) for p in FOLDER.glob(f"{n}.*")} for n in ("support", "query"))
    xs, xq = support.pop("x"), query.pop("x")
    wanted = (0, 1, 2) if OPTIONS["feature_gradients"] else (0,)
    start = time.perf_counter()
    arguments = (params, xs, xq, support, query)
    step = jax.jit(jax.value_and_grad(meta_loss, wanted)).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    loss, (grads, *features) = step(*arguments)
    for i, result in enumerate([loss, *grads, *features]):
        np.save(FOLDER / f"result.{i}.npy", np.asarray(result))
    print(json.dumps({"version": jax.__version__, "compile_s": compile_s}), flush=True)
    # at one thread the time of all of the process's threads, of which some wait for each other
    clock = time.process_time if THREADS == 1 and DEVICE == "cpu" else time.perf_counter
    for line in sys.stdin:
        times = []
        while GROUP * sum(times) < 1e3 * float(line) or not times:
            begin = clock()
            for _ in range(GROUP):
                results = step(*arguments)
            jax.block_until_ready(results)
            times.append(1e3 * (clock() - begin) / GROUP)
        print(json.dumps(times), flush=True)


def load(name):
    return jnp.asarray(np.load(FOLDER / f"{name}.npy"))


def meta_loss(params, xs, xq, support, query):
    return jnp.mean(jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(params, xs, xq, support, query))


def task(params, xs, xq, support, query):
    for _ in range(OPTIONS["steps"]):
        grads = jax.grad(task_loss)(params, xs, support)
        if OPTIONS["first_order"]:
            grads = jax.lax.stop_gradient(grads)
        params = [p - OPTIONS["lr"] * g for p, g in zip(params, grads)]  # noqa: B905
    return task_loss(params, xq, query)


def task_loss(params, x, rows):
    stride = 4 if OPTIONS["norm"] else 2
    for start in range(0, len(params), stride):
        weight, bias, *gain_shift = params[start : start + stride]
        x = x @ weight.T + bias
        if gain_shift:
            centred = x - x.mean(0)
            x = centred * jax.lax.rsqrt((centred**2).mean(0) + NORM_EPS) * gain_shift[0] + gain_shift[1]
        if start + stride < len(params):
            x = jax.nn.relu(x)
    return rows_loss(x, rows)


def rows_loss(outputs, rows):
    y, loss = rows["y"], OPTIONS["loss"]
    if loss == "cross_entropy":
        if "mask" in rows:
            outputs = jnp.where(rows["mask"], outputs, -1e30)
        values = -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1)[:, 0]
    elif loss == "mse":
        values = ((outputs - y) ** 2).mean(-1)
    else:
        values = (jax.nn.softplus(outputs) - y * outputs).mean(-1)
    return (values * rows["weights"]).sum() if "weights" in rows else values.mean()


if __name__ == "__main__":
    main()
