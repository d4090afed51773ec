import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """One cache folder for the whole run, apart from the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("MTML_FAST_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = os.environ.get("MTML_FAST_DATA")
    if not root or not (Path(root) / "omniglot").is_dir():
        pytest.skip("needs the real Omniglot: set MTML_FAST_DATA to the folder that holds omniglot/")
    return Path(root)


@pytest.fixture
def write_archive():
    return _write_archive


def _write_archive(path: Path, characters: int = 6, drawings: int = 4) -> Path:
    """A small archive in Omniglot's layout. Drawing d of character c has a bar of ink of width 8 + 8d in stripe c."""
    image_module = pytest.importorskip("PIL.Image")
    with zipfile.ZipFile(path, "w") as archive:
        for c in range(characters):
            for d in range(drawings):
                paper = np.ones((105, 105), bool)
                paper[15 * c + 1 : 15 * c + 14, : 8 + 8 * d] = False
                file = io.BytesIO()
                image_module.fromarray(paper).save(file, "PNG")
                name = f"{path.stem}/Alphabet_{c // 4}/character{c % 4 + 1:02d}/{c + 1:04d}_{d + 1:02d}.png"
                archive.writestr(name, file.getvalue())
    return path
