"""train.py --download-only: both models are fetched, and where they lie is said."""

import kill_points
import pytest
import torch
from helpers import tiny_backbone

from stemgenre.downloads import download_models
from stemgenre.errors import UserError
from stemgenre.settings import load_settings


def test_the_files_of_both_models_are_named(tiny_repo, tmp_path, caplog):
    caplog.set_level("INFO", logger="stemgenre")
    weights = tmp_path / "weights.pth"
    torch.save(tiny_backbone("efficientnet_b3", 0.2).state_dict(), weights)
    words = [f"SEPARATION_REPO={tiny_repo}", f"WEIGHTS_FILE={weights}"]
    paths = download_models(load_settings(words))
    assert paths == [tiny_repo / "htdemucs.yaml", tiny_repo / "0123abcd.safetensors", weights]
    assert all(str(path) in caplog.text for path in paths)


def test_a_model_that_cannot_be_loaded_is_the_message_of_a_run(tiny_repo, tmp_path):
    with pytest.raises(UserError, match="holds no htdemucs.safetensors"):
        download_models(load_settings([f"SEPARATION_REPO={tmp_path}"]))
    words = [f"SEPARATION_REPO={tiny_repo}", f"WEIGHTS_FILE={tmp_path / 'none.pth'}"]
    with pytest.raises(UserError, match="WEIGHTS_FILE: .*none.pth"):
        download_models(load_settings(words))


def test_a_run_that_needs_none_says_so_without_data(tmp_path):
    words = ["CHANNELS=mix", "PRETRAINED=False", "FREEZE_STAGES=0", f"DATA_DIR={tmp_path / 'no'}"]
    code, output = kill_points.run(["--download-only", *words])
    assert code == 0, output
    assert output.splitlines() == [
        "CHANNELS=mix needs no Demucs model",
        "PRETRAINED=False needs no ImageNet weights",
    ]
