"""Every knob of Stem Genre: edit here, or override for one run with KEY=VALUE on the command line.

    python train.py IMG_SIZE=300 BATCH_SIZE=8

Values are literals. `python train.py --help` lists them with these comments.
"""

# Where things are
DATA_DIR = "data"  # folder with the competition's files
OUTPUT_DIR = "."  # folder for submit.csv, the models and the logs
CHECKPOINT_FILE = "checkpoint.pth"  # below OUTPUT_DIR: the whole state of a run, to resume from
BEST_MODEL_FILE = (
    "best_model.pth"  # below OUTPUT_DIR: weights, labels and features of the best epoch
)
SUBMIT_FILE = "submit.csv"  # below OUTPUT_DIR: the test clips' genres in sample_submit's form
LOG_FILE = "train_log.txt"  # below OUTPUT_DIR: all that the console showed
EDA_DIR = "eda"  # folder for what eda.py writes: its page and tables; 0.3 MB a clip to find copies

# Data
NUM_CLASSES = 10  # genres in label_master; "auto" counts them
TEST_SIZE = 0.1  # share of the training clips held out for validation, stratified by genre
SPLIT_BY_GROUP = False  # True keeps clips of one recording, by EDA_DIR/groups.csv, on one side

# Separation (Demucs), done once a clip and cached
SEPARATION_MODEL = "htdemucs"  # a four-stem model's name on the Demucs hub, or in SEPARATION_REPO
SEPARATION_REPO = None  # local folder with that model (NAME.yaml and its weights), for offline use
SEPARATION_CACHE_DIR = "separated"  # below DATA_DIR unless absolute; 5.3 MB for a 30 s clip
SEPARATION_OVERLAP = 0.21  # of a 7.8 s window: five windows for clips up to 30.8 s (0.25: six)
SEPARATION_BATCH = (
    "auto"  # clips through Demucs at once; auto: from the card's free memory, 1 on CPU
)

# Image
SR = 22050  # Hz, of the stems: the competition's own rate
CLIP_SECONDS = 30.0  # s, clips are cut or padded to this
N_FFT = 2048  # samples, 93 ms: separates semitones from 180 Hz up
HOP_LENGTH = 512  # samples, 23 ms: four frames per sixteenth note at 160 bpm
N_MELS = 128  # mel bands from 0 Hz to SR / 2
TOP_DB = 80.0  # dB, floor below the reference
CHANNELS = "vocals,drums,bass,other"  # stems that are seen, in this order; "mix": only their sum
DB_REFERENCE = "clip"  # 0 dB is the loudest cell of all CHANNELS; "stem": of each by itself
NUM_CHANNELS = 4  # of the image, which repeats the CHANNELS in turn if they are fewer
IMG_SIZE = 600  # pixels, square; the network's cost grows with its square

# Augmentation of training clips; each is drawn on its own, one draw for the four stems together
AUGMENT_PROBABILITY = 0.5  # of each augmentation, per clip and epoch
AUGMENT_PITCH_SHIFT = True  # mel filters on a scaled frequency axis, no phase vocoder
AUGMENT_TIME_STRETCH = True  # a longer or shorter STFT hop, no phase vocoder
AUGMENT_ADD_NOISE = True  # Gaussian, on the waveform
AUGMENT_TIME_SHIFT = True  # on the waveform, zeros fill
AUGMENT_TIME_MASKING = True  # SpecAugment: a band of columns set to the mean
AUGMENT_FREQUENCY_MASKING = True  # SpecAugment: a band of rows set to the mean
PITCH_SHIFT_SEMITONES = (
    2.0  # up or down at most; more moves a singer out of the genre's usual range
)
TIME_STRETCH_RATES = (0.8, 1.2)  # slowest and fastest tempo, 1 is the clip's own
NOISE_SIGMAS = (0.001, 0.01)  # least and most, full scale is 1: -60 to -40 dBFS
TIME_SHIFT_SECONDS = 0.2  # s, earlier or later at most
MASK_FRACTION = 0.1  # of the axis at most, for both maskings

# Model
PRETRAINED = True  # start from ImageNet weights; False trains from scratch
WEIGHTS_FILE = None  # a local efficientnet_b3_rwightman-b3899882.pth, for offline use
FREEZE_STAGES = 6  # EfficientNet stages (of 9) whose weights stay; 0 trains everything
FROZEN_BATCHNORM = (
    "adapt"  # their BatchNorm follows the spectrograms; "fixed": stays as on ImageNet
)
HEAD_DROPOUT = (0.5, 0.3)  # before each of the head's two layers; less learns faster and by heart
STOCHASTIC_DEPTH = 0.2  # chance that the deepest residual block is skipped; 0.2 is EfficientNet's

# Training
EPOCHS = 50  # at most
BATCH_SIZE = 24  # clips per optimiser step, over all processes together
MICRO_BATCH = "auto"  # clips through the card at once; auto: the batch, halved when memory runs out
LR = 2e-4  # AdamW's, at the start of the cosine schedule
MIN_LR = 1e-6  # at its end
WEIGHT_DECAY = 1e-4  # AdamW's
GRADIENT_CLIP = 1.0  # largest gradient norm let through
PATIENCE = 10  # epochs without a better validation accuracy before stopping
COMPILE = "auto"  # torch.compile: True, False; auto tries it on CUDA if ten minutes are left
USE_AMP = True  # bf16 or fp16 autocast on CUDA; the CPU always computes in float32

# Continuing a run
RESUME_FROM_CHECKPOINT = False  # True goes on from CHECKPOINT_FILE, in the middle of an epoch too
LOAD_OPTIMIZER_STATE = True  # False restarts AdamW's moments
LOAD_SCHEDULER_STATE = True  # False restarts the cosine from LR over the epochs that are left
CHECKPOINT_MINUTES = 10.0  # minutes of work lost at most when the machine is taken away

# Machine
SEED = 42  # of everything drawn: the split, the order, the augmentation, new weights, dropout
DEVICE = "auto"  # cuda, cuda:1, mps or cpu; auto takes the best there is
DEVICE_CACHE = 0.4  # share of a card's free memory that may keep stems from epoch to epoch
NUM_WORKERS = "auto"  # threads that decode and read the cache; auto: one per core, at most 8
