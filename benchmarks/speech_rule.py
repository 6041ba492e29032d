"""Fit the rule by which the detector tells speech from music, and measure how often it errs.

The rule is a logistic regression on the six descriptors of detector_unlike.py. Music are the training and validation
songs; speech is made here by espeak-ng (Debian's package of that name): 37 voices in ten languages, 110 to 240 words a
minute, each talk also with noise behind it and in a room with echo. Recordings of real people are measured only.
Errors on music and on made-up speech are those of songs and talks left out of the fit (five folds).

Reads   data/metadata.json, data/processed/; with --recordings a folder of speech, one file a talk, at any depth
Writes  nothing; prints WEIGHTS and OFFSET for detector_unlike.py, and tables

Example
    python benchmarks/speech_rule.py --recordings talks/
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from catalogue import read_catalogue  # noqa: E402
from common import UserError, argument_parser, command, format_table, path_name  # noqa: E402
from decoding import SAMPLE_RATE, SoundReader, decode  # noqa: E402
from detector_inputs import find_songs  # noqa: E402
from detector_unlike import LEAST_FRAMES, OFFSET, WEIGHTS, song_descriptors, trimmed  # noqa: E402
from extract_features import load_features, song_features  # noqa: E402

PARTS = {"whole": (0, 1.0), "10 s": (430, 1.0), "3 s": (129, 0.5)}  # frames, and weight in the fit
MARGIN = 0.5  # taken off the score: music that is called speech is the worse error
SPEEDS = (110, 140, 160, 175, 200, 240)  # words a minute
ENGLISH = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en+m3", "en+m7", "en+f2", "en+f4", "en+croak", "en+whisper")
VARIANTS = ("", "+f3", "+m4")
TALKS = {
    "en": (
        "The harbour was quiet when the first boats came in. A woman in a yellow coat counted the crates, wrote a "
        "number on a slip of paper, and handed it to the boy beside her. Nobody spoke about the storm. Later, over "
        "coffee, they would say that the roof had held, and that next year somebody ought to look at the gutters.",
        "Welcome to this week's programme. Today we are going to talk about soil: how it forms, why it matters, and "
        "what each of us can do to keep it alive. My guest has studied earthworms for twenty years. Good morning, and "
        "thank you for coming. Let us begin with a simple question. What do worms actually eat?",
        "I don't know. Maybe. He said he would come at six, but it's already half past seven, and the train was on "
        "time. Should we wait? No, wait, there he is! Look, by the gate, with the big red bag. Well, finally.",
    ),
    "de": (
        "Am Morgen stand der Bus noch vor dem Haus. Der Fahrer las die Zeitung und wartete auf die letzten Gäste. "
        "Niemand hatte es eilig, denn die Straße war ohnehin gesperrt. Erst gegen Mittag fuhren wir los.",
    ),
    "fr": (
        "Le matin, la rue est encore calme. Une vieille dame ouvre ses volets et arrose les fleurs de son balcon. "
        "Plus bas, le boulanger sort les premiers pains du four. On entend la radio, un chien qui aboie.",
    ),
    "es": (
        "El tren salió con veinte minutos de retraso. En el vagón había una familia con tres niños, un músico sin "
        "guitarra y una señora que hablaba por teléfono. Nadie miraba por la ventana.",
    ),
    "it": (
        "La finestra della cucina dava sul cortile. Ogni sera la signora del terzo piano chiamava il gatto, che non "
        "tornava mai prima delle nove. Mio nonno diceva che il gatto era più saggio di tutti noi.",
    ),
    "pl": (
        "Rano padał deszcz, ale po południu wyszło słońce. Dzieci poszły do parku, a my zostaliśmy w domu i czekaliśmy "
        "na telefon od babci.",
    ),
    "sv": (
        "Det var en gång en liten stuga vid sjön. Där bodde en fiskare som aldrig fick någon fisk. Varje kväll satt "
        "han på bryggan och räknade stjärnorna.",
    ),
    "pt": (
        "Na segunda-feira o mercado abriu mais cedo. Os vendedores gritavam os preços das laranjas e do peixe, e "
        "ninguém reparou no homem que procurava o seu chapéu.",
    ),
    "nl": (
        "Op zondag fietsten we langs de rivier. Het waaide hard en mijn zus wilde terug, maar bij de brug stond een "
        "kraam met warme wafels. Daarna hoorden we haar niet meer klagen.",
    ),
    "fi": (
        "Aamulla satoi lunta ja tie oli valkoinen. Lapset juoksivat ulos ja rakensivat suuren lumiukon pihan keskelle.",
    ),
}


def spoken(text: str, voice: str, speed: int) -> np.ndarray:
    """What espeak-ng makes of a text, float32 (samples,) at 22,050 Hz. Raises UserError where it isn't installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise UserError("espeak-ng is not installed: apt-get install espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "talk.wav")
        if subprocess.run([program, "-v", voice, "-s", str(speed), "-w", path, text], stderr=sys.stderr).returncode:
            raise UserError(f"espeak-ng can't speak as {voice}: see its message above")
        return decode(path).samples


def talks() -> Iterator[np.ndarray]:
    """Made-up speech: each talk dry, with noise, and in a room."""
    from scipy.signal import fftconvolve

    rng = np.random.default_rng(0)
    for language, texts in TALKS.items():
        for voice in ENGLISH if language == "en" else [language + variant for variant in VARIANTS]:
            for text in texts:
                dry = spoken(text, voice, int(rng.choice(SPEEDS)))
                yield dry
                noise = np.fft.rfft(rng.standard_normal(len(dry)))
                noise = np.fft.irfft(noise / np.sqrt(np.arange(len(noise)) + 1), len(dry))  # pink
                yield dry + noise / noise.std() * dry.std() * 10 ** (-rng.uniform(15, 30) / 20)
                times = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
                echo = rng.standard_normal(len(times)) * 10 ** (-3 * times / rng.uniform(0.25, 0.5))
                echo *= 0.25 / np.sqrt(np.square(echo).sum())
                echo[0] = 1
                yield fftconvolve(dry, echo)[: len(dry)]


def parts(log_mel: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Descriptors of a song and of up to three parts of each length, with the name of the length."""
    for name, (frames, _) in PARTS.items():
        surplus = log_mel.shape[1] - frames
        for start in range(0, surplus + 1, max(frames, surplus // 2 + 1)) if frames else [0]:
            piece = log_mel[:, start : start + frames].astype(np.float32) if frames else log_mel
            sound = trimmed(piece - piece.mean(axis=1, keepdims=True))
            if sound.shape[1] >= LEAST_FRAMES:
                yield name, song_descriptors(sound)


@dataclass(frozen=True)
class Rows:
    """A row a song or part of one."""

    kinds: np.ndarray  # genre or speaker (rows,)
    lengths: np.ndarray  # names of PARTS (rows,)
    songs: np.ndarray  # int64 (rows,): which song it is of
    descriptors: np.ndarray  # float64 (rows, 6)

    def __getitem__(self, chosen: np.ndarray) -> Rows:
        return Rows(self.kinds[chosen], self.lengths[chosen], self.songs[chosen], self.descriptors[chosen])

    @property
    def weights(self) -> np.ndarray:
        """Those of the fit: the same sum for each length, whatever number of parts it has."""
        return sum(
            weight * (self.lengths == name) / (self.lengths == name).sum() for name, (_, weight) in PARTS.items()
        )


def measured(songs: Iterable[tuple[str, np.ndarray]]) -> Rows:
    """The descriptors of songs, given as kind and log-mel."""
    rows = [(kind, length, n, row) for n, (kind, log_mel) in enumerate(songs) for length, row in parts(log_mel)]
    return Rows(*(np.array(column) for column in zip(*rows, strict=True)))


def fit(music: Rows, speech: Rows) -> tuple[np.ndarray, float]:
    """Weights of the descriptors and what is added to their sum."""
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate([music.descriptors, speech.descriptors])
    labels = np.repeat([0, 1], [len(music.kinds), len(speech.kinds)])
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    weights = 1000 * np.concatenate([music.weights, speech.weights])
    model = LogisticRegression(max_iter=1000).fit((rows - mean) / spread, labels, sample_weight=weights)
    found = model.coef_[0] / spread
    return found, float(model.intercept_[0] - mean @ found - MARGIN)


def left_out(music: Rows, speech: Rows) -> list[np.ndarray]:
    """Scores of both, each from a fit without the fifth of songs and talks that it belongs to."""
    rng = np.random.default_rng(0)
    folds = [
        rng.integers(0, 5, rows.songs.max() + 1)[rows.songs // together] for rows, together in ((music, 1), (speech, 3))
    ]
    scores = [np.zeros(len(rows.kinds)) for rows in (music, speech)]
    for fold in range(5):
        coefficients, offset = fit(
            *(rows[fold_of != fold] for rows, fold_of in zip((music, speech), folds, strict=True))
        )
        for score, rows, fold_of in zip(scores, (music, speech), folds, strict=True):
            score[fold_of == fold] = rows.descriptors[fold_of == fold] @ coefficients + offset
    return scores


def errors(rows: Rows, wrong: np.ndarray, total: str) -> list[tuple[str, ...]]:
    """A row a kind of song, and one of all: errors at each length."""
    table = []
    for kind in (*dict.fromkeys(rows.kinds), total):
        own = (rows.kinds == kind) | (kind == total)
        cells = [wrong[own & (rows.lengths == length)] for length in PARTS]
        table.append((kind, *(f"{cell.sum()} of {len(cell)}" for cell in cells)))
    return table


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data")
    parser.add_argument("--recordings", type=path_name, metavar="DIR", help="speech to measure on, a folder a speaker")
    args = parser.parse_args(argv)
    catalogue = read_catalogue(args.data)
    tracks = catalogue.splits["train"] + catalogue.splits["val"]
    log_mels = load_features(catalogue, "melspectrogram", tracks)
    music = measured(zip((catalogue.songs[track].genre for track in tracks), log_mels, strict=True))
    made = (song_features([talk.astype(np.float32)])["melspectrogram"] for talk in talks())
    speech = measured(("made-up speech", log_mel) for log_mel in made)
    coefficients, offset = fit(music, speech)
    print(f"WEIGHTS = ({', '.join(f'{value:.2f}' for value in coefficients)})\nOFFSET = {offset:.2f}\n")
    scores = left_out(music, speech)
    table = errors(music, scores[0] > 0, "all music") + errors(speech, scores[1] <= 0, "")[:1]
    if args.recordings:
        paths = [Path(path) for path, problem in find_songs([str(args.recordings)]) if problem is None]
        recorded = measured((path.parent.name, song_features(SoundReader(path))["melspectrogram"]) for path in paths)
        table += errors(recorded, recorded.descriptors @ WEIGHTS + OFFSET <= 0, "all recordings")
    print(format_table(("errors", *PARTS), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
