"""weightfs: a read-only filesystem for model weights, at the speed of the bare file."""

from weightfs.formats import Role as Role
from weightfs.formats import TensorExtent as TensorExtent
from weightfs.formats import WeightLayout as WeightLayout
from weightfs.model import open_model as open_model

__all__ = ["Role", "TensorExtent", "WeightLayout", "open_model"]
