"""HTDemucs in miniature, and as a local repository."""

import json

import torch
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

TINY_DEMUCS = {  # HTDemucs with 0.3 M weights: the real architecture in miniature
    "sources": ["drums", "bass", "other", "vocals"],
    "channels": 8,
    "depth": 4,
    "t_layers": 1,
    "t_heads": 4,
    "bottom_channels": 32,
    "segment": 2,
    "dconv_mode": 0,  # without the residual branches, which take half of the time
}


def put_repo(folder, **changes):
    """The repository of a tiny HTDemucs with other arguments and random weights."""
    torch.manual_seed(0)
    kind = TINY_DEMUCS | changes
    state = {name: tensor.contiguous() for name, tensor in HTDemucs(**kind).state_dict().items()}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(kind)}
    save_file(state, folder / "0123abcd.safetensors", metadata=meta)
    (folder / "htdemucs.yaml").write_text("models: ['0123abcd']\n")
    return folder
