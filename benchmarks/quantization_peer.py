"""NNCF and ONNX Runtime's own quantizer on one ONNX file, in an environment of their own: see quantization.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def nncf_files(source: Path, images: np.ndarray, out: Path) -> float:
    """OpenVINO files by NNCF; returns the CPU seconds it took."""
    import nncf
    import openvino

    begun = time.process_time()
    model = openvino.convert_model(source)
    data = nncf.Dataset([image[None] for image in images])
    made = nncf.quantize(model, data, subset_size=len(images))
    taken = time.process_time() - begun
    openvino.save_model(made, out, compress_to_fp16=False)
    return taken


def onnxruntime_file(source: Path, images: np.ndarray, out: Path, reduce_range: bool) -> float:
    """An ONNX file by ONNX Runtime's quantizer, set as its documentation says for x86; returns CPU seconds."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {name: image[None]}

    name = onnx.load(str(source)).graph.input[0].name
    begun = time.process_time()
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return time.process_time() - begun


if __name__ == "__main__":
    folder, reduce, samples = Path(sys.argv[1]), sys.argv[2] == "reduce", int(sys.argv[3])
    seen = np.load(folder / "images.npy")
    seconds = {
        "onnxruntime": onnxruntime_file(folder / "float.onnx", seen[:samples], folder / "peer.onnx", reduce),
        "nncf": nncf_files(folder / "float.onnx", seen, folder / "peer.xml"),
    }
    (folder / "peer.json").write_text(json.dumps(seconds))
