"""Predicting any file: what is printed and written, long files, kept stems, bad files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import ROOT, put_audio
from tiny_demucs import put_repo

import predict
from stemgenre import Classifier, Prediction
from stemgenre.data.audio import decode
from stemgenre.errors import Interrupted, UserError
from stemgenre.features.augmentation import NO_AUGMENT
from stemgenre.features.log_mel import Frontend
from stemgenre.features.windows import WindowCutter
from stemgenre.predict.inputs import find_inputs
from stemgenre.predict.outputs import ConsoleTable, draw_timeline, format_time
from stemgenre.predict.prediction import Segment
from stemgenre.runtime import MicroBatch, start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.separation.demucs_model import Separator
from stemgenre.separation.separate import read_chunks, separate_missing
from stemgenre.settings import FeatureSettings, SeparationSettings, load_settings
from stemgenre.training import checkpoint
from stemgenre.training.inference import compute_logits, load_models
from stemgenre.training.model import GenreNet
from stemgenre.training.stem_loader import StemLoader

GENRES = ["blues", "classical", "country", "disco", "hiphop"]
SR = 11025
FEATURES = FeatureSettings.from_config(
    sr=SR, n_fft=1024, hop_length=256, n_mels=32, clip_seconds=2.0, img_size=64
)
OVERLAP = 0.2  # strides of the tiny Demucs are then whole samples at SR
RATE = 4410  # Hz, of that Demucs


def tune(*, seconds, sr=SR, seed=0, channels=1):
    """Music of a kind that changes every second, so that windows differ: (samples, channels)."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sr)) / sr
    notes = 110 * 2 ** (rng.integers(0, 36, size=int(seconds) + 1) / 12)
    tones = np.sin(2 * np.pi * np.cumsum(notes[time.astype(int)]) / sr)
    noise = rng.normal(0, 0.2, size=len(time)) * rng.random(int(seconds) + 1)[time.astype(int)]
    gains = rng.uniform(0.5, 1, size=channels)
    return (0.3 * (tones + noise))[:, None] * gains


@pytest.fixture(scope="module")
def model(tmp_path_factory, fast_repo):
    """A best_model.pth as training writes it, whose output depends on its input."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    separator = Separator(
        SeparationSettings.from_config(separation_repo=str(fast_repo)), sample_rate=SR, device=cpu
    )
    wave = torch.from_numpy(tune(seconds=15, sr=RATE, channels=2).T.astype(np.float32))
    frontend = Frontend(FEATURES, device=cpu, channel_stats=([-30.0] * 4, [15.0] * 4))
    stems = separator([wave])[0][0].split(SR, dim=1)
    images = frontend(stems, [NO_AUGMENT] * len(stems))
    net = GenreNet(len(GENRES))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(images)
        logits = net.eval()(images)
        net.classifier[-1].bias -= logits.mean(0)
        for parameter in net.classifier[-1].parameters():
            parameter *= 1.5 / logits.std(0).mean()
    path = tmp_path_factory.mktemp("model") / "best_model.pth"
    labels = {"label_ids": [3, 1, 4, 15, 9], "label_names": GENRES}
    content = {"weights": net.state_dict(), "epoch": 1, "valid_accuracy": 0.5}
    checkpoint.save(path, "model", {**content, **labels, **frontend.state()})
    return path


@pytest.fixture
def separation(fast_repo):
    return SeparationSettings.from_config(
        separation_repo=str(fast_repo), separation_overlap=OVERLAP
    )


@pytest.fixture
def classifier(model, separation):
    return Classifier.load(model, device="cpu", separation=separation)


@pytest.fixture
def run(model, fast_repo, tmp_path, monkeypatch, capsys):
    """A function: what `python predict.py WORDS` prints, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    settings = [f"SEPARATION_REPO={fast_repo}", f"SEPARATION_OVERLAP={OVERLAP}", "DEVICE=cpu"]

    def words_to_output(*words):
        words = ["--model", str(model), *settings, *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["predict.py", *words])
        predict.main()
        return capsys.readouterr().out

    return words_to_output


def rows(output):
    """{file: genre} of the printed table, in its order."""
    header, *lines = output.splitlines()
    assert header.split() == ["file", "genre", "confidence", "runners-up"]
    return {line.split()[0]: line.split()[1] for line in lines}


def test_files_folders_and_patterns_of_every_form_are_found_and_named_in_natural_order(
    run, tmp_path
):
    (tmp_path / "album" / "cd1").mkdir(parents=True)
    soundfile.write("album/cd1/2.flac", tune(seconds=2), SR)
    soundfile.write("album/cd1/10.ogg", tune(seconds=3, sr=44100, channels=2), 44100)
    soundfile.write("album/cd1/3.mp3", tune(seconds=2, sr=22050), 22050)
    soundfile.write("album/1.au", tune(seconds=1, sr=8000), 8000)
    soundfile.write("other 1.wav", tune(seconds=2, channels=6), SR)
    Path("album/cover.jpg").write_bytes(b"no audio")
    output = run("other*", "album", "album/cd1/10.ogg", str(tmp_path / "album" / "cd*" / "3.*"))
    names = [line.split("  ")[0] for line in output.splitlines()[1:]]
    assert names == [
        "album/1.au", "album/cd1/2.flac", "album/cd1/3.mp3", "album/cd1/10.ogg", "other 1.wav",
    ]  # fmt: skip
    for line in output.splitlines()[1:]:
        percentages = [float(text) for text in re.findall(r"([\d.]+)%", line)]
        assert len(percentages) == 4
        assert percentages == sorted(percentages, reverse=True)


def test_patterns_reach_into_folders_and_know_suffixes_in_capitals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_audio(*map(Path, ("album 1/cd/a.WAV", "album 1/b.wav", "album 2/c.wav", "d.wav")))
    for pattern, expected in (
        ("**/*.WAV", ["album 1/cd/a.WAV"]),
        ("album*", ["album 1/b.wav", "album 1/cd/a.WAV", "album 2/c.wav"]),
        ("**/?.wav", ["album 1/b.wav", "album 2/c.wav", "d.wav"]),
    ):
        paths, failures = find_inputs([pattern])
        assert ([path.as_posix() for path in paths], failures) == (expected, [])


@pytest.mark.usefixtures("ffmpeg")
def test_what_only_ffmpeg_reads_is_predicted_like_the_same_sound_in_a_wav(classifier, tmp_path):
    soundfile.write(tmp_path / "a.wav", tune(seconds=12, sr=32000, channels=2), 32000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "alac"]
    subprocess.run([*command, tmp_path / "a.m4a"], check=True)
    wav, m4a = (classifier.predict(tmp_path / name) for name in ("a.wav", "a.m4a"))
    assert m4a == wav
    (tmp_path / "broken.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"broken\.m4a cannot be decoded"):
        classifier.predict(tmp_path / "broken.m4a")


def test_bad_files_are_named_and_the_others_are_predicted(run, tmp_path, capsys, caplog):
    soundfile.write(tmp_path / "1.wav", tune(seconds=2), SR)
    (tmp_path / "2.wav").write_text("these are words")
    soundfile.write(tmp_path / "3.wav", np.zeros(SR), SR)
    soundfile.write(tmp_path / "4.wav", tune(seconds=4), SR)
    data = (tmp_path / "4.wav").read_bytes()
    (tmp_path / "5.wav").write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "6.wav", tune(seconds=2, seed=6), SR)
    soundfile.write(tmp_path / "7.wav", tune(seconds=1 / SR), SR)
    out = tmp_path / "out" / "genres.json"
    with pytest.raises(UserError, match="files could not be predicted; they are named above"):
        run(tmp_path, tmp_path / "8.wav", "nothing/*.mp3", "--json", out)
    predicted = [Path(name).name for name in rows(capsys.readouterr().out)]
    assert predicted in (["1.wav", "4.wav", "6.wav"], ["1.wav", "4.wav", "5.wav", "6.wav"])
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    for words in (
        "2.wav cannot be decoded", "3.wav is silent", "7.wav is too short",
        "there is no file", "nothing/*.mp3 matches no audio file",
    ):  # fmt: skip
        assert sum(words in line for line in errors) == 1, (words, errors)
    assert not any("\n" in line for line in errors)
    content = json.loads(out.read_text())
    assert [Path(failure["file"]).name for failure in content["failed"]][:2] == ["8.wav", "*.mp3"]
    assert len(content["files"]) + len(content["failed"]) == 9


def test_csv_and_json_hold_every_genres_probability(run, tmp_path):
    soundfile.write("a.wav", tune(seconds=2), SR)
    soundfile.write("b.wav", tune(seconds=5, seed=1), SR)
    printed = rows(run("a.wav", "b.wav", "--csv", "out/g.csv", "--json", "out/g.json"))
    with (tmp_path / "out" / "g.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    content = json.loads((tmp_path / "out" / "g.json").read_text())
    assert content["failed"] == []
    assert content["label_ids"] == dict(zip(GENRES, [3, 1, 4, 15, 9], strict=True))
    for row, found in zip(table, content["files"], strict=True):
        assert row["file"] == found["file"]
        assert row["genre"] == found["genre"] == printed[row["file"]]
        assert int(row["label_id"]) == content["label_ids"][row["genre"]]
        assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert max(found["probabilities"], key=found["probabilities"].get) == found["genre"]
        for genre in GENRES:
            assert float(row[genre]) == pytest.approx(found["probabilities"][genre], abs=1e-6)
        assert found["confidence"] == found["probabilities"][found["genre"]]
    timeline = content["files"][1]["timeline"]
    times = [(segment["start"], segment["end"]) for segment in timeline]
    assert times == [(0, 2), (1, 3), (2, 4), (3, 5)]


def test_the_timeline_is_printed_and_drawn(run, tmp_path):
    soundfile.write("a.wav", tune(seconds=4.5), SR)
    soundfile.write("b.wav", tune(seconds=1), SR)
    lines = run("a.wav", "b.wav", "--timeline", "--out", "pictures").splitlines()
    times = [line[4:19] for line in lines if line.startswith("    ")]
    assert times == ["0:00.0 - 0:02.0", "0:01.0 - 0:03.0", "0:02.0 - 0:04.0", "0:02.5 - 0:04.5",
                     "0:00.0 - 0:01.0"]  # fmt: skip
    for name in ("a.png", "b.png"):
        picture = (tmp_path / "pictures" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"a.png", "b.png"}


def test_stems_are_kept_as_in_the_cache_and_found_again_without_demucs(
    run, model, tmp_path, monkeypatch, capsys
):
    for folder, seconds in (("x", 2), ("y", 15)):
        Path(folder).mkdir()
        soundfile.write(f"{folder}/same name.wav", tune(seconds=seconds), SR)
    soundfile.write("z.wav", tune(seconds=3), SR)
    first = run("x", "y", "z.wav", "--stems", "kept", "--json", "1.json")
    cache = StemCache("kept", model="htdemucs", sample_rate=SR)
    assert cache.is_current("z", tmp_path / "z.wav")
    assert cache.read("z").shape == (4, 3 * SR)
    assert cache.read("z").dtype == np.float16
    assert len(list(Path("kept").glob("*.npz"))) == 3
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    words = ["x", "y", "z.wav", "--stems", "kept", "--json", "2.json", "--model", str(model)]
    monkeypatch.setattr(
        sys, "argv", ["predict.py", *words, "SEPARATION_REPO=nowhere", "DEVICE=cpu"]
    )
    predict.main()
    assert capsys.readouterr().out == first
    once, again = (json.loads(Path(f"{number}.json").read_text())["files"] for number in (1, 2))
    for found, other in zip(once, again, strict=True):
        assert found["genre"] == other["genre"]
        assert found["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)


def test_stems_of_a_file_that_is_replaced_while_it_is_predicted_are_not_taken_for_the_new_ones(
    model, separation, tmp_path
):
    path, replaced = tmp_path / "a.wav", []
    soundfile.write(path, tune(seconds=2), SR)

    def replace(seconds):
        soundfile.write(path, tune(seconds=3), SR)
        replaced.append(path)

    stems = tmp_path / "kept"
    classifier = Classifier.load(model, device="cpu", separation=separation, stems=stems)
    classifier.predict(path, progress=replace)
    assert replaced
    assert not classifier.cache.is_current("a", path)


def test_a_file_whose_stems_cannot_be_kept_is_named(model, separation, tmp_path, monkeypatch):
    def without_memory(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(StemCache, "write", without_memory)
    soundfile.write(tmp_path / "a.wav", tune(seconds=2), SR)
    stems = tmp_path / "kept"
    classifier = Classifier.load(model, device="cpu", separation=separation, stems=stems)
    with pytest.raises(UserError, match=r"a\.wav cannot be stored: not enough memory"):
        classifier.predict(tmp_path / "a.wav")


def test_kept_stems_of_a_changed_file_or_a_damaged_entry_are_separated_again(run):
    soundfile.write("a.wav", tune(seconds=2), SR)
    run("a.wav", "--stems", "kept")
    soundfile.write("a.wav", tune(seconds=3), SR)
    other = run("a.wav", "--stems", "kept")
    assert other == run("a.wav")
    entry = Path("kept/a.npz")
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 255
    entry.write_bytes(data)
    assert run("a.wav", "--stems", "kept").splitlines()[-1] == other.splitlines()[-1]
    assert StemCache("kept", model="htdemucs", sample_rate=SR).read("a").shape == (4, 3 * SR)


def test_of_a_file_that_ends_with_an_error_no_stems_are_kept(model, separation, tmp_path):
    wave = tune(seconds=30, sr=RATE)
    wave[-10:] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    stems, parts = tmp_path / "kept", []
    classifier = Classifier.load(model, device="cpu", separation=separation, stems=stems)
    with pytest.raises(UserError, match=r"a\.wav holds samples that are NaN"):
        classifier.predict(tmp_path / "a.wav", progress=parts.append)
    assert sum(parts) > 10, "its beginning was separated"
    assert not list(stems.glob("*.npz"))


@pytest.mark.parametrize(("tta", "windows"), [(0, (1, 1, 1, 5)), (2, (1, 1, 1, 8))])
def test_a_clip_is_predicted_as_the_training_pipeline_predicts_it(
    tta, windows, model, separation, fast_repo, tmp_path
):
    overrides = [f"{name.upper()}={value}" for name, value in vars(FEATURES).items()]
    overrides += [f"SEPARATION_REPO={fast_repo}", f"SEPARATION_OVERLAP={OVERLAP}", "DEVICE=cpu"]
    settings = load_settings([*overrides, f"DATA_DIR={tmp_path}"])
    paths = [tmp_path / f"{number}.wav" for number in range(4)]
    lengths = (2, 2.15, 1.5, 5.3)  # s: a window, a little more, less, several windows
    for seconds, path in zip(lengths, paths, strict=True):
        soundfile.write(path, tune(seconds=seconds, sr=22050, seed=int(path.stem)), 22050)
    clips = pd.DataFrame({"clip": ["0", "1", "2", "3"], "path": paths})
    cache = StemCache(settings.cache_folder, model="htdemucs", sample_rate=SR)
    with start_runtime(settings.machine) as runtime:
        separate_missing(clips, cache, settings, runtime)
        loader = StemLoader(cache, threads=1, device=runtime.device, device_cache=0)
        (best,) = load_models(model, device=runtime.device)
        how = {"micro_batch": MicroBatch(2), "amp_dtype": None, "runtime": runtime, "tta": tta}
        logits = compute_logits(best.net, best.frontend, loader, clips, **how)
    expected = logits.softmax(1)
    assert (expected[0] - expected[1]).abs().max() > 0.01, "this model ignores its input"
    classifier = Classifier.load(model, device="cpu", separation=separation, tta=tta)
    for (_, result), row, count in zip(
        classifier.predict_all(paths), expected, windows, strict=True
    ):
        assert list(result.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert len(result.timeline) == count


def test_a_long_file_is_classified_in_windows_of_the_whole_files_stems(
    classifier, separation, tmp_path
):
    path = tmp_path / "long.wav"
    soundfile.write(path, tune(seconds=15.3, sr=RATE, channels=2), RATE)
    separator = Separator(separation, sample_rate=SR, device=torch.device("cpu"))
    assert len(list(read_chunks(path, separator))) == 2
    ((whole, _),) = separator([torch.from_numpy(decode(path)[0])])
    result = classifier.predict(path)
    starts = [segment.start for segment in result.timeline]
    assert starts == pytest.approx([*range(14), 13.3], abs=1 / SR)
    windows = [whole[:, round(s * SR) : round(s * SR) + 2 * SR].half() for s in starts]
    (member,) = classifier.models
    images = member.frontend(windows, [NO_AUGMENT] * len(windows))
    with torch.inference_mode():
        expected = member.net(images).softmax(1)
    found = torch.tensor([list(s.probabilities.values()) for s in result.timeline])
    assert (found - expected).abs().mean() < 0.02
    assert expected.std(0).max() > 0.05, "this model ignores its input"
    assert list(result.probabilities.values()) == pytest.approx(found.mean(0).tolist(), abs=1e-5)


def test_the_probabilities_of_several_models_are_averaged(model, separation, tmp_path):
    content = checkpoint.load(model, "model")
    content["weights"]["classifier.4.weight"] = content["weights"]["classifier.4.weight"].flip(0)
    other = tmp_path / "other.pth"
    checkpoint.save(other, "model", content)
    soundfile.write(tmp_path / "a.wav", tune(seconds=2), SR)
    first, second, both = (
        list(
            Classifier.load(*paths, device="cpu", separation=separation)
            .predict(tmp_path / "a.wav")
            .probabilities.values()
        )
        for paths in ([model], [other], [model, other])
    )
    assert first != pytest.approx(second, abs=0.01)
    assert both == pytest.approx(np.mean([first, second], axis=0).tolist(), abs=1e-5)


def test_a_file_whose_output_is_nan_is_named_and_the_others_are_predicted(
    model, separation, tmp_path
):
    content = checkpoint.load(model, "model")
    content["weights"]["classifier.4.bias"][1] = torch.nan
    checkpoint.save(tmp_path / "broken.pth", "model", content)
    soundfile.write(tmp_path / "a.wav", tune(seconds=1), SR)
    broken = Classifier.load(tmp_path / "broken.pth", device="cpu", separation=separation)
    with pytest.raises(UserError, match=r"the model's output for .*a\.wav is NaN or infinite"):
        broken.predict(tmp_path / "a.wav")


def test_cached_missing_and_new_files_mix_in_their_order(model, separation, tmp_path):
    paths = [tmp_path / f"{number}.wav" for number in range(6)]
    for number, path in enumerate(paths):
        if number != 3:
            soundfile.write(path, tune(seconds=1, seed=number), SR)
    keeping = Classifier.load(
        model, device="cpu", separation=separation, stems=tmp_path / "kept", use_amp=False
    )
    list(keeping.predict_all([paths[0], paths[1], paths[4]]))
    results = dict(keeping.predict_all(paths))
    assert list(results) == paths
    assert "there is no file" in str(results.pop(paths[3]))
    plain = Classifier.load(model, device="cpu", separation=separation)
    for path, expected in plain.predict_all(list(results)):
        assert results[path].genre == expected.genre
        assert results[path].probabilities == pytest.approx(expected.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(1, [0]), (100, [0]), (110, [0]), (112, [0, 12]), (150, [0, 50]), (203, [0, 50, 100]),
     (230, [0, 50, 100, 130])],
)  # fmt: skip
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_windows_reach_the_end_however_the_stems_arrive(samples, starts, block):
    stems = torch.arange(samples, dtype=torch.float32).expand(4, -1)
    cutter = WindowCutter(100)
    windows = [window for part in stems.split(block, dim=1) for window in cutter.add(part)]
    windows += cutter.finish()
    assert [start for start, _ in windows] == starts
    for start, window in windows:
        assert torch.equal(window, stems[:, start : start + 100])


def test_a_file_that_is_quiet_throughout_is_predicted_from_all_its_windows(classifier, tmp_path):
    soundfile.write(tmp_path / "quiet.wav", 1e-6 * tune(seconds=4), SR, subtype="FLOAT")
    timeline = classifier.predict(tmp_path / "quiet.wav").timeline
    assert [segment.start for segment in timeline] == [0, 1, 2]


def test_silence_in_a_song_is_left_out(classifier, tmp_path):
    wave = np.vstack([tune(seconds=4), np.zeros((9 * SR, 1))])
    soundfile.write(tmp_path / "hidden.wav", wave, SR)
    timeline = classifier.predict(tmp_path / "hidden.wav").timeline
    assert max(segment.start for segment in timeline) < 6.5, "what Demucs' window smears, no more"
    assert [segment.start for segment in timeline[:4]] == [0, 1, 2, 3]


def test_a_model_from_before_channels_sees_all_stems(classifier, model, separation, tmp_path):
    content = checkpoint.load(model, "model")
    del content["features"]["channels"]
    older = tmp_path / "older.pth"
    checkpoint.save(older, "model", content)
    soundfile.write(tmp_path / "a.wav", tune(seconds=2), SR)
    found = Classifier.load(older, device="cpu", separation=separation)
    assert found.predict(tmp_path / "a.wav") == classifier.predict(tmp_path / "a.wav")


@pytest.mark.parametrize("channels", ["vocals", "mix", "bass,vocals"])
def test_a_model_of_some_stems_depends_on_these_alone(channels, model, tmp_path):
    content = checkpoint.load(model, "model")
    content["features"] |= {"channels": channels, "num_channels": 4}  # as older models have it
    checkpoint.save(tmp_path / "some.pth", "model", content)
    cache = StemCache(tmp_path / "kept", model="htdemucs", sample_rate=SR)
    stems = np.stack([tune(seconds=6, seed=seed)[:, 0] for seed in range(4)]).astype(np.float32)
    stems[0, 4 * SR :] = 0  # no vocals any more
    others = stems * np.array([[1], [1], [1], [0]], np.float32)
    for name, wave in (("a", stems), ("b", others)):
        soundfile.write(tmp_path / f"{name}.wav", wave.sum(0), SR)
        cache.write(name, wave, tmp_path / f"{name}.wav")
    some = Classifier.load(tmp_path / "some.pth", device="cpu", stems=tmp_path / "kept")
    with_other, without = some.predict(tmp_path / "a.wav"), some.predict(tmp_path / "b.wav")
    assert (with_other.probabilities == without.probabilities) == (channels != "mix")
    starts = [0, 1, 2, 3] if channels == "vocals" else [0, 1, 2, 3, 4]
    assert [segment.start for segment in with_other.timeline] == starts


IN_A_PROGRAM = """
import ctypes, json, os, sys
import stemgenre
imported = sorted({"torch", "numpy", "demucs"} & set(sys.modules))
from stemgenre import Classifier
import numpy as np, soundfile, torch
from pathlib import Path
from stemgenre.features.log_mel import Frontend
from stemgenre.features.windows import WindowCutter
from stemgenre.settings import FeatureSettings, SeparationSettings
from stemgenre.training import checkpoint
from stemgenre.training.model import GenreNet

repo, folder, features, genres = json.loads(sys.argv[1])
features = FeatureSettings.from_config(**features)
frontend = Frontend(features, device=torch.device("cpu"), channel_stats=([-30.0] * 4, [15.0] * 4))
labels = {"label_ids": list(range(len(genres))), "label_names": genres}
net = {"weights": GenreNet(len(genres), backbone="cnn").state_dict(), "backbone": "cnn"}
scores = {"epoch": 1, "valid_accuracy": 0.5}
content = net | scores | labels | frontend.state()
checkpoint.save(Path(folder) / "model.pth", "model", content)
classifier = Classifier.load(
    folder + "/model.pth",
    device="cpu",
    separation=SeparationSettings.from_config(separation_repo=repo),
    stems=folder + "/kept",
    batch_size=1,
)
resident = []  # MB, after the separation of each chunk of the long file
def measure(_):
    ctypes.CDLL(None).malloc_trim(0)  # what is free does not count
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
measure = measure if Path("/proc/self/statm").exists() else None
genre = classifier.predict("song.wav").genre
wave, rate = soundfile.read("song.wav")
with soundfile.SoundFile(folder + "/long.wav", "w", rate, 1) as file:
    for _ in range(60):
        file.write(wave)
windows = len(classifier.predict(folder + "/long.wav", progress=measure).timeline)
print(json.dumps({"imported": imported, "genre": genre, "windows": windows, "MB": resident}))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(what a program of its own prints that uses the library, the folder that it ran in)."""
    folder, out = tmp_path_factory.mktemp("program"), tmp_path_factory.mktemp("out")
    repo = put_repo(out, samplerate=RATE, segment=2)
    soundfile.write(folder / "song.wav", tune(seconds=2), SR)
    features = FEATURES.model_dump() | {"sr": 44100, "hop_length": 1024, "clip_seconds": 30.0}
    arguments = json.dumps([str(repo), str(out), features, GENRES])
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROGRAM, arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_the_library_works_from_another_folder_and_importing_it_does_nothing(program):
    printed, folder = program
    assert printed["imported"] == []
    assert printed["genre"] in GENRES
    assert [path.name for path in folder.iterdir()] == ["song.wav"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux shows it")
def test_memory_does_not_grow_along_a_long_file(program):
    printed, _ = program
    assert printed["windows"] == 7
    resident = printed["MB"][1:]
    half = len(resident) // 2
    growth = min(resident[half:]) - min(resident[:half])
    assert growth < 15, f"{resident} MB; the stems of a minute are 21 MB in float16"


def test_the_separation_model_is_the_trained_ones_unless_another_is_named(
    model, separation, fast_repo, tmp_path
):
    content = checkpoint.load(model, "model")
    path = tmp_path / "best_model.pth"
    for recorded, chosen, used in (
        ("mine", None, "mine"), ("mine", "other", "other"),
        (None, None, "htdemucs"), ("synthesised", None, "htdemucs"),
    ):  # fmt: skip
        checkpoint.save(path, "model", {**content, "separation_model": recorded})
        loaded = Classifier.load(path, device="cpu", separation=separation, separation_model=chosen)
        assert loaded.separation.separation_model == used
        assert loaded.separation.separation_repo == str(fast_repo)


def test_a_prediction_is_frozen_and_ranks_the_genres():
    prediction = Prediction("b", 0.5, {"a": 0.2, "b": 0.5, "c": 0.3}, [])
    assert prediction.top_k(2) == [("b", 0.5), ("c", 0.3)]
    assert prediction.top_k() == [("b", 0.5), ("c", 0.3), ("a", 0.2)]
    with pytest.raises(AttributeError):
        prediction.genre = "a"


def test_stopping_keeps_what_is_done(run, monkeypatch):
    for number in range(4):
        soundfile.write(f"{number}.wav", tune(seconds=2, seed=number), SR)
    show = ConsoleTable.show

    def stopped(self, *arguments, **options):
        show(self, *arguments, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ConsoleTable, "show", stopped)
    with pytest.raises(Interrupted):
        run("*.wav", "MICRO_BATCH=1", "--csv", "genres.csv")
    assert Path("genres.csv").read_text().splitlines()[1].startswith("0.wav,")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to predict"),
        (["a.wav", "IMG_SIZE=300"], "IMG_SIZE is saved with the model"),
        (["a.wav", "EPOCHS=3"], "predict.py does not use EPOCHS"),
        (["a.wav", "SEPARATION_CACHE_DIR=x"], "predict.py does not use SEPARATION_CACHE_DIR"),
        (["a.wav", "SEPARATION_REPO=nowhere"], "SEPARATION_REPO=nowhere is not a folder"),
        (["a.wav", "--model", "nowhere.pth"], "there is no model nowhere.pth"),
        (["a.wav", "--csv", "/proc/nowhere/genres.csv"], "/proc/nowhere cannot be written"),
        (["a.wav", "--stems", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_what_stops_all_files_is_one_line_with_the_way_out(
    words, message, model, fast_repo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tune(seconds=1), SR)
    overrides = [f"SEPARATION_REPO={fast_repo}", "DEVICE=cpu"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *overrides, "--model", str(model), *words])
    with pytest.raises(UserError) as error:
        predict.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["b.wav", "--csv", "a.wav"], "a.wav exists and is no table of predict.py's"),
        (["b.wav", "--json", "a.wav"], "a.wav exists and is no table of predict.py's"),
        (["b.wav", "--csv", "link.wav"], "link.wav exists"),
        (["b.wav", "--csv", "model.pth", "--model", "model.pth"], "model.pth exists"),
        (["b.wav", "--csv", "train_master.csv"], "train_master.csv exists"),
        (["b.wav", "--csv", "x.csv", "--json", "x.csv"], "--csv and --json are the same file"),
        (["b.wav", "--csv", "new", "--json", "./y/../new"], "--csv and --json are the same file"),
        (["b.wav", "--csv", "."], ". is a folder; name a file in it"),
        (["b.wav", "--csv", "timeline/b.png", "--timeline"], "timeline/b.png is where this run"),
        (["b.wav", "--json", "y/../t/b.png", "--timeline", "--out", "t"], "b.png is where this"),
        (["b.wav", "--csv", "kept/b.npz", "--stems", "kept"], "kept/b.npz is where this run may"),
    ],
)
def test_an_output_never_overwrites_another_file(
    words, said, model, fast_repo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "b.wav"):
        soundfile.write(name, tune(seconds=1), SR)
    shutil.copy(model, "model.pth")
    Path("train_master.csv").write_text("file_name,label_id\n")
    Path("link.wav").symlink_to("a.wav")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    overrides = [f"SEPARATION_REPO={fast_repo}", "DEVICE=cpu", "--model", str(model)]
    monkeypatch.setattr(sys, "argv", ["predict.py", *overrides, *words])
    with pytest.raises(UserError, match=re.escape(said)):
        predict.main()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.parametrize("words", [["gone.wav"], ["a.wav", "SEPARATION_REPO=gone"]])
def test_a_prediction_of_nothing_leaves_the_tables_of_an_earlier_one(run, words):
    soundfile.write("a.wav", tune(seconds=1), SR)
    tables = ("--csv", "t.csv", "--json", "t.json")
    run("a.wav", *tables)
    before = [Path(name).read_bytes() for name in tables[1::2]]
    with pytest.raises(UserError):
        run(*words, *tables)
    assert [Path(name).read_bytes() for name in tables[1::2]] == before


def test_the_tables_of_an_earlier_prediction_are_replaced(run):
    soundfile.write("a.wav", tune(seconds=1), SR)
    soundfile.write("b.wav", tune(seconds=1, seed=1), SR)
    Path("t.csv").touch()
    Path("real.json").write_text("")
    Path("t.json").symlink_to("real.json")
    for name in ("a.wav", "b.wav"):
        run(name, "--csv", "t.csv", "--json", "t.json")
    assert Path("t.csv").read_text().splitlines()[1].startswith("b.wav,")
    assert json.loads(Path("real.json").read_text())["files"][0]["file"] == "b.wav"
    assert Path("t.json").is_symlink()


def test_files_that_vanish_or_lead_nowhere_are_named_and_the_others_are_predicted(
    run, tmp_path, monkeypatch, capsys, caplog
):
    for name in ("x/a.wav", "y/a.wav", "y/b.wav", "y/c.wav", "z.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(name, tune(seconds=1, seed=len(name)), SR)
    Path("y/z.wav").symlink_to("nowhere")
    find = predict.find_inputs

    def found(words):
        paths = find(words)
        Path("x/a.wav").unlink()
        return paths

    monkeypatch.setattr(predict, "find_inputs", found)
    show = ConsoleTable.show

    def vanish(self, *arguments, **options):
        show(self, *arguments, **options)
        Path("y/c.wav").unlink(missing_ok=True)

    monkeypatch.setattr(ConsoleTable, "show", vanish)
    words = ("--stems", "kept", "--timeline", "--json", "out.json", "MICRO_BATCH=1")
    with pytest.raises(UserError, match="files could not be predicted"):
        run("x/a.wav", "y", "z.wav", *words)
    content = json.loads(Path("out.json").read_text())
    done, failed = ([row["file"] for row in content[key]] for key in ("files", "failed"))
    assert set(done) >= {"y/a.wav", "y/b.wav", "z.wav"}
    assert {"x/a.wav", "y/z.wav"} <= set(failed)
    assert len(done) + len(failed) == 6


def test_a_stop_is_obeyed_while_files_only_fail(run, monkeypatch):
    for number in range(20):
        Path(f"{number}.wav").write_text("no sound")
    seen = []

    def error(text, *arguments):
        seen.append(text)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(predict.log, "error", error)
    with pytest.raises(Interrupted):
        run("*.wav")
    assert len(seen) == 1


def test_names_of_any_bytes_and_with_dollars_are_written_and_drawn(run, tmp_path):
    Path("$tex_{$ 曲.wav").touch()
    names = ["$tex_{$ 曲.wav", "$\\frac$.wav", os.fsdecode(b"\xe9\x93.wav"), "a\nb\x1b[2J.wav"]
    for name in names:
        soundfile.write("x.wav", tune(seconds=1, seed=len(name)), SR)
        Path("x.wav").rename(name)
    output = run(*names, "--timeline", "--csv", "t.csv", "--json", "t.json", "--stems", "kept")
    assert "\x1b" not in output
    assert len(json.loads(Path("t.json").read_text(encoding="utf-8"))["files"]) == 4
    assert len(list(Path("timeline").iterdir())) == 4


@pytest.mark.filterwarnings("error:Glyph")
def test_genres_of_any_characters_are_drawn(tmp_path):
    probabilities = {"$x_{$": 0.5, "R&B $$": 0.3, "曲\udce9": 0.2}
    segment = Segment(0, 1, "$x_{$", 0.5, probabilities)
    draw_timeline(tmp_path / "x.png", "$", Prediction("$x_{$", 0.5, probabilities, [segment]))
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_the_picture_names_each_genres_area_and_times_it_by_the_windows(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **o: figures.append(figure) or save(figure, *a, **o)
    )
    probabilities = {"a": 0.2, "b": 0.5, "c": 0.3}
    timeline = [Segment(start, start + 2, "b", 0.5, probabilities) for start in (0, 1)]
    draw_timeline(tmp_path / "x.png", "x", Prediction("b", 0.5, probabilities, timeline))
    (axes,) = figures[0].axes
    bottom = 0
    for genre, area in zip("bca", axes.collections, strict=True):
        points = area.get_paths()[0].vertices
        assert area.get_label() == genre
        assert points[:, 1].min() == pytest.approx(bottom)
        assert points[:, 1].max() == pytest.approx(bottom := bottom + probabilities[genre])
        assert sorted(set(points[:, 0])) == [0, 1, 2, 3]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["a", "c", "b"], "from top to bottom as the areas lie"


def test_a_row_names_the_genre_and_the_three_that_follow_it(capsys):
    probabilities = {"a": 0.15, "b": 0.4, "c": 0.3, "d": 0.05, "e": 0.1}
    table = ConsoleTable([Path("x.wav")], [*probabilities])
    table.show(Path("x.wav"), Prediction("b", 0.4, probabilities, []), timeline=False)
    row = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(row.split()) == "x.wav b 40.0% c 30.0%, a 15.0%, e 10.0%"


def test_times_are_in_minutes_and_seconds():
    times = {0: "0:00.0", 65.04: "1:05.0", 599.96: "10:00.0", 7384.5: "123:04.5"}
    assert {seconds: format_time(seconds) for seconds in times} == times


def test_a_path_with_an_equals_sign_is_a_file(run):
    soundfile.write("SONG=1.wav", tune(seconds=1), SR)
    Path("DIR=x").mkdir()
    soundfile.write("DIR=x/a.wav", tune(seconds=1), SR)
    assert list(rows(run("./SONG=1.wav", "./DIR=x"))) == ["DIR=x/a.wav", "SONG=1.wav"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "x\ny", ""])
def test_the_separation_model_of_a_model_file_is_a_name(model, tmp_path, name):
    content = checkpoint.load(model, "model")
    path = tmp_path / "best_model.pth"
    for value in (name, ["htdemucs"], 7):
        checkpoint.save(path, "model", {**content, "separation_model": value})
        with pytest.raises(UserError, match=r"best_model\.pth .* separation_model") as caught:
            Classifier.load(path, device="cpu")
        assert "\n" not in str(caught.value)
