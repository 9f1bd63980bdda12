"""Whether a config can be run: ranges, names, and numbers that must fit together, without loading anything heavy.

What only the data, the devices or a registry can tell (does the file exist, does the mesh divide, is there a task of
that name) is checked where it is known. Rules of an attention stand in `configs/attention/<layer>.py:check`.
"""

import importlib

import ml_collections

from configs import attention
from configs.errors import ConfigError, unknown
from configs.per_layer import expand
from configs.rules import Rules

GROUPS = ("model", "data", "objective", "optimizer", "train", "checkpoint", "sharding", "log", "eval")
DTYPES = ("float32", "bfloat16")


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError, one line that names the field, if the config cannot be run."""
    rules = Rules(config, "config")
    rules.text("name", empty=False)
    if "/" in config.name or "\0" in config.name:
        rules.fail("name", "names a folder and must hold no '/'; use config.run_dir for a path")
    rules.path("run_dir")
    rules.whole("seed", least=0)
    for group in GROUPS:
        globals()[f"_{group}"](rules.below(group))
    _together(config)


def _model(rules: Rules) -> None:
    rules.whole("vocab_size", least=0)
    rules.whole("vocab_multiple", "width", "depth", "max_length")
    if rules["depth"] > 4096:
        rules.fail("depth", "must be 4096 or less")
    rules.number("embedding_scale", "init_std", above=0)
    rules.number("logit_cap", least=0)
    rules.switch("tie_embeddings")
    rules.one_of("scan_layers", ("auto", "always", "never"))
    rules.one_of("param_dtype", DTYPES)
    rules.one_of("compute_dtype", DTYPES)
    rules.one_of("remat", ("none", "full", "dots"))
    rules.text("attention_implementation")
    if not isinstance(rules["per_layer"], tuple):
        rules.fail("per_layer", "must be a tuple of (blocks, {field: value})")
    for block in expand(rules.group):
        _block(Rules(block, rules.name))


def _block(rules: Rules) -> None:
    mlp = rules.below("mlp")
    mlp.one_of("kind", ("swiglu", "geglu", "gelu", "relu2"))
    mlp.whole("width")
    mlp.switch("bias")
    _experts(mlp, mlp.below("experts"))
    norm = rules.below("norm")
    norm.one_of("kind", ("rms", "layer", "srms"))
    norm.number("epsilon", above=0)
    norm.number("offset", least=0, most=1)
    residual = rules.below("residual")
    residual.one_of("form", ("pre", "sandwich", "carried"))
    residual.number("keep_attention", "gain_attention", "keep_mlp", "gain_mlp", above=0)
    options = rules.below("attention")
    if options["layer"] not in attention.names():
        raise ConfigError(unknown("config.model.attention.layer", str(options["layer"]), attention.names()))
    importlib.import_module(f"configs.attention.{options['layer']}").check(options)


def _experts(mlp: Rules, rules: Rules) -> None:
    rules.whole("count", "width", "shared", least=0)
    rules.whole("chosen", "groups", "groups_chosen")
    rules.one_of("router", ("softmax", "sigmoid"))
    rules.one_of("group_score", ("max", "top2"))
    rules.one_of("balance_form", ("switch", "sequence"))
    rules.switch("correction", "renormalise")
    rules.number("scale", above=0)
    rules.number("balance", "z_loss", least=0)
    if not rules["count"]:
        return
    if mlp["bias"]:
        mlp.fail("bias", f"must be false where {rules.name}.count is above 0: experts have no biases")
    if rules["chosen"] > rules["count"]:
        rules.fail("chosen", f"must not exceed {rules.name}.count = {rules['count']}")
    rules.divides("groups", "count")
    size = rules["count"] // rules["groups"]
    if rules["groups_chosen"] > rules["groups"]:
        rules.fail("groups_chosen", f"must not exceed {rules.name}.groups = {rules['groups']}")
    if rules["chosen"] > rules["groups_chosen"] * size:
        rules.fail("chosen", f"must not exceed the {rules['groups_chosen'] * size} experts of the groups chosen")
    if rules["group_score"] == "top2" and rules["groups_chosen"] < rules["groups"] and size < 2:
        rules.fail("group_score", f"needs two experts or more in a group: lower {rules.name}.groups")


def _data(rules: Rules) -> None:
    rules.one_of("form", ("text", "preferences"))
    rules.whole("max_prompt", least=0)
    rules.text("message_format")
    if any(rules["message_format"].count(part) != 1 for part in ("{role}", "{content}")):
        rules.fail("message_format", "must hold {role} and {content} once each")
    rules.texts("sources", empty=False)
    rules.texts("heldout_sources")
    weights = rules["weights"]
    if not isinstance(weights, tuple) or not all(type(item) in (int, float) and 0 < item < 1e30 for item in weights):
        rules.fail("weights", "must be a tuple of numbers above 0")
    if weights and len(weights) != len(rules["sources"]):
        rules.fail("weights", f"must hold one number for each of the {len(rules['sources'])} sources")
    if rules["heldout_sources"]:
        rules.number("heldout_share", least=0, under=1)
    else:
        rules.number("heldout_share", above=0, under=1)
    rules.text("text_field", empty=False)
    rules.whole("max_files", "workers", least=0)
    rules.number("max_bad_share", least=0, most=1)
    _tokenizer(rules)
    rules.path("tokenizer_cache", empty=False)
    rules.whole("length", "batch_size")
    rules.switch("packing")


def _tokenizer(rules: Rules) -> None:
    rules.path("tokenizer", empty=False)
    kind, colon, size = rules["tokenizer"].partition(":")
    if kind == "bpe":
        if not (colon and size.isascii() and size.isdigit() and 260 <= int(size[:9]) <= 10**7):
            rules.fail("tokenizer", "must give the size of the vocabulary, 260 or more, as in bpe:4096")
    elif kind != "byte" and not kind.endswith(".json") and "/" not in rules["tokenizer"]:
        known = ("byte", "bpe:4096", "path/to/tokenizer.json")
        raise ConfigError(unknown(f"{rules.name}.tokenizer", rules["tokenizer"], known))


def _objective(rules: Rules) -> None:
    rules.text("name", empty=False)
    rules.number("z_loss", least=0)
    rules.number("label_smoothing", least=0, under=1)
    rules.path("teacher")
    rules.number("divergence", "cross_entropy", least=0)
    rules.number("temperature", above=0)
    rules.one_of("layer_inputs", ("teacher", "own"))
    rules.one_of("reduction", ("token", "row"))
    rules.path("reference")
    rules.number("beta", above=0)
    if rules["name"] == "dpo":
        rules.number("label_smoothing", least=0, under=0.5)
    if rules["name"] in ("distillation", "layerwise") and not rules["teacher"]:
        rules.fail("teacher", f"must be a run folder for the objective {rules['name']}")


def _optimizer(rules: Rules) -> None:
    rules.text("gradient_rule", empty=False)
    rules.one_of("name", ("adamw", "muon", "lion", "sgd"))
    rules.number("learning_rate", "weight_decay", "clip_norm", least=0)
    rules.one_of("schedule", ("cosine", "wsd", "linear", "constant"))
    rules.whole("warmup_steps", least=0)
    rules.number("decay_share", "final_share", least=0, most=1)
    rules.one_of("decay_mask", ("matrices", "all", "none"))
    rules.number("b1", "b2", "momentum", "ema_decay", least=0, under=1)
    rules.number("epsilon", "sam_radius", above=0)
    rules.whole("accumulate")


def _train(rules: Rules) -> None:
    rules.whole("steps")
    rules.path("init_from")
    rules.path("compilation_cache")


def _checkpoint(rules: Rules) -> None:
    rules.whole("every", least=0)
    rules.whole("keep")
    rules.switch("asynchronous")


def _sharding(rules: Rules) -> None:
    rules.one_of("preset", ("single", "fsdp", "tp", "fsdp_tp", "tpla"))
    rules.whole("data", "model", "latent", least=0)
    pairs = rules["rules"]
    well_formed = isinstance(pairs, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str | None)
        for pair in pairs
    )
    if not well_formed:
        rules.fail("rules", "must be a tuple of (logical axis, mesh axis or None)")


def _log(rules: Rules) -> None:
    rules.whole("every")
    rules.switch("tensorboard", "wandb")
    steps = rules["profile_steps"]
    if steps and not (
        isinstance(steps, tuple) and len(steps) == 2 and all(type(step) is int for step in steps)
        and 0 <= steps[0] <= steps[1]
    ):  # fmt: skip
        rules.fail("profile_steps", "must be () or (first, last), two whole numbers in order")


def _eval(rules: Rules) -> None:
    rules.whole("every", "sample_tokens", "heldout_tokens", least=0)
    rules.whole("batch_size")
    rules.texts("tasks", "sample_prompts")
    rules.number("limit", least=0)


def _together(config: ml_collections.ConfigDict) -> None:
    """Rules between groups."""
    data, optimizer = Rules(config.data, "config.data"), Rules(config.optimizer, "config.optimizer")
    if config.data.length > config.model.max_length:
        data.fail("length", f"must not exceed config.model.max_length = {config.model.max_length}")
    if config.data.max_prompt >= config.data.length:
        data.fail("max_prompt", f"must be below config.data.length = {config.data.length}")
    if (config.objective.name == "dpo") != (config.data.form == "preferences"):
        data.fail("form", "must be preferences for the objective dpo, and for no other")
    if config.objective.name == "dpo" and not (config.objective.reference or config.train.init_from):
        Rules(config.objective, "config.objective").fail("reference", "must be a run folder, or config.train.init_from")
    if config.data.batch_size % config.optimizer.accumulate:
        optimizer.fail("accumulate", f"must divide config.data.batch_size = {config.data.batch_size}")
    if config.optimizer.warmup_steps > config.train.steps:
        optimizer.fail("warmup_steps", f"must not exceed config.train.steps = {config.train.steps}")
    if config.optimizer.schedule == "wsd":
        decaying = config.optimizer.decay_share * config.train.steps
        if config.optimizer.warmup_steps + decaying > config.train.steps:
            optimizer.fail("decay_share", f"leaves no room for warmup_steps = {config.optimizer.warmup_steps}")
