"""Every field a run can set, with its default and its meaning.

A config file starts from `get_config()` here, changes what it is about, and returns the result; `train.py` and
`eval.py` lock it, so a field that is not named in this file (or in the chosen attention's file under
`configs/attention/`) cannot be set by accident.
"""

import ml_collections

from configs import attention


def get_config() -> ml_collections.ConfigDict:
    """The full tree of fields at their defaults: a small grouped-query decoder on text."""
    config = ml_collections.ConfigDict()
    config.name = "lm"  # Shown in reports; the run folder's name unless run_dir is set.
    config.run_dir = ""  # Where everything of the run goes; "" means runs/<name>.
    config.seed = 0  # One integer decides initialisation, data order and dropout.
    config.model = model()
    config.data = data()
    config.objective = objective()
    config.optimizer = optimizer()
    config.train = train()
    config.checkpoint = checkpoint()
    config.sharding = sharding()
    config.log = log()
    config.eval = evaluation()
    return config


def model() -> ml_collections.ConfigDict:
    """A decoder language model."""
    config = ml_collections.ConfigDict()
    config.vocab_size = 0  # 0 takes the tokenizer's size, rounded up to vocab_multiple.
    config.vocab_multiple = 64  # Rows are padded to a multiple, so that the vocabulary shards evenly.
    config.width = 256  # D, the residual stream.
    config.depth = 4  # Number of blocks.
    config.max_length = 1024  # Longest sequence the model is built for (positions, caches, eval windows).
    config.attention = attention.get("gqa")  # The mixer of every block; fields in configs/attention/<preset>.py.
    config.per_layer = ()  # Exceptions, ((blocks, {field: value}), ...), e.g. (("1::2", {"attention.window": 128}),).
    config.mlp = ml_collections.ConfigDict()
    config.mlp.kind = "swiglu"  # swiglu | geglu | gelu | relu2 (squared ReLU).
    config.mlp.width = 704  # Hidden width.
    config.mlp.bias = False
    config.mlp.experts = experts()
    config.norm = ml_collections.ConfigDict()
    config.norm.kind = "rms"  # rms | layer | srms (RMS without a gain).
    config.norm.epsilon = 1e-6
    config.norm.offset = 0.0  # Added to the stored gain (1 in Gemma).
    config.residual = ml_collections.ConfigDict()
    config.residual.form = "pre"  # Norms: pre | sandwich (after too: Gemma 2) | carried (residual normed: MiniMax).
    config.residual.keep_attention = 1.0  # x = keep x + gain attention(norm(x)), and so on.
    config.residual.gain_attention = 1.0
    config.residual.keep_mlp = 1.0
    config.residual.gain_mlp = 1.0
    config.tie_embeddings = True  # Output matrix = transposed input embedding.
    config.embedding_scale = 1.0  # Input embeddings are multiplied by this.
    config.logit_cap = 0.0  # c * tanh(logits / c); 0 switches it off.
    config.init_std = 0.02  # Normal initialisation of matrices; residual outputs are divided by sqrt(2 depth).
    config.param_dtype = "float32"  # Stored weights.
    config.compute_dtype = "float32"  # Activations and matrix products: float32 | bfloat16.
    config.scan_layers = "auto"  # Equal blocks in one lax.scan: "always", "never", "auto" (not on one CPU device).
    config.remat = "none"  # none | full | dots (keep matrix products) : what the backward pass recomputes.
    config.attention_implementation = ""  # "" chooses by platform and shape; a name obeys or raises.
    return config


def experts() -> ml_collections.ConfigDict:
    """A mixture of experts in place of a dense MLP, of the kind `mlp.kind`."""
    config = ml_collections.ConfigDict()
    config.count = 0  # Routed experts; 0 is a dense MLP.
    config.chosen = 2  # Experts a token is sent to; every one of them gets it (no capacity, no dropped token).
    config.width = 0  # Hidden width of an expert; 0 takes mlp.width.
    config.shared = 0  # Experts that get every token, kept as one dense MLP of width shared * width.
    config.router = "softmax"  # How logits become scores: softmax | sigmoid (DeepSeek-V3).
    config.correction = False  # A constant per expert, added to its score when experts are chosen and only then.
    config.groups = 1  # Experts come in so many groups of neighbours ...
    config.groups_chosen = 1  # ... of which only the best so many may be chosen from.
    config.group_score = "max"  # What a group is worth: its best score | top2, the sum of its best two.
    config.renormalise = True  # The chosen experts' weights sum to 1 (before scale).
    config.scale = 1.0  # The routed experts' weights are multiplied by this last.
    config.balance = 0.0  # Weight of the load-balance loss; it adds "loss/expert_balance".
    config.balance_form = "switch"  # Load and score averaged over: switch (the whole batch) | sequence (each row).
    config.z_loss = 0.0  # Weight of mean(logsumexp(router logits)^2); it adds "loss/expert_z".
    return config


def data() -> ml_collections.ConfigDict:
    """Where text comes from and how it becomes batches."""
    config = ml_collections.ConfigDict()
    config.form = "text"  # text | preferences (a better and a worse answer to a prompt, of records).
    # Folders, files or globs of .txt .md .py .jsonl[.gz] .parquet; "stdlib" is the interpreter's own library.
    config.sources = ("stdlib",)
    config.weights = ()  # One number per source; () mixes in proportion to size.
    config.heldout_sources = ()  # () holds out a share of the files of `sources`, chosen by a hash of the name.
    config.heldout_share = 0.05
    config.text_field = "text"  # The field of .jsonl records and .parquet rows.
    config.max_files = 0  # Use at most this many files per source, after the deterministic sort; 0 is all.
    config.max_bad_share = 0.0  # Records that cannot be read or decoded are skipped and counted up to this share.
    config.tokenizer = "byte"  # byte | bpe:<vocabulary size> (trained on the corpus, cached) | path to tokenizer.json.
    config.tokenizer_cache = "runs/tokenizers"  # Trained tokenizers, one folder per content hash.
    config.length = 256  # Tokens per row.
    config.batch_size = 16  # Rows per step, over all devices and processes.
    config.packing = True  # Several documents per row, kept apart by segment ids; False: one document per row, padded.
    config.max_prompt = 0  # preferences: tokens of a prompt that stay where a pair is too long; 0 is half of length.
    config.message_format = "<|{role}|>\n{content}\n"  # preferences: how a message of a conversation is written out.
    config.workers = 0  # grain worker processes; 0 reads in the main process.
    return config


def objective() -> ml_collections.ConfigDict:
    """The loss, by registered name."""
    config = ml_collections.ConfigDict()
    config.name = "next_token"  # next_token | distillation | layerwise | dpo (with data.form preferences).
    config.z_loss = 0.0  # next_token: weight of mean(logsumexp(logits)^2).
    config.label_smoothing = 0.0  # next_token; dpo: the share of pairs taken to be the wrong way round.
    config.teacher = ""  # distillation, layerwise: the run folder of the network to learn from.
    config.divergence = 1.0  # distillation: weight of KL(teacher || model).
    config.cross_entropy = 0.0  # distillation: weight of the text's own cross-entropy.
    config.temperature = 1.0  # distillation: logits of both are divided by it.
    config.reduction = "token"  # distillation: the divergence as a mean per token | row (that, times tokens of a row).
    config.reference = ""  # dpo: the run folder that rewards are measured against; "" is train.init_from.
    config.beta = 0.01  # dpo: reward of an answer per unit of log-probability gained over the reference.
    config.layer_inputs = "teacher"  # layerwise: what a block is given, the teacher's hidden states or its own.
    return config


def optimizer() -> ml_collections.ConfigDict:
    """What happens to gradients, in this order: rule, clip, optimiser, schedule, average."""
    config = ml_collections.ConfigDict()
    config.gradient_rule = "mean"  # Between gradients and optax: mean (the plain gradient) | sam (sharpness-aware).
    config.sam_radius = 0.05  # sam: how far up the gradient the second one is taken.
    config.name = "adamw"  # adamw | muon | lion | sgd.
    config.learning_rate = 3e-3  # Peak.
    config.schedule = "cosine"  # cosine | wsd (warm-up, stable, decay) | linear | constant.
    config.warmup_steps = 20
    config.decay_share = 0.2  # wsd: the share of the run that decays.
    config.final_share = 0.1  # Final learning rate as a share of the peak.
    config.weight_decay = 0.1
    config.decay_mask = "matrices"  # matrices (two or more dimensions, embeddings out) | all | none.
    config.b1 = 0.9
    config.b2 = 0.95
    config.epsilon = 1e-8
    config.momentum = 0.9  # sgd and muon.
    config.clip_norm = 1.0  # Global norm; 0 switches it off.
    config.accumulate = 1  # Micro-batches per step.
    config.ema_decay = 0.0  # Average of the weights, evaluated instead of them when above 0.
    return config


def train() -> ml_collections.ConfigDict:
    """How long the loop runs."""
    config = ml_collections.ConfigDict()
    config.steps = 500
    config.init_from = ""  # A run folder whose weights start this run ("" initialises from the seed).
    config.compilation_cache = ""  # A folder where compiled programs are kept from run to run; "" keeps none.
    return config


def checkpoint() -> ml_collections.ConfigDict:
    """State + data position + config + rng, written in the background."""
    config = ml_collections.ConfigDict()
    config.every = 200  # Steps; 0 saves only at the end.
    config.keep = 3
    config.asynchronous = True
    return config


def sharding() -> ml_collections.ConfigDict:
    """A mesh and a table from logical axis names to mesh axes."""
    config = ml_collections.ConfigDict()
    config.preset = "single"  # single | fsdp | tp | fsdp_tp | tpla.
    config.data = 0  # Size of the mesh axis "data"; 0 fills what the others leave.
    config.model = 0  # Devices that share one copy of the model; 0 takes the preset's default.
    config.latent = 0  # tpla: how many of them along the mesh axis "latent"; 0 is 2.
    config.rules = ()  # ((logical axis, mesh axis or None), ...): exceptions to the preset's table.
    return config


def log() -> ml_collections.ConfigDict:
    """What is written while the run goes on."""
    config = ml_collections.ConfigDict()
    config.every = 10  # Steps between metric lines.
    config.tensorboard = True
    config.wandb = False  # Needs the extra of that name.
    config.profile_steps = ()  # (first, last): a profiler trace of these steps under <run>/profile.
    return config


def evaluation() -> ml_collections.ConfigDict:
    """What the loop evaluates and how often."""
    config = ml_collections.ConfigDict()
    config.every = 0  # Steps; 0 evaluates only at the end.
    config.tasks = ("heldout",)
    config.limit = 64.0  # Documents (or rows) per task; below 1 a share of them; 0 is all.
    config.heldout_tokens = 2048  # The task heldout scores so many first tokens of each document; 0 is all of them.
    config.batch_size = 16
    config.sample_prompts = ("def ", "import ", "class ")
    config.sample_tokens = 120
    return config
