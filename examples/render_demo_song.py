"""Compose and render a 30-second metal tune, so that the detector can be tried without anybody else's music.

Reads nothing. Writes one Ogg Vorbis file, 22,050 Hz mono (.wav and .flac work too).
The riffs are written out below; the seed plays the lead melody and the small human differences between the strokes.
The instruments are plain functions that the tests use to make songs of their own.

    python examples/render_demo_song.py --out examples/demo_song.ogg
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are no package; run from anywhere
from common import UserError, argument_parser, command, complain, path_name
from files import whole_file

RATE = 22_050  # Hz, of the file
STUDIO_RATE = 2 * RATE  # Hz, while playing: distortion makes overtones that would fold back at the lower rate
PEAK = 0.7  # of full scale; the rest is room for what Vorbis overshoots

Signal = np.ndarray  # float64 (samples,), mono, full scale is 1
Curve = Sequence[tuple[float, float]]  # (Hz, dB) points, joined by straight lines over log frequency


# ---------------------------------------------------------------- tools


def hertz(note: float) -> float:
    """Frequency of a MIDI note number: 69 is A4, 440 Hz."""
    return 440.0 * 2 ** ((note - 69) / 12)


def clock(seconds: float, rate: int) -> Signal:
    """Sample times in seconds, from 0."""
    return np.arange(round(seconds * rate)) / rate


def place(track: Signal, sound: Signal, start: float, rate: int, gain: float = 1.0) -> None:
    """Add ``sound`` to ``track`` in place at ``start`` seconds; what hangs over the end is cut off."""
    first = max(0, round(start * rate))
    room = max(0, len(track) - first)
    track[first : first + room][: len(sound)] += gain * sound[:room]


def release(sound: Signal, rate: int, seconds: float = 0.01) -> Signal:
    """Fade the end out, so that a note which is cut short doesn't click."""
    count = min(len(sound), round(seconds * rate))
    faded = sound.copy()
    faded[len(sound) - count :] *= np.linspace(1, 0, count)
    return faded


def equalise(signal: Signal, rate: int, curve: Curve) -> Signal:
    """Zero-phase equaliser through the points of ``curve``; level beyond the first and last."""
    if not len(signal):
        return signal
    size = (
        1 << (len(signal) + rate // 50).bit_length()
    )  # a power of two is fast; the margin keeps the end off the start
    spectrum = np.fft.rfft(signal, size)
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 1.0)
    levels = np.interp(np.log(frequencies), np.log([hz for hz, _ in curve]), [level for _, level in curve])
    return np.fft.irfft(spectrum * 10 ** (levels / 20), size)[: len(signal)]


def distort(signal: Signal, drive: float) -> Signal:
    """Overdriven amplifier: a soft clip with a slight bias, which adds even overtones to the odd ones."""
    bias = 0.15
    return np.tanh(drive * signal + bias) - np.tanh(bias)


def room(signal: Signal, rate: int, rng: np.random.Generator, seconds: float = 0.3, amount: float = 0.2) -> Signal:
    """Add the echo of a room that dies away in ``seconds`` (to -60 dB)."""
    times = clock(seconds, rate)
    echo = rng.standard_normal(len(times)) * np.exp(-6.9 * times / seconds)
    echo *= amount / np.sqrt(np.sum(echo**2))
    size = 1 << (len(signal) + len(echo)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(echo, size), size)
    return signal + wet[: len(signal)]


def halve_rate(signal: Signal) -> Signal:
    """Resample to half the rate: the upper half of the spectrum is left out."""
    spectrum = np.fft.rfft(signal)[: len(signal) // 4 + 1]
    return np.fft.irfft(spectrum, len(signal) // 2) / 2


# ---------------------------------------------------------------- instruments (each peaks near 1)


def pluck(hz: float, seconds: float, rng: np.random.Generator, rate: int, bright: float, ring: float) -> Signal:
    """Plucked string after Karplus and Strong (Computer Music Journal 7(2), 1983).

    A period of noise circulates and loses treble on every turn; all turns are worked out at once, in the spectrum.

    Args:
        bright: 0 to 1, treble in the stroke and how long it lasts.
        ring: seconds until the fundamental has fallen by 60 dB.
    """
    period = max(4, round(rate / hz))
    stretch = rate / hz / period  # the string is played at a whole period, then read at the true pitch
    turns = int(seconds * rate / stretch / period) + 2
    muffle = np.cos(np.pi * np.arange(period // 2 + 1) / period).clip(0)  # a mean of neighbouring samples does this
    stroke = np.fft.rfft(rng.uniform(-1, 1, period)) * muffle ** (4 * (1 - bright))
    stroke[0] = 0
    damping = 10 ** (-3 / (hz * ring)) * muffle ** (2.5 - 2 * bright)
    turns_spectrum = stroke * damping ** np.arange(turns)[:, None]
    string = np.fft.irfft(turns_spectrum, period, axis=1).ravel()
    string /= np.abs(string).max()
    return release(np.interp(np.arange(round(seconds * rate)) / stretch, np.arange(len(string)), string), rate)


def tone(
    hz: float, seconds: float, rate: int, partials: Sequence[float], attack: float = 0.01, vibrato: float = 0.0
) -> Signal:
    """Steady tone of overtones with the amplitudes ``partials``; ``vibrato`` in semitones, at 5.5 Hz."""
    times = clock(seconds, rate)
    phase = 2 * np.pi * hz * times
    if vibrato:
        phase -= hz / 5.5 * (2 ** (vibrato / 12) - 1) * np.cos(2 * np.pi * 5.5 * times)
    audible = sum(order * hz < 0.45 * rate for order in range(1, len(partials) + 1))
    turn = np.exp(1j * phase)
    overtone, sound = turn.copy(), np.zeros(len(times))
    for amplitude in partials[:audible]:
        sound += amplitude * overtone.imag
        overtone *= turn  # far cheaper than a sine for each
    return release(sound * np.minimum(1, times / attack) / sum(map(abs, partials)), rate, 0.03)


def pad(notes: Sequence[float], seconds: float, rate: int, bright: float = 0.5, attack: float = 0.3) -> Signal:
    """Strings or a synthesiser that swell on a chord of MIDI notes: three detuned voices a note."""
    partials = [bright ** (order / 2) / order for order in range(1, 13)]
    voices = [
        tone(hertz(note + detune), seconds, rate, partials, min(attack, seconds))
        for note in notes
        for detune in (-0.08, 0.0, 0.07)
    ]
    return 2 * np.sum(voices, axis=0) / len(voices)


def bass(hz: float, seconds: float, rate: int, bright: float = 0.3) -> Signal:
    """Electric bass: a few overtones that die away faster than the fundamental."""
    times = clock(seconds, rate)
    turn = np.exp((2j * np.pi * hz - 1) * times)
    overtone, sound = turn * np.exp(-times), np.zeros(len(times))
    for order in range(6):
        sound += bright**order * overtone.imag
        overtone *= turn
    return release(sound * np.minimum(1, times / 0.004), rate, 0.02)


def noise(seconds: float, rng: np.random.Generator, rate: int, curve: Curve, fall: float) -> Signal:
    """Coloured noise that dies away (to 1/e in ``fall`` seconds), peak 1: cymbals, shakers, breath, claps."""
    sound = equalise(rng.standard_normal(round(seconds * rate)), rate, curve)
    sound *= np.exp(-clock(seconds, rate) / fall)
    return release(sound / np.abs(sound).max(), rate)


def drum(seconds: float, rate: int, start_hz: float, end_hz: float, fall: float) -> Signal:
    """Drum skin: a sine that falls in pitch within some 30 ms and dies away."""
    times, glide = clock(seconds, rate), 0.03
    cycles = end_hz * times + (start_hz - end_hz) * glide * (1 - np.exp(-times / glide))
    return release(np.sin(2 * np.pi * cycles) * np.exp(-times / fall), rate)


def kick(rng: np.random.Generator, rate: int, click: float = 0.3, fall: float = 0.12, hz: float = 50) -> Signal:
    """Bass drum; ``click`` is how much of the beater is heard, as in metal."""
    sound = drum(4 * fall, rate, 3.5 * hz, hz, fall)
    place(sound, noise(0.03, rng, rate, [(1000, -40), (3000, 0), (6000, 0), (9000, -20)], 0.006), 0, rate, click)
    return sound


def snare(rng: np.random.Generator, rate: int, hz: float = 190, fall: float = 0.09) -> Signal:
    """Snare drum: a skin and the rattle under it."""
    sound = 0.5 * drum(5 * fall, rate, 1.6 * hz, hz, 0.6 * fall)
    place(sound, noise(5 * fall, rng, rate, [(200, -18), (900, 0), (5000, -3), (11000, -15)], fall), 0, rate, 0.7)
    return sound


def hat(rng: np.random.Generator, rate: int, fall: float = 0.03) -> Signal:
    """Hi-hat: closed at 0.03 s, open at 0.2 s, a crash cymbal at 0.7 s."""
    return noise(5 * fall, rng, rate, [(700, -40), (2500, -9), (5500, 0), (8000, -4), (11000, -20)], fall)


# ---------------------------------------------------------------- the song: E minor, 160 beats a minute, 20 bars

TEMPO = 160  # beats a minute: 20 bars of 4/4 last 30 s
STEP = 60 / TEMPO / 4  # seconds in a sixteenth, of which a bar has 16
LOW_E = 40  # MIDI note of the lowest string

# A bar of guitar: semitones above the low E, one sign a sixteenth. ' lets the chord ring, without it the palm mutes
# the strings; . holds the chord before; - is silence.
INTRO = ["0' . . . . . . . 3' . . . 1' . . .", "0' . . . . . 6' . . . 5' . 3' . . ."]
VERSE = [
    "0 . 0 0 0 . 0 0 3' . 0 0 1' . 0 0",
    "0 . 0 0 0 . 0 0 6' . 5' . 3' . 1' .",
    "0 . 0 0 0 . 0 0 3' . 0 0 5' . 0 0",
    "0 0 0 0 0 . 0 0 7' . 6' . 3' . 1' .",
]
CHORUS = ["0' . . . . . 0 0 0' . . . 0 0 0 0", "8' . . . . . 8 8 8' . . . 8 8 8 8"]
CHORUS += ["3' . . . . . 3 3 3' . . . 3 3 3 3", "10' . . . . . 10 10 11' . . . 11 11 11 11"]
BREAK = ["0 0 - 0 - 0 0 - 1' . . . - - 0 0", "0 0 - 0 - 0 0 - 6' . . 5' . . 1' ."]
END = ["0 . 0 0 1' . 0 0 3' . 0 0 1' . 0 0", "0' . . . . . . . . . . . . . . ."]
SONG = [*INTRO, *VERSE, *CHORUS, *BREAK, *VERSE[2:], *CHORUS, *END]
LEAD_BARS = (*range(6, 10), *range(14, 18))  # the choruses
SLOW_BARS = (0, 1, 10, 11)  # drums at half speed
CRASH_BARS = (0, 1, 2, 6, 8, 10, 12, 14, 16, 18, 19)
FILL_BARS = (5, 9, 13, 17)  # the drummer rolls through the last beat
MINOR = [0, 2, 3, 5, 7, 8, 10]


def strokes(bars: Sequence[str]) -> Iterator[tuple[int, int, int, bool]]:
    """Each chord of the written bars as (first step, steps held, semitones above the low E, muted)."""
    signs = [sign for bar in bars for sign in bar.split()]
    for step, sign in enumerate(signs):
        if sign not in ".-":
            held = next((i for i, later in enumerate(signs[step + 1 :], 1) if later != "."), len(signs) - step)
            yield step, held, int(sign.rstrip("'")), not sign.endswith("'")


def play_guitar(track: Signal, rng: np.random.Generator) -> None:
    """Power chords (root, fifth, octave) through an amplifier and its loudspeaker, added to ``track``."""
    strings = np.zeros_like(track)
    for step, held, offset, muted in strokes(SONG):
        bright, ring = (0.4, 0.6) if muted else (0.7, 5.0)
        for interval, level in ((0, 1.0), (7, 0.8), (12, 0.6)):
            hz = hertz(LOW_E + offset + interval + rng.normal(0, 0.06))
            string = pluck(hz, held * STEP, rng, STUDIO_RATE, bright, ring)
            start = step * STEP + abs(rng.normal(0, 0.003)) + 0.002 * interval / 7  # the pick crosses the strings
            place(strings, string, start, STUDIO_RATE, level * rng.uniform(0.85, 1))
    strings = equalise(strings, STUDIO_RATE, [(60, -18), (110, -3), (700, 3), (1500, 9), (4000, 3), (9000, -12)])
    cabinet = [
        (50, -40),
        (80, 0),
        (150, 6),
        (400, 6),
        (800, 1),
        (1300, -5),
        (2200, -4),
        (4500, 2),
        (7000, -4),
        (11000, -40),
    ]
    track += 0.13 * room(equalise(distort(strings, 9), STUDIO_RATE, cabinet), STUDIO_RATE, rng, 0.4, 0.3)


def play_lead(track: Signal, rng: np.random.Generator) -> None:
    """A melody of sixteenths that wanders over the minor scale and starts each bar on the chord, added to ``track``."""
    strings = np.zeros_like(track)
    for bar in LEAD_BARS:
        root = int(SONG[bar].split()[0].rstrip("'"))
        degree = 7 + min(range(7), key=lambda i: abs(MINOR[i] - root % 12))
        for step in range(0, 16, 2):
            if step:
                degree = int(np.clip(degree + rng.choice([-2, -1, 1, 1, 2]), 4, 16))
            note = LOW_E + 24 + 12 * (degree // 7) + MINOR[degree % 7]
            for repeat in range(2):
                string = pluck(hertz(note), STEP, rng, STUDIO_RATE, 0.8, 2.0)
                place(strings, string, (16 * bar + step + repeat) * STEP, STUDIO_RATE)
    sound = equalise(distort(strings, 6), STUDIO_RATE, [(150, -20), (500, 0), (3000, 3), (6000, -9), (11000, -40)])
    track += 0.09 * room(sound, STUDIO_RATE, rng, 0.8, 0.4)


def play_bass(track: Signal) -> None:
    """The root of each chord an octave below the guitar, added to ``track``."""
    strings = np.zeros_like(track)
    for step, held, offset, muted in strokes(SONG):
        sound = bass(hertz(LOW_E - 12 + offset), min(held, 2 if muted else 16) * STEP, STUDIO_RATE, 0.7)
        place(strings, sound, step * STEP, STUDIO_RATE)
    track += 0.12 * equalise(distort(strings, 3), STUDIO_RATE, [(40, 0), (500, 0), (2000, -12), (6000, -30)])


def play_drums(track: Signal, rng: np.random.Generator) -> None:
    """Bass drums that follow the riff, backbeat, cymbals and rolls, added to ``track``."""
    kicks, hats = kick(rng, STUDIO_RATE, 0.8, 0.06, 60), hat(rng, STUDIO_RATE, 0.04)
    snares, crash = snare(rng, STUDIO_RATE), hat(rng, STUDIO_RATE, 0.7)
    kit = np.zeros_like(track)

    def hit(sound: Signal, step: float, gain: float) -> None:
        late = rng.normal(0, 0.002)
        place(kit, sound, step * STEP + late, STUDIO_RATE, gain * rng.uniform(0.85, 1))

    riff_steps = {step for step, *_ in strokes(SONG)}
    for bar in range(len(SONG) - 1):
        fast, chorus = bar not in SLOW_BARS, bar in LEAD_BARS
        for step in range(16):
            now = 16 * bar + step
            rolling = bar in FILL_BARS and step >= 12
            if rolling:
                hit(drum(0.3, STUDIO_RATE, 240 - 25 * (step - 12), 140 - 20 * (step - 12), 0.1), now, 0.5)
                hit(snares, now, 0.35)
            if (chorus and step % 2 == 0) or (not chorus and now in riff_steps):
                hit(kicks, now, 0.45)
            if (step in (4, 12) if fast else step == 8) and not rolling:
                hit(snares, now, 0.75)
            if step % (2 if fast else 4) == 0:
                hit(hats, now, 0.2)
    hit(kicks, 16 * (len(SONG) - 1), 0.4)
    for bar in CRASH_BARS:
        hit(crash, 16 * bar, 0.32)
    track += room(kit, STUDIO_RATE, rng, 0.25, 0.25)


def render_song(seed: int = 0) -> Signal:
    """The whole song, 30 s at ``RATE``; the same seed gives the same samples."""
    rng = np.random.default_rng(seed)
    track = np.zeros(round(len(SONG) * 16 * STEP * STUDIO_RATE))
    for _ in range(2):  # two takes of the rhythm guitar, never quite together, sound like a wall
        play_guitar(track, rng)
    play_lead(track, rng)
    play_bass(track)
    play_drums(track, rng)
    mix = halve_rate(release(np.tanh(track), STUDIO_RATE, 1.0))
    mix = equalise(mix, RATE, [(9_700, 0), (10_400, -60)])  # the edge that recordings at this rate have
    return PEAK * mix / np.abs(mix).max()


def write_audio(path: Path, signal: Signal, rate: int = RATE) -> None:
    """Write ``signal`` whole or not at all, in the format of the suffix. Raises UserError if that can't be done."""
    import soundfile

    kind = path.suffix[1:].upper()
    if kind not in ("OGG", "WAV", "FLAC"):
        raise UserError(f"can't write {path}: give the file the suffix .ogg, .wav or .flac")
    try:
        with whole_file(path) as temporary, soundfile.SoundFile(temporary, "w", rate, 1, format=kind) as file:
            for start in range(0, len(signal), rate):  # some libsndfile versions crash on one long Vorbis block
                file.write(signal[start : start + rate])
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"can't write {path} ({error}): choose another place with --out") from None


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--seed")
    parser.add_argument(
        "--out", type=path_name, default=Path("examples/demo_song.ogg"), metavar="FILE", help="audio file"
    )
    arguments = parser.parse_args(argv)
    write_audio(arguments.out, render_song(arguments.seed))
    complain(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
