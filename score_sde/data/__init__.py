"""Clean examples: endless streams and finite sets, whose batch at step n is a pure function of (seed, n)."""

from score_sde.data.augment import Augment
from score_sde.data.base import Batch, Data, TargetStream
from score_sde.data.decode import Decoder
from score_sde.data.files import digits, image_folder, load_file, load_images
from score_sde.data.measure import measure_data_std, measure_sigma_data, measure_sigma_max
from score_sde.data.sets import cifar10, fashion_mnist, mnist
from score_sde.data.tables import huggingface, parquet
from score_sde.data.tensor import Examples, TensorData
from score_sde.keyed import Draws

__all__ = [
    "Augment",
    "Batch",
    "Data",
    "Decoder",
    "Draws",
    "Examples",
    "TargetStream",
    "TensorData",
    "cifar10",
    "digits",
    "fashion_mnist",
    "huggingface",
    "image_folder",
    "load_file",
    "load_images",
    "measure_data_std",
    "measure_sigma_data",
    "measure_sigma_max",
    "mnist",
    "parquet",
]
