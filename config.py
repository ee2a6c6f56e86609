"""Every setting of Stem Genre: edit here, or set some for one run on the command line.

    python train.py IMG_SIZE=300 BATCH_SIZE=8
    python train.py recipes/quick.py LR=1e-4

Only literals: this file is read, not run. `python train.py --help` and docs/settings.md list it.
"""

# Files
DATA_DIR = "data"  # folder with the competition's files
OUTPUT_DIR = "."  # folder for submit.csv, the models and the logs
CHECKPOINT_FILE = "checkpoint.pth"  # below OUTPUT_DIR: the whole state of a run, to resume from
BEST_MODEL_FILE = "best_model.pth"  # below OUTPUT_DIR: the best epoch, all that predict.py needs
SUBMIT_FILE = "submit.csv"  # below OUTPUT_DIR: predicted genres in the form of sample_submit
LOG_FILE = "train_log.txt"  # below OUTPUT_DIR: the console output, with times
EDA_DIR = "eda"  # folder for eda.py's page and tables; 0.3 MB a clip to find duplicates

# Data
NUM_CLASSES = 10  # genres in label_master; "auto" counts them
TEST_SIZE = 0.1  # fraction of the training clips held out for validation, stratified by genre
FOLDS = 1  # 5: cross-validation, a network for each fold, averaged; 1: a single hold-out, TEST_SIZE
SEEDS = 1  # networks trained for each fold, with SEED, SEED + 1, ..., and averaged
SPLIT_BY_GROUP = False  # True keeps clips of one recording, by EDA_DIR/groups.csv, on one side
EXTRA_DATA = None  # more labelled clips to train on only: a folder like DATA_DIR, or several
PSEUDO_LABELS = None  # a run's test_probabilities.csv: its confident test clips are trained on, too
PSEUDO_CONFIDENCE = 0.9  # the least top-1 probability of those clips

# Separation (Demucs), done once per clip and cached
SEPARATION_MODEL = "htdemucs"  # a four-stem model's name on the Demucs hub or in SEPARATION_REPO
SEPARATION_REPO = None  # local folder with that model (NAME.yaml and its weights), for offline use
SEPARATION_CACHE_DIR = "separated"  # below DATA_DIR, or an existing folder; 5.3 MB a 30 s clip
SEPARATION_OVERLAP = 0.21  # of a 7.8 s window: five windows for clips up to 30.8 s (0.25: six)
SEPARATION_BATCH = "auto"  # clips through Demucs at once; "auto": from free GPU memory, 1 on a CPU

# Image
SR = 22050  # Hz, of the stems: the competition's own rate
CLIP_SECONDS = 30.0  # s that the network sees at once: longer clips give several windows
N_FFT = 2048  # samples, 93 ms: separates semitones from 180 Hz up
HOP_LENGTH = 512  # samples, 23 ms: four frames per sixteenth note at 160 bpm
N_MELS = 128  # mel bands from 0 Hz to SR / 2
TOP_DB = 80.0  # dB, floor below the reference
CHANNELS = "vocals,drums,bass,other"  # of the image: stems and "mix"; "mix" alone needs no Demucs
DB_REFERENCE = "clip"  # 0 dB is the loudest cell of all CHANNELS; "stem": of each channel
NUM_CHANNELS = "auto"  # of the image: as many as CHANNELS; a larger number repeats them in turn
IMG_SIZE = 600  # pixels, a square's side or (height, width); the network's cost grows with its area

# Augmentation of training clips; each is sampled independently, the same for the four stems
AUGMENT_PROBABILITY = 0.5  # of each augmentation, per clip and epoch
AUGMENT_PITCH_SHIFT = True  # mel filters on a scaled frequency axis, no phase vocoder
AUGMENT_TIME_STRETCH = True  # a longer or shorter STFT hop, no phase vocoder
AUGMENT_ADD_NOISE = True  # Gaussian, one wave for the mix, shared out over its stems
AUGMENT_TIME_SHIFT = True  # on the waveform, filled with zeros
AUGMENT_TIME_MASKING = True  # SpecAugment: a band of columns set to the mean
AUGMENT_FREQUENCY_MASKING = True  # SpecAugment: a band of rows set to the mean
PITCH_SHIFT_SEMITONES = 2.0  # at most, up or down; more moves a singer out of the genre's range
TIME_STRETCH_RATES = (0.8, 1.2)  # slowest and fastest tempo, 1 is the clip's own
NOISE_LEVELS_DB = (30.0, 50.0)  # dB below the clip's own level: most and least noise
TIME_SHIFT_SECONDS = 0.2  # s, at most, earlier or later
MASK_FRACTION = 0.1  # of the axis, at most, for both maskings
STEM_GAIN_DB = 0.0  # dB, each stem louder or quieter by at most this (AUGMENT_PROBABILITY too)
STEM_DROPOUT = 0.0  # probability that a stem is silent; never all of a clip's
STEM_SWAP = 0.0  # probability that a stem is replaced by another clip's of the same genre
MIXUP_ALPHA = 0.0  # pairs of images are mixed by Beta(alpha, alpha) proportions; 0: never

# Model
BACKBONE = "efficientnet_b3"  # or "cnn", or others of torchvision's, or timm's: "timm/eca_nfnet_l0"
PRETRAINED = True  # start from ImageNet weights; False trains from scratch
WEIGHTS_FILE = None  # BACKBONE's, for offline use: efficientnet_b3_rwightman-b3899882.pth
FREEZE_STAGES = 6  # first stages (of EfficientNet's 9) whose weights are not trained; 0: none
TRAIN_FIRST_CONV = False  # True trains the widened first convolution, too; costs as FREEZE_STAGES=0
FROZEN_BATCHNORM = "adapt"  # their BatchNorm statistics follow spectrograms; "fixed": ImageNet's
HEAD_DROPOUT = (0.5, 0.3)  # before each of the head's two layers; lower values overfit sooner
STOCHASTIC_DEPTH = 0.2  # probability of skipping the deepest residual block, where it has some

# Training
EPOCHS = 50  # at most
BATCH_SIZE = 24  # clips per optimiser step, over all processes together
MICRO_BATCH = "auto"  # clips per forward pass; "auto": BATCH_SIZE, halved on GPU out-of-memory
LR = 2e-4  # AdamW's learning rate at the start of the cosine schedule
MIN_LR = 1e-6  # at its end
WARMUP_EPOCHS = 0  # before the cosine schedule, in which the learning rate rises to LR
LR_DECAY_PER_STAGE = 1.0  # each stage before the head learns at this times the rate of the next one
WEIGHT_DECAY = 1e-4  # AdamW's
GRADIENT_CLIP = 1.0  # largest gradient norm
LABEL_SMOOTHING = 0.0  # of the target's probability, shared out over all genres
CLASS_WEIGHTS = False  # True weights the loss so that every genre counts the same
EMA_DECAY = 0.0  # per step, of averaged weights that are validated and kept; 0: no average
BEST_BY = "accuracy"  # the epoch that is kept, by validation "accuracy" or "loss"; or the "last"
PATIENCE = 10  # epochs without a better accuracy (BEST_BY="loss": loss); "last" never stops early
COMPILE = False  # torch.compile the network: a minute at the start, faster epochs on some GPUs
USE_AMP = True  # bf16 or fp16 autocast on CUDA; the CPU always computes in float32

# Prediction
TTA = 0  # further views of each test clip, in other pitches and tempi, that are averaged

# Resuming a run
RESUME_FROM_CHECKPOINT = False  # True resumes from CHECKPOINT_FILE, mid-epoch too
LOAD_OPTIMIZER_STATE = True  # False restarts AdamW's moments
LOAD_SCHEDULER_STATE = True  # False restarts the cosine schedule from LR over the remaining epochs
CHECKPOINT_MINUTES = 10.0  # minutes of work lost at most when the machine is taken away

# Tracking
TRACKER = None  # "tensorboard", "wandb" or "tensorboard,wandb": optional packages, see README.md
LOG_EVERY_STEPS = 0  # steps from one row of metrics_steps.csv, and of TRACKER, to the next; 0: none

# Machine
SEED = 42  # of all randomness: split, order, augmentation, new weights, dropout
DEVICE = "auto"  # cuda, cuda:1, mps or cpu; "auto" takes the best available
DEVICE_CACHE = 0.4  # fraction of free GPU memory that may keep stems from epoch to epoch
NUM_THREADS = "auto"  # threads that decode audio and read stems; "auto": one per core, at most 8
