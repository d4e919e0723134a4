"""HTTP in, engine calls out. Nothing here imports torch; only `lifecycle` loads a real engine."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("medusa-serve")
except PackageNotFoundError:  # a checkout on the path without an install
    __version__ = "0+unknown"
