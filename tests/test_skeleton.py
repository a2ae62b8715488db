"""The house as a whole: what it imports, that nothing drifted apart, and that importing it does no work."""
import subprocess
import sys

import pytest

from avdd_nb import dev

# The engine: it must import on a bare GPU machine that has torch, numpy and safetensors.
ENGINE = """
core store synset distill evaluate
data.paired data.soundshapes data.catalog
nets.convnet nets.fusion
match.augment match.coreset match.losses match.pool
methods methods.base methods.dm methods.avdd
""".split()

BLOCKED = """
plotly pandas matplotlib librosa umap IPython ipywidgets anywidget papermill nbformat typer torchvision torchaudio
sklearn scipy PIL av soundfile timm transformers ray pooch tqdm psutil fastcore nbdev
""".split()

# A finder in front of all others that refuses the packages a bare machine would lack.
BARE_MACHINE = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ModuleNotFoundError(f'blocked: {{name}}', name=name)
sys.meta_path.insert(0, Refuse())
importlib.import_module({module!r})
"""


def python(code, repo):
    "Runs code in a fresh interpreter at the root; gives back its exit code and what it wrote to stderr."
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["", *ENGINE])
def test_engine_needs_little(module, repo):
    name = f"avdd_nb.{module}".rstrip(".")
    code, errors = python(BARE_MACHINE.format(blocked=set(BLOCKED), module=name), repo)
    assert code == 0, f"{name} does not import with torch, numpy and safetensors alone:\n{errors[-1500:]}"


def test_blocking_blocks(repo):
    code, errors = python(BARE_MACHINE.format(blocked=set(BLOCKED), module="pandas"), repo)
    assert code != 0 and "blocked: pandas" in errors


def test_import_does_no_work(repo):
    heavy = ["torch", "numpy", "safetensors", *BLOCKED]
    code, errors = python(f"import avdd_nb, sys; found = set({heavy}) & set(sys.modules); assert not found, found", repo)
    assert code == 0, errors


def test_version_is_that_of_settings(repo):
    import avdd_nb
    assert avdd_nb.__version__ == dev.settings(repo)["version"]


@pytest.mark.parametrize("check", [dev.check_imports, dev.stale_modules, dev.long_cells, dev.undocumented,
                                   dev.stale_readme], ids=lambda f: f.__name__)
def test_in_order(check, repo):
    problems = check(repo)
    assert not problems, "\n".join(["", *problems])


def test_notebooks_are_clean_and_light(repo):
    heavy = {p.name: p.stat().st_size for p in dev.notebooks(repo) if p.stat().st_size > 1_500_000}
    assert not heavy, f"over 1.5 MB: {heavy}; run `make pictures`"


def test_constraints_cover_every_requirement(repo):
    lines = (repo / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    facts = dev.declared(repo)
    unpinned = {name for name, extra in facts.items() if extra != "ray"} - pinned
    assert not unpinned, f"constraints.txt lacks {sorted(unpinned)}: run `make constraints`"


def test_ignored_paths_stay_out_of_git(repo):
    if not (repo / ".git").exists(): pytest.skip("this is no git checkout")
    paths = [".venv/x", "data/MNIST/raw/a.gz", "runs/a/config.json", "avdd_nb/__pycache__/a.pyc", "_proc/a"]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=repo, capture_output=True, text=True)
    assert done.stdout.split() == paths
