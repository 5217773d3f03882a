"""autoreid: find, train and deploy re-identification networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoreid.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from autoreid.heads import ReIDNet

__all__ = ["__version__", "load"]


def load(path: str | Path) -> ReIDNet:
    """The trained network in a ``.safetensors`` file that ``autoreid retrain`` wrote, in eval mode.

    The file alone is enough: it says how the network is built. ``net(images: B x 3 x H x W) -> B x dims``; the images
    are normalised as ``autoreid.loading.normalise`` does it. Raises :class:`autoreid.errors.UserError`.
    """
    from autoreid.network import load_weights  # imports torch, which `autoreid --help` must not

    return load_weights(path)[0]
