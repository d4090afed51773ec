"""The rules of the house, held against the code. A rule that no machine checks dies."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

import mtml_fast
from mtml_fast.env import VARIABLES
from mtml_fast.ops import OPERATORS, _route

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mtml_fast"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# data flows down: a floor may use itself and the floors below it
FLOORS = ["ops", "nn", "inner", "algorithms", "multitask", "trainers", "cli"]
# beside the floors: what each may use
BESIDE = {
    "tasks": set(),
    "files": set(),
    "numpy": set(),
    "data": {"tasks", "files"},
    "env": {"ops"},
    "testing": {"ops"},
}
# what any floor may use besides
COMMON = {"tasks", "files"}
# who else may be used, and from where on
ALSO = {"trainers": {"data"}, "cli": {"data", "env"}}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """The floor, or the room beside the floors, of a source file."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path):
    """(module, whether at the top level) of every import."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body)) | {id(n) for n in ast.walk(tree) if isinstance(n, ast.If) for n in n.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


def rooms_used(path: Path) -> set[str]:
    rooms = {module.split(".")[1] for module, _ in imports(path) if module.startswith("mtml_fast.")}
    return {room for room in rooms if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_only_downward(path):
    room = room_of(path)
    if path.parent == PACKAGE and room in ("__init__", "__main__"):
        return
    if room in FLOORS:
        allowed = {*FLOORS[: FLOORS.index(room) + 1], *COMMON, *ALSO.get(room, ())}
    else:
        allowed = {room, *BESIDE[room]}
    assert rooms_used(path) <= allowed, f"{name_of(path)} reaches up to {rooms_used(path) - allowed}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_use_what_is_public(path):
    used = {module for module, _ in imports(path) if module.split(".")[0] == "mtml_fast"}
    assert used <= {"mtml_fast"}, f"{path.name} imports {used - {'mtml_fast'}}"
    assert not re.search(r"\bmf\.(\w+\.)*_", path.read_text()), f"{path.name} uses a private name"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_torch_and_numpy_at_import(path):
    """Everything else is imported where it is used, but for the command line, whose body is typer."""
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "mtml_fast"}
    if room_of(path) == "cli":
        allowed |= {"typer", "rich"}
    # itself imported at the first call on a device
    if path.name == "triton.py":
        allowed |= {"triton"}
    foreign = {module.split(".")[0] for module, top in imports(path) if top} - allowed
    assert not foreign, f"{name_of(path)} imports {foreign} at the top level"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_triton_stays_in_its_room(path):
    uses = any(module.split(".")[0] == "triton" for module, _ in imports(path))
    assert not uses or (path.name == "triton.py" and path.parent.parent == PACKAGE / "ops")
    kernels = [module for module, _ in imports(path) if re.match(r"mtml_fast\.ops\.\w+\.triton\b", module)]
    assert not kernels or path.name == "triton.py", f"{name_of(path)} imports {kernels}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("ops/*/reference.py")), ids=name_of)
def test_references_import_torch_alone(path):
    for module, _ in imports(path):
        other_reference = re.match(r"mtml_fast\.ops\.\w+\.reference\.", module)
        assert module.split(".")[0] in ("torch", "__future__") or other_reference, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("ops/*/*.py")), ids=name_of)
def test_operators_use_each_other_through_references_only(path):
    own = path.parent.name
    for module, _ in imports(path):
        match = re.match(r"mtml_fast\.ops\.([a-z]\w*)\.(\w+)", module)
        if match and match[1] != own:
            assert match[2] == "reference", f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_operator_has_all_its_rooms(name):
    """One stem everywhere: public function, reference, test, maths page; a native core comes with its skin."""
    assert (PACKAGE / "ops" / name / "__init__.py").is_file()
    assert (PACKAGE / "ops" / name / "reference.py").is_file()
    assert (ROOT / "tests/ops" / f"test_{name}.py").is_file()
    assert (ROOT / "docs/maths" / f"{name}.md").is_file()
    assert callable(getattr(mtml_fast.ops, name))
    assert (ROOT / "csrc/core" / f"{name}.h").is_file() == (ROOT / "csrc/cpu" / f"{name}.cpp").is_file()
    kernels = (ROOT / "csrc/cuda" / f"{name}.cu").is_file()
    assert (ROOT / "csrc/cuda" / f"{name}.cpp").is_file() == kernels
    assert (ROOT / "tests/native" / f"{name}_cuda.cpp").is_file() == kernels
    assert not re.search("fast|fused|cpu|cuda", name)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_of_torch_live_in_one_file(path):
    if name_of(path) == "ops/_route.py":
        return
    tree = ast.parse(path.read_text())
    for module, _ in imports(path):
        if module.startswith("torch"):
            assert not re.search(r"\._[a-z]", module), f"{name_of(path)} imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert not re.match(r"torch\.(\w+\.)*_[a-zA-Z]", text), f"{name_of(path)} uses {text}"


def test_private_names_of_torch_exist():
    """When torch drops one of them, this fails before anything is silently wrong."""
    for name in re.findall(r"torch(?:\.\w+)*\._\w+(?:\.\w+)*", (PACKAGE / "ops/_route.py").read_text()):
        value = torch
        for part in name.split(".")[1:]:
            value = getattr(value, part)
    assert isinstance(_route.forward_ad._current_level, int)
    assert not _route.in_transform()
    assert torch.func.vmap(lambda x: x * _route.in_transform())(torch.ones(2)).tolist() == [1, 1]
    assert not _route.has_hooks(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_devices_are_a_matter_of_the_dispatcher(path):
    """Who serves a device is the dispatcher's affair; whether values may be read is one file's."""
    if name_of(path) in ("ops/_check.py", "ops/_cuda.py", "ops/_define.py", "ops/_triton.py"):
        return
    found = re.findall(r"\.is_cuda|torch\.cuda\.|device\.type|device_count", path.read_text())
    # a checkpoint holds the device's random numbers too, and graphs are CUDA's
    if name_of(path) in ("trainers/checkpoint.py", "trainers/cuda_graph.py"):
        found = []
    assert not found, f"{name_of(path)}: {found}"


CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu"))
INCLUDES = {
    "core": r"<\w+>|\"core/",
    "isa": r"<\w+>|\"(core|isa)/",
    "cpu": r"<\w+>|\"(core|isa|\w*check|(mlp_adapt|heads|gradients)\.h|cpu/)|<torch/(csrc/stable|headeronly)/",
    "cuda": r"<\w+>|\"(core|cuda|cpu/\w+_call|\w*check)|<torch/(csrc/stable|headeronly)/|<cuda",
    "numpy": r"<\w+>|\"(core|isa|\w*check|(mlp_adapt|heads|gradients)\.h|build_info)|<pybind11/",
}


@pytest.mark.parametrize("path", CSRC, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_includes(path):
    text = path.read_text()
    room = path.relative_to(ROOT / "csrc").parts[0]
    for include in re.findall(r"#\s*include\s+([<\"].+[>\"])", text):
        assert not re.match(r"<(ATen|c10|torch/extension|torch/all)", include), f"{path.name} includes {include}"
        if room in INCLUDES:
            assert re.match(INCLUDES[room], include), f"{path.name} includes {include}"
    assert not re.search(r"\bmaml\b", text, re.IGNORECASE), f"{path.name}: C++ does not know what MAML is"
    if room != "numpy":
        assert "PyObject" not in text
        assert "pybind11" not in text


@pytest.mark.parametrize("path", [p for p in CSRC if p.parent.name == "cuda"], ids=lambda p: p.name)
def test_kernels_can_be_captured_and_run_in_the_shim(path):
    """No wait, copy or allocation, no launch but by launch.h, no atomics, no shared memory but block.h's, no torch."""
    text = re.sub(r"//.*", "", path.read_text())
    found = re.findall(r"Synchronize|cudaMemcpy|cudaMalloc|cudaFree|cudaMemset|<<<|\batomic\w+\(", text)
    if path.name != "launch.h":
        found += re.findall(r"cudaLaunch\w*", text)
    if path.name != "block.h":
        found += re.findall(r"__shared__", text)
    if path.suffix == ".cu":
        found += re.findall(r"<torch/.*|\"cpu/.*|\"cuda/tensors.h", text)
    assert not found, f"{path.name}: {found}"


@pytest.mark.parametrize("path", [*SOURCES, *CSRC, ROOT / "setup.py", ROOT / "Makefile"], ids=lambda p: p.name)
def test_forbidden_words(path):
    text = path.read_text()
    for word in ("once_differentiable", "march=native", "target_clones", "pickle.load", "torch.load("):
        assert word not in text, f"{path.name}: {word}"


def test_every_variable_is_listed():
    files = [*SOURCES, *CSRC, ROOT / "setup.py", *(ROOT / "tests").rglob("*.py")]
    used = {name for f in files for name in re.findall(r"MTML_FAST_[A-Z]+(?:_[A-Z]+)*", f.read_text())}
    assert used - {"MTML_FAST_VERSION"} == {name for name, _ in VARIABLES}


def test_one_version():
    """Written once, in mtml_fast/__init__.py."""
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *CSRC]
    assert not any(re.search(r"(?<![\d.])" + re.escape(mtml_fast.__version__), f.read_text()) for f in files)
    assert mtml_fast.__version__ in (ROOT / "CHANGELOG.md").read_text()
