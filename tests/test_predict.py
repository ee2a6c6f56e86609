"""Predicting any file: what is printed and written, long files, kept stems, bad files."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import TINY
from demucs.htdemucs import HTDemucs
from helpers import ROOT, run_python
from safetensors.torch import save_file

import config
import predict
from stemgenre import Classifier, Prediction, checkpoint, runtime
from stemgenre.augmentation import PLAIN
from stemgenre.cache import STEMS, CacheError, StemCache
from stemgenre.dataset import StemReader
from stemgenre.errors import Interrupted, UserError
from stemgenre.frontend import FrontEnd
from stemgenre.inference import load_best
from stemgenre.inference import predict as predict_clips
from stemgenre.model import GenreNet
from stemgenre.separation import Separator
from stemgenre.settings import FeatureSettings, SeparationSettings, load_settings
from stemgenre.spool import cached_blocks
from stemgenre.stems import separate_missing
from stemgenre.streaming import WindowCutter, kept_stems, read_pieces

GENRES = ["blues", "classical", "country", "disco", "hiphop"]
SR = 11025
FEATURES = FeatureSettings(
    sr=SR, n_fft=1024, hop_length=256, n_mels=32, clip_seconds=2.0, img_size=64
)
OVERLAP = 0.2  # strides of the tiny Demucs are then whole samples at SR


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
def model(tmp_path_factory, tiny_repo):
    """A best_model.pth as training writes it, whose answers depend on what it sees."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    separator = Separator(
        SeparationSettings(separation_repo=str(tiny_repo)), sample_rate=SR, device=cpu
    )
    wave = torch.from_numpy(tune(seconds=15, sr=44100, channels=2).T.astype(np.float32))
    frontend = FrontEnd(FEATURES, device=cpu, channels=([-30.0] * 4, [15.0] * 4))
    stems = separator([wave])[0].split(SR, dim=1)
    images = frontend(stems, [PLAIN] * len(stems))
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


@pytest.fixture(scope="module")
def fast_repo(tmp_path_factory):
    """The tiny Demucs at 4000 Hz: the same code on fewer samples, for long files."""
    torch.manual_seed(0)
    kind = {**TINY, "samplerate": 4000}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(kind)}
    state = {name: tensor.contiguous() for name, tensor in HTDemucs(**kind).state_dict().items()}
    folder = tmp_path_factory.mktemp("fast")
    save_file(state, folder / "0123abcd.safetensors", metadata=meta)
    (folder / "htdemucs.yaml").write_text("models: ['0123abcd']\n")
    return folder


@pytest.fixture
def separation(tiny_repo):
    return SeparationSettings(separation_repo=str(tiny_repo), separation_overlap=OVERLAP)


@pytest.fixture
def classifier(model, separation):
    return Classifier.load(model, device="cpu", separation=separation)


@pytest.fixture
def run(model, tiny_repo, tmp_path, monkeypatch, capsys):
    """A function: what `python predict.py WORDS` prints, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    knobs = [f"SEPARATION_REPO={tiny_repo}", f"SEPARATION_OVERLAP={OVERLAP}", "DEVICE=cpu"]

    def words_to_output(*words):
        words = ["--model", str(model), *map(str, words), *knobs]
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
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 4
        assert shares == sorted(shares, reverse=True)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="there is no ffmpeg")
def test_what_only_ffmpeg_reads_is_heard_like_the_same_sound_in_a_wav(classifier, tmp_path):
    soundfile.write(tmp_path / "a.wav", tune(seconds=25, sr=32000, channels=2), 32000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "alac"]
    subprocess.run([*command, tmp_path / "a.m4a"], check=True)
    wav, m4a = (classifier.predict(tmp_path / name) for name in ("a.wav", "a.m4a"))
    assert m4a == wav
    (tmp_path / "broken.m4a").write_bytes((tmp_path / "a.m4a").read_bytes()[:20000])
    with pytest.raises(UserError, match=r"broken\.m4a cannot be decoded"):
        classifier.predict(tmp_path / "broken.m4a")


def test_a_bad_file_is_named_the_others_go_on_and_the_exit_code_is_2(model, tiny_repo, tmp_path):
    soundfile.write(tmp_path / "1.wav", tune(seconds=2), SR)
    (tmp_path / "2.wav").write_text("these are words")
    soundfile.write(tmp_path / "3.wav", np.zeros(SR), SR)
    soundfile.write(tmp_path / "4.wav", tune(seconds=4), SR)
    data = (tmp_path / "4.wav").read_bytes()
    (tmp_path / "5.wav").write_bytes(data[: len(data) // 2])
    soundfile.write(tmp_path / "6.wav", tune(seconds=2, seed=6), SR)
    soundfile.write(tmp_path / "7.wav", tune(seconds=1 / SR), SR)
    knobs = [f"SEPARATION_REPO={tiny_repo}", "DEVICE=cpu"]
    out = tmp_path / "out" / "genres.json"
    done = run_python(
        "predict.py", tmp_path, tmp_path / "8.wav", "nothing/*.mp3",
        "--model", model, "--json", out, *knobs,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert [Path(name).name for name in rows(done.stdout)] == ["1.wav", "4.wav", "6.wav"] or done
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    for words in (
        "2.wav cannot be decoded", "3.wav is silent", "7.wav is too short",
        "8.wav is not there", "nothing/*.mp3 matches no audio file",
    ):  # fmt: skip
        assert sum(words in line for line in errors) == 1, (words, done.stderr)
    assert "could not be predicted" in errors[-1]
    assert "Traceback" not in done.stderr
    content = json.loads(out.read_text())
    assert [Path(one["file"]).name for one in content["failed"]][:2] == ["8.wav", "*.mp3"]
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
    for row, one in zip(table, content["files"], strict=True):
        assert row["file"] == one["file"]
        assert row["genre"] == one["genre"] == printed[row["file"]]
        assert int(row["label_id"]) == content["label_ids"][row["genre"]]
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert max(one["probabilities"], key=one["probabilities"].get) == one["genre"]
        for genre in GENRES:
            assert float(row[genre]) == pytest.approx(one["probabilities"][genre], abs=1e-6)
        assert one["confidence"] == one["probabilities"][one["genre"]]
    spans = content["files"][1]["timeline"]
    assert [(span["start"], span["end"]) for span in spans] == [(0, 2), (1, 3), (2, 4), (3, 5)]


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
    run, model, separation, tmp_path
):
    for folder, seconds in (("x", 2), ("y", 30)):
        Path(folder).mkdir()
        soundfile.write(f"{folder}/same name.wav", tune(seconds=seconds), SR)
    soundfile.write("z.wav", tune(seconds=3), SR)
    first = run("x", "y", "z.wav", "--stems", "kept", "--json", "1.json")
    cache = StemCache("kept", model="htdemucs", sample_rate=SR)
    assert cache.is_current("z", tmp_path / "z.wav")
    assert cache.read("z").shape == (4, 3 * SR)
    assert cache.read("z").dtype == np.float16
    assert len(list(Path("kept").iterdir())) == 3
    code = (
        "import sys, runpy; sys.argv[0] = 'predict.py'\n"
        "from stemgenre import runtime; import predict; predict.main()\n"
        "assert not any(name.split('.')[0] == 'demucs' for name in sys.modules)"
    )
    words = ["x", "y", "z.wav", "--stems", "kept", "--json", "2.json", "--model", model]
    done = run_python("-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}", *words, "DEVICE=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == first
    once, again = (json.loads(Path(f"{number}.json").read_text())["files"] for number in (1, 2))
    for one, other in zip(once, again, strict=True):
        assert one["genre"] == other["genre"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)


def test_kept_stems_of_a_changed_file_or_a_damaged_entry_are_made_anew(run):
    soundfile.write("a.wav", tune(seconds=2), SR)
    run("a.wav", "--stems", "kept")
    soundfile.write("a.wav", tune(seconds=3), SR)
    other = run("a.wav", "--stems", "kept")
    assert other == run("a.wav")
    entry = Path("kept/a.npz")
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 255
    entry.write_bytes(data)
    assert run("a.wav", "--stems", "kept").endswith(other)
    assert StemCache("kept", model="htdemucs", sample_rate=SR).read("a").shape == (4, 3 * SR)


def test_a_clip_is_predicted_as_the_training_pipeline_predicts_it(
    classifier, model, tiny_repo, tmp_path
):
    knobs = [f"{name.upper()}={value}" for name, value in vars(FEATURES).items()]
    knobs += [f"SEPARATION_REPO={tiny_repo}", f"SEPARATION_OVERLAP={OVERLAP}", "DEVICE=cpu"]
    settings = load_settings(config, [*knobs, f"DATA_DIR={tmp_path}"])
    paths = [tmp_path / f"{number}.wav" for number in range(3)]
    for seconds, path in zip((2, 2.04, 1.5), paths, strict=True):  # as long, longer, shorter
        soundfile.write(path, tune(seconds=seconds, sr=22050, seed=int(path.stem)), 22050)
    clips = pd.DataFrame({"clip": ["0", "1", "2"], "path": paths})
    cache = StemCache(settings.cache_folder, model="htdemucs", sample_rate=SR)
    with runtime.start(settings.machine) as process:
        separate_missing(clips, cache, settings, process)
        reader = StemReader(
            cache, FEATURES, settings.augment, threads=1, device=process.device, device_cache=0
        )
        best = load_best(model, process.device)
        logits = predict_clips(best.model, best.frontend, reader, clips, settings.train, process)
    expected = logits.softmax(1)
    assert (expected[0] - expected[1]).abs().max() > 0.01, "this model does not listen"
    for (_, result), row in zip(classifier.predict_all(paths), expected, strict=True):
        assert list(result.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert len(result.timeline) == 1


@pytest.mark.parametrize("overlap", [0, 0.2, 0.6])
def test_the_stems_of_pieces_are_those_of_the_whole_file(overlap, fast_repo, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, tune(seconds=72.3, sr=6000, channels=2), 6000, subtype="FLOAT")
    separation = SeparationSettings(separation_repo=str(fast_repo), separation_overlap=overlap)
    separator = Separator(separation, sample_rate=2000, device=torch.device("cpu"))
    wave = separator.load(path)
    whole = separator([wave])[0]
    pieces = list(read_pieces(path, separator))
    assert len(pieces) > 2
    assert max(piece.wave.shape[1] for piece in pieces) < 0.7 * wave.shape[1]
    rates = {"from_rate": 4000, "to_rate": 2000}
    joined = torch.cat([kept_stems(p, separator([p.wave])[0], **rates) for p in pieces], 1).float()
    assert joined.shape == whole.shape
    # Each piece is normalised by itself, which leaves a constant offset far below hearing.
    assert (joined - whole).diff(dim=1).std() < 0.01 * whole.diff(dim=1).std()
    assert (joined - whole).abs().max() < 1e-3 * whole.abs().max() + 1e-4


def test_a_long_file_is_heard_in_windows_of_the_whole_files_stems(classifier, separation, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, tune(seconds=30.3, sr=44100, channels=2), 44100)
    separator = Separator(separation, sample_rate=SR, device=torch.device("cpu"))
    assert len(list(read_pieces(path, separator))) == 2
    whole = separator([separator.load(path)])[0]
    result = classifier.predict(path)
    starts = [span.start for span in result.timeline]
    assert starts == pytest.approx([*range(29), 28.3], abs=1 / SR)
    windows = [whole[:, round(s * SR) : round(s * SR) + 2 * SR].half() for s in starts]
    images = classifier.frontend(windows, [PLAIN] * len(windows))
    with torch.inference_mode():
        expected = classifier.net(images).softmax(1)
    found = torch.tensor([list(span.probabilities.values()) for span in result.timeline])
    assert (found - expected).abs().mean() < 0.01
    assert expected.std(0).max() > 0.05, "this model does not listen"
    assert list(result.probabilities.values()) == pytest.approx(found.mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(1, [0]), (100, [0]), (104, [0]), (106, [0, 6]), (150, [0, 50]), (203, [0, 50, 100]),
     (230, [0, 50, 100, 130])],
)  # fmt: skip
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_windows_reach_the_end_however_the_stems_arrive(samples, starts, block):
    stems = torch.arange(samples, dtype=torch.float32).expand(4, -1)
    cutter = WindowCutter(100)
    windows = [one for part in stems.split(block, dim=1) for one in cutter.add(part)]
    windows += cutter.finish()
    assert [start for start, _ in windows] == starts
    for start, window in windows:
        assert torch.equal(window, stems[:, start : start + 100])


def test_silence_in_a_song_has_no_say(classifier, tmp_path):
    wave = np.vstack([tune(seconds=4), np.zeros((9 * SR, 1))])
    soundfile.write(tmp_path / "hidden.wav", wave, SR)
    timeline = classifier.predict(tmp_path / "hidden.wav").timeline
    assert max(span.start for span in timeline) < 6.5, "what Demucs' window smears, no more"
    assert [span.start for span in timeline[:4]] == [0, 1, 2, 3]


def test_a_model_from_before_channels_sees_all_stems(classifier, model, separation, tmp_path):
    content = checkpoint.load(model, "model")
    del content["features"]["channels"]
    older = tmp_path / "older.pth"
    checkpoint.save(older, "model", content)
    soundfile.write(tmp_path / "a.wav", tune(seconds=2), SR)
    found = Classifier.load(older, device="cpu", separation=separation)
    assert found.predict(tmp_path / "a.wav") == classifier.predict(tmp_path / "a.wav")


@pytest.mark.parametrize("channels", ["vocals", "mix", "bass,vocals"])
def test_a_model_of_some_stems_is_moved_and_silenced_by_these_alone(channels, model, tmp_path):
    content = checkpoint.load(model, "model")
    content["features"]["channels"] = channels
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
    heard = [0, 1, 2, 3] if channels == "vocals" else [0, 1, 2, 3, 4]
    assert [span.start for span in with_other.timeline] == heard


MOST_MEMORY = """
import os, sys
from pathlib import Path
from stemgenre import Classifier
from stemgenre.settings import SeparationSettings
model, repo, path = sys.argv[1:]
classifier = Classifier.load(
    model, device="cpu", separation=SeparationSettings(separation_repo=repo)
)
resident = []  # MB, each time that a piece has been separated
def look(_):
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
print(len(classifier.predict(path, progress=look).timeline), max(resident))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured as Linux shows it")
def test_memory_does_not_grow_with_the_length_of_a_file(model, fast_repo, tmp_path):
    used = []
    for minutes in (1, 6):
        path = tmp_path / f"{minutes}.wav"
        soundfile.write(path, np.tile(tune(seconds=60), (minutes, 1)), SR)
        done = run_python("-c", MOST_MEMORY, model, fast_repo, path)
        assert done.returncode == 0, done.stderr
        windows, most = done.stdout.split()
        assert int(windows) == 60 * minutes - 1
        used.append(float(most))
    assert used[1] - used[0] < 15, f"{used} MB; the stems of 5 minutes are 26 MB in float16"


def test_the_library_works_from_another_folder_and_importing_it_does_nothing(
    model, tiny_repo, tmp_path
):
    soundfile.write(tmp_path / "song.wav", tune(seconds=2), SR)
    code = (
        "import sys, stemgenre\n"
        "assert not {'torch', 'numpy', 'demucs'} & set(sys.modules)\n"
        "from stemgenre import Classifier\n"
        "from stemgenre.settings import SeparationSettings\n"
        "classifier = Classifier.load(sys.argv[1], device='cpu',\n"
        "    separation=SeparationSettings(separation_repo=sys.argv[2]))\n"
        "print(classifier.predict('song.wav').genre)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(tiny_repo)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in GENRES
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_the_separation_model_is_the_trained_ones_unless_another_is_named(
    model, separation, tiny_repo, tmp_path
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
        assert loaded.separation.separation_repo == str(tiny_repo)


def test_a_prediction_is_frozen_and_ranks_the_other_genres():
    shares = {"a": 0.2, "b": 0.5, "c": 0.3}
    prediction = Prediction("b", 0.5, shares, [])
    assert prediction.runners_up(1) == [("c", 0.3)]
    assert prediction.runners_up() == [("c", 0.3), ("a", 0.2)]
    with pytest.raises(AttributeError):
        prediction.genre = "a"


def test_stopping_keeps_what_is_done(run, monkeypatch):
    for number in range(4):
        soundfile.write(f"{number}.wav", tune(seconds=2, seed=number), SR)
    show = predict.Table.show

    def stopped(self, *arguments, **options):
        show(self, *arguments, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(predict.Table, "show", stopped)
    with pytest.raises(Interrupted):
        run("*.wav", "MICRO_BATCH=1", "--csv", "genres.csv")
    assert Path("genres.csv").read_text().splitlines()[1].startswith("0.wav,")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to predict"),
        (["a.wav", "IMG_SIZE=300"], "IMG_SIZE is the trained model's own"),
        (["a.wav", "SEPARATION_REPO=nowhere"], "SEPARATION_REPO=nowhere is not a folder"),
        (["a.wav", "--model", "nowhere.pth"], "there is no model nowhere.pth"),
        (["a.wav", "--csv", "/proc/nowhere/genres.csv"], "/proc/nowhere cannot be made"),
        (["a.wav", "--stems", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_what_stops_all_files_is_one_line_with_the_way_out(
    words, message, model, tiny_repo, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tune(seconds=1), SR)
    knobs = [f"SEPARATION_REPO={tiny_repo}", "DEVICE=cpu"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *knobs, "--model", str(model), *words])
    with pytest.raises(UserError) as error:
        predict.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_kept_stems_in_a_form_that_is_not_known_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "song.npz", "w") as archive:
        for stem in STEMS:
            with archive.open(f"{stem}.npy", "w") as file:
                np.lib.format.write_array(file, np.zeros(9, np.float16), version=(3, 0))
    with pytest.raises(CacheError, match=r"unknown \.npy version"):
        next(cached_blocks(tmp_path / "song.npz", samples=4))
