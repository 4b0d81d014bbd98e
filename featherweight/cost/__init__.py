"""What networks cost: multiply-accumulates, parameters, bytes, activations, estimated energy, measured latency."""

from featherweight.cost.cost import Cost as Cost
from featherweight.cost.count import LayerCall as LayerCall
from featherweight.cost.count import LayerProfile as LayerProfile
from featherweight.cost.count import Profile as Profile
from featherweight.cost.count import price as price
from featherweight.cost.count import profile as profile
from featherweight.cost.energy import estimate as estimate
from featherweight.cost.latency import Latency as Latency
from featherweight.cost.latency import measure as measure
from featherweight.cost.latency import torch_run as torch_run
