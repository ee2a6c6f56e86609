"""The network takes any channels, trains what it should, never silently starts from scratch."""

import functools
import signal
import sys

import pytest
import torch
from helpers import FULL_BACKBONE, assert_same_run, run_results, run_training
from safetensors.torch import save_file
from torch import nn

from stemgenre.errors import Interrupted, UserError
from stemgenre.files import sha256
from stemgenre.setting_checks import BACKBONES
from stemgenre.settings import FeatureSettings, ModelSettings, load_settings
from stemgenre.training import checkpoint, model
from stemgenre.training.backbones import check_backbone, torchvision_weights, widen
from stemgenre.training.inference import load_models
from stemgenre.training.model import GenreNet, build_model, to_sync_batchnorm
from stemgenre.training.trainer import Trainer

B3 = torchvision_weights("efficientnet_b3")
FAMILIES = ("cnn", "convnext_tiny", "efficientnet_v2_s", "mobilenet_v2", "mobilenet_v3_small")
TIMM = ("timm/resnet10t", "timm/convnext_atto", "timm/efficientnet_b0")


def network(backbone="efficientnet_b3", **changes):
    options = {"freeze_stages": 3, "frozen_batchnorm": "adapt"} | changes
    torch.manual_seed(0)
    return GenreNet(10, backbone=backbone, **options)


def train_step(net, *, channels=4):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net.train()(torch.randn(4, channels, 64, 96)).square().sum().backward()
    optimizer.step()


@pytest.fixture(params=TIMM)
def timm_backbone(request):
    pytest.importorskip("timm")
    return request.param


def test_the_network_is_efficientnet_b3(full_backbone):
    net = network()
    assert sum(p.numel() for p in net.features.parameters()) == 10_696_232 + 40 * 9
    assert net.classifier[1].in_features == 1536
    assert net.eval()(torch.randn(1, 4, 64, 64)).shape == (1, 10)


def test_a_seed_gives_the_initial_weights_it_has_always_given(full_backbone):
    net = build_model(ModelSettings.from_config(pretrained=False), num_classes=10, seed=42)
    first = net.state_dict()["features.0.0.weight"][0, :, 1, 1].tolist()
    last = net.state_dict()["classifier.4.weight"][0, :2].tolist()
    assert first == pytest.approx([0.02262781, -0.05220541, 0.00399772, -0.00852663], rel=1e-4)
    assert last == pytest.approx([-0.03954681, 0.03180095], rel=1e-4)


def test_logits_not_probabilities_for_each_class():
    logits = network().eval()(torch.randn(3, 4, 64, 64))
    assert logits.shape == (3, 10)
    assert not torch.allclose(logits.sum(1), torch.ones(3))


def test_further_channels_start_as_the_mean_of_the_first_three():
    old = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    new = widen(old, in_channels=6)
    assert torch.equal(new.weight[:, :3], old.weight)
    assert torch.equal(new.weight[:, 3:], old.weight.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    images = torch.randn(1, 3, 16, 16)
    assert torch.allclose(new(nn.functional.pad(images, (0, 0, 0, 0, 0, 3))), old(images))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_with_fewer_channels_a_grey_image_gives_the_same_response(channels):
    old = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    new = widen(old, in_channels=channels)
    grey = torch.randn(1, 1, 16, 16)
    expected = old(grey.expand(1, 3, 16, 16))
    assert torch.allclose(new(grey.expand(1, channels, 16, 16)), expected, atol=1e-5)


def assert_only_the_rest_learns(net, frozen):
    """A step moves the head and the stages after the first `frozen`, and BatchNorm's statistics."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stages = [{id(weight) for weight in stage} for stage in net.stages]
    train_step(net)
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    moved_ids = {id(net.get_parameter(name)) for name in moved}
    assert [bool(stage & moved_ids) for stage in stages] == [
        number >= frozen for number in range(len(stages))
    ]
    assert any(name.startswith("classifier") for name in moved)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_mean"):
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("stages", "backbone"), [(0, "tiny_backbone"), (6, "full_backbone"), (9, "tiny_backbone")]
)
def test_frozen_stages_keep_their_weights_and_the_rest_learns(stages, backbone, request):
    request.getfixturevalue(backbone)
    net = network(freeze_stages=stages)
    assert len(net.stages) == 9
    assert_only_the_rest_learns(net, stages)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_networks_of_each_family_are_frozen_by_stages(backbone):
    assert_only_the_rest_learns(network(backbone), 3)


def test_networks_of_timm_are_frozen_by_stages(timm_backbone):
    assert_only_the_rest_learns(network(timm_backbone), 3)


@pytest.mark.parametrize("backbone", ["efficientnet_b3", "cnn", "mobilenet_v3_small"])
def test_the_first_convolution_alone_can_be_trained_below_frozen_stages(backbone):
    net = network(backbone, train_first_conv=True, in_channels=5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train_step(net, channels=5)
    moved = [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]
    stage_1_to_3 = [n for n in moved if n.startswith(("features.0", "features.1.", "features.2."))]
    assert len(stage_1_to_3) == 1
    assert net.get_parameter(stage_1_to_3[0]).shape[1] == 5


@pytest.mark.parametrize("backbone", ["efficientnet_b3", "cnn"])
@pytest.mark.parametrize(("mode", "moves"), [("adapt", True), ("fixed", False)])
def test_frozen_batchnorm_follows_the_images_or_stays(backbone, mode, moves):
    net = network(backbone, frozen_batchnorm=mode)
    statistics = next(b for name, b in net.named_buffers() if name.endswith("running_mean"))
    before = statistics.clone()
    train_step(net)
    assert torch.equal(statistics, before) != moves
    after = statistics.clone()
    net.eval()(torch.randn(4, 4, 64, 64))
    assert torch.equal(statistics, after)


def test_more_frozen_stages_than_there_are_is_refused_with_their_number():
    with pytest.raises(UserError, match="FREEZE_STAGES=6, but cnn has 5 stages; use 0 to 5"):
        network("cnn", freeze_stages=6)


def test_convnext_keeps_the_normalisation_after_its_pooling(tmp_path):
    torch.manual_seed(1)
    pretrained = FULL_BACKBONE("convnext_tiny", 0.1)
    nn.init.normal_(pretrained.classifier[0].weight)
    torch.save(pretrained.state_dict(), tmp_path / "mine.pth")
    settings = ModelSettings.from_config(
        backbone="convnext_tiny", weights_file=str(tmp_path / "mine.pth")
    )
    net = build_model(settings, num_classes=10, in_channels=3, seed=0).eval()
    pretrained.classifier[2] = nn.Identity()
    images = torch.randn(2, 3, 64, 96)
    expected = pretrained.eval()(images)
    assert torch.allclose(net.avgpool(net.features(images)).flatten(1), expected, atol=1e-5)


# What is saved


def saved_model(path, net, channels, **content):
    features = FeatureSettings.from_config(channels=channels)
    count = len(features.channel_names)
    content = {
        "weights": net.state_dict(),
        "label_ids": list(range(10)),
        "label_names": list("abcdefghij"),
        "features": features.model_dump(),
        "channel_stats": ([-40.0] * count, [10.0] * count),
    } | content
    checkpoint.save(path, "model", content)
    return path


def assert_loads_as(path, net, channels):
    images = torch.randn(2, channels, 64, 96)
    (loaded,) = load_models(path, device=torch.device("cpu"))
    loaded = loaded.net
    with torch.no_grad():
        assert torch.equal(loaded(images), net.eval().to(memory_format=torch.channels_last)(images))


@pytest.mark.parametrize("backbone", ["cnn", "mobilenet_v3_small"])
def test_a_saved_model_is_loaded_as_the_network_it_was(backbone, tmp_path):
    net = network(backbone, in_channels=2)
    train_step(net, channels=2)
    path = saved_model(tmp_path / "best_model.pth", net, "mix,drums", backbone=backbone)
    assert_loads_as(path, net, 2)


def test_a_saved_model_of_timms_is_loaded_as_the_network_it_was(timm_backbone, tmp_path):
    net = network(timm_backbone, in_channels=1)
    train_step(net, channels=1)
    path = saved_model(tmp_path / "best_model.pth", net, "mix", backbone=timm_backbone)
    assert_loads_as(path, net, 1)


def test_an_older_model_that_names_no_backbone_is_efficientnet_b3(tmp_path):
    net = network()
    path = saved_model(tmp_path / "best_model.pth", net, "vocals,drums,bass,other")
    assert_loads_as(path, net, 4)


@pytest.mark.parametrize(
    "backbone", ["resnet99", "timm/local-dir:/tmp", "timm/hf-hub:a/b", "timm/../x", 7, ["cnn"]]
)
def test_a_saved_model_of_an_unknown_network_is_refused(backbone, tmp_path):
    path = saved_model(tmp_path / "best_model.pth", network("cnn"), "mix", backbone=backbone)
    with pytest.raises(UserError, match=r"best_model\.pth does not hold a complete model"):
        load_models(path, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "options",
    [("BACKBONE=cnn", "CHANNELS=mix,drums"), ("TRAIN_FIRST_CONV=True", "FREEZE_STAGES=6")],
)
def test_a_run_on_another_network_is_resumed_as_the_same_run(
    options, small_settings, tmp_path, monkeypatch
):
    expected = run_training(small_settings(*options, f"OUTPUT_DIR={tmp_path / 'whole'}"))
    steps = []

    def stop_once(trainer, step):
        steps.append(step)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "on_step", stop_once)
    with pytest.raises(Interrupted):
        run_training(small_settings(*options))
    with pytest.raises(UserError, match="in the checkpoint, "):
        run_training(small_settings("RESUME_FROM_CHECKPOINT=True", *options[1:]))
    resumed = small_settings("RESUME_FROM_CHECKPOINT=True", *options)
    assert_same_run(run_training(resumed), run_results(expected))
    assert len(steps) == 6, "no step is done twice"


# Which networks there are


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("efficientnet_b9", "did you mean efficientnet_b"),
        ("EfficientNet_B3", "did you mean efficientnet_b3"),
        ("convnext", "convnext_"),
        ("vit_b_16", "not a sequence of stages; use one of cnn, "),
        ("swin_t", "timm/NAME"),
        ("resnet50", "timm/NAME"),
    ],
)
def test_an_unknown_backbone_is_refused_with_what_there_is(name, answer):
    with pytest.raises(UserError, match=f"BACKBONE='{name}'.*{answer}") as error:
        load_settings([f"BACKBONE={name}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["PRETRAINED=True", "FREEZE_STAGES=0"], ["PRETRAINED=False"]])
def test_the_small_network_has_no_weights_to_start_from_or_to_freeze(words):
    with pytest.raises(UserError, match="PRETRAINED=False FREEZE_STAGES=0"):
        load_settings(["BACKBONE=cnn", *words])


def test_random_weights_that_are_never_trained_are_warned_of_once(caplog):
    model._warn_of_frozen_random_weights.cache_clear()
    for _ in range(2):
        build_model(
            ModelSettings.from_config(pretrained=False, freeze_stages=2), num_classes=2, seed=0
        )
    assert caplog.text.count("PRETRAINED=False: the weights of 2 frozen stages are random") == 1


def test_without_timm_its_networks_are_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="BACKBONE=timm/resnet10t needs timm: pip install timm"):
        network("timm/resnet10t")
    check_backbone("cnn")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("timm/resnet51", "did you mean timm/resnet"),
        ("timm/resnet10t.nonsense", r"use one of timm/resnet10t\."),
        ("timm/hf-hub:timm/resnet10t", "not a network of timm's"),
        ("timm/vit_tiny_patch16_224", "use a convolutional network"),
    ],
)
def test_a_network_that_timm_has_not_or_for_one_size_is_refused(name, answer):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=answer) as error:
        network(name)
    assert "\n" not in str(error.value)


def test_batchnorm_over_all_ranks_keeps_the_activation_in_timms():
    pytest.importorskip("timm")
    net = network("timm/efficientnet_b0", freeze_stages=0).eval()
    images = torch.randn(2, 4, 64, 64)
    expected, names = net(images), list(net.state_dict())
    net = to_sync_batchnorm(net).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in net.modules())
    assert list(net.state_dict()) == names
    assert torch.allclose(net(images), expected, atol=1e-6)


# ImageNet weights


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory):
    """A function: torchvision's network, and a file of its weights as the download would be."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def save(name):
        torch.manual_seed(1)
        net = FULL_BACKBONE(name, 0.2)
        torch.save(net.state_dict(), folder / name)
        path = folder / f"{name}-{sha256(folder / name)[:8]}.pth"
        return net, (folder / name).rename(path)

    return save


def assert_starts_from(net, pretrained):
    assert torch.equal(net.features[0][0].weight[:, :3], pretrained.features[0][0].weight)
    last = pretrained.features[-1].state_dict()
    assert all(torch.equal(net.features[-1].state_dict()[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("name", "suffix"), [("efficientnet_b3", ".pth"), ("mobilenet_v3_small", ".safetensors")]
)
def test_weights_come_from_weights_file(name, suffix, imagenet_like, full_backbone):
    pretrained, path = imagenet_like(name)
    if suffix == ".safetensors":
        path = path.with_name("mine.safetensors")
        save_file(pretrained.state_dict(), path)
    settings = ModelSettings.from_config(backbone=name, weights_file=str(path))
    assert_starts_from(build_model(settings, num_classes=10, seed=0), pretrained)


@pytest.mark.parametrize("name", ["efficientnet_b3", "mobilenet_v3_small"])
def test_weights_come_from_the_download_folder(
    name, imagenet_like, full_backbone, tmp_path, monkeypatch
):
    pretrained, path = imagenet_like(name)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / path.name).symlink_to(path)
    monkeypatch.setattr(torchvision_weights(name).value, "url", f"http://127.0.0.1:9/{path.name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = ModelSettings.from_config(backbone=name)
    assert_starts_from(build_model(settings, num_classes=10, seed=0), pretrained)


def test_each_network_of_torchvision_has_weights():
    names = [torchvision_weights(name).url.rsplit("/", 1)[1] for name in BACKBONES if name != "cnn"]
    assert len(set(names)) == len(BACKBONES) - 1
    assert B3.url.endswith("/efficientnet_b3_rwightman-b3899882.pth"), "config.py names it"


def test_weights_that_cannot_be_loaded_stop_the_run_and_name_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(B3.value, "url", "http://127.0.0.1:9/efficientnet_b3-b3899882.pth")
    with pytest.raises(UserError) as error:
        build_model(ModelSettings.from_config(), num_classes=10, seed=0)
    for way in ("WEIGHTS_FILE", "TORCH_HOME", "PRETRAINED=False", str(tmp_path)):
        assert way in str(error.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_weights_file_that_is_none_is_refused(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif path.suffix == ".pth":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    else:
        save_file({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=name) as error:
        build_model(ModelSettings.from_config(weights_file=str(path)), num_classes=10, seed=0)
    assert "\n" not in str(error.value)


def test_weights_of_timm_come_from_weights_file(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    pretrained = timm.create_model("resnet10t")  # with its ImageNet classifier
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pth"):
        (save_file if path.suffix == ".safetensors" else torch.save)(pretrained.state_dict(), path)
        settings = ModelSettings.from_config(
            backbone="timm/resnet10t", weights_file=str(path), freeze_stages=0
        )
        net = build_model(settings, num_classes=10, seed=0)
        assert torch.equal(net.features.conv1[0].weight[:, :3], pretrained.conv1[0].weight)
        assert torch.equal(net.features.layer4[0].conv1.weight, pretrained.layer4[0].conv1.weight)
    settings = ModelSettings.from_config(
        backbone="timm/resnet14t", weights_file=str(path), freeze_stages=0
    )
    with pytest.raises(UserError, match=r"model\.pth does not hold timm/resnet14t") as error:
        build_model(settings, num_classes=10, seed=0)
    assert "\n" not in str(error.value)


def test_without_the_hub_weights_of_timm_name_the_ways_out(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = ModelSettings.from_config(backbone="timm/resnet10t", freeze_stages=0)
    with pytest.raises(UserError, match="resnet10t") as error:
        build_model(settings, num_classes=10, seed=0)
    for way in ("WEIGHTS_FILE", "model.safetensors", "PRETRAINED=False"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


def test_from_scratch_the_seed_decides_the_weights():
    settings = ModelSettings.from_config(pretrained=False)
    weights = [
        build_model(settings, num_classes=4, seed=seed).features[0][0].weight for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
