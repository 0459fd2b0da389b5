"""Pictures of attention maps, as Figures 2, 4 and 6 of the paper show them. Needs matplotlib.

`attention_grid` draws what your own code has recorded; `python -m at_fused.visualize --help` loads models,
weights and images by name.
"""

from .grid import attention_grid

__all__ = ["attention_grid"]
