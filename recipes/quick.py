"""For a first submission within minutes on a CPU: the mix alone, no Demucs, no download.

A small network is trained from scratch on windows of 4 seconds. Lay it over recipes/strong.py for
more: python train.py recipes/strong.py recipes/quick.py
"""

CHANNELS = "mix"  # nothing is separated: separating a 30 s clip takes a CPU 20 s
CLIP_SECONDS = 4.0  # s: a clip gives another window in each epoch, and all of them when predicted
N_MELS = 64
IMG_SIZE = (64, 173)  # the spectrogram as it is: one pixel per mel band and frame
BACKBONE = "cnn"  # 0.6 M weights; EfficientNet-B3 without its ImageNet weights needs more clips
PRETRAINED = False
FREEZE_STAGES = 0
HEAD_DROPOUT = (0.3, 0.3)
EPOCHS = 40
PATIENCE = 15
BATCH_SIZE = 16
LR = 2e-3  # for training from scratch
WEIGHT_DECAY = 0.05
