"""Clean examples: endless streams and finite sets whose batch at step n is a pure function of (seed, n)."""

from score_sde.data.base import Batch, Data, TargetStream
from score_sde.data.files import digits, image_folder, load_file, load_images
from score_sde.data.keyed import Draws, generator, key
from score_sde.data.measure import measure_sigma_data, measure_sigma_max
from score_sde.data.tensor import TensorData

__all__ = [
    "Batch",
    "Data",
    "Draws",
    "TargetStream",
    "TensorData",
    "digits",
    "generator",
    "image_folder",
    "key",
    "load_file",
    "load_images",
    "measure_sigma_data",
    "measure_sigma_max",
]
