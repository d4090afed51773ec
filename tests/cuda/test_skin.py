"""The CUDA skins on a CPU, over kernels that run in the shim: the operator's own tests, and what a skin refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.test_shim import OPERATORS, ROOT, build, pytestmark  # noqa: F401

TORCH = Path(torch.__file__).parent
# kernels that an operator's skin calls besides its own have none
SKINS = [name for name in OPERATORS if (ROOT / f"csrc/cuda/{name}.cpp").is_file()]

# what takes long on fibers, and what a compiler makes of an operator whoever serves it
LESS = "not T64 and not compiled"

# in its own process: the operators of torch's CPU key are now the CUDA ones
START = """
import ctypes, sys, torch
import mtml_fast.ops
torch.ops.load_library({library!r})
skin = ctypes.CDLL({library!r})
"""


@pytest.fixture(scope="module")
def skins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skin")
    flags = "-shared -fPIC -O2 -Wl,-Bsymbolic,--no-as-needed -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000"
    torch_flags = [f"-isystem{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    return {
        name: build(
            folder / f"{name}.so",
            [*flags.split(), *torch_flags, '-DMTML_CUDA_ARCHITECTURES="none"', f'-DSKIN="cuda/{name}.cpp"'],
            ROOT / f"csrc/cuda/{name}.cu",
            ROOT / "tests/native/cuda_skin.cpp",
        )
        for name in SKINS
    }


def python(library: Path, code: str) -> subprocess.CompletedProcess:
    code = START.format(library=str(library)) + code
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", SKINS)
def test_battery(skins, name):
    """What the operator's tests ask of any kernel; launches show who ran."""
    code = f"""
import pytest
failed = pytest.main(["-x", "-p", "no:cacheprovider", "-k", {LESS!r}, "tests/ops/test_{name}.py"])
print("launches", skin.cuda_skin_launches())
sys.exit(failed)
"""
    done = python(skins[name], code)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.rsplit("launches ", 1)[1]) > 100


def test_launches_of_a_step(skins):
    """One launch for a whole tree, two with clipping; the reverse as many, and one for each kind of shared rate."""
    code = """
from mtml_fast.ops import sgd_step
leaf = [torch.randn(3, 5), torch.randn(3, 4, 2)]
per_parameter = [torch.rand(1, 5, requires_grad=True), torch.rand(1, 4, 2, requires_grad=True)]
for lr, clip in ((0.1, None), (0.1, 1.0), (torch.rand(3, requires_grad=True), 1.0), (per_parameter, None)):
    params = [x.clone().requires_grad_() for x in leaf]
    new, _ = sgd_step(params, leaf, lr=lr, clip=clip)
    forward = skin.cuda_skin_launches()
    sum(x.square().sum() for x in new).backward()
    print(forward, skin.cuda_skin_launches())
"""
    done = python(skins["sgd_step"], code)
    assert done.stdout.splitlines() == ["1 1", "2 2", "2 3", "1 2"], done.stderr


def test_what_a_skin_refuses(skins):
    code = """
x = torch.ones(2, 3)
def call(*arguments):
    try:
        return torch.ops.mtml_fast.sgd_step(*arguments)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
call([x], [x], [torch.ones(())], [], 1.0, 0.0, None)
skin.cuda_skin_refuse_next()
call([x], [x], [torch.ones(())], [], 0.0, 0.0, None)
print(call([x], [x], [torch.ones(())], [], 0.0, 0.0, None)[0].sum().item())
"""
    done = python(skins["sgd_step"], code)
    refused, launch, after = done.stdout.splitlines()
    assert refused == "ValueError sgd_step: momentum must be in [0, 1), got 1"
    assert launch == (
        "RuntimeError sgd_step: CUDA refused a kernel: cudaErrorInvalidConfiguration, invalid configuration argument; "
        "built for none"
    )
    assert after == "0.0"
