"""Windows: the sections of a clip that the network sees at once, CLIP_SECONDS long each.

A clip that is at most a TAIL longer is one window, its beginning. A longer one gives a random
window per epoch in training (random_window), and overlapping windows, whose probabilities are
averaged, wherever it is predicted (WindowCutter).
"""

import torch

from stemgenre.runtime import derive_seed

TAIL = 0.1  # of a window: so much at the end of a clip may be left out
OVERLAP, TTA_OVERLAP = 2, 4  # windows that show each sample, without and with TTA


def random_window(
    length: int, window: int, *, needed: int, seed: int, epoch: int, clip_index: int
) -> tuple[int, int]:
    """(start, stop) in samples of a training clip's window, within a clip of `length` samples.

    `window` is CLIP_SECONDS in samples; `needed` is what an image takes at the augmented tempo. A
    pure function of (seed, epoch, clip_index).
    """
    if length <= (1 + TAIL) * window:
        return 0, min(length, needed)
    position = derive_seed(seed, epoch, clip_index, 7) / 2**63  # from 0 to 1
    start = int(position * (max(0, length - needed) + 1))
    return start, min(length, start + needed)


class WindowCutter:
    """Cuts stems that come block by block into overlapping windows of `samples`.

    A file that is shorter gives one window as short as it is. The last window of a longer one ends
    with the file, unless all but a TAIL of a window is covered already.
    """

    def __init__(self, samples: int, *, overlap: int = OVERLAP) -> None:
        self.samples, self.step = samples, max(1, samples // overlap)
        self.buffer: torch.Tensor | None = None
        self.origin = self.next = 0  # of the buffer; of the next window

    def add(self, stems: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """The windows [(first sample, stems)] that are whole with these further stems (C, n)."""
        self.buffer = stems if self.buffer is None else torch.cat([self.buffer, stems], dim=1)
        windows = []
        while self.origin + self.buffer.shape[1] >= self.next + self.samples:
            windows.append(self._window(self.next))
            self.next += self.step
        keep = max(0, self.next - self.step - self.origin)  # the last window may begin there
        self.buffer, self.origin = self.buffer[:, keep:], self.origin + keep
        return windows

    def finish(self) -> list[tuple[int, torch.Tensor]]:
        """The window that is left at the end of the file, if any, as a list."""
        end = self.origin + self.buffer.shape[1]
        if self.next == 0:
            return [self._window(0)]
        uncovered = end - (self.next - self.step + self.samples)
        return [self._window(end - self.samples)] if uncovered > TAIL * self.samples else []

    def _window(self, start):
        begin = start - self.origin
        return start, self.buffer[:, begin : begin + self.samples]
