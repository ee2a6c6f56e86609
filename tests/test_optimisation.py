"""Targets, mixup, learning rates and averaged weights are what they are by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from stemgenre.settings import ModelSettings
from stemgenre.training.model import build_model
from stemgenre.training.optimisation import (
    AveragedNet,
    WarmupCosineLR,
    balanced_weights,
    initial_state,
    mix_pairs,
    parameter_groups,
    target_probabilities,
)

CLIPS = pd.DataFrame({"target": [0, 0, 0, 2, 1, 0]})


def small_net(**changes):
    settings = ModelSettings.from_config(pretrained=False, freeze_stages=0, **changes)
    return build_model(settings, num_classes=3, seed=0)


def test_a_clip_without_soft_target_counts_for_its_genre_alone():
    probabilities = target_probabilities(CLIPS, num_classes=3)
    assert probabilities.dtype == torch.float32
    assert probabilities.tolist() == np.eye(3)[CLIPS["target"]].tolist()


@pytest.mark.parametrize("kind", [list, tuple, np.array])
@pytest.mark.parametrize("missing", [None, math.nan])
def test_soft_targets_replace_the_genre_of_their_clip_alone(kind, missing):
    soft = [missing] * 5 + [kind([0.5, 0.25, 0.25])]
    probabilities = target_probabilities(CLIPS.assign(soft_target=soft), num_classes=3)
    assert probabilities[5].tolist() == [0.5, 0.25, 0.25]
    assert torch.equal(probabilities[:5], target_probabilities(CLIPS, num_classes=3)[:5])


def test_balanced_weights_give_every_genre_the_same_sum_and_clips_a_mean_of_1():
    weights = balanced_weights(target_probabilities(CLIPS, num_classes=3))
    assert weights.tolist() == pytest.approx([6 / 12, 6 / 3, 6 / 3])
    assert weights[CLIPS["target"].tolist()].mean() == pytest.approx(1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 2.0])])
def test_indices_and_their_probabilities_have_the_same_loss(label_smoothing, weights):
    """On which one loss for both kinds of targets relies."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    loss = nn.CrossEntropyLoss(weights, label_smoothing=label_smoothing, reduction="sum")
    indices = torch.tensor(CLIPS["target"].tolist())
    probabilities = target_probabilities(CLIPS, num_classes=3)
    assert loss(logits, probabilities).item() == pytest.approx(loss(logits, indices).item())


def test_a_genre_without_clips_has_a_weight_that_is_a_number():
    weights = balanced_weights(target_probabilities(CLIPS, num_classes=4))
    assert weights.isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_step_is_adamws_own(fused):
    nets = [small_net() for _ in range(2)]
    for net, prepared in zip(nets, (False, True), strict=True):
        groups = parameter_groups(net, lr=0.1, decay=0.5)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.1, fused=fused)
        for number, parameter in enumerate(net.parameters()):
            parameter.grad = torch.full_like(parameter, number + 1.0)
        if prepared:
            optimizer.state.update(initial_state(optimizer))
        optimizer.step()
    one, other = (net.state_dict() for net in nets)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def batch():
    """Images (64, 4, 2, 2) whose values are their index, and one-hot targets (64, 64)."""
    return torch.arange(64.0)[:, None, None, None].expand(64, 4, 2, 2), torch.eye(64)


def test_mixup_mixes_targets_as_it_mixes_images(batch):
    images, targets = mix_pairs(*batch, alpha=0.4, seed=1)
    index = torch.arange(64.0)
    assert targets.sum(1).tolist() == pytest.approx([1] * 64)
    assert images[:, 0, 0, 0].tolist() == pytest.approx((targets @ index).tolist(), abs=1e-4)
    assert (images == images[:, :1, :1, :1]).all()
    partners = (targets > 0).sum(1)
    assert (partners <= 2).all()
    assert (partners == 2).float().mean() > 0.8
    assert (targets.diagonal() >= 0.5).all(), "its own target is the main one"
    assert targets.diagonal().unique().numel() > 50, "each image has its own proportion"


def test_mixup_depends_on_its_seed_alone(batch):
    torch.manual_seed(1)
    first = mix_pairs(*batch, alpha=0.4, seed=1)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, mix_pairs(*batch, alpha=0.4, seed=1)))
    assert not torch.equal(first[0], mix_pairs(*batch, alpha=0.4, seed=2)[0])
    assert batch[1].equal(torch.eye(64)), "the batch itself stays"


@pytest.mark.parametrize(("alpha", "mean"), [(0.1, 0.06), (1.0, 0.25), (50.0, 0.46)])
def test_a_larger_alpha_mixes_more_evenly(alpha, mean, batch):
    targets = torch.cat([mix_pairs(*batch, alpha=alpha, seed=seed)[1] for seed in range(20)])
    foreign = 1 - targets[targets.max(1).values < 1].max(1).values
    assert foreign.mean().item() == pytest.approx(mean, abs=0.02)


def learning_rates(scheduler, optimizer, epochs):
    """The rates of each epoch, one for each group."""
    rates = []
    for _ in range(epochs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def optimizer_of(*lrs):
    return torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def test_without_warm_up_the_schedule_is_the_cosine_to_the_last_bit():
    mine, plain = optimizer_of(2e-4), optimizer_of(2e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 50, eta_min=1e-6)
    warm = WarmupCosineLR(mine, 50, min_lr=1e-6)
    assert learning_rates(warm, mine, 50) == learning_rates(cosine, plain, 50)


def test_warm_up_rises_linearly_to_the_cosine_of_the_remaining_epochs():
    mine, plain = optimizer_of(2e-4), optimizer_of(2e-4)
    rates = learning_rates(WarmupCosineLR(mine, 13, warmup=3, min_lr=1e-6), mine, 13)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 10, eta_min=1e-6)
    expected = [[5e-5], [1e-4], [1.5e-4], *learning_rates(cosine, plain, 10)]
    assert np.array(rates) == pytest.approx(np.array(expected))


def test_groups_keep_their_proportion_to_the_end_of_the_schedule():
    optimizer = optimizer_of(1e-3, 1e-4, 1e-8)
    rates = learning_rates(WarmupCosineLR(optimizer, 9, warmup=2, min_lr=1e-6), optimizer, 9)
    rates = np.array(rates)
    assert rates / rates[:, :1] == pytest.approx(np.array([[1, 0.1, 1e-5]] * 9))
    assert rates[:, 0].min() < 1e-4


def test_without_decay_per_stage_there_is_one_group_of_all_that_is_trained():
    net = small_net()
    (group,) = parameter_groups(net, lr=1e-3, decay=1.0)
    assert group["lr"] == 1e-3
    assert list(map(id, group["params"])) == list(map(id, net.parameters()))


@pytest.mark.parametrize("frozen", [0, 6, 9])
def test_each_stage_learns_at_a_fraction_of_the_next_ones_rate(frozen):
    net = small_net().requires_grad_(True)
    net.features[:frozen].requires_grad_(False)
    groups = parameter_groups(net, lr=1e-3, decay=0.5)
    lr_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(lr_of)
    assert lr_of.keys() == {id(p) for p in net.parameters() if p.requires_grad}
    assert groups[0]["lr"] == 1e-3
    for parameter in net.classifier.parameters():
        assert lr_of[id(parameter)] == 1e-3
    for stage in range(frozen, 9):
        for parameter in net.features[stage].parameters():
            assert lr_of[id(parameter)] == pytest.approx(1e-3 * 0.5 ** (9 - stage))


def test_the_average_is_the_one_computed_by_hand():
    """Of weights and BatchNorm statistics, with the decay of few updates at first."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = AveragedNet(net, decay=0.5)
    generator = torch.Generator().manual_seed(0)
    decays = [0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]
    weight = mean = 0
    for decay in decays:
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(2, 1, 1, 1, generator=generator))
            net[1].running_mean.copy_(torch.randn(2, generator=generator))
            net[1].num_batches_tracked += 1
        average.update_parameters(net)
        weight = decay * weight + (1 - decay) * net[0].weight.detach()
        mean = decay * mean + (1 - decay) * net[1].running_mean
        assert torch.allclose(average.module[0].weight, weight)
        assert torch.allclose(average.module[1].running_mean, mean)
    assert average.module[1].num_batches_tracked == len(decays)
    assert not torch.allclose(average.module[0].weight, net[0].weight)


def test_weights_that_are_not_trained_stay_as_they_are_in_the_average():
    net = small_net()
    average = AveragedNet(net, decay=0.9)
    for _ in range(20):
        average.update_parameters(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], tensor), name
