"""The contract suite: runs by itself on every registered attention variant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import layers.attention
from configs import attention as presets
from kernels.tokens import sequence
from layers.attention.contract import options
from layers.hooks import Hooks, Tap
from tests.contract import checks
from tests.contract.cases import Case, cases, inputs, one_of_each, plain


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


CASES = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
# Where the options of a layer change nothing of what is asked: one case of each layer.
LAYERS = pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.name)


def test_every_registered_layer_has_a_case():
    covered = {case.options()["layer"] for case in cases()}
    assert covered == set(layers.attention.names())


@pytest.mark.parametrize("preset", presets.names())
def test_presets_name_the_constructor_options(preset):
    named = presets.get(preset).to_dict()
    layer = layers.attention.get(named.pop("layer"))
    assert set(named) == options(layer)


@CASES
def test_causality(case: Case):
    checks.causality(case.layer())


@CASES
def test_packing(case: Case):
    checks.packing(case.layer())


@CASES
def test_decoding(case: Case):
    checks.decoding(case.layer())


@CASES
def test_gradients(case: Case):
    checks.gradients(case.layer)


@CASES
def test_implementations(case: Case):
    checks.implementations(case.layer, ("xla",))


@CASES
def test_declarations(case: Case):
    checks.declared_parameters(case.layer())
    checks.declared_cache(case.layer())


@CASES
def test_number_formats(case: Case):
    checks.number_formats(case.layer())


@CASES
def test_declared_flops(case: Case):
    """Projections exactly; the whole within the mask's granularity of what the dense reference multiplies."""
    layer = case.layer(implementation="reference")
    length = 16
    counted = _dot_flops(jax.make_jaxpr(lambda x: layer(x, plain(length)).out)(inputs(length, batch=1)).jaxpr)
    projections = layer.flops(1) - (layer.flops(2) - 2 * layer.flops(1))  # Linear part of a + b T + pairs.
    assert 0 < layer.flops(length) <= counted
    assert counted <= 2.2 * layer.flops(length), "declared far less than the dense reference does"
    assert projections > 0


@LAYERS
def test_bitwise_repeat(case: Case):
    layer, x, tokens = case.layer(), inputs(9), plain(9)
    run = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x, tokens).out))))
    assert np.array_equal(run(x), run(x))


@LAYERS
def test_save_and_restore_is_exact(case: Case, tmp_path):
    definition, state = nnx.split(case.layer())
    pure = nnx.to_pure_dict(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", jax.tree.map(jnp.zeros_like, pure))
    assert jax.tree.all(jax.tree.map(np.array_equal, pure, restored))


@LAYERS
def test_generation_agrees_with_the_full_pass(case: Case):
    """Log-probabilities along a generated continuation are those of one pass over the whole row."""
    model = case.model()
    ids = jax.random.randint(jax.random.key(0), (2, 20), 0, 50)
    call = jax.jit(lambda ids, caches: model(ids, None, caches))
    full = jax.nn.log_softmax(call(ids, None).logits)
    caches = model.init_caches(2, 20)
    logits, caches, _ = call(ids[:, :11], caches)
    steps = [logits]
    for place in range(11, 20):
        logits, caches, _ = call(ids[:, place : place + 1], caches)
        steps.append(logits)
    difference = jnp.abs(jax.nn.log_softmax(jnp.concatenate(steps, axis=1)) - full)[..., :50]
    assert float(difference.max()) < 5e-5


@LAYERS
def test_scan_and_loop_are_one_model(case: Case):
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    models = [case.model(depth=3, scan_layers=scan) for scan in ("always", "never")]
    scanned, unrolled = (jax.jit(lambda ids, model=model: model(ids).logits)(ids) for model in models)
    np.testing.assert_allclose(scanned[..., :50], unrolled[..., :50], rtol=0, atol=3e-6)


@LAYERS
def test_rematerialisation_changes_no_gradient(case: Case):
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)

    def gradient(remat):
        definition, parameters, rest = nnx.split(case.model(remat=remat), nnx.Param, ...)
        loss = lambda p: jnp.mean(jax.nn.log_softmax(nnx.merge(definition, p, rest)(ids).logits)[..., 0])  # noqa: E731
        return jax.jit(jax.grad(loss))(parameters)

    kept = jax.tree.leaves(gradient("none"))
    for remat in ("full", "dots") if case == one_of_each()[0] else ("full",):
        for one, again in zip(kept, jax.tree.leaves(gradient(remat)), strict=True):
            np.testing.assert_allclose(one, again, rtol=2e-4, atol=1e-7)


@LAYERS
def test_training_through_the_kernel_follows_the_reference(case: Case):
    """200 steps of the same data and seed: the losses stay together, and they fall."""
    data = jax.random.randint(jax.random.key(4), (8, 1, 17), 0, 50)

    def train(implementation):
        definition, parameters, rest = nnx.split(case.model(implementation=implementation), nnx.Param, ...)
        optimiser = optax.adam(3e-3)

        def step(carry, i):
            parameters, state = carry
            ids = data[i % len(data)]

            def loss(p):
                logits = nnx.merge(definition, p, rest)(ids[:, :-1]).logits
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]))

            value, gradient = jax.value_and_grad(loss)(parameters)
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(parameters, updates), state), value

        start = (parameters, optimiser.init(parameters))
        return np.asarray(jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(200)))(start)[1])

    kernel, reference = train(None), train("reference")
    assert reference[-8:].mean() < 0.6 * reference[:8].mean()
    np.testing.assert_allclose(kernel, reference, rtol=0.02)


@CASES
def test_taps_and_edits(case: Case):
    layer, x, tokens = case.layer(), inputs(9), plain(9)
    silent = layer(x, tokens)
    hooks = Hooks(taps={"heads": Tap(heads=(1,), rows=(2, 8)), "query": Tap(layers=(5,))})
    tapped = layer(x, tokens, None, hooks, 0)
    taken = {name for name in tapped.aux if name.startswith("tap/")}
    assert taken == {"tap/heads"} and tapped.aux["tap/heads"].shape[:3] == (2, 2, 1)
    assert np.array_equal(tapped.out, silent.out)
    edited = layer(x, tokens, None, Hooks(edits={"heads": lambda value, place: value.at[:, :, 0].set(0)}), 0)
    assert not np.allclose(edited.out, silent.out)


@CASES
def test_taps_of_probabilities(case: Case):
    layer, x, tokens = case.layer(), inputs(9), plain(9)
    hooks = Hooks(taps={"probabilities": Tap(heads=(0, 3), rows=(4,))})
    if case.preset == "lightning":
        with pytest.raises(NotImplementedError, match="no scores"):
            layer(x, tokens, None, hooks, 0)
        return
    rows = layer(x, tokens, None, hooks, 0).aux["tap/probabilities"]
    assert rows.shape == (2, 2, 1, 9)
    total = np.asarray(rows.sum(-1))
    assert (total < 1 + 1e-5).all() and (total > 0.2).all()
    assert np.asarray(rows)[..., 5:].max() == 0
    same = layer(x, tokens, None, Hooks(edits={"probabilities": lambda value, place: value}), 0)
    np.testing.assert_allclose(same.out, layer(x, tokens).out, atol=2e-5)
    blind = layer(x, tokens, None, Hooks(edits={"scores": lambda scores, place: 0 * scores}), 0)
    assert not np.allclose(blind.out, same.out)


def _dot_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contract]))
        inner = [v for v in equation.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(_dot_flops(getattr(v, "jaxpr", v)) for v in inner)
    return total


def test_model_without_tokens_is_one_document_per_row():
    model = cases()[0].model()
    ids = jax.random.randint(jax.random.key(2), (2, 7), 0, 50)
    assert np.array_equal(model(ids).logits, model(ids, sequence(7)).logits)
