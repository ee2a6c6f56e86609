"""The page's four tabs: Train, Try, Data, Results. What they show is read from disk."""

import contextlib
import re
from pathlib import Path

import gradio as gr
from markupsafe import Markup

from stemgenre.app import views
from stemgenre.app.form import DEMO, NO_RECIPE, Form
from stemgenre.app.runs import Background, Runs, start_training
from stemgenre.app.try_tab import TryTab
from stemgenre.errors import UserError
from stemgenre.settings import Settings

TICK_SECONDS = 1.0  # between two looks at the run's files
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
IN_ORDER = {"concurrency_id": "form", "concurrency_limit": 1}  # an answer replaces no later one
OPEN_SECTION = "Training"
EARLIER = "settings of "


class Page:
    """What the tabs share: the settings, the runs, eda.py's process, the last model."""

    def __init__(self, words: list[str], settings: Settings, runs: Runs, *, exposed: bool) -> None:
        self.settings, self.runs, self.exposed = settings, runs, exposed
        self.form = Form(words, runs_folder=runs.folder, exposed=exposed)
        self.eda = Background("eda.py")

    def build(self) -> gr.Blocks:
        """The gr.Blocks of the page.

        Uploads are deleted when they are predicted, others after a day: a batch can take hours.
        """
        with gr.Blocks(
            title="Stem Genre", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as blocks:
            gr.HTML("<h1>Stem Genre</h1>")
            with gr.Tabs():
                with gr.Tab("Train", id="train"):
                    self._train_tab(blocks)
                with gr.Tab("Try", id="try") as tab:
                    TryTab(self.settings, self.runs).build(blocks, tab)
                with gr.Tab("Data", id="data"):
                    self._data_tab()
                with gr.Tab("Results", id="results") as tab:
                    self._results_tab(tab)
        return blocks

    # Train

    def _train_tab(self, blocks):
        with gr.Row():
            shown = gr.Dropdown(
                [], label="Run", info="below " + str(self.runs.folder), elem_id="run"
            )
            stop = gr.Button("Stop and save", variant="stop", elem_id="stop")
            resume = gr.Button("Resume", elem_id="resume")
        line = gr.HTML(elem_id="run-message")
        progress = gr.HTML(elem_id="progress")
        curves = gr.HTML(elem_id="curves")
        with gr.Accordion("Log", open=False):
            log = gr.Textbox(
                show_label=False, lines=12, max_lines=12, autoscroll=True, elem_id="log"
            )
        gr.HTML("<h2>A new run</h2>")
        with gr.Row():
            recipe = gr.Dropdown(
                self._recipes(), value=NO_RECIPE, label="Recipe", elem_id="recipe",
                info="what the settings start from; changes are marked",
            )  # fmt: skip
            name = gr.Textbox(
                "run", label="Name", info="of its folder", elem_id="name", max_length=64
            )
        fields, notes = self._form_fields()
        command = gr.Code(label="The same in a terminal", language="shell", elem_id="command")
        wrong = gr.HTML(elem_id="form-message")
        start = gr.Button("Start training", variant="primary", elem_id="start")

        everything = [recipe, name, *fields]
        checked = [*notes, command, wrong]
        for component in (name, *fields):
            event = component.blur if isinstance(component, gr.Textbox) else component.input
            event(self._check, everything, checked, trigger_mode="always_last", **IN_ORDER, **QUIET)
        recipe.input(self._fill, [recipe, name], [name, *fields], **IN_ORDER, **QUIET).then(
            self._check, everything, checked, **IN_ORDER, **QUIET
        )
        start.click(self._start, everything, [shown, *checked], **IN_ORDER, **QUIET)
        stop.click(self._stop, shown, line, queue=False, **QUIET)
        resume.click(self._resume, shown, line, concurrency_limit=None, **QUIET)
        seen = gr.State([])
        blocks.load(self._first_look, None, [shown, recipe], queue=False, **QUIET).then(
            self._check, everything, checked, **IN_ORDER, **QUIET
        )
        gr.Timer(TICK_SECONDS).tick(
            self._look,
            [shown, seen],
            [shown, recipe, progress, curves, log, stop, resume, seen],
            queue=False,
            **QUIET,
        )

    def _form_fields(self):
        """(components, notes) of the form's fields, a group for each section of config.py."""
        components, notes, values = [], [], self.form.values(self._base(NO_RECIPE))
        for section in dict.fromkeys(field.section for field in self.form.fields):
            is_open = section == OPEN_SECTION
            with gr.Accordion(section, open=is_open), gr.Row():
                for field in self.form.fields:
                    if field.section != section:
                        continue
                    with gr.Column(min_width=300, elem_classes="field"):
                        common = {
                            "label": field.name,
                            "info": f"{field.comment} ({field.accepts})",
                            "elem_id": f"set-{field.name}",
                        }
                        value = values[field.name]
                        if field.choices:
                            component = gr.Dropdown(list(field.choices), value=value, **common)
                        else:
                            component = gr.Textbox(value, max_length=1000, **common)
                        components.append(component)
                        notes.append(gr.HTML(elem_id=f"note-{field.name}"))
        return components, notes

    def _earlier(self):
        """{recipe: settings_used.py} of the runs."""
        files = {run.name: run.file("settings_used.py") for run in self.runs.find().values()}
        return {f"{EARLIER}{name}": path for name, path in files.items() if path}

    def _recipes(self):
        return [*self.form.recipes(), *self._earlier()]

    def _base(self, recipe):
        return self.form.base_words(recipe, self._earlier())

    def _fill(self, recipe, name):
        """The run's name and the fields' values of a recipe; what is wrong with it, _check says.

        A name that somebody wrote stays.
        """
        try:
            values = self.form.values(self._base(recipe))
        except UserError:  # in an earlier run's settings
            return [gr.skip() for _ in ("name", *self.form.fields)]
        if re.sub(r"-\d+$", "", name) in map(_run_name, self._recipes()):
            name = self.runs.free_name(_run_name(recipe))
        return [name, *values.values()]

    def _checked(self, recipe, name, *texts):
        names = [field.name for field in self.form.fields]
        return self.form.check(
            self._base(recipe), name, dict(zip(names, map(str, texts), strict=True))
        )

    def _notes(self, checked):
        """The note of each field: what is wrong, or the recipe's value if it was changed."""
        for field in self.form.fields:
            if field.name in checked.errors:
                yield views.message(checked.errors[field.name])
            elif field.name in checked.changed:
                yield views.message(
                    f"changed; the recipe has {checked.changed[field.name]}", "note changed"
                )
            else:
                yield Markup()

    def _check(self, *content):
        """The notes, the command line and what is wrong in general."""
        try:
            checked = self._checked(*content)
        except UserError as error:
            return [*[gr.skip() for _ in self.form.fields], gr.skip(), views.message(str(error))]
        return [*self._notes(checked), checked.command, views.message(checked.general)]

    def _start(self, *content):
        """Starts the run of the form, and shows it."""
        try:
            checked = self._checked(*content)
            notes = list(self._notes(checked))
            if not checked.first_error:
                self._check_is_new(content[1])
                start_training(checked.words, self.runs.folder / content[1])
        except UserError as error:
            return [
                gr.skip(),
                *[gr.skip() for _ in self.form.fields],
                gr.skip(),
                views.message(str(error)),
            ]
        if checked.first_error:
            return [gr.skip(), *notes, checked.command, views.message(checked.first_error)]
        shown = gr.Dropdown(list(self.runs.find()), value=content[1])
        return [shown, *notes, checked.command, views.message("started", "soft")]

    def _check_is_new(self, name):
        """Raises UserError if a run of that name has what a new one would replace."""
        run = self.runs.find().get(name)
        if run and (run.models() or run.checkpoints()):
            state = "is running" if run.holder() else "has been trained already"
            free = self.runs.free_name(name)
            raise UserError(f"{name} {state}; choose another name, such as {free}")

    def _stop(self, name):
        try:
            self.runs.get(name).stop()
        except UserError as error:
            return views.message(str(error))
        return views.message("it saves after the current step and stops", "soft")

    def _resume(self, name):
        try:
            run = self.runs.get(name)
            settings = run.file("settings_used.py")
            if settings is None:
                raise UserError(f"{run.name} has no settings_used.py; start it again")
            words = [str(settings), f"OUTPUT_DIR={run.folder}"]
            if run.checkpoints():  # or else it was stopped before training
                words.append("RESUME_FROM_CHECKPOINT=True")
            start_training(words, run.folder)
        except UserError as error:
            return views.message(str(error))
        return views.message("resumed", "soft")

    def _first_look(self):
        """The choices of a page that was just opened: the run that changed last is shown."""
        names = list(self.runs.find())
        return gr.Dropdown(names, value=names[0] if names else None), gr.Dropdown(self._recipes())

    def _look(self, name, seen):
        """What has changed of the shown run since `seen`; nothing else is sent."""
        runs = self.runs.find()
        names, recipes = list(runs), self._recipes()
        choices = sorted(names), recipes
        if name not in runs:
            values = [*choices, Markup(), Markup(), "", False, False]
        else:
            run = runs[name]
            running = run.holder() is not None
            can_resume = not running and run.file("settings_used.py") is not None
            texts = views.progress(run), views.curves(run), run.log_tail()
            values = [*choices, *texts, running, can_resume]
        updates = [
            gr.skip() if index < len(seen) and seen[index] == value else _update(index, value)
            for index, value in enumerate(values)
        ]
        return [*updates, values]

    # Data and Results

    def _data_tab(self):
        recipe = gr.Radio([NO_RECIPE, DEMO], value=NO_RECIPE, label="Data of", elem_id="eda-recipe")
        start = gr.Button("Look at the data", variant="primary", elem_id="eda-start")
        wrong, state = gr.HTML(elem_id="eda-message"), gr.HTML(elem_id="eda-state")
        output = gr.Textbox(label="Output", lines=10, max_lines=10, elem_id="eda-output")

        def begin(recipe):
            try:
                self.eda.start(self._base(recipe if recipe == DEMO else NO_RECIPE))
            except UserError as error:
                return views.message(str(error))
            return Markup()

        def look(seen):
            pages = list(self.eda_pages())
            values = [views.data_page(self.eda.is_running, pages), self.eda.output()]
            return [*(gr.skip() if values == seen else value for value in values), values]

        start.click(begin, recipe, wrong, queue=False, **QUIET)
        seen = gr.State([])
        gr.Timer(2 * TICK_SECONDS).tick(look, seen, [state, output, seen], queue=False, **QUIET)

    def eda_pages(self) -> dict[str, Path]:
        """{name: path} of eda.py's pages of the data that the tab can look at."""
        found = {}
        for name in (NO_RECIPE, DEMO):
            with contextlib.suppress(UserError):
                path = Path(self.form.settings(self._base(name)).paths.eda_dir) / "index.html"
                if path.is_file():
                    found[name] = path
        return found

    def _results_tab(self, tab):
        refresh = gr.Button("Refresh", elem_id="results-refresh")
        table = gr.HTML(elem_id="results")

        def look():
            return views.results(list(self.runs.find().values()), exposed=self.exposed)

        for event in (tab.select, refresh.click):
            event(look, None, table, queue=False, **QUIET)


def _run_name(recipe):
    """The name of a run's folder that a recipe suggests."""
    return recipe.removeprefix(EARLIER).rpartition("/")[2] if recipe != NO_RECIPE else "run"


def _update(index, value):
    """What replaces a value of _look: choices, texts, or whether a button can be pressed."""
    if index < 2:
        return gr.Dropdown(value)
    return gr.Button(interactive=value) if isinstance(value, bool) else value
