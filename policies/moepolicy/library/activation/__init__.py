"""Policies that compare activations with those seen before: which experts follow which."""

from moepolicy.library.activation.edgemoe import EdgeMoe
from moepolicy.library.activation.expertflow import ExpertFlow
from moepolicy.library.activation.finemoe import FineMoe
from moepolicy.library.activation.moe_infinity import MoeInfinity
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "edgemoe": EdgeMoe,
    "moe-infinity": MoeInfinity,
    "finemoe": FineMoe,
    "expertflow": ExpertFlow,
}
