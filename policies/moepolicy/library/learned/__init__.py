"""Policies that learn what will be used, while they run."""

from moepolicy.library.learned.flashmoe import FlashMoe
from moepolicy.library.learned.foresight import Foresight, ForesightBypass
from moepolicy.library.learned.foresight_ahead import ForesightAhead
from moepolicy.library.learned.foresight_spec import ForesightSpec
from moepolicy.library.learned.promoe import ProMoe
from moepolicy.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "flashmoe": FlashMoe,
    "promoe": ProMoe,
    "foresight": Foresight,
    "foresight-bypass": ForesightBypass,
    "foresight-ahead": ForesightAhead,
    "foresight-spec": ForesightSpec,
}
