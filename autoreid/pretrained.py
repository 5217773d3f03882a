"""The ImageNet start: torchvision's weights in a backbone of ours.

A family's file says which weights belong to which of its functions (``IMAGENET``). A backbone that can start so has
``from_torchvision(state)``, which gives torchvision's tensors our names and leaves its classifier out; and, where it
has parts that torchvision's network lacks, ``not_pretrained``, the prefixes of their names.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from autoreid.backbones import BACKBONES
from autoreid.errors import UserError


def load_imagenet(backbone: nn.Module, name: str, file: str | Path | None = None) -> None:
    """Load the ImageNet weights of the model called ``name`` into ``backbone``, or those in ``file``.

    The file is torchvision's for this model: downloaded once, to torch.hub's folder. Another ``file`` holds tensors
    under torchvision's names, as a state dict (.pth) or .safetensors. Nothing is skipped in silence: every tensor must
    find its place and every place its tensor, in its very shape; only ``backbone.not_pretrained`` stays as it is.
    """
    path = weights_file(backbone, name, file)
    remedy = "delete it to have it downloaded again" if file is None else (
        "give the state dict alone, as a .pth or .safetensors file")
    state = backbone.from_torchvision(_read(path, remedy))  # type: ignore[operator]
    if faults := _faults(backbone, state):
        raise UserError(
            f"{name}: the weights in {path} do not fit: {'; '.join(faults)}. --init takes torchvision's weights of this "
            "very model in its published size: leave out options that change it (as width or stem), or --init"
        )
    backbone.load_state_dict(state, strict=False)


def weights_file(backbone: nn.Module, name: str, file: str | Path | None = None) -> Path:
    """The file that :func:`load_imagenet` would read, downloaded if need be; ``backbone`` may lie on the meta device."""
    path = Path(file).expanduser() if file is not None else None
    if path is not None and not path.is_file():
        raise UserError(f"--init {path}: no such file; give scratch, imagenet, or a .pth or .safetensors file")
    if not hasattr(backbone, "from_torchvision"):
        raise UserError(
            f"{name} has no way to start from ImageNet weights; models that have: {', '.join(_models())}; give one of "
            "these or leave out --init"
        )
    return _fetched(name) if path is None else path


def start_of(path: Path, name: str) -> dict[str, str]:
    """What a result says of the weights it began with: ``init`` "imagenet" where the file is torchvision's own (its name
    there holds the first digits of its SHA-256), else "file"; the file's name and SHA-256."""
    digest = sha256_of(path)
    weights = imagenet_weights(name)
    own = Path(torchvision.models.get_weight(weights).url).stem.rsplit("-", 1)[-1] if weights else "none"
    return {"init": "imagenet" if digest.startswith(own) else "file", "init_file": path.name, "init_sha256": digest}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def imagenet_weights(name: str) -> str | None:
    """The name of torchvision's weights for the model called ``name``, or None."""
    build = BACKBONES.get(name)
    build = getattr(build, "func", build)  # some models are a family's function with options fixed
    if build is None:
        return None
    return getattr(sys.modules[build.__module__], "IMAGENET", {}).get(build.__name__)


def _models() -> list[str]:
    return sorted(name for name in BACKBONES if imagenet_weights(name))


# ---------------------------------------------------------------------------------------- files
def _fetched(name: str) -> Path:
    """The file of this model's weights in torch.hub's folder, downloaded unless it is there."""
    weights = imagenet_weights(name)
    if weights is None:
        raise UserError(
            f"{name} has no ImageNet weights of its own; models that have: {', '.join(_models())}; give a file: --init FILE"
        )
    url = torchvision.models.get_weight(weights).url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = path.stem.rsplit("-", 1)[-1]  # resnet18-f37072fd.pth: the first digits of its SHA-256
            torch.hub.download_url_to_file(url, str(path), checksum)
        except (OSError, HTTPException, RuntimeError) as fault:  # RuntimeError: not the file that its name promises
            raise UserError(
                f"{name}: its ImageNet weights are not at {path}, and {url} could not be downloaded ({fault}); put the "
                "file there by hand, or give it as --init FILE"
            ) from None
    return path


def _read(path: Path, remedy: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # a broken file makes the readers raise half a dozen kinds
        raise UserError(
            f"{path} cannot be read as weights ({type(fault).__name__}): it is damaged or holds more than tensors; {remedy}"
        ) from None
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not tensors by name; {remedy}")
    if others := [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds more than tensors by name: {_first(others)}; {remedy}")
    return dict(state)


# ---------------------------------------------------------------------------------------- what does not fit
def _faults(backbone: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What is missing, left over and of another shape, a phrase each."""
    own = backbone.state_dict()
    fresh = tuple(getattr(backbone, "not_pretrained", ()))
    # the older files lack batch norm's counter of batches, which only an average without momentum reads
    missing = [n for n in own if n not in state and not n.startswith(fresh) and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} (file {_shape(state[name])}, network {_shape(own[name])})"
        for name in own if name in state and state[name].shape != own[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    return [f"{kind}: {_first(names)}" for kind, names in kinds.items() if names]


def _first(names: Sequence[str], shown: int = 3) -> str:
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
