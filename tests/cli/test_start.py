"""What a command imports: nothing that takes a second and is not needed for the run at hand."""

from __future__ import annotations

import mmap
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torchvision", "torch._dynamo", "sympy", "sklearn", "pandas", "matplotlib")
PROGRAM = f"""
import sys
from certify_cli.cli.app import main
code = main(sys.argv[1:])
print(sorted(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def imported(*words: str) -> str:
    """Those of HEAVY that the command has imported, as a list in text."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


def mnist(root: Path) -> Path:
    """Four noisy images in MNIST's own files."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 4, 28, 28) + pixels.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 4) + bytes(range(4)))
    return root


@pytest.mark.smoke
@pytest.mark.parametrize("model", ["digits_mlp.onnx", "digits_conv.onnx"])
def test_a_run_imports_nothing_heavy(model: str) -> None:
    words = ["certify", f"models/{model}", "--data", "digits", "--samples", "2", "--method", "lipschitz"]
    assert imported(*words) == "[]"


def test_data_in_the_format_of_mnist_needs_no_torchvision(tmp_path: Path) -> None:
    program = PROGRAM.replace("main(sys.argv[1:])", "read()").replace(
        "from certify_cli.cli.app import main",
        "from certify_cli import load_data\n"
        f"def read(): return 0 * len(load_data('mnist', root={str(mnist(tmp_path))!r}, offline=True).x)",
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def environment(before: str, **variables: str) -> str:
    """GOMP_SPINCOUNT of a process after a command line, and after the statement `before`."""
    program = "\n".join(
        [
            "import os",
            before,
            "from certify_cli.cli.app import main",
            "main(['--version'])",
            "print(os.environ.get('GOMP_SPINCOUNT'))",
        ]
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.smoke
def test_threads_sleep_while_they_wait() -> None:
    assert environment("") == "3000"


def test_the_users_choice_stays() -> None:
    assert environment("", OMP_WAIT_POLICY="active") == "None"
    assert environment("", GOMP_SPINCOUNT="1000") == "1000"
    assert environment("", KMP_BLOCKTIME="200") == "None"


def test_a_process_that_has_torch_is_left_alone() -> None:
    """Its runtime has read the variable; only processes that it starts would see the change."""
    assert environment("import torch") == "None"
    assert environment("import certify_cli.run.library") == "None"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library has the setting")
def test_the_memory_of_freed_tensors_is_kept() -> None:
    """After a command line, tensors of 80 MiB one after the other soon take no new pages."""
    program = """
import resource, torch
from certify_cli.cli.app import main
main(['--version'])
faults = [0]
for _ in range(60):
    torch.ones(10 * 2**20, dtype=torch.float64)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-31])
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=kept, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.splitlines()[-1]) < 30 * 80 * 2**20 // mmap.PAGESIZE // 4


def test_torchvision_is_whole_after_it_was_deferred() -> None:
    """onnx2torch's own layers find it when they are used, and `import torchvision` gives the real one."""
    program = """
import sys
import torch
from certify_cli import load_model
load_model("models/digits_mlp.onnx")
assert "torchvision" not in sys.modules
from onnx2torch.node_converters import nms, roialign
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
assert nms.torchvision.ops.box_area(boxes).item() == 4
pooled = roialign.roi_align(torch.ones(1, 1, 4, 4), [boxes], 2)
import torchvision
assert torchvision.datasets.MNIST and pooled.shape == (1, 1, 2, 2)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
