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
from stemgenre.settings import FeatureSettings, load_settings
from stemgenre.training import checkpoint
from stemgenre.training.inference import average_logits, load_models
from stemgenre.training.members import (
    MemberResult,
    combine,
    members_to_resume,
    plan_members,
    score,
)
from stemgenre.training.model import GenreNet

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


def test_a_checkpoint_of_any_fold_that_does_not_fit_is_refused_before_any_training(tmp_path):
    words = [f"OUTPUT_DIR={tmp_path}", "FOLDS=3", "RESUME_FROM_CHECKPOINT=True"]
    labels = {"label_names": GENRES, "label_ids": [0, 1, 2]}
    members = plan_members(load_settings(words), folds_of(table(9, 9, 9)), **labels)

    def save(member, **changes):
        content = {"run_id": "a", "run_signature": member.run_signature | changes}
        content |= {"train_state": {}, "weights": {}, "best_weights": {}}
        content["channel_stats"] = ([-40.0] * 4, [10.0] * 4)
        member.checkpoint_path.parent.mkdir(exist_ok=True)
        checkpoint.save(member.checkpoint_path, "checkpoint", content)

    for member in members[:2]:
        save(member)
    assert members_to_resume(members) == members[:2]
    save(members[1], SEED=7)
    with pytest.raises(UserError, match=r"fold_2.checkpoint\.pth does not fit this run"):
        members_to_resume(members)


def test_a_clips_prediction_is_the_mean_of_the_networks_that_held_it_out(tmp_path):
    settings = load_settings([f"OUTPUT_DIR={tmp_path}", "FOLDS=3", "SEEDS=2"])
    labels = {"label_names": GENRES, "label_ids": [0, 1, 2]}
    clips = table(5, 5, 5)
    members = plan_members(settings, folds_of(clips), **labels)
    assert [member.run_signature["SEED"] for member in members] == [42] * 3 + [43] * 3
    generator = torch.Generator().manual_seed(0)
    results = [
        MemberResult(
            member, checkpoint.TrainState(), torch.randn(len(member.valid), 3, generator=generator),
            torch.randn(4, 3, generator=generator),
        )
        for member in members
    ]  # fmt: skip
    found = combine(results, test_targets=np.full(4, -1))
    pd.testing.assert_frame_equal(found.valid.drop(columns="fold"), clips)
    for i, (fold, logits) in enumerate(zip(found.valid["fold"], found.valid_logits, strict=True)):
        held_out = [result for result in results if i in result.member.valid.index]
        assert {result.member.fold for result in held_out} == {fold} and len(held_out) == 2
        rows = [each.valid_logits[each.member.valid.index.get_loc(i)] for each in held_out]
        torch.testing.assert_close(logits.softmax(0), torch.stack(rows).softmax(1).mean(0))
    expected = torch.stack([result.test_logits for result in results]).softmax(2).mean(0)
    torch.testing.assert_close(found.test_logits.softmax(1), expected)
    correct = found.valid_logits.argmax(1).numpy() == clips["target"]
    assert found.valid_score.accuracy == pytest.approx(correct.mean())


def test_every_genre_counts_the_same_in_the_macro_f1():
    found = score(np.array([0, 0, 0, 1, -1]), torch.eye(2)[[0, 0, 0, 0, 1]])
    assert (found.clips, found.accuracy) == (4, 0.75)
    assert found.macro_f1 == pytest.approx((6 / 7 + 0) / 2)


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"features": {"sr": 11025}}, "SR differ"),
        ({"features": {"clip_seconds": 7.0}}, "CLIP_SECONDS differ"),
        ({"separation_model": "mdx"}, "SEPARATION_MODEL differ"),
        ({"label_ids": [1, 0]}, "genres differ"),
    ],
    ids=str,
)
def test_models_that_see_other_stems_or_windows_are_not_averaged(changes, named, tmp_path):
    features = FeatureSettings.from_config().model_dump()
    content = {
        "backbone": "cnn", "weights": GenreNet(2, backbone="cnn").state_dict(),
        "label_ids": [0, 1], "label_names": ["a", "b"], "separation_model": "htdemucs",
        "features": features, "channel_stats": ([0.0] * 4, [1.0] * 4),
    }  # fmt: skip
    paths = [tmp_path / name for name in ("one.pth", "same.pth", "other.pth")]
    other = content | changes | {"features": features | changes.get("features", {})}
    for path, model in zip(paths, (content, content, other), strict=True):
        checkpoint.save(path, "model", model)
    assert len(load_models(*paths[:2], device=torch.device("cpu"))) == 2
    with pytest.raises(UserError, match=rf"other\.pth cannot be averaged: their {named}"):
        load_models(*paths, device=torch.device("cpu"))


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
    out = run_training(small_settings("SEEDS=2", "EPOCHS=1", "LR=1e-30", "MIN_LR=0"))
    first, second = (
        checkpoint.load(out / f"seed_{k}" / "best_model.pth", "model")["weights"] for k in (1, 2)
    )
    for name in ("features.0.0.weight", "classifier.4.weight"):  # as they were initialised
        assert not torch.allclose(first[name], second[name]), name
    assert len(load_models(out / "best_model.pth", device=torch.device("cpu"))) == 2
    assert (out / "valid_predictions.csv").is_file()
    assert not (out / "oof_predictions.csv").exists()
