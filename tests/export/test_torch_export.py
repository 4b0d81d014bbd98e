"""PyTorch program files (.pt2), run without the model's code."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.batch import Inputs
from featherweight.export.program import capture, draft
from featherweight.export.torch_export import load, write


def export(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write a file without holding it against the model afterwards."""
    with draft(path) as file:
        write(capture(model, inputs), file)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.up, self.drop = nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1), nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"image": self.up(self.drop(torch.relu(self.norm(self.down(x))))) * scale[:, None, None, None]}


def test_a_program_answers_every_batch_size_in_evaluation_mode(tmp_path):
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, Inputs((torch.randn(1, 3, 8, 8),), {"scale": torch.ones(1)}), tmp_path / "net.pt2")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    file = load(tmp_path / "net.pt2")
    file.train()  # a user's evaluate may switch modes: the program knows only one
    file.eval()
    model.eval()
    for size in (1, 2, 5):
        x, scale = torch.randn(size, 3, 8, 8), torch.rand(size)
        assert torch.equal(file(x, scale=scale)["image"], model(x, scale=scale)["image"])


def test_neither_the_examples_values_nor_source_paths_are_written(tmp_path):
    secret = torch.full((2, 4), 1234.5)
    export(nn.Linear(4, 3), Inputs((secret,)), tmp_path / "net.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    assert torch.tensor(1234.5).numpy().tobytes() not in contents
    assert b"test_torch_export.py" not in contents
    assert b"site-packages" not in contents


def test_bfloat16_and_float64_are_kept(tmp_path):
    for dtype in (torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).to(dtype).eval()
        export(model, Inputs((torch.randn(2, 2, 4, 4),)), tmp_path / "net.pt2")
        x = torch.randn(3, 2, 4, 4, dtype=dtype)
        found = load(tmp_path / "net.pt2")(x)
        assert found.dtype == dtype
        assert torch.equal(found, model(x))
