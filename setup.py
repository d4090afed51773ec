"""Builds the native part: mtml_fast/_C_cpu.so (torch operators) and mtml_fast/_numpy (the core on NumPy arrays).

MTML_FAST_BUILD=auto  native; pure Python where there is no compiler (the default)
MTML_FAST_BUILD=1     native, or stop
MTML_FAST_BUILD=0     pure Python
Also read: CXX (the compiler), MAX_JOBS (parallel compilations).
"""

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


def library(name: str, folder: str) -> Extension:
    """A native library: its own folder of csrc, and the core."""
    patterns = (f"csrc/{folder}/*.cpp", "csrc/isa/*.cpp", "csrc/*.cpp")
    sources = sorted(str(f.relative_to(ROOT)) for pattern in patterns for f in ROOT.glob(pattern))
    # `depends` puts the headers into source distributions; ninja finds out by itself who includes them
    return Extension(name, sources, depends=sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/**/*.h")))


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


class NinjaBuild(build_ext):
    """All files of both libraries in one ninja run: in parallel, and after an edit only what it touches."""

    def get_ext_filename(self, fullname: str) -> str:
        # a torch operator library: no Python symbol, hence no Python version in its name
        if fullname.endswith("_C_cpu"):
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
        import pybind11

        torch = find_torch()
        version = re.search('__version__ = "(.+)"', (ROOT / "mtml_fast/__init__.py").read_text())[1]
        include = {
            "csrc": f"-DMTML_FAST_VERSION='\"{version}\"'",
            "cpu": f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {quote(torch / 'include')}",
            "numpy": f"-isystem {quote(pybind11.get_include())} -isystem {quote(sysconfig.get_paths()['include'])}",
        }
        lines = [
            f"cxx = {shlex.join(compiler())}",
            # no path of this machine goes into the libraries
            f"flags = {shlex.join(FLAGS)} -ffile-prefix-map={quote(ROOT)}/= -ffile-prefix-map={quote(torch)}=torch",
            "rule compile",
            f"  command = $cxx $flags -I{quote(ROOT / 'csrc')} $include -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            "rule link",
            # bound to its own symbols: both libraries hold the core
            "  command = $cxx -shared -Wl,-Bsymbolic $in -o $out $libs",
        ]
        for source in sorted({source for extension in self.extensions for source in extension.sources}):
            path = re.sub("([$ :])", r"$\1", str(ROOT / source))
            lines.append(f"build {object_file(source)}: compile {path}")
            lines.append(f"  include = {include.get(Path(source).parent.name, '')}")
        for extension in self.extensions:
            # torch has loaded libtorch_cpu before us, so its name is enough: no path to it
            libs = f"-L{quote(torch / 'lib')} -ltorch_cpu" if extension.name.endswith("_C_cpu") else ""
            lines.append(f"build {extension.name}.so: link {' '.join(map(object_file, extension.sources))}")
            lines.append(f"  libs = {libs}")
        return "\n".join(lines) + "\n"


def quote(path) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def object_file(source: str) -> str:
    return re.sub("[/.]", "-", source) + ".o"


extensions = [library("mtml_fast._C_cpu", "cpu"), library("mtml_fast._numpy", "numpy")] if wants_native() else []
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
