"A folder of videos to pairs: what is used and why not, splits by video, interrupted imports, odd folders."
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from avdd_nb.core import UserError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'avdd_nb[video]'")

from avdd_nb.data import videos  # noqa: E402
from avdd_nb.data.audio import log_mel  # noqa: E402
from avdd_nb.data.catalog import recordings  # noqa: E402
from avdd_nb.data.media import write_video  # noqa: E402
from avdd_nb.store import read_json, write_json  # noqa: E402
from avdd_nb.views.sound import spec_of  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AVDD_CACHE", str(tmp_path/"cache"))


def film(path, grey=90, hz=440., seconds=2., sr=16000, loud=.5):
    "A grey film with a tone; `hz` None: no audio stream."
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(int(seconds*sr))/sr
    frames = np.full((int(25*seconds), 32, 32, 3), grey, np.uint8)
    return write_video(path, frames, 25, None if hz is None else loud*np.sin(2*np.pi*hz*t), sr)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    "Two classes of six films each, told apart by grey level and tone; made once, copied by the tests that change it."
    folder = tmp_path_factory.mktemp("shelf")
    for c, label in enumerate("ab"):
        for k in range(6): film(folder/label/f"{k}.{['mp4', 'mkv'][k % 2]}", 40 + 100*c + 10*k, 400 + 800*c + 50*k)
    return folder


@pytest.fixture
def folder(shelf, tmp_path):
    shutil.copytree(shelf, tmp_path/"films")
    return tmp_path/"films"


def load(folder, **options): return videos.load(folder=folder, progress=False, workers=2, image_size=32, **options)


def names(data): return {i.rsplit("@", 1)[0] for i in data.ids}


def decoded(monkeypatch):
    "The list of files that are handed to the decoder from now on."
    seen, real = [], videos.decode_videos

    def noted(paths, *rest):
        seen.extend(os.path.relpath(p, Path(p).parents[1]) for p in paths)
        return real(paths, *rest)
    monkeypatch.setattr(videos, "decode_videos", noted)
    return seen


def test_pairs_hold_what_the_films_show(folder):
    data = load(folder, windows="all")
    for part in (data.train, data.test):
        for i, name in enumerate(part.ids):
            label, k = name[0], int(name[2])
            assert part.labels[i] == "ab".index(label)
            assert abs(part.tensors["image"][i].float().mean() - (40 + 100*"ab".index(label) + 10*k)) < 4
            mel = part.tensors["audio"][i, 0].float()
            assert mel.shape == (64, 32) and mel.dtype == torch.float32
            wanted = 400 + 800*"ab".index(label) + 50*k
            centres = 700*(10**(np.linspace(0, 2595*np.log10(1 + 4000/700), 66)[1:-1]/2595) - 1)
            assert abs(centres[mel[:, 5:-5].mean(1).argmax()] - wanted) < 45
    assert data.train.tensors["image"].dtype == torch.uint8 and data.train.tensors["audio"].dtype == torch.float16
    assert data.train.modalities == data.test.modalities
    batch = data.train.batch()
    for x in batch.values(): assert abs(x.mean()) < .01 and abs(x.std() - 1) < .05


def test_the_recorded_sounds_are_those_behind_the_spectrograms(folder):
    data = load(folder, windows="all").train
    spec = spec_of(data.modalities["audio"])
    waves = recordings("videos", data.ids, spec, folder=str(folder), windows="all", workers=2, image_size=32)
    assert (log_mel(waves, spec).half() == data.tensors["audio"]).all()
    with pytest.raises(UserError, match="no longer"): recordings("videos", ["a/none.mp4@0s"], spec, folder=str(folder))


def test_split_is_by_video_stratified_and_by_seed(folder):
    data = load(folder, windows="all")
    assert len(data.train) + len(data.test) == 24 and not names(data.train) & names(data.test)
    assert data.test.labels.bincount().tolist() == [4, 4]   # round(6/4) = 2 films of 2 windows
    assert load(folder, windows="all").train.hash == data.train.hash
    others = [names(load(folder, seed=s).test) for s in range(1, 5)]
    assert any(o != names(data.test) for o in others)
    assert len(names(load(folder, test_fraction=.5).test)) == 6
    assert len(names(load(folder, test_fraction=.9).train)) == 2
    assert load(folder, windows="all").test.ids == data.test.ids


def test_another_file_moves_at_most_one_other(folder):
    before = names(load(folder, seed=5).test)
    film(folder/"a"/"new.mp4", 77, 333.)
    assert len(before - names(load(folder, seed=5).test)) <= 1


def test_presets_and_window_lengths(folder):
    data = load(folder, mel="avdd", seconds=2., windows=0)
    assert data.train.tensors["audio"].shape[1:] == (1, 128, 111)
    assert data.train.modalities["audio"].meta["length"] == 22000


def test_report_tells_every_reason(folder):
    film(folder/"a"/"mute.mp4", hz=None)
    film(folder/"a"/"digital silence.mp4", loud=0)
    film(folder/"a"/"blink.mp4", seconds=.4)
    (folder/"b"/"empty.mp4").write_bytes(b"")
    (folder/"b"/"letter.avi").write_text("dear decoder")
    shutil.copy(folder/"b"/"1.mkv", folder/"b"/"copy of 1.mkv")
    (folder/"b"/"notes.txt").write_text("no video")
    (folder/"b"/".hidden.mp4").write_bytes(b"x")
    data = load(folder)
    counts = data.info["report"]["counts"]
    assert counts == {"found": 18, "used": 12, "no audio": 1, "silent": 1, "too short": 1, "broken": 2, "duplicate": 1,
                      "outside": 0, "windows": 12}
    rows = {r["name"]: r for r in data.info["report"]["files"]}
    assert rows["a/mute.mp4"]["status"] == "no audio" and rows["b/copy of 1.mkv"]["reason"].endswith("b/1.mkv")
    assert "0 bytes" in rows["b/empty.mp4"]["reason"] and "not a video" in rows["b/letter.avi"]["reason"]
    assert "0.4" in rows["a/blink.mp4"]["reason"]
    text = str(videos.report(folder, progress=False, image_size=32))
    assert all(r["name"] in text for r in rows.values() if r["status"] != "used")
    write_json(folder/"info.json", data.info)   # JSON can write all of it
    assert read_json(folder/"info.json")["report"]["counts"] == counts
    with_silent = load(folder, silent=True)
    assert with_silent.info["report"]["counts"]["used"] == 14
    kept = [(p, i) for p in (with_silent.train, with_silent.test)
            for i, n in enumerate(p.ids) if "mute" in n or "silence" in n]
    assert len(kept) == 2 and all((p.tensors["audio"][i] == -100).all() for p, i in kept)


def test_silent_windows_of_a_film_are_left_out_one_by_one(folder):
    t = np.arange(3*16000)/16000
    write_video(folder/"a"/"half.mkv", np.full((75, 32, 32, 3), 9, np.uint8), 25, np.sin(3000*t)*(t < .9), 16000)
    row = next(r for r in load(folder, windows="all").info["report"]["files"] if r["name"] == "a/half.mkv")
    assert row["windows"] == 1 and "2 silent windows" in row["reason"]


def test_second_import_decodes_only_what_changed(folder, monkeypatch):
    (folder/"a"/"bad.mp4").write_bytes(b"bad")
    load(folder)
    seen = decoded(monkeypatch)
    load(folder, seed=3, test_fraction=.4)
    assert seen == ["a/bad.mp4"]   # asked for, and answered by the quarantine list
    film(folder/"a"/"0.mp4", 200, 1000.)
    new = load(folder)
    assert seen[1:] == ["a/0.mp4", "a/bad.mp4"]
    i = (new.train.ids + new.test.ids).index("a/0.mp4@0.5s")
    assert abs(torch.cat([new.train.tensors["image"], new.test.tensors["image"]])[i].float().mean() - 200) < 4
    load(folder, windows="all")
    assert len(seen) == 3 + 13


def test_damaged_cache_files_are_made_anew(folder, tmp_path, monkeypatch):
    before, kept = load(folder), sorted((tmp_path/"cache"/"videos").glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    kept[1].write_bytes(b"")
    seen = decoded(monkeypatch)
    assert load(folder).train.hash == before.train.hash and len(seen) == 2


def test_retry_tries_the_broken_ones_again(folder, tmp_path):
    (folder/"a"/"bad.mp4").write_bytes(b"bad")
    load(folder)
    listed = tmp_path/"cache"/"videos"/"quarantine.jsonl"
    listed.write_text(listed.read_text().replace("not a video", "an old verdict"))

    def verdict(**options):
        return next(r["reason"] for r in load(folder, **options).info["report"]["files"] if r["name"] == "a/bad.mp4")
    assert "an old verdict" in verdict() and "not a video" in verdict(retry=True) and "not a video" in verdict()


SLOWED = """
import sys, time
from avdd_nb.data import videos
keep = videos._keep
def slow(path, outcome, o):
    keep(path, outcome, o); print(path, flush=True); time.sleep(.15)
videos._keep = slow
videos.load(folder=sys.argv[1], progress=False, workers=2, image_size=32)
print('done', flush=True)
"""


@pytest.mark.parametrize("how,after", [(signal.SIGKILL, 1), (signal.SIGKILL, 5), (signal.SIGINT, 3)])
def test_killed_import_goes_on_where_it_stopped(folder, monkeypatch, how, after):
    env = dict(os.environ, PYTHONPATH=str(Path(videos.__file__).parents[2]))
    process = subprocess.Popen([sys.executable, "-c", SLOWED, str(folder)], text=True, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    done = [os.path.relpath(process.stdout.readline().strip(), folder) for _ in range(after)]
    process.send_signal(how)
    rest, _ = process.communicate()
    assert "done" not in rest and process.returncode != 0
    seen = decoded(monkeypatch)
    resumed = load(folder)
    assert not set(done) & set(seen) and 0 < len(seen) <= 12 - after
    monkeypatch.setenv("AVDD_CACHE", str(folder.parent/"another"))
    whole = load(folder)
    assert resumed.train.hash == whole.train.hash and resumed.test.hash == whole.test.hash


def test_links(folder, tmp_path):
    outside = film(tmp_path/"elsewhere"/"o.mp4", 10, 600.)
    film(tmp_path/"elsewhere"/"p.mp4", 20, 700.)
    (folder/"a"/"link.mp4").symlink_to(outside)
    (folder/"c").symlink_to(tmp_path/"elsewhere")
    (folder/"b"/"inside.mkv").symlink_to(folder/"b"/"1.mkv")
    (folder/"b"/"nowhere.mp4").symlink_to(folder/"b"/"gone.mp4")
    (folder/"b"/"loop.mp4").symlink_to(folder/"b"/"loop.mp4")
    data = load(folder)
    counts = data.info["report"]["counts"]
    assert data.train.classes == ["a", "b"]
    assert (counts["outside"], counts["duplicate"], counts["broken"]) == (2, 1, 2)
    (folder/"a"/"link.mp4").unlink()
    assert load(folder, links=True).train.classes == ["a", "b", "c"]


def test_pipes_and_folders_that_look_like_videos(folder):
    os.mkfifo(folder/"a"/"pipe.mp4")
    (folder/"a"/"folder.mp4").mkdir()
    counts = load(folder).info["report"]["counts"]
    assert counts["found"] == 13 and counts["broken"] == 1


@pytest.mark.parametrize("label", ["ü 日本", "<b>bold", "-rf *", "b\udcff", "two\nlines"])
def test_odd_names(folder, label):
    try: (folder/"b").rename(folder/label)
    except OSError: pytest.skip("this file system does not allow the name")
    (folder/label/"0.mp4").rename(folder/label/f"{label}.MP4")
    (folder/label/"<script>.avi").write_bytes(b"x")
    data = load(folder)
    assert len(data.train) + len(data.test) == 12
    shown = videos.report(folder, progress=False, image_size=32)
    str(shown).encode(), shown._repr_html_().encode(), str(data.info).encode()
    assert "<script>" not in shown._repr_html_() and "\n".join(data.train.classes).isprintable() == ("\n" in "ab")
    write_json(folder/"info.json", data.info)


def fails(folder, match, **options):
    with pytest.raises(UserError, match=match) as e: load(folder, **options)
    assert "\n" not in str(e.value)


def test_odd_folders_are_one_clear_sentence(folder, tmp_path):
    fails(tmp_path/"nowhere", "There is no folder")
    fails(folder/"a"/"0.mp4", "is a file")
    fails(folder/"a", "6 videos, but no sub-folders")
    (tmp_path/"empty").mkdir()
    fails(tmp_path/"empty", "no sub-folders")
    (tmp_path/"empty"/"c").mkdir()
    fails(tmp_path/"empty", "hold no videos")
    shutil.copytree(folder/"a", tmp_path/"one"/"a")
    fails(tmp_path/"one", "1 usable class")
    film(folder/"c"/"only.mp4")
    fails(folder, "'c' has 1 usable videos")
    film(folder/"c"/"mute.mp4", hz=None)
    fails(folder, r"'c' has 1 usable videos \(1 no audio\)")


@pytest.mark.parametrize("options,match", [
    (dict(windows="middle"), "'centre', 'all'"), (dict(windows=""), "'centre', 'all'"), (dict(seconds=0), "range"),
    (dict(mel="smal"), "small"), (dict(image_size="big"), "type int"), (dict(test_fraction=1.5), "range"),
    (dict(limit_s=-1), "range"), (dict(silent="perhaps"), "type bool")])
def test_bad_options_stop_before_any_work(folder, options, match, monkeypatch):
    seen = decoded(monkeypatch)
    with pytest.raises(UserError, match=match): videos.load(folder=folder, progress=False, **options)
    assert seen == []


def test_options_may_come_as_text(folder):
    a = load(folder, seconds="1.0", windows="0,1", test_fraction="0.25", silent="false")
    assert a.train.hash == load(folder, windows=[1, 0]).train.hash


def test_the_data_roots_folder_is_the_default(folder, monkeypatch):
    assert not videos.check(folder.parent)[0]
    folder.rename(folder.parent/"videos")
    assert videos.check(folder.parent) == (True, f"12 video files in {folder.parent/'videos'}")
    assert len(videos.load(root=folder.parent, progress=False, image_size=32).train) == 8


@pytest.mark.slow
def test_real_recordings_in_many_codecs(real_data, repo, tmp_path):
    script = repo/"benchmarks"/"make_videos.py"
    run = subprocess.run([sys.executable, str(script), str(tmp_path/"mine"), "--data-root", str(real_data),
                          "--per-class", "3", "--digits", "1", "4"],
                         capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(repo)))
    assert run.returncode == 0, run.stderr
    data = videos.load(folder=tmp_path/"mine", progress=False)
    counts = data.info["report"]["counts"]
    assert [counts[k] for k in ("found", "used", "silent", "no audio", "broken")] == [9, 6, 1, 1, 1]
    assert data.train.classes == ["four", "one"]
    loudest = data.train.tensors["audio"].float().amax((1, 2))   # (N, T): the word is in the middle of its second
    assert (loudest[:, 10:22].amax(1) > loudest[:, :3].amax(1) + 10).all()


def test_progress_is_shown(folder, capfd):
    videos.load(folder=folder, image_size=32)
    assert "12/12" in capfd.readouterr().err


