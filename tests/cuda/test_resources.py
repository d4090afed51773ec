"""The CUDA kernels compile, spill nothing, and take of a GPU what csrc/cuda/resources.txt says."""

import pytest

from tests.cuda import resources

pytestmark = pytest.mark.skipif(resources.nvcc_release() is None, reason="cuda-check needs nvcc")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return resources.measure(tmp_path_factory.mktemp("cuda"))


def test_as_recorded(found):
    assert resources.complaints(resources.nvcc_release(), found) == []
    release, recorded = resources.read_table()
    if release != resources.nvcc_release():
        pytest.skip(f"nothing spills; the table of registers is that of nvcc {release}")
    assert len(recorded) == len(found) > 0


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
