"""The models that a run downloads, fetched before: for machines without a network."""

import logging
from pathlib import Path

from stemgenre.separation.demucs_model import load_demucs, model_files
from stemgenre.settings import Settings
from stemgenre.training.backbones import build_backbone, weights_path

log = logging.getLogger(__name__)


def download_models(settings: Settings) -> list[Path]:
    """The paths of the two models that a run with these settings needs; each is named in the log.

    They are downloaded if they are not there, and loaded once, so that a damaged file is found now.
    Raises UserError if one cannot be loaded, as a run does.
    """
    separation, model = settings.separation, settings.model
    paths = []
    if settings.features.channels == "mix":
        log.info("CHANNELS=mix needs no Demucs model")
    else:
        name, repo = separation.separation_model, separation.separation_repo
        load_demucs(name, repo)
        files = model_files(name, repo)
        log.info("Demucs model %s: %s", name, ", ".join(map(str, files)))
        paths += files
    if not model.pretrained:
        log.info("PRETRAINED=False needs no ImageNet weights")
    else:
        build_backbone(
            model.backbone,
            in_channels=len(settings.features.channel_names),
            stochastic_depth=model.stochastic_depth,
            pretrained=True,
            weights_file=model.weights_file,
        )
        path = weights_path(model.backbone, model.weights_file)
        log.info("ImageNet weights of %s: %s", model.backbone, path)
        paths.append(path)
    return paths
