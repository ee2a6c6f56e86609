"""Augmentation depends on (SEED, epoch, clip) alone and stays in the settings' ranges."""

import dataclasses
import random

import numpy as np
import pandas as pd
import pytest
import torch

from stemgenre.features.augmentation import (
    NO_AUGMENT,
    AugmentParams,
    sample_params,
    sample_swap,
    swap_stems,
)
from stemgenre.features.log_mel import Frontend
from stemgenre.separation.cache import MIX, StemCache
from stemgenre.settings import STEMS, AugmentSettings, FeatureSettings
from stemgenre.training.stem_loader import StemLoader, training_batches

ALWAYS = AugmentSettings.from_config(augment_probability=1.0)
FIELDS = {  # setting -> the field of AugmentParams that it switches on
    "augment_pitch_shift": "semitones",
    "augment_time_stretch": "rate",
    "augment_add_noise": "noise_db",
    "augment_time_shift": "shift_seconds",
    "augment_time_masking": "time_mask",
    "augment_frequency_masking": "frequency_mask",
}


def sample_many(augment, count=2000, *, seed=42, epoch=1):
    return [sample_params(augment, seed=seed, epoch=epoch, clip_index=i) for i in range(count)]


def field_values(samples, field):
    return np.array([getattr(params, field) for params in samples])


@pytest.fixture(scope="module")
def always():
    """2000 samples with every augmentation on."""
    return sample_many(ALWAYS)


def test_parameters_do_not_depend_on_the_order_of_calls():
    keys = [(seed, epoch, clip) for seed in (0, 7) for epoch in range(4) for clip in range(20)]
    results = []
    for order in (keys, random.Random(1).sample(keys, len(keys))):
        np.random.seed(len(results))  # noqa: NPY002  the global state must have no effect
        results.append(
            {
                key: sample_params(ALWAYS, seed=key[0], epoch=key[1], clip_index=key[2])
                for key in order
            }
        )
    assert results[0] == results[1]
    assert len(set(results[0].values())) == len(keys)


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("semitones", -2, 2),
        ("rate", 0.8, 1.2),
        ("noise_db", 30, 50),
        ("shift_seconds", -0.2, 0.2),
    ],
)
def test_values_are_uniform_in_the_settings_range(field, low, high, always):
    found = field_values(always, field)
    assert low <= found.min() < low + 0.02 * (high - low)
    assert high >= found.max() > high - 0.02 * (high - low)
    assert np.median(found) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


@pytest.mark.parametrize("field", ["time_mask", "frequency_mask"])
def test_masks_lie_within_the_axis_and_reach_both_ends(field, always):
    starts, widths = field_values(always, field).T
    assert 0 <= widths.min() < 0.01
    assert 0.09 < widths.max() <= 0.1
    assert 0 <= starts.min() < 0.01
    assert 0.99 < (starts + widths).max() <= 1


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_each_augmentation_is_applied_independently_with_the_set_probability(probability):
    samples = sample_many(AugmentSettings.from_config(augment_probability=probability))
    neutral = dataclasses.asdict(NO_AUGMENT)
    applied = np.array(
        [[getattr(params, f) != neutral[f] for f in FIELDS.values()] for params in samples], float
    )
    if probability in (0, 1):
        assert (applied == probability).all()
    else:
        assert applied.mean(0) == pytest.approx([probability] * 6, abs=0.04)  # four standard errors
        assert np.abs(np.corrcoef(applied.T) - np.eye(6)).max() < 0.1
    assert len({params.noise_seed for params in samples}) == len(samples)


@pytest.mark.parametrize(("setting", "field"), FIELDS.items())
def test_switching_one_augmentation_off_leaves_the_others_unchanged(setting, field):
    augment = AugmentSettings.from_config()
    without = sample_many(augment.model_copy(update={setting: False}), 200)
    for params, others in zip(sample_many(augment, 200), without, strict=True):
        assert others == dataclasses.replace(params, **{field: getattr(NO_AUGMENT, field)})


def test_with_all_switched_off_nothing_is_augmented():
    off = ALWAYS.model_copy(update=dict.fromkeys(FIELDS, False))
    for params in sample_many(off, 100):
        assert dataclasses.replace(params, noise_seed=NO_AUGMENT.noise_seed) == NO_AUGMENT


def test_another_seed_or_epoch_gives_other_parameters():
    base = sample_many(ALWAYS, 50)
    for other in (sample_many(ALWAYS, 50, seed=43), sample_many(ALWAYS, 50, epoch=2)):
        for field in (*FIELDS.values(), "noise_seed"):
            assert not np.array_equal(field_values(base, field), field_values(other, field))


def test_levers_leave_the_other_parameters_unchanged():
    on = AugmentSettings.from_config(stem_gain_db=6.0, stem_dropout=0.5, stem_swap=0.5)
    plain = {name: getattr(NO_AUGMENT, name) for name in ("stem_gains_db", "silent_stems")}
    for params, others in zip(
        sample_many(on, 200), sample_many(AugmentSettings.from_config(), 200), strict=True
    ):
        assert dataclasses.replace(params, **plain) == others


def test_gains_are_uniform_in_their_range_and_each_stems_own():
    gains = field_values(
        sample_many(ALWAYS.model_copy(update={"stem_gain_db": 6.0})), "stem_gains_db"
    )
    assert gains.shape == (2000, 4)
    assert -6 <= gains.min() < -5.9
    assert 5.9 < gains.max() <= 6
    assert np.abs(np.corrcoef(gains.T) - np.eye(4)).max() < 0.1


def test_gains_are_applied_with_the_set_probability():
    augment = AugmentSettings.from_config(augment_probability=0.3, stem_gain_db=6.0)
    gains = field_values(sample_many(augment), "stem_gains_db")
    assert (gains != 0).any(1).mean() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9, 1.0])
def test_dropout_never_silences_all_stems(probability):
    augment = AugmentSettings.from_config(stem_dropout=probability)
    silent = field_values(sample_many(augment), "silent_stems")
    assert not silent.all(1).any()
    kept = probability**4 / 4  # one of four stays
    assert silent.mean(0) == pytest.approx([probability - kept] * 4, abs=0.04)


SMALL = FeatureSettings.from_config(
    sr=11025, n_fft=1024, hop_length=256, n_mels=32, clip_seconds=1.0, img_size=64, num_channels=4
)


@pytest.fixture
def noise_stems():
    """Stems (4, 1 s) of noise, of equal loudness."""
    return 0.1 * torch.randn(4, SMALL.sr, generator=torch.Generator().manual_seed(0))


def log_mel(stems, params=NO_AUGMENT, **changes):
    features = SMALL.model_copy(update=changes)
    return Frontend(features, device=torch.device("cpu")).log_mel(stems, params)


def test_a_stem_with_a_gain_is_that_many_db_louder(noise_stems):
    params = AugmentParams(stem_gains_db=(0.0, -6.0, -12.0, 3.0))
    plain, louder = (log_mel(noise_stems, p, db_reference="clip") for p in (NO_AUGMENT, params))
    change = (louder - plain).mean((1, 2))
    assert (change - change[0]).tolist() == pytest.approx([0, -6, -12, 3], abs=0.01)


def test_the_mix_is_remixed(noise_stems):
    params = AugmentParams(stem_gains_db=(0.0, -6.0, -12.0, 3.0), silent_stems=(True, *[False] * 3))
    gains = torch.tensor([0, 10**-0.3, 10**-0.6, 10**0.15])
    by_hand = log_mel(gains[:, None] * noise_stems, channels="mix")
    assert torch.allclose(log_mel(noise_stems, params, channels="mix"), by_hand, atol=0.01)


def test_a_silent_stem_is_at_the_floor_and_the_others_stay(noise_stems):
    image = log_mel(noise_stems, AugmentParams(silent_stems=(False, True, False, True)))
    assert (image[[1, 3]] == -SMALL.top_db).all()
    assert torch.allclose(image[[0, 2]], log_mel(noise_stems)[[0, 2]], atol=12)
    assert (image[[0, 2]] > -SMALL.top_db).any()


@pytest.mark.parametrize(
    ("channels", "silent"),
    [("drums,bass", (False, True, True, False)), ("drums", (True, True, True, False))],
)
def test_dropout_leaves_something_of_the_channels_that_are_shown(channels, silent, noise_stems):
    params = AugmentParams(silent_stems=silent)
    shown = log_mel(noise_stems, params, channels=channels)
    assert torch.equal(shown, log_mel(noise_stems, channels=channels))


def test_dropout_does_not_leave_a_stem_that_is_silent_itself(noise_stems):
    noise_stems[0] *= 1e-3  # of an instrumental
    params = AugmentParams(silent_stems=(False, True, True, True))
    assert torch.equal(log_mel(noise_stems, params), log_mel(noise_stems))


def test_a_mix_by_itself_has_a_gain_and_no_dropout(noise_stems):
    mix = noise_stems.sum(0, keepdim=True)
    params = AugmentParams(stem_gains_db=(6.0, 0.0, 0.0, 0.0), silent_stems=(True, *[False] * 3))
    waves = mix[None].clone()
    Frontend(SMALL, device=torch.device("cpu")).remix(waves, [params])
    assert torch.allclose(waves[0], mix * 10**0.3)


def swap_of(row, augment, *, genre=range(0, 40, 4), seed=42, epoch=1):
    rows = np.array(genre)
    return sample_swap(augment, rows, row=row, seed=seed, epoch=epoch, clip_index=1000 + row)


def test_a_swap_takes_stems_of_another_clip_of_the_genre_and_never_all():
    augment = AugmentSettings.from_config(stem_swap=0.5)
    swaps = [swap_of(8, augment, epoch=epoch) for epoch in range(2000)]
    found = [swap for swap in swaps if swap]
    assert len(found) / 2000 == pytest.approx(1 - 0.5**4, abs=0.04)
    assert {swap.partner for swap in found} == set(range(0, 40, 4)) - {8}
    assert not any(all(swap.stems) for swap in found)
    assert swaps == [swap_of(8, augment, epoch=epoch) for epoch in range(2000)]


def test_a_clip_that_is_alone_in_its_genre_keeps_its_stems():
    assert swap_of(8, AugmentSettings.from_config(stem_swap=1.0), genre=[8]) is None


@pytest.mark.parametrize("samples", [50, 100, 150])
def test_swapped_stems_are_cut_or_padded_to_the_clip(samples):
    stems, partner = torch.ones(4, 100), 2 * torch.ones(4, samples)
    mixed = swap_stems(stems, partner, (False, True, True, False))
    assert mixed.shape == (4, 100)
    assert (mixed[[0, 3]] == 1).all()
    assert (mixed[1:3, :samples] == 2).all()
    assert (mixed[1:3, samples:] == 0).all()
    assert (stems == 1).all()


@pytest.fixture
def numbered_clips(tmp_path):
    """(loader, table) of 12 clips in 3 genres, whose stems' samples are clip + stem / 10."""
    cache = StemCache(tmp_path / "separated", model="synthesised", sample_rate=SMALL.sr)
    (tmp_path / "source").touch()
    for clip in range(12):
        stems = np.full((4, 1100), clip) + np.arange(4)[:, None] / 10
        cache.write(f"clip_{clip}", stems, tmp_path / "source")
    clips = pd.DataFrame({"clip": [f"clip_{i}" for i in range(12)], "target": [0, 1, 2] * 4})
    loader = StemLoader(cache, threads=2, device=torch.device("cpu"), device_cache=0.0)
    return loader, clips


def swapped_stems(loader, clips, batches, *, probability=0.5, epoch=1):
    """{row: its four samples} after the swaps of an epoch."""
    augment = ALWAYS.model_copy(update={"stem_swap": probability})
    batches = [np.array(batch) for batch in batches]
    rows = {}
    for batch, stems in training_batches(
        loader,
        clips,
        batches,
        section=lambda row, length: (0, length),
        augment=augment,
        seed=42,
        epoch=epoch,
    ):
        rows |= {int(i): waves[:, 0].tolist() for i, waves in zip(batch, stems, strict=True)}
    return rows


def test_a_mix_by_itself_is_not_swapped(tmp_path):
    cache = StemCache(tmp_path, model="none", sample_rate=SMALL.sr, waves=MIX)
    (tmp_path / "source").touch()
    for clip in range(6):
        cache.write(f"clip_{clip}", np.full((1, 1100), clip), tmp_path / "source")
    clips = pd.DataFrame({"clip": [f"clip_{i}" for i in range(6)], "target": 0})
    loader = StemLoader(cache, threads=2, device=torch.device("cpu"), device_cache=0.0)
    assert swapped_stems(loader, clips, [range(6)]) == {clip: [clip] for clip in range(6)}


def test_an_epoch_swaps_each_stem_for_the_same_one_of_the_same_genre(numbered_clips):
    found = swapped_stems(*numbered_clips, [range(12)])
    swapped = 0
    for row, samples in found.items():
        origins = [round(sample - stem / 10) for stem, sample in enumerate(samples)]
        assert {origin % 3 for origin in origins} == {row % 3}
        assert len(set(origins) | {row}) <= 2
        assert row in origins
        swapped += sum(origin != row for origin in origins)
    assert 10 < swapped < 38, "half of 48 stems"


def test_each_clip_has_its_own_stems_swapped_by_its_index_in_the_table(numbered_clips):
    loader, clips = numbered_clips

    def swapped(table):
        """{index of a clip: which of its stems are swapped}."""
        found = swapped_stems(loader, table, [range(12)])
        return {
            table.index[row]: tuple(
                round(sample - stem / 10) != table.index[row] for stem, sample in enumerate(samples)
            )
            for row, samples in found.items()
        }

    assert len(set(swapped(clips).values())) > 4, "of 15 choices"
    assert swapped(clips) == swapped(clips[::-1])


def test_swaps_do_not_depend_on_the_batches(numbered_clips):
    whole = swapped_stems(*numbered_clips, [range(12)])
    assert whole == swapped_stems(*numbered_clips, [[5, 3], [0, 1, 2, 4], [11, 10, 9, 8, 7, 6]])
    assert whole != swapped_stems(*numbered_clips, [range(12)], epoch=2)
    plain = swapped_stems(*numbered_clips, [range(12)], probability=0.0)
    assert plain == {
        row: pytest.approx([row + stem / 10 for stem in range(len(STEMS))], abs=0.01)
        for row in range(12)
    }
