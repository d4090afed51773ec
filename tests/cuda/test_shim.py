"""The CUDA kernels on a CPU: tests/native/*_cuda.cpp, compiled with the .cu by g++ and tests/native/cuda_shim, under
sanitizers; and that every barrier of a kernel is one that would be missed.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
FLAGS = shlex.split("-std=c++17 -Og -g1 -ffp-contract=fast -Wall -Wextra -Werror -rdynamic -fno-sanitize-recover=all")
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
OPERATORS = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
# the first two of mlp_adapt have every option
CALLS = {"sgd_step": 20, "linear_adapt": 20, "mlp_adapt": 6}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


def build(target: Path, flags: list[str], *sources: Path) -> Path:
    include = [f"-I{ROOT / 'tests/native/cuda_shim'}", f"-I{ROOT / 'csrc'}"]
    command = [*COMPILER, *FLAGS, *flags, *include, "-x", "c++", *map(str, sources), "-o", str(target), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """(operator, sanitizer) -> its check."""
    folder = tmp_path_factory.mktemp("shim")

    def program(key: tuple[str, str]) -> Path:
        name, kind = key
        sources = (ROOT / f"csrc/cuda/{name}.cu", ROOT / f"tests/native/{name}_cuda.cpp")
        return build(folder / f"{name}_{kind}", [f"-fsanitize={SANITIZERS[kind]}"], *sources)

    keys = [(name, kind) for name in OPERATORS for kind in SANITIZERS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(keys, pool.map(program, keys), strict=True))


def run(program: Path, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kind", SANITIZERS)
@pytest.mark.parametrize("name", OPERATORS)
def test_random_calls(programs, name, kind, seed):
    done = run(programs[name, kind], CALLS[name], seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ok\n")


def barriers_written() -> set[str]:
    found = set()
    for path in [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.h")]:
        lines = enumerate(path.read_text().splitlines(), 1)
        found |= {f"{path.name}:{i}" for i, line in lines if re.match(r"\s*__syncthreads\(\);", line)}
    return found


def test_every_barrier_is_needed(programs):
    """Each one written is met by a check, and a check fails without it; one that nobody misses is to be removed."""
    met = {}
    for name in OPERATORS:
        for site in re.findall(r"^barrier (.+)$", run(programs[name, "thread"], CALLS[name], 0).stdout, re.MULTILINE):
            met.setdefault(site, []).append(name)
    assert set(met) == barriers_written() != set()
    left_out = [(name, site) for site, names in met.items() for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda key: run(programs[key[0], "thread"], CALLS[key[0]], 0, key[1]), left_out)
        for (name, site), done in zip(left_out, runs, strict=True):
            missed = "data race" in done.stderr or "FAILED" in done.stdout or "cuda_shim: " in done.stderr
            assert done.returncode != 0, f"{name} passes without {site}"
            assert missed, f"{name} without {site}: {done.stderr}"


BROKEN = """
#include <cuda_runtime.h>
#include <cstdio>
#include <string>
#include "cuda/block.h"
#include "cuda/launch.h"
CUDA_SHIM_SHARED_MEMORY;
__global__ void unwritten(float* out) { out[threadIdx.x] = mtml::cuda::shared_memory<float>()[threadIdx.x]; }
__global__ void outside(float* out) { mtml::cuda::shared_memory<float>()[threadIdx.x + 1] = out[threadIdx.x] = 0; }
__global__ void divergent(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0;
}
__global__ void two_places(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}
// a shuffle stands where a barrier should
__global__ void shuffled(float* out) {
  float* shared = mtml::cuda::shared_memory<float>();
  shared[threadIdx.x] = 1;
  const float one = __shfl_xor_sync(~0u, 1.0f, 1);
  out[threadIdx.x] = one * shared[threadIdx.x ^ 1];
}
__global__ void large(float* out) { out[threadIdx.x] = static_cast<float>(gridDim.x); }
int main(int, char** arguments) {
  const std::string name = arguments[1];
  float out[64];
  shim::Stream stream;
  auto launch = [&](void (*kernel)(float*), int threads, int64_t bytes) {
    return mtml::cuda::launch(kernel, 1, threads, bytes, &stream, static_cast<float*>(out));
  };
  if (name == "unwritten") {
    launch(unwritten, 64, 256);
    for (float x : out) if (x == x) return 0;
    return 1;
  }
  if (name == "outside") launch(outside, 64, 256);
  if (name == "divergent") launch(divergent, 64, 256);
  if (name == "two_places") launch(two_places, 64, 256);
  if (name == "shuffled") launch(shuffled, 32, 256);
  // more shared memory than CUDA gives unasked, all of it, and more than there is
  if (name == "large")
    return launch(large, 64, 49152) || launch(large, 64, 227 * 1024) || !launch(large, 64, 227 * 1024 + 1) ||
           cudaGetLastError() || launch(large, 2048, 0) != cudaErrorInvalidConfiguration || stream.launches.size() != 2;
  return 0;
}
"""


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("unwritten", "address", ""),
        ("outside", "address", "use-after-poison"),
        ("divergent", "address", "a thread waits at"),
        ("two_places", "address", "threads meet at"),
        ("shuffled", "thread", "data race"),
    ],
)
def test_the_shim_sees(broken, name, kind, says):
    done = run(broken[kind], name)
    assert done.returncode != 0
    assert says in done.stderr


def test_the_shim_lets_pass(broken):
    """What `launch` asks CUDA for, and which launches CUDA refuses."""
    assert run(broken["address"], "large").returncode == 0
    assert run(broken["address"], "shuffled").returncode == 0


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cpp").write_text(BROKEN)
    return {k: build(folder / k, [f"-fsanitize={flag}"], folder / "broken.cpp") for k, flag in SANITIZERS.items()}
