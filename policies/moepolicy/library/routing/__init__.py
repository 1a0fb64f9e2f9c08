"""Another expert than the gate's choice, or none, in place of a load; lossy."""

from moepolicy.library.routing.adapmoe import AdapMoe
from moepolicy.library.routing.adapmoe_skip import AdapmoeSkip
from moepolicy.library.routing.cache_conditional import CacheConditional
from moepolicy.library.routing.daop import Daop
from moepolicy.library.routing.emoe import Emoe
from moepolicy.library.routing.emoe_substitute import EmoeSubstitute
from moepolicy.library.routing.eras import MoeEras
from moepolicy.library.routing.pre_gated import PreGated
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "adapmoe-skip": AdapmoeSkip,
    "emoe-substitute": EmoeSubstitute,
    "adapmoe": AdapMoe,
    "emoe": Emoe,
    "cache-conditional": CacheConditional,
    "moe-eras": MoeEras,
    "daop": Daop,
    "pre-gated": PreGated,
}
