"""Pliant trains image classifiers that change their shape at run time.

The contract that a method fulfils is in `pliant.recipe`; what a run is, in `pliant.experiment`.
"""

__version__ = "0.1.0"
