"""Log-mel images equal librosa's; pitch shift and time stretch have half its vocoder's error.

The error is the difference to the same score synthesised at that pitch and tempo.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import librosa
import numpy as np
import pytest
import soundfile
import torch

from stemgenre.demo.synth import GENRES, render
from stemgenre.errors import UserError
from stemgenre.features.augmentation import NO_AUGMENT, AugmentParams
from stemgenre.features.log_mel import Frontend, RunningStats, add_noise, put_shifted
from stemgenre.features.mel_power import power_to_db
from stemgenre.runtime import use_one_core
from stemgenre.settings import FeatureSettings

CPU = torch.device("cpu")
SECONDS = 3.0
FEATURES = FeatureSettings.from_config(clip_seconds=SECONDS, img_size=96)
SR = FEATURES.sr


@lru_cache
def synthesise(genre, **changes):
    """Stems (4, samples) of a clip of the genre."""
    stems = render(genre, seed=5, seconds=SECONDS, sr=SR, **changes)
    stems.flags.writeable = False
    return stems


def librosa_db(stems):
    """The log-mel spectrogram by librosa, 0 dB at the loudest cell of all stems."""
    power = np.stack([librosa.feature.melspectrogram(y=wave, sr=SR) for wave in stems])
    return librosa.power_to_db(power, ref=np.max, top_db=80)


def log_mel(stems, params=NO_AUGMENT, **changes):
    """The log-mel spectrogram (C, n_mels, frames) in dB by the front end."""
    features = FEATURES.model_copy(update=changes)
    return Frontend(features, device=CPU).log_mel(torch.tensor(stems), params).numpy()


def error_db(image, truth):
    """Mean absolute difference over the frames that both have."""
    frames = min(image.shape[2], truth.shape[2]) - 4  # the last frames differ by the clips' ends
    return np.abs(image[..., :frames] - truth[..., :frames]).mean()


@pytest.mark.parametrize("genre", ["jazz", "metal", "classical"])
def test_images_equal_librosas(genre):
    stems = synthesise(genre)
    assert np.abs(log_mel(stems) - librosa_db(stems)).max() < 1e-3


def test_images_of_real_clips_equal_librosas(music):
    paths = sorted(music.glob("test_sound_1/*/*.au"))[:4]
    assert len(paths) == 4
    for path in paths:
        wave, _ = soundfile.read(path, dtype="float32")
        stems = np.stack([wave, 0.1 * wave, wave[::-1], 1e-4 * wave])
        image = log_mel(stems, clip_seconds=30.0)
        assert np.abs(image - librosa_db(stems)[..., : image.shape[2]]).max() < 1e-3


def test_with_reference_stem_each_channel_equals_librosas_of_that_stem():
    stems = synthesise("pop")
    image = log_mel(stems, db_reference="stem")
    sounding = stems.any(1)
    assert sounding.sum() >= 3
    for channel, stem in zip(image[sounding], stems[sounding], strict=True):
        assert np.abs(channel - librosa_db(stem[None])).max() < 1e-3


@pytest.mark.parametrize(("semitones", "rate"), [(2, 1.0), (-1.5, 1.0), (0, 0.85), (0, 1.2)])
def test_pitch_and_tempo_errors_are_at_most_half_of_librosas(semitones, rate):
    errors, vocoder_errors = [], []
    for genre in GENRES[::2]:
        stems = synthesise(genre)
        truth = librosa_db(synthesise(genre, semitones=semitones, rate=rate))
        image = log_mel(stems, AugmentParams(semitones=semitones, rate=rate))
        errors.append(error_db(image, truth))
        if semitones:
            changed = librosa.effects.pitch_shift(stems, sr=SR, n_steps=semitones)
        else:
            changed = librosa.effects.time_stretch(stems, rate=rate)
        vocoder_errors.append(error_db(librosa_db(changed), truth))
    assert np.mean(errors) <= 0.5 * np.mean(vocoder_errors)


def test_a_tone_moves_by_the_semitones():
    tones = [np.sin(2 * np.pi * hz * np.arange(int(SECONDS * SR)) / SR)[None] for hz in (440, 880)]
    low, high = (np.repeat(tone, 4, axis=0).astype(np.float32) for tone in tones)
    shifted = log_mel(low, AugmentParams(semitones=12))
    assert shifted[0, :, 100].argmax() == librosa_db(high)[0, :, 100].argmax()


def test_a_short_clip_is_padded_with_the_floor_and_a_long_one_is_cut():
    frontend = Frontend(FEATURES, device=CPU)
    wave = torch.tensor(synthesise("rock"))
    short, full, long = frontend(
        [wave[:, : SR * 3 // 2], wave, wave.repeat(1, 2)], [NO_AUGMENT] * 3
    )
    assert torch.allclose(short[:, :, 55:], torch.tensor(-80.0), atol=1e-3)
    assert (short[:, :, :40] > -70).any()
    assert torch.equal(full[:, :, :90], long[:, :, :90])


def test_an_image_does_not_depend_on_its_batch():
    frontend = Frontend(FEATURES, device=CPU)
    clips = [torch.tensor(synthesise(genre)) for genre in ("metal", "jazz", "classical")]
    params = [
        AugmentParams(rate=1.1, noise_db=30.0, noise_seed=4),
        NO_AUGMENT,
        AugmentParams(semitones=1),
    ]
    images = frontend(clips, params)
    for image, clip, augment in zip(images, clips, params, strict=True):
        assert torch.equal(image, frontend([clip], [augment])[0])


@pytest.mark.parametrize(
    "changes", [{}, {"channels": "mix,drums", "num_channels": 3, "db_reference": "stem"}], ids=str
)
def test_clips_that_are_computed_together_as_on_a_gpu_have_the_images_of_each_alone(changes):
    frontend = Frontend(FEATURES.model_copy(update=changes), device=CPU)
    clips = [torch.tensor(synthesise(genre)) for genre in ("metal", "jazz", "pop", "rock", "blues")]
    clips[2] = clips[2][:, : SR * 3 // 2].half()
    gains = {"stem_gains_db": (3.0, -3.0, 0.0, 6.0), "silent_stems": (False, True, False, False)}
    params = [
        AugmentParams(rate=1.1, noise_db=30.0, noise_seed=4, time_mask=(0.2, 0.1)),
        NO_AUGMENT,
        AugmentParams(semitones=1, shift_seconds=-0.2, noise_db=40.0, noise_seed=5),
        AugmentParams(semitones=-2, rate=0.8, shift_seconds=0.1, **gains),
        AugmentParams(frequency_mask=(0.9, 0.2)),
    ]
    alone = frontend(clips, params)
    frontend.pool, pool = None, frontend.pool
    together = frontend(clips, params)
    pool.shutdown()
    assert together.shape == (5, len(frontend.features.channel_names), 96, 96)
    assert (together - alone).abs().max() < 1e-3
    assert ((together == 0) == (alone == 0)).all()


def test_an_image_does_not_depend_on_the_thread_that_computes_it():
    """In training a thread of one core does, in validation the main thread and its helpers."""
    clip = torch.tensor(synthesise("metal"))
    params = AugmentParams(rate=1.1, noise_db=30.0, noise_seed=4, semitones=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        frontend = Frontend(FEATURES, device=CPU)
        image = frontend([clip], [params])
        with ThreadPoolExecutor(initializer=use_one_core) as pool:
            other = pool.submit(frontend, [clip], [params]).result()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(image, other)


def test_the_four_stems_are_augmented_alike():
    wave = synthesise("jazz").sum(0)
    params = AugmentParams(semitones=1, rate=0.9, shift_seconds=0.1)
    image = log_mel(np.stack([wave] * 4), params)
    assert all(np.array_equal(image[0], channel) for channel in image)


def test_masks_set_their_band_to_the_mean():
    frontend = Frontend(FEATURES, device=CPU, channel_stats=([-40.0] * 4, [20.0] * 4))
    params = AugmentParams(time_mask=(0.5, 0.1), frequency_mask=(0.25, 0.1))
    image = frontend([torch.tensor(synthesise("metal"))], [params])[0]
    assert (image[:, :, 48:57] == 0).all()
    assert (image[:, 24:33, :] == 0).all()
    assert (image == 0).float().mean() < 0.25


def test_a_frequency_mask_needs_no_time_mask():
    image = Frontend(FEATURES, device=CPU)(
        [torch.tensor(synthesise("metal"))], [AugmentParams(frequency_mask=(0.25, 0.5))]
    )[0]
    assert (image[:, 24:72] == 0).all()
    assert (image[:, :24] != 0).any() and (image[:, 72:] != 0).any()


def test_a_small_image_shows_the_mean_of_what_it_has_no_pixels_for():
    stems = torch.tensor(synthesise("metal"))
    small = Frontend(FEATURES.model_copy(update={"img_size": 8}), device=CPU)
    image, db = small([stems], [NO_AUGMENT])[0], small.log_mel(stems)
    assert image.shape == (4, 8, 8)
    assert (image.mean((1, 2)) - db.mean((1, 2))).abs().max() < 0.5


def test_the_image_of_a_faster_tempo_is_filled_with_what_follows():
    frontend = Frontend(FEATURES, device=CPU)
    stems = torch.tensor(synthesise("metal")).repeat(1, 2)
    image = frontend([stems], [AugmentParams(rate=1.2)])[0]
    assert frontend.needed_samples(AugmentParams(rate=1.2)) == pytest.approx(1.2 * 3 * SR, rel=0.01)
    assert image[:, :, -12:].amax() > -40, "not padded"


def test_a_shift_fills_with_zeros():
    waves = torch.arange(1.0, 6).repeat(4, 1)
    for samples, expected in (
        (2, [0, 0, 1, 2, 3]), (-2, [3, 4, 5, 0, 0]), (9, [0] * 5), (-9, [0] * 5),
    ):  # fmt: skip
        target = torch.zeros(4, 5)
        put_shifted(target, waves, samples)
        assert target.tolist() == [expected] * 4


@pytest.mark.parametrize("noise_db", [30.0, 50.0])
@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_the_mix_has_noise_at_the_given_level_below_its_own(noise_db, gain):
    stems = torch.tensor(gain * synthesise("rock"))
    clips, length = stems.repeat(3, 1, 1), stems.shape[1] // 2  # of the second
    clips[1, :, length:] = 0
    noisy, lengths = clips.clone(), [stems.shape[1], length, stems.shape[1]]
    add_noise(noisy, lengths, levels_db=[noise_db, noise_db, np.inf], seeds=[1, 2, 3])
    for clip, before, samples in zip(noisy[:2], clips, lengths, strict=False):
        mix, noise = before.sum(0)[:samples], (clip - before).sum(0)[:samples]
        assert 20 * torch.log10(mix.std() / noise.std()) == pytest.approx(noise_db, abs=0.1)
    assert not noisy[1, :, length:].any()
    assert not torch.equal(noisy[0, :, :length], noisy[1, :, :length])
    assert torch.equal(noisy[2], clips[2])


def test_noise_does_not_depend_on_the_gain_of_a_recording():
    params = AugmentParams(noise_db=40.0, noise_seed=1)
    loud, quiet = (log_mel(gain * synthesise("pop"), params) for gain in (1.0, 0.02))
    assert np.abs(loud - quiet).max() < 0.1


@pytest.mark.parametrize("noise_db", [30.0, 40.0, 50.0])
def test_noise_does_not_make_an_instrumental_clip_look_sung(noise_db):
    stems = synthesise("metal").copy()
    stems[0] = 1e-4 * stems[1]  # what a separator leaves where nobody sings
    clean = log_mel(stems)
    image = log_mel(stems, AugmentParams(noise_db=noise_db, noise_seed=1))
    assert np.abs(image[0] - clean[0]).mean() < 0.1
    assert image[0].mean() == image.mean((1, 2)).min()
    stems[0] = 0
    assert (log_mel(stems, AugmentParams(noise_db=noise_db, noise_seed=1))[0] == -80).all()


def test_noise_moves_no_channel_by_a_deviation_at_its_middle_level():
    clips = [synthesise(genre) for genre in GENRES]
    clean = np.stack([log_mel(stems).mean((1, 2)) for stems in clips])
    params = AugmentParams(noise_db=40.0, noise_seed=1)
    noisy = np.stack([log_mel(stems, params).mean((1, 2)) for stems in clips])
    stats = RunningStats()
    for stems in clips:
        stats.add(torch.tensor(log_mel(stems)))
    assert ((noisy - clean).mean(0) < np.array(stats.mean_and_std()[1])).all()


@pytest.mark.parametrize("changes", [{"channels": "vocals"}, {"db_reference": "stem"}], ids=str)
def test_complete_silence_is_at_the_floor_as_padding_is(changes):
    stems = synthesise("metal").copy()
    stems[0] = 0
    assert (log_mel(stems, **changes)[0] == -80).all()
    noisy = log_mel(stems, AugmentParams(noise_db=30.0, noise_seed=1), **changes)
    assert (noisy[0] == -80).all()


def test_the_residue_of_a_silent_stem_is_not_blown_up_beside_itself():
    """What Demucs leaves in the vocals of an instrumental: with "stem", its own reference."""
    stems = synthesise("metal").copy()
    stems[0] = 2e-7 * np.random.default_rng(0).standard_normal(stems.shape[1])
    assert (log_mel(stems, db_reference="stem")[0] == -80).all()


def test_silent_parts_are_at_the_floor_of_any_top_db():
    stems = synthesise("metal").copy()
    stems[:, SR:] = 0
    largest = 250.0  # that is accepted
    assert (log_mel(stems, top_db=largest)[:, :, 60:] == -largest).all()
    assert (log_mel(0 * stems, top_db=largest) == -largest).all()
    with pytest.raises(UserError, match="TOP_DB"):
        FeatureSettings.from_config(top_db=largest + 1)


def test_nan_in_the_stems_stays_nan_in_the_image():
    stems = synthesise("metal").copy()
    stems[1, 100] = np.nan
    assert np.isnan(log_mel(stems)).any()


def test_a_channel_that_is_silent_in_all_training_clips_is_not_blown_up():
    stems = torch.tensor(synthesise("metal").copy())
    stems[0] = 0
    stats = RunningStats()
    stats.add(torch.tensor(log_mel(stems.numpy())))
    mean, std = stats.mean_and_std()
    assert mean[0] == -80 and std[0] >= 3
    frontend = Frontend(FEATURES, device=CPU, channel_stats=(mean, std))
    stems[0] = 1e-2 * stems[3]  # 40 dB below another stem
    assert frontend([stems], [NO_AUGMENT])[0, 0].max() < 15


def test_a_near_silent_stem_stays_dark_beside_a_loud_one():
    power = torch.tensor([[[1.0, 0.5]], [[1e-9, 1e-8]]])
    assert power_to_db(power, reference="clip", top_db=80.0)[1].max() == -80
    assert power_to_db(power, reference="stem", top_db=80.0)[1].max() == 0


def test_the_mix_is_the_sum_of_the_stems():
    stems = synthesise("metal")
    image = log_mel(stems, channels="mix")
    assert image.shape[0] == 1
    assert np.abs(image - librosa_db(stems.sum(0, keepdims=True))).max() < 1e-3
    loud = np.full((4, SR), 6e4, np.float16)  # their sum overflows float16
    assert np.isfinite(log_mel(loud, channels="mix,drums")).all()


def test_the_mix_alone_has_the_image_of_the_stems_sum_with_every_augmentation():
    stems = synthesise("rock")
    params = AugmentParams(
        semitones=1, rate=0.9, noise_db=30.0, noise_seed=2, shift_seconds=0.1,
        time_mask=(0.2, 0.1), frequency_mask=(0.5, 0.1),
    )  # fmt: skip
    features = FEATURES.model_copy(update={"channels": "mix"})
    frontend = Frontend(features, device=CPU, channel_stats=([-40.0], [20.0]))
    alone, summed = frontend(
        [torch.tensor(stems.sum(0, keepdims=True)), torch.tensor(stems)], [params] * 2
    )
    assert alone.shape == (1, 96, 96)
    assert (alone - summed).abs().max() < 1e-3


@pytest.mark.parametrize("channels", ["mix,vocals,drums,bass,other", "drums,mix", "other,mix,bass"])
def test_mix_and_stems_go_together_in_any_order(channels):
    stems = synthesise("jazz")
    waves = dict(zip(("vocals", "drums", "bass", "other"), stems, strict=True))
    waves["mix"] = stems.sum(0)
    image = log_mel(stems, channels=channels)
    expected = librosa_db(np.stack([waves[name] for name in channels.split(",")]))
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("channels", "rows"),
    [
        ("vocals,drums,bass,other", [0, 1, 2, 3]),
        ("other", [3, 3, 3, 3]),
        ("vocals,drums", [0, 1, 0, 1]),
        ("bass,vocals,other", [2, 0, 3, 2]),
    ],
)
def test_chosen_stems_are_repeated_in_turn_relative_to_the_loudest_of_them(channels, rows):
    stems = synthesise("jazz") * np.array([[0.1], [1], [0.2], [0.03]], np.float32)
    image = log_mel(stems, channels=channels, num_channels=4)
    assert np.abs(image - librosa_db(stems[rows])).max() < 1e-3
    assert image.max() == 0


@pytest.mark.parametrize("channels", ["mix", "drums", "other,bass"])
def test_a_repeated_channel_has_the_same_noise_and_masks(channels):
    features = FEATURES.model_copy(update={"channels": channels, "num_channels": 4})
    params = AugmentParams(
        noise_db=30.0, noise_seed=3, time_mask=(0.5, 0.1), frequency_mask=(0.2, 0.1)
    )
    image = Frontend(features, device=CPU)([torch.tensor(synthesise("rock"))], [params])[0]
    count = 1 + channels.count(",")
    assert image.shape == (4, 96, 96)
    assert torch.equal(image[count:], image[:-count])
    assert count == 1 or not torch.equal(image[0], image[1])


@pytest.mark.parametrize("channels", [1, 5])
def test_channel_statistics_do_not_depend_on_how_the_clips_are_grouped(channels):
    parts = [torch.randn(channels, 8, frames) * 10 - 30 for frames in (10, 3, 40)]
    together, first, second = RunningStats(), RunningStats(), RunningStats()
    for part in parts:
        together.add(part)
    first.add(parts[0])
    for part in parts[1:]:
        second.add(part)
    first.merge(second)
    first.merge(RunningStats())  # of a process without clips
    mean, std = together.mean_and_std()
    cells = torch.cat(parts, 2).flatten(1)
    assert torch.allclose(torch.tensor(mean), cells.mean(1), atol=1e-4)
    assert torch.allclose(torch.tensor(std), cells.std(1, correction=0), rtol=1e-3)
    assert first.mean_and_std() == (pytest.approx(mean), pytest.approx(std))
