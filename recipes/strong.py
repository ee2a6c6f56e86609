"""For the score: cross-validation, two seeds, and what helps a network on few clips.

python train.py recipes/strong.py                      on a GPU, from ImageNet weights
python train.py recipes/strong.py recipes/quick.py     on a CPU, a small network from scratch
"""

FOLDS = 5
SEEDS = 2
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.99
WARMUP_EPOCHS = 3
BEST_BY = "last"
