"""The Mosaic GPU kernels of attention: interpreted with race detection against the float64 oracle (from jax 0.11 on),
and lowered for Hopper in the form that runs there, which the interpreter cannot run (`kernels/_mosaic_gpu.py`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import CAUSAL, Setting, arrays, oracle, tokens
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_attention_op import assert_close

from kernels import _compat, _mosaic_gpu
from kernels.attention import attention, fused, masks, mosaic_gpu, reference
from kernels.attention.fused import Sizes
from kernels.attention.mosaic_gpu_program import REWRITTEN, lowerable
from kernels.platform import compiling_for, interpreted
from kernels.tokens import Tokens, sequence
from kernels.tolerance import relative_error, tolerance

INTERPRETER = hasattr(plgpu, "InterpretGPUParams")
SMALL = Sizes((64, 64), (64, 64))  # One warpgroup forwards; the gradients of k and v made apart.
SETTINGS = {
    "packed_grouped": (
        Setting((140, 140, 2, 1, 64, 64), CAUSAL & masks.segments() & masks.valid(), packed=True), "bfloat16", None
    ),
    "window_fewer_queries": (Setting((70, 150, 4, 2, 40, 72), CAUSAL & masks.sliding_window(9)), "float16", SMALL),
}  # fmt: skip


def inputs(name):
    """Of one batch row, or of both where they differ in their tokens; as the kernels get them."""
    setting, dtype, _ = SETTINGS[name]
    made = {key: np.asarray(jnp.asarray(a, dtype), np.float64) for key, a in arrays(setting).items()}
    return made if setting.packed else {key: a[:1] for key, a in made.items()}


def exact(name, x):
    """The oracle, which has two batch rows."""
    rows = len(x["q"])
    found = oracle(SETTINGS[name][0], {key: np.resize(a, (2, *a.shape[1:])) for key, a in x.items()})
    return {key: a[:rows] for key, a in found.items()}


@functools.cache
def compiled(name):
    setting, _, sizes = SETTINGS[name]
    q_tokens, k_tokens = tokens(setting)
    more = dict(mask=setting.mask, q_tokens=q_tokens, k_tokens=k_tokens)

    @jax.jit
    def forward_and_gradients(primal, d_out, d_lse):
        (out, lse), pull = jax.vjp(lambda primal: attention(**primal, **more, implementation="mosaic_gpu"), primal)
        return {"out": out, "lse": lse, **pull((d_out.astype(out.dtype), d_lse))[0]}

    def call(*args):
        with pytest.MonkeyPatch.context() as patch, interpreted():
            if sizes is not None:
                patch.setattr(mosaic_gpu, "chosen", lambda *shapes: sizes)
            return forward_and_gradients(*args)

    return call


def run(name, x):
    dtype = SETTINGS[name][1]
    primal = {key: jnp.asarray(a, dtype) for key, a in x.items() if key[:2] != "d_"}
    found = compiled(name)(primal, *(jnp.asarray(x[key], jnp.float32) for key in ("d_out", "d_lse")))
    return {key: np.asarray(a, np.float64) for key, a in found.items()}


if INTERPRETER:

    @pytest.mark.parametrize("name", SETTINGS)
    def test_it_agrees_with_the_oracle(name):
        x = inputs(name)
        assert_close(run(name, x), exact(name, x), SETTINGS[name][1])

    def test_what_a_row_may_not_see_never_reaches_it():
        """Key 81 has NaN and infinity; rows 1 to 9 see it, and from them it reaches keys 73 to 89."""
        name = "window_fewer_queries"
        x, limit = inputs(name), tolerance(SETTINGS[name][1]).gradient
        rows, keys = np.ones(70, bool), np.ones(150, bool)
        rows[1:10], keys[73:90] = False, False
        clean = exact(name, x)
        x["k"][:, 81, 0, :7], x["v"][:, 81, 1, 3] = np.nan, np.inf
        found = run(name, x)
        assert all(np.isnan(found[key][:, ~rows]).all() for key in ("out", "lse", "q"))
        for keep, names in ((rows, ("out", "lse", "q")), (keys, ("k", "v"))):
            for key in names:
                assert relative_error(found[key][:, keep], clean[key][:, keep]) < limit, key

    def test_changed_scores_and_dropout_with_all_their_gradients():
        """Against the reference in float32. The first 128 queries, a whole block, see no key; the last block sees one
        key block more in the second head than in the first. The function has no slope at 0, which all padding has."""
        rng, length, keys = np.random.default_rng(3), 300, 172
        q, d_out = (jnp.asarray(rng.standard_normal((1, length, 2, 16)), jnp.bfloat16) for _ in range(2))
        k, v = (jnp.asarray(rng.standard_normal((1, keys, 1, 16)), jnp.bfloat16) for _ in range(2))
        bias = jnp.asarray(rng.standard_normal((1, 1, length, keys)), jnp.float32)
        slope = jnp.asarray(0.02, jnp.float32)
        gain = jnp.asarray(rng.standard_normal((2, keys)), jnp.float32)
        index = np.arange(length, dtype=np.int32)[None]

        def changed(s, at, slope, gain):
            far = jnp.log1p(abs(at.query - at.key).astype(s.dtype))
            return s + jnp.sqrt(abs(s)) - slope * far + gain[at.head, at.key]

        more = dict(
            mask=CAUSAL & masks.head_windows((1, 60)),
            q_tokens=Tokens(index=index - (length - keys)),
            k_tokens=Tokens(index=index[:, :keys]),
            scale=0.25,
            soft_cap=3.0,
            sinks=None,
            score_mod=changed,
            dropout=0.2,
            dropout_seed=5,
        )

        def results(function, *primal):
            (out, lse), pull = jax.vjp(lambda q, k, v, bias, *arrays: function(q, k, v, bias, arrays), *primal)
            return out, lse, *pull((d_out.astype(out.dtype), jnp.ones_like(lse)))

        def ours(q, k, v, bias, arrays):
            return fused.attention(mosaic_gpu, q, k, v, bias=bias, score_arrays=arrays, **more)

        def plain(q, k, v, bias, arrays):
            return reference.attention(q, k, v, bias=bias, score_arrays=arrays, **more)

        with interpreted():
            found = jax.jit(functools.partial(results, ours))(q, k, v, bias, slope, gain)
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        wanted = results(plain, *wide, bias, slope, gain)
        for name, a, b in zip("out lse q k v bias slope gain".split(), found, wanted, strict=True):
            assert relative_error(a, b) < tolerance("bfloat16").gradient, name

    def test_races_are_found():
        """Two warpgroups write one place."""

        def racy(out_ref, shared):
            shared[...] = jnp.full((128,), jax.lax.axis_index("group"), jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared, out_ref)
            plgpu.wait_smem_to_gmem(0)

        with pytest.raises(Exception, match="races in a Mosaic GPU kernel"):
            jax.block_until_ready(
                _mosaic_gpu.launch(
                    racy,
                    (),
                    out_type=(jax.ShapeDtypeStruct((128,), jnp.float32),),
                    scratch=(plgpu.SMEM((128,), jnp.float32),),
                    grid={"tile": 1},
                    groups=1,
                    interpret=True,
                    approximate=True,
                )
            )
            jax.effects_barrier()

else:

    def test_before_jax_0_11_they_refuse_to_be_interpreted():
        x = {
            key: jnp.asarray(a, "bfloat16")
            for key, a in arrays(SETTINGS["window_fewer_queries"][0]).items()
            if key[:2] != "d_"
        }
        with interpreted(), pytest.raises(NotImplementedError, match="interpreted from jax 0.11 on"):
            attention(**x, implementation="mosaic_gpu")


def lowered(q, k, v, **more):
    """The module for a GPU of forward and backward pass."""
    both = sequence(q.shape[1])
    options = dict(mask=CAUSAL, q_tokens=both, k_tokens=both, scale=0.1, soft_cap=0.0, sinks=None, bias=None)
    options |= dict(score_mod=None, score_arrays=(), dropout=0.0, dropout_seed=0) | more

    def function(q, k, v):
        (out, lse), pull = jax.vjp(lambda q, k, v: fused.attention(mosaic_gpu, q, k, v, **options), q, k, v)
        return out, pull((out, lse))

    with compiling_for("gpu", "NVIDIA H200"):
        return jax.jit(function).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()


def shaped(heads=(4, 4), width=(64, 64), dtype="bfloat16", length=256):
    make = lambda h, d: jax.ShapeDtypeStruct((1, length, h, d), dtype)  # noqa: E731
    return make(heads[0], width[0]), make(heads[1], width[0]), make(heads[1], width[1])


@pytest.mark.parametrize(
    ("width", "dtype", "mask"),
    [
        ((64, 64), "bfloat16", CAUSAL),
        ((128, 128), "float16", CAUSAL & masks.sliding_window(100)),
        ((192, 128), "bfloat16", masks.everything()),
        ((256, 256), "bfloat16", CAUSAL & masks.segments()),
    ],
)
def test_the_form_for_hopper_lowers(width, dtype, mask):
    text = lowered(*shaped((4, 2), width, dtype), mask=mask)
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3, "forward, and two kernels backward"


def test_every_elementwise_operation_lowers():
    def everything(s, places):
        made = [jnp.floor(s), jnp.ceil(s), jnp.expm1(-abs(s)), jnp.log1p(s * s), jnp.sqrt(1 + s * s), jnp.tan(s)]
        made += [1 / (2 + s * s), s**3, jnp.exp2(-abs(s)), jax.nn.gelu(s), jnp.where(jnp.isfinite(s), s, 0)]
        made += [
            jnp.maximum(s, places.key.astype(s.dtype)),
            jnp.round(s),
            jnp.sign(s) * jnp.sin(s),
            jnp.arctan2(s, 2.0),
        ]
        return sum(made)

    assert lowered(*shaped((1, 1), length=128), score_mod=everything).count("@mosaic_gpu") == 3


@pytest.mark.parametrize(
    "name", ["floor", "ceil", "expm1", "log1p", "sqrt", "tan", "tanh", "isfinite", "inverse", "one"]
)
def test_what_is_put_in_place_of_missing_operations_means_the_same(name):
    functions = {"inverse": lambda x: jax.lax.integer_pow(x, -2), "one": lambda x: jax.lax.integer_pow(x, 0)}
    function = functions.get(name) or getattr(jnp, name)
    x = jnp.asarray([0.0, 1e-9, -1e-6, 0.3, -0.5, 0.5, 1.0, 2.5, -3.7, 40.0, 1e6, jnp.inf, -jnp.inf, jnp.nan])
    x = jnp.maximum(x, -0.9) if name == "log1p" else abs(x) if name == "sqrt" else x
    text = str(jax.make_jaxpr(lowerable(function))(x))
    assert not any(f" {operation} " in text for operation in set(REWRITTEN) - {"integer_pow"})
    found, exact = (np.asarray(f(x), np.float64) for f in (lowerable(function), function))
    np.testing.assert_allclose(found, exact, rtol=2e-6, atol=2e-7 if name in ("expm1", "tanh") else 1e-12)


def test_what_they_cannot_do_is_refused(monkeypatch):
    with pytest.raises(NotImplementedError, match="no pow of floating point numbers"):
        lowered(*shaped(), score_mod=lambda s, places: jax.lax.pow(s, 1.5))
    with pytest.raises(NotImplementedError, match="blocks of 32 tokens; .* multiples of 64 up to 256"):
        lowered(*shaped(), blocks=Sizes((32, 64), (64, 64)))
    with pytest.raises(NotImplementedError, match="bytes of shared memory; a Hopper GPU has 232448"):
        lowered(*shaped(width=(1024, 64)), blocks=Sizes((128, 128), (64, 64)))
    monkeypatch.setattr(_compat, "cuda_version", lambda: 12081)
    with pytest.raises(NotImplementedError, match="CUDA 12.8 miscompiles masked loops"):
        lowered(*shaped())


@pytest.mark.parametrize("width", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("value_width", [64, 128, 256])
def test_chosen_blocks_fit_shared_memory(width, value_width):
    q, v = (1, 4096, 8, width), (1, 4096, 8, value_width)
    sizes = mosaic_gpu.chosen(q, q, v, jnp.bfloat16)
    used = mosaic_gpu.shared_bytes(q, v, sizes)
    assert max(used.values()) + 512 <= _mosaic_gpu.SHARED_BYTES == 232448
    assert mosaic_gpu.padded(width) % 64 == 0 <= mosaic_gpu.padded(width) - width < 64
