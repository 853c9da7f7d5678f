"""Keras 3: its recurrent layers and models as ours, ours as its, and its files read without Keras.

Reading a file runs nothing that stands in it: the configuration is JSON, the weights are plain arrays of HDF5, and
whatever else a file holds is left alone or refused.
"""

from throughtime.interop.keras.files import load
from throughtime.interop.keras.live import from_keras
from throughtime.interop.keras.masks import mask_lengths
from throughtime.interop.keras.stack import Stack
from throughtime.interop.keras.writing import to_keras

__all__ = ["Stack", "from_keras", "load", "mask_lengths", "to_keras"]
