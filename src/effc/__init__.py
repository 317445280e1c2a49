"""effc: a compiler for model efficiency."""

from importlib.metadata import version

__version__ = version("effc")
