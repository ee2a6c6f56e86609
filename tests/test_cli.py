"""The scripts answer at once, explain their settings, keep a log, and exit as they ended."""

import logging
import os
import re
import resource
import subprocess
import sys

import pytest
from helpers import ROOT, run_python

import predict
from stemgenre import cli
from stemgenre.errors import UserError
from stemgenre.settings import FIELDS, expected

SCRIPTS = ("train.py", "predict.py", "eda.py", "export_separated_wav.py")
STOP = "if runtime.sync_stop(): raise runtime.interrupted()"
ENDINGS = {  # name: (what main does, exit code)
    "well": (STOP, 0),
    "user error": ('raise UserError("LR=0 is invalid")', 2),
    "SIGINT": (f"os.kill(os.getpid(), signal.SIGINT)\n{STOP}", 130),
    "SIGTERM": (f"os.kill(os.getpid(), signal.SIGTERM)\n{STOP}", 143),
    "SIGHUP": (f"os.kill(os.getpid(), signal.SIGHUP)\n{STOP}", 143),  # a lost terminal
    "SIGHUP under nohup": (f"os.kill(os.getpid(), signal.SIGHUP)\n{STOP}", 0),
    "SIGINT twice": ("for _ in range(2): os.kill(os.getpid(), signal.SIGINT)", 130),
    "internal error": ("assert False, 'a bug'", 1),
}
SCRIPT = """
import os, signal, sys, warnings
from pathlib import Path
from stemgenre import cli
from stemgenre.errors import UserError
from stemgenre.runtime import start_runtime
from stemgenre.settings import MachineSettings

def main():
    machine = MachineSettings.from_config(device="cpu")
    with start_runtime(machine) as runtime:
        cli.log_to_file(folder / "log.txt")
        cli.log.info("started on %s", runtime.device)
        warnings.warn("beware")
        exec(ending)
        cli.log.info("ended")

for name, (ending, _) in ENDINGS.items():  # in forks: torch is imported once
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    if os.fork() == 0:
        sys.stdout, sys.stderr = (folder / "stdout").open("w"), (folder / "stderr").open("w")
        signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in name else signal.SIG_DFL)
        try:
            cli.run_script(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        sys.stdout.close(), sys.stderr.close()
        os._exit(code)
    _, status = os.wait()
    (folder / "code").write_text(str(os.waitstatus_to_exitcode(status)))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{ending: (exit code, stdout, stderr, log file's text)} of a script that ends so."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_python("-c", f"ENDINGS = {ENDINGS!r}\n{SCRIPT}", folder)
    assert done.returncode == 0, done.stderr
    return {
        name: (
            int((folder / name / "code").read_text()),
            *((folder / name / file).read_text() for file in ("stdout", "stderr", "log.txt")),
        )
        for name in ENDINGS
    }


@pytest.mark.parametrize(("name", "code"), [(name, end[1]) for name, end in ENDINGS.items()])
def test_the_exit_code_says_how_it_ended(runs, name, code):
    assert runs[name][0] == code


def test_what_the_user_can_fix_is_one_line_without_a_traceback(runs):
    assert runs["user error"][2] == "error: LR=0 is invalid\n"
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGINT twice"):
        assert "Traceback" not in runs[name][2]
    assert "internal error, please report it" in runs["internal error"][2]
    assert "a bug" in runs["internal error"][2]


def test_a_run_that_stops_says_so(runs):
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        assert runs[name][1].splitlines()[-1] == "stopped"


def test_spaces_around_the_equals_sign_of_a_setting_do_not_matter():
    words = ["a.wav", "TTA = 3", "LOG_FILE = x.py", "runs/lr=0.1/used.py", "clip = 1.wav"]
    chosen, others = cli.split_words(words)
    assert (chosen, others) == (words[1:4], ["a.wav", "clip = 1.wav"])
    assert cli.parse_settings(words[1:2]).train.tta == 3


def test_a_setting_that_is_given_as_an_option_is_told_how_it_is_given(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parser("").parse_intermixed_args(["--EPOCHS=3", "--BATCH_SIZE=2"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: a setting has no dashes: EPOCHS=3\n")


@pytest.mark.parametrize("name", ENDINGS)
def test_the_log_file_has_what_the_console_showed(runs, name):
    _, stdout, stderr, text = runs[name]
    shown = (stdout + stderr).splitlines()
    logged = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in text.splitlines()]
    assert logged == shown
    assert any(line.startswith("warning: ") and "beware" in line for line in shown)
    assert "started on cpu" in shown


def cpu_seconds(*arguments):
    """(seconds of CPU time, exit code, output) of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_at_once(script):
    seconds, code, output = cpu_seconds(script, "--help")
    assert (seconds < 2, code) == (True, 0)
    used = predict.SETTINGS if script == "predict.py" else FIELDS
    assert set(re.findall(r"^  ([A-Z_0-9]+) = ", output, re.MULTILINE)) == set(used)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train.py", "IMG_SIZ=3"), "did you mean IMG_SIZE?"),
        (("train.py", "DATA_DIR=/nowhere"), "there is no data folder /nowhere"),
        (("eda.py", "DATA_DIR=/nowhere"), "there is no data folder /nowhere"),
        (("predict.py",), "nothing to predict"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_at_once(arguments, said):
    seconds, code, output = cpu_seconds(*arguments)
    assert (seconds < 2, code) == (True, 2)
    assert said in output
    assert "Traceback" not in output


def test_help_explains_every_setting_with_its_value_in_config():
    lines = cli.settings_help().splitlines()
    assert len(lines) == len(FIELDS)
    for line in lines:
        assert re.fullmatch(r"  [A-Z_0-9]+ = \S.*?  +\S.{5,}", line), line


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("EPOCHS = 7  # at most", ("EPOCHS", "7", "at most")),
        ("LR = 2e-4  # AdamW's", ("LR", "2e-4", "AdamW's")),
        ("DEVICE = '#1'  # 10 % of it, %s", ("DEVICE", "'#1'", "10 % of it, %s")),
        ("TIME_STRETCH_RATES = (0.8, 1.2)", ("TIME_STRETCH_RATES", "(0.8, 1.2)", "")),
    ],
)
def test_an_edited_config_is_described_as_it_is(tmp_path, line, shown):
    path = tmp_path / "config.py"
    path.write_text(f"# A section\n{line}\n")
    assert cli.describe_settings(path) == [("A section", *shown)]


def test_the_settings_page_is_what_its_command_makes():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == cli.settings_markdown(), "run: python -m stemgenre.cli > docs/settings.md"
    for name in FIELDS:
        assert f"| `{name}` | " in page
        assert f" | {expected(name)} | " in page


def test_settings_are_told_from_clip_names():
    words = ["train_0", "SR=11025", "data/a=b.npz", "DATA_DIR=x=y", "recipes/demo.py", "x.npz"]
    settings, others = cli.split_words(words)
    assert settings == ["SR=11025", "DATA_DIR=x=y", "recipes/demo.py"]
    assert others == ["train_0", "data/a=b.npz", "x.npz"]


def test_the_demo_is_a_recipe_below_the_command_line():
    settings = cli.parse_settings(["EPOCHS=1"], demo=True)
    assert settings.paths.data_dir == "data/demo"
    assert settings.train.epochs == 1
    assert settings != cli.parse_settings(["EPOCHS=1"])


@pytest.fixture
def project_log(monkeypatch):
    log = logging.getLogger("stemgenre")
    monkeypatch.setattr(log, "handlers", [])
    yield log
    cli.close_log_file()


def test_only_the_first_process_writes_the_log_file(tmp_path, project_log):
    for rank in (0, 1):
        cli.log_to_file(tmp_path / str(rank) / "log.txt", is_main=rank == 0)
        project_log.error("a line")
    assert "a line" in (tmp_path / "0" / "log.txt").read_text()
    assert not (tmp_path / "1").exists()


def test_a_log_is_continued_by_the_next_run(tmp_path, project_log):
    path = tmp_path / "log.txt"
    path.write_text("earlier\n")
    cli.log_to_file(path)
    project_log.error("later")
    cli.close_log_file()
    project_log.error("too late")
    assert re.fullmatch(r"earlier\n.*later\n", path.read_text())


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        cli.log_to_file(tmp_path / "file" / "log.txt")


CONSOLE_SCRIPT = """
import sys
from pathlib import Path
from tqdm import tqdm
from stemgenre import cli

def main():
    cli.log_to_file(Path(sys.argv[1]))
    for n in tqdm(range(300), desc="曲", mininterval=0):
        cli.log.info("曲 %d \\x1b[2J \\udce9", n)
    cli.log.error("曲 failed")
    print("曲 \\udce9", "x" * 100_000)
    tqdm.write("曲")

cli.run_script(main)
"""


@pytest.mark.parametrize(
    ("console", "encoding"),
    [("| head -1", "utf-8"), ("| head -1", "ascii"), ("2>&1 | head -1", "ascii"), (">&-", "utf-8"),
     ("2>&-", "ascii"), (">&- 2>&- <&-", "utf-8"), (">/dev/full", "utf-8"), (">/dev/full", "ascii"),
     ("2>/dev/full", "ascii"), (">/dev/null 2>/dev/null", "ascii")],
)  # fmt: skip
def test_a_console_that_cannot_be_written_does_not_end_the_run(tmp_path, console, encoding):
    (tmp_path / "script.py").write_text(CONSOLE_SCRIPT, encoding="utf-8")
    command = f"set -o pipefail; {sys.executable} script.py log.txt {console}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": f"{encoding}:strict"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"Traceback" not in done.stderr
    assert b"Error" not in done.stderr
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 301
    assert "曲 299" in lines[-2]
    assert "曲 failed" in lines[-1]
    assert not any("\x1b" in line for line in lines)


def test_names_do_not_control_the_terminal():
    code = "from stemgenre import cli; cli.log_to_console(); cli.log.error('%s', 'a\\x1b[2Jb\\rc')"
    assert run_python("-c", code).stderr == "error: a\\x1b[2Jb\\rc\n"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("open('/nowhere/x')", 2, "error: /nowhere/x: No such file or directory\n"),
        ("raise OSError(28, 'No space left on device')", 2, "error: No space left on device\n"),
        ("raise MemoryError", 2, "error: not enough memory"),
    ],
)
def test_an_error_of_the_system_is_one_line_at_the_outermost_boundary(raised, code, said):
    main = f"from stemgenre import cli\ndef main():\n    {raised}\ncli.run_script(main)"
    done = run_python("-c", main)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_a_path_is_never_taken_for_a_setting():
    words = ["./SONG=1.wav", "/music/A=B.wav", "SR=11025", "./LR=2", "PATH/X=1.wav"]
    settings, others = cli.split_words(words)
    assert settings == ["SR=11025"]
    assert others == ["./SONG=1.wav", "/music/A=B.wav", "./LR=2", "PATH/X=1.wav"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"EPOCHS = 3\nLR = = 2\n", "line 2"),
        (b"EPOCHS = 3\n  LR = (\n", "line"),
        ('DATA_DIR = "音楽"\n'.encode("cp932"), "UTF-8"),
        (b"A, B = 3, 4\n", "line 1"),
        (b"LR = " + b"(" * 5000, "config.py"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_in_every_script(tmp_path, content, said):
    path = tmp_path / "config.py"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        cli.describe_settings(path)
    assert "\n" not in str(caught.value)


def test_help_reads_a_config_with_a_byte_order_mark_and_without_headings(tmp_path):
    path = tmp_path / "config.py"
    path.write_bytes(b"\xef\xbb\xbfLR = 1e-3  # AdamW's\n")
    assert cli.describe_settings(path) == [("", "LR", "1e-3", "AdamW's")]
