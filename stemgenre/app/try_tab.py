"""The tab Try: sounds are uploaded or recorded, predicted one after the other, and deleted."""

import contextlib
from pathlib import Path

import gradio as gr
from markupsafe import Markup

from stemgenre.app import views
from stemgenre.app.runs import Runs
from stemgenre.data.find_files import AUDIO_SUFFIXES
from stemgenre.errors import UserError
from stemgenre.settings import Settings

MAX_SECONDS = 900.0  # of a sound
MAX_FILES = 1000  # at once
DETAILED = 8  # sounds of an upload that are shown with pictures and players; all are in the table


class TryTab:
    """The tab for the models of some runs."""

    def __init__(self, settings: Settings, runs: Runs) -> None:
        self.settings, self.runs = settings, runs

    def build(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Adds the tab's components to `tab` of `blocks`."""
        gr.HTML(
            f"<p class='soft'>Sounds of up to {MAX_SECONDS / 60:.0f} minutes; they are deleted as "
            "soon as they are predicted.</p>"
        )
        models = gr.Dropdown(
            [], label="Models", multiselect=True, elem_id="models",
            info="the probabilities of several are averaged",
        )  # fmt: skip
        with gr.Row():
            files = gr.File(
                file_count="multiple", label="Sounds: drop files here", elem_id="files",
                file_types=list(AUDIO_SUFFIXES), height=170,
            )  # fmt: skip
            folder = gr.File(file_count="directory", label="A folder", elem_id="folder", height=170)
            recorded = gr.Audio(
                sources=["microphone"], type="filepath", label="Record", elem_id="record"
            )
        predict = gr.Button("Predict", variant="primary", elem_id="predict")
        message = gr.HTML(elem_id="try-message")
        table = gr.HTML(elem_id="try-table")
        slots = [gr.HTML(elem_id=f"sound-{number}") for number in range(DETAILED)]
        uploads = [files, folder, recorded]
        predict.click(
            self._predict,
            [models, *uploads],
            [message, table, *slots, *uploads],
            concurrency_limit=1,  # the others wait in a queue
            show_progress="minimal",
            show_progress_on=message,
            api_visibility="private",
        )
        look = {"fn": self._models, "inputs": models, "outputs": models, "queue": False}
        tab.select(**look, show_progress="hidden", api_visibility="private")
        blocks.load(**look, show_progress="hidden", api_visibility="private")

    def _models(self, chosen):
        names = list(self.runs.models())
        kept = [name for name in chosen or [] if name in names]
        return gr.Dropdown(names, value=kept or names[:1])

    def _predict(self, chosen, files, folder, recorded):
        """Yields the message, the table and the details as the sounds are predicted."""
        names = [name for name in folder or [] if name.lower().endswith(AUDIO_SUFFIXES)]
        names = dict.fromkeys(filter(None, [*(files or []), *names, recorded]))
        paths = [Path(name) for name in names]
        keep, clear = [gr.skip()] * (DETAILED + 2), [None] * 3
        try:
            known = self.runs.models()
            models = [known[name] for name in chosen or [] if name in known]
            if not models or len(models) < len(chosen):
                raise UserError("choose a model first; a finished training run has one")
            if not 0 < len(paths) <= MAX_FILES:
                raise UserError(f"upload or record a sound first, at most {MAX_FILES} at once")
            yield [views.message("loading the model", "soft"), *[Markup()] * (DETAILED + 1), *clear]
            runs = list(self.runs.find().values())
            from stemgenre.app.sounds import SoundClassifier  # imports torch: seconds

            loaded = SoundClassifier(self.settings, models, runs, max_seconds=MAX_SECONDS)
            with contextlib.closing(loaded) as classifier:
                for values in _predict_each(classifier, paths):
                    yield [*values, *keep[len(values) :], *[gr.skip()] * 3]
        except UserError as error:
            yield [views.message(str(error)), *keep[1:], *clear]
        finally:
            for path in [*paths, *map(Path, folder or [])]:
                _delete(path)


def _predict_each(classifier, paths):
    """Yields (message, table, details of the first DETAILED sounds) after each sound."""
    rows, predictions = [], []
    for number, path in enumerate(paths, start=1):
        result, html = classifier.predict(path)
        _delete(path)
        confidence = views.percent(result.confidence, 1) if result else "cannot be predicted"
        rows.append([path.name, result.genre if result else "", confidence])
        predictions += [(path.name, result)] if result else []
        table = views.table(["sound", "genre", "probability"], rows)
        if number == len(paths) and predictions:
            table += views.download("genres.csv", classifier.as_csv(predictions))
        failed = f", {len(rows) - len(predictions)} not" if len(rows) > len(predictions) else ""
        text = f"{len(predictions)} of {len(paths)} sounds predicted{failed}"
        done = views.message(text, "soft")
        details = [gr.skip()] * (number - 1) + [html] if number <= DETAILED else []
        yield [done, table, *details]


def _delete(path):
    """Deletes an upload and the folder that it alone was in."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
