"""The kernels in any PyTorch model with group norms: `optimize(model)` and `restore(model)`.

    from soda_kernels.integrations.torch import optimize
    print(optimize(model))

For models of diffusers there is `soda_kernels.integrations.diffusers`.
"""

from soda_kernels.integrations.replacement import Report
from soda_kernels.integrations.torch.models import optimize, restore

__all__ = ["Report", "optimize", "restore"]
