"""What is drawn for a clip depends on (seed, epoch, clip) alone, and stays in the knobs' ranges."""

import dataclasses
import random

import numpy as np
import pytest

from stemgenre.augmentation import PLAIN, draw
from stemgenre.settings import AugmentSettings

ALWAYS = AugmentSettings(augment_probability=1.0)
FIELDS = {  # knob -> the field of a Draw that it switches
    "augment_pitch_shift": "semitones",
    "augment_time_stretch": "rate",
    "augment_add_noise": "noise_sigma",
    "augment_time_shift": "shift_seconds",
    "augment_time_masking": "time_mask",
    "augment_frequency_masking": "frequency_mask",
}


def draws(augment, count=2000, *, seed=42, epoch=1):
    return [draw(augment, seed=seed, epoch=epoch, clip_index=i) for i in range(count)]


def values(some, field):
    return np.array([getattr(one, field) for one in some])


def test_the_order_of_calls_does_not_matter():
    keys = [(seed, epoch, clip) for seed in (0, 7) for epoch in range(4) for clip in range(20)]
    results = []
    for order in (keys, random.Random(1).sample(keys, len(keys))):
        np.random.seed(len(results))  # noqa: NPY002  the global state has no part in it
        results.append(
            {key: draw(ALWAYS, seed=key[0], epoch=key[1], clip_index=key[2]) for key in order}
        )
    assert results[0] == results[1]
    assert len(set(results[0].values())) == len(keys)


def test_each_value_spans_its_range_and_never_leaves_it():
    some = draws(ALWAYS)
    for field, low, high in (
        ("semitones", -2, 2),
        ("rate", 0.8, 1.2),
        ("noise_sigma", 0.001, 0.01),
        ("shift_seconds", -0.2, 0.2),
    ):
        found = values(some, field)
        assert low <= found.min() < low + 0.02 * (high - low)
        assert high >= found.max() > high - 0.02 * (high - low)
        assert np.median(found) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


@pytest.mark.parametrize("field", ["time_mask", "frequency_mask"])
def test_masks_lie_within_the_axis_and_reach_both_ends(field):
    starts, widths = values(draws(ALWAYS), field).T
    assert 0 <= widths.min() < 0.01
    assert 0.09 < widths.max() <= 0.1
    assert 0 <= starts.min() < 0.01
    assert 0.99 < (starts + widths).max() <= 1


def test_the_augmentations_do_not_go_together():
    some = draws(AugmentSettings(augment_probability=0.5))
    plain = dataclasses.asdict(PLAIN)
    on = np.array([[getattr(one, f) != plain[f] for f in FIELDS.values()] for one in some])
    assert np.abs(np.corrcoef(on.T.astype(float)) - np.eye(len(FIELDS))).max() < 0.1
    assert len({one.noise_seed for one in some}) == len(some)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("field", FIELDS.values())
def test_each_is_drawn_as_often_as_the_knob_says(probability, field):
    some = draws(AugmentSettings(augment_probability=probability))
    share = np.mean([getattr(one, field) != getattr(PLAIN, field) for one in some])
    if probability in (0, 1):
        assert share == probability
    else:
        assert share == pytest.approx(probability, abs=0.04)  # four standard errors


@pytest.mark.parametrize(("knob", "field"), FIELDS.items())
def test_switching_one_off_leaves_the_others_as_they_were(knob, field):
    augment = AugmentSettings()
    without = draws(dataclasses.replace(augment, **{knob: False}), 200)
    for one, other in zip(draws(augment, 200), without, strict=True):
        assert other == dataclasses.replace(one, **{field: getattr(PLAIN, field)})


def test_all_switched_off_changes_nothing():
    off = dataclasses.replace(ALWAYS, **dict.fromkeys(FIELDS, False))
    for one in draws(off, 100):
        assert dataclasses.replace(one, noise_seed=PLAIN.noise_seed) == PLAIN


def test_seed_and_epoch_each_change_what_is_drawn():
    base, other_seed, other_epoch = draws(ALWAYS, 50), draws(ALWAYS, 50, seed=43), draws(
        ALWAYS, 50, epoch=2
    )  # fmt: skip
    for field in (*FIELDS.values(), "noise_seed"):
        assert not np.array_equal(values(base, field), values(other_seed, field))
        assert not np.array_equal(values(base, field), values(other_epoch, field))
