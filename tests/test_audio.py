"""Log-mel against torchaudio and the public code's own arrays; the way back against the sounds it started from."""
import io
import math
import wave
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdd_nb.core import UserError, rng
from avdd_nb.data.audio import (
    PRESETS,
    MelSpec,
    add_noise,
    empty_bands,
    filterbank,
    fit_length,
    log_mel,
    mel_to_power,
    modality,
    pink_noise,
    read_wave,
    resample,
    sample_sounds,
    spectral_convergence,
    stft,
    to_wave,
    wav_bytes,
)

AVDD = PRESETS["avdd"]
SPECS = [*PRESETS.values(), MelSpec(bank_sr=16000),
         MelSpec(sr=16000, n_fft=512, win=400, hop=160, n_mels=80, length=16000)]


@pytest.fixture(scope="module")
def golden():
    "Outputs of AVDD's preprocessing (public repository, commit 165d032), made with torchaudio 2.11."
    return {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent/"golden"/"audio.npz").items()}


def close_in_db(ours, theirs, quiet=-60, below=0.05):
    "Within 0.005 dB above `quiet` dB, within `below` under it, where the float32 rounding of the loudest bin shows."
    gap, heard = (ours - theirs).abs(), theirs > quiet
    return bool((gap[heard] < 5e-3).all() and (gap[~heard] < below).all())


def correlation(a, b, floor=-50):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).clamp(min=floor))[0, 1].item()


# --- against the public code ---

@pytest.mark.parametrize("name", ["wav0", "wav1", "wav2"])
def test_log_mel_is_the_published_one(golden, name):
    assert close_in_db(log_mel(golden[f"{name}_waveform"]), golden[f"{name}_db"])


def test_stereo_and_short(golden):
    mono = fit_length(golden["stereo_short_waveform"].mean(0), AVDD.length)
    assert close_in_db(log_mel(mono), golden["stereo_short_db"])


def test_filters_and_empty_bands(golden):
    torch.testing.assert_close(filterbank(AVDD), golden["mel_filterbank_11000"], atol=2e-5, rtol=0)
    assert empty_bands(AVDD) == golden["empty_bands_11000"].tolist()
    assert empty_bands(replace(AVDD, bank_sr=16000)) == golden["vggs_empty_bands"].tolist()
    assert [len(empty_bands(replace(AVDD, bank_sr=sr))) for sr in (16000, 22050, 44100)] == [4, 7, 16]


def test_vggsound_route(golden):
    "Resample 16 kHz → 11 kHz, cut second 4, and either bank."
    t = np.arange(int(5.5*16000))/16000
    recorded = 0.5*np.sin(2*np.pi*(200*t + 150*t**2)) + 0.1*np.sin(2*np.pi*3000*t)
    cut = resample(torch.from_numpy(recorded).float(), 16000, 11000)[44000:55000]
    torch.testing.assert_close(cut[::10], golden["vggs_cut_waveform_every10"], atol=1e-5, rtol=0)
    loose = dict(quiet=-40, below=2)   # the resampled waves differ by 2e-7: the last bit of a float32
    assert close_in_db(log_mel(cut), golden["vggs_db_11000_bank"], **loose)
    assert close_in_db(log_mel(cut, replace(AVDD, bank_sr=16000)), golden["vggs_db_own_rate_bank"], **loose)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_log_mel_equals_torchaudio(spec):
    transforms = pytest.importorskip("torchaudio.transforms")
    mel = transforms.MelSpectrogram(spec.sr, n_fft=spec.n_fft, win_length=spec.win, hop_length=spec.hop,
                                    n_mels=spec.n_mels)
    if spec.bank_sr:
        mel.mel_scale = transforms.MelScale(spec.n_mels, spec.bank_sr, n_stft=spec.n_fft//2 + 1)
    waves = 0.3*torch.randn(3, spec.length, generator=rng("torchaudio"))
    theirs = transforms.AmplitudeToDB()(mel(waves)).unsqueeze(1)
    assert log_mel(waves, spec).shape == (3, *spec.shape)
    torch.testing.assert_close(log_mel(waves, spec), theirs, atol=5e-3, rtol=0)


@pytest.mark.parametrize("old, new", [(8000, 11000), (44100, 11000), (16000, 8000), (11000, 8000), (22050, 22050)])
def test_resample_equals_torchaudio(old, new):
    functional = pytest.importorskip("torchaudio.functional")
    x = torch.randn(2, 5001, generator=rng("resample"))
    torch.testing.assert_close(resample(x, old, new), functional.resample(x, old, new), atol=2e-5, rtol=0)


# --- properties ---

@given(have=st.integers(0, 60), want=st.integers(1, 60), data=st.data())
def test_fit_length_keeps_what_it_can(have, want, data):
    offset = data.draw(st.integers(0, abs(have - want)))
    x = torch.arange(1., have + 1)
    y = fit_length(x, want, offset)
    assert len(y) == want
    assert y[y > 0].tolist() == (x if have <= want else x[offset:offset + want]).tolist()
    with pytest.raises(UserError, match="must lie in 0"): fit_length(x, want, abs(have - want) + 1)


@given(gain_db=st.floats(-30, 60), seed=st.integers(0, 1000))
def test_gain_shifts_decibels(gain_db, seed):
    x = 0.1*torch.randn(4000, generator=rng("gain", seed))
    moved = log_mel(x*10**(gain_db/20)) - log_mel(x)
    heard = log_mel(x) > -50
    torch.testing.assert_close(moved[heard], torch.full_like(moved[heard], gain_db), atol=0.02, rtol=0)


@given(samples=st.integers(201, 5000))
def test_frame_count(samples):
    assert log_mel(torch.zeros(2, samples)).shape == (2, 1, 128, samples//200 + 1)


def test_batch_equals_one_by_one():
    waves = torch.stack(list(sample_sounds().values()))
    torch.testing.assert_close(log_mel(waves), torch.stack([log_mel(w) for w in waves]), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(to_wave(log_mel(waves)), torch.stack([to_wave(log_mel(w)) for w in waves]),
                               atol=2e-3, rtol=0)


def test_log_mel_has_gradients():
    x = (0.1*torch.randn(11000, generator=rng("grad"))).requires_grad_()
    log_mel(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@given(snr_db=st.floats(-20, 20), seed=st.integers(0, 99))
def test_snr_is_what_was_asked(snr_db, seed):
    gen = rng("snr", seed)
    x, noise = torch.randn(3, 2000, generator=gen), pink_noise(3, 2000, gen)
    added = add_noise(x, noise, snr_db) - x
    got = 10*(x.square().mean(1)/added.square().mean(1)).log10()
    torch.testing.assert_close(got, torch.full((3,), snr_db), atol=1e-2, rtol=0)


def test_pink_noise_has_equal_octaves():
    power = torch.fft.rfft(pink_noise(200, 8000, rng("pink"))).abs().square().mean(0)
    octaves = torch.stack([power[k:2*k].sum() for k in (32, 64, 128, 256, 512, 1024, 2048)])
    assert (octaves/octaves.mean() - 1).abs().max() < 0.1
    assert add_noise(torch.zeros(1, 50), pink_noise(1, 50, rng("pink")), 0).abs().max() == 0


# --- and back ---

@pytest.mark.parametrize("preset, convergence, corr",
                         [("avdd", 0.2, 0.9), ("small", 0.4, 0.95), ("avmnist", 0.75, 0.95)])
def test_round_trip(preset, convergence, corr):
    spec = PRESETS[preset]
    for sound in sample_sounds(spec.sr).values():
        mel = log_mel(sound, spec)
        back = to_wave(mel, spec)
        assert spectral_convergence(back, sound, spec) < convergence
        assert correlation(log_mel(back, spec), mel) > corr


def test_round_trip_of_real_speech(real_data):
    files = sorted((real_data/"fsdd"/"recordings").glob("*.wav"))[::100]
    waves = torch.stack([fit_length(resample(*read_wave(f), AVDD.sr)[:AVDD.length], AVDD.length) for f in files])
    mel = log_mel(waves)
    back = to_wave(mel)
    assert spectral_convergence(back, waves).mean() < 0.15
    assert min(correlation(log_mel(b), m) for b, m in zip(back, mel)) > 0.97


@pytest.mark.slow
def test_digits_are_recognised_after_the_trip(real_data):
    "By ear, as far as a machine can stand in for it: the nearest of 2,700 training recordings says the digit."
    spec, files = PRESETS["small"], sorted((real_data/"fsdd/recordings").glob("*.wav"))
    rows = [(*p.stem.split("_"), p) for p in files]
    waves = torch.stack([fit_length(read_wave(r[3])[0][:spec.length], spec.length) for r in rows])
    digit, test = torch.tensor([int(r[0]) for r in rows]), torch.tensor([int(r[2]) < 5 for r in rows])
    look = lambda w: log_mel(w, spec).clamp(min=-50).flatten(1)
    known = look(waves[~test])
    score = lambda w: (digit[~test][torch.cdist(look(w), known).argmin(1)] == digit[test]).float().mean()
    assert score(to_wave(log_mel(waves[test], spec), spec)) > score(waves[test]) - 0.03


def test_power_beats_pseudo_inverse():
    "The reason for the multiplicative rule: a clamped pseudo-inverse puts power where there was none."
    spec = PRESETS["small"]
    power = stft(sample_sounds(spec.sr)["vowel"], spec).abs().square()
    mel = filterbank(spec).T @ power
    error = lambda p: ((filterbank(spec).T @ p - mel).norm()/mel.norm()).item()
    ours, plain = mel_to_power(mel, spec), (torch.linalg.pinv(filterbank(spec).T) @ mel).clamp(min=0)
    assert ours.min() >= 0 and error(ours) < 0.05 < error(plain)


def test_empty_bands_do_no_harm():
    spec = MelSpec(n_mels=200)
    assert len(empty_bands(spec)) > 10
    for mel in (log_mel(sample_sounds()["glide"], spec), torch.full(spec.shape, 40.), torch.full(spec.shape, -100.)):
        assert torch.isfinite(to_wave(mel, spec)).all()
    assert to_wave(torch.full(spec.shape, -100.), spec).abs().max() == 0


@given(low=st.floats(-300, 0), high=st.floats(0, 300), seed=st.integers(0, 99))
def test_any_picture_can_be_played(low, high, seed):
    "A synthetic spectrogram may have left the range of real ones."
    mel = low + (high - low)*torch.rand(1, 128, 56, generator=rng("wild", seed))
    assert torch.isfinite(to_wave(mel, n_iter=2)).all()


def test_to_wave_is_deterministic_and_other_lengths_play():
    mel = log_mel(sample_sounds()["pluck"])
    assert torch.equal(to_wave(mel), to_wave(mel)) and not torch.equal(to_wave(mel), to_wave(mel, seed=1))
    assert to_wave(mel[..., :28]).shape == (27*200,)
    assert to_wave(torch.zeros(2, 3, 1, 128, 551), n_iter=1).shape == (2, 3, 110000)


@pytest.mark.parametrize("picture, message", [
    (torch.zeros(1, 64, 56), r"\(…, 1, 128, frames\)"), (torch.zeros(128, 56), "cannot be played"),
    (torch.zeros(3, 128, 56), "cannot be played"), (torch.full((1, 128, 56), math.nan), "NaN")])
def test_wrong_pictures(picture, message):
    with pytest.raises(UserError, match=message): to_wave(picture)


# --- files ---

def test_wav_bytes_is_a_wav_file():
    with wave.open(io.BytesIO(wav_bytes(torch.tensor([[0., 0.1, -0.2]]), 8000))) as f:
        assert (f.getframerate(), f.getnchannels(), f.getsampwidth(), f.getnframes()) == (8000, 1, 2, 3)
        assert np.frombuffer(f.readframes(3), "<i2").tolist() == [0, 15564, -31129]
    assert set(wav_bytes(torch.zeros(5), 8000)[44:]) == {0}
    with pytest.raises(UserError, match="NaN"): wav_bytes(torch.tensor([math.nan]), 8000)
    with pytest.raises(UserError, match="one channel"): wav_bytes(torch.zeros(2, 5), 8000)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_read_wave_pcm(tmp_path, width, channels):
    soundfile = pytest.importorskip("soundfile")
    x = 0.5*np.sin(np.arange(300)/7)[:, None].repeat(channels, 1)
    kind = {1: "PCM_U8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}[width]
    soundfile.write(tmp_path/"a.wav", x, 8000, kind)
    got, sr = read_wave(tmp_path/"a.wav")
    assert sr == 8000 and np.abs(got.numpy() - x[:, 0]).max() < 2**(2 - 8*width) + 1e-6


@pytest.mark.parametrize("name, kind", [("a.wav", "FLOAT"), ("a.flac", "PCM_16")])
def test_read_wave_other_formats(tmp_path, name, kind):
    soundfile = pytest.importorskip("soundfile")
    x = 0.5*np.sin(np.arange(300)/7)
    soundfile.write(tmp_path/name, x, 8000, kind)
    assert np.abs(read_wave(tmp_path/name)[0].numpy() - x).max() < 1e-4


@pytest.mark.parametrize("content", [b"", b"not a sound", wav_bytes(torch.ones(100), 8000)[:120],
                                     wav_bytes(torch.zeros(0), 8000)])
def test_broken_sound_files_are_named(tmp_path, content):
    (tmp_path/"bad.wav").write_bytes(content)
    with pytest.raises(UserError, match="bad.wav"): read_wave(tmp_path/"bad.wav")


@given(at=st.integers(0, 43), to=st.integers(0, 255), cut=st.integers(0, 60))
def test_no_header_leads_to_anything_but_one_sentence(tmp_path_factory, at, to, cut):
    "Any byte of the header changed, any length: a wave that can be used, or a UserError with the file's name."
    data = bytearray(wav_bytes(torch.linspace(-1, 1, 50), 8000))
    data[at] = to
    path = tmp_path_factory.mktemp("fuzz")/"odd.wav"
    path.write_bytes(bytes(data[:len(data) - cut]))
    try: x, sr = read_wave(path)
    except UserError as e: assert "odd.wav" in str(e)
    else: assert x.dim() == 1 and len(x) and torch.isfinite(x).all() and sr > 0


def test_missing_sound_file(tmp_path):
    with pytest.raises(UserError, match="none.wav"): read_wave(tmp_path/"none.wav")


# --- settings ---

@pytest.mark.parametrize("field, value",
                         [("sr", 0), ("hop", 1.5), ("n_mels", -1), ("hop", 300), ("win", 500), ("length", 200)])
def test_impossible_settings(field, value):
    with pytest.raises(UserError, match=field): replace(AVDD, **{field: value})


def test_modality_keeps_the_settings():
    spec = PRESETS["small"]
    x = log_mel(torch.stack(list(sample_sounds(spec.sr).values())), spec)
    m = modality(spec, x=x)
    assert MelSpec(**m.meta) == spec and asdict(spec) == m.meta and m.unit == "dB" and m.shape == (1, 64, 32)
    assert abs(m.normalise(x).mean()) < 1e-4 and abs(m.normalise(x).std() - 1) < 1e-3
    assert modality(spec, raw=True, x=x) == modality(spec)
