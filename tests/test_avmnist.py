"""AV-MNIST from files in the official layout: what is drawn, what is refused, what is kept in the cache."""
import gzip
import math
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError, rng
from avdd_nb.data import avmnist
from avdd_nb.data.audio import PRESETS, MelSpec, log_mel, pink_noise, to_wave, wav_bytes

SMALL = dict(n_train=200, n_test=50, official=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return avmnist.write_miniature(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def root(original, tmp_path, monkeypatch):
    "A copy of the miniature that a test may damage, with a cache of its own and no way out to the network."
    monkeypatch.setenv("AVDD_CACHE", str(tmp_path/"cache"))
    pooch = pytest.importorskip("pooch")
    def offline(*a, **k): raise ConnectionError("no network in tests")
    monkeypatch.setattr(pooch, "retrieve", offline)
    return shutil.copytree(original, tmp_path/"data")


def gz(root, name): return root/"MNIST"/"raw"/f"{name}.gz"


def rewrite(path, change):
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


# --- what comes out ---

def test_shapes_classes_and_balance(root):
    s = avmnist.load(root, **SMALL)
    assert (len(s.train), len(s.test), s.train.classes) == (200, 50, list("0123456789"))
    assert s.train.tensors["audio"].shape == (200, 1, 32, 32) and s.train.tensors["audio"].dtype == torch.float16
    assert s.train.tensors["image"].shape == (200, 1, 32, 32) and s.train.tensors["image"].dtype == torch.uint8
    assert s.train.labels.bincount().tolist() == [20]*10 and s.test.labels.bincount().tolist() == [5]*10
    for x in s.train.batch().values():
        assert x.dtype == torch.float32 and abs(x.mean()) < 1e-2 and abs(x.std() - 1) < 1e-2
    assert s.train.modalities == s.test.modalities and MelSpec(**s.train.modalities["audio"].meta) == PRESETS["avmnist"]


def test_pairs_have_one_digit_and_sides_share_no_recording(root):
    s = avmnist.load(root, **SMALL)
    labels = {part: avmnist.read_mnist(avmnist.find(root)[0], official=False)[part][1] for part in ("train", "test")}
    heard = {}
    for part, data in (("train", s.train), ("test", s.test)):
        images, heard[part] = zip(*(i.removeprefix("mnist-").split("+") for i in data.ids))
        source = [labels[part][int(i.split("-")[1])].item() for i in images]
        assert all(i.startswith(part) for i in images) and len(set(images)) == len(images)
        assert source == data.labels.tolist() == [int(r[0]) for r in heard[part]]
    takes = {part: {int(r.split("_")[2]) for r in heard[part]} for part in heard}
    assert takes["test"] <= set(range(5)) and min(takes["train"]) >= 5
    assert not set(heard["train"]) & set(heard["test"])


def test_recordings_are_dealt_evenly():
    labels, digits = torch.arange(10).repeat(30), torch.arange(10).repeat(7)
    i, r = avmnist.draw_pairs(labels, digits, 24, rng("deal"))
    assert len(i.unique()) == 240 and set(r.bincount().tolist()) == {3, 4}
    assert torch.equal(labels[i], digits[r])
    with pytest.raises(UserError, match="30 images, 31 pairs"): avmnist.draw_pairs(labels, digits, 31, rng("deal"))
    with pytest.raises(UserError, match="digit 0 has no recording"):
        avmnist.draw_pairs(labels, torch.full((5,), 3), 2, rng("deal"))


def test_deterministic_by_seed_with_and_without_cache(root, tmp_path, monkeypatch):
    first = avmnist.load(root, seed=3, **SMALL)
    assert avmnist.load(root, seed=3, **SMALL).train.hash == first.train.hash
    monkeypatch.setenv("AVDD_CACHE", str(tmp_path/"other"))
    fresh = avmnist.load(root, seed=3, **SMALL)
    assert (fresh.train.hash, fresh.test.hash) == (first.train.hash, first.test.hash)
    assert fresh.train.ids == first.train.ids
    assert avmnist.load(root, seed=4, **SMALL).train.hash != first.train.hash


def test_second_load_reads_the_cache_and_changed_files_do_not(root, monkeypatch):
    first = avmnist.load(root, **SMALL)
    def forbidden(*a): raise AssertionError("made again")
    monkeypatch.setattr(avmnist, "_make", forbidden)
    assert avmnist.load(root, **SMALL).train.hash == first.train.hash
    (root/"fsdd/recordings/3_ada_7.wav").write_bytes(wav_bytes(torch.ones(500), 8000))
    with pytest.raises(AssertionError, match="made again"): avmnist.load(root, **SMALL)


def test_damaged_cache_is_made_again(root, tmp_path):
    first = avmnist.load(root, **SMALL)
    kept, = (tmp_path/"cache"/"avmnist").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-100])
    assert avmnist.load(root, **SMALL).train.hash == first.train.hash


def test_nothing_is_written_into_the_root(root):
    before = sorted(p for p in root.rglob("*"))
    avmnist.load(root, **SMALL)
    assert sorted(p for p in root.rglob("*")) == before


def test_unzipped_files_and_the_repository_folder_name_are_read_alike(root):
    first = avmnist.load(root, **SMALL)
    for name in avmnist.MNIST_FILES:
        gz(root, name).with_suffix("").write_bytes(gzip.decompress(gz(root, name).read_bytes()))
        gz(root, name).unlink()
    (root/"fsdd").rename(root/"free-spoken-digit-dataset")
    assert avmnist.load(root, **SMALL).train.hash == first.train.hash


# --- the options ---

@pytest.mark.parametrize("size", [28, 30, 32, 48])
def test_image_sizes(root, size):
    x = avmnist.load(root, size=size, clean=True, **SMALL).train.tensors["image"]
    assert x.shape == (200, 1, size, size) and x.max() > 100


def test_clean_is_the_files_themselves(root):
    s = avmnist.load(root, clean=True, **SMALL)
    images = avmnist.read_mnist(avmnist.find(root)[0], official=False)["train"][0]
    index = [int(i.split("+")[0].split("-")[2]) for i in s.train.ids]
    assert torch.equal(s.train.tensors["image"][:, 0, 2:-2, 2:-2], images[index])
    assert s.train.tensors["audio"].float().min() < -90       # digital silence around the word


def test_mel_setting_raw_and_playable(root):
    s = avmnist.load(root, mel="avdd", raw=True, **SMALL)
    m = s.train.modalities["audio"]
    assert m.shape == (1, 128, 56) and (m.mean, m.std) == ((0.,), (1.,))
    assert to_wave(s.train.tensors["audio"][0].float(), MelSpec(**m.meta)).shape == (11000,)
    same = avmnist.load(root, mel=dict(PRESETS["avdd"].__dict__), raw=True, **SMALL)
    assert same.train.hash == s.train.hash


def test_half_precision_costs_little(root):
    rows = avmnist.recording_names(avmnist.find(root)[1], official=False)[:20]
    waves = avmnist._read_recordings(rows, 8000)
    picks = torch.arange(20)
    exact = log_mel(avmnist._place(waves, picks, 8000, rng("avmnist", 1, "place", 0)), PRESETS["avmnist"])
    assert (avmnist.spoken(waves, picks, PRESETS["avmnist"], None, 1).float() - exact).abs().max() <= 1/32 + 1e-6


@pytest.mark.parametrize("snr_db", [-5., 0., 10.])
def test_noise_is_fresh_and_as_loud_as_asked(snr_db):
    t = torch.arange(8000)/8000
    tone = torch.sin(2*math.pi*500*t)
    mel = avmnist.spoken([tone], torch.zeros(200, dtype=torch.long), PRESETS["avmnist"], snr_db, "noise").float()
    assert (mel[0] - mel[1]).abs().max() > 1
    alone = log_mel(pink_noise(200, 8000, rng("other"))*(0.5*10**(-snr_db/10))**0.5, PRESETS["avmnist"])
    far = slice(20, 32)                                         # bands the tone does not reach
    gap = 10*((10**(mel[:, :, far]/10)).mean()/(10**(alone[:, :, far]/10)).mean()).log10()
    assert abs(gap) < 0.3


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9])
def test_energy_equals_scikit_learn(energy):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = (torch.rand(60, 6, 6, generator=rng("pca")).cumsum(2)*40).to(torch.uint8)
    others = (torch.rand(9, 6, 6, generator=rng("pca", 2)).cumsum(2)*40).to(torch.uint8)
    (a, b), k = avmnist.keep_energy(x, [others], energy)
    pca = decomposition.PCA(n_components=energy, svd_solver="full").fit(x.flatten(1).double().numpy())
    assert k == pca.n_components_
    for ours, source in ((a, x), (b, others)):
        theirs = pca.inverse_transform(pca.transform(source.flatten(1).double().numpy())).clip(0, 255)
        assert np.abs(ours.flatten(1).numpy() - theirs).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("wrong, message", [
    (dict(n_train=15), "n_train=15"), (dict(n_test=0), "n_test=0"), (dict(energy=0.), "energy=0"),
    (dict(energy=1.5), "energy=1.5"), (dict(snr_db=math.nan), "snr_db=nan"), (dict(size=20), "size=20"),
    (dict(mel="avdt"), "did you mean 'avdd'"), (dict(n_train=1000), "40 images, 100 pairs")])
def test_wrong_options_say_so(root, wrong, message):
    with pytest.raises(UserError, match=message): avmnist.load(root, **SMALL | wrong)


# --- broken files ---

def test_other_files_than_the_official_ones_only_on_demand(root):
    with pytest.raises(UserError, match="FSDD has 3000"): avmnist.load(root, n_train=200, n_test=50)
    with pytest.raises(UserError, match="not the official MNIST file .* official=False"):
        avmnist.read_mnist(avmnist.find(root)[0])


@pytest.mark.parametrize("name", avmnist.MNIST_FILES)
@pytest.mark.parametrize("damage", ["cut zip", "cut content", "more", "noise", "empty", "kind", "wild header"])
def test_broken_mnist_file_is_named(root, name, damage):
    path = gz(root, name)
    if damage == "cut zip": path.write_bytes(path.read_bytes()[:-20])
    if damage == "cut content": rewrite(path, lambda b: b[:-7])
    if damage == "more": rewrite(path, lambda b: b + b"x")
    if damage == "noise": path.write_bytes(b"<html>404</html>")
    if damage == "empty": path.write_bytes(b"")
    if damage == "kind": rewrite(path, lambda b: b"\0\0\x0d" + b[3:])
    if damage == "wild header": rewrite(path, lambda b: b"\0\0\x08\xff" + b[4:])
    with pytest.raises(UserError, match=name): avmnist.load(root, **SMALL)


@given(data=st.binary(max_size=40), zipped=st.booleans(), header=st.booleans())
def test_no_bytes_lead_to_anything_but_one_sentence(tmp_path_factory, data, zipped, header):
    data = b"\0\0\x08"*header + data
    path = tmp_path_factory.mktemp("fuzz")/("odd.gz" if zipped else "odd")
    path.write_bytes(gzip.compress(data) if zipped else data)
    try: avmnist.read_idx(path)
    except UserError as e: assert "odd" in str(e)


def test_mnist_that_does_not_fit_together(root):
    labels = gz(root, "train-labels-idx1-ubyte")
    rewrite(labels, lambda b: struct.pack(">HBBI", 0, 8, 1, 399) + b[8:-1])
    with pytest.raises(UserError, match="400 images, but there are 399 labels"): avmnist.load(root, **SMALL)
    rewrite(labels, lambda b: struct.pack(">HBBI", 0, 8, 1, 400) + b"\x0b" + b[8:])
    with pytest.raises(UserError, match="go up to 11"): avmnist.load(root, **SMALL)


@pytest.mark.parametrize("content", [b"", b"RIFF", wav_bytes(torch.ones(500), 8000)[:600],
                                     wav_bytes(torch.zeros(0), 8000)])
def test_broken_recordings_are_named_in_one_sentence(root, content):
    for take in (0, 6): (root/f"fsdd/recordings/4_bob_{take}.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"4_bob_0.wav.*1 more.*4_bob_6.wav"): avmnist.load(root, **SMALL)


def test_strange_names_and_missing_recordings(root):
    (root/"fsdd/recordings/hello.wav").write_bytes(b"")
    with pytest.raises(UserError, match="hello.wav is not named digit_speaker_take.wav"): avmnist.load(root, **SMALL)
    (root/"fsdd/recordings/hello.wav").unlink()
    for p in (root/"fsdd/recordings").glob("5_*_[0-4].wav"): p.unlink()
    with pytest.raises(UserError, match="digit 5 has no recording"): avmnist.load(root, **SMALL)


def test_a_hole_in_the_official_recordings_is_named(tmp_path):
    for d in range(10):
        for s in "abcdef":
            for t in range(50): (tmp_path/f"{d}_{s}_{t}.wav").touch()
    assert len(avmnist.recording_names(tmp_path)) == 3000
    (tmp_path/"7_c_31.wav").unlink()
    with pytest.raises(UserError, match=r"2999 recordings.*missing: 7_c_31.wav\)"): avmnist.recording_names(tmp_path)


# --- absent files ---

def test_absent_data_explains_how_to_get_it(root, tmp_path):
    ready, message = avmnist.check(tmp_path/"nothing")
    assert not ready and "MNIST (0 of 4 files)" in message and "FSDD" in message
    with pytest.raises(UserError, match="could not be downloaded .*MNIST/raw.*fsdd/recordings.*AVDD_DATA"):
        avmnist.load(tmp_path/"nothing")
    gz(root, "train-labels-idx1-ubyte").unlink()
    assert "3 of 4" in avmnist.check(root)[1]


def test_download_fetches_checks_and_is_found(root, original, tmp_path, monkeypatch):
    "pooch is replaced by a copy from the miniature; everything around it is real."
    pooch, asked = pytest.importorskip("pooch"), []
    archive = shutil.make_archive(str(tmp_path/"fsdd-master"), "zip", original/"fsdd", "recordings")
    def retrieve(url, known_hash, fname, path, **k):
        asked.append((url, known_hash))
        path.mkdir(parents=True, exist_ok=True)
        return shutil.copy(archive if url.endswith(".zip") else gz(original, fname[:-3]), path/fname)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(UserError, match="not the 3,000 of FSDD"): avmnist.download(tmp_path/"nothing")
    monkeypatch.setattr(avmnist, "FSDD_SHA256", avmnist.digest((original/"fsdd/recordings").glob("*.wav")))
    s = avmnist.load(tmp_path/"nothing", **SMALL)
    assert s.train.hash == avmnist.load(root, **SMALL).train.hash
    assert {h for u, h in asked if "mnist" in u} == {f"md5:{m}" for m in avmnist.MNIST_GZ_MD5.values()}
    assert avmnist.check(tmp_path/"nothing")[0] and not (tmp_path/"nothing").exists()


# --- the real thing ---

@pytest.fixture(scope="module")
def half(real_data):
    return avmnist.load(real_data)


def test_real_data_are_the_published_setting(half):
    assert (len(half.train), len(half.test)) == (10_000, 2_000) and half.info["files"] == "official"
    assert half.train.labels.bincount().tolist() == [1000]*10 and half.test.labels.bincount().tolist() == [200]*10
    assert half.info["note"].startswith("image: 11 principal components")
    used = torch.unique(torch.tensor([hash(i.split("+")[1]) for i in half.train.ids]), return_counts=True)[1]
    assert len(used) == 2700 and set(used.tolist()) == {3, 4}
    assert len({i.split("+")[1] for i in half.test.ids}) == 300


def test_real_images_keep_half_of_the_energy(half, real_data):
    images = avmnist.read_mnist(avmnist.find(real_data)[0])["train"][0]
    x = images[[int(i.split("+")[0].split("-")[2]) for i in half.train.ids]].flatten(1).double()
    y = half.train.tensors["image"][:, 0, 2:-2, 2:-2].flatten(1).double()
    kept = 1 - (x - y).square().sum()/(x - x.mean(0)).square().sum()
    assert 0.48 < kept < 0.60                                   # clipping to 0…255 brings a little back


def test_real_sound_has_the_asked_noise(real_data):
    rows = avmnist.recording_names(avmnist.find(real_data)[1])[::50]
    waves, picks, spec = avmnist._read_recordings(rows, 8000), torch.arange(60), PRESETS["avmnist"]
    clean, noisy = (avmnist.spoken(waves, picks, spec, snr, "real").float() for snr in (None, 0.))
    power = lambda m: (10**(m.double()/10)).mean((1, 2, 3))
    ratio = (power(noisy)/power(clean)).log10()*10
    assert ratio.median() > 0.5                                 # something was added
    assert (noisy.median() - clean.median()) > 10               # and it fills the silence
