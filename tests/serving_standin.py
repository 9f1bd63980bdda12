"""One of two processes that serve together: `python -m tests.serving_standin ROLE PORT OUTPUT`. Role 0 reads prompts as
MLA, role 1 decodes as TPLA and writes what it found."""

import dataclasses
import json
import sys

import jax

import sharding
from models import serving
from models.serving import processes
from tests.serving_models import NEW, PROMPTS, as_mla, layout, network

DEPTH = 2


def main(role: int, port: int, output: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, role)
    prefill, decode = (
        layout("tpla", [device for device in jax.devices() if device.process_index == i]) for i in range(2)
    )
    link, model = processes.Link(prefill.mesh, decode.mesh), network("tpla_pd", DEPTH)
    if role == 0:
        source = serving.Prefill(as_mla("tpla_pd", DEPTH), prefill)
        found = {"served": processes.serve(source, link, serving.kept(model, decode))}
    else:
        found = decoded(link, model, decode)
    with open(output, "w") as file:
        json.dump(found, file)


def decoded(link, model, decode) -> dict:
    far = processes.FromAfar(link, model)
    watched = Watched(far)
    engine = serving.Engine(model, rows=3, page_size=4, layout=decode, prefill=watched)
    tokens = engine.generate(PROMPTS, max_new_tokens=NEW)
    far.close()
    _, kinds = processes.stacks(engine.kept, 16)
    sent = sharding.collectives(link.lowered(kinds).compile(), link.mesh)
    return {
        "tokens": tokens,
        "free": engine.pages.free == engine.pages.count,
        "parts": watched.parts,
        "own": sorted(device.id for device in jax.local_devices()),
        "sent": {name: [dataclasses.asdict(one) for one in found] for name, found in sent.items()},
    }


class Watched:
    """Notes of the first prompt's rows which device holds what shape."""

    def __init__(self, source) -> None:
        self.source, self.parts = source, []

    def handed(self, prompt, target):
        handed = self.source.handed(prompt, target)
        for x in jax.tree.leaves(handed.layers) if not self.parts else ():
            self.parts.append([[shard.device.id, shard.data.shape] for shard in x.addressable_shards])
        return handed


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
