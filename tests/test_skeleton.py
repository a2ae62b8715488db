"""The house as a whole: what it imports, that nothing drifted apart, and that importing it does no work."""
import subprocess
import sys

import pytest

from avdd_nb import dev

# The engine: it must import on a bare GPU machine that has torch, numpy and safetensors. Named one by one, so that a
# missing room is noticed; whatever else stands in the rooms of the engine is tested as well.
ENGINE = """
core store synset distill evaluate
data.paired data.audio data.media data.soundshapes data.avmnist data.videos data.catalog
nets.convnet nets.fusion
match.augment match.coreset match.losses match.pool
methods methods.base methods.dm methods.avdd
""".split()
ROOMS = ["data", "nets", "match", "methods"]

BLOCKED = """
plotly pandas matplotlib librosa umap IPython ipywidgets anywidget papermill nbformat typer torchvision torchaudio
sklearn scipy PIL av soundfile timm transformers ray pooch tqdm psutil fastcore nbdev
""".split()

# A finder in front of all others that refuses the packages a bare machine would lack.
BARE_MACHINE = """
import importlib, sys, traceback
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ModuleNotFoundError(f'blocked: {{name}}', name=name)
sys.meta_path.insert(0, Refuse())
failed = 0
for module in {modules!r}:
    try: importlib.import_module(module)
    except Exception: print(module, traceback.format_exc(limit=-2), file=sys.stderr); failed += 1
sys.exit(failed)
"""


def python(code, repo):
    "Runs code in a fresh interpreter at the root; gives back its exit code and what it wrote to stderr."
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_engine_needs_little(repo):
    lib = repo / "avdd_nb"
    files = [p.relative_to(lib) for room in ROOMS for p in sorted(lib.glob(f"{room}/*.py"))]
    found = [".".join(p.with_suffix("").parts) for p in files]
    names = ["avdd_nb", *(f"avdd_nb.{n.removesuffix('.__init__')}" for n in dict.fromkeys([*ENGINE, *found]))]
    code, errors = python(BARE_MACHINE.format(blocked=set(BLOCKED), modules=names), repo)
    assert code == 0, f"{code} modules do not import with torch, numpy and safetensors alone:\n{errors}"


def test_blocking_blocks(repo):
    code, errors = python(BARE_MACHINE.format(blocked=set(BLOCKED), modules=["pandas"]), repo)
    assert code == 1 and "blocked: pandas" in errors


def test_import_does_no_work(repo):
    heavy = ["torch", "numpy", "safetensors", *BLOCKED]
    code, errors = python(f"import avdd_nb, sys; bad = {set(heavy)} & set(sys.modules); assert not bad, bad", repo)
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


def test_doctor_survives_a_machine_without_anything(repo):
    blocked = {*BLOCKED, "torch", "numpy", "safetensors", "jupyter_client"}
    code = BARE_MACHINE.format(blocked=blocked, modules=["avdd_nb.doctor"]).rsplit("\n", 2)[0]
    done = subprocess.run([sys.executable, "-c", f"{code}\nsys.modules['avdd_nb.doctor'].doctor()"],
                          cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pip install torch" in done.stdout and "data root" in done.stdout
