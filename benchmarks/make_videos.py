"""Makes a folder of small real-content videos to try `videos` on: spoken numbers over photographs.

Each clip shows a handwritten digit (MNIST) drifting over a photograph that is slowly panned and zoomed, while a person
says that digit once a second (FSDD). Classes are the spoken words: one/, two/, three/ … The codecs and containers go
round h264/aac mp4, vp9/opus webm, h264/flac mkv, mjpeg/pcm mov, mpeg4/mp3 avi, mpeg4/ac3 mkv. Three more files are of
no use on purpose: one cut off, one with a silent sound track, one without any.

    python benchmarks/make_videos.py my_videos --data-root ../shared/data
    avdd data prepare videos --data folder=my_videos
"""
import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

from avdd_nb.core import UserError, data_root, need
from avdd_nb.data.media import write_video

WORDS = "zero one two three four five six seven eight nine".split()
SPEAKERS = "george jackson lucas nicolas theo yweweler".split()
KINDS = [(".mp4", ("libx264", "aac"), 44100), (".webm", ("libvpx-vp9", "libopus"), 48000),
         (".mkv", ("libx264", "flac"), 22050), (".mov", ("mjpeg", "pcm_s16le"), 16000),
         (".avi", ("mpeg4", "libmp3lame"), 44100), (".mkv", ("mpeg4", "ac3"), 48000)]
FPS = 25


def read_idx(path, header):
    "The bytes of an MNIST file after its header."
    if not path.exists(): raise UserError(f"No {path}: --data-root (or AVDD_DATA) needs MNIST/raw in it.")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def handwriting(root):
    "MNIST's test digits: (images (n, 28, 28), labels)."
    raw = root/"MNIST"/"raw"
    images = read_idx(raw/"t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    return images, read_idx(raw/"t10k-labels-idx1-ubyte.gz", 8)


def photographs():
    "Two photographs (H, W, 3) that come with scikit-learn: a temple and a flower."
    return need("sklearn.datasets").load_sample_images().images


def spoken(root, digit, speaker, take):
    "(samples, rate) of one FSDD recording."
    path = root/"fsdd"/"recordings"/f"{digit}_{speaker}_{take}.wav"
    if not path.exists(): raise UserError(f"No {path}: --data-root (or AVDD_DATA) needs fsdd/recordings in it.")
    wave, sr = need("avdd_nb.data.audio").read_wave(path)
    return wave.numpy(), sr


def soundtrack(word, sr, rate, seconds):
    "The word once a second, in the middle of each second, with room tone, at `rate`."
    import torch
    word = need("avdd_nb.data.audio").resample(torch.from_numpy(word), sr, rate).numpy()[:rate]
    track = np.random.default_rng(0).normal(scale=1e-3, size=round(seconds*rate))
    for start in range(int(seconds)):
        at = round((start + .5)*rate) - len(word)//2
        track[at:at + len(word)] += .8*word/max(abs(word).max(), 1e-6)
    return np.clip(track, -1, 1)


def camera(photo, progress, height, width, corner):
    "A view (height, width, 3) of the photograph, moving and closing in as `progress` goes from 0 to 1."
    zoom = 1 - .35*progress
    h, w = int(min(photo.shape[:2])*.6*zoom), int(min(photo.shape[:2])*.6*zoom*width/height)
    top, left = ((np.array(photo.shape[:2]) - (h, w))*(corner*(1 - progress) + .5*progress)).astype(int)
    rows = (top + np.arange(height)*h/height).astype(int)
    return photo[rows][:, (left + np.arange(width)*w/width).astype(int)]


def overlay(view, digit, progress, draw_side):
    "The view, darkened, with the digit bright upon it, drifting from one side to the other."
    height, width = view.shape[:2]
    size = int(height*.7)
    ink = digit[np.arange(size)*28//size][:, np.arange(size)*28//size][..., None]/255
    top, left = (height - size)//2, int((width - size)*(.25 + .5*(progress if draw_side else 1 - progress)))
    out = view*.55
    part = out[top:top + size, left:left + size]
    part[:] = part*(1 - ink) + 255*ink
    return out.astype(np.uint8)


def frames_of(digit, photo, seconds, draw, height=144, width=192):
    "All frames (n, height, width, 3) of one clip."
    corner, side, n = draw.random(2), draw.integers(2), round(seconds*FPS)
    return np.stack([overlay(camera(photo, i/n, height, width, corner), digit, i/n, side) for i in range(n)])


def make_clip(path, root, digit, k, draw, pool, codecs=None, rate=44100, mute=False, silent=False):
    "One clip of the spoken `digit`; its speaker, handwriting, photograph and length depend on `k` and `draw`."
    images, labels = pool
    image = images[draw.choice(np.flatnonzero(labels == digit))]
    seconds = 3 + 2*(k % 2) + .1*(k % 3)   # an odd number of words: one of them is in the middle
    frames = frames_of(image, photographs()[k % 2], seconds, draw)
    sound = soundtrack(*spoken(root, digit, SPEAKERS[k % 6], int(draw.integers(5, 50))), rate, seconds)
    write_video(path, frames, FPS, None if mute else sound*(not silent), rate, codecs)


def make(folder, root, digits=(1, 2, 3), per_class=5, seed=0):
    "The paths of the videos written to `folder`: `per_class` good clips for each of `digits`, and three of no use."
    folder, root, pool, paths = Path(folder), Path(root), handwriting(Path(root)), []
    for digit in digits:
        draw = np.random.default_rng([seed, digit])
        (folder/WORDS[digit]).mkdir(parents=True, exist_ok=True)
        for k in range(per_class):
            ending, codecs, rate = KINDS[(k + digit) % len(KINDS)]
            paths.append(folder/WORDS[digit]/f"{SPEAKERS[k % 6]} {k}{ending}")
            make_clip(paths[-1], root, digit, k, draw, pool, codecs, rate)
    first, draw = folder/WORDS[digits[0]], np.random.default_rng([seed, 99])
    make_clip(first/"no sound track.mp4", root, digits[0], 7, draw, pool, mute=True)
    make_clip(first/"silent.mp4", root, digits[0], 8, draw, pool, silent=True)
    make_clip(first/"cut off.mp4", root, digits[0], 9, draw, pool)
    (first/"cut off.mp4").write_bytes((first/"cut off.mp4").read_bytes()[:20000])
    return [*paths, first/"no sound track.mp4", first/"silent.mp4", first/"cut off.mp4"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write (made if it is not there)")
    parser.add_argument("--data-root", help="folder with MNIST/raw and fsdd/recordings (default: $AVDD_DATA)")
    parser.add_argument("--digits", type=int, nargs="+", default=[1, 2, 3], choices=range(10), help="the classes")
    parser.add_argument("--per-class", type=int, default=5, help="good clips a class")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    try: paths = make(a.folder, data_root(a.data_root), a.digits, a.per_class, a.seed)
    except UserError as e: sys.exit(f"{e}")
    size = sum(p.stat().st_size for p in paths)/1e6
    print(f"{len(paths)} videos of {len(a.digits)} classes in {a.folder} ({size:.1f} MB)")


if __name__ == "__main__": main()
