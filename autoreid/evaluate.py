"""From a network and samples to metrics: extract features, rank, score; and a retrieval task out of training people.

Query and gallery speak once, at the end. Whatever is chosen on the way (a recipe, an epoch, a genotype) is chosen on
``held_out_split`` of training identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from autoreid.data import Sample
from autoreid.errors import UserError
from autoreid.loading import enlarged, load_images, normalise
from autoreid.metrics import Protocol, RetrievalMetrics, retrieval_metrics
from autoreid.recipe import require_views


def extract(
    net: nn.Module,
    samples: Sequence[Sample],
    size: tuple[int, int],
    device: str | torch.device = "cpu",
    batch: int = 128,
    views: int = 1,
) -> Tensor:
    """Features N x D float32 on the CPU: the mean over a picture's ``views``.

    1: the picture; 2: and its mirror image; 10: the four corners and the middle of the picture an eighth larger, and
    their mirror images (DaRe, Wang et al. 2018, section 4).

    The network works in eval mode and keeps the mode it had, module by module. size = (H, W).
    """
    if not samples:
        raise UserError("there are no images to extract features from; check the dataset with `autoreid data NAME`")
    require_views(views)
    read = enlarged(size, 1.125) if views == 10 else size
    modes = [(module, module.training) for module in net.modules()]
    groups = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    features = []
    try:
        net.eval()
        with torch.inference_mode(), ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(load_images, groups[0], read)
            for following in [*groups[1:], None]:
                images = normalise(coming.result().to(device))
                if following is not None:  # decode it while the network is busy with this one
                    coming = ahead.submit(load_images, following, read)
                crops = v2.functional.five_crop(images, list(size)) if views == 10 else [images]
                shown = [*crops, *(crop.flip(3) for crop in crops)] if views > 1 else crops
                features.append((sum(net(view).float() for view in shown) / len(shown)).cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    # Leaves inference mode, so that a caller may use the features in a computation with gradients.
    return torch.cat(features).clone()


def evaluate(
    net: nn.Module,
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    size: tuple[int, int],
    protocol: str | Protocol = "market1501",
    metric: str = "euclidean",
    device: str | torch.device = "cpu",
    views: int = 1,
) -> RetrievalMetrics:
    """Metrics of the network on query against gallery; size = (H, W); ``views`` as in :func:`extract`."""
    sides = []
    for samples in (query, gallery):
        features = extract(net, samples, size, device, views=views)
        sides.append((features, [s.identity for s in samples], [s.camera for s in samples]))
    return retrieval_metrics(*sides[0], *sides[1], protocol=protocol, metric=metric)


def held_out_split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """A (query, gallery) task like the test's from training identities, each image in exactly one of the two.

    Per identity and camera the first image (by path) asks, the others answer; an identity seen by one camera only
    answers. Every query has a match from another camera: where single images leave none, an asking one answers.
    """
    cameras: dict[int, dict[int, list[Sample]]] = {}
    for sample in sorted(samples):
        cameras.setdefault(sample.identity, {}).setdefault(sample.camera, []).append(sample)
    query, gallery = [], []
    for identity in sorted(cameras):
        of_camera = cameras[identity]
        asking = {camera: images[0] for camera, images in of_camera.items()} if len(of_camera) > 1 else {}
        answering = [s for images in of_camera.values() for s in images if s != asking.get(s.camera)]
        for camera in sorted(of_camera):
            if camera in asking and all(s.camera == camera for s in answering):
                answering.append(asking.pop(max(other for other in asking if other != camera)))
        query += [asking[camera] for camera in sorted(asking)]
        gallery += answering
    return sorted(query), sorted(gallery)
