"""Initial values of everything outside the backbone."""

from torch import nn

__all__ = ["initialize"]


def initialize(module: nn.Module) -> None:
    """Set convolutions to kaiming-normal (fan_out) with zero bias, norms to 1 and 0 (METHOD section 2), in place."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
