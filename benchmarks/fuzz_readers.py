"""The kinds of files that fuzz.py damages, and what reading one gives a user."""

import contextlib
import copy
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from demucs.htdemucs import HTDemucs
from fuzz_damage import damaged, edit
from safetensors.torch import save_file
from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf

sys.path.insert(0, str(Path(__file__).parents[1]))
from stemgenre.data import audio
from stemgenre.errors import UserError
from stemgenre.features.log_mel import Frontend
from stemgenre.files import sha256
from stemgenre.runtime import MicroBatch, Runtime, StopRequest
from stemgenre.separation.demucs_model import Separator, load_demucs
from stemgenre.settings import ModelSettings, SeparationSettings, load_settings
from stemgenre.training import backbones, checkpoint, model
from stemgenre.training.inference import load_models, stems_to_logits
from stemgenre.training.saving import restore
from stemgenre.training.trainer import Trainer

CPU = torch.device("cpu")
SETTINGS = (
    "SR=8000", "N_FFT=256", "HOP_LENGTH=128", "N_MELS=16", "CLIP_SECONDS=1", "IMG_SIZE=64",
    "PRETRAINED=False", "FREEZE_STAGES=0", "EPOCHS=3", "BATCH_SIZE=2", "DEVICE=cpu",
    "RESUME_FROM_CHECKPOINT=True",
)  # fmt: skip
DEMUCS = {
    "sources": ["drums", "bass", "other", "vocals"], "channels": 4, "depth": 2, "t_layers": 1,
    "t_heads": 2, "bottom_channels": 8, "segment": 1, "samplerate": 4000, "dconv_mode": 0,
    "nfft": 256,
}  # fmt: skip
CLIPS = pd.DataFrame({"clip": ["a", "b"], "file_name": ["a.wav", "b.wav"], "target": [0, 1]})
STEMS = torch.randn(4, 8000, generator=torch.Generator().manual_seed(0)) / 10
LABELS = {"label_names": ["blues", "rock"], "label_ids": [0, 7]}
CHECKED = (
    "checkpoint", "model", "weights", "named weights", "demucs .th", "named demucs .th",
    "named demucs .safetensors",
)  # fmt: skip
UNCHECKED = ("older weights", "demucs .safetensors", "demucs .yaml")
EDITED = ("edited checkpoint", "edited model", "edited weights", "edited demucs .th")
FILES = (*CHECKED, *UNCHECKED, *EDITED)
AUDIO = {  # (suffix, libsndfile's format and subtype, channels) of each kind's variants
    "au": [(".au", "AU", "PCM_16", 1), (".au", "AU", "ULAW", 2), (".au", "AU", "FLOAT", 1)],
    "wav": [
        (".wav", "WAV", "PCM_16", 1), (".wav", "WAV", "FLOAT", 2), (".wav", "WAV", "IMA_ADPCM", 1),
        (".wav", "WAVEX", "PCM_24", 2),
    ],
    "rf64": [(".wav", "RF64", "PCM_16", 1), (".wav", "RF64", "FLOAT", 2)],
    "w64": [(".w64", "W64", "PCM_16", 1), (".w64", "W64", "FLOAT", 2)],
    "aiff": [(".aiff", "AIFF", "PCM_16", 1), (".aif", "AIFF", "PCM_24", 2)],
    "flac": [(".flac", "FLAC", "PCM_16", 1), (".flac", "FLAC", "PCM_24", 2)],
    "ogg": [(".ogg", "OGG", "VORBIS", 1), (".ogg", "OGG", "VORBIS", 2)],
    "opus": [(".opus", "OGG", "OPUS", 1), (".opus", "OGG", "OPUS", 2)],
    "mp3": [(".mp3", "MP3", "MPEG_LAYER_III", 1), (".mp3", "MP3", "MPEG_LAYER_III", 2)],
    "m4a": [(".m4a", None, "aac", 1), (".m4a", None, "alac", 2)],
}  # fmt: skip
UNCOMPRESSED = ("au", "wav", "rf64", "w64", "aiff")
HEADER_BYTES = {  # and more: within them, damage can change what the file says of itself
    "au": 24, "wav": 120, "rf64": 160, "w64": 240, "aiff": 120, "flac": 100, "ogg": 0, "opus": 0,
    "mp3": 600,
}  # fmt: skip
SLACK_BYTES = 1024  # that a file may have less than its header says, as audio.py has it


def use_tiny_backbone():
    """Networks of this process are tiny: EfficientNet-B3's nine stages with 0.05 M weights."""

    def build(name, stochastic_depth):
        stages, last = _efficientnet_conf("efficientnet_b3", width_mult=0.15, depth_mult=0.2)
        return EfficientNet(stages, 0.3, stochastic_depth_prob=stochastic_depth, last_channel=last)

    backbones.torchvision_network = build


def same(left, right, *, values=True):
    """Whether two contents are the same; without `values`, in names, types and shapes."""
    if isinstance(left, torch.Tensor):
        alike = isinstance(right, torch.Tensor) and left.dtype == right.dtype
        alike = alike and left.shape == right.shape
        return alike and (not values or torch.equal(left, right))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same(left[key], right[key], values=values) for key in left
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(
            same(a, b, values=values) for a, b in zip(left, right, strict=True)
        )
    return not values or left == right


class Reader:
    """A kind of model file: its intact bytes, and what reading damaged ones gives.

    Subclasses say what a file's content is, and what follows once it is read.
    """

    classes = ()  # that its pickle may name
    beside = ""  # the suffix of files that stay intact

    def __init__(self, folder, kind):
        self.kind, self.folder = kind, folder / kind.removeprefix("edited ")
        (path,) = (path for path in self.folder.iterdir() if path.suffix != self.beside)
        self.name, self.intact = path.name, path.read_bytes()
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(self.folder, place, dirs_exist_ok=True)
            self.expected = copy.deepcopy(self.content(Path(place)))

    def damage(self, place, rng):
        """Puts a damaged file there; returns how it is damaged."""
        shutil.copytree(self.folder, place, dirs_exist_ok=True)
        path = place / self.name
        if self.kind not in EDITED:
            data, how = damaged(self.intact, rng)
            path.write_bytes(data)
        elif rng.random() < 0.5:
            with torch.serialization.safe_globals(self.classes):
                whole = torch.load(io.BytesIO(self.intact), weights_only=True)
            torch.save(edit(whole, rng), path)
            how = "a value edited"
        else:
            with (
                zipfile.ZipFile(io.BytesIO(self.intact)) as whole,
                zipfile.ZipFile(path, "w") as new,
            ):
                for name in whole.namelist():
                    data = whole.read(name)
                    if name.endswith("data.pkl"):
                        data, how = damaged(data, rng)
                    new.writestr(name, data)
            how = f"in the pickle: {how}"
        return how

    def read(self, place):
        """(end, what)."""
        content = self.content(place)
        if same(content, self.expected):
            return "equal", ""
        if self.kind not in EDITED and self.kind not in UNCHECKED:
            return "other", "read with other content"
        if self.kind == "demucs .yaml" or same(content, self.expected, values=False):
            self.use(place)
            return "unnoticed" if self.kind in UNCHECKED else "edited", ""
        if self.kind in UNCHECKED:
            return "other", "read with other names, types or shapes"
        self.use(place)
        return "edited", ""

    def use(self, place):
        """Does what follows for a user."""


class Checkpoint(Reader):
    def content(self, place):
        self.trainer = new_trainer(place)
        trainer = self.trainer
        return {
            "weights": trainer.net.state_dict(),
            "best weights": trainer.best_weights,
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "state": vars(trainer.state),
            "run id": trainer.run_id,
            "channel statistics": trainer.frontend.channel_stats,
        }

    def use(self, place):
        trainer = self.trainer
        trainer.fit(after_epoch=lambda *_: None)
        load_models(trainer.best_model_path, device=CPU)


class Model(Reader):
    def content(self, place):
        (loaded,) = load_models(place / self.name, device=CPU)
        self.loaded = loaded
        names, ids = loaded.label_names, loaded.label_ids
        return [loaded.net.state_dict(), loaded.frontend.state(), names, ids]

    def use(self, place):
        loaded = self.loaded
        if max(loaded.frontend.features.image_size) <= 256 and loaded.frontend.frames < 10_000:
            stems_to_logits(
                loaded.net,
                loaded.frontend,
                [STEMS],
                micro_batch=MicroBatch(1),
                amp_dtype=None,
            )


class Weights(Reader):
    def content(self, place):
        path = place / self.name
        settings = ModelSettings.from_config(pretrained=True, weights_file=str(path))
        self.net = model.build_model(settings, num_classes=2, seed=0)
        return self.net.features.state_dict()

    def use(self, place):
        assert model.all_finite(self.net), "the weights are NaN or infinite"


class Demucs(Reader):
    classes = (HTDemucs, Fraction)

    def __init__(self, folder, kind):
        self.beside = ".safetensors" if kind.endswith(".yaml") else ".yaml"
        super().__init__(folder, kind)

    def content(self, place):
        bag = load_demucs("htdemucs", place)
        models = [[model.state_dict(), repr(model._init_args_kwargs)] for model in bag.models]
        return [models, bag.weights, bag.models[0].segment]

    def use(self, place):
        options = SeparationSettings.from_config(separation_repo=str(place))
        separator = Separator(options, sample_rate=8000, device=CPU)
        separator([torch.randn(2, 2000) / 10])


class Sound:
    """A kind of audio file: its intact variants, and what reading damaged ones gives."""

    def __init__(self, folder, kind):
        self.kind, self.intact = kind, []
        for path in sorted((folder / kind).iterdir()):
            wave = audio.decode(path)[0]
            self.intact.append((path.name, path.read_bytes(), wave))

    def damage(self, place, rng):
        """Puts a damaged file there; returns how it is damaged."""
        self.name, self.whole, self.wave = rng.choice(self.intact)
        pages = [found.start() for found in re.finditer(b"OggS", self.whole)]
        if pages and rng.random() < 0.1:
            at = rng.choice(pages[1:])
            self.data, how = self.whole[:at], f"cut the end before the page at {at}"
        else:
            self.data, how = damaged(self.whole, rng)
        (place / self.name).write_bytes(self.data)
        return how

    def read(self, place):
        """(end, what)."""
        path = place / self.name
        with contextlib.suppress(UserError):  # what only ffmpeg reads
            audio.probe(path)
        wave, rate = audio.decode(path)
        assert np.isfinite(wave).all() and wave.any(), "samples are NaN, infinite or all zero"
        assert audio.MIN_RATE <= rate <= audio.MAX_RATE, f"{rate} Hz"
        if np.array_equal(wave, self.wave):
            return "equal", ""
        if promised := self.header_promises(path):
            return "other", promised
        if self.has_whole_header():
            samples, got = self.wave.shape[1], wave.shape[1]
            slack = 0.02 * samples
            if self.kind in UNCOMPRESSED:
                slack = 1 + SLACK_BYTES * samples / len(self.whole)
            if got < samples - slack:
                return "other", f"{got} of {samples} samples"
            if self.kind in ("flac", "ogg", "opus"):  # have checksums
                return "other", f"{got} other samples"
        return "unnoticed", ""

    def has_whole_header(self):
        """Whether the damaged file's header is the intact one's, and the data begins after it."""
        whole, data = self.whole, self.data
        if self.kind == "m4a":  # at the end, with offsets into the data
            at = whole.index(b"moov")
            return len(data) == len(whole) and data[:48] == whole[:48] and data[at:] == whole[at:]
        length = HEADER_BYTES[self.kind]
        return data[:length] == whole[:length]

    def header_promises(self, path):
        """What libsndfile says of a header that promises more data than there is, or ""."""
        try:
            notes = soundfile.info(path, verbose=True).extra_info
        except soundfile.LibsndfileError:
            return ""
        found = re.findall(r"(data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", notes)
        return next(
            (
                f"the header says {said} bytes, {there} are there"
                for _, said, there in found
                if int(there) + SLACK_BYTES < int(said)
            ),
            "",
        )


READERS = {
    **{kind: Checkpoint for kind in FILES if kind.endswith("checkpoint")},
    **{kind: Model for kind in FILES if kind.endswith("model")},
    **{kind: Weights for kind in FILES if kind.endswith("weights")},
    **{kind: Demucs for kind in FILES if "demucs" in kind},
    **dict.fromkeys(AUDIO, Sound),
}


# Intact files


class Loader:
    """Stands for a StemLoader: every clip has the same stems."""

    def batches(self, clips, batches, *, section, prepare):
        for batch in batches:
            yield batch, [prepare(row, STEMS) for row in batch]

    def windows(self, clips, positions, *, samples, overlap):
        return ((position, STEMS) for position in positions)

    def drop_gpu_cache(self):
        return False


def new_trainer(place, *, resume=True):
    """The Trainer of a run on CLIPS with the output folder `place`, resumed as train.py does it."""
    settings = load_settings([*SETTINGS, f"OUTPUT_DIR={place}", f"RESUME_FROM_CHECKPOINT={resume}"])
    run_signature = checkpoint.run_signature(settings, CLIPS, **LABELS)
    saved = checkpoint.load_resume_checkpoint(settings, run_signature)
    trainer = Trainer(
        model.build_model(settings.model, num_classes=2, seed=0, resuming=resume),
        Frontend(
            settings.features,
            device=CPU,
            channel_stats=saved["channel_stats"] if saved else ([-40.0] * 4, [10.0] * 4),
        ),
        Loader(),
        train_clips=CLIPS,
        valid_clips=CLIPS,
        **LABELS,
        settings=settings,
        runtime=Runtime(CPU, 0, 1, StopRequest()),
        run_signature=run_signature,
    )
    if saved:
        restore(trainer, saved)
    return trainer


def make_intact(folder):
    """Writes an intact file of each kind to the folder of that name."""
    use_tiny_backbone()
    for kind in {*CHECKED, *UNCHECKED, *AUDIO}:
        (folder / kind).mkdir()
    checkpoints = folder / "checkpoint"
    trainer = new_trainer(checkpoints, resume=False)
    trainer.fit(after_epoch=lambda state, _: shutil.copy(checkpoints / "checkpoint.pth", folder))
    shutil.move(checkpoints / "best_model.pth", folder / "model")
    for path in checkpoints.iterdir():
        path.unlink()
    shutil.move(folder / "checkpoint.pth", checkpoints)
    weights = backbones.torchvision_network("efficientnet_b3", 0.2).state_dict()
    torch.save(weights, folder / "weights" / "weights.pth")
    named = folder / "named weights"
    torch.save(weights, named / "weights.pth")
    name_by_hash(named / "weights.pth")
    older = {"_use_new_zipfile_serialization": False}
    torch.save(weights, folder / "older weights" / "weights.pth", **older)
    make_demucs(folder)
    make_audio(folder)


def make_demucs(folder):
    torch.manual_seed(0)
    net = HTDemucs(**DEMUCS)
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(DEMUCS)}
    package = {"klass": HTDemucs, "args": (), "kwargs": DEMUCS, "state": state}
    for kind in (kind for kind in READERS if "demucs" in kind and kind not in EDITED):
        place = folder / kind
        (place / "htdemucs.yaml").write_text(
            "models: ['0123abcd']\nweights: [[1.0, 1.0, 1.0, 1.0]]\nsegment: 1\n"
        )
        if kind.endswith(".th"):
            path = place / "0123abcd.th"
            torch.save(package, path)
        else:
            path = place / "0123abcd.safetensors"
            save_file(state, path, metadata=meta)
        if kind.startswith("named"):
            name_by_hash(path)


def name_by_hash(path):
    """Appends the beginning of its SHA-256 to a file's name, as downloads have it."""
    path.rename(path.with_stem(f"{path.stem}-{sha256(path)[:8]}"))


def make_audio(folder):
    rng = np.random.default_rng(0)
    for kind, variants in AUDIO.items():
        for number, (suffix, form, subtype, channels) in enumerate(variants):
            rate = 48000 if kind == "opus" else 22050
            times = np.arange(3 * rate)[:, None] / rate
            wave = 0.3 * np.sin(2 * np.pi * 440 * times) + rng.normal(0, 0.05, (3 * rate, channels))
            path = folder / kind / f"clip{number}{suffix}"
            if form:
                soundfile.write(path, wave, rate, subtype=subtype, format=form)
            elif shutil.which("ffmpeg"):
                soundfile.write(folder / "clip.wav", wave, rate)
                command = [
                    "ffmpeg",
                    "-v",
                    "error",
                    "-i",
                    folder / "clip.wav",
                    "-c:a",
                    subtype,
                    path,
                ]
                subprocess.run(command, check=True)
