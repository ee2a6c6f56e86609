"""The settings as a form: its fields, what is wrong in them, the command line that they make."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from stemgenre import cli
from stemgenre.errors import UserError
from stemgenre.settings import (
    CONFIG_FILE,
    PathSettings,
    Settings,
    expected,
    json_schema,
)

RECIPES = CONFIG_FILE.parent / "recipes"
NO_RECIPE = "config.py"
DEMO = "demo"
FILE_SETTINGS = {  # that name files and folders: a page for others neither shows nor takes them
    *(name.upper() for name in PathSettings.model_fields),
    "EXTRA_DATA", "PSEUDO_LABELS", "SEPARATION_REPO", "SEPARATION_CACHE_DIR", "WEIGHTS_FILE",
}  # fmt: skip
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a folder, in any system
OF_SETTING = re.compile(r"([A-Z0-9_]+)=")  # how messages about one setting begin


@dataclass(frozen=True)
class FormField:
    """A setting in the form; `choices` are its values if there are only a few."""

    section: str
    name: str
    comment: str
    accepts: str
    choices: tuple[str, ...]


@dataclass
class Checked:
    """A form's content: the words of its command line, and what is wrong in it."""

    words: list[str]  # after "python train.py"
    changed: dict[str, str] = field(default_factory=dict)  # {setting: the recipe's value}
    errors: dict[str, str] = field(default_factory=dict)  # {setting: one line}
    general: str = ""  # what is wrong besides, in one line

    @property
    def first_error(self) -> str:
        """The first thing that is wrong; empty if the run can start."""
        return next(iter(self.errors.values()), self.general)

    @property
    def command(self) -> str:
        """The command line that starts the same run in a terminal."""
        return shlex.join(["python", "train.py", *self.words])


class Form:
    """The settings that can be changed, over config.py, `words` and a recipe.

    `words` are settings files and KEY=VALUE, as on a command line. A run's OUTPUT_DIR is its name
    below `runs_folder`. With `exposed`, FILE_SETTINGS cannot be changed.
    """

    def __init__(self, words: list[str], *, runs_folder: Path, exposed: bool) -> None:
        self.words, self.runs_folder = words, runs_folder
        hidden = FILE_SETTINGS if exposed else {"OUTPUT_DIR"}
        self.fields = [
            FormField(section, name, comment, expected(name), _choices(name))
            for section, name, _, comment in cli.describe_settings()
            if name not in hidden
        ]

    def recipes(self) -> list[str]:
        """What settings can start from: config.py alone, or a recipe."""
        return [NO_RECIPE, *sorted(path.stem for path in RECIPES.glob("*.py"))]

    def base_words(self, recipe: str, earlier: dict[str, Path]) -> list[str]:
        """The words of a recipe, or of an earlier run's settings file {name: path}, after ours.

        Raises UserError for a name that is neither.
        """
        if recipe in earlier:
            return [*self.words, str(earlier[recipe])]
        if recipe not in self.recipes():
            raise UserError(f"there is no recipe {recipe!r:.100}")
        if recipe == DEMO:
            return ["--demo", *self.words]
        path = [str(RECIPES / f"{recipe}.py")] if recipe != NO_RECIPE else []
        return [*self.words, *path]

    def settings(self, words: list[str]) -> Settings:
        """The Settings of the words of a command line of train.py. Raises UserError."""
        options = [word for word in words if word != "--demo"]
        return cli.parse_settings(options, demo=len(options) < len(words))

    def values(self, base: list[str]) -> dict[str, str]:
        """{setting: value as text} of the fields with base_words() alone."""
        values = self.settings(base).values()
        return {field.name: as_text(values[field.name]) for field in self.fields}

    def check(self, base: list[str], run_name: str, texts: dict[str, str]) -> Checked:
        """The Checked content of a form; `texts` are {setting: text} of its fields.

        Raises UserError for a setting that is not in the form.
        """
        recipe = self.values(base)
        if unknown := texts.keys() - recipe.keys():
            raise UserError(f"{min(unknown)} cannot be set here")
        texts = {name: text.strip() for name, text in texts.items()}
        changed = {
            name: recipe[name] for name in recipe if texts.get(name, recipe[name]) != recipe[name]
        }
        overrides = {name: f"{name}={texts[name]}" for name in changed}
        errors, general = {}, ""
        if not RUN_NAME.fullmatch(run_name):
            general = f"{run_name!r:.80} is no name of a run: use letters, digits, - and _"
            run_name = "run"
        output = f"OUTPUT_DIR={self.runs_folder / run_name}"
        while True:
            good = [word for name, word in overrides.items() if name not in errors]
            try:
                self.settings([*base, output, *good])
                break
            except UserError as error:
                begin = OF_SETTING.match(str(error))
                if not begin or begin[1] not in recipe or begin[1] in errors:
                    general = general or str(error)
                    break
                errors[begin[1]] = str(error)
        return Checked([*base, output, *overrides.values()], changed, errors, general)


def as_text(value: object) -> str:
    """A setting's value as it is written after KEY=."""
    return value if isinstance(value, str) else repr(value)


def _choices(name):
    """The values of a setting that has only a few, as text."""
    schema = json_schema(name)
    if schema.get("type") == "boolean":
        return ("True", "False")
    return tuple(schema.get("enum", ()))
