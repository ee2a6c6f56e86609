"""What the synthesised band can play: its instruments, and ten genres written out for them.

Parts are written one bar of 4/4 at a time, one character per step: 16 steps are sixteenths, 12 are
triplets (that is how shuffle and swing are written).

    .  rest                        -  the note before keeps sounding
    X x o  hit: accent, normal, ghost (drums)
    1 3 5 7  that tone of the chord    6 8  sixth, octave    a  a semitone beside the next root
    c  the whole chord             m  the next note of a melody
    ?  perhaps: in half of the bars, one of the other symbols of the pattern

Only tables: `stemgenre.band` reads and plays them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sound:
    """An instrument: a harmonic tone that grows darker while it rings, and a burst of noise."""

    tone: float = 1.0  # level of the tone; 0 for pure noise
    hz: float = 0.0  # pitch of a drum; other instruments get theirs from the score
    rolloff: float = 1.0  # partial k has amplitude k ** -rolloff
    even: float = 1.0  # level of the even partials: 0 is a hollow square wave
    stack: tuple[int, ...] = (1,)  # partials that each carry a whole tone: 2, 3, 4 is a power chord
    drive: float = 0.0  # gain into a tanh distortion; 0 for none
    tint_hz: tuple[float, float] = (5000.0, 2500.0)  # low-pass corner at first, and later
    morph_s: float = 0.3  # time constant from the first spectrum to the later one
    throat: float = 0.0  # formants of a voice, relative to a man's; 0 for no formants
    attack_s: float = 0.005
    decay_s: float = 20.0  # time constant of the tone
    release_s: float = 0.05
    bend: float = 0.0  # the pitch starts this fraction above (below: negative) and settles
    bend_s: float = 0.05
    vibrato: float = 0.0  # depth as a fraction of the frequency
    vibrato_hz: float = 5.5
    detune: float = 0.0  # two players, this fraction above and below
    noise: float = 0.0  # level of the noise
    noise_hz: tuple[float, float] = (2000.0, 8000.0)
    noise_s: float = 0.05


# fmt: off
SOUNDS = {
    # drums
    "kick": Sound(hz=52, rolloff=4, bend=2.2, bend_s=0.03, decay_s=0.12, noise=0.15, noise_s=0.01),
    "boom": Sound(hz=46, rolloff=4, bend=1.5, bend_s=0.04, decay_s=0.3, noise=0.05, noise_s=0.01),
    "click": Sound(hz=62, rolloff=3, bend=3.5, bend_s=0.012, decay_s=0.06, noise=0.5,
                   noise_hz=(2500, 6000), noise_s=0.008),
    "snare": Sound(hz=190, rolloff=2.5, bend=0.4, bend_s=0.02, decay_s=0.08, noise=0.9,
                   noise_hz=(900, 8000), noise_s=0.1),
    "brush": Sound(tone=0, attack_s=0.015, noise=0.5, noise_hz=(1500, 6000), noise_s=0.09),
    "clap": Sound(tone=0, attack_s=0.012, noise=1.2, noise_hz=(900, 2600), noise_s=0.09),
    "rim": Sound(hz=480, rolloff=1.2, tint_hz=(4000, 2500), decay_s=0.03, noise=0.3, noise_s=0.01),
    "tom": Sound(hz=110, rolloff=3, bend=0.6, bend_s=0.05, decay_s=0.18, noise=0.1, noise_s=0.02),
    "hat": Sound(tone=0, noise=0.5, noise_hz=(6500, 10500), noise_s=0.03),
    "open": Sound(tone=0, noise=0.6, noise_hz=(5500, 10500), noise_s=0.13),
    "ride": Sound(tone=0, noise=0.45, noise_hz=(4200, 8200), noise_s=0.24),
    "crash": Sound(tone=0, noise=0.8, noise_hz=(2800, 10500), noise_s=0.5),
    "shaker": Sound(tone=0, attack_s=0.025, noise=0.35, noise_hz=(5000, 9000), noise_s=0.035),
    "timpani": Sound(hz=82, rolloff=2.2, bend=0.1, decay_s=0.5, noise=0.1, noise_hz=(80, 400)),
    # bass
    "upright": Sound(rolloff=1.3, tint_hz=(900, 280), decay_s=0.45, noise=0.08,
                     noise_hz=(700, 2500)),
    "finger": Sound(rolloff=1.0, tint_hz=(1100, 450), decay_s=0.9),
    "pick": Sound(rolloff=0.8, tint_hz=(2600, 1000), decay_s=0.8, noise=0.1, noise_s=0.01),
    "grind": Sound(rolloff=0.8, drive=3, tint_hz=(2800, 1500), decay_s=1.2),
    "dub": Sound(rolloff=1.6, tint_hz=(500, 160), decay_s=0.8, attack_s=0.012),
    "sub": Sound(rolloff=2.6, drive=1.2, bend=0.5, bend_s=0.03, tint_hz=(300, 140), decay_s=0.9),
    "synthbass": Sound(rolloff=0.9, tint_hz=(2200, 500), morph_s=0.08, decay_s=0.8, detune=0.002),
    "celli": Sound(rolloff=1.0, tint_hz=(900, 1100), attack_s=0.09, release_s=0.2, detune=0.002,
                   vibrato=0.004),
    # harmony and solos
    "piano": Sound(rolloff=1.1, tint_hz=(3500, 900), morph_s=0.2, decay_s=0.7, release_s=0.12),
    "rhodes": Sound(rolloff=2.0, tint_hz=(2000, 600), decay_s=0.9, release_s=0.15, detune=0.001),
    "organ": Sound(rolloff=1.2, even=0.9, tint_hz=(3000, 3000), vibrato=0.004, vibrato_hz=6.5),
    "strings": Sound(rolloff=0.9, tint_hz=(2600, 3400), attack_s=0.12, release_s=0.25, detune=0.003,
                     vibrato=0.004),
    "violin": Sound(rolloff=0.8, tint_hz=(3500, 4500), attack_s=0.06, release_s=0.12,
                    vibrato=0.009),
    "flute": Sound(rolloff=2.4, attack_s=0.05, release_s=0.1, vibrato=0.005, noise=0.1,
                   noise_s=0.3),
    "harp": Sound(rolloff=1.5, tint_hz=(2600, 700), morph_s=0.15, decay_s=0.5, release_s=0.4),
    "guitar": Sound(rolloff=0.9, tint_hz=(4200, 1300), morph_s=0.12, decay_s=0.5, release_s=0.08),
    "banjo": Sound(rolloff=0.6, tint_hz=(6000, 2500), morph_s=0.06, decay_s=0.16, noise=0.15,
                   noise_s=0.01),
    "steel": Sound(rolloff=1.3, tint_hz=(3800, 2200), attack_s=0.03, decay_s=1.6, bend=-0.11,
                   bend_s=0.12, vibrato=0.008),
    "fiddle": Sound(rolloff=0.7, tint_hz=(4200, 5000), attack_s=0.03, bend=-0.03, vibrato=0.006),
    "skank": Sound(rolloff=0.8, tint_hz=(4200, 1800), morph_s=0.03, decay_s=0.07, release_s=0.02,
                   noise=0.2, noise_s=0.01),
    "scratch": Sound(rolloff=0.6, tint_hz=(5500, 2500), morph_s=0.03, decay_s=0.06, release_s=0.02,
                     noise=0.3, noise_s=0.015),
    "crunch": Sound(rolloff=0.9, drive=2, tint_hz=(3200, 1800), decay_s=0.9),
    "blueslead": Sound(rolloff=0.9, drive=1.5, tint_hz=(3200, 1800), decay_s=1.0, bend=-0.07,
                       bend_s=0.06, vibrato=0.007),
    "harmonica": Sound(rolloff=0.6, even=0.6, tint_hz=(3600, 2800), attack_s=0.03, bend=-0.05,
                       vibrato=0.008, noise=0.05, noise_s=0.2),
    "power": Sound(rolloff=0.8, stack=(2, 3, 4), drive=3, tint_hz=(3600, 2800), decay_s=2.5),
    "wall": Sound(rolloff=0.6, stack=(2, 3, 4), drive=9, tint_hz=(5500, 4500), decay_s=4.0,
                  detune=0.002),
    "shred": Sound(rolloff=0.6, drive=8, tint_hz=(5500, 4500), decay_s=3.0, vibrato=0.008),
    "sax": Sound(rolloff=0.8, tint_hz=(1900, 2600), attack_s=0.03, bend=-0.03, vibrato=0.006,
                 noise=0.08, noise_s=0.15),
    "trumpet": Sound(rolloff=0.6, tint_hz=(2200, 3800), morph_s=0.08, attack_s=0.02, vibrato=0.005),
    "pad": Sound(rolloff=1.0, tint_hz=(1200, 2400), morph_s=0.6, attack_s=0.1, release_s=0.3,
                 detune=0.004),
    "pluck": Sound(rolloff=0.7, even=0.4, tint_hz=(5500, 900), morph_s=0.06, decay_s=0.22,
                   release_s=0.1, detune=0.003),
    # voices
    "croon": Sound(rolloff=1.1, throat=1.0, attack_s=0.04, release_s=0.08, bend=-0.05,
                   vibrato=0.012),
    "twang": Sound(rolloff=0.9, throat=1.08, attack_s=0.03, release_s=0.06, bend=-0.1, bend_s=0.09,
                   vibrato=0.01, noise=0.05, noise_s=0.03),
    "shout": Sound(rolloff=0.7, throat=1.02, drive=1.5, attack_s=0.02, release_s=0.06, bend=-0.06,
                   vibrato=0.006, noise=0.1),
    "diva": Sound(rolloff=0.8, throat=1.17, attack_s=0.03, release_s=0.08, bend=-0.04, vibrato=0.01,
                  noise=0.12, noise_hz=(4000, 9000)),
    "soprano": Sound(rolloff=1.2, throat=1.2, attack_s=0.07, release_s=0.15, vibrato=0.02,
                     vibrato_hz=5.8),
    "rap": Sound(rolloff=0.9, throat=0.97, attack_s=0.008, decay_s=0.25, release_s=0.03, bend=0.2,
                 bend_s=0.08, noise=0.5, noise_hz=(3000, 8000), noise_s=0.025),
    "growl": Sound(rolloff=0.3, throat=0.9, drive=4, attack_s=0.03, bend=0.15, bend_s=0.2,
                   vibrato=0.05, vibrato_hz=31, noise=0.5, noise_hz=(500, 5000), noise_s=0.8),
}
# fmt: on


@dataclass(frozen=True)
class Part:
    """One player. Each clip draws one of the sounds and one or two of the patterns."""

    stem: str
    sounds: str
    patterns: str
    register: int  # MIDI note at the bottom of what chords and melodies are played in
    level: float = 0.5
    gate: float = 0.9  # of its written length, how much a note is held
    chance: float = 1.0  # of being heard in a clip
    span: int = 14  # semitones a melody moves in; within 5 there is a tone of any chord


@dataclass(frozen=True)
class Style:
    """A genre: beats per minute, chords and scale in C, drum grooves, players."""

    bpm: tuple[float, float]
    songs: tuple[str, ...]  # one chord per bar
    scale: tuple[int, ...]
    grooves: tuple[dict[str, str], ...]  # drum: pattern
    parts: tuple[Part, ...]
    fill: str = "snare tom"
    swing: float = 0.0  # of a step, how much every other one comes late


# Semitones above the root.
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
PENTA, BLUES, PHRYGIAN = (0, 2, 4, 7, 9), (0, 3, 5, 6, 7, 10), (0, 1, 3, 5, 7, 8, 10)

# fmt: off
STYLES = {
    "blues": Style(
        bpm=(66, 116),
        songs=("C7 C7 C7 C7 F7 F7 C7 C7 G7 F7 C7 G7", "C7 F7 C7 C7 F7 F7 C7 C7 G7 F7 C7 G7"),
        scale=BLUES,
        grooves=(
            {"hat": "X.xX.xX.xX.x", "snare": "...X.o...X.?", "kick": "X....?X....."},
            {"ride": "x.ox.ox.ox.o", "snare": "...X.....X.o", "kick": "X.....X..x.?"},
        ),
        parts=(
            Part("bass", "finger upright", "1..3..5..6.. 1.13.35.56.5 1..8..7..5..", 31, 0.75),
            Part("other", "crunch guitar", "c.cc.cc.cc.c c..c.cc..c.c", 50, 0.16, gate=0.6),
            Part("other", "blueslead harmonica", "..mm-m?-m--- m--?.mm-m-.. ...m-mm-?m--", 64, 0.3),
            Part("other", "piano", "...c.....c.. c....c......", 58, 0.15, chance=0.4),
            Part("vocals", "croon shout", "..mm-mm----- m-mm-m--?... m-----?.m---", 50, 0.9,
                 chance=0.7),
        ),
    ),
    "classical": Style(
        bpm=(58, 126),
        songs=("C Am Dm G", "C F G C", "Am F Dm E", "Am Dm E Am", "C G Am Em F C Dm G"),
        scale=MAJOR,
        grooves=({}, {}, {}, {"timpani": "X.......?......."}),
        fill="",
        parts=(
            Part("bass", "celli", "1------- 1---5--- 1---3---5---8---", 36, 0.5, gate=1.0),
            Part("other", "strings", "c------- c---c---", 55, 0.16, gate=1.0),
            Part("other", "harp piano", "1353135313531353 135853135853 1.3.5.8.5.3.5.3.", 57, 0.3,
                 chance=0.7),
            Part("other", "violin flute", "m---m-m-m---?--- m-m-m-m-m-----?- m-----mmm---m---", 72,
                 0.5),
            Part("vocals", "soprano", "m-------m---m--- m---------------", 69, 0.6, chance=0.15),
        ),
    ),
    "country": Style(
        bpm=(92, 150),
        songs=("C C F C G G C C", "C F C G", "C G F C", "C Am F G"),
        scale=PENTA,
        grooves=(
            {"brush": "xoXoxoXoxoXoxoXo", "kick": "X.......X......."},
            {"hat": "..x...x...x...x.", "snare": "....x.o.....x.?.", "kick": "X.......X.....?."},
        ),
        parts=(
            Part("bass", "upright finger", "1.......5....... 1.......5.....a.", 33, 0.8, gate=0.6),
            Part("other", "guitar", "....c.......c... ....c..c....c.c.", 52, 0.25, gate=0.5),
            Part("other", "banjo", "1.5.3.8.5.3.1.5. 1358538513585385 5.8.3.5.8.5.3.8.", 60, 0.4,
                 chance=0.85),
            Part("other", "steel fiddle", "m-----m-?---m--- ....m---m-?-m---", 65, 0.3, chance=0.8),
            Part("vocals", "twang", "m-m-m---m-?-m--- ..m-m-m-m-----?-", 55, 0.9, chance=0.7),
        ),
    ),
    "disco": Style(
        bpm=(112, 128),
        songs=("Am7 Dm7 G7 Cmaj7", "Am7 Am7 Dm7 Em7", "Dm7 G7 Dm7 G7", "Fmaj7 Em7 Dm7 Em7"),
        scale=MAJOR,
        grooves=(
            {"kick": "X...X...X...X...", "open": "..X...X...X...X.", "hat": "x..ox..ox..ox..o",
             "clap": "....X.......X..."},
            {"kick": "X...X...X...X...", "open": "..X...X...X...X.", "snare": "....X..?....X..o",
             "shaker": "xoxoxoxoxoxoxoxo"},
        ),
        parts=(
            Part("bass", "finger synthbass", "1.8.1.8.1.8.1.8. 1.81..8.1.815.8.", 31, 0.55,
                 gate=0.6),
            Part("other", "scratch", "c.cc.c.cc.cc.c.c ccc.cc.cccc.cc.c", 60, 0.3),
            Part("other", "strings", "c--------------- ......m-m-mmm--- c-----c---------", 67, 0.2,
                 chance=0.85),
            Part("other", "trumpet", "......c.c....... c..c..c.........", 62, 0.16, gate=0.7,
                 chance=0.5),
            Part("vocals", "diva", "m---m-m-?-----.. ..m-m-m---------", 67, 0.8, chance=0.6),
        ),
    ),
    "hiphop": Style(
        bpm=(76, 98),
        songs=("Cm Cm Fm Cm", "Cm7 Cm7 Abmaj7 Gm7", "Cm7 Cm7 Cm7 Cm7", "Fm Cm Fm Cm"),
        scale=MINOR,
        grooves=(
            {"boom": "X..?..x...X..?..", "snare": "....X.......X..?", "hat": "x.x.x.x.x.x.x.xx"},
            {"boom": "X.......?.X..x..", "clap": "....X.......X...", "hat": "xoxxxoxoxoxxxox?"},
        ),
        fill="hat snare",
        swing=0.3,
        parts=(
            Part("bass", "sub", "1-----1---1----- 1-------..1--?-- 1---..5---1-----", 26, 0.8),
            Part("other", "rhodes piano", "c-------..c----- c-----c---......", 55, 0.18),
            Part("other", "pluck strings", "m..m..m.....m... ..m-....m-......", 67, 0.15,
                 chance=0.6),
            Part("vocals", "rap", "mm.mmm.mmmm.mm?m m.mmmm?mm.mm.mmm .mmmm.mm?mmmmm.m", 45, 1.1,
                 chance=0.85, span=5),
        ),
    ),
    "jazz": Style(
        bpm=(118, 210),
        songs=("Dm7 G7 Cmaj7 A7", "Cmaj7 A7 Dm7 G7", "Am7 D7 Dm7 G7",
               "Fmaj7 Fm7 Em7 A7"),
        scale=MAJOR,
        grooves=(
            {"ride": "X..x.xX..x.x", "hat": "...x.....x..", "brush": "..?..o.....?",
             "kick": "o.....o..?.."},
            {"ride": "X..x.xx..x.x", "brush": "xo.xo.xo.xo.", "rim": ".....?...o.."},
        ),
        fill="brush tom",
        parts=(
            Part("bass", "upright", "1..3..5..a.. 1..5..3..a.. 1..7..5..a..", 29, 0.7),
            Part("other", "piano rhodes", "..c.....c... .....c...... c....c...c..", 56, 0.22,
                 gate=0.7),
            Part("other", "sax trumpet", "m.mm.mm.mm.m ..mm.mm---.m m--..mm.m?-m", 62, 0.5,
                 gate=1.0, chance=0.9),
            Part("vocals", "croon", "m-mm-m?-m--- m-----.m-m--", 54, 0.8, chance=0.2),
        ),
    ),
    "metal": Style(
        bpm=(138, 196),
        songs=("Cm Cm Db Eb", "Cm Ab Bbm Cm", "Cm Cm Cm Db", "Cm Eb Db Cm"),
        scale=PHRYGIAN,
        grooves=(
            {"click": "XxXxXxXxXxXxXxXx", "snare": "....X.......X...", "crash": "X.......?......."},
            {"click": "X.xXX.xXX.xXX.xX", "snare": "....X.......X..?", "open": "X...X...X...X..."},
            {"click": "XxXxXxXxXxXxXxXx", "snare": "..X...X...X...X.", "ride": "X.X.X.X.X.X.X.X."},
        ),
        parts=(
            Part("bass", "grind", "1.11111.11111.11 1111111111111111", 26, 0.6),
            Part("other", "wall", "1.11111.11111.11 1-------1-1-1--- 11111111?-1-11?-", 38, 0.7,
                 gate=0.85),
            Part("other", "shred", "mmmmmmmmmmmmmmmm m-mmm-mmm---m-mm", 69, 0.35, chance=0.45),
            Part("vocals", "growl", "m---m-m---?-.... m-------m-----..", 38, 1.0, chance=0.7,
                 span=5),
        ),
    ),
    "pop": Style(
        bpm=(96, 130),
        songs=("C G Am F", "Am F C G", "F G Am C", "C Am F G"),
        scale=PENTA,
        grooves=(
            {"kick": "X...X...X...X...", "clap": "....X.......X...", "shaker": "xoxoxoxoxoxoxoxo"},
            {"kick": "X.....X.X.?.....", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "X..X..X...X.....", "clap": "....X.......X..?", "hat": "x.o.x.o.x.o.x.oo"},
        ),
        fill="clap tom",
        parts=(
            Part("bass", "synthbass", "1.1.1.1.1.1.1.1. 1--1--1-1--1--1- 1-----1-1-----1-", 31,
                 0.45),
            Part("other", "pad", "c---------------", 55, 0.2, gate=1.0),
            Part("other", "pluck", "1.3.5.8.5.3.1.5. 8.5.3.8.5.3.8.5. 1..5..8.1..5..3.", 72, 0.3,
                 chance=0.85),
            Part("other", "piano", "c---c---c---c---", 58, 0.16, chance=0.4),
            Part("vocals", "diva", "m-m-mm-m-m--?--- mm-mm-m-m---.?m- m---m-m-..m-m-m-", 62, 1.0,
                 chance=0.9),
        ),
    ),
    "reggae": Style(
        bpm=(124, 168),
        songs=("Am Am Dm Dm", "C C F G", "Am Am G G", "C Dm C Dm", "Am F Dm Em"),
        scale=PENTA,
        grooves=(
            {"kick": "....X...", "rim": "....X..?", "hat": "x.xox.xo"},
            {"kick": "....X...", "snare": "....x..?", "hat": "x.x.x.x?"},
            {"kick": "X.X.X.X.", "rim": "....X.?.", "hat": "xoxoxoxo"},
        ),
        swing=0.2,
        parts=(
            Part("bass", "dub", "1-.135-. ..1-5.3- 1-..8-5-", 28, 0.6),
            Part("other", "skank", "..c...c. ..c?..c. ..c...cc", 58, 0.8),
            Part("other", "organ", ".cc..cc. .c.c.c.c", 55, 0.2, gate=0.6, chance=0.85),
            Part("other", "trumpet", "m-m-?-m- m-------", 65, 0.2, chance=0.25),
            Part("vocals", "croon twang", "m-m-m-.. ..m-mm-- m---m-?.", 55, 0.8, chance=0.6),
        ),
    ),
    "rock": Style(
        bpm=(104, 148),
        songs=("C F G F", "C Bb F C", "Am F C G", "C Eb F C"),
        scale=PENTA,
        grooves=(
            {"kick": "X......xX.?.....", "snare": "....X.......X...", "hat": "X.x.X.x.X.x.X.x."},
            {"kick": "X...?.x.X.x.....", "snare": "....X.......X..?", "open": "X...X...X...X..."},
            {"kick": "X.....x.X.x.....", "snare": "....X.......X...", "crash": "X.......?......."},
        ),
        parts=(
            Part("bass", "pick", "1.1.1.1.1.1.1.1. 1.1.1.1.1.1.5.8. 1...1.1.1...1.5.", 31, 0.75),
            Part("other", "power", "1-1-1-1-1-1-1-1- 1-----1-1---1-1- 1---..1-1-1-....", 45, 0.5),
            Part("other", "crunch guitar", "1.5.8.5.3.5.8.5. c-----c-c---c---", 57, 0.2,
                 chance=0.6),
            Part("other", "blueslead", "m---m-m-m-?-m--- ....m-m-m-----m-", 67, 0.3, chance=0.4),
            Part("vocals", "shout", "m-m-m---m-?-.... m---m-m-m-----..", 57, 1.0, chance=0.75),
        ),
    ),
}
# fmt: on
GENRES = tuple(STYLES)
