"""Torch-Pruning on the digits network, for `channels.py`; runs in an environment of its own.

python torch_pruning_peer.py taylor_global 0.45 0 pruned.pt        # score and spread, target, seed, where to write

The ratio is bisected until the multiply-accumulates come nearest to the target from below. Taylor scores get the
gradient of the loss on 512 labelled training images; local is one share for all groups, global one threshold.
"""

from __future__ import annotations

import copy
import sys

import digits
import torch
import torch.nn.functional as F
import torch_pruning as tp

way, target, seed, out = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
score, _, spread = way.partition("_")
model, (training, _, _) = digits.base(seed), digits.data()
example = training.images[:1]
whole, _ = tp.utils.count_ops_and_params(model, example)
if score == "taylor":
    F.cross_entropy(model(training.images[:512]), training.labels[:512]).backward()
importance = {"l2": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}[score]()


def pruned(ratio: float) -> tuple[torch.nn.Module, float]:
    """A copy with this share of its channels gone, and its share of the multiply-accumulates."""
    network = copy.deepcopy(model)
    for mine, original in zip(network.parameters(), model.parameters(), strict=True):
        mine.grad = None if original.grad is None else original.grad.clone()
    pruner = tp.pruner.BasePruner(
        network,
        example,
        importance=importance,
        global_pruning=spread == "global",
        pruning_ratio=ratio,
        max_pruning_ratio=0.95,
        ignored_layers=[network.classify],
    )
    pruner.step()
    return network, tp.utils.count_ops_and_params(network, example)[0] / whole


low, high = 0.0, 0.95
best, _ = pruned(high)
for _ in range(12):
    middle = (low + high) / 2
    network, share = pruned(middle)
    if share <= target:
        high, best = middle, network
    else:
        low = middle
best.zero_grad(set_to_none=True)
torch.save(best, out)
