"""The result for a file: Prediction, and its Segments over time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """The prediction from `start` to `end`, in seconds; probabilities as in Prediction."""

    start: float
    end: float
    genre: str
    confidence: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """The top-1 genre of a file, its probability, and {genre: probability} of all genres.

    `timeline` has a Segment for each window; windows of silence are left out unless there are no
    others.
    """

    genre: str
    confidence: float
    probabilities: dict[str, float]
    timeline: list[Segment]

    def top_k(self, count: int | None = None) -> list[tuple[str, float]]:
        """[(genre, probability)] of the `count` most probable genres, in order; None: of all."""
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])
        return ranked[:count]
