"""The CUDA library as setup.py builds it, here against the headers of any torch that it is told has CUDA."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
ARCHITECTURES = "8.0 9.0+PTX"

# setup.py up to its file for ninja, with that torch in front
NINJA_FILE = """
import runpy, sys
import setuptools
sys.path.insert(0, {folder!r})
caught = {{}}
setuptools.setup = lambda **arguments: caught.update(arguments)
names = runpy.run_path("setup.py", run_name="__main__")
command = caught["cmdclass"]["build_ext"](setuptools.Distribution())
command.extensions = [e for e in caught["ext_modules"] if e.name == "mtml_fast._C_cuda"]
print(len(command.extensions))
print(command.ninja_file())
"""


def nvcc_release() -> str | None:
    """Such as "13.0.88", or `None` where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    says = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV([\d.]+)", says)[1]


def ninja_file(folder: Path, cuda: str | None, **environment: str) -> subprocess.CompletedProcess:
    """What setup.py says beside a torch of that CUDA, which comes to lie in the folder."""
    (folder / "torch/lib").mkdir(parents=True, exist_ok=True)
    version = f"__version__ = '{torch.__version__}'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "torch/version.py").write_text(version)
    if not (folder / "torch/include").exists():
        (folder / "torch/include").symlink_to(TORCH / "include")
    code = NINJA_FILE.format(folder=str(folder))
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def build(folder: Path) -> tuple[Path, str]:
    """The library, and what nvcc said: each kernel's figures, and no warning. Raises where a file does not compile."""
    done = ninja_file(folder, nvcc_release(), MTML_FAST_BUILD="1", TORCH_CUDA_ARCH_LIST=ARCHITECTURES)
    if done.returncode:
        raise RuntimeError(f"setup.py stopped:\n{done.stderr}")
    (folder / "build.ninja").write_text(done.stdout.partition("\n")[2])
    # what torch with CUDA has beside torch without; `no one's` libtorch_cpu is the one that this process has loaded
    (folder / "torch/lib/libtorch_cpu.so").symlink_to(TORCH / "lib/libtorch_cpu.so")
    code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    stub = ["-shared", "-fPIC", "-x", "c++", "-", "-o", str(folder / "torch/lib/libtorch_cuda.so")]
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    subprocess.run([*compiler, *stub], input=code, text=True, check=True)
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    environment = {**os.environ, "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xptxas -v"}
    built = subprocess.run([ninja, "-C", str(folder), "-j2"], env=environment, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"the CUDA library does not compile:\n{built.stdout}")
    return folder / "mtml_fast._C_cuda.so", built.stdout
