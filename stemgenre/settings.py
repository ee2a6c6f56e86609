"""Config module + KEY=VALUE overrides -> frozen groups of settings, checked before any work."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

from stemgenre.errors import UserError
from stemgenre.knobs import check, knob, parse

STEMS = ("vocals", "drums", "bass", "other")  # in the order of the cache and of the image


@dataclass(frozen=True)
class PathSettings:
    data_dir: str = knob("data")
    output_dir: str = knob(".")
    checkpoint_file: str = knob("checkpoint.pth")
    best_model_file: str = knob("best_model.pth")
    submit_file: str = knob("submit.csv")
    log_file: str = knob("train_log.txt")
    eda_dir: str = knob("eda")

    def output(self, name):
        """The path of file `name` below OUTPUT_DIR."""
        return Path(self.output_dir) / name


@dataclass(frozen=True)
class DataSettings:
    num_classes: int | str = knob(10, low=2, words=("auto",))
    test_size: float = knob(0.1, above=0, high=0.9)
    split_by_group: bool = knob(False)


@dataclass(frozen=True)
class SeparationSettings:
    separation_model: str = knob("htdemucs")
    separation_repo: str | None = knob(None)
    separation_cache_dir: str = knob("separated")
    separation_overlap: float = knob(0.21, low=0, high=0.9)
    separation_batch: int | str = knob("auto", low=1, high=1024, words=("auto",))


@dataclass(frozen=True)
class FeatureSettings:
    """What the image is made of; saved with the model, which is of no use with another image."""

    sr: int = knob(22050, low=4000, high=192000)
    clip_seconds: float = knob(30.0, low=0.5, high=600)
    n_fft: int = knob(2048, low=64, high=65536)
    hop_length: int = knob(512, low=16, high=65536)
    n_mels: int = knob(128, low=8, high=1024)
    top_db: float = knob(80.0, above=0, high=300)
    channels: str = knob(",".join(STEMS), parts=STEMS, words=("mix",))
    db_reference: str = knob("clip", choices=("clip", "stem"))
    num_channels: int = knob(4, choices=(4,))
    img_size: int = knob(600, low=64, high=2048)

    @property
    def channel_names(self):
        """What each channel of the image shows: CHANNELS, in turn if they are fewer."""
        names = self.channels.split(",")
        return [names[i % len(names)] for i in range(self.num_channels)]


@dataclass(frozen=True)
class AugmentSettings:
    augment_probability: float = knob(0.5, low=0, high=1)
    augment_pitch_shift: bool = knob(True)
    augment_time_stretch: bool = knob(True)
    augment_add_noise: bool = knob(True)
    augment_time_shift: bool = knob(True)
    augment_time_masking: bool = knob(True)
    augment_frequency_masking: bool = knob(True)
    pitch_shift_semitones: float = knob(2.0, low=0, high=24)
    time_stretch_rates: tuple[float, float] = knob((0.8, 1.2), low=0.25, high=4)
    noise_sigmas: tuple[float, float] = knob((0.001, 0.01), low=0, high=1)
    time_shift_seconds: float = knob(0.2, low=0, high=60)
    mask_fraction: float = knob(0.1, low=0, high=0.9)


@dataclass(frozen=True)
class ModelSettings:
    pretrained: bool = knob(True)
    weights_file: str | None = knob(None)
    freeze_stages: int = knob(6, low=0, high=9)
    frozen_batchnorm: str = knob("adapt", choices=("adapt", "fixed"))
    head_dropout: tuple[float, float] = knob((0.5, 0.3), low=0, high=0.95, ordered=False)
    stochastic_depth: float = knob(0.2, low=0, high=0.95)


@dataclass(frozen=True)
class TrainSettings:
    epochs: int = knob(50, low=1, high=100000)
    batch_size: int = knob(24, low=1, high=65536)
    micro_batch: int | str = knob("auto", low=1, high=65536, words=("auto",))
    lr: float = knob(2e-4, above=0, high=10)
    min_lr: float = knob(1e-6, low=0, high=10)
    weight_decay: float = knob(1e-4, low=0, high=10)
    gradient_clip: float = knob(1.0, above=0)
    patience: int = knob(10, low=1, high=100000)
    use_amp: bool = knob(True)
    compile: bool | str = knob("auto", words=("auto",))
    resume_from_checkpoint: bool = knob(False)
    load_optimizer_state: bool = knob(True)
    load_scheduler_state: bool = knob(True)
    checkpoint_minutes: float = knob(10.0, above=0)


@dataclass(frozen=True)
class MachineSettings:
    seed: int = knob(42, low=0, high=2**31 - 1)
    device: str = knob("auto")
    device_cache: float = knob(0.4, low=0, high=0.9)
    num_workers: int | str = knob("auto", low=1, high=256, words=("auto",))


@dataclass(frozen=True)
class Settings:
    """All groups; an attribute of a group is the knob's name in lower case."""

    paths: PathSettings
    data: DataSettings
    separation: SeparationSettings
    features: FeatureSettings
    augment: AugmentSettings
    model: ModelSettings
    train: TrainSettings
    machine: MachineSettings

    @property
    def cache_folder(self):
        """The separated stems' folder: SEPARATION_CACHE_DIR, below DATA_DIR unless absolute."""
        return Path(self.paths.data_dir) / self.separation.separation_cache_dir

    def knobs(self):
        """{KNOB: value} of every group."""
        return {
            item.name.upper(): getattr(getattr(self, group.name), item.name)
            for group in dataclasses.fields(self)
            for item in dataclasses.fields(group.type)
        }


KNOBS = {  # KNOB -> its field; the groups above are the only list there is
    item.name.upper(): item
    for group in dataclasses.fields(Settings)
    for item in dataclasses.fields(group.type)
}


def load_settings(config, overrides=()):
    """Settings from a config module (or any object with KNOB attributes) and KEY=VALUE strings.

    A knob that the config lacks has its default, so that an older config.py still reads.
    Raises UserError for an unknown name, a wrong type or a value out of range.
    """
    values = {name: value for name, value in vars(config).items() if name.isupper()}
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"{text!r} is not KEY=VALUE; write for example IMG_SIZE=300")
        _check_name(name, "the command line")
        values[name] = parse(KNOBS[name], value)
    for name in values:
        _check_name(name, "config.py")
    settings = Settings(*(_group(group.type, values) for group in dataclasses.fields(Settings)))
    _check_together(settings)
    return settings


def group_from(kind, values):
    """A settings group of the type `kind` from {field: value}, checked as config.py would be."""
    return _group(kind, {name.upper(): value for name, value in values.items()})


def _group(kind, values):
    given = {
        item.name: check(item, values[item.name.upper()])
        for item in dataclasses.fields(kind)
        if item.name.upper() in values
    }
    return kind(**given)


def _check_name(name, where):
    if name in KNOBS:
        return
    near = difflib.get_close_matches(name.upper(), KNOBS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "python train.py --help lists them all"
    raise UserError(f"{name} in {where} is not a knob; {hint}")


def _check_together(settings):
    """Knobs that only make sense together."""
    features, train = settings.features, settings.train
    if features.hop_length > features.n_fft:
        raise UserError(
            f"HOP_LENGTH={features.hop_length} skips samples between windows of "
            f"N_FFT={features.n_fft}; write at most {features.n_fft}"
        )
    if features.n_fft > features.clip_seconds * features.sr:
        raise UserError(
            f"N_FFT={features.n_fft} is longer than CLIP_SECONDS={features.clip_seconds}; "
            f"write at most {int(features.clip_seconds * features.sr)}"
        )
    if train.min_lr > train.lr:
        raise UserError(f"MIN_LR={train.min_lr} is above LR={train.lr}; write at most {train.lr}")
