"""The kernels for GPUs, by Triton's interpreter on a CPU; on a GPU: test_gpu.py."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import jobs
import pytest
import torch
from torch import nn

import ddp_mnist
from ddp_mnist import CNN, model

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is None, reason="only torch for CUDA on Linux brings Triton"
)

CHECKS = Path(__file__).parent / "kernel_checks.py"


@pytest.mark.slow
def test_layers_and_loss_are_torchs_own_with_their_gradients() -> None:
    ended = jobs.run([sys.executable, str(CHECKS), "cpu"], {"TRITON_INTERPRET": "1"})
    assert ended.code == 0, ended.err
    assert "Warning" not in ended.err  # Triton's own, for whom it does not suit
    for name, error in json.loads(ended.out).items():
        assert error < (2e-3 if "float16" in name else 2e-6), name


KERNELS = {
    "_forward": "images: *fp32, weight: *fp32, bias: *fp32, out: *bf16, places: *u8",
    "_of_images": "gradient: *bf16, places: *u8, weight: *fp32, out: *fp32",
    "_of_weights": "images: *bf16, gradient: *bf16, places: *u8, out: *fp32, count: i32",
    "_add_up": "parts: *fp32, out: *fp32",
    "_classify": "hidden: *bf16, weight: *fp32, bias: *fp32, out: *bf16",
    "_of_hidden": "gradient: *bf16, weight: *fp32, out: *bf16",
    "_of_classes": "hidden: *bf16, gradient: *bf16, out: *fp32",
    "_loss": "logits: *bf16, labels: *i64, figures: *fp32, gradient: *fp32, size: fp32",
}
CONSTANTS = {"INPUTS": 2, "OUTPUTS": 3, "HEIGHT": 8, "WIDTH": 8, "PIXELS": 32, "CHANNELS": 4, "EACH": 2, "ROWS": 16}
CONSTANTS |= {"COLUMNS": 16, "BLOCK": 32, "TILE": 16, "FEATURES": 20, "CLASSES": 10, "COUNT": 5, "IMAGES": 16}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_each_kernel_can_be_compiled_for_a_gpu(name: str) -> None:
    """The interpreter takes more than the compiler does, and the compiler needs no GPU."""
    program = (
        "import json, sys; from triton.backends.compiler import GPUTarget; from triton.compiler import ASTSource;"
        "import triton; from ddp_mnist import kernels;"
        "kernel = getattr(kernels, sys.argv[1]); types = json.loads(sys.argv[2]); constants = json.loads(sys.argv[3]);"
        "constants = {name: constants[name] for name in kernel.arg_names if name not in types};"
        "source = ASTSource(kernel, types | dict.fromkeys(constants, 'constexpr'), constants);"
        "print(len(triton.compile(source, target=GPUTarget('cuda', 90, 32), options=kernels.OPTIONS).asm['cubin']))"
    )
    types = dict(argument.split(": ") for argument in KERNELS[name].split(", "))
    words = [sys.executable, "-c", program, name, json.dumps(types), json.dumps(CONSTANTS)]
    ended = jobs.run(words, {})
    assert ended.code == 0 and int(ended.out) > 1000, ended.err


def test_where_triton_cannot_build_anything_there_is_a_warning_and_torch_does_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model._triton_works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not model._triton_works(torch.device("cpu"))  # Triton has no driver for it
    assert "Triton cannot be used (" in caplog.text and "--no-triton" in caplog.text
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ddp_mnist.kernels")
    monkeypatch.delattr(ddp_mnist, "kernels")
    model._triton_works.cache_clear()
    assert not model._triton_works(torch.device("cpu"))
    assert "Triton cannot be used (ModuleNotFoundError: " in caplog.text
    model._triton_works.cache_clear()


def test_on_a_cpu_triton_is_not_imported() -> None:
    program = (
        "import sys, torch; from ddp_mnist.model import CNN, placed; net = placed(CNN(), torch.device('cpu'));"
        "net(torch.rand(2, 1, 28, 28)).sum().backward(); print(net.triton, 'triton' in sys.modules)"
    )
    ended = jobs.run([sys.executable, "-c", program], {})
    assert ended.out.split() == ["False", "False"], ended.err


def test_its_kernels_do_not_import_torchs_compiler() -> None:
    program = "import sys; from ddp_mnist import kernels; print('torch._dynamo' in sys.modules)"
    ended = jobs.run([sys.executable, "-c", program], {})
    assert ended.out.strip() == "False", ended.err


def test_only_what_fits_is_given_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not look: what does not fit would be read and written beyond its end. torch says what is wrong."""
    from ddp_mnist import kernels

    assert not kernels.takes_layer(CNN().conv1, torch.rand(2, 1, 28, 28))  # not on a GPU
    monkeypatch.setattr(kernels, "_floats", lambda tensor: tensor.numel() > 0)
    net, labels = CNN(), torch.zeros(2, dtype=torch.int64)
    assert kernels.takes_layer(net.conv1, torch.rand(2, 1, 28, 28))
    for images in (torch.rand(2, 3, 28, 28), torch.rand(2, 1, 29, 28), torch.rand(1, 28, 28), torch.rand(0, 1, 28, 28)):
        assert not kernels.takes_layer(net.conv1, images)
    for other in (nn.Conv2d(1, 8, 5, padding=1), nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3, padding=1, bias=False)):
        assert not kernels.takes_layer(other, torch.rand(2, 1, 28, 28))
    assert not kernels.takes_layer(nn.Conv2d(1, 100, 3, padding=1), torch.rand(2, 1, 28, 28))
    assert kernels.takes_linear(net.fc1, torch.rand(2, 16, 7, 7))
    assert not kernels.takes_linear(net.fc1, torch.rand(2, 16, 8, 8))
    assert not kernels.takes_linear(nn.Linear(784, 100), torch.rand(2, 784))
    assert kernels.takes_loss(torch.rand(2, 10), labels)
    assert not kernels.takes_loss(torch.rand(3, 10), labels)
    assert not kernels.takes_loss(torch.rand(2, 10), labels.int())
    assert not kernels.takes_loss(torch.rand(2, 100), labels)
