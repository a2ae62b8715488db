"""The developer's commands where they could do harm: notebooks are rewritten, and must survive it."""
import io
import json

import pytest
from PIL import Image

from avdd_nb import dev
from avdd_nb.core import UserError

DRAW = "import matplotlib.pyplot as plt; plt.imshow([[1, 2], [3, 4]]); plt.show()"


def cell(i, source, **more):
    "A code cell in nbformat's layout."
    return dict(cell_type="code", id=f"cell{i}", metadata={}, outputs=[], execution_count=None, source=source) | more


@pytest.fixture
def tree(tmp_path, repo, monkeypatch):
    "Makes a working tree with one notebook of the given cells; gives back its path."
    monkeypatch.chdir(repo)

    def make(*cells):
        (tmp_path / "settings.ini").write_text((repo / "settings.ini").read_text())
        path = tmp_path / "nbs" / "page.ipynb"
        path.parent.mkdir()
        path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
        return path
    return make


def test_pictures_are_stable_and_keep_tags(tree, tmp_path, monkeypatch):
    monkeypatch.delenv("SLOW", raising=False)
    path = tree(cell(0, "n = 3", metadata={"tags": ["parameters"]}), cell(1, DRAW), cell(2, "n * 2"),
                cell(3, "#| slow\n1 / 0"), cell(4, "print('progress' * 1000)"))
    dev.pictures([path], tmp_path)
    first = path.read_bytes()
    dev.pictures([path], tmp_path)
    assert path.read_bytes() == first
    cells = json.loads(first)["cells"]
    assert cells[0]["metadata"] == {"tags": ["parameters"]}
    kinds = [[list(o["data"]) for o in c["outputs"]] for c in cells]
    assert kinds == [[], [["image/png"]], [["text/plain"]], [], []]


def test_a_failing_notebook_is_left_as_it_was(tree, tmp_path):
    path = tree(cell(0, "1 + 1"), cell(1, "1 / 0"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="page.ipynb.*ZeroDivisionError|(?s:page.ipynb.*division by zero)"):
        dev.pictures([path], tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [(1, 1), (30, 20), (900, 700)])
def test_small_png_keeps_the_shape(size):
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).save(buffer, "PNG")
    small = Image.open(io.BytesIO(dev.small_png(buffer.getvalue(), limit=20_000)))
    assert abs(small.width / small.height - size[0] / size[1]) < .02
    assert len(buffer.getvalue()) > 20_000 or small.size == size


@pytest.mark.parametrize("source,expected", [
    ("from . import x\nfrom .y import z", []),
    ("import os.path, sys, avdd_nb.core", []),
    ("try:\n    import av\nexcept ImportError: av = None", [("av", 2, True)]),
    ("class A:\n    import torch", [("torch", 2, True)]),
    ("def f():\n    from PIL import Image", [("PIL", 2, False)]),
    ("async def f(): import ray", [("ray", 1, False)]),
    ("x = lambda: importlib.import_module('sklearn.manifold')", [("sklearn", 1, False)]),
    ("need('timm', 'encoders')", [("timm", 1, True)]),
])
def test_imports(source, expected):
    assert dev.imports(source) == expected
