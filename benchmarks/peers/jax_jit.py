"""JAX jit in its own environment: a subprocess that takes its turns; data and results travel as .npy files."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Settings, Unavailable
from mtml_fast.cli.meta_step import MetaStep
from mtml_fast.cli.timing import Provider


def jax(step: MetaStep, settings: Settings) -> Provider:
    if settings.jax is None:
        raise Unavailable("no Python with JAX is named (--jax or MTML_FAST_JAX_PYTHON)")
    return JaxProvider(step, settings)


class JaxProvider(Provider):
    """A process that has compiled the step, and computes when it is told to."""

    def __init__(self, step: MetaStep, settings: Settings):
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        for name, rows in zip(("support", "query"), step.padded(), strict=True):
            for part, values in rows.items():
                np.save(folder / f"{name}.{part}.npy", values.detach().cpu().numpy())
        for i, p in enumerate(step.params):
            np.save(folder / f"param.{i}.npy", p.detach().cpu().numpy())
        options = {name: getattr(step, name) for name in ("lr", "steps", "loss", "first_order", "feature_gradients")}
        options |= {"params": len(step.params), "norm": step.norm, "threads": settings.threads}
        options["device"] = settings.device
        (folder / "options.json").write_text(json.dumps(options))
        try:
            # a file holds any number of warnings, where a pipe that nobody reads would stop the process
            with (folder / "stderr").open("w") as errors:
                self._process = subprocess.Popen(
                    [settings.jax, Path(__file__).with_name("jax_worker.py"), folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=_environment(settings),
                )
        except OSError as error:
            self._folder.cleanup()
            raise Unavailable(f"{settings.jax} does not start ({error.strerror})") from None
        # its own start takes some seconds besides
        waited = select.select([self._process.stdout], [], [], settings.compile_limit + 30)[0]
        if not waited:
            self._process.kill()
            self.close()
            raise Unavailable(f"did not compile in {settings.compile_limit + 30:.0f} s", recorded=True)
        ready = self._process.stdout.readline()
        if not ready:
            message = (folder / "stderr").read_text().strip().splitlines()
            self.close()
            raise Unavailable(f"{settings.jax}: {message[-1] if message else 'it ended without a word'}")
        ready = json.loads(ready)
        super().__init__(self.results, ready["version"], ready["compile_s"])

    def results(self) -> list[Tensor]:
        folder = Path(self._folder.name)
        return [torch.from_numpy(np.load(folder / f"result.{i}.npy")) for i in range(len([*folder.glob("result.*")]))]

    def turn(self, seconds: float, threads: int) -> list[float]:
        print(seconds, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        # an empty standard input ends it
        self._process.communicate()
        self._folder.cleanup()


def _environment(settings: Settings) -> dict[str, str]:
    # this process's packages are not JAX's
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if settings.device != "cpu":
        # the memory of the device is for all of us
        return {**kept, "JAX_PLATFORMS": settings.device, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    flags = [os.environ.get("XLA_FLAGS", "")]
    if settings.threads == 1:
        flags += ["--xla_cpu_multi_thread_eigen=false", "intra_op_parallelism_threads=1"]
    if os.environ.get("MTML_FAST_ISA") == "avx2":
        flags.append("--xla_cpu_max_isa=AVX2")
    return {**kept, "XLA_FLAGS": " ".join(flags).strip(), "JAX_PLATFORMS": "cpu"}
