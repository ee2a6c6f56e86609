"""Synthesised music: clips of ten genres as four stems, the same for the same (genre, seed).

`render` first samples a score from the genre's style (stemgenre/demo/styles.py) and then renders
it to audio. The score's times and frequencies are nominal: transposition and tempo are in
`TimePitch` alone, so that a clip rendered two semitones higher or 1.2 times as fast is the same
performance.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import fft

from stemgenre.demo.instruments import INSTRUMENTS, Instrument, randomize_instrument
from stemgenre.demo.styles import GENRES, STYLES, Part, Style
from stemgenre.demo.variation import PLAIN, Variation, degrade
from stemgenre.settings import STEMS

MAX_RATE = 1.25  # the score is long enough for this tempo
TABLE_SIZE = 2048  # samples in one period of a wavetable
LOUDNESS_RMS = 0.06  # of the mix, before the clip's gain; leaves headroom for a crest factor of 8
GAIN_DB = 6.0  # the clip's gain is sampled from -GAIN_DB to GAIN_DB
PEAK_LIMIT = 0.97
DECAY_TIME_CONSTANTS = 6.0  # a sound is cut after so many, at -52 dB
DRUM_HOLD_S = 9.0  # longer than any drum decays
NOISE_REFERENCE_HZ = 11025.0  # bandwidth of white noise of level 1
TIMING_STD_S = 0.004  # a player's timing deviation

VOWELS = np.array([  # first three formants in Hz, a man's a, o, u, e, i
    (800, 1200, 2600), (500, 850, 2500), (320, 800, 2300), (550, 1800, 2500), (300, 2300, 3000),
])  # fmt: skip

CHORDS = {"": (0, 4, 7), "m": (0, 3, 7), "7": (0, 4, 7, 10), "m7": (0, 3, 7, 10),
          "maj7": (0, 4, 7, 11)}  # semitones above the root  # fmt: skip
VELOCITY = {"X": 1.0, "x": 0.7, "o": 0.35}  # of a drum hit

# ------------------------------------------------------------------------------------------ score


@dataclass(frozen=True)
class Note:
    """One note of the score; a note that began before the clip has a negative start."""

    stem: str
    instrument: Instrument
    hz: float
    start_s: float
    duration_s: float  # until its release begins
    velocity: float
    vowels: tuple[int, int]  # a voice's first and last, indices of VOWELS


class Player:
    """A Part in one clip: its sampled instrument and patterns, and where its melody is."""

    def __init__(self, part: Part, rng: Generator, variation: Variation):
        self.part = part
        names = part.instruments.split()[slice(*variation.instruments)]
        instrument = INSTRUMENTS[rng.choice(names)]
        self.instrument = randomize_instrument(instrument, rng, std=variation.instrument_std)
        self.patterns = rng.permutation(part.patterns.split())[:2]
        self.level = part.level * rng.uniform(0.8, 1.25)
        self.melody_pitch = part.register + part.melody_range / 2

    def pitches(
        self, symbol: str, chord: list[int], next_root: int, scale: list[int], rng: Generator
    ) -> list[float]:
        """MIDI pitches of one step; `chord` and `scale` are pitch classes, the root first."""
        low = self.part.register
        root = low + (chord[0] - low) % 12
        if symbol == "c":
            return [low + (tone - low) % 12 for tone in chord]
        if symbol == "a":
            return [low + (next_root - low) % 12 + rng.choice((-1, 1))]
        if symbol in "68":
            return [root + {"6": 9, "8": 12}[symbol]]
        if symbol in "1357":
            return [root + (chord["1357".index(symbol) % len(chord)] - chord[0]) % 12]
        candidates = np.arange(low, low + self.part.melody_range + 1)
        candidates = candidates[np.isin(candidates % 12, chord if rng.random() < 0.4 else scale)]
        nearest = np.abs(candidates - self.melody_pitch).argmin()
        index = nearest + rng.choice((-2, -1, -1, 0, 1, 1, 2, 3))
        self.melody_pitch = candidates[np.clip(index, 0, len(candidates) - 1)]
        return [self.melody_pitch]


def parse_chord(name: str, key: int) -> list[int]:
    """Pitch classes, root first, of a chord in C ("Bb7") transposed up by `key` semitones."""
    letter, flat, quality = re.fullmatch(r"([A-G])(b?)(.*)", name).groups()
    root = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter] - len(flat) + key
    return [(root + tone) % 12 for tone in CHORDS[quality]]


def parse_bar(
    pattern: str, bar_s: float, swing: float, rng: Generator
) -> Iterator[tuple[float, float, str]]:
    """(start, length, symbol) of the notes of one bar, in s; each "?" is sampled for this bar."""
    step_s = bar_s / len(pattern)
    choices = list(re.sub(r"[.?-]", "", pattern))
    bar = "".join(rng.choice([".", rng.choice(choices)]) if s == "?" else s for s in pattern)
    for match in re.finditer(r"[^.-]-*", bar):
        delay_s = swing * (match.start() % 2) * step_s + rng.normal(0, TIMING_STD_S)
        yield match.start() * step_s + delay_s, len(match[0]) * step_s, match[0][0]


def add_fill(drum_pattern: dict[str, str], drums: list[str], rng: Generator) -> dict[str, str]:
    """{drum: pattern} with a fill on `drums` in the last steps, 2 to a quarter of the bar + 1."""
    steps = len(next(iter(drum_pattern.values())))
    hits = rng.choice(drums, size=rng.integers(2, 2 + steps // 4))
    fills = {drum: "".join("x" if hit == drum else "." for hit in hits) for drum in drums}
    starts = {drum: drum_pattern.get(drum, "." * steps)[: -len(hits)] for drum in drums}
    return drum_pattern | {drum: starts[drum] + fills[drum] for drum in drums}


def generate_score(
    style: Style, *, seconds: float, rng: Generator, variation: Variation = PLAIN
) -> list[Note]:
    """The notes of a clip of `seconds` that begins anywhere in a song of the style.

    Bars are sampled one after the other, so a longer score begins like a shorter one.
    """
    slowest, fastest = style.bpm
    bar_s = 240 / rng.uniform(*(slowest + part * (fastest - slowest) for part in variation.tempi))
    key = rng.integers(*variation.keys)
    scale = [(tone + key) % 12 for tone in style.scale]
    a4_hz = 440 * 2 ** rng.uniform(-0.02, 0.02)
    chords = [parse_chord(name, key) for name in rng.choice(style.progressions).split()]
    players = [
        Player(part, rng, variation) for part in style.parts if rng.random() < part.probability
    ]
    drum_pattern = style.drum_patterns[rng.integers(len(style.drum_patterns))]
    fill = style.fill.split()
    drums = {
        name: randomize_instrument(INSTRUMENTS[name], rng, std=variation.instrument_std)
        for name in [*drum_pattern, *fill]
    }
    first_bar = rng.integers(len(chords))
    bar_start_s = -rng.uniform(0, bar_s)
    notes = []

    def add(instrument: Instrument, level: float, **fields: Any) -> None:
        velocity = level * np.exp(rng.normal(0, 0.1))
        vowels = tuple(rng.integers(len(VOWELS), size=2))
        notes.append(Note(instrument=instrument, velocity=velocity, vowels=vowels, **fields))

    for bar in range(first_bar, first_bar + int(seconds / bar_s) + 2):
        chord, next_root = chords[bar % len(chords)], chords[(bar + 1) % len(chords)][0]
        bar_drums = add_fill(drum_pattern, fill, rng) if fill and bar % 4 == 3 else drum_pattern
        for name, pattern in bar_drums.items():
            for offset_s, _, symbol in parse_bar(pattern, bar_s, style.swing, rng):
                add(
                    drums[name],
                    VELOCITY[symbol],
                    stem="drums",
                    hz=drums[name].pitch_hz,
                    start_s=bar_start_s + offset_s,
                    duration_s=DRUM_HOLD_S,
                )
        for player in players:
            part = player.part
            pattern = player.patterns[0 if rng.random() < 0.7 else -1]
            for offset_s, length_s, symbol in parse_bar(pattern, bar_s, style.swing, rng):
                for pitch in player.pitches(symbol, chord, next_root, scale, rng):
                    add(
                        player.instrument,
                        player.level,
                        stem=part.stem,
                        hz=a4_hz * 2 ** ((pitch - 69) / 12),
                        start_s=bar_start_s + offset_s,
                        duration_s=length_s * part.gate,
                    )
        bar_start_s += bar_s
    return notes


# ------------------------------------------------------------------------------------------ audio


@dataclass(frozen=True)
class TimePitch:
    """Maps the score's seconds and Hz to samples: the only place with tempo and transposition."""

    sr: int  # Hz
    rate: float  # score seconds per second of audio
    scale: float  # Hz of audio per score Hz

    @property
    def nyquist_hz(self) -> float:
        """The Nyquist frequency, in score Hz."""
        return self.sr / 2 / self.scale

    def samples(self, score_s: float) -> int:
        """Score seconds -> samples."""
        return round(score_s * self.sr / self.rate)

    def times(self, count: int) -> np.ndarray:
        """Score seconds of the first `count` samples, float64."""
        return np.arange(count) * (self.rate / self.sr)

    def phases(self, hz: float, score_s: np.ndarray) -> np.ndarray:
        """Phase in periods of a tone of `hz` (score Hz) after `score_s` seconds."""
        return (hz * self.scale / self.rate) * score_s


@lru_cache(maxsize=256)
def harmonic_spectrum(
    rolloff: float, even_gain: float, partials: tuple[int, ...], drive: float
) -> np.ndarray:
    """Spectrum of one period before any filter, complex (TABLE_SIZE // 2 + 1,), RMS 1.

    A distorted chord is one period too: its just intervals go through tanh together, and the
    result is band-limited afterwards, so that it does not alias.
    """
    harmonics = np.arange(1, 1 + TABLE_SIZE // 8)
    amplitudes = harmonics ** -float(rolloff) * np.where(harmonics % 2, 1.0, even_gain)
    bins = np.zeros(TABLE_SIZE // 2 + 1, complex)
    for partial in partials:
        bins[partial * harmonics] += -1j * amplitudes
    if drive:
        wave = fft.irfft(bins)
        bins = fft.rfft(np.tanh(drive * wave / np.sqrt(np.mean(wave**2))))
    return bins / np.sqrt(np.mean(fft.irfft(bins) ** 2))


def spectral_envelope(
    hz: np.ndarray, *, cutoff_hz: float, formants_hz: np.ndarray | tuple[()]
) -> np.ndarray:
    """Gain at the frequencies `hz` (score Hz): a second-order low-pass, and a voice's formants."""
    gain = 1 / np.sqrt(1 + (hz / cutoff_hz) ** 4)
    if len(formants_hz):
        peaks = np.exp(-0.5 * ((hz[:, None] - formants_hz) / (40 + 0.09 * formants_hz)) ** 2)
        gain = gain * (0.03 + peaks @ np.array((1.0, 0.7, 0.4)))
    return gain


def wavetables(note: Note, nyquist_hz: float) -> np.ndarray:
    """One period of the note at its onset and later, float32 (2, TABLE_SIZE + 1).

    Harmonics that reach `nyquist_hz`, pitch envelope and vibrato included, are left out.
    """
    instrument = note.instrument
    bins = harmonic_spectrum(
        instrument.rolloff, instrument.even_gain, instrument.partials, instrument.drive
    )
    hz = np.arange(len(bins)) * (note.hz / instrument.partials[0])
    max_deviation = 1 + max(instrument.pitch_env, 0) + instrument.vibrato + instrument.detune
    hz = hz[: np.searchsorted(hz * max_deviation, nyquist_hz)]
    onset_hz, later_hz = instrument.cutoff_hz
    onset_hz *= 0.6 + 0.4 * min(note.velocity, 1)  # soft notes are darker
    filtered = np.zeros((2, len(bins)), complex)
    for row, cutoff_hz, vowel in zip(filtered, (onset_hz, later_hz), note.vowels, strict=True):
        scale = instrument.formant_scale
        formants_hz = VOWELS[vowel] * scale if scale else ()
        gain = spectral_envelope(hz, cutoff_hz=cutoff_hz, formants_hz=formants_hz)
        row[: len(hz)] = bins[: len(hz)] * gain
    tables = fft.irfft(filtered).astype(np.float32)
    return np.concatenate([tables, tables[:, :1]], axis=1)


def oscillator(note: Note, time_pitch: TimePitch, times: np.ndarray) -> np.ndarray:
    """The note's tone without its amplitude envelope, float32 (samples,)."""
    instrument = note.instrument
    onset, later = wavetables(note, time_pitch.nyquist_hz)
    omega = 2 * np.pi * instrument.vibrato_hz
    # The integral of the relative frequency: pitch envelope and vibrato
    settled = 1 - np.exp(-times / instrument.pitch_env_s)
    warped_s = times + instrument.pitch_env * instrument.pitch_env_s * settled
    if instrument.vibrato:
        warped_s += instrument.vibrato / omega * (1 - np.cos(omega * times))
    onset_weight = np.exp(-times.astype(np.float32) / np.float32(instrument.cutoff_decay_s))
    wave = np.zeros(len(times), np.float32)
    for detune in (-instrument.detune, instrument.detune) if instrument.detune else (0,):
        phases = time_pitch.phases(note.hz / instrument.partials[0] * (1 + detune), warped_s)
        positions = phases % 1 * TABLE_SIZE
        left = positions.astype(np.int32)
        fraction = (positions - left).astype(np.float32)
        for table, weight in ((later, 1), (onset - later, onset_weight)):
            wave += weight * (table[left] + fraction * np.diff(table)[left])
    return wave


def noise_burst(note: Note, time_pitch: TimePitch, times: np.ndarray, rng: Generator) -> np.ndarray:
    """Band-passed white noise that decays, without its attack: float32 (samples,) or shorter."""
    decay_s = note.instrument.noise_decay_s
    times = times[: time_pitch.samples(DECAY_TIME_CONSTANTS * decay_s)]
    low_hz, high_hz = note.instrument.noise_band_hz
    length = fft.next_fast_len(len(times), real=True)
    bins = fft.rfft(rng.standard_normal(length, dtype=np.float32))
    hz = np.linspace(1, time_pitch.nyquist_hz, len(bins), dtype=np.float32)
    density = time_pitch.nyquist_hz / NOISE_REFERENCE_HZ  # equal power per score Hz at any rate
    bins *= np.sqrt(density / (1 + (low_hz / hz) ** 6) / (1 + (hz / high_hz) ** 6))
    decay = np.exp(-times.astype(np.float32) / np.float32(decay_s))
    return fft.irfft(bins, length)[: len(times)] * decay


def render_note(note: Note, time_pitch: TimePitch, rng: Generator, max_samples: int) -> np.ndarray:
    """The note as audio, float32, at most `max_samples` long."""
    instrument = note.instrument
    tone_s = instrument.decay_s if instrument.tone else 0.0
    noise_s = instrument.noise_decay_s if instrument.noise else 0.0
    audible_s = DECAY_TIME_CONSTANTS * max(tone_s, noise_s)
    end_s = min(note.duration_s + instrument.release_s, audible_s)
    times = time_pitch.times(min(time_pitch.samples(end_s), max_samples))
    seconds = times.astype(np.float32)
    wave = np.zeros(len(times), np.float32)
    if instrument.tone:
        decay = np.exp(-seconds / np.float32(instrument.decay_s))
        wave += instrument.tone * decay * oscillator(note, time_pitch, times)
    if instrument.noise:
        burst = noise_burst(note, time_pitch, times, rng)
        wave[: len(burst)] += instrument.noise * burst
    attack = np.minimum(seconds / instrument.attack_s, 1)
    release = np.clip((end_s - seconds) / instrument.release_s, 0, 1)
    return np.float32(note.velocity) * attack * release * wave


def render_stems(
    notes: list[Note], time_pitch: TimePitch, *, samples: int, seed: int
) -> np.ndarray:
    """The notes as stems, float32 (4, samples); a note's noise depends on (seed, its index)."""
    stems = np.zeros((len(STEMS), samples), np.float32)
    for index, note in enumerate(notes):
        start = time_pitch.samples(note.start_s)
        if start < samples:
            rng = np.random.default_rng([seed, index])
            wave = render_note(note, time_pitch, rng, samples - start)[max(-start, 0) :]
            stems[STEMS.index(note.stem), max(start, 0) :][: len(wave)] += wave
    return stems


def render(
    genre: str,
    *,
    seed: int,
    seconds: float,
    sr: int = 22050,
    semitones: float = 0.0,
    rate: float = 1.0,
    variation: Variation = PLAIN,
) -> np.ndarray:
    """The stems of a clip: float32 (4, round(seconds * sr)), in the order of STEMS.

    (genre, seed, variation) identify the clip. Every frequency is scaled by 2 ** (semitones / 12),
    and the score is played at `rate` times its tempo. The gain is that of the clip at semitones 0
    and rate 1, so that its renderings can be compared in level. Raises ValueError for an unknown
    genre, or a rate above MAX_RATE.
    """
    if genre not in STYLES:
        raise ValueError(f"genre {genre!r} is unknown; choose from {', '.join(GENRES)}")
    if not 0 < rate <= MAX_RATE:
        raise ValueError(f"rate {rate} is outside 0 to {MAX_RATE}")
    rng = np.random.default_rng([seed, GENRES.index(genre)])
    loudness = LOUDNESS_RMS * 10 ** (rng.uniform(-GAIN_DB, GAIN_DB) / 20)
    notes = generate_score(STYLES[genre], seconds=seconds * MAX_RATE, rng=rng, variation=variation)
    samples = round(seconds * sr)
    original = TimePitch(sr, 1.0, 1.0)
    time_pitch = TimePitch(sr, rate, 2 ** (semitones / 12))
    stems = degrade(render_stems(notes, time_pitch, samples=samples, seed=seed), variation, seed)
    reference = stems
    if time_pitch != original:
        reference = render_stems(notes, original, samples=samples, seed=seed)
        reference = degrade(reference, variation, seed)
    mix = reference.sum(axis=0)
    gain = min(loudness / np.sqrt(np.mean(mix**2)), PEAK_LIMIT / np.abs(mix).max())
    return stems * np.float32(gain)
