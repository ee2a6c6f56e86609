"""A synthesised band: clips of ten genres as four stems, the same for the same seed.

`render` turns (genre, seed) into four stems. What is played is drawn first from the songbook, as a
score in score seconds and score hertz; how it sounds is computed afterwards. Transposition and
tempo live in `Clock` alone, so a clip rendered two semitones higher or 1.2 times as fast is the
same performance.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import fft

from stemgenre.songbook import GENRES, SOUNDS, STYLES, Sound

STEMS = ("vocals", "drums", "bass", "other")
MAX_RATE = 1.25  # the score is written long enough for this tempo
TABLE_SIZE = 2048  # samples in one cycle of a tone
LOUDNESS_RMS = 0.06  # of the mix, before the gain of the clip; leaves room for a crest factor of 8
GAIN_DB = 6.0  # the gain of the clip is drawn from -GAIN_DB to GAIN_DB
PEAK_LIMIT = 0.97
DECAYED = 6.0  # time constants until a sound counts as gone: -52 dB
RING_S = 9.0  # drums are held until they have decayed
REFERENCE_HZ = 11025.0  # bandwidth of white noise of level 1
TIMING_S = 0.004  # standard deviation of a hand

# What differs from one instrument to the next of its kind.
VARIED = ("hz", "tint_hz", "morph_s", "attack_s", "decay_s", "bend", "vibrato", "vibrato_hz",
          "noise", "noise_hz", "noise_s")  # fmt: skip

VOWELS = np.array([  # Hz of the first three formants of a man's ah, oh, oo, eh, ee
    (800, 1200, 2600), (500, 850, 2500), (320, 800, 2300), (550, 1800, 2500), (300, 2300, 3000),
])  # fmt: skip

# How the songbook's signs are read: semitones above a chord's root, and strength of a hit.
CHORDS = {"": (0, 4, 7), "m": (0, 3, 7), "7": (0, 4, 7, 10), "m7": (0, 3, 7, 10),
          "maj7": (0, 4, 7, 11)}  # fmt: skip
VELOCITY = {"X": 1.0, "x": 0.7, "o": 0.35}

# ---------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Note:
    """One note of the score; what began before the clip has a negative start."""

    stem: str
    sound: Sound
    hz: float
    start_s: float
    hold_s: float
    velocity: float
    vowels: tuple[int, int]  # what a voice begins with and what it moves to


class Player:
    """A part as one clip has it: the instrument at hand, the pattern, where the melody stands."""

    def __init__(self, part, rng):
        self.part = part
        self.sound = vary(SOUNDS[rng.choice(part.sounds.split())], rng)
        self.patterns = rng.permutation(part.patterns.split())[:2]
        self.level = part.level * rng.uniform(0.8, 1.25)
        self.pitch = part.register + part.span / 2

    def pitches(self, symbol, chord, next_root, scale, rng):
        """MIDI pitches of one step; chord and scale are pitch classes, the root first."""
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
        ladder = np.arange(low, low + self.part.span + 1)
        ladder = ladder[np.isin(ladder % 12, chord if rng.random() < 0.4 else scale)]
        rung = np.abs(ladder - self.pitch).argmin() + rng.choice((-2, -1, -1, 0, 1, 1, 2, 3))
        self.pitch = ladder[np.clip(rung, 0, len(ladder) - 1)]
        return [self.pitch]


def vary(sound, rng):
    """The same instrument from another workshop: brightness, decay, vibrato, ... drawn anew."""
    drawn = {}
    for name, factor in zip(VARIED, np.exp(rng.normal(0, 0.12, size=len(VARIED))), strict=True):
        value = getattr(sound, name)
        pair = isinstance(value, tuple)
        drawn[name] = tuple(factor * each for each in value) if pair else factor * value
    return replace(sound, **drawn)


def parse_chord(name, key):
    """Pitch classes, root first, of a chord written in C ("Bb7") and played `key` semitones up."""
    letter, flat, quality = re.fullmatch(r"([A-G])(b?)(.*)", name).groups()
    root = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter] - len(flat) + key
    return [(root + tone) % 12 for tone in CHORDS[quality]]


def read_bar(pattern, bar_s, swing, rng):
    """(start, length, symbol) of the notes of one bar, in seconds; each "?" is decided anew."""
    step_s = bar_s / len(pattern)
    choices = list(re.sub(r"[.?-]", "", pattern))
    bar = "".join(rng.choice([".", rng.choice(choices)]) if s == "?" else s for s in pattern)
    for found in re.finditer(r"[^.-]-*", bar):
        late = swing * (found.start() % 2) * step_s + rng.normal(0, TIMING_S)
        yield found.start() * step_s + late, len(found[0]) * step_s, found[0][0]


def with_fill(groove, drums, rng):
    """The groove with a roll over `drums` in its last two steps or more."""
    steps = len(next(iter(groove.values())))
    roll = rng.choice(drums, size=rng.integers(2, 2 + steps // 4))
    tails = {drum: "".join("x" if hit == drum else "." for hit in roll) for drum in drums}
    heads = {drum: groove.get(drum, "." * steps)[: -len(roll)] for drum in drums}
    return groove | {drum: heads[drum] + tails[drum] for drum in drums}


def compose(style, *, seconds, rng):
    """The notes of a clip that begins anywhere in a song and lasts `seconds`, as [Note].

    Bars are drawn one after the other, so a longer score begins like a shorter one.
    """
    bar_s = 240 / rng.uniform(*style.bpm)
    key = rng.integers(12)
    scale = [(tone + key) % 12 for tone in style.scale]
    a4_hz = 440 * 2 ** rng.uniform(-0.02, 0.02)
    song = [parse_chord(name, key) for name in rng.choice(style.songs).split()]
    players = [Player(part, rng) for part in style.parts if rng.random() < part.chance]
    groove = style.grooves[rng.integers(len(style.grooves))]
    fill = style.fill.split()
    drums = {name: vary(SOUNDS[name], rng) for name in [*groove, *fill]}
    first_bar = rng.integers(len(song))
    start_s = -rng.uniform(0, bar_s)
    notes = []

    def add(stem, sound, hz, after_s, hold_s, level):
        velocity = level * np.exp(rng.normal(0, 0.1))
        vowels = tuple(rng.integers(len(VOWELS), size=2))
        notes.append(Note(stem, sound, hz, start_s + after_s, hold_s, velocity, vowels))

    for bar in range(first_bar, first_bar + int(seconds / bar_s) + 2):
        chord, next_root = song[bar % len(song)], song[(bar + 1) % len(song)][0]
        bar_groove = with_fill(groove, fill, rng) if fill and bar % 4 == 3 else groove
        for name, pattern in bar_groove.items():
            for after_s, _, symbol in read_bar(pattern, bar_s, style.swing, rng):
                add("drums", drums[name], drums[name].hz, after_s, RING_S, VELOCITY[symbol])
        for player in players:
            part = player.part
            pattern = player.patterns[0 if rng.random() < 0.7 else -1]
            for after_s, length_s, symbol in read_bar(pattern, bar_s, style.swing, rng):
                for pitch in player.pitches(symbol, chord, next_root, scale, rng):
                    hz = a4_hz * 2 ** ((pitch - 69) / 12)
                    add(part.stem, player.sound, hz, after_s, length_s * part.gate, player.level)
        start_s += bar_s
    return notes


# ---------------------------------------------------------------------------------------- playing


@dataclass(frozen=True)
class Clock:
    """How score seconds and score hertz become samples: all that knows of tempo and pitch."""

    sr: int
    rate: float  # score seconds per second
    scale: float  # hertz per score hertz

    @property
    def top_hz(self):
        """The Nyquist frequency, in score hertz."""
        return self.sr / 2 / self.scale

    def samples(self, score_s):
        """Score seconds -> samples."""
        return round(score_s * self.sr / self.rate)

    def times(self, count):
        """Score seconds of the first `count` samples, float64."""
        return np.arange(count) * (self.rate / self.sr)

    def phases(self, hz, warped_s):
        """Cycles that a tone of `hz` (score hertz) has made after `warped_s` score seconds."""
        return (hz * self.scale / self.rate) * warped_s


@lru_cache(maxsize=256)
def spectrum(rolloff, even, stack, drive):
    """Amplitudes of one cycle of a tone before any filter, complex (TABLE_SIZE // 2 + 1,), RMS 1.

    A distorted chord is one cycle too: a stack of just intervals goes through tanh as a whole, and
    is band-limited afterwards, so that it never aliases.
    """
    partials = np.arange(1, 1 + TABLE_SIZE // 8)
    amplitudes = partials ** -float(rolloff) * np.where(partials % 2, 1.0, even)
    bins = np.zeros(TABLE_SIZE // 2 + 1, complex)
    for place in stack:
        bins[place * partials] += -1j * amplitudes
    if drive:
        wave = fft.irfft(bins)
        bins = fft.rfft(np.tanh(drive * wave / np.sqrt(np.mean(wave**2))))
    return bins / np.sqrt(np.mean(fft.irfft(bins) ** 2))


def body(hz, *, corner_hz, formants_hz):
    """Gain of an instrument's body at score hertz `hz`: a low-pass and, in a voice, formants."""
    gain = 1 / np.sqrt(1 + (hz / corner_hz) ** 4)
    if len(formants_hz):
        peaks = np.exp(-0.5 * ((hz[:, None] - formants_hz) / (40 + 0.09 * formants_hz)) ** 2)
        gain = gain * (0.03 + peaks @ np.array((1.0, 0.7, 0.4)))
    return gain


def cycles(note, top_hz):
    """One cycle of the note's first and last spectrum, float32 (2, TABLE_SIZE + 1).

    Partials above `top_hz` are left out, those too that only a bend or vibrato would take there.
    """
    sound = note.sound
    bins = spectrum(sound.rolloff, sound.even, sound.stack, sound.drive)
    hz = np.arange(len(bins)) * (note.hz / sound.stack[0])
    widest = 1 + max(sound.bend, 0) + sound.vibrato + sound.detune
    hz = hz[: np.searchsorted(hz * widest, top_hz)]
    first_hz, last_hz = sound.tint_hz
    corners_hz = first_hz * (0.6 + 0.4 * min(note.velocity, 1)), last_hz  # soft is dull
    shaped = np.zeros((2, len(bins)), complex)
    for row, corner_hz, vowel in zip(shaped, corners_hz, note.vowels, strict=True):
        formants_hz = VOWELS[vowel] * sound.throat if sound.throat else ()
        row[: len(hz)] = bins[: len(hz)] * body(hz, corner_hz=corner_hz, formants_hz=formants_hz)
    tables = fft.irfft(shaped).astype(np.float32)
    return np.concatenate([tables, tables[:, :1]], axis=1)


def tone(note, clock, times):
    """The note's tone without its envelope, float32 (samples,)."""
    sound = note.sound
    first, last = cycles(note, clock.top_hz)
    swing = 2 * np.pi * sound.vibrato_hz
    warped_s = times + sound.bend * sound.bend_s * (1 - np.exp(-times / sound.bend_s))
    if sound.vibrato:
        warped_s += sound.vibrato / swing * (1 - np.cos(swing * times))
    morph = np.exp(-times.astype(np.float32) / np.float32(sound.morph_s))
    wave = np.zeros(len(times), np.float32)
    for detune in (-sound.detune, sound.detune) if sound.detune else (0,):
        phases = clock.phases(note.hz / sound.stack[0] * (1 + detune), warped_s)
        places = phases % 1 * TABLE_SIZE
        left = places.astype(np.int32)
        between = (places - left).astype(np.float32)
        for table, weight in ((last, 1), (first - last, morph)):
            wave += weight * (table[left] + between * np.diff(table)[left])
    return wave


def noise(note, clock, times, rng):
    """The note's noise without its attack, float32 (samples,) or less: white, in a soft band."""
    times = times[: clock.samples(DECAYED * note.sound.noise_s)]
    low_hz, high_hz = note.sound.noise_hz
    length = fft.next_fast_len(len(times), real=True)
    bins = fft.rfft(rng.standard_normal(length, dtype=np.float32))
    hz = np.linspace(1, clock.top_hz, len(bins), dtype=np.float32)
    density = clock.top_hz / REFERENCE_HZ  # the same power per score hertz at any rate and pitch
    bins *= np.sqrt(density / (1 + (low_hz / hz) ** 6) / (1 + (hz / high_hz) ** 6))
    fade = np.exp(-times.astype(np.float32) / np.float32(note.sound.noise_s))
    return fft.irfft(bins, length)[: len(times)] * fade


def play(note, clock, rng, longest):
    """The note as heard, float32, at most `longest` samples."""
    sound = note.sound
    decay_s = max(sound.decay_s * (sound.tone > 0), sound.noise_s * (sound.noise > 0))
    end_s = min(note.hold_s + sound.release_s, DECAYED * decay_s)
    times = clock.times(min(clock.samples(end_s), longest))
    seconds = times.astype(np.float32)
    wave = np.zeros(len(times), np.float32)
    if sound.tone:
        wave += sound.tone * np.exp(-seconds / np.float32(sound.decay_s)) * tone(note, clock, times)
    if sound.noise:
        burst = noise(note, clock, times, rng)
        wave[: len(burst)] += sound.noise * burst
    attack = np.minimum(seconds / sound.attack_s, 1)
    release = np.clip((end_s - seconds) / sound.release_s, 0, 1)
    return np.float32(note.velocity) * attack * release * wave


def perform(notes, clock, *, samples, seed):
    """All notes, stem by stem: float32 (4, samples). Each note has noise of its own from `seed`."""
    stems = np.zeros((len(STEMS), samples), np.float32)
    for number, note in enumerate(notes):
        start = clock.samples(note.start_s)
        if start < samples:
            wave = play(note, clock, np.random.default_rng([seed, number]), samples - start)
            heard = wave[max(-start, 0) :]
            stems[STEMS.index(note.stem), max(start, 0) :][: len(heard)] += heard
    return stems


def render(genre, *, seed, seconds, sr=22050, semitones=0.0, rate=1.0):
    """The stems of a clip: float32 (4, round(seconds * sr)), in the order of STEMS.

    genre, seed (int, 0 or more): the clip. semitones: every frequency times 2 ** (semitones / 12).
    rate: the same score this many times as fast, up to MAX_RATE. Loudness is settled on the clip
    as it is at semitones 0 and rate 1, so its renderings can be compared sample value by value.
    Raises ValueError for an unknown genre or a rate that the score is too short for.
    """
    if genre not in STYLES:
        raise ValueError(f"genre {genre!r} is unknown; choose from {', '.join(GENRES)}")
    if not 0 < rate <= MAX_RATE:
        raise ValueError(f"rate {rate} is outside 0 to {MAX_RATE}")
    rng = np.random.default_rng([seed, GENRES.index(genre)])
    loudness = LOUDNESS_RMS * 10 ** (rng.uniform(-GAIN_DB, GAIN_DB) / 20)
    notes = compose(STYLES[genre], seconds=seconds * MAX_RATE, rng=rng)
    samples = round(seconds * sr)
    plain = Clock(sr, 1.0, 1.0)
    clock = Clock(sr, rate, 2 ** (semitones / 12))
    stems = perform(notes, clock, samples=samples, seed=seed)
    reference = stems if clock == plain else perform(notes, plain, samples=samples, seed=seed)
    mix = reference.sum(axis=0)
    gain = min(loudness / np.sqrt(np.mean(mix**2)), PEAK_LIMIT / np.abs(mix).max())
    return stems * np.float32(gain)
