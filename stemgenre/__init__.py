"""Music genre classification from separated stems.

A clip passes through five stages, in this order:

1  files to a table of clips    stemgenre.data
2  clips to stems               stemgenre.separation
3  stems to images              stemgenre.features
4  images to a network          stemgenre.training
5  network to submit.csv        stemgenre.submission

They stand on settings, setting_checks, cli, runtime, status, files, prefetch and errors. predict,
eda, report, tracking, downloads, html, demo and app each serve one script or page. In a program of
your own:

from stemgenre import Classifier
print(Classifier.load("best_model.pth").predict("song.mp3").genre)
"""

__all__ = ["Classifier", "Prediction", "Segment"]


def __getattr__(name):
    """What a program needs to predict, imported when it is asked for and not before."""
    if name in __all__:
        from stemgenre.predict import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'stemgenre' has no attribute {name!r}")
