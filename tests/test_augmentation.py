"""Augmentation parameters depend on (SEED, epoch, clip) alone and stay in the settings' ranges."""

import dataclasses
import random

import numpy as np
import pytest

from stemgenre.features.augmentation import NO_AUGMENT, sample_params
from stemgenre.settings import AugmentSettings

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
