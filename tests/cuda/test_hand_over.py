"""What happens on a device that the CUDA library was not built for: others serve it, and this is said once.

In a process of its own, whose torch says that it has CUDA and a device, and whose CUDA key has kernels that refuse.
"""

import subprocess
import sys

import pytest
import torch

from mtml_fast.ops import _cuda
from tests.cuda.test_shim import ROOT

PROCESS = """
import warnings
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
asked = []
torch.cuda.get_device_capability = lambda index: asked.append(index) or {capability}
warnings.simplefilter("ignore")
from mtml_fast.ops import OPERATORS, _cuda, _library, sgd_step
warnings.simplefilter("always")
_cuda.cuda_build_info = lambda: {{"architectures": "8.0 9.0+PTX"}}

def refuse(*args):
    raise AssertionError("CUDA refused a kernel: no kernel image is available")

for name in ("sgd_step", "sgd_step_backward", "gradient_gram", "gradient_gram_backward"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _library.LIB.impl(name, refuse, "CUDA", allow_override=True)
# as if these were C++'s
for operator in OPERATORS.values():
    operator.triton = False

key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
step, gram = OPERATORS["sgd_step"], OPERATORS["gradient_gram"]

def call(backward):
    # the kernel of the CUDA key, on the CPU's tensors
    params, grads, lr = [torch.ones(2, 3)], [torch.ones(2, 3)], [torch.tensor(0.25)]
    if backward:
        return step.backward.redispatch(key, [torch.ones(2, 3)], params, grads, lr, [], 0.0, 0.0, None, [True] * 3)
    return step.forward.redispatch(key, params, grads, lr, [], 0.0, 0.0, None)
"""

REFUSED = """
with warnings.catch_warnings(record=True) as said:
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert step.served_by(device) == "reference", device
        assert gram.served_by(device) == "triton", device
for warning in said:
    print("said", warning.message)
print("asked", asked)
print(call(False)[0].sum().item(), [g.sum().item() for g in call(True)])
from mtml_fast.env import services
print(*[s.why for s in services() if s.device == "cuda" and s.operator in ("sgd_step", "gradient_gram")], sep="\\n")
"""

COVERED = """
with warnings.catch_warnings(record=True) as said:
    for device in ("cuda", "cuda:0", "cuda:1") * 3:
        assert step.served_by(device) == "native", device
print(len(said), asked)
try:
    call(False)
except AssertionError as error:
    print(error)
"""


def run(code: str, capability: tuple[int, int]) -> list[str]:
    code = PROCESS.format(capability=capability) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_unknown_architecture_is_handed_over():
    pytest.importorskip("triton")
    said, asked, results, of_gram, of_step = run(REFUSED, (7, 5))
    why = "cuda:0 has compute capability 7.5, the library is for 8.0 9.0+PTX"
    assert said.startswith(f"said mtml_fast: {why}: Triton, or the PyTorch reference, serves CUDA devices instead")
    # the first answer is that of all devices
    assert asked == "asked [0]"
    assert results == "4.5 [6.0, -1.5, -6.0]"
    assert of_gram.endswith(f"compiled at the first call in the place of the CUDA library: {why}")
    assert of_step == f"PyTorch operations in the place of the CUDA library: {why}"


def test_a_known_one_is_asked_once():
    silent, refused = run(COVERED, (12, 0))
    assert silent == "0 [0, 1]"
    assert refused == "CUDA refused a kernel: no kernel image is available"


@pytest.mark.parametrize(
    ("architectures", "runs", "refuses"),
    [
        ("8.0 9.0+PTX", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5), (6, 1)]),
        ("8.6 9.0", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0), (12, 0)]),
        ("8.0+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(11, 0), (9, 0)]),
        ("12.0+PTX 7.5", [(12, 0), (12, 1), (7, 5)], [(8, 0), (10, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_covers(architectures, runs, refuses):
    assert all(_cuda.covers(architectures, capability) for capability in runs)
    assert not any(_cuda.covers(architectures, capability) for capability in refuses)


def test_without_a_library_or_a_device_there_is_nothing_to_refuse(monkeypatch):
    assert _cuda.refusal(torch.device("cuda:0")) is None
    monkeypatch.setattr(_cuda, "cuda_build_info", lambda: {"architectures": "8.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _cuda.refusal(torch.device("cuda:0")) is None
