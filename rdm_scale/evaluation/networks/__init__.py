"""Feature networks: uint8 pixels to the vectors that measures compare.

Weights are checked by sha256 and read without running code: pickles are unpickled by a reader that knows arrays only.
"""

from typing import TYPE_CHECKING

from rdm_scale.lazy import lazy_names

if TYPE_CHECKING:
    from rdm_scale.evaluation.networks.feature_network import FeatureNetwork, Features, NetworkIdentity
    from rdm_scale.evaluation.networks.named_networks import load_network

__all__ = ["FeatureNetwork", "Features", "NetworkIdentity", "load_network"]

__getattr__ = lazy_names(
    __name__,
    {
        "feature_network": ("FeatureNetwork", "Features", "NetworkIdentity"),
        "named_networks": ("load_network",),
    },
)
