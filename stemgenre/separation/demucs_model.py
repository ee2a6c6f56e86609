"""Demucs: its models, loaded without running what is in a file, and waves -> stems.

The only module that imports demucs, and only when a model is loaded.
"""

import contextlib
import fractions
import hashlib
import json
import math
import re
import warnings
from pathlib import Path

import torch

from stemgenre.data import audio
from stemgenre.errors import UserError, first_line
from stemgenre.files import load_tensors, sha256
from stemgenre.runtime import MicroBatch, release_freed_memory, to_device
from stemgenre.settings import STEMS, SeparationSettings

WINDOW_BYTES = 1.5e9  # of GPU memory that one window of htdemucs may take, with a margin
MAX_LAYERS = 100  # of a kind; htdemucs has 5
MAX_KERNEL = 10**6  # samples of julius' kernels, which 44100:22051 Hz would make 10^9
# What reading weights that are not whole raises, Demucs' ModelLoadingError (a RuntimeError) too.
MISFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
DAMAGED = (OSError, RuntimeError, *MISFIT)


class Separator:
    """A Demucs model on a device: waves -> stems, a clip's stems whatever it is batched with.

    On CUDA it computes in half precision (`half`, fp16 autocast); a wave whose stems overflow is
    separated again in float32, it alone. Elsewhere it computes in float32. Raises UserError, with
    the way out, if the model cannot be loaded.
    """

    def __init__(
        self, separation: SeparationSettings, *, sample_rate: int, device: torch.device
    ) -> None:
        self.model = load_demucs(separation.separation_model, separation.separation_repo)
        self.model.to(device).eval()
        release_freed_memory()  # of the file's content
        if device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, torch.nn.ConvTranspose2d):  # twice as fast in this layout
                    module.to(memory_format=torch.channels_last)
        self.overlap = separation.separation_overlap
        self.sample_rate = sample_rate
        self.device = device
        self.half = device.type == "cuda"
        self._attention = _attention_in_blocks if device.type == "cpu" else contextlib.nullcontext
        size = _batch_size(separation.separation_batch, device)
        self.micro_batch = MicroBatch(size, name="separation batch")

    def stride(self) -> int:
        """Samples from one window of apply_model to the next, at the model's own rate."""
        segments = [model.segment for model in self.model.models]
        return int((1 - self.overlap) * int(self.model.samplerate * min(segments)))

    def windows(self, samples: int) -> int:
        """How many windows Demucs takes for a wave of so many samples."""
        return math.ceil(samples / self.stride())

    def __call__(self, waves: list[torch.Tensor]) -> list[tuple[torch.Tensor, str]]:
        """[(stems, precision)] of waves, each (2, samples) at the model's own rate.

        The waves must take the same number of windows. Stems are float32 (4, samples at
        sample_rate) on the device, mono, in the order of STEMS; precision is "float16" or
        "float32". Raises UserError if a single wave exceeds the GPU's memory.
        """

        def separate(size):
            return [
                result
                for start in range(0, len(waves), size)
                for result in self._separate(waves[start : start + size])
            ]

        too_large = (
            "separating a single clip exceeds GPU memory; close other GPU programs or set "
            "DEVICE=cpu"
        )
        return self.micro_batch.run(separate, len(waves), too_large=too_large)

    def _separate(self, waves):
        """[(stems, precision)] of one batch."""
        stems = self._apply(waves, half=self.half)
        if not self.half:
            return [(clip, "float32") for clip in stems]
        finite = torch.stack([clip.isfinite().all() for clip in stems]).tolist()
        return [
            (clip, "float16") if ok else (self._apply([wave], half=False)[0], "float32")
            for clip, wave, ok in zip(stems, waves, finite, strict=True)
        ]

    @torch.inference_mode()
    def _apply(self, waves, *, half):
        """[stems] of waves with as many windows.

        A wave is filled with zeros to whole windows, which costs nothing and lets clips of
        slightly different length go through together without one changing the other.
        """
        import julius
        from demucs.apply import apply_model

        length = self.windows(max(wave.shape[-1] for wave in waves)) * self.stride()
        mix = torch.zeros(len(waves), 2, length, device=self.device)
        for padded, wave in zip(mix, waves, strict=True):
            padded[:, : wave.shape[-1]] = to_device(wave, self.device)
        counts = torch.tensor([w.shape[-1] for w in waves], device=self.device)[:, None, None]
        real = torch.arange(length, device=self.device) < counts
        # Demucs' own normalisation (demucs.api), over the real samples of each wave.
        mono = mix.mean(1, keepdim=True)
        mean = mono.sum(2, keepdim=True) / counts
        std = (((mono - mean) * real).square().sum(2, keepdim=True) / (counts - 1)).sqrt() + 1e-8
        mix = (mix - mean) / std * real
        is_whole = len(waves) == self.micro_batch.size  # the size of most batches
        with (
            torch.autocast(self.device.type, torch.float16, enabled=half),
            self._attention(),
            _cudnn_search(is_worth_it=is_whole),
        ):
            try:
                stems = apply_model(self.model, mix, shifts=0, split=True, overlap=self.overlap)
            except MISFIT as error:
                raise UserError(
                    f"SEPARATION_MODEL cannot separate ({first_line(error)}): its file describes a "
                    "model that does not fit itself; download it again"
                ) from None
        if self.device.type == "cpu":
            release_freed_memory()
        order = [self.model.sources.index(stem) for stem in STEMS]
        stems = stems[:, order].float().mean(2) * std
        rates = self.model.samplerate, self.sample_rate
        # One stem of all clips after the other: on a CPU this takes many times its output's memory.
        if rates[0] * rates[1] / math.gcd(*rates) ** 2 <= MAX_KERNEL:
            stems = torch.stack([julius.resample_frac(s, *rates) for s in stems.unbind(1)], dim=1)
        else:
            resampled = audio.resample(
                stems.flatten(0, 1).cpu().numpy(), from_rate=rates[0], to_rate=rates[1]
            )
            stems = torch.from_numpy(resampled).unflatten(0, (-1, len(STEMS))).to(self.device)
        ends = [round(w.shape[-1] * self.sample_rate / self.model.samplerate) for w in waves]
        return [clip[:, :end] for clip, end in zip(stems, ends, strict=True)]


@contextlib.contextmanager
def _attention_in_blocks():
    """On a CPU, attention by scaled_dot_product_attention instead of PyTorch's "fast path".

    That one computes each head's whole matrix of attention: for htdemucs 230 MB, twice, and slower.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _cudnn_search(*, is_worth_it):
    """Unless it is worth it, cuDNN does not search for the fastest convolutions of a new size."""
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = searches and is_worth_it
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searches


def _batch_size(separation_batch, device):
    """SEPARATION_BATCH as a number. On a CPU 1: there larger batches are not faster."""
    if separation_batch != "auto":
        return separation_batch
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(32, int(free / WINDOW_BYTES)))


def load_demucs(name: str, repo: Path | str | None = None) -> torch.nn.Module:
    """The Demucs model `name`, a BagOfModels, from its hub or from the local folder `repo`.

    The folder holds what the hub's repository holds, `name`.yaml and the .safetensors that it
    names; or the .th files of older downloads, which are read without running what they contain.
    Raises UserError if it cannot be found, downloaded or loaded, or separates other stems.
    """
    from demucs.apply import BagOfModels

    if not is_plain_name(name):
        raise UserError(f"SEPARATION_MODEL={name!r} is not a plain name, such as htdemucs")
    folder = Path(repo) if repo else None
    if folder and not folder.is_dir():
        raise UserError(
            f"SEPARATION_REPO={repo} is not a folder; put {name}.yaml and its weights there"
        )
    bag = _read_bag(folder, name)
    models = [_load_weights(_repo_file(folder, name, signature)) for signature in bag["models"]]
    for model in models:
        if sorted(model.sources) != sorted(STEMS):
            raise UserError(
                f"SEPARATION_MODEL={name} separates {', '.join(model.sources)}; "
                f"a model for {', '.join(STEMS)} is needed, such as htdemucs"
            )
    if len({(*model.sources, model.samplerate) for model in models}) > 1:
        raise UserError(f"SEPARATION_MODEL={name} mixes models of different stems or sample rates")
    return BagOfModels(models, bag["weights"], bag["segment"])


def model_files(name: str, repo: Path | str | None = None) -> list[Path]:
    """The files that load_demucs() reads: a yaml, if the model has one, and weights.

    Raises UserError if they cannot be found or downloaded.
    """
    folder = Path(repo) if repo else None
    bag = _read_bag(folder, name)
    path = _repo_file(folder, name, name, suffixes=(".yaml",), required=folder is None)
    weights = [_repo_file(folder, name, signature) for signature in bag["models"]]
    return [path, *weights] if path else weights


def is_plain_name(name: str) -> bool:
    """Whether a model's name is a name, never a path."""
    return bool(re.fullmatch(r"[\w-]+", name))


def _read_bag(folder, name):
    """The yaml of a bag of models: which weights it has, and how they are mixed."""
    import yaml

    path = _repo_file(folder, name, name, suffixes=(".yaml",), required=folder is None)
    if path is None:
        return {
            "models": [name],
            "weights": None,
            "segment": None,
        }  # a single model, called by its signature
    try:
        bag = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a Demucs model's yaml: {reason}") from None
    if not isinstance(bag, dict) or not isinstance(bag.get("models"), list) or not bag["models"]:
        raise UserError(f"{path} is not a Demucs model's yaml: it names no models")
    for signature in bag["models"]:  # only what is plain is shown: aliases can nest without end
        if type(signature) not in (str, int) or not is_plain_name(str(signature)):
            shown = repr(signature)[:100] if isinstance(signature, str) else "a list or the like"
            raise UserError(f"{path} names the model {shown}, which is not a plain name")
    weights, segment = bag.get("weights"), bag.get("segment")
    rows = [] if weights is None else weights if isinstance(weights, list) else [weights]
    good = all(
        isinstance(row, list) and len(row) == len(STEMS) and all(map(_is_finite, row))
        for row in rows
    )
    if not good or len(rows) not in (0, len(bag["models"])):
        raise UserError(f"{path} is not a Demucs model's yaml: weights must be 4 numbers a model")
    if segment is not None and not (_is_finite(segment) and segment > 0):
        raise UserError(f"{path} is not a Demucs model's yaml: segment must be a number of seconds")
    signatures = [str(signature) for signature in bag["models"]]
    return {"models": signatures, "weights": weights, "segment": segment}


def _is_finite(value):
    return type(value) in (int, float) and math.isfinite(value)


def _repo_file(folder, name, stem, *, suffixes=(".safetensors", ".th"), required=True):
    """A file of the model's repository: in `folder`, or downloaded from the hub once."""
    if folder is None:
        return _download(name, stem + suffixes[0])
    for suffix in suffixes:
        for path in (folder / (stem + suffix), *sorted(folder.glob(f"{stem}-*{suffix}"))):
            if path.is_file():
                return path
    if required:
        raise UserError(
            f"{folder} holds no {stem}{' or '.join(suffixes)}; SEPARATION_REPO needs "
            f"{name}.yaml and the weights that it names"
        )
    return None


def _download(name, file_name):
    """The local path of a file of the hub's repository of the model, checked against its hash."""
    from demucs.hf import DEFAULT_NAMESPACE, hf_repo_name
    from huggingface_hub import errors, hf_hub_download

    try:
        path = Path(hf_hub_download(f"{DEFAULT_NAMESPACE}/{hf_repo_name(name)}", file_name))
    except (OSError, ValueError, errors.HTTPError, errors.EntryNotFoundError) as error:
        raise UserError(
            f"the Demucs model {name} cannot be downloaded ({type(error).__name__}). "
            f"Without a network, set SEPARATION_REPO to a folder with {name}.yaml and the "
            f".safetensors that it names, "
            f"from the hub's repository {DEFAULT_NAMESPACE}/{hf_repo_name(name)}; or train with "
            "CHANNELS=mix, as recipes/quick.py does, which needs no Demucs"
        ) from None
    blob = path.resolve()  # the hub's cache names each file by its hash
    if blob.name not in (sha256(blob), _git_hash(blob)):
        blob.unlink()
        raise UserError(f"{file_name} was not downloaded whole and has been removed; run again")
    return path


def _git_hash(path):
    """The SHA-1 that git gives to a file, by which the hub knows small ones."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _load_weights(path):
    """One Demucs model from its file. Nothing in it is run: classes come from a fixed list."""
    from demucs import demucs, hdemucs, htdemucs
    from demucs.hf import load_safetensors_model
    from demucs.states import load_model
    from safetensors import SafetensorError, safe_open

    classes = (htdemucs.HTDemucs, hdemucs.HDemucs, demucs.Demucs)
    way_out = "download it again, best as .safetensors"
    expected = re.search(r"-([0-9a-f]{8,})$", path.stem)
    if expected and not sha256(path).startswith(expected[1]):
        raise UserError(
            f"{path} is damaged or another file: its SHA-256 does not begin with the "
            f"{expected[1]} in its name; {way_out}"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
            known = {f"{kind.__module__}.{kind.__name__}" for kind in classes}
            if meta.get("klass") not in known or "structure" in meta:
                raise UserError(
                    f"{path} is not a plain Demucs model: its class is {meta.get('klass')}"
                )
            _check_depth(json.loads(meta["kwargs"]))
            load, source = load_safetensors_model, path
        else:
            package = load_tensors(path, "a Demucs model", classes=[*classes, fractions.Fraction])
            if not isinstance(package, dict) or package.get("klass") not in classes:
                raise UserError(f"{path} is not a Demucs model")
            _check_depth(package["kwargs"])
            load, source = load_model, package
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            load(source)  # takes no memory: what it claims to be has to fit its weights
        model = load(source)
        _check_model(model)
        return model
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from None
    except (*DAMAGED, SafetensorError) as error:
        reason = first_line(error) if str(error).strip() else "it is damaged"
        raise UserError(f"{path} cannot be loaded as a Demucs model: {reason}; {way_out}") from None


def _check_depth(arguments):
    """Raises ValueError for a model of more layers than could be built."""
    for name, value in arguments.items():
        if name.endswith(("depth", "layers")) and not (type(value) is int and value <= MAX_LAYERS):
            raise ValueError(f"it has {name} {str(value)[:20]}")


def _check_model(model):
    """Raises ValueError for what a model's file says of it, and no model of music is."""
    if not all(isinstance(source, str) for source in model.sources):
        raise ValueError("its sources are not names")
    rate, segment = model.samplerate, model.segment
    if type(rate) is not int or not audio.MIN_RATE <= rate <= audio.MAX_RATE:
        raise ValueError("its sample rate is none of music")
    if not isinstance(segment, int | float | fractions.Fraction) or not 0.1 <= segment <= 1000:
        raise ValueError("its segment is not a number of seconds")
    if model.audio_channels != 2:
        raise ValueError("it is not for stereo")
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ValueError("its weights are NaN or infinite")
