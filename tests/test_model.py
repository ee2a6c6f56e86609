"""The network takes four channels, trains what it should, never silently starts from scratch."""

import pytest
import torch
from helpers import FULL_BACKBONE
from torch import nn

from stemgenre.errors import UserError
from stemgenre.files import sha256
from stemgenre.settings import ModelSettings
from stemgenre.training.model import WEIGHTS, GenreNet, build_model, widen


def network(**changes):
    options = {"freeze_stages": 6, "frozen_batchnorm": "adapt"} | changes
    torch.manual_seed(0)
    return GenreNet(10, **options)


def train_step(net):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net.train()(torch.randn(4, 4, 64, 64)).square().sum().backward()
    optimizer.step()


def test_the_network_is_efficientnet_b3(full_backbone):
    net = network()
    assert sum(p.numel() for p in net.features.parameters()) == 10_696_232 + 40 * 9
    assert net.classifier[1].in_features == 1536
    assert net.eval()(torch.randn(1, 4, 64, 64)).shape == (1, 10)


def test_logits_not_probabilities_for_each_class():
    logits = network().eval()(torch.randn(3, 4, 64, 64))
    assert logits.shape == (3, 10)
    assert not torch.allclose(logits.sum(1), torch.ones(3))


def test_the_fourth_channel_starts_as_the_mean_of_the_others():
    old = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    new = widen(old, in_channels=4)
    grey = torch.randn(1, 1, 16, 16)
    assert torch.allclose(new.weight[:, :3], old.weight)
    assert torch.allclose(new.weight[:, 3], old.weight.mean(1))
    zero = torch.zeros(1, 3, 16, 16)
    expected = old(grey.expand(1, 3, 16, 16)) / 3
    assert torch.allclose(new(torch.cat([zero, grey], 1)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "backbone"), [(0, "tiny_backbone"), (6, "full_backbone"), (9, "tiny_backbone")]
)
def test_frozen_stages_keep_their_weights_and_the_rest_learns(stages, backbone, request):
    request.getfixturevalue(backbone)
    net = network(freeze_stages=stages)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train_step(net)
    for name, parameter in net.named_parameters():
        frozen = name.startswith("features") and int(name.split(".")[1]) < stages
        if frozen:
            assert torch.equal(parameter, before[name]), name
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    assert any(name.startswith("classifier") for name in moved)
    assert any(name.startswith("features") for name in moved) == (stages < 9)


@pytest.mark.parametrize(("mode", "moves"), [("adapt", True), ("fixed", False)])
def test_frozen_batchnorm_follows_the_images_or_stays(mode, moves):
    net = network(frozen_batchnorm=mode)
    before = net.features[0][1].running_mean.clone()
    train_step(net)
    assert torch.equal(net.features[0][1].running_mean, before) != moves
    after = net.features[0][1].running_mean.clone()
    net.eval()(torch.randn(4, 4, 64, 64))
    assert torch.equal(net.features[0][1].running_mean, after)


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory):
    """EfficientNet-B3, and a file of its weights as the download would be."""
    torch.manual_seed(1)
    net = FULL_BACKBONE(0.2)
    path = tmp_path_factory.mktemp("weights") / "b3.pth"
    torch.save(net.state_dict(), path)
    return net, path.rename(path.with_name(f"efficientnet_b3-{sha256(path)[:8]}.pth"))


def assert_starts_from(net, pretrained):
    assert torch.equal(net.features[0][0].weight[:, :3], pretrained.features[0][0].weight)
    assert torch.equal(net.features[8][0].weight, pretrained.features[8][0].weight)


def test_weights_come_from_weights_file(imagenet_like, full_backbone):
    pretrained, path = imagenet_like
    net = build_model(ModelSettings.from_config(weights_file=str(path)), num_classes=10, seed=0)
    assert_starts_from(net, pretrained)


def test_weights_come_from_the_download_folder(imagenet_like, full_backbone, tmp_path, monkeypatch):
    pretrained, path = imagenet_like
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / path.name).symlink_to(path)
    monkeypatch.setattr(WEIGHTS.value, "url", f"http://127.0.0.1:9/{path.name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = build_model(ModelSettings.from_config(), num_classes=10, seed=0)
    assert_starts_from(net, pretrained)


def test_weights_that_cannot_be_loaded_stop_the_run_and_name_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(WEIGHTS.value, "url", "http://127.0.0.1:9/efficientnet_b3-b3899882.pth")
    with pytest.raises(UserError) as error:
        build_model(ModelSettings.from_config(), num_classes=10, seed=0)
    for way in ("WEIGHTS_FILE", "TORCH_HOME", "PRETRAINED=False", str(tmp_path)):
        assert way in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_weights_file_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"conv.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pth"):
        build_model(ModelSettings.from_config(weights_file=str(path)), num_classes=10, seed=0)


def test_from_scratch_the_seed_decides_the_weights():
    settings = ModelSettings.from_config(pretrained=False)
    weights = [
        build_model(settings, num_classes=4, seed=seed).features[0][0].weight for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
