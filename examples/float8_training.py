"""Train a small model in float8 with octavo.float8, save it, and load it back. Runs on a GPU or a CPU.

python examples/float8_training.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from octavo.float8 import convert_to_float8_training
from octavo.float8.float8_linear import Float8Linear
from octavo.utils import TORCH_VERSION_AT_LEAST_2_5

if not TORCH_VERSION_AT_LEAST_2_5:
    raise SystemExit("torch 2.5 or later is needed")

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# A model of linear layers, in bfloat16.
model = nn.Sequential(nn.Linear(2048, 4096), nn.Linear(4096, 128), nn.Linear(128, 1)).bfloat16().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


def module_filter_fn(mod: nn.Module, fqn: str) -> bool:
    """Convert all but the last layer, and only sizes that the hardware takes without padding."""
    if fqn == "2":
        return False
    return not (isinstance(mod, nn.Linear) and (mod.in_features % 16 or mod.out_features % 16))


# In place: the parameters stay the same objects, so the optimizer made above keeps working.
convert_to_float8_training(model, module_filter_fn=module_filter_fn)
assert [isinstance(layer, Float8Linear) for layer in model] == [True, True, False]

compiled = torch.compile(model)
x = torch.randn(4096 if device == "cuda" else 64, 2048, device=device, dtype=torch.bfloat16)
labels = torch.ones(len(x), 1, device=device, dtype=torch.bfloat16)
for step in range(10):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(compiled(x), labels)
    loss.backward()
    optimizer.step()
    print(f"step {step + 1:2}  loss {loss.item():.4f}")

# The state dict is that of the bfloat16 model: any model with these linears loads it.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pth"
    checkpoint = {
        "model": model,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    torch.save(checkpoint, path)

    loaded = torch.load(path, weights_only=False)
    model = loaded["model"]
    model.load_state_dict(loaded["model_state_dict"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    optimizer.load_state_dict(loaded["optimizer_state_dict"])
    with torch.no_grad():
        print(f"loaded   loss {nn.functional.mse_loss(model(x), labels).item():.4f}")
