"""python train.py --demo: a synthesised competition, nothing to download. About two minutes."""

DATA_DIR = "data/demo"
OUTPUT_DIR = "runs/demo"
EDA_DIR = "runs/demo/eda"
SEPARATION_MODEL = "synthesised"  # not separated: the demo comes with its true stems
SR = 11025  # Hz; with short clips and small images an epoch takes seconds on a CPU
CLIP_SECONDS = 8.0
N_FFT = 1024  # samples: as many ms as config.py's at its SR
HOP_LENGTH = 256
IMG_SIZE = 64
AUGMENT_PROBABILITY = 0.15  # 29 clips per genre from scratch learn little from strong augmentation
AUGMENT_ADD_NOISE = False  # some instruments of the demo are quieter than the noise
BACKBONE = "efficientnet_b0"  # B3 with fewer layers: from scratch, it learns the demo in a third
# of B3's time (16 epochs of B3 take two minutes, to 0.93)
PRETRAINED = False  # no weights to download
FREEZE_STAGES = 0  # trained from scratch, all stages
HEAD_DROPOUT = (0.2, 0.0)  # less regularisation for few epochs
STOCHASTIC_DEPTH = 0.0
EPOCHS = 15
BATCH_SIZE = 16
LR = 2e-3  # higher than for fine-tuning
