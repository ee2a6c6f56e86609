"""Settings come from config.py, settings files and KEY=VALUE, and are checked before any work."""

from pathlib import Path

import pytest

from stemgenre.errors import UserError
from stemgenre.settings import (
    CONFIG_FILE,
    FIELDS,
    FeatureSettings,
    SeparationSettings,
    format_settings,
    load_settings,
    read_settings_file,
)

CONFIG = CONFIG_FILE.read_text(encoding="utf-8")


def refusal(*words, config_file=CONFIG_FILE):
    with pytest.raises(UserError) as caught:
        load_settings(words, config_file=config_file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def settings_file(tmp_path):
    """A function: the path of a settings file with this content."""

    def write(content, name="mine.py"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("IMG_SIZE=300", 300),
        ("IMG_SIZE=64", 64),
        ("IMG_SIZE=2048", 2048),
        ("LR=1e-3", 1e-3),
        ("LR=10", 10.0),
        ("CLIP_SECONDS=10", 10.0),
        ("USE_AMP=false", False),
        ("USE_AMP=True", True),
        ("COMPILE=True", True),
        ("NUM_THREADS=auto", "auto"),
        ("NUM_THREADS=3", 3),
        ("NUM_CLASSES=auto", "auto"),
        ("TIME_STRETCH_RATES=(0.9, 1.1)", (0.9, 1.1)),
        ("TIME_STRETCH_RATES=[1, 1]", (1.0, 1.0)),
        ("HEAD_DROPOUT=(0.5, 0)", (0.5, 0.0)),
        ("SEPARATION_REPO=none", None),
        ("SEPARATION_MODEL=955717e8", "955717e8"),
        ("DATA_DIR=2024", "2024"),
        ("EXTRA_DATA=2024", "2024"),
        ("DATA_DIR=1_0", "1_0"),
        ("DATA_DIR=true", "true"),
        ("DATA_DIR=None", "None"),
        ("DATA_DIR=runs/a=b", "runs/a=b"),
        ("DATA_DIR=C:\\music", "C:\\music"),
        ("DEVICE=cuda:1", "cuda:1"),
        ("CHANNELS=mix", "mix"),
        ("CHANNELS=other,drums", "other,drums"),
        ("CHANNELS=bass, other", "bass,other"),
    ],
)
def test_the_command_line_sets_a_setting(word, value):
    found = load_settings([word]).values()[word.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("IMG_SIZE=1", "an integer, or two (height, width), from 64 to 2048"),
        ("IMG_SIZE=2049", "an integer, or two (height, width), from 64 to 2048"),
        ("IMG_SIZE=299.5", "an integer, or two (height, width), from 64 to 2048"),
        ("IMG_SIZE=True", "an integer, or two (height, width), from 64 to 2048"),
        ("IMG_SIZE=None", "an integer, or two (height, width), from 64 to 2048"),
        ("IMG_SIZE=", "an integer, or two (height, width), from 64 to 2048"),
        ("IMG_SIZE={[]:1}", "an integer, or two (height, width), from 64 to 2048"),
        ("TEST_SIZE=0", "a number above 0 to 0.9"),
        ("TEST_SIZE=1", "a number above 0 to 0.9"),
        ("LR=nan", "a number above 0 to 10"),
        ("LR=1e999", "a number above 0 to 10"),
        ("LR=(((", "a number above 0 to 10"),
        ("SEED=-1", "an integer from 0 to 2147483647"),
        ("NUM_CLASSES=many", 'an integer from 2 or "auto"'),
        ("NUM_CHANNELS=0", 'an integer from 1 to 64 or "auto"'),
        ("USE_AMP=yes", "True or False"),
        ("USE_AMP=1", "True or False"),
        ("COMPILE=auto", "True or False"),
        ("DB_REFERENCE=loud", '"clip" or "stem"'),
        ("CHANNELS=vocal", "one or more of mix, vocals, drums, bass, other, separated by commas"),
        ("CHANNELS=vocals,drums,vocals", "one or more of mix"),
        ("CHANNELS=vocals,", "one or more of mix"),
        ("TIME_STRETCH_RATES=(1.2, 0.8)", "two numbers (low, high) from 0.25 to 4"),
        ("TIME_STRETCH_RATES=(0.1, 0.8)", "two numbers (low, high) from 0.25 to 4"),
        ("TIME_STRETCH_RATES=1", "two numbers (low, high) from 0.25 to 4"),
        ("DATA_DIR=", "text"),
        ("DATA_DIR=  ", "text"),
        ("OUTPUT_DIR=a\0b", "text"),
    ],
)
def test_an_invalid_value_is_refused_with_what_is_expected(word, expected):
    message = refusal(word)
    name = word.partition("=")[0]
    assert message.startswith(f"{name}=")
    assert f" is invalid: expected {expected}" in message


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["HOP_LENGTH=4096"], "HOP_LENGTH=4096"),
        (["N_FFT=8192", "CLIP_SECONDS=0.5", "SR=8000"], "N_FFT=8192"),
        (["MIN_LR=1e-3"], "MIN_LR=0.001"),
    ],
)
def test_settings_that_contradict_each_other_are_named(words, hint):
    message = refusal(*words)
    assert hint in message
    assert "use at most" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("IMG_SIZ", "IMG_SIZE"),
        ("BATCHSIZE", "BATCH_SIZE"),
        ("EPOCH", "EPOCHS"),
        ("SEPERATION_MODEL", "SEPARATION_MODEL"),
        ("img_size", "IMG_SIZE"),
    ],
)
def test_a_misspelt_setting_suggests_the_nearest(settings_file, wrong, right):
    assert refusal(f"{wrong}=1") == f"unknown setting {wrong} (command line); did you mean {right}?"
    path = settings_file(f"SEED = 1\n{wrong} = 1\n")
    message = f"unknown setting {wrong} ({path} line 2); did you mean {right}?"
    assert refusal(str(path)) == message


def test_a_word_without_a_value_is_refused():
    assert "KEY=VALUE" in refusal("IMG_SIZE")


def test_later_layers_override_earlier_ones(settings_file):
    first = settings_file("EPOCHS = 3\nLR = 1e-3\nPATIENCE = 2\n", "a.py")
    second = settings_file('"""Mine."""\n\nLR = 1e-4  # lower\n', "b.py")
    settings = load_settings(["EPOCHS=5", str(first), str(second), "EPOCHS=6"])
    assert (settings.train.epochs, settings.train.lr, settings.train.patience) == (6, 1e-4, 2)
    assert settings.train.batch_size == load_settings().train.batch_size


def test_every_recipe_can_be_laid_over_the_config():
    recipes = sorted((CONFIG_FILE.parent / "recipes").glob("*.py"))
    assert len(recipes) >= 2
    for recipe in recipes:
        assert load_settings([str(recipe)]) != load_settings()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("EPOCHS = 3\nLR = = 2\n", "line 2: invalid syntax"),
        ("EPOCHS = 3\n  LR = 2\n", "line 2: unexpected indent"),
        ("LR, EPOCHS = 1e-3, 4\n", "line 1: expected NAME = literal"),
        ("LR = EPOCHS = 3\n", "line 1: expected NAME = literal"),
        ("import os\n", "line 1: expected NAME = literal"),
        ("if True:\n    LR = 1\n", "line 1: expected NAME = literal"),
        ("LR = 10 ** -3\n", "line 1: LR is not a literal"),
        ('DATA_DIR = __import__("os").getcwd()\n', "line 1: DATA_DIR is not a literal"),
        ('DATA_DIR = "音楽"\n'.encode("cp932"), "UTF-8"),
        (b"LR = 1\0\n", ""),
    ],
)
def test_what_is_no_list_of_literals_is_refused_with_its_line(settings_file, content, said):
    path = settings_file(content)
    for words, config_file in (([str(path)], CONFIG_FILE), ([], path)):
        message = refusal(*words, config_file=config_file)
        assert message.startswith(str(path))
        assert said in message


def test_a_settings_file_is_never_run(settings_file, tmp_path):
    refusal(str(settings_file(f'open({str(tmp_path / "ran")!r}, "w")\n')))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["nowhere.py", "."])
def test_a_settings_file_that_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path / name / "x.py" if name == "." else tmp_path / name
    assert str(path) in refusal(str(path))


def test_a_file_saved_with_a_byte_order_mark_reads(settings_file):
    path = settings_file(b"\xef\xbb\xbf" + 'DATA_DIR = "音楽"\n'.encode())
    assert load_settings([str(path)]).paths.data_dir == "音楽"


def test_an_older_config_reads_as_a_layer(settings_file):
    path = settings_file(
        "SEED = 7\nN_MELS = 64\nLR = 2e-4\nNUM_WORKERS = 0\n"
        'SEPARATION_CACHE_DIR = "data/separated"\nRESUME_FROM_CHECKPOINT = True\n',
        "old_config.py",
    )
    settings = load_settings([str(path)])
    assert (settings.machine.seed, settings.features.n_mels, settings.train.lr) == (7, 64, 2e-4)
    assert settings.machine.num_threads == 1
    assert settings.cache_folder == Path("data/separated")
    assert settings.train.resume_from_checkpoint


def test_a_config_without_a_setting_says_what_to_do(settings_file):
    path = settings_file(CONFIG.replace("EPOCHS = 50", "# gone"), "config.py")
    message = refusal(config_file=path)
    assert message.startswith("config.py lacks EPOCHS; restore the current config.py")
    assert "python train.py my_config.py" in message


def test_config_has_every_setting_and_no_other():
    assert set(read_settings_file(CONFIG_FILE)) == set(FIELDS)


def test_the_settings_of_a_run_repeat_it(settings_file):
    settings = load_settings(
        [str(CONFIG_FILE.parent / "recipes" / "demo.py"), "LR=3e-4", "DATA_DIR=a 'b'"]
    )
    path = settings_file(format_settings(settings), "settings_used.py")
    assert load_settings([str(path)]) == settings


def test_the_settings_of_a_run_in_a_folder_that_is_named_after_a_setting_repeat_it(settings_file):
    (settings_file("").parent / "lr=0.1").mkdir()
    path = settings_file("LR = 0.1\n", "lr=0.1/settings_used.py")
    assert load_settings([str(path)]).train.lr == 0.1


def test_a_resumed_run_does_not_make_its_repetition_resume(settings_file):
    used = format_settings(load_settings(["RESUME_FROM_CHECKPOINT=True"]))
    assert not load_settings([str(settings_file(used))]).train.resume_from_checkpoint


def test_a_program_gets_a_group_as_config_has_it_but_for_some():
    group = SeparationSettings.from_config(separation_repo="models")
    assert group.separation_repo == "models"
    assert group.separation_model == load_settings().separation.separation_model
    with pytest.raises(UserError, match="SEPARATION_OVERLAP=2 is invalid"):
        SeparationSettings.from_config(separation_overlap=2)
    with pytest.raises(UserError, match="OVERLAP"):
        SeparationSettings.from_config(overlap=0.2)


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("separated", "music/separated"),
        ("music/separated", "music/separated"),
        ("/big/stems", "/big/stems"),
        ("a/b", "music/a/b"),
        ("existing", "existing"),
        ("./separated", "music/separated"),  # Demucs' own command has made one
    ],
)
def test_the_cache_is_below_the_data_unless_it_is_a_path_of_its_own(
    tmp_path, monkeypatch, given, folder
):
    monkeypatch.chdir(tmp_path)
    Path("existing").mkdir()
    Path("separated/htdemucs").mkdir(parents=True)
    settings = load_settings(["DATA_DIR=music", f"SEPARATION_CACHE_DIR={given}"])
    assert settings.cache_folder == Path(folder)


def test_stems_in_a_folder_separated_of_the_current_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("separated").mkdir()
    Path("separated/train_0.npz").touch()
    assert load_settings(["DATA_DIR=music"]).cache_folder == Path("separated")


@pytest.mark.parametrize(
    ("channels", "names"),
    [
        ("mix", ["mix"]),
        ("mix NUM_CHANNELS=4", ["mix"] * 4),
        ("drums,vocals NUM_CHANNELS=3", ["drums", "vocals", "drums"]),
        ("mix,vocals,drums,bass,other", ["mix", "vocals", "drums", "bass", "other"]),
        ("vocals,drums,bass,other", ["vocals", "drums", "bass", "other"]),
    ],
)
def test_every_channel_of_the_image_has_the_name_of_what_it_shows(channels, names):
    words = f"CHANNELS={channels}".split()
    assert load_settings(words).features.channel_names == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["SUBMIT_FILE=summary.json"], "SUBMIT_FILE=summary.json is the run's own summary.json"),
        (["BEST_MODEL_FILE=checkpoint.pth"], "BEST_MODEL_FILE=checkpoint.pth"),
        (["BEST_MODEL_FILE=./x/../checkpoint.pth"], "CHECKPOINT_FILE=checkpoint.pth"),
        (["BEST_MODEL_FILE=checkpoint.previous.pth"], "checkpoint.previous.pth"),
        (["BEST_MODEL_FILE=checkpoint.older.pth"], "checkpoint.older.pth"),
        (["CHECKPOINT_FILE=a.pth", "SUBMIT_FILE=a.previous.pth"], "a.previous.pth"),
        (["LOG_FILE=metrics.csv"], "LOG_FILE=metrics.csv"),
        (["LOG_FILE=SUBMIT.CSV"], "SUBMIT_FILE=submit.csv"),
        (["LOG_FILE=settings_used.py"], "LOG_FILE=settings_used.py"),
        (["SUBMIT_FILE=valid_predictions.csv"], "valid_predictions.csv"),
        (["SUBMIT_FILE=test_probabilities.csv"], "test_probabilities.csv"),
        (["SUBMIT_FILE=.run.lock"], ".run.lock"),
        (["SUBMIT_FILE=report/index.html"], "report"),
        (["SUBMIT_FILE=checkpoint.pth/x.csv"], "CHECKPOINT_FILE=checkpoint.pth"),
        (["SUBMIT_FILE=data/train_master.csv"], "one of the competition's own files"),
        (["OUTPUT_DIR=data", "LOG_FILE=sample_submit.tsv"], "one of the competition's own files"),
        (["LOG_FILE=train.py"], "LOG_FILE=train.py"),
        (["SUBMIT_FILE=config.py"], "SUBMIT_FILE=config.py"),
        (["SUBMIT_FILE=data/train_0.au"], "SUBMIT_FILE=data/train_0.au"),
        (["BEST_MODEL_FILE=w.pth", "WEIGHTS_FILE=w.pth"], "WEIGHTS_FILE=w.pth"),
        (["SUBMIT_FILE=docs"], "SUBMIT_FILE=docs is a folder"),
    ],
)
def test_outputs_that_overwrite_each_other_or_an_input_are_refused(words, said, monkeypatch):
    monkeypatch.chdir(CONFIG_FILE.parent)
    assert said in refusal(*words)


def test_outputs_of_any_other_name_are_accepted():
    load_settings(["SUBMIT_FILE=sub/final.csv", "BEST_MODEL_FILE=b.pth", "LOG_FILE=/dev/null"])


def test_a_settings_file_in_utf_16_or_with_huge_numbers_or_nesting_is_one_line(settings_file):
    for content in (
        "LR = 1e-3\n".encode("utf-16"),
        "LR = " + "9" * 5000 + "\n",
        "LR = " + "(" * 5000 + ")" * 5000 + "\n",
        "LR = " + "-" * 100_000 + "1\n",
        "LR: float = 1e-3\n",
        "A, B = 3, 4\n",
        "LR = {**1}\n",
        "LR = 1e-3\r\nEPOCHS = '\\N{nothing}'\n",
    ):
        path = settings_file(content)
        assert refusal(str(path)).startswith(str(path))
    assert "IMG_SIZE=" in refusal("IMG_SIZE=" + "9" * 5000)
    assert len(refusal("IMG_SIZE=" + "9" * 4000)) < 400


def test_config_py_can_be_edited_while_a_run_trains(tmp_path, monkeypatch):
    before = load_settings()
    (tmp_path / "config.py").write_text("half a line =")
    monkeypatch.setattr("stemgenre.settings.CONFIG_FILE", tmp_path / "config.py")
    assert FeatureSettings.from_config() == before.features  # as load_models() takes it


def test_a_path_below_the_home_folder_is_not_a_folder_of_that_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["OUTPUT_DIR=~/runs/a", "DATA_DIR=~/data", "EXTRA_DATA=('~/fma', 'b')"]
    settings = load_settings([*words, "WEIGHTS_FILE=~/w.pth"])
    assert settings.paths.output("x") == tmp_path / "runs" / "a" / "x"
    assert settings.paths.data_dir == str(tmp_path / "data")
    assert settings.data.extra_data == (str(tmp_path / "fma"), "b")
    assert settings.model.weights_file == str(tmp_path / "w.pth")
