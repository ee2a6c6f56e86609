"""Images equal librosa's; pitch and tempo are nearer to a new rendering than its vocoder's."""

import dataclasses

import librosa
import numpy as np
import pytest
import soundfile
import torch

from stemgenre.augmentation import PLAIN, Draw
from stemgenre.band import GENRES, render
from stemgenre.frontend import DecibelStatistics, FrontEnd, power_to_db
from stemgenre.settings import FeatureSettings

CPU = torch.device("cpu")
FEATURES = FeatureSettings(clip_seconds=6.0, img_size=96)
SR = FEATURES.sr


def band(genre, **how):
    return render(genre, seed=5, seconds=6.0, sr=SR, **how)


def librosa_db(stems, reference=np.max):
    """The image as librosa computes it, 0 dB at the loudest cell of all stems."""
    power = np.stack([librosa.feature.melspectrogram(y=wave, sr=SR) for wave in stems])
    return librosa.power_to_db(power, ref=reference, top_db=80)


def ours(stems, one=PLAIN, features=FEATURES):
    return FrontEnd(features, device=CPU).decibels(torch.from_numpy(stems), one).numpy()


def error_db(image, truth):
    """Mean absolute difference over the frames both have."""
    frames = min(image.shape[2], truth.shape[2]) - 4  # the last frames see different clip ends
    return np.abs(image[..., :frames] - truth[..., :frames]).mean()


@pytest.mark.parametrize("genre", ["jazz", "metal", "classical"])
def test_plain_images_equal_librosas(genre):
    stems = band(genre)
    assert np.abs(ours(stems) - librosa_db(stems)).max() < 1e-3


def test_plain_images_of_real_clips_equal_librosas(music):
    for path in sorted(music.glob("test_sound_1/*/*.au")):
        wave, _ = soundfile.read(path, dtype="float32")
        stems = np.stack([wave, 0.1 * wave, wave[::-1], 1e-4 * wave])
        image = ours(stems, features=FeatureSettings())
        assert np.abs(image - librosa_db(stems)[..., : image.shape[2]]).max() < 1e-3


def test_with_reference_stem_each_channel_is_as_librosa_makes_it_alone():
    stems = band("pop")
    image = ours(stems, features=dataclasses.replace(FEATURES, db_reference="stem"))
    alone = np.concatenate([librosa_db(stem[None]) for stem in stems])
    assert np.abs(image - alone).max() < 1e-3


@pytest.mark.parametrize(("semitones", "rate"), [(2, 1.0), (-1.5, 1.0), (0, 0.85), (0, 1.2)])
def test_pitch_and_tempo_err_at_most_half_as_much_as_librosas(semitones, rate):
    errors, vocoder_errors = [], []
    for genre in GENRES[::2]:
        truth = librosa_db(band(genre, semitones=semitones, rate=rate))
        stems = band(genre)
        errors.append(error_db(ours(stems, Draw(semitones=semitones, rate=rate)), truth))
        moved = librosa.effects.pitch_shift(stems, sr=SR, n_steps=semitones) if semitones else stems
        moved = librosa.effects.time_stretch(moved, rate=rate) if rate != 1 else moved
        vocoder_errors.append(error_db(librosa_db(moved), truth))
    assert np.mean(errors) <= 0.5 * np.mean(vocoder_errors)


def test_a_tone_moves_by_the_semitones():
    tone = np.sin(2 * np.pi * 440 * np.arange(6 * SR) / SR).astype(np.float32)
    octave = ours(np.stack([tone] * 4), Draw(semitones=12))[0, :, 100].argmax()
    wanted = librosa_db(np.stack([np.sin(2 * np.pi * 880 * np.arange(6 * SR) / SR)]))
    assert octave == wanted[0, :, 100].argmax()


def test_a_short_clip_is_filled_at_the_floor_and_a_long_one_is_cut():
    front_end = FrontEnd(FEATURES, device=CPU)
    wave = torch.from_numpy(band("rock"))
    short, full, long = front_end([wave[:, : 3 * SR], wave, wave.repeat(1, 2)], [PLAIN] * 3)
    assert torch.allclose(short[:, :, 55:], torch.tensor(-80.0), atol=1e-3)
    assert (short[:, :, :40] > -70).any()
    assert torch.equal(full[:, :, :90], long[:, :, :90])


def test_an_image_does_not_depend_on_its_batch():
    front_end = FrontEnd(FEATURES, device=CPU)
    clips = [torch.from_numpy(band(genre)) for genre in ("disco", "blues", "reggae")]
    draws = [Draw(rate=1.1, noise_sigma=0.01, noise_seed=4), PLAIN, Draw(semitones=1)]
    together = front_end(clips, draws)
    for image, clip, one in zip(together, clips, draws, strict=True):
        assert torch.equal(image, front_end([clip], [one])[0])


def test_one_draw_moves_the_four_stems_alike():
    wave = band("jazz").sum(0)
    one = Draw(semitones=1, rate=0.9, shift_seconds=0.1)
    image = ours(np.stack([wave] * 4), one)
    assert all(np.array_equal(image[0], channel) for channel in image)


def test_masks_cover_what_they_say_with_the_mean():
    front_end = FrontEnd(FEATURES, device=CPU, channels=([-40.0] * 4, [20.0] * 4))
    draw = Draw(time_mask=(0.5, 0.1), frequency_mask=(0.25, 0.1))
    image = front_end([torch.from_numpy(band("hiphop"))], [draw])[0]
    assert (image[:, :, 48:57] == 0).all()
    assert (image[:, 24:33, :] == 0).all()
    assert (image == 0).float().mean() < 0.25


def test_noise_has_the_drawn_loudness_and_shift_fills_with_zeros():
    silence = torch.zeros(4, SR)
    from stemgenre.frontend import add_noise, shift_wave

    noise = add_noise(silence, sigma=0.01, seed=1)
    assert noise.std().item() == pytest.approx(0.01, rel=0.02)
    assert not torch.equal(noise, add_noise(silence, sigma=0.01, seed=2))
    later = shift_wave(torch.ones(4, 10), 3)
    assert later[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert shift_wave(torch.ones(4, 10), -3)[0].tolist() == [1] * 7 + [0] * 3


def test_a_silent_stem_stays_dark_beside_a_loud_one():
    power = torch.tensor([[[1.0, 0.5]], [[1e-12, 1e-11]]])
    assert power_to_db(power, reference="clip", top_db=80.0)[1].max() == -80
    assert power_to_db(power, reference="stem", top_db=80.0)[1].max() == 0


def seen(channels, stems):
    return ours(stems, features=dataclasses.replace(FEATURES, channels=channels))


def test_the_mix_is_the_sum_of_the_stems_four_times():
    stems = band("hiphop")
    image = seen("mix", stems)
    assert np.abs(image - librosa_db(stems.sum(0, keepdims=True))).max() < 1e-3
    assert all(np.array_equal(channel, image[0]) for channel in image)
    loud = np.full((4, SR), 6e4, np.float16)  # whose sum is beyond float16
    assert np.isfinite(seen("mix", loud)).all()


@pytest.mark.parametrize(
    ("channels", "rows"),
    [
        ("vocals,drums,bass,other", [0, 1, 2, 3]),
        ("other", [3, 3, 3, 3]),
        ("vocals,drums", [0, 1, 0, 1]),
        ("bass,vocals,other", [2, 0, 3, 2]),
    ],
)
def test_chosen_stems_are_repeated_in_turn_below_the_loudest_of_them(channels, rows):
    stems = band("reggae") * np.array([[0.1], [1], [0.2], [0.03]], np.float32)
    image = seen(channels, stems)
    assert np.abs(image - librosa_db(stems[rows])).max() < 1e-3
    assert image.max() == 0


@pytest.mark.parametrize("channels", ["mix", "drums", "other,bass"])
def test_a_repeated_channel_has_the_same_noise_and_masks(channels):
    features = dataclasses.replace(FEATURES, channels=channels)
    draw = Draw(noise_sigma=0.01, noise_seed=3, time_mask=(0.5, 0.1), frequency_mask=(0.2, 0.1))
    image = FrontEnd(features, device=CPU)([torch.from_numpy(band("rock"))], [draw])[0]
    count = 1 + channels.count(",")
    assert image.shape == (4, 96, 96)
    assert torch.equal(image[count:], image[:-count])
    assert count == 1 or not torch.equal(image[0], image[1])


def test_statistics_are_those_of_all_frames_in_any_grouping():
    parts = [torch.randn(4, 8, n) * 5 - 30 for n in (10, 3, 40)]
    whole, first, second = DecibelStatistics(), DecibelStatistics(), DecibelStatistics()
    for part in parts:
        whole.add(part)
    first.add(parts[0])
    for part in parts[1:]:
        second.add(part)
    first.merge(second)
    mean, std = whole.mean_and_std()
    everything = torch.cat(parts, 2).flatten(1)
    assert torch.allclose(torch.tensor(mean), everything.mean(1), atol=1e-4)
    assert torch.allclose(torch.tensor(std), everything.std(1, correction=0), rtol=1e-3)
    assert first.mean_and_std() == (pytest.approx(mean), pytest.approx(std))
