"""alignkit: ten alignment papers as runnable notebooks, and the library those notebooks export."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("alignkit")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
