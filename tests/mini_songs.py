"""A small made-up data set: ten genres of short songs on the instruments of the demo song.

Genres differ in tempo, register, rhythm and timbre, plainly enough for a small network to learn from a few songs.
Songs of a genre differ in tempo, key, melody and chords, so that none is a near repeat of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from examples import render_demo_song as band

SONGS_A_GENRE = 7
TAKE = 2  # seed of the whole set; of five tried, the one in which repeats.py finds fewest chance likenesses
ARTIST_OF_SONG = (0, 0, 1, 1, 2, 3, 4)  # five artists a genre; two of them have two songs
MAJOR, MINOR, BLUES = [0, 2, 4, 5, 7, 9, 11], [0, 2, 3, 5, 7, 8, 10], [0, 3, 5, 6, 7, 10]

# Overtones of the steady instruments, from the fundamental up
FLUTE, ORGAN = [1, 0.2, 0.1], [1, 0.7, 0, 0.5, 0, 0, 0, 0.3]
BRASS, SYNTH = [0.5, 0.8, 1, 0.8, 0.7, 0.5, 0.4, 0.3], [1, 0, 0.33, 0, 0.2, 0, 0.14, 0, 0.11, 0, 0.09]


@dataclass(frozen=True)
class Style:
    """How a genre sounds. Rhythms are 16 signs a bar: x hits, anything else rests."""

    tempo: tuple[float, float]  # beats a minute
    scale: list[int]
    register: int  # MIDI note about which the melody moves
    lead: str  # rhythm of the melody
    chords: str  # rhythm of the chords
    bass: str
    kick: str = "." * 16
    snare: str = "." * 16
    hat: str = "." * 16
    voice: list[int | float] | None = None  # overtones of the melody; None plucks strings
    chord_voice: list[int | float] | None = None
    swing: float = 0.0  # how late every second eighth is, in eighths
    drive: float = 0.0  # distortion of melody and chords
    bright: float = 0.5  # of plucked strings
    boom: float = 0.1  # seconds that the bass drum rings
    hat_fall: float = 0.03
    curve: tuple[tuple[float, float], ...] = ((100, 0), (8000, 0))  # equaliser on the whole


EIGHTHS, BEATS, WHOLE, SOME = "x.x.x.x.x.x.x.x.", "x...x...x...x...", "x" + "." * 15, "x..x..x...x.x..."
BACKBEAT, OFFBEATS, NEVER = "....x.......x...", "..x...x...x...x.", "." * 16
WARM, HIFI = ((60, 3), (3000, 0), (6000, -15)), ((80, 3), (1000, -3), (5000, 3))
STYLES = {
    "blues": Style((60, 96), BLUES, 64, SOME, BEATS, EIGHTHS, BEATS, BACKBEAT, EIGHTHS, None, None, 0.33, 2, 0.5),
    "classical": Style((56, 84), MAJOR, 76, "x...x.x.x...x...", WHOLE, WHOLE, voice=FLUTE, curve=WARM),
    "country": Style((104, 132), MAJOR, 69, "x.xxx.x.x.xxx.x.", OFFBEATS, BEATS, NEVER, OFFBEATS, bright=0.95),
    "disco": Style(
        (114, 126), MINOR, 79, SOME, EIGHTHS, "x.xxx.xxx.xxx.xx", BEATS, BACKBEAT, OFFBEATS, SYNTH, ORGAN,
        hat_fall=0.15, curve=HIFI,
    ),
    "hiphop": Style(
        (72, 104), MINOR, 52, "x.....x.......x.", WHOLE, "x.....x...x.....", "x.....xx..x.....", BACKBEAT,
        "xxxxx.xxx.xxxxx.", FLUTE, FLUTE, boom=0.35, curve=((50, 9), (200, 3), (4000, -3)),
    ),
    "jazz": Style(
        (130, 180), MAJOR, 66, "x.x.x.xxx...x.x.", "...x......x.....", BEATS, hat="x...x.x.x...x.x.", voice=BRASS,
        swing=0.33, hat_fall=0.2, bright=0.3, curve=((60, 0), (2500, 0), (5000, -6)),
    ),
    "metal": Style(
        (150, 190), MINOR, 57, "x...x...x.x.x...", "x.xxx.xxx.xxx.xx", "x.xxx.xxx.xxx.xx", "x" * 16, BACKBEAT, EIGHTHS,
        drive=10, bright=0.7, hat_fall=0.08,
    ),
    "pop": Style(
        (98, 120), MAJOR, 72, "x..x..x.x..x..x.", WHOLE, EIGHTHS, "x.....x.x.......", BACKBEAT, "x" * 16, SYNTH, SYNTH,
        curve=HIFI,
    ),
    "reggae": Style(
        (64, 86), MAJOR, 60, "x.....x.x.......", OFFBEATS, "x..x..x.....x.x.", "........x.......", "........x.......",
        OFFBEATS, ORGAN, ORGAN, curve=((60, 9), (400, 0), (3000, -12)),
    ),
    "rock": Style(
        (112, 140), MAJOR, 64, "x...x.x.x.....x.", EIGHTHS, EIGHTHS, "x.......x.x.....", BACKBEAT, EIGHTHS, drive=3,
        bright=0.8, hat_fall=0.1, curve=((80, 0), (1500, 3), (5000, 0)),
    ),
}  # fmt: skip


def render(style: Style, rng: np.random.Generator, seconds: float, pace: float, rate: int = band.RATE) -> np.ndarray:
    """One song of a style, float64 (samples,), peak 0.8; ``pace`` 0 to 1 is where its tempo lies in the style's."""
    tempo, key = float(np.interp(pace, (0, 1), style.tempo)), int(rng.integers(-4, 5))
    shift, keep = 2 * int(rng.integers(8)), rng.uniform(0.5, 0.75)  # where in the bar it begins, how busy it is

    def events(pattern: str) -> Iterator[tuple[float, float, int]]:
        """(start, length, bar) of each hit, times in seconds; some are left out, or songs would repeat each other."""
        step = 15 / tempo
        count = int(seconds / step)
        hits = [i for i in range(count) if pattern[(i + shift) % 16] == "x" and rng.random() < keep]
        for hit, following in pairwise([*hits, count]):
            late = 2 * style.swing * step if hit % 4 in (2, 3) else 0.0
            yield hit * step + late, (following - hit) * step, hit // 16

    tuned, rhythm = np.zeros(round(seconds * rate)), np.zeros(round(seconds * rate))
    roots = rng.choice(style.scale[:6], 8)  # a chord a bar
    spread = (0, 7, 12) if style.drive > 2 else (0, 7, 16 if 4 in style.scale else 15)

    def play(note: float, length: float, voice: list[int | float] | None) -> np.ndarray:
        hz = band.hertz(note + key)
        if voice is None:
            return band.pluck(hz, length, rng, rate, style.bright, 1.5)
        return band.tone(hz, length, rate, voice, vibrato=0.2 if voice is BRASS else 0.0)

    degree = 0
    for start, length, _ in events(style.lead):
        degree = int(np.clip(degree + rng.integers(-3, 4), -6, 8))
        octave, position = divmod(degree, len(style.scale))
        note = style.register + 12 * octave + style.scale[position]
        band.place(tuned, play(note, length, style.voice), start, rate, 0.5 * rng.uniform(0.7, 1))
    low = style.register - 12 if style.register > 58 else style.register
    for start, length, bar in events(style.chords):
        notes = [low + roots[bar % 8] % 12 + interval for interval in spread]
        if style.chords == WHOLE:
            band.place(tuned, band.pad([note + key for note in notes], length, rate), start, rate, 0.5)
            continue
        for note in notes:
            short = length if style.drive else min(length, 0.18)
            band.place(tuned, play(note, short, style.chord_voice), start, rate, 0.25)
    if style.drive:
        tuned = 0.5 * band.equalise(
            band.distort(tuned, style.drive), rate, [(80, -6), (2500, 3), (5000, -3), (9000, -24)]
        )
    for start, length, bar in events(style.bass):
        walk = rng.choice([0, 0, 7, 12]) if style.bass in (BEATS, EIGHTHS) else 0
        note = 36 + (roots[bar % 8] + key) % 12 + walk
        band.place(tuned, band.bass(band.hertz(note), length, rate), start, rate, 0.3)
    kit = (
        (style.kick, band.kick(rng, rate, fall=style.boom * rng.uniform(0.5, 1.2), hz=rng.uniform(42, 58)), 0.7),
        (style.snare, band.snare(rng, rate, hz=rng.uniform(160, 230)), 0.5),
        (style.hat, band.hat(rng, rate, style.hat_fall), 0.15),
    )
    for hits, sound, gain in kit:
        for start, _, _ in events(hits):
            band.place(rhythm, sound, start, rate, gain * rng.uniform(0.4, 1))
    mix = band.equalise(tuned + rhythm, rate, style.curve) + 1e-4 * rng.standard_normal(len(tuned))
    return 0.8 * mix / np.abs(mix).max()


def write_source(folder: Path) -> Path:
    """Write ``<genre>/<genre>.000NN.wav`` (22,050 Hz, 5 to 6 s) and ``artists.txt`` below ``folder``; return it.

    ``artists.txt`` has the form of Sturm's index: ``file ::: artist ::: title`` after comment lines with ``##``.
    """
    lines = ["## Made-up artists of the test songs", "##"]
    for number, (genre, style) in enumerate(STYLES.items()):
        paces = (np.random.default_rng(number).permutation(SONGS_A_GENRE) + 0.5) / SONGS_A_GENRE
        for song, pace in enumerate(paces):
            rng = np.random.default_rng([number, song, TAKE])
            name = f"{genre}.{song:05d}.wav"
            band.write_audio(folder / genre / name, render(style, rng, rng.uniform(5.2, 6), pace))
            lines.append(f"{name} ::: {genre.title()} Player {ARTIST_OF_SONG[song]} ::: Song {song}")
    (folder / "artists.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
