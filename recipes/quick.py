"""For a first submission within minutes on a CPU: the mix alone, without Demucs."""

CHANNELS = "mix"  # nothing is separated: separating a 30 s clip takes a CPU 20 s
IMG_SIZE = 160  # an epoch's time grows with its square: a fourteenth of that at 600
EPOCHS = 15
BATCH_SIZE = 16
PATIENCE = 5
