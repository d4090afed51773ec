"""make gpu-check: prove and time everything on a machine with a GPU, offline, with the Python that is there.

python3 benchmarks/gpu_check.py [--out FOLDER] [--device cuda|cpu] [--only PART,...] [--limit SECONDS]

Needs torch >= 2.11 with CUDA; uses nvcc, ninja, setuptools, pybind11, Triton, pytest, JAX and compute-sanitizer where
they are, and says in a line what it lacks and what that leaves out. Nothing is installed or fetched, and nothing is
written but the build (into this tree) and, in FOLDER (else $OUT, else benchmarks/results), <device>.csv and
<device>.log. Every part is a process of its own with a time limit: one that runs over is cut, and the rest goes on.
The exit code is 1 if a check failed, was cut, or could not run.

--device cpu tries the program itself without a GPU: the same parts, small, without what only CUDA has.
"""

# the standard library alone: the package is not built yet
import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable or "python3"
OPERATORS = ("mlp_adapt", "heads", "heads_loss", "sgd_step", "gradient_gram", "gradient_combine")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

ABOUT = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "device": torch.cuda.get_device_name() if cuda else None,
    "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
}))
"""

# a build without nvcc, or with that of another CUDA, passes, and everything below it on the reference too
LIBRARY = """
import sys
from mtml_fast.ops._library import cuda_build_info, cuda_status
print(cuda_status())
sys.exit(cuda_build_info() is None)
"""


@dataclass
class Part:
    """What it does, and the seconds that it may take."""

    name: str
    limit: float
    commands: dict[str, list[str]] = field(default_factory=dict)  # run side by side, the output under their names
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # what it lacks to run; "" where nothing
    needed: bool = True  # whether to lack it is a failure
    note: str = ""  # what it leaves out


class Log:
    """Lines on the screen and in the file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self._path = path

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        with self._path.open("a") as file:
            print(text, file=file)


def main() -> None:
    options = _options()
    began = time.monotonic()
    about = _about(options.device)
    folder = Path(options.out or ROOT / "benchmarks/results")
    log = Log(folder / f"{about['device'].replace(' ', '-').replace('/', '-')}.log")
    log(f"{about['device']}, compute capability {about['capability']}, torch {about['torch']}, {PYTHON}")
    failed = []
    for part in parts(options.device, about, folder):
        if options.only and part.name not in options.only:
            continue
        left = options.limit - (time.monotonic() - began)
        verdict = run(part, left, log)
        if verdict not in ("passed", "left out"):
            failed.append(f"{part.name} {verdict}")
    log(f"\n{time.monotonic() - began:.0f} s; {'; '.join(failed) or 'all passed'}")
    sys.exit(bool(failed))


def parts(device: str, about: dict, folder: Path) -> list[Part]:
    """In this order: what others need first, timings before the long checks, which may be cut."""
    module = lambda name, *more: [PYTHON, "-m", f"benchmarks.gpu.{name}", "--device", device, *more]  # noqa: E731
    return [
        _build(device, about),
        _environment(device),
        Part("operators", 70, {"": module("checks", "operators")}),
        Part("precision", 30, {"": module("precision")}),
        Part("trainers", 80, {"": module("checks", "trainers")}),
        Part("benchmarks", 190, {"": module("bench", "--out", str(folder), "--limit", "180")}),
        _sanitizer(device, module("calls")),
        _battery(device, about),
    ]


def _build(device: str, about: dict) -> Part:
    lacks = [name for name in ("setuptools", "ninja") if not importlib.util.find_spec(name)]
    if "ninja" in lacks and shutil.which("ninja"):
        lacks.remove("ninja")
    part = Part("build", 200, {"": [PYTHON, "setup.py", "-q", "build_ext", "--inplace"]})
    # the machine code of this device alone: a build for all of them takes as many times as long
    part.environment = {"TORCH_CUDA_ARCH_LIST": f"{about['capability']}+PTX"} if device != "cpu" else {}
    # where CUDA is installed, and not always in the PATH
    home, named = Path("/usr/local/cuda"), os.environ.get("CUDA_HOME") or shutil.which("nvcc")
    if device != "cpu" and not named and (home / "bin/nvcc").exists():
        part.environment["CUDA_HOME"] = str(home)
    if lacks:
        part.missing = f"{' and '.join(lacks)}; what was built before serves, else Triton and the PyTorch reference"
    elif device == "cpu":
        part.missing, part.needed = "a GPU: what was built before serves", False
    return part


def _environment(device: str) -> Part:
    part = Part("env", 40, {"": [PYTHON, "-m", "mtml_fast.env"]})
    if device != "cpu":
        part.commands["library"] = [PYTHON, "-c", LIBRARY]
    return part


def _battery(device: str, about: dict) -> Part:
    files = [f"tests/ops/test_{name}.py" for name in OPERATORS]
    command = [PYTHON, "-m", "pytest", *files, "-k", "test_battery", "--maxfail", "25"]
    # some plugins write, or warn beside others, where they are installed
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    # who serves an operator, and what a torch of this version warns of, is not the battery's matter
    command += ["-W", "ignore::RuntimeWarning", "-W", "ignore::UserWarning", "-W", "ignore::DeprecationWarning"]
    command += ["-W", "ignore::FutureWarning", "--tb", "short", "--show-capture", "no"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    if device == "cpu":
        # `make test` runs it there: a few of its cases show that the command is right
        command[command.index("test_battery")] = "test_battery and T2-tiny and values"
    part = Part("battery", 200, {"": command}, {"MTML_FAST_TEST_DEVICE": device})
    if device != "cpu" and _version(about["torch"]) < (2, 13):
        command[command.index("test_battery")] = "test_battery and not compiled"
        part.note = f"torch.compile, which cannot trace func.grad of ragged rows in torch {about['torch']}"
    # with this torch's matrix products can be deterministic, for which the battery asks
    part.environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if not importlib.util.find_spec("pytest"):
        part.missing = "pytest: the operators' values and gradients are checked by the part operators alone"
    return part


def _sanitizer(device: str, command: list[str]) -> Part:
    part = Part("sanitizer", 90)
    # allocations of their own, so that one behind another's end shows
    part.environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if device == "cpu":
        part.missing, part.needed = "a GPU", False
    elif path is None:
        part.missing = "compute-sanitizer (PATH, CUDA_HOME)"
    else:
        # torch itself asks CUDA for things that it may not have
        part.commands = {
            tool: [path, "--tool", tool, *(["--report-api-errors", "no"] if tool == "memcheck" else []), *command]
            for tool in TOOLS
        }
    return part


def run(part: Part, left: float, log: Log) -> str:
    """Run a part, show what it says, and return "passed", "failed", "cut", "could not run" or "left out"."""
    log(f"\n== {part.name}")
    if part.missing:
        log(f"{'could not run' if part.needed else 'left out'}: it lacks {part.missing}")
        return "could not run" if part.needed else "left out"
    if part.note:
        log(f"left out: {part.note}")
    limit = min(part.limit, left)
    if limit < 5:
        log("cut: no time is left")
        return "cut"
    began = time.monotonic()
    environment = {**os.environ, **part.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    running = {}
    for name, command in part.commands.items():
        output = (ROOT / "build").resolve()
        output.mkdir(exist_ok=True)
        path = output / f"gpu-check-{part.name}{name and '-'}{name}.log"
        with path.open("wb") as file:
            # a group of its own: what it has started ends with it
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        running[name] = process, path
    verdicts = []
    for name, (process, path) in running.items():
        try:
            code = process.wait(max(0.1, began + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        text = path.read_text(errors="replace").rstrip()
        fault = sanitizer_fault(text, code) if part.name == "sanitizer" else ("" if code == 0 else f"exit code {code}")
        verdict = "cut" if code is None else "failed" if fault else "passed"
        verdicts.append(verdict)
        log("\n".join([*([f"-- {name}"] if name else []), text]))
        if verdict != "passed":
            log(f"{name} {verdict}: {fault if code is not None else f'after {limit:.0f} s'}".strip())
    verdict = next((v for v in ("failed", "cut") if v in verdicts), "passed")
    log(f"== {part.name} {verdict} in {time.monotonic() - began:.0f} s")
    return verdict


def sanitizer_fault(text: str, code: int | None) -> str:
    """What compute-sanitizer found in our kernels, or why it did not finish: "" where all is well."""
    summaries = [line for line in text.splitlines() if "SUMMARY:" in line]
    if not summaries:
        return f"it did not finish (exit code {code})"
    if code:
        return f"exit code {code}"
    # a report names kernels, "at void mtml::..."; those of torch and of CUDA's libraries are not our matter
    triton = [p.read_text() for p in sorted((ROOT / "mtml_fast/ops").glob("*/triton.py"))]
    names = [name for source in triton for name in re.findall(r"@triton\.jit.*?\ndef (\w+)", source, re.S)]
    # not any word of a report: some of Triton's functions have names like "number"
    ours = re.compile(rf" at (void )?(mtml::|({'|'.join(names)})\b)")
    for line in text.splitlines():
        if line.startswith("=========") and ours.search(line):
            return f"{summaries[-1].strip('= ')}: {line.strip('= ')}"
    return ""


def _about(device: str) -> dict:
    if device == "cpu":
        return {"device": "cpu", "capability": "none", "torch": "not asked"}
    done = subprocess.run([PYTHON, "-c", ABOUT], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        sys.exit(f"gpu-check: {PYTHON} needs torch >= 2.11 with CUDA: {last}")
    about = json.loads(done.stdout.splitlines()[-1])
    if about["device"] is None:
        sys.exit(f"gpu-check: there is no GPU that torch {about['torch']} of {PYTHON} can use")
    if _version(about["torch"]) < (2, 11):
        sys.exit(f"gpu-check: needs torch >= 2.11, got {about['torch']} of {PYTHON}")
    return about


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("+")[0].split(".")[:2]))


def _options():
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="folder for the rows and the log")
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts, such as env,operators")
    # under ten minutes, with what comes before and after
    parser.add_argument("--limit", type=float, default=525.0, help="seconds for all parts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
