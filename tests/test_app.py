"""app.py: the form, runs as their files tell them, the page in a browser, and attacks on it."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import MUSIC, ROOT, SMALL_RUN, run_python, run_training, tone, wait_until

from stemgenre import cli
from stemgenre.app import views
from stemgenre.app.form import FILE_SETTINGS, NO_RECIPE, Form
from stemgenre.app.runs import Run, Runs, start_training
from stemgenre.errors import UserError
from stemgenre.files import output_lock, write_text
from stemgenre.settings import FIELDS, json_schema, load_settings

NOT_FILES = {"SEPARATION_MODEL", "CHANNELS", "BACKBONE", "DEVICE", "TRACKER"}  # take text, too
EPOCHS = 20  # of a training that is stopped and resumed
HUNG_UP = 0  # a server that does not read what is too long
MILLISECONDS = 60_000  # ms, that a loaded machine may take for a step


# The form


@pytest.fixture
def form(tmp_path):
    return Form([], runs_folder=tmp_path / "runs", exposed=False)


def test_the_form_has_every_setting_but_the_folder_of_the_run(form):
    assert {field.name for field in form.fields} == FIELDS.keys() - {"OUTPUT_DIR"}
    assert all(field.comment and field.accepts and field.section for field in form.fields)


def test_the_form_for_others_has_no_setting_that_names_a_file_or_folder(tmp_path):
    names = {f.name for f in Form([], runs_folder=tmp_path, exposed=True).fields}
    assert names == FIELDS.keys() - FILE_SETTINGS
    for name in names:  # a new setting that takes any text is in one of the two lists
        schema = json_schema(name)
        kinds = [
            part for part in schema.get("anyOf", [schema]) if not {"enum", "const"} & part.keys()
        ]
        assert name in NOT_FILES or not any(part.get("type") == "string" for part in kinds), name


def test_settings_of_files_are_refused_if_they_are_sent_to_the_form_for_others(tmp_path):
    form = Form([], runs_folder=tmp_path, exposed=True)
    with pytest.raises(UserError, match="DATA_DIR cannot be set here"):
        form.check(form.base_words(NO_RECIPE, {}), "a", {"DATA_DIR": "/etc"})
    with pytest.raises(UserError, match="there is no recipe"):
        form.base_words("/etc/passwd.py", {})


def test_the_command_line_of_the_form_is_the_same_run(form, tmp_path):
    texts = {"LR": "1e-3", "IMG_SIZE": "(64, 128)", "BACKBONE": " efficientnet_b0 ", "TTA": "0"}
    checked = form.check(form.base_words("quick", {}), "a-b", texts)
    assert not checked.first_error
    assert checked.changed == {"LR": "0.002", "IMG_SIZE": "(64, 173)", "BACKBONE": "cnn"}
    settings = cli.parse_settings(checked.words)
    assert settings.train.lr == 1e-3 and settings.features.img_size == (64, 128)
    assert settings.train.epochs == 40  # the recipe's
    assert settings.paths.output_dir == str(tmp_path / "runs" / "a-b")
    assert (
        checked.command.startswith("python train.py ") and "'IMG_SIZE=(64, 128)'" in checked.command
    )
    assert form.check(form.base_words("demo", {}), "demo", {}).words[0] == "--demo"


def test_every_wrong_value_is_one_line_at_its_field(form):
    texts = {"IMG_SIZE": "1", "EPOCHS": "many", "MIN_LR": "0.5", "SEED": "7"}
    checked = form.check(form.base_words(NO_RECIPE, {}), "a", texts)
    assert checked.errors.keys() == {"IMG_SIZE", "EPOCHS", "MIN_LR"}
    with pytest.raises(UserError) as error:
        load_settings(["IMG_SIZE=1"])
    assert checked.errors["IMG_SIZE"] == str(error.value)
    assert checked.errors["MIN_LR"] == "MIN_LR=0.5 is above LR=0.0002; use at most 0.0002"
    assert checked.first_error


@pytest.mark.parametrize(
    "name", ["", "../out", "/tmp/out", "a/b", ".hidden", "<b>", "a\nb", "x" * 65]
)
def test_a_runs_name_is_a_plain_name(form, name):
    assert "no name of a run" in form.check(form.base_words(NO_RECIPE, {}), name, {}).first_error


# Runs


def put_run(folder, **status):
    write_text(folder / "status.json", json.dumps({"pid": 0, "stage": "training"} | status))
    return Run(folder.name, folder)


def test_a_run_is_running_as_long_as_it_holds_its_lock(tmp_path):
    run = put_run(tmp_path / "a", pid=os.getpid())
    assert run.status()["stage"] == "killed"
    with output_lock(run.folder):
        assert run.status()["stage"] == "training" and run.holder().pid == os.getpid()
    assert run.holder() is None
    (run.folder / ".run.txt").write_text("process 1 on here since yesterday\n")  # of a killed run
    assert run.holder() is None
    with output_lock(run.folder):
        assert run.holder().pid == os.getpid()
    assert put_run(tmp_path / "b", stage="finished").status()["stage"] == "finished"


def test_a_run_that_two_pages_stop_is_asked_once_so_that_it_saves(tmp_path, monkeypatch):
    run, signals = put_run(tmp_path / "a"), []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append((pid, number)))
    with output_lock(run.folder):
        run.stop()
        run.stop()
    assert signals == [(os.getpid(), signal.SIGINT)]
    with pytest.raises(UserError, match="a does not run"):
        run.stop()


def test_what_an_earlier_run_left_is_not_the_state_of_one_that_starts(tmp_path):
    run = put_run(tmp_path / "a", pid=1, stage="finished")
    with output_lock(run.folder):
        assert run.status()["stage"] == "starting"


@pytest.mark.parametrize("text", ["[]", "[1]", '"x"', '{"a": 1}', "{", "\xff"])
def test_a_status_of_another_program_does_not_hide_the_runs(tmp_path, text):
    foreign, run = put_run(tmp_path / "foreign"), put_run(tmp_path / "a", stage="finished")
    (foreign.folder / "status.json").write_bytes(text.encode("latin-1"))
    write_text(foreign.folder / "summary.json", "[1]")
    assert foreign.status() == {} and "has not run" in views.progress(foreign)
    assert "<td>a</td><td>finished</td>" in views.results([foreign, run], exposed=False)


def test_names_of_runs_are_looked_up_and_are_no_paths(tmp_path):
    put_run(tmp_path / "runs" / "a")
    put_run(tmp_path / "out")
    runs = Runs(tmp_path / "runs", tmp_path / "out")
    assert set(runs.find()) == {"a", str(tmp_path / "out")}
    for name in ("../out", str(tmp_path / "runs" / "a"), "/etc", ""):
        with pytest.raises(UserError):
            runs.get(name)


def test_a_run_shows_no_file_from_elsewhere(tmp_path):
    run = put_run(tmp_path / "a")
    (tmp_path / "secret.csv").write_text("secret")
    (run.folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    write_text(run.folder / "settings_used.py", f"LOG_FILE = {str(tmp_path / 'secret.csv')!r}\n")
    assert run.file("../secret.csv") is None and run.file("link.csv") is None
    assert run.log_tail() == ""


def test_runs_are_compared_by_their_settings_also_while_another_run_begins(tmp_path):
    runs = [put_run(tmp_path / name) for name in ("new", "a", "b")]
    for run, rate in zip(runs[1:], ("1e-3", "1e-4"), strict=True):
        write_text(run.folder / "settings_used.py", f"LR = {rate}\nEPOCHS = 3\n")
    shown = views.results(runs, exposed=False)
    assert "<th>LR</th>" in shown and "<td>0.0001</td>" in shown
    assert "<th>EPOCHS</th>" not in shown, "in which they do not differ"


def test_results_of_an_earlier_run_are_not_those_of_one_that_failed_in_its_folder(tmp_path):
    run = put_run(tmp_path / "a", stage="finished")
    write_text(run.folder / "summary.json", '{"valid_accuracy": 0.25, "test_accuracy": 0.5}')
    assert "25.0" in views.results([run], exposed=False)
    put_run(tmp_path / "a", stage="failed")
    assert "25.0" not in views.results([run], exposed=False)


@pytest.fixture
def pages(tmp_path):
    """(the Page of the runs below a folder, the run a in it that has only begun)."""
    page = pytest.importorskip("stemgenre.app.page")
    run = put_run(tmp_path / "runs" / "a")
    write_text(run.folder / "settings_used.py", "EPOCHS = 3\n")
    runs = Runs(tmp_path / "runs", tmp_path / "out")
    return page.Page([], load_settings([]), runs, exposed=False), run


def test_no_answer_about_the_form_replaces_a_later_one(pages):
    events = [
        event
        for event in pages[0].build().fns.values()
        if any(getattr(output, "elem_id", None) == "note-EPOCHS" for output in event.outputs)
    ]
    assert len(events) > len(FIELDS)  # the fields, the recipe, the start, the page's load
    assert {(event.concurrency_id, event.concurrency_limit) for event in events} == {("form", 1)}
    assert all(event.queue is not False for event in events)


@pytest.mark.parametrize("trained", ["checkpoint.pth", "best_model.pth", "fold_2/checkpoint.pth"])
def test_a_new_run_does_not_replace_a_trained_one(pages, trained):
    page, run = pages
    page._check_is_new("a")
    (run.folder / trained).parent.mkdir(exist_ok=True)
    (run.folder / trained).touch()
    with pytest.raises(UserError, match="a has been trained already; choose another name, such as"):
        page._check_is_new("a")
    page._check_is_new("a-2")
    assert page._fill("settings of a", "run-3")[0] == "a-2"
    assert page._fill("quick", "a-2")[0] == "quick"
    assert page._fill("quick", "mine")[0] == "mine", "a name that was written stays"


@pytest.mark.parametrize("checkpoint", [None, "checkpoint.pth", "fold_1/checkpoint.pth"])
def test_a_run_that_was_stopped_before_training_can_be_resumed_too(pages, checkpoint, monkeypatch):
    page, run = pages
    if checkpoint:
        (run.folder / checkpoint).parent.mkdir(exist_ok=True)
        (run.folder / checkpoint).touch()
    started = []
    monkeypatch.setattr(
        f"{type(page).__module__}.start_training", lambda *call: started.append(call)
    )
    assert "resumed" in page._resume("a")
    ((words, folder),) = started
    assert folder == run.folder
    assert ("RESUME_FROM_CHECKPOINT=True" in words) == bool(checkpoint)


def test_names_are_text_and_no_markup(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run = put_run(tmp_path / name, message=name, network=name, networks=2, network_number=1)
    shown = views.progress(run) + views.results([run], exposed=False) + views.message(name)
    assert "<img" not in shown and "&lt;img" in shown


def test_a_gpu_that_a_run_uses_is_left_to_it(tmp_path):
    sounds = pytest.importorskip("stemgenre.app.sounds")
    run = put_run(tmp_path / "a")
    cuda = torch.device("cuda")
    assert sounds.device_for(cuda, [run]) == (cuda, "")
    with output_lock(run.folder):
        device, reason = sounds.device_for(cuda, [run])
        assert device.type == "cpu" and "a is using the GPU" in reason
        write_text(run.folder / "settings_used.py", 'DEVICE = "cpu"\n')
        assert sounds.device_for(cuda, [run]) == (cuda, "")


def test_a_training_is_a_process_of_its_own_that_is_watched_and_stopped(tmp_path, small_data):
    run = Run("a", tmp_path / "a")
    words = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={run.folder}", "BACKBONE=cnn"]
    start_training([*words, "EPOCHS=500", "PATIENCE=500"], run.folder)
    pid = run.holder().pid
    try:
        assert os.getsid(pid) == pid, "it outlives the page"
        wait_until(lambda: run.status()["stage"] == "training" and run.status()["step"])
        run.stop()
        wait_until(lambda: run.holder() is None)
    finally:
        if run.holder():
            os.kill(pid, signal.SIGKILL)
    assert run.status()["stage"] == "stopped"
    assert (run.folder / "checkpoint.pth").is_file()


# The script


def test_help_loads_neither_gradio_nor_torch_and_a_missing_gradio_is_one_line():
    code = """import sys, app
from stemgenre import cli
sys.argv[0] = "app.py"
sys.modules["gradio"] = None
try:
    cli.run_script(app.main)
finally:
    print(sorted(sys.modules))
"""
    done = run_python("-c", code, "--help")
    assert "--auth" in done.stdout and "'torch'" not in done.stdout
    assert "'gradio.blocks'" not in done.stdout
    done = run_python("-c", code)
    assert done.returncode == 2
    assert done.stderr == "error: app.py needs Gradio: pip install -r requirements-app.txt\n"


# The page


class Server:
    """app.py as a process, and the pages of it that a browser has open."""

    def __init__(self, folder, *words):
        command = [
            sys.executable,
            str(ROOT / "app.py"),
            "--port",
            "0",
            "--runs",
            str(folder / "runs"),
        ]
        (folder / "tmp").mkdir(exist_ok=True)  # of its uploads
        self.process = subprocess.Popen(
            [*command, *words],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(folder / "tmp")},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines = [self.process.stdout.readline()]
        address = re.search(r"http://\S+", self.lines[0])
        assert address, self.lines
        self.port = int(address[0].rpartition(":")[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        self.process.stdout.close()

    def ask(self, path, *, data=None, **headers):
        """(status code, text) of a request."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            try:
                answer = urllib.request.urlopen(request, timeout=60)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:  # of an error, too, the text may be cut off
                return answer.status, answer.read().decode(errors="replace")
        except (urllib.error.URLError, ConnectionError):
            return HUNG_UP, ""

    def post(self, path, content, **headers):
        data = json.dumps(content).encode()
        return self.ask(path, data=data, content_type="application/json", **headers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_data):
    """A folder with runs/before, a small run that has finished."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("app")
    small = [*SMALL_RUN, f"DATA_DIR={small_data}", f"EDA_DIR={folder / 'eda'}", "BACKBONE=cnn"]
    small += ["EPOCHS=1", f"OUTPUT_DIR={folder / 'runs' / 'before'}"]
    run_training(load_settings(small))
    return folder


@pytest.fixture(scope="module")
def server(folder, tiny_repo, small_data):
    words = [f"DATA_DIR={small_data}", f"EDA_DIR={folder / 'eda'}", "DEVICE=cpu"]
    server = Server(folder, f"SEPARATION_REPO={tiny_repo}", "SEPARATION_OVERLAP=0", *words)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def open_page(browser):
    """A function: a page of a server, of which each takes seconds; `problems` lists what is wrong.

    None may ask anything of another server, log an error or open a dialog.
    """
    contexts = []

    def open_page(server, *, width=1200, dark=False):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            is_mobile=width < 600,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.problems = problems = []
        inside = (server.url, "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(inside) or problems.append(r.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def opened(server, open_page):
    """The page of the server, opened after a training has been started and stopped elsewhere."""
    return open_page(server)


@pytest.fixture
def page(opened):
    """The opened page, which must have no problem after the test either."""
    yield opened
    assert opened.problems == []


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def choose(page, element, value):
    """Picks a value in a dropdown."""
    box = page.locator(f"#{element} input")
    box.click()
    page.get_by_role("option", name=value, exact=True).click()


def fill(page, element, value):
    box = page.locator(f"#{element} input, #{element} textarea")
    box.fill(value)
    box.blur()


def wait_for(page, element, text):
    page.locator(f"#{element}", has_text=re.compile(text)).wait_for()


def shot(page, name):
    """A picture of the page, for who wants to look at it: APP_PICTURES names the folder."""
    if "APP_PICTURES" in os.environ:
        page.screenshot(path=Path(os.environ["APP_PICTURES"]) / f"{name}.png", full_page=True)


@pytest.mark.heavy
def test_a_training_is_started_watched_stopped_resumed_and_outlives_the_page(
    folder, open_page, request
):
    server = Server(folder)
    request.addfinalizer(server.kill)
    page, phone = open_page(server), open_page(server, width=390, dark=True)
    choose(page, "recipe", "settings of before")
    page.wait_for_function(
        "document.querySelector('#name input, #name textarea').value == 'before-2'"
    )
    fill(page, "name", "mine")
    fill(page, "set-EPOCHS", str(EPOCHS))
    fill(page, "set-PATIENCE", str(EPOCHS))
    wait_for(page, "command", f"runs/mine EPOCHS={EPOCHS}")
    page.locator("#start").click()
    wait_for(page, "progress", "mine: training")
    choose(phone, "run", "mine")
    page.locator("#curves img").first.wait_for()
    drawn = page.locator("#curves img").first.get_attribute("src")
    page.wait_for_function("old => document.querySelector('#curves img').src != old", arg=drawn)
    phone.locator("#stop").click()
    page.locator("#stop").click()  # two tabs: it saves all the same
    wait_for(page, "progress", "mine: stopped")
    wait_for(phone, "progress", "mine: stopped")
    assert (folder / "runs" / "mine" / "checkpoint.pth").is_file()
    assert len(epochs_of(folder / "runs" / "mine")) < EPOCHS
    assert_fits_the_screen(phone)
    assert phone.problems == []
    phone.context.close()

    page.reload()
    wait_for(page, "progress", "mine: stopped")
    page.locator("#resume").click()
    wait_for(page, "progress", "mine: training")
    shot(page, "training")
    assert page.problems == []
    page.context.close()
    server.kill()

    page = request.getfixturevalue("page")  # of another server
    wait_for(page, "progress", "mine: finished")
    wait_for(page, "progress", "validation accuracy .*, test accuracy")
    shot(page, "finished")
    assert epochs_of(folder / "runs" / "mine") == list(range(1, EPOCHS + 1))
    with page.expect_popup() as popup:
        page.locator("#progress a", has_text="report").click()
    popup.value.wait_for_load_state()
    assert popup.value.locator("img").count() > 2
    shot(popup.value, "report")
    open_tab(page, "Results")
    wait_for(page, "results", "mine.*finished")
    wait_for(page, "results", "EPOCHS")  # in which the two runs differ
    with page.expect_download() as download:
        page.locator("#results tr", has_text="mine").get_by_text("submit.csv").click()
    submit = folder / "runs" / "mine" / "submit.csv"
    assert Path(download.value.path()).read_bytes() == submit.read_bytes()
    shot(page, "results")


def assert_fits_the_screen(phone):
    """Each tab is as wide as the phone's screen."""
    for tab in ("Train", "Try", "Data", "Results"):
        open_tab(phone, tab)
        phone.wait_for_timeout(1200)  # ms; what the tab shows is there
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert phone.evaluate(wide) <= 0, tab
        shot(phone, f"phone_{tab}")


def epochs_of(folder):
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    return [int(row.split(",")[0]) for row in rows]


def test_a_wrong_value_is_refused_beside_its_field(page, folder):
    open_tab(page, "Train")
    fill(page, "set-EPOCHS", "<b>0</b>")
    wait_for(page, "note-EPOCHS", "EPOCHS='<b>0</b>' is invalid: expected an integer from 1")
    assert page.locator("#note-EPOCHS b").count() == 0
    page.locator("#start").click()
    wait_for(page, "form-message", "is invalid")
    shot(page, "wrong")
    fill(page, "set-EPOCHS", "7")
    wait_for(page, "note-EPOCHS", "changed; the recipe has 50")
    wait_for(page, "command", "EPOCHS=7")
    assert not (folder / "runs" / "run").exists()


@pytest.mark.heavy
def test_sounds_are_predicted_with_players_of_their_stems_and_deleted(
    page, tmp_path, small_data, folder
):
    found = sorted(MUSIC.rglob("*.au")) if MUSIC.is_dir() else sorted(small_data.rglob("*.wav"))
    clips = [tmp_path / "<img src=x onerror=alert(1)>${alert(2)}.wav", tmp_path / "not.wav"]
    shutil.copy(found[0], clips[0])
    clips[1].write_text("not a sound")
    open_tab(page, "Try")
    wait_for(page, "models", "before|mine")
    page.locator("#files input[type=file]").set_input_files(clips)
    page.locator("#files td[aria-label='not.wav']").wait_for()
    page.locator("#predict").click()
    wait_for(page, "try-message", "1 of 2 sounds predicted, 1 not")
    wait_for(page, "sound-1", "cannot be")
    assert page.locator("#sound-0 .bar-row").count() == 10
    durations = page.evaluate(
        """() => Promise.all([...document.querySelectorAll("#sound-0 audio")].map(player =>
        new Promise(done => { player.oncanplaythrough = () => done(player.duration);
          player.onerror = () => done(0); player.preload = "auto"; player.load(); })))"""
    )
    assert len(durations) == 5 and min(durations) > 1
    wait_for(page, "try-table", "download genres.csv")
    with page.expect_download() as download:
        page.locator("#try-table a").click()
    assert "label_id" in Path(download.value.path()).read_text()
    shot(page, "try")
    assert list((folder / "tmp").glob("stemgenre-*"))
    assert not list((folder / "tmp").rglob("*.wav"))


@pytest.mark.heavy
def test_the_data_is_looked_at_and_the_findings_open(page):
    open_tab(page, "Data")
    page.locator("#eda-start").click()
    wait_for(page, "eda-state", "eda.py is running")
    page.locator("#eda-start").click()
    wait_for(page, "eda-message", "eda.py is running; wait until it ends")
    with page.expect_popup() as popup:
        page.locator("#eda-state a", has_text="findings of config.py").click()
    popup.value.wait_for_load_state()
    assert popup.value.locator("table").count() and popup.value.locator("img").count()
    wait_for(page, "eda-state", "does not run now")
    shot(page, "data")


# Attacks


def names_of(server):
    """The settings whose fields the page has."""
    return set(re.findall(r"set-([A-Z_0-9]+)", server.ask("/config", authorization=server.key)[1]))


def event(server, outputs):
    """(number, ids of its inputs) of the page's event whose outputs begin with these elements."""
    config = json.loads(server.ask("/config")[1])
    ids = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    for part in config["dependencies"]:
        if [ids[i] for i in part["outputs"][: len(outputs)]] == outputs:
            return part["id"], part["inputs"]
    raise AssertionError(outputs)


def call(server, outputs, data):
    """What the page answers to an event of our own making, as text."""
    number, _ = event(server, outputs)
    body = {"data": data, "fn_index": number, "session_hash": "attack"}
    code, text = server.post("/gradio_api/queue/join", body)
    if code != 200:
        return f"{code} {text}"
    return server.ask("/gradio_api/queue/data?session_hash=attack")[1]


def test_the_report_of_a_run_links_to_those_of_its_networks(server, folder):
    for name in ("", "fold_1"):
        path = folder / "runs" / "both" / name / "report" / "index.html"
        path.parent.mkdir(parents=True)
        path.write_text(f"<a href='../fold_1/report/index.html'>of {name or 'all'}</a>")
    write_text(folder / "runs" / "both" / "settings_used.py", "FOLDS = 2\n")
    page = "/report/both/report/index.html"
    code, text = server.ask(page)
    assert code == 200 and "of all" in text
    code, text = server.ask(urllib.parse.urljoin(page, "../fold_1/report/index.html"))
    assert code == 200 and "of fold_1" in text
    shutil.rmtree(folder / "runs" / "both")


FILES = ["/etc/passwd", "../../etc/passwd", str(ROOT / "config.py"), "/proc/self/environ", "..", ""]


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_given_away(server, name):
    for path in (
        f"/gradio_api/file={name}", f"/file={name}", f"/gradio_api/file/{name}", f"/static/{name}",
        f"/assets/{name}", f"/report/{name}/report/index.html", f"/submit?run={name}",
        f"/eda?of={name}",
        f"/gradio_api/file={name.replace('/', '%2f')}", f"/theme.css?{name}", f"/svelte/{name}",
        f"/gradio_api/proxy=file://{name}", "/gradio_api/proxy=http://127.0.0.1:1/",
        f"/custom_component/1/server/{name}", "/gradio_api/file=http://127.0.0.1:1/x",
    ):  # fmt: skip
        code, text = server.ask(path)
        assert "root:" not in text and "DATA_DIR =" not in text and "PATH=" not in text, path
        assert code >= 400 or "theme.css" in path or "/file=" in path, path


@pytest.mark.parametrize("name", [*FILES, "http://127.0.0.1:1/a.wav", "https://example.org/a.wav"])
def test_no_file_is_predicted_but_uploads(server, name):
    file = {"path": name, "url": None, "orig_name": "a.wav", "meta": {"_type": "gradio.FileData"}}
    answer = call(server, ["try-message", "try-table"], [["before"], [file], None, None])
    assert answer.startswith("403")
    file = {"path": None, "url": name, "meta": {"_type": "gradio.FileData"}}
    assert server.post("/gradio_api/run/predict", {"data": [file], "fn_index": 1})[0] == 403


def test_a_model_or_a_run_is_no_path(server, folder):
    path = str(folder / "runs" / "before" / "best_model.pth")
    answer = call(server, ["try-message", "try-table"], [[path], None, None, None])
    assert "not in the list" in answer or "choose a model" in answer or '"success":false' in answer
    for name in (str(folder), "../runs/before"):
        number, _ = event(server, ["run-message"])
        body = {"data": [name], "fn_index": number, "session_hash": "attack"}
        code, text = server.post("/gradio_api/run/predict", body)
        assert code >= 400 or "there is no run" in text


def test_what_is_too_long_is_refused_before_it_is_read(server):
    code, _ = server.ask("/gradio_api/upload", data=b"", content_length=str(2**30))
    assert code in (413, HUNG_UP)
    code, _ = server.post("/gradio_api/run/predict", {"data": "x" * 2**21})
    assert code in (413, HUNG_UP)
    boundary = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.wav"\r\n\r\n'
    big = boundary + bytes(101 * 2**20) + b"\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    code, _ = server.ask("/gradio_api/upload", data=big, content_type=kind)
    assert code in (413, HUNG_UP)


def test_other_sites_cannot_use_the_page_through_a_visitors_browser(server):
    assert server.ask("/", host="evil.example")[0] == 403
    assert server.post("/gradio_api/run/predict", {}, origin="http://evil.example")[0] == 403
    assert server.ask("/", origin=server.url)[0] == 200


def test_a_sound_that_is_too_long_is_refused(tmp_path, folder, fast_repo):
    sounds = pytest.importorskip("stemgenre.app.sounds")
    settings = load_settings([f"SEPARATION_REPO={fast_repo}", "DEVICE=cpu"])
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(seconds=20), 8000)
    model = folder / "runs" / "before" / "best_model.pth"
    classifier = sounds.SoundClassifier(settings, [model], [], max_seconds=3)
    result, html = classifier.predict(path)
    assert result is None and "long.wav is longer than" in html


def test_a_sound_is_tried_with_a_model_of_the_mix(tmp_path, small_data):
    sounds = pytest.importorskip("stemgenre.app.sounds")
    words = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path / 'out'}"]
    settings = load_settings([*words, "CHANNELS=mix", "BACKBONE=cnn", "EPOCHS=1"])
    out = run_training(settings)
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(seconds=3), 8000)
    classifier = sounds.SoundClassifier(settings, [out / "best_model.pth"], [], max_seconds=9)
    prediction, html = classifier.predict(path)
    assert prediction.genre in html
    assert html.count("<audio") == 1, "of the sound: nothing was separated"


def test_of_two_starts_at_once_the_lock_decides(tmp_path, small_data):
    words = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    with output_lock(tmp_path), pytest.raises(UserError, match="is in use by process") as error:
        start_training(words, tmp_path)
    assert "\n" not in str(error.value)


def test_another_address_needs_the_password_and_hides_the_files(folder):
    server = Server(folder, "--host", "0.0.0.0")
    try:
        user, password = re.search(
            "user (.+), password (.+)", server.process.stdout.readline()
        ).groups()
        assert len(password) >= 16
        for path in (
            "/",
            "/config",
            "/gradio_api/info",
            "/assets/x",
            "/report/before/report/index.html",
            "/login",
        ):
            assert server.ask(path)[0] == 401
            assert server.ask(path, authorization="Basic eDp5")[0] == 401
        assert server.post("/gradio_api/upload", {})[0] == 401
        server.key = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        assert server.ask("/", authorization=server.key)[0] == 200
        assert names_of(server) == FIELDS.keys() - FILE_SETTINGS
    finally:
        server.stop()
