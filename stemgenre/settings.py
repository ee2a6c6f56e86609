"""Settings: config.py, settings files and KEY=VALUE, laid over each other, then checked.

config.py has each setting's default and comment, this module its type and range. Settings files
(config.py is the first of them) are parsed and never run.
"""

import ast
import difflib
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
)

from stemgenre.errors import UserError
from stemgenre.setting_checks import check_together

STEMS = ("vocals", "drums", "bass", "other")  # in the order of the cache and of the image
CONFIG_FILE = Path(__file__).parents[1] / "config.py"
TRACKERS = ("tensorboard", "wandb")
OF_ONE_START = ("RESUME_FROM_CHECKPOINT", "LOAD_OPTIMIZER_STATE", "LOAD_SCHEDULER_STATE")
DEMUCS_OUTPUT = Path("separated")  # a folder that the command `demucs` makes
JSON_TYPES = {str: "string", bool: "boolean", list: "array", tuple: "array", type(None): "null"}
ALIASES = {"NUM_WORKERS": "NUM_THREADS"}  # names of older config.py files


def _ordered(values: tuple) -> tuple:
    if list(values) != sorted(values):
        raise ValueError("not in order")
    return values


def _known_channels(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= {"mix", *STEMS} or len(set(names)) < len(names):
        raise ValueError("unknown channels")
    return ",".join(names)


def _known_trackers(text: str | None) -> str | None:
    names = [name.strip() for name in text.split(",")] if text else []
    if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
        raise ValueError("unknown trackers")
    return ",".join(names) or None


Auto = Literal["auto"]
Pixels = Annotated[int, Field(ge=64, le=2048)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]  # not blank, no NUL
FilePath = Annotated[Text, AfterValidator(os.path.expanduser)]  # ~ is the home folder
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


class _Group(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Settings that belong together; a field is the setting's name in lower case."""

    @classmethod
    def from_config(cls, **changes: Any) -> Self:
        """The group as config.py has it, but for some fields. Raises UserError for a bad value."""
        config = config_values()
        return make_group(cls, {name: config[name.upper()] for name in cls.model_fields} | changes)


class PathSettings(_Group):
    data_dir: FilePath
    output_dir: FilePath
    checkpoint_file: FilePath
    best_model_file: FilePath
    submit_file: FilePath
    log_file: FilePath
    eda_dir: FilePath

    def output(self, name: str) -> Path:
        """The path of file `name` below OUTPUT_DIR."""
        return Path(self.output_dir) / name


class DataSettings(_Group):
    num_classes: Annotated[int, Field(ge=2)] | Auto
    test_size: Annotated[float, Field(gt=0, le=0.9)]
    folds: Annotated[int, Field(ge=1, le=100)]
    seeds: Annotated[int, Field(ge=1, le=100)]
    split_by_group: bool
    extra_data: Annotated[
        FilePath | tuple[FilePath, ...] | None,
        AsTuple,
        Field(description="a folder, several, or None"),
    ]
    pseudo_labels: FilePath | None
    pseudo_confidence: Annotated[float, Field(ge=0, le=1)]


class SeparationSettings(_Group):
    separation_model: Text
    separation_repo: FilePath | None
    separation_cache_dir: FilePath
    separation_overlap: Annotated[float, Field(ge=0, le=0.9)]
    separation_batch: Annotated[int, Field(ge=1, le=1024)] | Auto


class FeatureSettings(_Group):
    """What the image is made of; saved with the model, which needs the same image."""

    sr: Annotated[int, Field(ge=4000, le=192000)]
    clip_seconds: Annotated[float, Field(ge=0.5, le=600)]
    n_fft: Annotated[int, Field(ge=64, le=65536)]
    hop_length: Annotated[int, Field(ge=16, le=65536)]
    n_mels: Annotated[int, Field(ge=8, le=1024)]
    top_db: Annotated[float, Field(gt=0, le=250)]
    channels: Annotated[
        str,
        AfterValidator(_known_channels),
        Field(description=f"one or more of mix, {', '.join(STEMS)}, separated by commas"),
    ]
    db_reference: Literal["clip", "stem"]
    num_channels: Annotated[int, Field(ge=1, le=64)] | Auto
    img_size: Annotated[
        Pixels | tuple[Pixels, Pixels],
        AsTuple,
        Field(description="an integer, or two (height, width), from 64 to 2048"),
    ]

    @property
    def channel_names(self) -> list[str]:
        """What each channel of the image shows: CHANNELS, repeated in turn up to NUM_CHANNELS."""
        names = self.channels.split(",")
        count = len(names) if self.num_channels == "auto" else self.num_channels
        return [names[i % len(names)] for i in range(count)]

    @property
    def cached_waves(self) -> tuple[str, ...]:
        """The waves of a clip that CHANNELS needs: the mix alone, or else all stems."""
        return ("mix",) if self.channels == "mix" else STEMS

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size,) * 2


class AugmentSettings(_Group):
    augment_probability: Annotated[float, Field(ge=0, le=1)]
    augment_pitch_shift: bool
    augment_time_stretch: bool
    augment_add_noise: bool
    augment_time_shift: bool
    augment_time_masking: bool
    augment_frequency_masking: bool
    pitch_shift_semitones: Annotated[float, Field(ge=0, le=24)]
    time_stretch_rates: Annotated[
        tuple[Annotated[float, Field(ge=0.25, le=4)], Annotated[float, Field(ge=0.25, le=4)]],
        AsTuple,
        AfterValidator(_ordered),
        Field(description="two numbers (low, high) from 0.25 to 4"),
    ]
    noise_levels_db: Annotated[
        tuple[Annotated[float, Field(ge=0, le=200)], Annotated[float, Field(ge=0, le=200)]],
        AsTuple,
        AfterValidator(_ordered),
        Field(description="two numbers (low, high) from 0 to 200"),
    ]
    time_shift_seconds: Annotated[float, Field(ge=0, le=60)]
    mask_fraction: Annotated[float, Field(ge=0, le=0.9)]
    stem_gain_db: Annotated[float, Field(ge=0, le=60)]
    stem_dropout: Annotated[float, Field(ge=0, le=1)]
    stem_swap: Annotated[float, Field(ge=0, le=1)]
    mixup_alpha: Annotated[float, Field(ge=0, le=100)]


class ModelSettings(_Group):
    backbone: Text
    pretrained: bool
    weights_file: FilePath | None
    freeze_stages: Annotated[int, Field(ge=0, le=100)]
    train_first_conv: bool
    frozen_batchnorm: Literal["adapt", "fixed"]
    head_dropout: Annotated[
        tuple[Annotated[float, Field(ge=0, le=0.95)], Annotated[float, Field(ge=0, le=0.95)]],
        AsTuple,
        Field(description="two numbers (first, second) from 0 to 0.95"),
    ]
    stochastic_depth: Annotated[float, Field(ge=0, le=0.95)]


class TrainSettings(_Group):
    epochs: Annotated[int, Field(ge=1, le=100000)]
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    micro_batch: Annotated[int, Field(ge=1, le=65536)] | Auto
    lr: Annotated[float, Field(gt=0, le=10)]
    min_lr: Annotated[float, Field(ge=0, le=10)]
    warmup_epochs: Annotated[int, Field(ge=0, le=100000)]
    lr_decay_per_stage: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    gradient_clip: Annotated[float, Field(gt=0)]
    label_smoothing: Annotated[float, Field(ge=0, le=0.9)]
    class_weights: bool
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    best_by: Literal["accuracy", "loss", "last"]
    patience: Annotated[int, Field(ge=1, le=100000)]
    use_amp: bool
    compile: bool
    tta: Annotated[int, Field(ge=0, le=16)]
    resume_from_checkpoint: bool
    load_optimizer_state: bool
    load_scheduler_state: bool
    checkpoint_minutes: Annotated[float, Field(gt=0)]


class TrackingSettings(_Group):
    tracker: Annotated[
        Text | None,
        AfterValidator(_known_trackers),
        Field(description=f"one or more of {', '.join(TRACKERS)}, separated by commas, or None"),
    ]
    log_every_steps: Annotated[int, Field(ge=0, le=10**6)]


class MachineSettings(_Group):
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    device: Text
    device_cache: Annotated[float, Field(ge=0, le=0.9)]
    num_threads: Annotated[int, Field(ge=1, le=256)] | Auto


class Settings(_Group):
    """All groups of settings."""

    paths: PathSettings
    data: DataSettings
    separation: SeparationSettings
    features: FeatureSettings
    augment: AugmentSettings
    model: ModelSettings
    train: TrainSettings
    tracking: TrackingSettings
    machine: MachineSettings

    def of_member(self, name: str, *, seed: int) -> Self:
        """The settings of one of several networks: its folder below OUTPUT_DIR, its SEED."""
        paths = self.paths.model_copy(update={"output_dir": str(self.paths.output(name))})
        machine = self.machine.model_copy(update={"seed": seed})
        return self.model_copy(update={"paths": paths, "machine": machine})

    @property
    def cache_folder(self) -> Path:
        """The folder of separated stems: SEPARATION_CACHE_DIR, as it is or below DATA_DIR.

        It is a path of its own if it is absolute, begins with DATA_DIR or exists; DEMUCS_OUTPUT
        only if our stems are in it.
        """
        data_dir, folder = Path(self.paths.data_dir), Path(self.separation.separation_cache_dir)
        own = folder.is_relative_to(data_dir) and data_dir != Path()
        exists = any(folder.glob("*.npz")) if folder == DEMUCS_OUTPUT else folder.exists()
        return folder if own or exists else data_dir / folder

    def values(self) -> dict[str, Any]:
        """{SETTING: value} of all groups, in the order of config.py's groups."""
        return {
            name.upper(): getattr(getattr(self, group), name)
            for group, field in type(self).model_fields.items()
            for name in field.annotation.model_fields
        }


FIELDS = {  # SETTING -> its pydantic field; the groups above are the only list there is
    name.upper(): field
    for group in Settings.model_fields.values()
    for name, field in group.annotation.model_fields.items()
}


def load_settings(words: Iterable[str] = (), *, config_file: Path = CONFIG_FILE) -> Settings:
    """The Settings of config.py, then of the settings files, then of the KEY=VALUE in `words`.

    Raises UserError for an unknown name, a wrong type or a value out of range.
    """
    words = list(words)
    values = config_values() if config_file == CONFIG_FILE else read_settings_file(config_file)
    if missing := [name for name in FIELDS if name not in values]:
        more = f" and {len(missing) - 1} more settings" if len(missing) > 1 else ""
        raise UserError(
            f"{config_file.name} lacks {missing[0]}{more}; restore the current config.py and lay "
            "your own over it: python train.py my_config.py"
        )
    for word in words:
        if is_settings_file(word):
            values = values | read_settings_file(Path(word))
    for word in words:
        if not is_settings_file(word):
            values = values | _parse_override(word)
    groups = {
        group: make_group(
            field.annotation,
            {name: values[name.upper()] for name in field.annotation.model_fields},
        )
        for group, field in Settings.model_fields.items()
    }
    settings = Settings(**groups)
    check_together(settings)
    return settings


@functools.cache
def config_values() -> dict[str, Any]:
    """{SETTING: value} of config.py as this process has first read it.

    It may be edited for the next run while one trains.
    """
    return read_settings_file(CONFIG_FILE)


def is_settings_file(word: str) -> bool:
    """Whether a word of the command line is the path of a settings file, and not KEY=VALUE."""
    is_value = re.match(r"\s*\w+\s*=", word)  # not any =: a folder may be named lr=0.1
    return word.endswith(".py") and not is_value


def read_settings_file(path: Path) -> dict[str, Any]:
    """{SETTING: value} of a Python file of literal assignments, parsed and never run.

    Raises UserError, with the line, for anything else in it.
    """
    path = Path(path)
    values = {}
    for name, node in parse_assignments(path):
        where = f"{path} line {node.lineno}"
        try:
            value = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise UserError(
                f"{where}: {name} is not a literal; settings files are read, not run"
            ) from None
        values |= _canonical(name, value, where)
    return values


def parse_assignments(path: Path) -> list[tuple[str, ast.Assign]]:
    """(name, node) of every assignment of a settings file. Raises UserError for other code."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"there is no settings file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        where = f"{path} line {error.lineno}" if error.lineno else str(path)
        slash = "; in a path write / for \\" if "unicodeescape" in error.msg else ""
        raise UserError(f"{where}: {error.msg}{slash}") from None
    except (MemoryError, RecursionError):
        raise UserError(f"{path} is nested too deeply to be read") from None
    except ValueError:  # UnicodeDecodeError, or a NUL
        raise UserError(f"{path} is not text in UTF-8; save it in UTF-8") from None
    assignments = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        single = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not single or not isinstance(node.targets[0], ast.Name):
            raise UserError(f"{path} line {node.lineno}: expected NAME = literal, one per line")
        assignments.append((node.targets[0].id, node))
    return assignments


def _parse_override(word):
    """{SETTING: value} of KEY=VALUE: a literal, or the text itself where text is expected."""
    name, separator, text = (part.strip() for part in word.partition("="))
    if not separator:
        raise UserError(f"{word!r} is not KEY=VALUE; write for example IMG_SIZE=300")
    literal = text.capitalize() if text.lower() in ("true", "false", "none") else text
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    ((name, value),) = _canonical(name, value, "command line").items()
    schema = json_schema(name)
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    takes_text = "string" in kinds and not kinds & {"integer", "number"}
    if takes_text and JSON_TYPES.get(type(value)) not in kinds:
        value = text  # DATA_DIR=2024 is a folder's name
    return {name: value}


def _canonical(name, value, where):
    """{current name: value} of a setting. Raises UserError if there is no such setting."""
    if name == "NUM_WORKERS" and value == 0:  # PyTorch's "in the main process"
        value = 1
    name = ALIASES.get(name, name)
    if name not in FIELDS:
        near = difflib.get_close_matches(name.upper(), FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "python train.py --help lists all settings"
        raise UserError(f"unknown setting {name} ({where}); {hint}")
    return {name: value}


def make_group(kind: type[_Group], values: dict[str, Any]) -> _Group:
    """A settings group of the type `kind` from {field: value}. Raises UserError for a bad value."""
    try:
        return kind(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        if name not in kind.model_fields or name not in values:
            raise UserError(f"unknown or missing setting {name.upper()}") from None
        raise UserError(
            f"{name.upper()}={values[name]!r:.200} is invalid: expected {expected(name.upper())}"
        ) from None


def expected(name: str) -> str:
    """What a setting takes, in words: 'an integer from 1 to 1024 or "auto"'."""
    schema = json_schema(name)
    if "description" in schema:
        return schema["description"]
    return " or ".join(_schema_text(part) for part in schema.get("anyOf", [schema]))


def json_schema(name: str) -> dict[str, Any]:
    """The JSON schema of a setting: its type and range, as pydantic writes it."""
    field = FIELDS[name]
    return TypeAdapter(Annotated[field.annotation, field]).json_schema()


def _schema_text(schema):
    if "enum" in schema:
        return " or ".join(map(_quoted, schema["enum"]))
    if "const" in schema:
        return _quoted(schema["const"])
    nouns = {"integer": "an integer", "number": "a number", "boolean": "True or False",
             "string": "text", "null": "None"}  # fmt: skip
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to",
              "exclusiveMaximum": "below"}  # fmt: skip
    limits = [
        f"{word} {str(schema[key]).removesuffix('.0')}"
        for key, word in bounds.items()
        if key in schema
    ]
    return " ".join([nouns[schema["type"]], *limits])


def _quoted(value):
    return f'"{value}"' if isinstance(value, str) else str(value)


def format_settings(settings: Settings) -> str:
    """A settings file of everything that makes `settings` what they are.

    OF_ONE_START is left out: it belongs to one start, not to the run.
    """
    lines = [
        f"{name} = {value!r}"
        for name, value in settings.values().items()
        if name not in OF_ONE_START
    ]
    header = '"""The settings of a run: python train.py settings_used.py repeats it."""\n\n'
    return header + "\n".join(lines) + "\n"
