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
OLDEST_TORCH, TORCH_ABI = (2, 11), "0x020b000000000000"

# contraction into FMA is asked for, so that every compiler does it; the core's vectors are explicit, and vectorising
# their scalar rests too makes avx512.cpp 144 KB and 7 s instead of 63 KB and 2 s
FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-ffp-contract=fast -fno-math-errno -fno-tree-vectorize"
)
SHARED = ["csrc/isa/*.cpp", "csrc/build_info.cpp"]
LIBRARIES = {
    "mtml_fast._C_cpu": ["csrc/cpu/*.cpp", *SHARED],
    "mtml_fast._numpy": ["csrc/numpy/*.cpp", *SHARED],
}


def version() -> str:
    return re.search(r'^__version__ = "(.+)"', (ROOT / "mtml_fast/__init__.py").read_text(), re.M)[1]


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
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"mtml_fast: MTML_FAST_BUILD must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return False
    missing = None
    if not sys.platform.startswith("linux"):
        missing = f"the native library is built on Linux only, this is {sys.platform}"
    elif compiler() is None:
        missing = f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}); install g++ or clang++"
    if missing and mode == "1":
        raise SystemExit(f"mtml_fast: MTML_FAST_BUILD=1, but {missing}")
    if missing:
        print(f"mtml_fast: {missing}; going on in pure Python", file=sys.stderr)
        return False
    torch = find_torch()
    if torch is None:
        raise SystemExit(
            "mtml_fast: found no torch to build against: run `pip install 'torch>=2.11'` first; where it is installed, "
            "add --no-build-isolation; MTML_FAST_BUILD=0 builds pure Python"
        )
    found = re.search(r"__version__ = '(\d+)\.(\d+)[^']*'", (torch / "version.py").read_text())
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        what = found[0] if found else "no version"
        raise SystemExit(f"mtml_fast: needs torch>=2.11, got {what} in {torch.parent}: run `pip install -U torch`")
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
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(folder), *jobs]).returncode:
            raise SystemExit("mtml_fast: the native build failed, see above; MTML_FAST_BUILD=0 builds pure Python")
        for name in LIBRARIES:
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / f"{name}.so"), str(target))

    def ninja_file(self) -> str:
        import pybind11

        torch = find_torch()
        include = {
            "csrc": f"-DMTML_FAST_VERSION='\"{version()}\"'",
            "cpu": f"-DTORCH_TARGET_VERSION={TORCH_ABI} -isystem {quote(torch / 'include')}",
            "numpy": f"-isystem {quote(pybind11.get_include())} -isystem {quote(sysconfig.get_paths()['include'])}",
        }
        lines = [
            f"cxx = {shlex.join(compiler())}",
            f"flags = {shlex.join(FLAGS)} -I{quote(ROOT / 'csrc')}",
            "rule compile",
            "  command = $cxx $flags $include -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # bound to its own symbols: both libraries hold the core
            "  command = $cxx -shared -Wl,-Bsymbolic $in -o $out $libs",
        ]
        sources = {name: sorted(f for p in patterns for f in ROOT.glob(p)) for name, patterns in LIBRARIES.items()}
        for source in sorted(set().union(*sources.values())):
            path = re.sub("([$ :])", r"$\1", str(source))
            flags = include.get(source.parent.name, "")
            lines += [f"build {object_file(source)}: compile {path}", f"  include = {flags}"]
        for name, files in sources.items():
            # torch has loaded libtorch_cpu before us, so its name is enough: no path of this machine goes into the file
            libs = f"-L{quote(torch / 'lib')} -ltorch_cpu" if name.endswith("_C_cpu") else ""
            lines += [f"build {name}.so: link {' '.join(map(object_file, files))}", f"  libs = {libs}"]
        return "\n".join(lines) + "\n"


def quote(path) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def object_file(source: Path) -> str:
    return f"{source.parent.name}-{source.stem}.o"


def find_ninja() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("mtml_fast: needs ninja: run `pip install ninja`")


extensions = [Extension(name, []) for name in LIBRARIES] if wants_native() else []
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
