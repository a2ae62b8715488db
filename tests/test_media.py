"Decoding files that may be broken: what is seen and heard at which moment, and that no file harms another."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'avdd_nb[video]'")

from avdd_nb.data import media  # noqa: E402
from avdd_nb.data.media import Child, Quarantine, Undecodable, decode_video, decode_videos, isolated  # noqa: E402

# ---- what children run in these tests ----

def hang(**kw):
    while True: pass


def wait_for_pipe(path):
    with open(path, "rb") as f: return dict(x=np.frombuffer(f.read(), np.uint8)), {}


def crash(code=6, **kw):
    if code: os.kill(os.getpid(), code)
    return dict(x=np.arange(3)), dict(pid=os.getpid())


def once(marker, **kw):
    "Crashes unless the process is fresh: stands for damage that an earlier file did."
    if hasattr(once, "used"): os.abort()
    once.used = True
    return {}, dict(marker=marker)


def greedy(n):
    return dict(x=np.ones(n*2**20, np.uint8)[:1]), {}


def chatty(n):
    print("noise on stdout" * n, flush=True)
    os.write(1, b"noise below python\n")
    return dict(x=np.full((2, n), n)), dict(text="ü\n\udcff")


def failing(text): raise ValueError(text)


HERE = __name__


@pytest.fixture(autouse=True, scope="module")
def importable():
    "Children import this file by name."
    sys.path.insert(0, str(Path(__file__).parent))
    yield
    sys.path.remove(str(Path(__file__).parent))


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z" if Path("/proc").exists() else True


def gone(pid, within=20):
    for _ in range(within*20):
        if not alive(pid): return True
        time.sleep(.05)
    return False


# ---- films that tell the time ----

SIDE = 64


def bars(i):
    "Frame number i as 8 black or white bars: survives any codec."
    bits = [(i >> b) & 1 for b in range(8)]
    return np.repeat(np.array(bits, np.uint8)*255, SIDE//8)[None, :, None].repeat(SIDE, 0).repeat(3, 2)


def read_bars(picture):
    "The number in a picture (3, H, W) made by `bars`."
    columns = picture.mean(0)[picture.shape[1]//4:-picture.shape[1]//4].mean(0)
    return sum(int(part.mean() > 127) << b for b, part in enumerate(np.array_split(columns, 8)))


def tones(seconds, sr, channels=1):
    "300 Hz in the first second, 400 in the second, …"
    t = np.arange(int(seconds*sr))/sr
    x = .5*np.sin(2*np.pi*(300 + 100*np.floor(t))*t)
    return x if channels == 1 else np.tile(x, (channels, 1))


def pitch(x, sr=11000):
    return np.abs(np.fft.rfft(x*np.hanning(len(x)))).argmax()*sr/len(x)


def film(path, seconds=4, fps=25, sr=44100, channels=1, **how):
    times = how.get("times")
    n = int(seconds*fps) if times is None else len(times)
    return media.write_video(path, [bars(i) for i in range(n)], fps, tones(seconds, sr, channels), sr, **how)


CASES = [("mp4", None), ("mkv", None), ("webm", None), ("mov", None), ("avi", ("mpeg4", "pcm_s16le")),
         ("avi", ("mjpeg", "pcm_s16le")), ("mkv", ("libvpx-vp9", "aac")), ("mp4", ("mpeg4", "libmp3lame"))]


@pytest.mark.parametrize("ending,codecs", CASES)
def test_frame_and_sound_are_those_of_the_window(tmp_path, ending, codecs):
    path = film(tmp_path/f"a.{ending}", codecs=codecs)
    arrays, info = decode_video(path, "all", size=SIDE)
    assert len(arrays["start"]) == 4 and not info["notes"]
    # the frame on show at k + 0.5 s at 25 fps is number 25k + 12
    assert [read_bars(p) for p in arrays["image"]] == [12, 37, 62, 87]
    assert [round(pitch(x)) for x in arrays["sound"]] == pytest.approx([300, 400, 500, 600], abs=2)
    assert arrays["sound"].shape == (4, 11000) and (arrays["covered"] > .95).all()
    middle, _ = decode_video(path, "centre", size=SIDE)
    assert middle["start"] == pytest.approx([1.5], abs=.03) and read_bars(middle["image"][0]) in (49, 50)


def test_an_onset_is_heard_when_it_happens(tmp_path):
    sr = 32000
    x = np.zeros(3*sr)
    x[int(1.25*sr):] = .5*np.sin(2*np.pi*500*np.arange(len(x) - int(1.25*sr))/sr)
    path = media.write_video(tmp_path/"a.mkv", [bars(i) for i in range(75)], 25, x, sr)
    sound = decode_video(path, "all")[0]["sound"]
    assert abs(np.argmax(abs(sound[1]) > .1) - .25*11000) < 30   # 3 ms
    assert abs(sound[0]).max() < 1e-3


def test_a_long_film_is_jumped_through_to_the_right_place(tmp_path):
    path = film(tmp_path/"long.mp4", seconds=50, fps=4, sr=16000)
    starts = [2., 30., 31., 45.]
    arrays, _ = decode_video(path, starts, size=SIDE)
    assert [read_bars(p) for p in arrays["image"]] == [int(4*(s + .5)) for s in starts]
    assert [round(pitch(x)) for x in arrays["sound"]] == pytest.approx([300 + 100*s for s in starts], abs=2)
    for s, picture, sound in zip(starts, arrays["image"], arrays["sound"]):   # the same as without the others
        alone, _ = decode_video(path, [s], size=SIDE)
        assert (alone["image"][0] == picture).all() and np.allclose(alone["sound"][0], sound, atol=2e-2)


def test_variable_frame_rate_shows_the_last_frame_that_began(tmp_path):
    times = [0, .1, .2, .9, 1.2, 1.3, 2.6, 2.9, 3.5, 3.96]
    arrays, _ = decode_video(film(tmp_path/"a.mkv", times=times, fps=25), "all", size=SIDE)
    assert [read_bars(p) for p in arrays["image"]] == [2, 5, 5, 8]


def portrait(data, matrix):
    "The mp4 bytes with another display matrix in every track header."
    out = bytearray(data)
    at = out.find(b"tkhd")
    while at >= 0:
        start = at + 4 + 40
        for k, v in enumerate(matrix): out[start + 4*k:start + 4*k + 4] = int(v).to_bytes(4, "big", signed=True)
        at = out.find(b"tkhd", at + 4)
    return bytes(out)


@pytest.mark.parametrize("turn,matrix", [(-1, [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30]),
                                         (2, [-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30]),
                                         (1, [0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30])])
def test_a_turned_phone_gives_an_upright_picture(tmp_path, turn, matrix):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[24:, :32], picture[:24, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = media.write_video(tmp_path/"a.mp4", [picture]*50, 25)
    path.write_bytes(portrait(path.read_bytes(), matrix))
    seen = decode_video(path, size=(40, 20))[0]["image"][0].transpose(1, 2, 0)
    wanted = np.rot90(picture, turn)
    for y in (.25, .75):
        for x in (.25, .75):
            a = seen[int(y*seen.shape[0]), int(x*seen.shape[1])].astype(int)
            assert abs(a - wanted[int(y*wanted.shape[0]), int(x*wanted.shape[1])]).max() < 30


def test_colours_are_kept(tmp_path):
    picture = np.full((64, 64, 3), (200, 60, 120), np.uint8)
    for ending in ("mp4", "webm", "mov", "avi"):
        path = media.write_video(tmp_path/f"a.{ending}", [picture]*30, 25)
        colour = decode_video(path, size=16)[0]["image"][0].mean((1, 2))
        assert abs(colour - (200, 60, 120)).max() < 6, ending


@pytest.mark.parametrize("size", [(33, 47), (2, 2), (48, 17)])
def test_odd_sizes(tmp_path, size):
    path = media.write_video(tmp_path/"a.mp4", np.full((30, *size, 3), 90, np.uint8), 25)
    image = decode_video(path, size=(30, 50))[0]["image"]
    assert image.shape == (1, 3, 30, 50) and abs(image.mean() - 90) < 4


@pytest.mark.parametrize("ending,codecs,channels,sr", [
    ("mp4", None, 2, 48000), ("mp4", None, 6, 48000), ("mkv", None, 6, 96000), ("mkv", None, 1, 8000),
    ("mov", ("mjpeg", "pcm_u8"), 1, 11025), ("mov", ("mjpeg", "pcm_s32le"), 2, 22050),
    ("mkv", ("mpeg4", "pcm_f64le"), 1, 44100)])
def test_any_rate_format_and_number_of_channels(tmp_path, ending, codecs, channels, sr):
    path = film(tmp_path/f"a.{ending}", 2, channels=channels, sr=sr, codecs=codecs)
    sound = decode_video(path, "all", sr=8000)[0]["sound"]
    assert [round(pitch(x, 8000)) for x in sound] == pytest.approx([300, 400], abs=2)
    assert abs(sound[:, 1000:7000]).max() == pytest.approx(.5, abs=.08)


def test_channels_are_averaged(tmp_path):
    x = tones(2, 16000)
    path = media.write_video(tmp_path/"a.mkv", [bars(0)]*50, 25, np.stack([x, -x]), 16000)
    assert abs(decode_video(path)[0]["sound"]).max() < 1e-3


def test_no_audio_and_short_audio(tmp_path):
    mute = media.write_video(tmp_path/"mute.mp4", [bars(1)]*50, 25)
    arrays, info = decode_video(mute)
    assert info["audio"] is None and not arrays["sound"].any() and arrays["covered"].tolist() == [0.]
    half = media.write_video(tmp_path/"half.mkv", [bars(1)]*75, 25, tones(1.5, 16000), 16000)
    arrays, _ = decode_video(half, "all")
    assert arrays["covered"] == pytest.approx([1, .5, 0], abs=.01)
    assert not arrays["sound"][2].any() and not arrays["sound"][1, 5600:].any() and arrays["sound"][1, :5400].any()


def test_too_short_is_no_error(tmp_path):
    arrays, info = decode_video(film(tmp_path/"a.mp4", .5))
    assert arrays["image"].shape == (0, 3, 96, 96) and arrays["sound"].shape == (0, 11000)
    assert info["duration_s"] == pytest.approx(.5, abs=.05)


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path/"song.mp4"
    with av.open(str(path), "w") as box:
        a, v = box.add_stream("aac", rate=44100, layout="mono"), box.add_stream("mjpeg", rate=1)
        v.width = v.height = 64
        v.pix_fmt = "yuvj420p"
        v.disposition = av.stream.Disposition.attached_pic
        box.mux(v.encode(av.VideoFrame.from_ndarray(bars(3), "rgb24")))
        box.mux(v.encode(None))
        media._mux_audio(box, a, tones(2, 44100)[None].astype(np.float32), 44100)
    with pytest.raises(Undecodable, match="only a cover picture"): decode_video(path)


def bad_files(folder):
    whole = film(folder/"whole.mp4").read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    files = dict(empty=b"", text=b"I am no film. "*400, playlist=b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", noise=noise,
                 header=b"\0\0\0\x20ftypisom" + noise, cut=whole[:len(whole)//2], flipped=noise[:64] + whole[64:])
    for name, data in files.items(): (folder/f"{name}.mp4").write_bytes(data)
    return [folder/f"{name}.mp4" for name in files]


def test_broken_files_give_reasons_and_harm_nobody(tmp_path):
    bad = bad_files(tmp_path)
    files = [f for b in bad for f in (b, tmp_path/"whole.mp4")]
    results = decode_videos(files, size=SIDE, workers=2, progress=False)
    for f, r in zip(files, results):
        assert r.ok == (f.name == "whole.mp4"), (f, r.reason)
        assert r.ok or (r.kind == "broken" and r.reason)
    assert "0 bytes" in results[0].reason
    assert all(read_bars(r.arrays["image"][0]) in (49, 50) for r in results[1::2])


def test_a_film_with_its_end_cut_off_is_used_as_far_as_it_goes(tmp_path):
    whole = film(tmp_path/"a.mkv").read_bytes()
    (tmp_path/"b.mkv").write_bytes(whole[:int(len(whole)*.7)])
    arrays, info = decode_video(tmp_path/"b.mkv", "all", size=SIDE)
    assert 1 <= len(arrays["start"]) < 4 and "cut off" in info["notes"][0]
    assert [read_bars(p) for p in arrays["image"]] == [12, 37, 62, 87][:len(arrays["start"])]


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_random_damage_never_escapes(tmp_path_factory, seed, hits):
    folder = tmp_path_factory.mktemp("damage")
    if not hasattr(test_random_damage_never_escapes, "film"):
        test_random_damage_never_escapes.film = film(folder/"a.mkv", 2, codecs=("mpeg4", "aac")).read_bytes()
    data, draw = bytearray(test_random_damage_never_escapes.film), np.random.default_rng(seed)
    for at in draw.integers(0, len(data), hits): data[at] = draw.integers(256)
    (folder/"b.mkv").write_bytes(data)
    if not hasattr(test_random_damage_never_escapes, "child"):
        test_random_damage_never_escapes.child = Child("avdd_nb.data.media:decode_video")
    outcome = test_random_damage_never_escapes.child.ask(dict(path=str(folder/"b.mkv"), size=32), limit_s=30)
    if outcome.ok:
        n = len(outcome.arrays["start"])
        assert outcome.arrays["image"].shape == (n, 3, 32, 32) and outcome.arrays["sound"].shape == (n, 11000)
        assert np.isfinite(outcome.arrays["sound"]).all()
    else: assert outcome.reason and outcome.kind in ("broken", "memory", "crash", "time")


@given(st.floats(.1, 20), st.floats(0, 100))
def test_windows_lie_in_the_clip_and_do_not_overlap(seconds, duration):
    every = media.window_starts("all", seconds, duration)
    assert all(b - a == pytest.approx(seconds) for a, b in zip(every, every[1:]))
    assert all(0 <= s and s + seconds*(1 - media.SLACK) <= duration + .01 for s in every)
    assert len(every) >= int(duration/seconds + 1e-9) - 1
    centre = media.window_starts("centre", seconds, duration)
    assert bool(centre) == bool(every)
    if centre and duration >= seconds: assert centre[0] + seconds/2 == pytest.approx(duration/2)


def test_windows_that_make_no_sense():
    for bad in ("middle", ["a"], object()):
        with pytest.raises(UserError, match="'centre', 'all'"): media.window_starts(bad, 1, 4)
    with pytest.raises(UserError, match="more than 0"): media.window_starts("all", 0, 4)
    assert media.window_starts([5, -1, 0, 0], 1, 4) == [0.]


# ---- processes ----

def test_a_hanging_decoder_costs_its_file_only():
    child = Child(f"{HERE}:hang")
    first = child.ask({}, limit_s=.3)
    assert (first.ok, first.kind) == (False, "time") and "0.3 s" in first.reason
    child.stop()


def test_a_file_that_never_comes(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    child = Child(f"{HERE}:wait_for_pipe")
    assert child.ask(dict(path=str(tmp_path/"pipe")), limit_s=.3).kind == "time"
    (tmp_path/"file").write_bytes(b"abc")
    assert child.ask(dict(path=str(tmp_path/"file"))).arrays["x"].tolist() == [97, 98, 99]
    child.stop()
    with pytest.raises(Undecodable, match="ordinary"): decode_video(tmp_path/"pipe")


def test_crashes_cost_one_file_each_and_processes_are_reused():
    codes = [0, signal.SIGABRT, 0, 0, signal.SIGSEGV, 0]
    results = dict(isolated(f"{HERE}:crash", [dict(code=int(c)) for c in codes], workers=1))
    assert [results[i].ok for i in range(6)] == [c == 0 for c in codes]
    assert "SIGABRT" in results[1].reason and results[4].kind == "crash"
    assert results[2].info["pid"] == results[3].info["pid"] != results[0].info["pid"]


def test_damage_by_an_earlier_file_is_not_the_next_ones_fault():
    results = dict(isolated(f"{HERE}:once", [dict(marker=i) for i in range(4)], workers=1))
    assert [results[i].info["marker"] for i in range(4)] == [0, 1, 2, 3]


def test_memory_limit():
    child = Child(f"{HERE}:greedy", memory_mb=300)
    assert child.ask(dict(n=10)).ok
    outcome = child.ask(dict(n=3000))
    assert outcome.kind == "memory" and "300 MB" in outcome.reason
    assert child.ask(dict(n=10)).ok
    child.stop()


def test_a_picture_too_large_for_the_limit_costs_itself_only(tmp_path):
    vast = media.write_video(tmp_path/"vast.mov", np.zeros((1, 8000, 12000, 3), np.uint8), 1, codecs=("mjpeg", None))
    small = film(tmp_path/"small.mp4", 2)
    results = decode_videos([vast, small], memory_mb=100, workers=1, progress=False)
    assert (results[0].kind, results[1].ok) == ("memory", True)


def test_noise_on_stdout_and_odd_text_do_not_disturb():
    (_, outcome), = isolated(f"{HERE}:chatty", [dict(n=500)])
    assert outcome.arrays["x"].tolist() == [[500]*500]*2 and outcome.info["text"] == "ü\n\udcff"


def test_an_exception_is_a_reason():
    (_, outcome), = isolated(f"{HERE}:failing", [dict(text="so it is")])
    assert outcome.reason == "ValueError: so it is"


def test_a_child_that_cannot_start_is_one_clear_error():
    with pytest.raises(UserError, match="did not start.*no_such_module"): list(isolated("no_such_module:f", [{}, {}]))


def test_no_questions(): assert list(isolated("os:abort", [])) == [] and decode_videos([], progress=False) == []


def test_leaving_early_ends_the_children():
    running = isolated(f"{HERE}:crash", [dict(code=0)]*2 + [dict(code=int(signal.SIGSTOP))]*50, workers=2)
    pids = {next(running)[1].info["pid"], next(running)[1].info["pid"]}
    running.close()
    assert all(gone(p) for p in pids)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running_after(how, tmp_path):
    code = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from avdd_nb.data import media
start = media.Child.start
def noted(self):
    start(self); print(self.process.pid, flush=True)
media.Child.start = noted
list(media.isolated('test_media:hang', [{{}}]*4, workers=2, limit_s=4))"""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(media.__file__).parents[2]), *sys.path]))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, pids))
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    assert all(gone(p) for p in pids)   # after SIGKILL the kernel's alarm ends them: limit_s + 5 s


# ---- the quarantine list ----

def test_quarantine_remembers_bytes_not_names(tmp_path):
    bad, listed = bad_files(tmp_path), tmp_path/"q"/"list.jsonl"
    first = decode_videos(bad, quarantine=Quarantine(listed), progress=False)
    again = decode_videos(bad, quarantine=Quarantine(listed), progress=False)
    assert all(r.remembered for r in again) and [r.reason for r in again] == [r.reason for r in first]
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(entries) == len(bad) and all(e["reason"] for e in entries)
    bad[1].write_bytes((tmp_path/"whole.mp4").read_bytes())   # mended
    mended = decode_videos(bad, quarantine=Quarantine(listed), progress=False)
    assert [r.ok for r in mended] == [i == 1 for i in range(len(bad))]
    q = Quarantine(listed)
    q.forget(bad[2:3])
    assert q.known(bad[2]) is None and Quarantine(listed).known(bad[2]) is None and Quarantine(listed).known(bad[0])


def test_quarantine_tries_again_with_more_time_and_survives_a_torn_line(tmp_path):
    path, listed = film(tmp_path/"a.mp4"), tmp_path/"list.jsonl"
    listed.write_text('{"file": "torn')
    assert decode_videos([path], limit_s=1e-4, quarantine=Quarantine(listed), progress=False)[0].kind == "time"
    assert decode_videos([path], limit_s=1e-4, quarantine=Quarantine(listed), progress=False)[0].remembered
    assert decode_videos([path], limit_s=60, quarantine=Quarantine(listed), progress=False)[0].ok


def test_missing_files_are_not_quarantined(tmp_path):
    q = Quarantine(tmp_path/"list.jsonl")
    outcome = decode_videos([tmp_path/"none.mp4"], quarantine=q, progress=False)[0]
    assert outcome.kind == "access" and len(q) == 0


@pytest.mark.parametrize("name", ["ü ñ 日本.mp4", "-rf *;'\"$(x).mp4", "concat:a|b.mp4", "new\nline.mp4", "%d.mp4",
                                  "b\udcff.mp4"])
def test_odd_names(tmp_path, name):
    try: os.rename(film(tmp_path/"a.mp4", 1), tmp_path/name)
    except OSError: pytest.skip("this file system does not allow the name")
    q = Quarantine(tmp_path/"q.jsonl")
    assert decode_videos([tmp_path/name], quarantine=q, progress=False)[0].ok
    (tmp_path/name).write_bytes(b"")
    assert not decode_videos([tmp_path/name], quarantine=q, progress=False)[0].ok
    assert Quarantine(tmp_path/"q.jsonl").known(tmp_path/name)


def test_importing_does_no_work_and_needs_no_torch():
    code = "import sys, avdd_nb.data.media; print([m for m in ('torch', 'av', 'tqdm') if m in sys.modules])"
    env = dict(os.environ, PYTHONPATH=str(Path(media.__file__).parents[2]))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.strip() == "[]"
