"""The CUDA skins on a CPU, over kernels that run in the shim: the operator's own tests, and what a skin refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.test_shim import OPERATORS, ROOT, build, pytestmark  # noqa: F401

TORCH = Path(torch.__file__).parent
# kernels that an operator's skin calls besides its own have none
SKINS = [name for name in OPERATORS if (ROOT / f"csrc/cuda/{name}.cpp").is_file()]

# not what takes long on fibers, nor what a compiler makes of an operator whoever serves it, nor what only a CPU does
SELECTED = {"sgd_step": "not T64 and not compiled", "mlp_adapt": "battery and (values or tasks or gradcheck or bad)"}

# in its own process: the operators of torch's CPU key are now the CUDA ones
START = """
import ctypes, sys, torch
import mtml_fast.ops
torch.ops.load_library({library!r})
skin = ctypes.CDLL({library!r})
"""


def kernels(name: str) -> list[Path]:
    """Whose headers the skin includes."""
    headers = re.findall(r'#include "(cuda/\w+)\.h"', (ROOT / f"csrc/cuda/{name}.cpp").read_text())
    sources = [ROOT / f"csrc/{header}.cu" for header in headers]
    return [source for source in sources if source.is_file()]


@pytest.fixture(scope="module")
def skins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skin")
    flags = "-shared -fPIC -O2 -Wl,-Bsymbolic,--no-as-needed -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000"
    torch_flags = [f"-isystem{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    return {
        name: build(
            folder / f"{name}.so",
            [*flags.split(), *torch_flags, '-DMTML_CUDA_ARCHITECTURES="none"', f'-DSKIN="cuda/{name}.cpp"'],
            *kernels(name),
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
failed = pytest.main(["-x", "-p", "no:cacheprovider", "-k", {SELECTED[name]!r}, "tests/ops/test_{name}.py"])
print("launches", skin.cuda_skin_launches())
sys.exit(failed)
"""
    done = python(skins[name], code)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(done.stdout.rsplit("launches ", 1)[1]) > 100


def test_battery_of_mlp_adapt_in_gram_form(skins):
    """Values and derivatives; bits are those of torch's products, which know how many rows there are."""
    code = """
import pytest
skin.cuda_skin_always_gram()
failed = pytest.main(
    ["-x", "-p", "no:cacheprovider", "-k", "battery and (values or gradcheck)", "tests/ops/test_mlp_adapt.py"]
)
sys.exit(failed)
"""
    done = python(skins["mlp_adapt"], code)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


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


def test_launches_of_a_meta_step(skins):
    """One forward, two for the reverse, however many tasks, layers and steps; a head's table of rates is one more."""
    code = """
from mtml_fast.ops import mlp_adapt
torch.manual_seed(0)
for tasks, widths, steps, rates in ((2, (3, 4, 2), 1, False), (9, (3, 5, 5, 5, 2), 3, True), (4, (6, 2), 2, True)):
    params = [t for i, o in zip(widths, widths[1:]) for t in (torch.randn(o, i), torch.randn(o))]
    x, y = torch.randn(tasks, 4, widths[0]), torch.randint(2, (tasks, 4))
    lr = torch.full((steps,), 0.1, requires_grad=rates)
    for p in params: p.requires_grad_()
    skin.cuda_skin_launches()
    losses = mlp_adapt(params, x, y, x, y, lr=lr, steps=steps).losses
    forward = skin.cuda_skin_launches()
    losses.sum().backward()
    print(forward, skin.cuda_skin_launches())
"""
    done = python(skins["mlp_adapt"], code)
    assert done.stdout.splitlines() == ["1 2", "1 2", "1 3"], done.stderr


def test_what_explain_says(skins):
    code = """
import mtml_fast as mf
torch.manual_seed(0)
x, y = torch.randn(3, 5, 8), torch.randint(0, 4, (3, 5))
batch = mf.TaskBatch(mf.TaskRows(x, y), mf.TaskRows(x, y))
for widths in ((), (16, 12), (9,)):
    if widths == (9,): skin.cuda_skin_always_gram()
    said = mf.explain(mf.nn.mlp(8, widths, 4), batch, steps=2)
    print(said.forms, said.operations > 0, said.bytes > 4000)
"""
    done = python(skins["mlp_adapt"], code)
    forms = [line for line in done.stdout.splitlines() if line.startswith("(")]
    expected = [("8-4 gram",), ("8-16 dense", "16-12 dense", "12-4 dense"), ("8-9 gram", "9-4 dense")]
    assert forms == [f"{each} True True" for each in expected], done.stdout + done.stderr


# the losses of a short run, by whoever serves, and by which way
RUN = """
import torch
import mtml_fast as mf
from mtml_fast.ops.mlp_adapt import eager
torch.manual_seed(0)
maml = mf.MAML(mf.nn.mlp(1, (12, 12), 1), lr=torch.nn.Parameter(torch.tensor(0.02)), steps=3, loss="mse")
optimizer = torch.optim.Adam(maml.parameters(), 0.01)
tasks = mf.data.Sinusoid(shots=5, query_shots=7)
# as on a device
eager._has_gradients_at_once = lambda _: {at_once}
with mf.backend({served_by!r}):
    for step in range(6):
        loss = maml(tasks.sample(4, step=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(float(loss.detach()))
"""


def test_a_run_has_the_same_losses_whoever_serves(skins):
    launches = "print('launches', skin.cuda_skin_launches())"
    done = {
        "cuda": python(skins["mlp_adapt"], RUN.format(served_by="auto", at_once=False) + launches),
        "reference": python(skins["mlp_adapt"], RUN.format(served_by="reference", at_once=False)),
    }
    done["cpu"] = subprocess.run(
        [sys.executable, "-c", RUN.format(served_by="auto", at_once=True)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    # a forward launch and two for the reverse, six times
    assert done["cuda"].stdout.splitlines()[-1] == "launches 18", done["cuda"].stderr
    losses = {who: [float(line) for line in ran.stdout.splitlines()[:6]] for who, ran in done.items()}
    assert len(losses["cpu"]) == 6, done["cpu"].stderr
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-5)
    assert losses["cuda"] == pytest.approx(losses["reference"], rel=2e-5)


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


def test_gram_form_under_autocast(skins):
    """torch's products are those of the features' own type there too."""
    code = """
from mtml_fast.ops import mlp_adapt
skin.cuda_skin_always_gram()
torch.manual_seed(0)
params = [torch.randn(shape, requires_grad=True) for shape in ((6, 9), (6,), (3, 6), (3,))]
x, y = torch.randn(2, 4, 9), torch.randint(3, (2, 4))
def results():
    losses = mlp_adapt(params, x, y, x, y, lr=0.1, steps=2).losses
    return [losses.detach(), *torch.autograd.grad(losses.sum(), params)]
plain = results()
with torch.autocast("cpu", torch.bfloat16):
    print(all(map(torch.equal, plain, results())))
"""
    done = python(skins["mlp_adapt"], code)
    assert done.stdout == "True\n", done.stderr
