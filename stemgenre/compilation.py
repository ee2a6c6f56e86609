"""torch.compile, where the run's own times say that it pays."""

import logging

import torch

from stemgenre.errors import first_line

log = logging.getLogger(__name__)

WORTH_SECONDS = 600.0  # of training left, so that a tenth gained pays for a minute of compiling
WORTH_GAIN = 0.97  # of the time an epoch took as it is


class Compilation:
    """A network to be called, as it is or compiled: as COMPILE says, `choice`.

    "auto" tries it on a CUDA card in a run that is long enough to gain by it: two epochs as it is,
    the first of which warms up, two compiled, then on in the way that was faster. A network that
    cannot be compiled here goes on as it is.
    """

    def __init__(self, network, choice, device):
        self.network = network
        self.called = torch.compile(network) if choice is True else network
        self.trying = choice == "auto" and device.type == "cuda"
        self.seconds = []  # of each epoch of the trial

    def __call__(self, images):
        if self.called is self.network:
            return self.network(images)
        try:
            return self.called(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning(
                "COMPILE: the network cannot be compiled here (%s); it goes on as it is",
                first_line(error),
            )
            self.called, self.trying = self.network, False
            return self.network(images)

    def after_epoch(self, seconds, *, left):
        """Goes on with the trial: the last epoch took so many seconds, `left` are to come."""
        if not self.trying:
            return
        self.seconds.append(seconds)
        if len(self.seconds) == 2:
            self.trying = seconds * left > WORTH_SECONDS
            self.called = torch.compile(self.network) if self.trying else self.network
        elif len(self.seconds) == 4:
            as_it_is, compiled = self.seconds[1], self.seconds[3]
            self.trying = False
            if compiled > WORTH_GAIN * as_it_is:
                self.called = self.network
            log.info(
                "COMPILE: an epoch takes %.1f s as it is, %.1f s compiled; on %s",
                as_it_is,
                compiled,
                "as it is" if self.called is self.network else "compiled",
            )
