"""A checkpoint comes back as it was saved, or is refused by name; nothing in it is run."""

import logging
import os
import re

import pandas as pd
import pytest
import torch
from helpers import run_with_full_disk

from stemgenre.errors import UserError
from stemgenre.settings import CONFIG_FILE, load_settings, read_settings_file
from stemgenre.training import checkpoint

CONTENT = {
    "weights": {"layer.weight": torch.arange(200.0).reshape(10, 20), "empty": torch.zeros(0)},
    "half": torch.ones(3, dtype=torch.bfloat16),
    "plain": {"epoch": 3, "loss": 0.25, "names": ["a", "ロック"], "none": None, "pair": (1, 2)},
}
SIGNATURE = {"SEED": 42, "IMG_SIZE": 600, "labels": {"blues": 0}, "training clips": ["a", "b"]}


@pytest.fixture
def path(tmp_path):
    """A saved checkpoint."""
    checkpoint.save(tmp_path / "checkpoint.pth", "checkpoint", CONTENT)
    return tmp_path / "checkpoint.pth"


def equal(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def refusal(path, kind="checkpoint"):
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, kind)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_was_saved_comes_back(path):
    loaded = checkpoint.load(path, "checkpoint")
    assert equal({key: loaded[key] for key in CONTENT}, CONTENT)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]


def test_a_missing_file_is_named(tmp_path):
    assert "there is no checkpoint" in refusal(tmp_path / "none.pth")
    assert "there is no model" in refusal(tmp_path / "none.pth", kind="model")
    assert "is a folder; name the model's file in it" in refusal(tmp_path, kind="model")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a checkpoint", b"\x80\x02}q\x00.", bytes(5000)], ids=repr
)
def test_a_file_of_another_type_is_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    assert "cannot be read as a checkpoint" in refusal(tmp_path / "x.pth")


def test_a_truncated_file_is_refused(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        assert "cannot be read" in refusal(path)


def test_a_damaged_file_is_refused_or_reads_the_same(path):
    whole = path.read_bytes()
    refused = 0
    for offset in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x55
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path, "checkpoint")
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert equal({key: loaded[key] for key in CONTENT}, CONTENT), f"byte {offset}"
    assert refused


def test_a_tensor_that_is_marked_as_a_folder_is_refused(path):
    """torch.load would give the memory that it finds in its place."""
    data = bytearray(path.read_bytes())
    names = [found.start() for found in re.finditer(rb"checkpoint/data/\d|archive/data/\d", data)]
    entry = data.rindex(b"PK\x01\x02", 0, names[-1])  # the last tensor's in the directory
    data[entry + 38] |= 0x10
    path.write_bytes(data)
    assert "is a folder" in refusal(path)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, as_zip):
    marker, file = tmp_path / "it ran", tmp_path / "x.pth"
    content = {"format": checkpoint.FORMAT, "kind": "checkpoint", "x": Payload(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    refusal(file)
    assert not marker.exists()
    if as_zip:
        torch.load(file, weights_only=False)  # it would have
        assert marker.exists()


def test_another_kind_or_a_newer_format_is_refused(path, tmp_path):
    assert "is not a model" in refusal(path, kind="model")
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pth")
    assert "is not a checkpoint" in refusal(tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "is not a checkpoint" in refusal(tmp_path / "list.pth")
    newer = checkpoint.FORMAT + 1
    torch.save({"kind": "checkpoint", "format": newer}, tmp_path / "newer.pth")
    assert f"format {newer}" in refusal(tmp_path / "newer.pth")


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(path):
    before = path.read_bytes()
    code = (
        "import sys, torch\n"
        "from stemgenre.training import checkpoint\n"
        "checkpoint.save(sys.argv[1], 'checkpoint', {'weights': torch.zeros(100_000)})\n"
    )
    done = run_with_full_disk(code, path)
    assert "UserError" in done.stderr
    assert "checkpoint.pth cannot be written" in done.stderr
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SEED": 7}, ["SEED: 42 in the checkpoint, 7 here"]),
        ({"IMG_SIZE": 300, "SEED": 7}, ["IMG_SIZE: 600", "SEED: 42"]),
        ({"labels": {"rock": 0}}, ["labels: 1 in the checkpoint, 1 here, not the same"]),
        (
            {"training clips": ["a", "b", "c"]},
            ["training clips: 2 in the checkpoint, 3 here, not the same"],
        ),
        ({"NEW": 1}, ["NEW: None in the checkpoint, 1 here"]),
    ],
)
def test_what_differs_from_the_run_is_listed(change, said):
    with pytest.raises(UserError) as caught:
        checkpoint.check_signature("x.pth", SIGNATURE, SIGNATURE | change)
    lines = str(caught.value).splitlines()
    assert "x.pth" in lines[0]
    assert "RESUME_FROM_CHECKPOINT=False" in lines[-1]
    assert len(lines) == 2 + len(change)
    for words in said:
        assert words in str(caught.value)


def test_the_same_signature_fits():
    checkpoint.check_signature("x.pth", SIGNATURE, dict(reversed(SIGNATURE.items())))


def test_a_setting_that_is_newer_than_the_checkpoint_was_at_its_default():
    default = read_settings_file(CONFIG_FILE)["CHANNELS"]
    checkpoint.check_signature("x.pth", SIGNATURE, SIGNATURE | {"CHANNELS": default})
    with pytest.raises(UserError, match="CHANNELS: vocals,drums,bass,other in the .*, mix here"):
        checkpoint.check_signature("x.pth", SIGNATURE, SIGNATURE | {"CHANNELS": "mix"})


def settings(folder, *overrides):
    return load_settings([f"OUTPUT_DIR={folder}", *overrides])


@pytest.mark.parametrize(
    "word",
    [
        "SEED=7", "TEST_SIZE=0.2", "BATCH_SIZE=7", "FREEZE_STAGES=3", "TRAIN_FIRST_CONV=True",
        "FROZEN_BATCHNORM=fixed", "BACKBONE=efficientnet_b0", "LR_DECAY_PER_STAGE=0.5",
        "EMA_DECAY=0.9", "SEPARATION_MODEL=htdemucs_ft", "IMG_SIZE=96", "CHANNELS=drums",
        "CLIP_SECONDS=7", "DB_REFERENCE=stem",
    ],
)  # fmt: skip
def test_a_run_with_another_setting_of_its_data_or_network_does_not_resume(word, tmp_path):
    clips = pd.DataFrame({"clip": ["a", "b"], "target": [0, 1]})
    saved, current = (
        checkpoint.run_signature(
            settings(tmp_path, *words), clips, label_names=["x", "y"], label_ids=[0, 1]
        )
        for words in ((), (word,))
    )
    checkpoint.check_signature("x.pth", saved, saved)
    with pytest.raises(UserError, match="x.pth does not fit this run"):
        checkpoint.check_signature("x.pth", saved, current)


def test_a_run_on_other_clips_or_labels_does_not_resume(tmp_path):
    def signature(clips=("a", "b"), names=("x", "y"), ids=(0, 1), targets=None, soft=None):
        table = pd.DataFrame({"clip": clips, "target": targets or [clip == "b" for clip in clips]})
        table = table.assign(soft_target=[soft, None]) if soft else table
        return checkpoint.run_signature(
            settings(tmp_path), table, label_names=list(names), label_ids=list(ids)
        )

    saved = signature()
    checkpoint.check_signature("x.pth", saved, signature(clips=("b", "a")))
    for other in (
        signature(clips=("a", "c")), signature(names=("y", "x")), signature(ids=(0, 2)),
        signature(targets=[1, 1]), signature(soft=[0.9, 0.1]),
    ):  # fmt: skip
        with pytest.raises(UserError, match="x.pth does not fit this run"):
            checkpoint.check_signature("x.pth", saved, other)
    del saved[checkpoint.TARGETS]  # as in an older checkpoint
    checkpoint.check_signature("x.pth", saved, signature(targets=[1, 1]))


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*checkpoint\.pth"):
        checkpoint.load_resume_checkpoint(
            settings(tmp_path, "RESUME_FROM_CHECKPOINT=True"), SIGNATURE
        )


def test_resuming_gives_the_checkpoint_if_it_fits(tmp_path):
    content = CONTENT | {"run_signature": SIGNATURE, "run_id": "", "best_weights": {}}
    content |= {"train_state": {}, "channel_stats": ([-40.0] * 4, [10.0] * 4)}
    checkpoint.save(tmp_path / "checkpoint.pth", "checkpoint", content)
    resume = settings(tmp_path, "RESUME_FROM_CHECKPOINT=True")
    assert equal(
        checkpoint.load_resume_checkpoint(resume, SIGNATURE)["weights"], CONTENT["weights"]
    )
    with pytest.raises(UserError, match="SEED"):
        checkpoint.load_resume_checkpoint(resume, SIGNATURE | {"SEED": 7})


@pytest.mark.parametrize(
    "stats", [None, [], "loud", ([0.0] * 3, [1.0] * 3), ([0.0] * 4,) * 3, ([float("nan")] * 4,) * 2]
)
def test_channel_statistics_of_another_form_are_no_checkpoint(tmp_path, stats):
    content = CONTENT | {"run_signature": SIGNATURE, "run_id": "", "best_weights": {}}
    content |= {"train_state": {}, "channel_stats": stats}
    checkpoint.save(tmp_path / "checkpoint.pth", "checkpoint", content)
    resume = settings(tmp_path, "RESUME_FROM_CHECKPOINT=True")
    with pytest.raises(UserError, match=r"checkpoint\.pth is not a complete checkpoint"):
        checkpoint.load_resume_checkpoint(resume, SIGNATURE)


ROW = {"epoch": 1, "valid_accuracy": 0.5, "seconds": 1.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"epoch": -1},
        {"epoch": 1.0, "history": [ROW]},
        {"epoch": 1},
        {"epoch": 1, "history": [ROW], "best_epoch": 2},
        {"epoch": 1, "history": (ROW,)},
        {"epoch": 1, "history": [{"epoch": 1}]},
        {"epoch": 1, "history": [ROW | {"valid_accuracy": "0.5"}]},
        {"epoch": 1, "history": {}},
        {"step": 2},
        {"step": 2, "sums": {"values": [1.0], "seconds": 1.0}},
        {"step": 2, "sums": {"values": [1.0, 2.0, None], "seconds": 1.0}},
        {"sums": {"values": [1.0, 2.0, 3.0], "seconds": 1.0}},
        {"best_loss": "low"},
        {"epoch": 1, "history": [ROW], "best_epoch": 0},
    ],
)
def test_how_far_a_run_has_come_is_checked(fields):
    with pytest.raises(checkpoint.MALFORMED):
        checkpoint.TrainState(**fields).check()


def test_what_a_run_saves_of_how_far_it_has_come_is_accepted():
    checkpoint.TrainState().check()
    checkpoint.TrainState(
        epoch=1,
        step=3,
        sums={"values": [1.0, 2.0, 3.0], "seconds": 1.0},
        history=[ROW],
        best_epoch=1,
    ).check()


@pytest.mark.parametrize("run_id", [None, 7, ["a", "b"], torch.zeros(2)])
def test_a_run_id_that_is_no_name_is_no_checkpoint(tmp_path, run_id):
    content = CONTENT | {"run_signature": SIGNATURE, "run_id": run_id, "best_weights": {}}
    content |= {"train_state": {}, "channel_stats": ([-40.0] * 4, [10.0] * 4)}
    checkpoint.save(tmp_path / "checkpoint.pth", "checkpoint", content)
    with pytest.raises(UserError, match=r"checkpoint\.pth is not a complete checkpoint"):
        checkpoint.load_resume_checkpoint(
            settings(tmp_path, "RESUME_FROM_CHECKPOINT=True"), SIGNATURE
        )


@pytest.mark.parametrize("version", [None, "3", torch.zeros(2), [1]])
def test_a_format_that_is_no_number_is_refused(tmp_path, version):
    torch.save({"kind": "checkpoint", "format": version}, tmp_path / "x.pth")
    assert "is not a checkpoint of this program" in refusal(tmp_path / "x.pth")


def test_starting_from_scratch_puts_an_earlier_runs_checkpoint_aside_and_says_so(path, caplog):
    content = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        checkpoint.set_aside(path)
    assert not path.exists()
    assert path.with_name("checkpoint.older.pth").read_bytes() == content
    assert str(path.with_name("checkpoint.older.pth")) in caplog.text
    assert "RESUME_FROM_CHECKPOINT=True" in caplog.text
    assert checkpoint.load_resume_checkpoint(settings(path.parent), SIGNATURE) is None


def test_a_run_that_is_stopped_in_its_first_epoch_takes_no_other_ones_place(path, caplog):
    """As one is, that was begun by mistake: without RESUME_FROM_CHECKPOINT=True."""
    content, older = path.read_bytes(), path.with_name("checkpoint.older.pth")
    for run_id in ("1", "2"):
        caplog.clear()
        checkpoint.set_aside(path)
        assert str(older) in caplog.text
        checkpoint.save_run(path, {"run_id": run_id}, first=True, keep_older=True)
        checkpoint.save_run(path, {"run_id": run_id}, first=False, keep_older=True)
    assert older.read_bytes() == content
    checkpoint.save_run(path, {"run_id": "2"}, first=False, keep_older=False)
    assert not older.exists()


def test_a_runs_first_checkpoint_replaces_all_of_an_earlier_run_and_later_ones_keep_one(path):
    previous, older = (path.with_name(f"checkpoint.{name}.pth") for name in ("previous", "older"))
    checkpoint.set_aside(path)
    previous.write_bytes(b"of an earlier run")
    checkpoint.save_run(path, {"run_id": "1"}, first=True, keep_older=False)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]
    first = path.read_bytes()
    checkpoint.save_run(path, {"run_id": "2"}, first=False, keep_older=False)
    assert previous.read_bytes() == first and not older.exists()
    assert checkpoint.load(path, "checkpoint")["run_id"] == "2"
