"""autoreid: find, train and deploy re-identification networks."""

from autoreid.version import __version__

__all__ = ["__version__"]
