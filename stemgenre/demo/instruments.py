"""The instruments of stemgenre/demo/synth.py as parameters of subtractive synthesis.

Each is a harmonic tone through a low-pass filter with an envelope (a voice: through formants too)
plus a burst of band-passed noise.
"""

from dataclasses import dataclass, replace

import numpy as np

INSTRUMENT_STD = 0.12  # of the logarithm of the factors in randomize_instrument, usually
VARIED_FIELDS = ("pitch_hz", "cutoff_hz", "cutoff_decay_s", "attack_s", "decay_s", "pitch_env",
                 "vibrato", "vibrato_hz", "noise", "noise_band_hz", "noise_decay_s")  # fmt: skip


@dataclass(frozen=True)
class Instrument:
    """A harmonic tone whose spectrum changes while it sounds, and a burst of noise."""

    tone: float = 1.0  # level of the tone; 0: noise only
    pitch_hz: float = 0.0  # of a drum; the other instruments' pitches are in the score
    rolloff: float = 1.0  # partial k has amplitude k ** -rolloff
    even_gain: float = 1.0  # of the even partials; 0: odd ones only, as in a square wave
    partials: tuple[int, ...] = (1,)  # each carries a whole tone: (2, 3, 4) is a power chord
    drive: float = 0.0  # gain into tanh distortion; 0: none
    cutoff_hz: tuple[float, float] = (5000.0, 2500.0)  # low-pass cutoff at the onset, and later
    cutoff_decay_s: float = 0.3  # time constant from the first cutoff (and vowel) to the later
    formant_scale: float = 0.0  # formant frequencies relative to a man's; 0: not a voice
    attack_s: float = 0.005
    decay_s: float = 20.0  # time constant of the tone
    release_s: float = 0.05
    pitch_env: float = 0.0  # initial detuning as a fraction of the pitch, which decays to 0
    pitch_env_s: float = 0.05  # time constant of that decay
    vibrato: float = 0.0  # depth as a fraction of the frequency
    vibrato_hz: float = 5.5
    detune: float = 0.0  # two oscillators, this fraction above and below the pitch
    noise: float = 0.0  # level of the noise
    noise_band_hz: tuple[float, float] = (2000.0, 8000.0)
    noise_decay_s: float = 0.05  # time constant


# fmt: off
INSTRUMENTS = {
    # drums
    "kick": Instrument(pitch_hz=52, rolloff=4, pitch_env=2.2, pitch_env_s=0.03, decay_s=0.12,
                       noise=0.15, noise_decay_s=0.01),
    "boom": Instrument(pitch_hz=46, rolloff=4, pitch_env=1.5, pitch_env_s=0.04, decay_s=0.3,
                       noise=0.05, noise_decay_s=0.01),
    "click": Instrument(pitch_hz=62, rolloff=3, pitch_env=3.5, pitch_env_s=0.012, decay_s=0.06,
                        noise=0.5, noise_band_hz=(2500, 6000), noise_decay_s=0.008),
    "snare": Instrument(pitch_hz=190, rolloff=2.5, pitch_env=0.4, pitch_env_s=0.02, decay_s=0.08,
                        noise=0.9, noise_band_hz=(900, 8000), noise_decay_s=0.1),
    "brush": Instrument(tone=0, attack_s=0.015, noise=0.5, noise_band_hz=(1500, 6000),
                        noise_decay_s=0.09),
    "clap": Instrument(tone=0, attack_s=0.012, noise=1.2, noise_band_hz=(900, 2600),
                       noise_decay_s=0.09),
    "rim": Instrument(pitch_hz=480, rolloff=1.2, cutoff_hz=(4000, 2500), decay_s=0.03, noise=0.3,
                      noise_decay_s=0.01),
    "tom": Instrument(pitch_hz=110, rolloff=3, pitch_env=0.6, pitch_env_s=0.05, decay_s=0.18,
                      noise=0.1, noise_decay_s=0.02),
    "hat": Instrument(tone=0, noise=0.5, noise_band_hz=(6500, 10500), noise_decay_s=0.03),
    "open": Instrument(tone=0, noise=0.6, noise_band_hz=(5500, 10500), noise_decay_s=0.13),
    "ride": Instrument(tone=0, noise=0.45, noise_band_hz=(4200, 8200), noise_decay_s=0.24),
    "crash": Instrument(tone=0, noise=0.8, noise_band_hz=(2800, 10500), noise_decay_s=0.5),
    "shaker": Instrument(tone=0, attack_s=0.025, noise=0.35, noise_band_hz=(5000, 9000),
                         noise_decay_s=0.035),
    "timpani": Instrument(pitch_hz=82, rolloff=2.2, pitch_env=0.1, decay_s=0.5, noise=0.1,
                          noise_band_hz=(80, 400)),
    # bass
    "upright": Instrument(rolloff=1.3, cutoff_hz=(900, 280), decay_s=0.45, noise=0.08,
                          noise_band_hz=(700, 2500)),
    "finger": Instrument(rolloff=1.0, cutoff_hz=(1100, 450), decay_s=0.9),
    "pick": Instrument(rolloff=0.8, cutoff_hz=(2600, 1000), decay_s=0.8, noise=0.1,
                       noise_decay_s=0.01),
    "grind": Instrument(rolloff=0.8, drive=3, cutoff_hz=(2800, 1500), decay_s=1.2),
    "dub": Instrument(rolloff=1.6, cutoff_hz=(500, 160), decay_s=0.8, attack_s=0.012),
    "sub": Instrument(rolloff=2.6, drive=1.2, pitch_env=0.5, pitch_env_s=0.03, cutoff_hz=(300, 140),
                      decay_s=0.9),
    "synthbass": Instrument(rolloff=0.9, cutoff_hz=(2200, 500), cutoff_decay_s=0.08, decay_s=0.8,
                            detune=0.002),
    "celli": Instrument(rolloff=1.0, cutoff_hz=(900, 1100), attack_s=0.09, release_s=0.2,
                        detune=0.002, vibrato=0.004),
    # harmony and solos
    "piano": Instrument(rolloff=1.1, cutoff_hz=(3500, 900), cutoff_decay_s=0.2, decay_s=0.7,
                        release_s=0.12),
    "rhodes": Instrument(rolloff=2.0, cutoff_hz=(2000, 600), decay_s=0.9, release_s=0.15,
                         detune=0.001),
    "organ": Instrument(rolloff=1.2, even_gain=0.9, cutoff_hz=(3000, 3000), vibrato=0.004,
                        vibrato_hz=6.5),
    "strings": Instrument(rolloff=0.9, cutoff_hz=(2600, 3400), attack_s=0.12, release_s=0.25,
                          detune=0.003, vibrato=0.004),
    "violin": Instrument(rolloff=0.8, cutoff_hz=(3500, 4500), attack_s=0.06, release_s=0.12,
                         vibrato=0.009),
    "flute": Instrument(rolloff=2.4, attack_s=0.05, release_s=0.1, vibrato=0.005, noise=0.1,
                        noise_decay_s=0.3),
    "harp": Instrument(rolloff=1.5, cutoff_hz=(2600, 700), cutoff_decay_s=0.15, decay_s=0.5,
                       release_s=0.4),
    "guitar": Instrument(rolloff=0.9, cutoff_hz=(4200, 1300), cutoff_decay_s=0.12, decay_s=0.5,
                         release_s=0.08),
    "banjo": Instrument(rolloff=0.6, cutoff_hz=(6000, 2500), cutoff_decay_s=0.06, decay_s=0.16,
                        noise=0.15, noise_decay_s=0.01),
    "steel": Instrument(rolloff=1.3, cutoff_hz=(3800, 2200), attack_s=0.03, decay_s=1.6,
                        pitch_env=-0.11, pitch_env_s=0.12, vibrato=0.008),
    "fiddle": Instrument(rolloff=0.7, cutoff_hz=(4200, 5000), attack_s=0.03, pitch_env=-0.03,
                         vibrato=0.006),
    "skank": Instrument(rolloff=0.8, cutoff_hz=(4200, 1800), cutoff_decay_s=0.03, decay_s=0.07,
                        release_s=0.02, noise=0.2, noise_decay_s=0.01),
    "scratch": Instrument(rolloff=0.6, cutoff_hz=(5500, 2500), cutoff_decay_s=0.03, decay_s=0.06,
                          release_s=0.02, noise=0.3, noise_decay_s=0.015),
    "crunch": Instrument(rolloff=0.9, drive=2, cutoff_hz=(3200, 1800), decay_s=0.9),
    "blueslead": Instrument(rolloff=0.9, drive=1.5, cutoff_hz=(3200, 1800), decay_s=1.0,
                            pitch_env=-0.07, pitch_env_s=0.06, vibrato=0.007),
    "harmonica": Instrument(rolloff=0.6, even_gain=0.6, cutoff_hz=(3600, 2800), attack_s=0.03,
                            pitch_env=-0.05, vibrato=0.008, noise=0.05, noise_decay_s=0.2),
    "power": Instrument(rolloff=0.8, partials=(2, 3, 4), drive=3, cutoff_hz=(3600, 2800),
                        decay_s=2.5),
    "wall": Instrument(rolloff=0.6, partials=(2, 3, 4), drive=9, cutoff_hz=(5500, 4500),
                       decay_s=4.0, detune=0.002),
    "shred": Instrument(rolloff=0.6, drive=8, cutoff_hz=(5500, 4500), decay_s=3.0, vibrato=0.008),
    "sax": Instrument(rolloff=0.8, cutoff_hz=(1900, 2600), attack_s=0.03, pitch_env=-0.03,
                      vibrato=0.006, noise=0.08, noise_decay_s=0.15),
    "trumpet": Instrument(rolloff=0.6, cutoff_hz=(2200, 3800), cutoff_decay_s=0.08, attack_s=0.02,
                          vibrato=0.005),
    "pad": Instrument(rolloff=1.0, cutoff_hz=(1200, 2400), cutoff_decay_s=0.6, attack_s=0.1,
                      release_s=0.3, detune=0.004),
    "pluck": Instrument(rolloff=0.7, even_gain=0.4, cutoff_hz=(5500, 900), cutoff_decay_s=0.06,
                        decay_s=0.22, release_s=0.1, detune=0.003),
    # voices
    "croon": Instrument(rolloff=1.1, formant_scale=1.0, attack_s=0.04, release_s=0.08,
                        pitch_env=-0.05, vibrato=0.012),
    "twang": Instrument(rolloff=0.9, formant_scale=1.08, attack_s=0.03, release_s=0.06,
                        pitch_env=-0.1, pitch_env_s=0.09, vibrato=0.01, noise=0.05,
                        noise_decay_s=0.03),
    "shout": Instrument(rolloff=0.7, formant_scale=1.02, drive=1.5, attack_s=0.02, release_s=0.06,
                        pitch_env=-0.06, vibrato=0.006, noise=0.1),
    "diva": Instrument(rolloff=0.8, formant_scale=1.17, attack_s=0.03, release_s=0.08,
                       pitch_env=-0.04, vibrato=0.01, noise=0.12, noise_band_hz=(4000, 9000)),
    "soprano": Instrument(rolloff=1.2, formant_scale=1.2, attack_s=0.07, release_s=0.15,
                          vibrato=0.02, vibrato_hz=5.8),
    "rap": Instrument(rolloff=0.9, formant_scale=0.97, attack_s=0.008, decay_s=0.25, release_s=0.03,
                      pitch_env=0.2, pitch_env_s=0.08, noise=0.5, noise_band_hz=(3000, 8000),
                      noise_decay_s=0.025),
    "growl": Instrument(rolloff=0.3, formant_scale=0.9, drive=4, attack_s=0.03, pitch_env=0.15,
                        pitch_env_s=0.2, vibrato=0.05, vibrato_hz=31, noise=0.5,
                        noise_band_hz=(500, 5000), noise_decay_s=0.8),
}
# fmt: on


def randomize_instrument(
    instrument: Instrument, rng: np.random.Generator, *, std: float = INSTRUMENT_STD
) -> Instrument:
    """The instrument with its VARIED_FIELDS scaled by log-normal factors."""
    factors = np.exp(rng.normal(0, std, size=len(VARIED_FIELDS)))
    varied = {}
    for name, factor in zip(VARIED_FIELDS, factors, strict=True):
        value = getattr(instrument, name)
        pair = isinstance(value, tuple)
        varied[name] = tuple(factor * each for each in value) if pair else factor * value
    return replace(instrument, **varied)
