"""MATLAB files, old (scipy) and new (HDF5, h5py); neither package is needed for any dataset without them."""

from __future__ import annotations

from typing import Any

from autoreid.errors import UserError


def load_mat(path: str) -> dict[str, Any]:
    """The variables of a .mat file up to version 7.2."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise _missing(path, "scipy") from None
    try:
        return {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
    except Exception as fault:  # scipy raises many kinds for a damaged file
        raise _damaged(path, fault) from fault


def open_hdf5(path: str) -> Any:
    """An open .mat file of version 7.3, which is HDF5; close it."""
    try:
        import h5py
    except ImportError:
        raise _missing(path, "h5py") from None
    try:
        return h5py.File(path, "r")
    except OSError as fault:
        raise _damaged(path, fault) from fault


def variable(path: str, content: dict[str, Any], *names: str) -> Any:
    """The first of these variables that a .mat file has."""
    for name in names:
        if name in content:
            return content[name]
    raise UserError(
        f"{path} holds no variable {' or '.join(names)} (it holds {', '.join(sorted(content)) or 'none'}); "
        "copy the original file again"
    )


def whole_numbers(path: str, content: dict[str, Any], *names: str) -> Any:
    """The same variable as int64: MATLAB stores counts as doubles wherever nobody said otherwise."""
    import numpy as np

    value = np.asarray(variable(path, content, *names))
    if value.dtype.kind not in "iuf" or not (np.isfinite(value) & (value == np.floor(value))).all():
        name = next(name for name in names if name in content)
        raise UserError(f"{path}: variable {name} must hold whole numbers and does not; copy the original file again")
    return value.astype(np.int64)


def _missing(path: str, package: str) -> UserError:
    return UserError(
        f"reading {path} needs the package {package}: pip install h5py scipy, or pip install '.[datasets]' in autoreid's "
        "folder"
    )


def _damaged(path: str, fault: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({type(fault).__name__}): it is damaged; copy it again")
