"""Whether an installed package works: ``python -P smoke.py FOLDER``, from outside of a checkout.

FOLDER is the checkout, from which nothing may be imported. Ends with an error where something is
missing, and says what works otherwise.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import ddnewton


def main(checkout: Path) -> None:
    """Import the package that is installed, take a step, and start the command line."""
    # What is imported is what was installed, of one version, with its types.
    package = Path(ddnewton.__file__).parent
    assert not package.is_relative_to(checkout / "src"), package
    assert ddnewton.__version__ == version("ddnewton")
    assert (package / "py.typed").exists()
    # Figures are an extra, and importing the package does not need it.
    assert "matplotlib" not in sys.modules
    # A straight line is fitted by one step.
    x = torch.tensor([[0.0], [1.0], [2.0]])
    line = {"slope": torch.zeros(1), "offset": torch.zeros(1)}
    step = ddnewton.newton_step(
        lambda p, x: p["slope"] * x + p["offset"], line, x, 3 * x + 1, torch.nn.MSELoss(), 0.0
    )
    assert abs(step["slope"].item() - 3) < 1e-5
    assert abs(step["offset"].item() - 1) < 1e-5
    # The command line says what it can do.
    helped = subprocess.run(
        [sys.executable, "-P", "-m", "ddnewton", "--help"], capture_output=True, check=True
    )
    assert b"python -m ddnewton" in helped.stdout
    print(f"ddnewton {ddnewton.__version__} works, from {package}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
