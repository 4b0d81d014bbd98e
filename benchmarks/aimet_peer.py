"""AIMET's greedy selection on the digits network, for `against_aimet.py`; runs in an environment of its own.

python aimet_peer.py spatial_svd 0.5 0 2 result.json        # scheme, target, seed, threads, where to write
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from decimal import Decimal

import torch

# PyPI's torchvision is built for CUDA and looks for these operators when it is imported beside a CPU build of torch.
OPERATORS = "nms qnms roi_align _roi_align_backward roi_pool _roi_pool_backward ps_roi_align _ps_roi_align_backward"
OPERATORS += " ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"
library = torch.library.Library("torchvision", "DEF")
for operator in OPERATORS.split():
    library.define(f"{operator}(Tensor x) -> Tensor")

import digits  # noqa: E402
from aimet_torch.common.defs import (  # noqa: E402
    CompressionScheme,
    CostMetric,
    GreedySelectionParameters,
    RankSelectScheme,
)
from aimet_torch.compress import ModelCompressor  # noqa: E402
from aimet_torch.defs import SpatialSvdParameters, WeightSvdParameters  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)
scheme, target, seed, threads, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
torch.set_num_threads(threads)
model, (_, selection, _) = digits.base(seed), digits.data()
evaluations = 0


def evaluate(network: torch.nn.Module, iterations: int | None, use_cuda: bool = False) -> float:
    """Accuracy on the selection images."""
    global evaluations
    evaluations += 1
    return digits.accuracy(network, selection)


greedy = GreedySelectionParameters(Decimal(target), 10)
if scheme == "weight_svd":
    choice = WeightSvdParameters.AutoModeParams(RankSelectScheme.greedy, greedy, modules_to_ignore=[model.conv1])
    parameters = WeightSvdParameters(WeightSvdParameters.Mode.auto, choice)
else:
    choice = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[model.conv1])
    parameters = SpatialSvdParameters(SpatialSvdParameters.Mode.auto, choice)
wall, cpu = time.perf_counter(), time.process_time()
compressed, _ = ModelCompressor.compress_model(
    model, evaluate, 1, (1, 1, 16, 16), CompressionScheme[scheme], CostMetric.mac, parameters
)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
ranks = {
    name: module[0].out_channels if hasattr(module[0], "out_channels") else module[0].out_features
    for name, module in compressed.named_modules()
    if (isinstance(module, torch.nn.Sequential) and name not in dict(model.named_modules()))
    or (isinstance(module, torch.nn.Sequential) and not isinstance(model.get_submodule(name), torch.nn.Sequential))
}
torch.save(compressed.state_dict(), f"{out}.pt")
with open(out, "w", encoding="utf-8") as file:
    json.dump({"wall": wall, "cpu": cpu, "evaluations": evaluations, "ranks": ranks}, file)
