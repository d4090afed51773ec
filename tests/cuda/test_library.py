"""The CUDA library: what it takes from torch and of a GPU, how it is loaded, and what the package says where it is
missing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtml_fast
from tests.cuda import resources
from tests.cuda.library import ARCHITECTURES, ROOT, build, ninja_file, nvcc_release

needs_nvcc = pytest.mark.skipif(nvcc_release() is None, reason="cuda-check needs nvcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, and what nvcc said."""
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def library(built):
    return built[0]


@pytest.fixture
def found(built):
    """(kernel, architecture) -> what it takes."""
    return resources.parse(built[1])


@needs_nvcc
def test_as_recorded(found):
    """Nothing spills, and all takes what csrc/cuda/resources.txt says."""
    assert resources.complaints(nvcc_release(), found) == []
    release, recorded = resources.read_table()
    if release != nvcc_release():
        pytest.skip(f"nothing spills; the table of registers is that of nvcc {release}")
    assert len(recorded) == len(found) > 0


@needs_nvcc
def test_what_is_refused(found):
    """A register more, a spill, a kernel that is new or gone."""
    release, _ = resources.read_table()
    key = kernel, name = min(found)
    row = found[key]
    for changed, says in (
        ({**found, key: row._replace(registers=row.registers + 1)}, f"has {row.registers + 1} registers"),
        ({**found, key: row._replace(shared=row.shared + 4)}, f"and {row.shared + 4} bytes"),
        ({**found, key: row._replace(spills=8)}, "spills 8 bytes"),
        ({**found, ("other", name): row}, "and nothing in"),
        ({k: r for k, r in found.items() if k != key}, "has nothing"),
    ):
        (complaint,) = resources.complaints(release, changed)
        assert says in complaint
        assert complaint.startswith(kernel) or complaint.startswith("other")


@needs_nvcc
def test_symbols(library):
    """C functions of torch up to 2.11 and of the driver's interface; the entry points are its own affair."""
    command = ["nm", "--dynamic", "--demangle", str(library)]
    lines = subprocess.check_output(command, text=True).splitlines()
    wanted = [line.split(maxsplit=1)[1] for line in lines if line.split()[0] == "U"]
    assert "torch_library_impl" in wanted
    assert [s for s in wanted if re.search(r"\b(at|c10|torch|caffe2)::|^_?Py|^cuda", s)] == []
    assert any(line.endswith(" T mtml_fast_cuda_build_info") for line in lines)
    assert str(ROOT).encode() not in library.read_bytes()


LOAD = """
import torch
torch.version.cuda = "13.0"
import warnings
warnings.simplefilter("error")
import mtml_fast.ops
from mtml_fast.ops import OPERATORS, _library
from mtml_fast.env import services
import json
print(json.dumps([_library.cuda_build_info(), OPERATORS["sgd_step"].served_by("cuda"), _library.cuda_status()]))
print([s.why for s in services() if (s.operator, s.device) == ("sgd_step", "cuda")][0])
print(mtml_fast.ops.sgd_step([torch.ones(2, 3)], [torch.ones(2, 3)], lr=0.25)[0][0].sum().item())
_library.warn_without_cuda()
"""


def load(folder: Path, **environment) -> subprocess.CompletedProcess:
    """In a process whose torch says that it has CUDA, with the package as it lies in `folder`."""
    isolate = (
        'import sys\nsys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", isolate + LOAD]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path):
    ignored = shutil.ignore_patterns("_C_cuda.so", "__pycache__")
    shutil.copytree(Path(mtml_fast.__file__).parent, tmp_path / "mtml_fast", ignore=ignored)
    return tmp_path


@needs_nvcc
def test_loaded_where_torch_has_cuda(library, package):
    shutil.copy(library, package / "mtml_fast/_C_cuda.so")
    done = load(package, LD_LIBRARY_PATH=str(library.parent / "torch/lib"))
    assert done.returncode == 0, done.stderr
    first, why, result = done.stdout.splitlines()
    info, served_by, status = json.loads(first)
    assert info["version"] == mtml_fast.__version__
    assert info["architectures"] == ARCHITECTURES
    assert served_by == "native"
    assert status == f"CUDA library {info['version']} by nvcc {info['cuda']}, for {ARCHITECTURES}"
    assert (why, result) == ("own kernels, forward and backward", "4.5")


def test_missing_is_said_by_the_first_who_asks(package):
    done = load(package)
    first, why, result = done.stdout.splitlines()
    assert json.loads(first) == [None, "reference", "no CUDA library: _C_cuda.so is missing"]
    assert (why, result) == ("no CUDA library: _C_cuda.so is missing", "4.5")
    last = done.stderr.splitlines()[-1]
    assert last == "RuntimeWarning: mtml_fast runs on CUDA by its PyTorch reference: _C_cuda.so is missing"


def test_not_built_where_torch_has_no_cuda(tmp_path):
    done = ninja_file(tmp_path, None)
    assert done.stdout.splitlines()[0] == "0"
    assert done.stderr == ""


def test_not_built_without_its_nvcc(tmp_path):
    done = ninja_file(tmp_path, "13.0", CUDA_HOME=str(tmp_path))
    assert done.stdout.splitlines()[0] == "0"
    said = "mtml_fast: no CUDA kernels: torch is built for CUDA 13, and there is no nvcc (PATH, CUDA_HOME)\n"
    assert done.stderr == said


@needs_nvcc
def test_not_built_with_the_nvcc_of_another_cuda(tmp_path):
    done = ninja_file(tmp_path, "99.1")
    assert done.stdout.splitlines()[0] == "0"
    major = nvcc_release().split(".")[0]
    assert done.stderr == f"mtml_fast: no CUDA kernels: torch is built for CUDA 99, and nvcc is that of CUDA {major}\n"


@needs_nvcc
def test_bad_architectures(tmp_path):
    done = ninja_file(tmp_path, nvcc_release(), TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    assert done.stderr.endswith("mtml_fast: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got 'Hopper' in it\n")
