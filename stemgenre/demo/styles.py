"""The ten genres of the demo as data: tempo, chords, scale, drum patterns and parts.

A pattern is one bar of 4/4, one character per step: 16 steps are sixteenths, 12 are triplets (for
shuffle and swing).

    .        rest
    -        the previous note is held
    X x o    drum hit: accented, normal, ghost note
    1 3 5 7  that tone of the chord
    6 8      sixth and octave above its root
    c        all tones of the chord
    m        next note of a melody
    a        approach note: a semitone beside the next bar's root
    ?        optional: with probability 0.5 another symbol of the pattern, else a rest

stemgenre/demo/synth.py turns these tables into scores and audio.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One voice of the arrangement. A clip samples one instrument and up to two patterns of it."""

    stem: str
    instruments: str  # names in INSTRUMENTS, separated by spaces
    patterns: str  # separated by spaces
    register: int  # lowest MIDI note of its chords and melodies
    level: float = 0.5
    gate: float = 0.9  # sounding fraction of a note's written length
    probability: float = 1.0  # of playing in a clip
    melody_range: int = 14  # semitones above `register`; any 5 contain a tone of each chord


@dataclass(frozen=True)
class Style:
    """The arrangement of a genre, in C; a clip transposes it to a sampled key."""

    bpm: tuple[float, float]  # slowest and fastest tempo
    progressions: tuple[str, ...]  # one chord per bar
    scale: tuple[int, ...]  # semitones above the tonic
    drum_patterns: tuple[dict[str, str], ...]  # {drum: pattern}
    parts: tuple[Part, ...]
    fill: str = "snare tom"  # drums of the fill in every fourth bar; "": no fills
    swing: float = 0.0  # delay of every other step, as a fraction of a step


# Scales: semitones above the tonic.
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
PENTA, BLUES, PHRYGIAN = (0, 2, 4, 7, 9), (0, 3, 5, 6, 7, 10), (0, 1, 3, 5, 7, 8, 10)

# fmt: off
STYLES = {
    "blues": Style(
        bpm=(66, 116),
        progressions=("C7 C7 C7 C7 F7 F7 C7 C7 G7 F7 C7 G7", "C7 F7 C7 C7 F7 F7 C7 C7 G7 F7 C7 G7"),
        scale=BLUES,
        drum_patterns=(
            {"hat": "X.xX.xX.xX.x", "snare": "...X.o...X.?", "kick": "X....?X....."},
            {"ride": "x.ox.ox.ox.o", "snare": "...X.....X.o", "kick": "X.....X..x.?"},
        ),
        parts=(
            Part("bass", "finger upright", "1..3..5..6.. 1.13.35.56.5 1..8..7..5..", 31, 0.75),
            Part("other", "crunch guitar", "c.cc.cc.cc.c c..c.cc..c.c", 50, 0.16, gate=0.6),
            Part("other", "blueslead harmonica", "..mm-m?-m--- m--?.mm-m-.. ...m-mm-?m--", 64, 0.3),
            Part("other", "piano", "...c.....c.. c....c......", 58, 0.15, probability=0.4),
            Part("vocals", "croon shout", "..mm-mm----- m-mm-m--?... m-----?.m---", 50, 0.9,
                 probability=0.7),
        ),
    ),
    "classical": Style(
        bpm=(58, 126),
        progressions=("C Am Dm G", "C F G C", "Am F Dm E", "Am Dm E Am", "C G Am Em F C Dm G"),
        scale=MAJOR,
        drum_patterns=({}, {}, {}, {"timpani": "X.......?......."}),
        fill="",
        parts=(
            Part("bass", "celli", "1------- 1---5--- 1---3---5---8---", 36, 0.5, gate=1.0),
            Part("other", "strings", "c------- c---c---", 55, 0.16, gate=1.0),
            Part("other", "harp piano", "1353135313531353 135853135853 1.3.5.8.5.3.5.3.", 57, 0.3,
                 probability=0.7),
            Part("other", "violin flute", "m---m-m-m---?--- m-m-m-m-m-----?- m-----mmm---m---", 72,
                 0.5),
            Part("vocals", "soprano", "m-------m---m--- m---------------", 69, 0.6,
                 probability=0.15),
        ),
    ),
    "country": Style(
        bpm=(92, 150),
        progressions=("C C F C G G C C", "C F C G", "C G F C", "C Am F G"),
        scale=PENTA,
        drum_patterns=(
            {"brush": "xoXoxoXoxoXoxoXo", "kick": "X.......X......."},
            {"hat": "..x...x...x...x.", "snare": "....x.o.....x.?.", "kick": "X.......X.....?."},
        ),
        parts=(
            Part("bass", "upright finger", "1.......5....... 1.......5.....a.", 33, 0.8, gate=0.6),
            Part("other", "guitar", "....c.......c... ....c..c....c.c.", 52, 0.25, gate=0.5),
            Part("other", "banjo", "1.5.3.8.5.3.1.5. 1358538513585385 5.8.3.5.8.5.3.8.", 60, 0.4,
                 probability=0.85),
            Part("other", "steel fiddle", "m-----m-?---m--- ....m---m-?-m---", 65, 0.3,
                 probability=0.8),
            Part("vocals", "twang", "m-m-m---m-?-m--- ..m-m-m-m-----?-", 55, 0.9, probability=0.7),
        ),
    ),
    "disco": Style(
        bpm=(112, 128),
        progressions=("Am7 Dm7 G7 Cmaj7", "Am7 Am7 Dm7 Em7", "Dm7 G7 Dm7 G7", "Fmaj7 Em7 Dm7 Em7"),
        scale=MAJOR,
        drum_patterns=(
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
                 probability=0.85),
            Part("other", "trumpet", "......c.c....... c..c..c.........", 62, 0.16, gate=0.7,
                 probability=0.5),
            Part("vocals", "diva", "m---m-m-?-----.. ..m-m-m---------", 67, 0.8, probability=0.6),
        ),
    ),
    "hiphop": Style(
        bpm=(76, 98),
        progressions=("Cm Cm Fm Cm", "Cm7 Cm7 Abmaj7 Gm7", "Cm7 Cm7 Cm7 Cm7", "Fm Cm Fm Cm"),
        scale=MINOR,
        drum_patterns=(
            {"boom": "X..?..x...X..?..", "snare": "....X.......X..?", "hat": "x.x.x.x.x.x.x.xx"},
            {"boom": "X.......?.X..x..", "clap": "....X.......X...", "hat": "xoxxxoxoxoxxxox?"},
        ),
        fill="hat snare",
        swing=0.3,
        parts=(
            Part("bass", "sub", "1-----1---1----- 1-------..1--?-- 1---..5---1-----", 26, 0.8),
            Part("other", "rhodes piano", "c-------..c----- c-----c---......", 55, 0.18),
            Part("other", "pluck strings", "m..m..m.....m... ..m-....m-......", 67, 0.15,
                 probability=0.6),
            Part("vocals", "rap", "mm.mmm.mmmm.mm?m m.mmmm?mm.mm.mmm .mmmm.mm?mmmmm.m", 45, 1.1,
                 probability=0.85, melody_range=5),
        ),
    ),
    "jazz": Style(
        bpm=(118, 210),
        progressions=("Dm7 G7 Cmaj7 A7", "Cmaj7 A7 Dm7 G7", "Am7 D7 Dm7 G7",
               "Fmaj7 Fm7 Em7 A7"),
        scale=MAJOR,
        drum_patterns=(
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
                 gate=1.0, probability=0.9),
            Part("vocals", "croon", "m-mm-m?-m--- m-----.m-m--", 54, 0.8, probability=0.2),
        ),
    ),
    "metal": Style(
        bpm=(138, 196),
        progressions=("Cm Cm Db Eb", "Cm Ab Bbm Cm", "Cm Cm Cm Db", "Cm Eb Db Cm"),
        scale=PHRYGIAN,
        drum_patterns=(
            {"click": "XxXxXxXxXxXxXxXx", "snare": "....X.......X...", "crash": "X.......?......."},
            {"click": "X.xXX.xXX.xXX.xX", "snare": "....X.......X..?", "open": "X...X...X...X..."},
            {"click": "XxXxXxXxXxXxXxXx", "snare": "..X...X...X...X.", "ride": "X.X.X.X.X.X.X.X."},
        ),
        parts=(
            Part("bass", "grind", "1.11111.11111.11 1111111111111111", 26, 0.6),
            Part("other", "wall", "1.11111.11111.11 1-------1-1-1--- 11111111?-1-11?-", 38, 0.7,
                 gate=0.85),
            Part("other", "shred", "mmmmmmmmmmmmmmmm m-mmm-mmm---m-mm", 69, 0.35, probability=0.45),
            Part("vocals", "growl", "m---m-m---?-.... m-------m-----..", 38, 1.0, probability=0.7,
                 melody_range=5),
        ),
    ),
    "pop": Style(
        bpm=(96, 130),
        progressions=("C G Am F", "Am F C G", "F G Am C", "C Am F G"),
        scale=PENTA,
        drum_patterns=(
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
                 probability=0.85),
            Part("other", "piano", "c---c---c---c---", 58, 0.16, probability=0.4),
            Part("vocals", "diva", "m-m-mm-m-m--?--- mm-mm-m-m---.?m- m---m-m-..m-m-m-", 62, 1.0,
                 probability=0.9),
        ),
    ),
    "reggae": Style(
        bpm=(124, 168),
        progressions=("Am Am Dm Dm", "C C F G", "Am Am G G", "C Dm C Dm", "Am F Dm Em"),
        scale=PENTA,
        drum_patterns=(
            {"kick": "....X...", "rim": "....X..?", "hat": "x.xox.xo"},
            {"kick": "....X...", "snare": "....x..?", "hat": "x.x.x.x?"},
            {"kick": "X.X.X.X.", "rim": "....X.?.", "hat": "xoxoxoxo"},
        ),
        swing=0.2,
        parts=(
            Part("bass", "dub", "1-.135-. ..1-5.3- 1-..8-5-", 28, 0.6),
            Part("other", "skank", "..c...c. ..c?..c. ..c...cc", 58, 0.8),
            Part("other", "organ", ".cc..cc. .c.c.c.c", 55, 0.2, gate=0.6, probability=0.85),
            Part("other", "trumpet", "m-m-?-m- m-------", 65, 0.2, probability=0.25),
            Part("vocals", "croon twang", "m-m-m-.. ..m-mm-- m---m-?.", 55, 0.8, probability=0.6),
        ),
    ),
    "rock": Style(
        bpm=(104, 148),
        progressions=("C F G F", "C Bb F C", "Am F C G", "C Eb F C"),
        scale=PENTA,
        drum_patterns=(
            {"kick": "X......xX.?.....", "snare": "....X.......X...", "hat": "X.x.X.x.X.x.X.x."},
            {"kick": "X...?.x.X.x.....", "snare": "....X.......X..?", "open": "X...X...X...X..."},
            {"kick": "X.....x.X.x.....", "snare": "....X.......X...", "crash": "X.......?......."},
        ),
        parts=(
            Part("bass", "pick", "1.1.1.1.1.1.1.1. 1.1.1.1.1.1.5.8. 1...1.1.1...1.5.", 31, 0.75),
            Part("other", "power", "1-1-1-1-1-1-1-1- 1-----1-1---1-1- 1---..1-1-1-....", 45, 0.5),
            Part("other", "crunch guitar", "1.5.8.5.3.5.8.5. c-----c-c---c---", 57, 0.2,
                 probability=0.6),
            Part("other", "blueslead", "m---m-m-m-?-m--- ....m-m-m-----m-", 67, 0.3,
                 probability=0.4),
            Part("vocals", "shout", "m-m-m---m-?-.... m---m-m-m-----..", 57, 1.0, probability=0.75),
        ),
    ),
}
# fmt: on
GENRES = tuple(STYLES)
