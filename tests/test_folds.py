"""Cross-validation: folds, seeds, their average, and a run that is killed in any of them."""

import json
import re
import shutil

import kill_points
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL_RUN, run_training

from stemgenre import Classifier
from stemgenre.data.split import split_folds
from stemgenre.errors import UserError
from stemgenre.report import report
from stemgenre.settings import load_settings
from stemgenre.training import checkpoint
from stemgenre.training.inference import average_logits, load_models

GENRES = ["blues", "jazz", "rock"]
FOLDS = ("FOLDS=3", "EPOCHS=1", "BATCH_SIZE=8")


def table(*counts):
    targets = np.repeat(np.arange(len(counts)), counts)
    return pd.DataFrame({"clip": [f"c{i}" for i in range(len(targets))], "target": targets})


def folds_of(clips, **options):
    return split_folds(clips, label_names=GENRES, **({"folds": 3, "seed": 0} | options))


def test_each_clip_is_held_out_once_and_every_fold_has_every_genre():
    clips = table(9, 30, 6)
    folds = folds_of(clips)
    assert sorted(i for _, valid in folds for i in valid.index) == list(range(45))
    for train, valid in folds:
        assert not set(train.index) & set(valid.index)
        assert valid["target"].value_counts().sort_index().tolist() == [3, 10, 2]
    again, other = folds_of(clips), folds_of(clips, seed=1)
    assert all(a[1].equals(b[1]) for a, b in zip(folds, again, strict=True))
    assert not all(a[1].equals(b[1]) for a, b in zip(folds, other, strict=True))


def test_groups_are_kept_whole():
    clips = table(20, 20, 20)
    groups = np.arange(60) // 4
    for train, valid in folds_of(clips, groups=groups):
        assert not set(groups[train.index]) & set(groups[valid.index])
        assert set(train["target"]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("counts", "groups", "message"),
    [
        ((5, 5, 2), None, "FOLDS=3 needs 3 clips or more in each genre, and rock has 2"),
        ((4, 4, 4), [0] * 4 + [1, 1, 2, 2] + [3, 3, 4, 4], "blues has 1"),
        ((2, 2), [0, 1, 0, 1], "FOLDS=3 is more than the 2 groups of clips"),
    ],
)
def test_too_few_clips_or_groups_are_named(counts, groups, message):
    with pytest.raises(UserError, match=message) as caught:
        folds_of(table(*counts), groups=None if groups is None else np.array(groups))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folds_run(small_data, tmp_path_factory):
    """The output folder of an undisturbed run with three folds."""
    out = tmp_path_factory.mktemp("folds")
    words = [*SMALL_RUN, *FOLDS, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "MAX_ERRORS", 1)  # of the four pages' pictures, most of the seconds
        return run_training(load_settings(words), with_report=True)


def test_the_page_of_all_folds_links_to_each_and_is_about_their_predictions(folds_run):
    page = folds_run / "report" / "index.html"
    text = page.read_text()
    links = re.findall(r'<a href="(.*?)">(fold_\d)</a>', text)
    assert [name for _, name in links] == ["fold_1", "fold_2", "fold_3"]
    for link, _ in links:
        assert "Most confident errors" in (page.parent / link).read_text()
    assert "not finished" not in text
    accuracy = json.loads((folds_run / "summary.json").read_text())["valid_accuracy"]
    assert f"{100 * accuracy:.1f} %" in text


def test_out_of_fold_and_test_predictions_are_those_of_the_folds(folds_run):
    summary = json.loads((folds_run / "summary.json").read_text())
    table = pd.read_csv(folds_run / "oof_predictions.csv")
    assert not table["file_name"].duplicated().any()
    assert table["fold"].value_counts().min() > 0
    assert sorted(table["fold"].unique()) == [1, 2, 3]
    accuracy = (table["label"] == table["predicted"]).mean()
    assert summary["valid_accuracy"] == pytest.approx(accuracy)
    low, high = summary["valid_interval"]
    assert low < accuracy < high or accuracy in (low, high)
    assert summary["networks"].keys() == {"fold_1", "fold_2", "fold_3"}
    assert summary["clips"]["valid"] == len(table)
    genres = pd.read_csv(folds_run / "classification_report.csv", index_col="genre")
    recall = (table["label"] == table["predicted"]).groupby(table["label"]).mean()
    assert genres["recall"].to_dict() == pytest.approx(recall.to_dict())


def test_the_model_of_all_folds_predicts_their_mean(folds_run):
    cpu = torch.device("cpu")
    together = load_models(folds_run / "best_model.pth", device=cpu)
    parts = [folds_run / f"fold_{k}" / "best_model.pth" for k in (1, 2, 3)]
    apart = load_models(*parts, device=cpu)
    assert len(together) == len(apart) == 3
    for member, other in zip(together, apart, strict=True):
        for name, tensor in member.net.state_dict().items():
            assert torch.equal(tensor, other.net.state_dict()[name])
    assert Classifier.load(folds_run / "best_model.pth", device="cpu").label_names == (
        together[0].label_names
    )


def test_models_of_other_genres_are_not_averaged(folds_run, tmp_path):
    content = checkpoint.load(folds_run / "fold_1" / "best_model.pth", "model")
    content["label_names"] = [name.upper() for name in content["label_names"]]
    checkpoint.save(tmp_path / "other.pth", "model", content)
    with pytest.raises(UserError, match=r"other\.pth cannot be averaged: their genres differ"):
        Classifier.load(folds_run / "best_model.pth", tmp_path / "other.pth", device="cpu")


def test_models_of_the_mix_and_of_stems_are_not_averaged(folds_run, tmp_path):
    content = checkpoint.load(folds_run / "fold_1" / "best_model.pth", "model")
    content["features"] |= {"channels": "mix", "num_channels": 4}  # which needs no stems
    checkpoint.save(tmp_path / "mix.pth", "model", content)
    with pytest.raises(UserError, match=r"mix\.pth cannot be averaged: their CHANNELS differ"):
        Classifier.load(folds_run / "best_model.pth", tmp_path / "mix.pth", device="cpu")


def test_the_mean_is_of_probabilities():
    logits = torch.randn(5, 3, 4)
    mean = logits.softmax(-1).mean(1)
    torch.testing.assert_close(average_logits(logits).softmax(-1), mean)
    assert torch.equal(average_logits(logits[:, :1]), logits[:, 0])


def test_a_run_that_is_killed_in_each_fold_and_resumed_is_the_same_run(
    folds_run, small_data, tmp_path
):
    out = tmp_path / "killed"
    words = [*SMALL_RUN, *FOLDS, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"]
    words += ["CHECKPOINT_MINUTES=1e-9"]
    resume = "RESUME_FROM_CHECKPOINT=True"
    assert kill_points.run(words, at="step", count=2)[0] == kill_points.KILLED
    assert not (out / "fold_2" / "checkpoint.pth").exists()
    for fold in (2, 3):
        code, output = kill_points.run([*words, resume], at="step", count=4)
        assert code == kill_points.KILLED, output
        assert (out / f"fold_{fold}" / "checkpoint.pth").exists()
    code, output = kill_points.run([*words, resume])
    assert code == 0, output
    for name in ("submit.csv", "test_probabilities.csv", "oof_predictions.csv"):
        assert (out / name).read_bytes() == (folds_run / name).read_bytes()


def test_a_fresh_run_of_folds_never_resumes_an_earlier_one(folds_run, small_data, tmp_path):
    out = tmp_path / "used"
    shutil.copytree(folds_run, out)
    words = [*SMALL_RUN, *FOLDS, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}", "LR=3e-3"]
    assert kill_points.run(words, at="measure")[0] == kill_points.KILLED
    code, output = kill_points.run([*words, "RESUME_FROM_CHECKPOINT=True"])
    assert code == 2
    assert "there is no checkpoint" in output


def test_seeds_differ_and_are_averaged(small_settings):
    out = run_training(small_settings("SEEDS=2", "EPOCHS=1"))
    first, second = (
        checkpoint.load(out / f"seed_{k}" / "best_model.pth", "model")["weights"] for k in (1, 2)
    )
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert len(load_models(out / "best_model.pth", device=torch.device("cpu"))) == 2
    assert (out / "valid_predictions.csv").is_file()
    assert not (out / "oof_predictions.csv").exists()
