"""The list of sources: what it says when data are there or absent, how names and options are read."""
import subprocess
import sys

import pytest

from avdd_nb.core import UserError
from avdd_nb.data import catalog
from avdd_nb.data.avmnist import write_miniature
from avdd_nb.data.catalog import SOURCES, Source, listing, load, read_options
from avdd_nb.data.paired import Splits


@pytest.fixture
def toy(monkeypatch):
    "A source that gives its options back."
    def loader(root=None, seed=0, *, n=5, share=0.5, mel="small", parts=("a", "b"), path=None, quick=False):
        return locals()
    source = Source("toy", loader, "for tests", check=lambda root: (False, f"not in {root}"))
    monkeypatch.setitem(SOURCES, "toy", source)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("AVDD_CACHE", str(tmp_path/"cache"))


def test_every_source_says_what_it_is_and_needs(tmp_path):
    rows = {r["name"]: r for r in listing(tmp_path)}
    assert {"soundshapes", "avmnist", "videos"} <= set(rows)
    assert all(r["about"] and r["state"] and r["needs"] and r["licence"] for r in rows.values())
    assert len({tuple(r) for r in rows.values()}) == 1
    assert {n for n, r in rows.items() if r["ready"] == "yes"} == {n for n in SOURCES if n.startswith("soundshapes")}


def test_listing_sees_what_appears(tmp_path):
    write_miniature(tmp_path, images=2, test_images=1, takes=1)
    assert {r["name"]: r["ready"] for r in listing(tmp_path)}["avmnist"] == "yes"


@pytest.mark.parametrize("name", list(SOURCES))
def test_loaders_keep_the_contract(name):
    "Every loader takes root and seed, and every option of it has a default."
    import inspect
    parameters = inspect.signature(catalog._resolve(SOURCES[name].load)).parameters
    assert list(parameters)[:2] == ["root", "seed"] and SOURCES[name].options["seed"] == 0
    assert all(p.default is not p.empty for p in parameters.values())


def test_load_gives_splits(tmp_path):
    write_miniature(tmp_path)
    s = load("avmnist", tmp_path, n_train="100", n_test=50, clean="true", official="false", energy="0.9", mel="small")
    assert isinstance(s, Splits) and len(s.train) == 100 and s.train.tensors["audio"].shape[1:] == (1, 64, 32)


def test_options_come_as_text_or_as_they_are(toy):
    assert load("toy", n="7", share="1", mel="avdd", parts="a, c", path="2024/x", quick="1") == dict(
        root=None, seed=0, n=7, share=1.0, mel="avdd", parts=("a", "c"), path="2024/x", quick=True)
    assert load("toy", "somewhere", seed=3, n=7, parts=["z"], path=None, mel=dict(sr=1)) == dict(
        root="somewhere", seed=3, n=7, share=0.5, mel=dict(sr=1), parts=["z"], path=None, quick=False)
    assert read_options("toy", dict(path="none")) == dict(path=None)
    assert read_options("toy", dict(path="0.25")) == dict(path=0.25)


@pytest.mark.parametrize("name, options, message", [
    ("avmnits", {}, "did you mean 'avmnist'"),
    ("toy", dict(shear=1), "option of toy called 'shear'; did you mean 'share'"),
    ("toy", dict(n="many"), "toy.n is 'many'"), ("toy", dict(n="2.5"), "toy.n is '2.5'"),
    ("toy", dict(quick="perhaps"), "toy.quick"), ("toy", dict(root="x"), "not an option")])
def test_wrong_names_and_values_stop(toy, name, options, message):
    with pytest.raises(UserError, match=message): read_options(name, options)


def test_asking_for_the_list_imports_no_source():
    lazy = {"avdd_nb.data.avmnist", "avdd_nb.data.videos", "avdd_nb.data.soundshapes", "av", "pandas", "pooch"}
    code = f"import sys, avdd_nb.data.catalog; print(sorted({lazy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
