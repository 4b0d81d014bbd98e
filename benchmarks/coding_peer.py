"""Other coders on a file that `coding.py` hands over, in an environment of their own; prints JSON.

python coding_peer.py bytes FILE            zstandard, and ZipNN where FILE is of bfloat16 values
python coding_peer.py nncodec STATE.npz QP OUT.npz
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import sys
import time
import zlib
from pathlib import Path


def timed(name, data, encode, decode):
    """Bytes and CPU seconds both ways."""
    begun = time.process_time()
    coded = encode(data)
    between = time.process_time()
    back = decode(coded)
    done = time.process_time()
    assert bytes(back) == bytes(data), f"{name} does not give back what it was given"
    return {"coder": name, "bytes": len(coded), "encode": between - begun, "decode": done - between}


def general(path):
    """Coders of bytes."""
    import zstandard

    data = Path(path).read_bytes()
    found = []
    for level in (3, 19):
        pair = zstandard.ZstdCompressor(level).compress, zstandard.ZstdDecompressor().decompress
        found.append(timed(f"zstandard {level}", data, *pair))
    if path.endswith(".int8"):
        found.append(timed("zlib 6", data, lambda d: zlib.compress(d, 6), zlib.decompress))
        found.append(timed("lzma 6", data, lambda d: lzma.compress(d, preset=6), lzma.decompress))
    if path.endswith(".bf16") and importlib.util.find_spec("zipnn"):
        import zipnn

        coder = zipnn.ZipNN(bytearray_dtype="bfloat16")
        # It changes the bytes it is given, so it gets a copy.
        found.append(timed("ZipNN", data, lambda d: coder.compress(bytes(bytearray(d))), coder.decompress))
    return found


def nncodec(state, qp, out):
    """NNCodec on a state dict, its values back in another file."""
    import torch

    try:
        import torchvision  # noqa: F401 - one that goes with this torch
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "DEF")  # which its imports ask for, and nothing here uses
        for name in ("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward",
                     "ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward",
                     "deform_conv2d", "_deform_conv2d_backward"):  # fmt: skip
            library.define(f"{name}() -> ()")
    import numpy as np
    from nncodec.nn import decode, encode

    values = dict(np.load(state).items())
    taken = []
    for _ in range(3):
        begun = time.process_time()
        coded = encode(values, {"qp": int(qp), "results": str(Path(out).parent), "model": "m", "verbose": False})
        between = time.process_time()
        back = decode(coded)
        taken.append((between - begun, time.process_time() - between))
    np.savez(out, **{name: np.asarray(value) for name, value in back.items()})
    least = {"encode": min(one for one, _ in taken), "decode": min(other for _, other in taken)}
    return [{"coder": f"NNCodec, qp {qp}", "bytes": len(coded), **least}]


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    print("RESULT " + json.dumps(general(*arguments) if kind == "bytes" else nncodec(*arguments)))
