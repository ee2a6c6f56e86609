"""The images of an epoch: which window of a training clip it shows, augmented, computed where."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from stemgenre.features.augmentation import AugmentParams, sample_params
from stemgenre.features.log_mel import Frontend
from stemgenre.features.windows import random_window
from stemgenre.runtime import use_one_core
from stemgenre.settings import AugmentSettings
from stemgenre.training.stem_loader import StemLoader, training_batches


class EpochImages:
    """Makes the training clips' images, each a pure function of (`seed`, epoch, its clip's index).

    `clips` is a table with the columns clip and target. On a CPU the loader's threads compute the
    images while the network computes; on a GPU they only read, and compute() does.
    """

    def __init__(
        self,
        frontend: Frontend,
        loader: StemLoader,
        clips: pd.DataFrame,
        *,
        augment: AugmentSettings,
        seed: int,
        device: torch.device,
    ):
        self.frontend, self.loader, self.clips = frontend, loader, clips
        self.augment, self.seed = augment, seed
        self.on_cpu = device.type == "cpu"
        self.clip_indices = clips.index.tolist()
        # Wanted when a clip is read and again in its step, to which the host should not add.
        self._params_of = functools.lru_cache(maxsize=4096)(self._sample_params)

    def batches(
        self, batches: Sequence[np.ndarray], *, epoch: int
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """Yields (row positions, inputs of compute()) for each array of row positions."""

        def section(position, length):
            return random_window(
                length,
                self.frontend.clip_samples,
                needed=self.frontend.needed_samples(self._params_of(position, epoch)),
                seed=self.seed,
                epoch=epoch,
                clip_index=self.clip_indices[position],
            )

        def prepare(position, stems):
            if not self.on_cpu:
                return stems
            use_one_core()  # there is a thread for each
            image = self.frontend([stems], [self._params_of(position, epoch)])
            return image.to(memory_format=torch.channels_last)

        return training_batches(
            self.loader,
            self.clips,
            batches,
            section=section,
            augment=self.augment,
            seed=self.seed,
            epoch=epoch,
            prepare=prepare,
        )

    def params(self, positions: np.ndarray, *, epoch: int) -> list[AugmentParams]:
        """How the clips at these row positions are augmented in an epoch."""
        return [self._params_of(position, epoch) for position in positions]

    def compute(
        self, inputs: Sequence[torch.Tensor], params: Sequence[AugmentParams]
    ) -> torch.Tensor:
        """Images (B, C, height, width) of clips: of what batches() gave, and their params()."""
        return torch.cat(inputs) if self.on_cpu else self.frontend(inputs, params)

    def _sample_params(self, position, epoch):
        index = self.clip_indices[position]
        return sample_params(self.augment, seed=self.seed, epoch=epoch, clip_index=index)
