"""What a Classifier says of a file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """What is heard from `start` to `end`, in seconds; probabilities as in Prediction."""

    start: float
    end: float
    genre: str
    confidence: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """The genre of a file: the likeliest, its probability, and {genre: probability} of all.

    `timeline` has a Span for each window; windows of silence are left out unless there are no
    others.
    """

    genre: str
    confidence: float
    probabilities: dict[str, float]
    timeline: list[Span]

    def runners_up(self, count=None):
        """The `count` likeliest genres after the first, as [(genre, probability)]; None: all."""
        others = [item for item in self.probabilities.items() if item[0] != self.genre]
        return sorted(others, key=lambda item: -item[1])[:count]
