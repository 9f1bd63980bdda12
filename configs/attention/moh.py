"""MoH: mixture of heads (arXiv 2410.11842): each token takes a few of its heads, some are shared by all tokens."""

import ml_collections

from configs.attention import mha
from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = mha.get_config()
    config.layer = "moh"
    config.shared_heads = 2  # The first heads, which every token takes.
    config.routed_active = 2  # How many of the others a token takes; 0 if all are shared.
    config.router = "learned"  # Or query_norm: no parameters, weights 0 and 1, to go on from a pretrained model.
    config.score = "released"  # Weights as the authors' code has them, 1 on average; paper: as the equations.
    config.two_stage = True  # Shares of the two groups of heads, learned too.
    config.straight_through = "all"  # Of query_norm: whose weights get gradients; active, none.
    config.balance = 0.01  # Of the load-balance loss of this layer; 0 switches it off.
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    mha.check(rules)
    rules.whole("shared_heads", "routed_active", least=0)
    rules.one_of("router", ("learned", "query_norm"))
    rules.one_of("score", ("released", "paper"))
    rules.one_of("straight_through", ("all", "active", "none"))
    rules.switch("two_stage")
    rules.number("balance", least=0)
    routed = rules["heads"] - rules["shared_heads"]
    if routed < 0:
        rules.fail("shared_heads", f"must be at most {rules.name}.heads = {rules['heads']}")
    if not (1 if routed else 0) <= rules["routed_active"] <= routed:
        rules.fail("routed_active", f"must be 1 to the {routed} heads that are not shared (0 if all are)")
