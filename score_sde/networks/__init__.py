"""Networks F(x, c_noise, **conditions): plain modules that know nothing of SDEs. Their output is 0 before training."""

from score_sde.networks.dropout import Dropout
from score_sde.networks.encoder import Encoder
from score_sde.networks.energy import Conservative
from score_sde.networks.mlp import MLP
from score_sde.networks.ncsn import NCSN
from score_sde.networks.refinenet import NCSNv2
from score_sde.networks.transformer import DiT
from score_sde.networks.unet import UNet

__all__ = ["MLP", "NCSN", "Conservative", "DiT", "Dropout", "Encoder", "NCSNv2", "UNet"]
