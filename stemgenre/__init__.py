"""Music genre classification from separated stems.

from stemgenre import Classifier
print(Classifier.load("best_model.pth").predict("song.mp3").genre)
"""

__all__ = ["Classifier", "Prediction", "Span"]


def __getattr__(name):
    """What a program needs to predict, imported when it is asked for and not before."""
    if name in __all__:
        from stemgenre import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'stemgenre' has no attribute {name!r}")
