"""Builds the native part: mtml_fast/_C_cpu.so (torch operators) and mtml_fast/_numpy (the core on NumPy arrays); and
mtml_fast/_C_cuda.so (torch operators on CUDA), where the installed torch has CUDA and its nvcc is there.

MTML_FAST_BUILD=auto  native; pure Python where there is no compiler (the default)
MTML_FAST_BUILD=1     native, or stop
MTML_FAST_BUILD=0     pure Python
Also read: CXX (the compiler), MAX_JOBS (parallel compilations), CUDA_HOME (nvcc, else looked up in the PATH) and
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX").
"""

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# contraction into FMA is asked for, so that every compiler does it; the core's vectors are explicit, and vectorising
# their scalar rests too makes avx512.cpp 144 KB and 7 s instead of 63 KB and 2 s
FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-ffp-contract=fast -fno-math-errno -fno-tree-vectorize"
)

NVCC_FLAGS = shlex.split("-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra")


def library(name: str, folder: str) -> Extension:
    """A native library: its own folder of csrc, and the core, which CUDA has in its kernels."""
    patterns = (f"csrc/{folder}/*.cpp", f"csrc/{folder}/*.cu")
    if folder != "cuda":
        patterns += ("csrc/isa/*.cpp", "csrc/*.cpp")
    sources = sorted(str(f.relative_to(ROOT)) for pattern in patterns for f in ROOT.glob(pattern))
    # `depends` puts headers and all of CUDA into source distributions; ninja finds out by itself who includes them
    others = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/cuda/*")]
    return Extension(name, sources, depends=sorted({str(f.relative_to(ROOT)) for f in others}))


def find_torch() -> Path | None:
    """The installed torch, by path: pip's build isolation hides it from `import`, and its headers are all we need."""
    # the base Python's packages too: a virtual environment may be open to them
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    paths = [sysconfig.get_paths(), sysconfig.get_paths(vars=base)]
    folders = [*sys.path, *(p[kind] for p in paths for kind in ("platlib", "purelib")), site.getusersitepackages()]
    found = (Path(folder) / "torch" for folder in folders)
    return next((torch for torch in found if (torch / "version.py").is_file() and (torch / "include").is_dir()), None)


def compiler() -> list[str] | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((shlex.split(name) for name in names if shutil.which(shlex.split(name)[0])), None)


def wants_native() -> bool:
    """Whether to build; stops with one sentence where the answer is "yes, but it cannot be done"."""
    mode = os.environ.get("MTML_FAST_BUILD", "auto")
    if mode == "0":
        return False
    if mode not in ("auto", "1"):
        raise SystemExit(f"mtml_fast: MTML_FAST_BUILD must be auto, 0 or 1, got {mode!r}")
    missing = None
    if not sys.platform.startswith("linux"):
        missing = f"the native library is for Linux, this is {sys.platform}"
    elif not compiler():
        missing = f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}): install g++ or clang++"
    if missing and mode == "1":
        raise SystemExit(f"mtml_fast: MTML_FAST_BUILD=1, but {missing}")
    if missing:
        print(f"mtml_fast: {missing}; going on in pure Python", file=sys.stderr)
        return False
    torch = find_torch()
    if torch is None:
        how = "run `pip install 'torch>=2.11'` first, and add --no-build-isolation where it is installed"
        raise SystemExit(f"mtml_fast: found no torch to build against: {how}; MTML_FAST_BUILD=0 builds pure Python")
    found = re.search(r"""(\d+)\.(\d+)[^'"]*""", (torch / "version.py").read_text())
    if (int(found[1]), int(found[2])) < (2, 11):
        raise SystemExit(f"mtml_fast: needs torch>=2.11, got {found[0]} in {torch.parent}: run `pip install -U torch`")
    return True


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def cuda_architectures() -> list[str]:
    """As in torch's own builds: 8.0 9.0+PTX."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").replace(";", " ").split()


def gencode(architectures: list[str]) -> list[str]:
    """nvcc's options for them: machine code for each, and PTX, which later ones compile when they load it."""
    flags = []
    for architecture in architectures:
        name, _, ptx = architecture.partition("+")
        number = name.replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number) or ptx not in ("", "PTX"):
            raise SystemExit(f"mtml_fast: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {architecture!r} in it")
        for code in (f"sm_{number}", f"compute_{number}")[: 2 if ptx else 1]:
            flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def wants_cuda() -> bool:
    """Whether to build for CUDA too; says why not, where torch has it."""
    found = re.search(r"""^cuda\b.*= *['"](\d+)[\d.]*['"]""", (find_torch() / "version.py").read_text(), re.MULTILINE)
    if not found:
        return False
    nvcc = find_nvcc()
    says = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release (\d+)", says)
    if not release or release[1] != found[1]:
        has = f"nvcc is that of CUDA {release[1]}" if release else "there is no nvcc (PATH, CUDA_HOME)"
        print(f"mtml_fast: no CUDA kernels: torch is built for CUDA {found[1]}, and {has}", file=sys.stderr)
        return False
    return True


class NinjaBuild(build_ext):
    """All files of all libraries in one ninja run: in parallel, and after an edit only what it touches."""

    def get_ext_filename(self, fullname: str) -> str:
        # a torch operator library: no Python symbol, hence no Python version in its name
        if fullname.endswith(("_C_cpu", "_C_cuda")):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        # not build_temp, which is new for every editable install: edits would rebuild everything
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.ninja_file())
        # pip's ninja may lie beside an interpreter that is not on the PATH
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if not ninja:
            raise SystemExit("mtml_fast: needs ninja: run `pip install ninja`")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja, "-C", str(folder), *jobs]).returncode:
            raise SystemExit("mtml_fast: the native build failed, see above; MTML_FAST_BUILD=0 builds pure Python")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / f"{extension.name}.so"), str(target))

    def ninja_file(self) -> str:
        torch = find_torch()
        version = re.search('__version__ = "(.+)"', (ROOT / "mtml_fast/__init__.py").read_text())[1]
        stable = f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {quote(torch / 'include')}"
        version = f"-DMTML_FAST_VERSION='\"{version}\"'"
        include = {
            "csrc": version,
            "cpu": stable,
            "cuda": f"{stable} {version} -DUSE_CUDA -DMTML_CUDA_ARCHITECTURES='\"{' '.join(cuda_architectures())}\"'",
        }
        if any(extension.name == "mtml_fast._numpy" for extension in self.extensions):
            import pybind11

            python = sysconfig.get_paths()["include"]
            include["numpy"] = f"-isystem {quote(pybind11.get_include())} -isystem {quote(python)}"
        # no path of this machine goes into the libraries
        prefixes = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch}=torch"]
        nvcc = [find_nvcc() or "nvcc", "-ccbin", compiler()[0]]
        nvcc_flags = [*NVCC_FLAGS, *gencode(cuda_architectures()), *(f"-Xcompiler={prefix}" for prefix in prefixes)]
        lines = [
            f"cxx = {shlex.join(compiler())}",
            f"flags = {shlex.join([*FLAGS, *prefixes])}".replace("$", "$$"),
            f"nvcc = {shlex.join(nvcc)}".replace("$", "$$"),
            f"nvcc_flags = {shlex.join(nvcc_flags)}".replace("$", "$$"),
            "rule compile",
            f"  command = $cxx $flags -I{quote(ROOT / 'csrc')} $include -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            # of the skins too, for CUDA's headers
            "rule compile_cuda",
            f"  command = $nvcc $nvcc_flags -I{quote(ROOT / 'csrc')} $include -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            "rule link",
            # bound to its own symbols: both libraries hold the core
            "  command = $cxx -shared -Wl,-Bsymbolic $in -o $out $libs",
            "rule link_cuda",
            # its own copy of CUDA's runtime: it shares contexts and streams with torch's by the driver
            "  command = $nvcc -shared -cudart static -Xlinker -Bsymbolic $in -o $out $libs",
        ]
        for source in sorted({source for extension in self.extensions for source in extension.sources}):
            path = re.sub("([$ :])", r"$\1", str(ROOT / source))
            folder = Path(source).parent.name
            lines.append(f"build {object_file(source)}: {'compile_cuda' if folder == 'cuda' else 'compile'} {path}")
            lines.append(f"  include = {include.get(folder, '')}")
        # torch has loaded its libraries before us, so their names are enough: no path to them
        libs = {"_C_cpu": "-ltorch_cpu", "_C_cuda": "-ltorch_cpu -ltorch_cuda"}
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            rule = "link_cuda" if name == "_C_cuda" else "link"
            lines.append(f"build {extension.name}.so: {rule} {' '.join(map(object_file, extension.sources))}")
            lines.append(f"  libs = -L{quote(torch / 'lib')} {libs[name]}" if name in libs else "  libs =")
        return "\n".join(lines) + "\n"


def quote(path) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def object_file(source: str) -> str:
    return re.sub("[/.]", "-", source) + ".o"


extensions = []
if wants_native():
    extensions.append(library("mtml_fast._C_cpu", "cpu"))
    if importlib.util.find_spec("pybind11"):
        extensions.append(library("mtml_fast._numpy", "numpy"))
    elif os.environ.get("MTML_FAST_BUILD") == "1":
        raise SystemExit("mtml_fast: MTML_FAST_BUILD=1, but there is no pybind11: run `pip install pybind11`")
    else:
        print("mtml_fast: no mtml_fast.numpy: there is no pybind11; torch's operators need none", file=sys.stderr)
    if wants_cuda():
        extensions.append(library("mtml_fast._C_cuda", "cuda"))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
