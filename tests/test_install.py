"""Importing without a native library, and what setup.py says when it cannot build one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtml_fast
from mtml_fast.ops import _library

ROOT = Path(__file__).parents[1]


# an editable install would find in the source folder what a copy lacks
ISOLATE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
"""


def python(code, *, path, **environment):
    """Run code in a new process, in which `path` comes first."""
    code = ISOLATE + code
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=path, capture_output=True, text=True)


@pytest.fixture
def pure(tmp_path):
    """A folder with the package without its native files."""
    source = Path(mtml_fast.__file__).parent
    shutil.copytree(source, tmp_path / "mtml_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mtml_fast.ops, torch
for w in caught:
    print(w.category.__name__, w.message)
x = torch.ones(2, 3)
print(mtml_fast.ops.sgd_step([x], [x], lr=0.25)[0][0].unique().item())
"""


def test_without_the_library_one_warning_with_the_reason(pure):
    done = python(IMPORT, path=pure)
    warning, result = done.stdout.splitlines()
    assert warning.startswith("RuntimeWarning mtml_fast runs on its PyTorch reference")
    assert "_C_cpu.so is missing; run `pip install" in warning
    assert result == "0.75"
    assert done.stderr == ""


def test_a_library_that_does_not_load(pure):
    (pure / "mtml_fast" / "_C_cpu.so").write_text(f'not a library, "version": "{mtml_fast.__version__}"')
    warning, result = python(IMPORT, path=pure).stdout.splitlines()
    assert "_C_cpu.so does not load with torch" in warning
    assert result == "0.75"


def test_a_library_of_another_version_is_not_loaded(pure):
    (pure / "mtml_fast" / "_C_cpu.so").write_text('"version": "0.0.0"')
    warning, result = python(IMPORT, path=pure).stdout.splitlines()
    assert f"_C_cpu.so was built for another version than {mtml_fast.__version__}" in warning
    assert result == "0.75"


def test_status_names_the_reason(pure):
    code = "from mtml_fast.ops._library import *; print(build_info(), native_status())"
    done = python(code, path=pure, PYTHONWARNINGS="ignore")
    assert done.stdout == "None no native library: _C_cpu.so is missing\n"


def test_numpy_door_without_its_module(pure):
    done = python("import mtml_fast.numpy", path=pure, PYTHONWARNINGS="ignore")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: mtml_fast.numpy needs the native module")
    assert last.endswith("run `pip install --no-build-isolation -e .` in the source folder of mtml_fast")


HEAVY = ["triton", "tqdm", "matplotlib", "safetensors", "typer", "rich", "PIL", "sklearn", "torch.utils.cpp_extension"]


def test_import_builds_nothing_and_needs_torch_and_numpy_only(tmp_path):
    code = f"""
import sys
import torch
before = set(sys.modules)
for name in {HEAVY}:
    if name not in before:
        sys.modules[name] = None
import mtml_fast, mtml_fast.ops
print([name for name in {HEAVY} if name not in before and sys.modules[name]])
"""
    # no compiler, no ninja and no nvcc can be found
    warnings = "ignore" if _library.build_info() is None else "error"
    done = python(code, path=ROOT, PATH=str(tmp_path), CXX="", PYTHONWARNINGS=warnings)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


# setup.py as if nothing were installed but setuptools, and, where given, a torch in a folder of its own
SETUP = """
import runpy, site, sys, sysconfig
import setuptools
sys.path[:] = [p for p in sys.path if "-packages" not in p] + {folders}
paths = sysconfig.get_paths
sysconfig.get_paths = lambda *args, **kwargs: {{**paths(*args, **kwargs), "platlib": "nowhere", "purelib": "nowhere"}}
site.getusersitepackages = lambda: "nowhere"
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def setup(*folders, **environment):
    return python(SETUP.format(folders=[str(f) for f in folders]), path=ROOT, **environment)


def fake_torch(folder, version):
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


def refusal(done):
    """What setup.py said last, and that it stopped with it and without a traceback."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_build_with_torch_and_without_pybind11(tmp_path):
    """Without what NumPy's door needs: said, or refused where all is asked for."""
    torch = fake_torch(tmp_path, "2.11.0+cpu")
    done = setup(torch, MTML_FAST_BUILD="auto")
    assert done.stdout.splitlines()[-1] == mtml_fast.__version__
    assert "mtml_fast: no mtml_fast.numpy: there is no pybind11" in done.stderr
    sentence = refusal(setup(torch, MTML_FAST_BUILD="1"))
    assert sentence == "mtml_fast: MTML_FAST_BUILD=1, but there is no pybind11: run `pip install pybind11`"


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_build_without_torch_says_what_to_run(mode):
    sentence = refusal(setup(MTML_FAST_BUILD=mode))
    assert sentence.startswith("mtml_fast: found no torch to build against: run `pip install 'torch>=2.11'` first")


def test_build_with_an_old_torch_says_what_to_run(tmp_path):
    sentence = refusal(setup(fake_torch(tmp_path, "2.9.1+cu128")))
    assert sentence == f"mtml_fast: needs torch>=2.11, got 2.9.1+cu128 in {tmp_path}: run `pip install -U torch`"


def test_build_without_compiler():
    sentence = refusal(setup(MTML_FAST_BUILD="1", CXX="no-such-compiler"))
    assert sentence.startswith("mtml_fast: MTML_FAST_BUILD=1, but no C++ compiler found (CXX='no-such-compiler')")
    done = setup(MTML_FAST_BUILD="auto", CXX="no-such-compiler")
    assert done.stdout.splitlines()[-1] == mtml_fast.__version__
    said = [line for line in done.stderr.splitlines() if line.startswith("mtml_fast:")]
    assert said == [
        "mtml_fast: no C++ compiler found (CXX='no-such-compiler'): install g++ or clang++; going on in pure Python"
    ]


def test_pure_build_needs_nothing():
    done = setup(MTML_FAST_BUILD="0", CXX="no-such-compiler")
    assert done.stdout.splitlines()[-1] == mtml_fast.__version__
    assert "mtml_fast:" not in done.stderr


def test_unknown_build_mode_is_named():
    assert refusal(setup(MTML_FAST_BUILD="yes")) == "mtml_fast: MTML_FAST_BUILD must be auto, 0 or 1, got 'yes'"
